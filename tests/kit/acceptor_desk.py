"""An acceptor, and the far ends of who stands there."""

from __future__ import annotations

import socket
import ssl

from OpenSSL import SSL
from tests.kit.context import make_context
from tests.kit.engine_rig import tcp_pair
from tests.kit.secure import (
    ALPN,
    LibrarySide,
    Side,
    TlsStream,
    library_client,
    python_client,
)
from tests.kit.stream import Stream
from tests.kit.timing import until, within

from nodepass.config.environment import Settings
from nodepass.engine.relays import Relays
from nodepass.net.readiness import Watch
from nodepass.observe.log import Log
from nodepass.protocol.messages import Hello, LinkClaim
from nodepass.server.acceptor import Acceptor
from nodepass.server.pending import PendingConnection
from nodepass.server.throttle import Throttle
from nodepass.tls.contexts import ServerTls


class CountedTls(ServerTls):
    """A server's TLS that tells how many connections it was asked for."""

    accepted = 0

    def accept(self, *, is_native: bool) -> SSL.Connection:
        self.accepted += 1
        return super().accept(is_native=is_native)


class Street:
    """An acceptor, and the far ends of who stands there.

    Args:
        timeout: seconds from accept to a whole first line.
        level: of its log.
        data_port: what it tells seed clients, 0 = they are not admitted.
        kind: which engine does the TLS.
        is_secure: whether the greeting asks for TLS.
        key: the stretched password.
    """

    def __init__(
        self,
        timeout: float = 30.0,
        *,
        level: str = "none",
        data_port: int = 0,
        kind: str = "python",
        is_secure: bool = False,
        key: bytes | None = None,
    ) -> None:
        self.openings: list[tuple[PendingConnection, Hello | LinkClaim]] = []
        self.known: set[str] = set()
        self.clients = 1
        """Of each known source."""
        self.throttle = Throttle()
        self.relays = Relays(Settings(threads=1, engine=kind))  # type: ignore[arg-type]
        log = Log("street", level)
        self.tls: CountedTls | None = None
        if is_secure:
            self.tls = CountedTls(1, None, None, log, self.relays.alpn_selector)
        settings = Settings(threads=1, handshake_timeout=timeout)
        context = make_context(self.relays, log=log, settings=settings)
        self.counters = context.counters
        self.watch = Watch()
        self.acceptor = Acceptor(context, self, self.watch, self.throttle, key, self.tls)
        self.acceptor.data_port = data_port
        self._socks: list[socket.socket] = []
        self._given: list[socket.socket] = []

    def come(self, host: str = "10.0.0.1", port: int = 999) -> socket.socket:
        """Let somebody call from a host; return the far end."""
        near, far = tcp_pair()
        self._given.append(near)
        self._socks += [near, far]
        self.acceptor.admit(near, host, port)
        return far

    def leaving(self, host: str = "10.0.0.1") -> None:
        """Let somebody call who has gone before the greeting."""
        near, far = tcp_pair()
        self._socks += [near, far]
        near.shutdown(socket.SHUT_WR)
        self.acceptor.admit(near, host, 999)

    def greeted(self, side: Side | None = None, host: str = "10.0.0.1") -> TlsStream:
        """Let somebody call who has read the greeting and is about to speak TLS."""
        far = self.come(host)
        assert far.recv(1000).endswith(b"\n")
        return TlsStream(Stream(far), client_side() if side is None else side)

    async def secured(self, side: Side | None = None, host: str = "10.0.0.1") -> TlsStream:
        """Let somebody call and do the handshake, as far as he can tell."""
        far = self.greeted(side, host)
        async with within(10):
            await far.shake()
        return far

    async def shaking(self, count: int = 1, host: str = "10.0.0.1") -> list[TlsStream]:
        """Let some call who begin a handshake and go no further."""
        before = len(self.relays)
        fars = [self.greeted(host=host) for _ in range(count)]
        for far in fars:
            far.side.shake()
            far.sock.send(far.side.give()[:64])
        await until(lambda: len(self.relays) == before + count, 5, "handshakes under way")
        return fars

    def near(self, number: int = -1) -> socket.socket:
        """Our end of the nth who came."""
        return self._given[number]

    def greeting(self, far: socket.socket) -> bytes:
        """What the kernel of the far side has at once: the greeting is sent while admitting."""
        return far.recv(1000)

    def is_out(self, far: socket.socket) -> bool:
        """Whether this far end was closed or reset, behind whatever was sent to it."""
        try:
            while far.recv(1000):
                pass
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def take_opening(self, pending: PendingConnection, opening: Hello | LinkClaim) -> None:
        self.openings.append((pending, opening))

    def count_from(self, source: str) -> int:
        return self.clients if source in self.known else 0

    async def __aenter__(self) -> Street:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.acceptor.close()
        self.watch.close()
        await self.relays.close()
        for sock in self._socks:
            sock.close()


def client_side(*alpn: bytes) -> LibrarySide:
    """Return a client that verifies nothing and offers these protocols, else ours."""
    return LibrarySide(library_client(), alpn=alpn or (ALPN,))


def oldest() -> ssl.SSLContext:
    """Return the context of a client that knows nothing above TLS 1.2."""
    context = python_client()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def outside(far: TlsStream) -> Stream:
    """Return the bare connection under TLS."""
    return Stream(far.sock)
