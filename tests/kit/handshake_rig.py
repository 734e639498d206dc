"""Handshakes under way, for the tests of handshake()."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Iterator

import pytest
from OpenSSL import SSL
from tests.kit.engine_rig import Rig
from tests.kit.tls_rig import (
    TlsEnd,
    our_end,
)

from nodepass.engine.twin.engine import Completion

Engine = Callable[..., Rig]


every_role = pytest.mark.parametrize("is_server", [True, False], ids=["server", "client"])


class Shake:
    """One handshake: the engine in the role asked for, Python's ssl in the other."""

    def __init__(
        self,
        rig: Rig,
        is_server: bool,
        *,
        ours: SSL.Context | None = None,
        theirs: ssl.SSLContext | None = None,
    ) -> None:
        self.rig = rig
        outer, self.inner = rig.ends()
        self.end = TlsEnd(rig, outer, is_server=not is_server, context=theirs)
        self.connection = our_end(is_server, ours)
        self.token = 0

    def start(self) -> None:
        self.token = self.rig.engine.handshake(self.inner.fileno(), self.connection)

    async def ended(self) -> Completion:
        """Wait for the engine's end of it; the socket must be whole and ours again."""
        ended = await self.rig.ended(self.token)
        assert (ended.up, ended.down) == (0, 0)
        os.fstat(self.inner.fileno())
        assert self.inner.getblocking() is False
        return ended

    async def fails(self, code: int) -> Completion:
        ended = await self.ended()
        assert ended.reason == self.rig.kind.module.REASON_RESET
        assert (ended.side, ended.code) == (1, code)
        return ended

    async def both(self) -> None:
        """Let both sides come to a good end."""
        await self.end.shake()
        ended = await self.ended()
        assert ended[1:] == (0, 0, self.rig.kind.module.REASON_FINISHED, 0, 0, 0)


@contextlib.contextmanager
def held(*shakes: Shake) -> Iterator[None]:
    """Close the lent sockets, which stay ours, in the end."""
    try:
        yield
    finally:
        for shake in shakes:
            shake.inner.close()


async def stuff(sock: socket.socket) -> int:
    """Send until the kernel takes no more, also after a while; return how much that was."""
    stuffed = rounds = 0
    while rounds < 5:
        rounds += 1
        with contextlib.suppress(BlockingIOError):
            while True:
                stuffed += sock.send(bytes(1 << 16))
                rounds = 0
        await asyncio.sleep(0.005)
    return stuffed
