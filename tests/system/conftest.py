"""What every system test may ask for."""

from __future__ import annotations

import importlib.util
import resource
from collections.abc import Iterator

import pytest

HAS_NATIVE = importlib.util.find_spec("nodepass._fastcopy") is not None

ENGINES = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not HAS_NATIVE, reason="the native engine is not built here"),
    ),
    "python",
]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Name of the engine that both processes of the test use: each in turn."""
    return str(request.param)


@pytest.fixture(params=["", "?tls=1"], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> str:
    """Query of the server's URL: without TLS and with it."""
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def many_descriptors() -> Iterator[None]:
    """Lift the soft limit on descriptors: bursts of 1000 visitors are held in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
