"""The two engines as parameters of a test."""

from __future__ import annotations

import importlib.util
from typing import Final

import pytest

HAS_NATIVE: Final = importlib.util.find_spec("nodepass._fastcopy") is not None

both = pytest.mark.loops("asyncio", "uvloop")
"""On each event loop."""

native = pytest.mark.skipif(not HAS_NATIVE, reason="the native engine is not built here")

engines = pytest.mark.parametrize("kind", [pytest.param("native", marks=native), "python"])
"""On each engine, by its name."""
