"""Rows of benchmarks that several tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from benchmarks import (
    catalog,
)

if not Path("/proc/self/stat").exists():
    pytest.skip("the benchmarks need Linux", allow_module_level=True)

ENVIRONMENT = dict(os.environ)


def toml(text: str) -> str:
    """A row with this text in it; each "|" is a line of its own."""
    return f'[[contender]]\nname = "one"\nprotocols = ["tcp"]\n{text}'.replace("|", "\n")


BULK, HTTP, FIRST, UDP, IDLE = catalog.choose(
    ("bulk-up-1", "http-16", "first-byte", "udp-200-1", "idle-5000")
)
