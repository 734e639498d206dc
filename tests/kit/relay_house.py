"""An engine with TLS, and peers that take their time."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from OpenSSL import SSL
from tests.kit.engine_rig import tcp_pair
from tests.kit.secure import PythonSide, TlsStream, python_client
from tests.kit.stream import Stream
from tests.kit.timing import within

from nodepass.config.environment import Settings
from nodepass.engine.relays import Reason, Relays
from nodepass.observe.log import Log
from nodepass.tls import contexts


class House:
    """One Relays, a certificate, and the outer ends of what is secured and joined."""

    def __init__(self, kind: str) -> None:
        self.relays = Relays(Settings(threads=1, engine=kind))  # type: ignore[arg-type]
        self.tls = contexts.ServerTls(
            1, None, None, Log("house", "none"), self.relays.alpn_selector
        )
        self._socks: list[socket.socket] = []

    def pair(self) -> tuple[Stream, socket.socket]:
        """Return the outer and the inner end of a connection."""
        outer, inner = tcp_pair()
        self._socks += [outer, inner]
        return Stream(outer), inner

    def accept(self) -> SSL.Connection:
        return self.tls.accept(is_native=False)

    async def secured(self) -> tuple[TlsStream, socket.socket, SSL.Connection]:
        """Return a connection whose handshake is done: its far end, and ours."""
        outer, inner = self.pair()
        connection, far = self.accept(), TlsStream(outer, PythonSide(python_client()))
        async with within(10):
            _, result = await asyncio.gather(far.shake(), self.relays.secure(inner, connection))
        assert result.is_done, result
        return far, inner, connection

    async def __aenter__(self) -> House:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.relays.close()
        for sock in self._socks:
            sock.close()


class Slow:
    """An engine that ends a handshake when the test says so."""

    def __init__(self, *_: object, **__: object) -> None:
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self.aborted: list[int] = []
        self._completions: list[tuple[int, ...]] = []

    def fileno(self) -> int:
        return self._ear.fileno()

    def handshake(self, fd: int, connection: object) -> int:
        return 7

    def abort(self, token: int) -> None:
        self.aborted.append(token)

    def tell(self, reason: Reason) -> None:
        self._completions = [(7, 0, 0, reason, 0, 0, 0)]
        self._bell.send(b"!")

    def poll(self) -> list[tuple[int, ...]]:
        with contextlib.suppress(OSError):
            self._ear.recv(100)
        completions, self._completions = self._completions, []
        return completions

    def close(self, deadline: float) -> bool:
        self._bell.close()
        self._ear.close()
        return True
