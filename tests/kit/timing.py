"""Time limits and waiting: polling with an end, never a sleep for effect."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

SCALE: Final = float(os.environ.get("NODEPASS_TEST_SCALE", "1"))
"""Multiplies every time limit of these tests; raise it on a slow or crowded machine."""

POLL: Final = 0.01
"""Seconds between two looks at something that does not announce itself."""

LOWEST_PORT: Final = 20000
HIGHEST_PORT: Final = 31999
"""Ports below Linux' ephemeral range (32768): thousands of outgoing connections of these tests
could otherwise land on a port that a restarted server needs back."""


def _own_ports() -> range:
    """Give the share of the ports that is this process' own: the suite runs in several."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    share = (HIGHEST_PORT + 1 - LOWEST_PORT) // workers
    return range(LOWEST_PORT + worker * share, LOWEST_PORT + (worker + 1) * share)


_random = random.SystemRandom()
_own: Final = _own_ports()
_given: set[int] = set()


def limit(seconds: float) -> float:
    """Scale a time limit."""
    return seconds * SCALE


def within(seconds: float) -> AbstractAsyncContextManager[object]:
    """Bound a block by a scaled time limit; TimeoutError beyond it."""
    return asyncio.timeout(limit(seconds))


async def until(is_met: Callable[[], object], seconds: float, what: str) -> float:
    """Poll a condition until it holds.

    Args:
        is_met: looked at every POLL seconds.
        seconds: limit before scaling.
        what: completes the sentence "waited in vain for …".

    Returns:
        The seconds that it took.
    """
    start = time.monotonic()
    while not is_met():
        if time.monotonic() - start > limit(seconds):
            raise AssertionError(f"waited {limit(seconds):.1f} s in vain for {what}")
        await asyncio.sleep(POLL)
    return time.monotonic() - start


async def settled(look: Callable[[], object], seconds: float, what: str, looks: int = 20) -> None:
    """Poll a figure until so many looks in a row have shown the same; arguments as `until`."""
    seen: list[object] = []

    def is_settled() -> bool:
        seen.append(look())
        return len(seen) >= looks and all(value == seen[-1] for value in seen[-looks:])

    await until(is_settled, seconds, what)


def free_port(host: str = "127.0.0.1") -> int:
    """Find a port, free for TCP and for UDP, that no earlier call has named.

    No option eases the looks: where a connection of an earlier test still lingers, whoever
    binds without SO_REUSEADDR would fail.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(1000):
        port = _random.choice(_own)
        if port in _given:
            continue
        with socket.socket(family) as stream, socket.socket(family, socket.SOCK_DGRAM) as datagram:
            try:
                stream.bind((host, port))
                datagram.bind((host, port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise AssertionError(f"no free port between {_own.start} and {_own.stop - 1}")


def has_ipv6() -> bool:
    """Tell whether this machine has an IPv6 loopback."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
