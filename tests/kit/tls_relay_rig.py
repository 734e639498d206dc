"""Shapes and sides of TLS flows, as marks and constants."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from tests.kit.engine_rig import Rig
from tests.kit.tls_rig import (
    SHAPES,
)

Engine = Callable[..., Rig]


BLOB = os.urandom(3_000_000)


every_shape = pytest.mark.parametrize("shape", SHAPES)


every_side = pytest.mark.parametrize("side", [1, 2])
