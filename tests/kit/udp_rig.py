"""UDP for the engine's tests: gates, visitors, targets, and links in the hands of a test.

    visitors == UDP == gate [engine] link == far end
                               near end == link [engine] target socket == UDP == target

A test holds the visitors and either the far end of the link, or the near end and the target, or
no end of the link at all (`tunnel`: one engine has both halves).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from OpenSSL import SSL
from tests.kit.engine_rig import PATIENCE, Kind, Rig
from tests.kit.options import fold
from tests.kit.tls_rig import End, ends_for
from tests.kit.udp_words import ANY, HOST, secure_pair, udp_pair, udp_socket

from nodepass.engine.twin.engine import Completion, Newcomer, UdpCompletion, UdpCounts


class Mouth:
    """A UDP socket in the hands of a test."""

    def __init__(self, rig: UdpRig, sock: socket.socket) -> None:
        self.rig = rig
        self.sock = sock

    @property
    def name(self) -> tuple[str, int]:
        """(host, port) of this end."""
        host, port = self.sock.getsockname()[:2]
        return str(host), int(port)

    def say(self, *datagrams: bytes) -> None:
        """Send datagrams to whom the socket is connected to."""
        for data in datagrams:
            self.sock.send(data)

    async def hear(self) -> bytes:
        """Receive one datagram."""
        async with asyncio.timeout(PATIENCE):
            return await self.rig.loop.sock_recv(self.sock, 1 << 16)

    async def hear_from(self) -> tuple[bytes, tuple[str, int]]:
        """Receive one datagram and return it with its source."""
        ear = asyncio.Event()
        self.rig.loop.add_reader(self.sock, ear.set)
        try:
            async with asyncio.timeout(PATIENCE):
                await ear.wait()
        finally:
            self.rig.loop.remove_reader(self.sock)
        data, (host, port, *_) = self.sock.recvfrom(1 << 16)
        return data, (host, port)

    async def hear_many(self, count: int) -> list[bytes]:
        """Receive so many datagrams."""
        return [await self.hear() for _ in range(count)]

    def hear_now(self) -> list[bytes]:
        """Receive what is here already."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.sock.recv(1 << 16))
        return found


class Bound(NamedTuple):
    """A visitor's relay; `far` is the other end of its link."""

    far: End
    token: int


class Dialled(NamedTuple):
    """A target's relay; `near` is the other end of its link."""

    near: End
    target: Mouth
    token: int


class UdpRig(Rig):
    """A rig with gates, and the news of UDP apart from those of TCP."""

    def __init__(self, kind: Kind, *, pair: str = "tcp", flows: int = 1024) -> None:
        super().__init__(kind, pair=pair, flows=flows)
        self.newcomers: deque[Newcomer] = deque()
        """Those that no test has taken yet."""
        self._over: dict[int, UdpCompletion] = {}
        self._bells: set[asyncio.Future[None]] = set()

    def check_balance(self) -> None:
        super().check_balance()
        left = self.engine.statistics()
        held = (left.gates_open, left.peers_waiting, left.datagram_bytes_held)
        assert held == (0, 0, 0), f"gates, peers, bytes of datagrams left: {held}"

    # --- news ---

    def _collect(self) -> None:
        for news in self.engine.poll():
            match type(news).__name__:
                case "Newcomer":
                    self.newcomers.append(Newcomer(*news))
                case "UdpCompletion":
                    assert news.token not in self._over, "an end was reported twice"
                    counts = UdpCounts(*news.counts)
                    self._over[news.token] = UdpCompletion(news.token, counts, *news[2:])
                case _:
                    self._note(Completion(*news))
        bells, self._bells = self._bells, set()
        for bell in bells:
            if not bell.done():
                bell.set_result(None)

    def _note(self, ended: Completion) -> None:
        assert ended.token not in self._ended, "a flow was reported twice"
        self._ended[ended.token] = ended
        waiter = self._wanted.pop(ended.token, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(ended)

    async def told(self, condition: Callable[[], object], what: str) -> None:
        """Wait until news make a condition true."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    bell: asyncio.Future[None] = self.loop.create_future()
                    self._bells.add(bell)
                    await bell
        except TimeoutError:
            raise AssertionError(f"never heard of: {what}") from None

    async def let_pass(self, seconds: float = 0.0) -> None:
        """Give the loop and all threads a turn; or wait, where a law is about time."""
        await asyncio.sleep(seconds or 0.001)

    async def newcomer(self) -> Newcomer:
        """Wait for the next source that a gate did not know."""
        await self.told(lambda: self.newcomers, "a newcomer")
        return self.newcomers.popleft()

    async def over(self, token: int) -> UdpCompletion:
        """Wait for the completion of a gate, a waiting peer or a UDP relay."""
        await self.told(lambda: token in self._over, f"the end of {token}")
        return self._over[token]

    def forget(self) -> None:
        """Let go of the ends heard of so far."""
        self._over.clear()

    def is_over(self, token: int) -> bool:
        """Tell whether such a completion has been collected."""
        return token in self._over

    def counts(self, token: int) -> UdpCounts:
        """Return the running counts of a gate or a UDP relay, also after its end."""
        if token in self._over:
            return self._over[token].counts
        found = self.engine.udp_counts(token)
        return UdpCounts(*found) if found is not None else self._over[token].counts

    async def counted(self, token: int, **least: int) -> UdpCounts:
        """Wait until counts have come up to something."""
        await self.until(
            lambda: all(getattr(self.counts(token), name) >= size for name, size in least.items()),
            f"counts {least} of {token}",
        )
        return self.counts(token)

    # --- gates and visitors ---

    def serve(self, sock: socket.socket | None = None, **options: object) -> int:
        """Open a gate on a socket, or on a new one of loopback."""
        sock = sock or udp_socket()
        token = int(self.engine.udp_serve(sock.fileno(), **fold(options)))
        sock.detach()
        return token

    def gate(self, host: str = HOST, *, is_dual: bool = False, **options: object) -> Gate:
        """Open a gate on a new socket."""
        sock = udp_socket(host, is_dual=is_dual)
        port = int(sock.getsockname()[1])
        return Gate(self, self.serve(sock, **options), host, port)

    def mouth(self, sock: socket.socket) -> Mouth:
        """Return a test's end around a socket, which is closed with the rig."""
        self.socks.append(sock)
        return Mouth(self, sock)

    # --- links ---

    def link(
        self, letter: str, *, is_tls: bool, buffers: dict[str, int] | None = None
    ) -> tuple[End, socket.socket, SSL.Connection | None]:
        """Return (outer end, inner socket, inner Connection or None); see tls_rig.ends_for."""
        return ends_for(self, letter, letter if is_tls else "", buffers=buffers)

    def bind(
        self,
        peer: int,
        *,
        is_tls: bool = False,
        buffers: dict[str, int] | None = None,
        **options: object,
    ) -> Bound:
        """Give a waiting peer a link whose far end stays with the test."""
        far, inner, tls = self.link("a", is_tls=is_tls, buffers=buffers)
        with inner:  # detached, if all goes well
            return Bound(far, self.hand_bind(peer, inner, tls=tls, **options))

    def hand_bind(self, peer: int, inner: socket.socket, **options: object) -> int:
        """Give a waiting peer a link."""
        token = int(self.engine.udp_bind(peer, inner.fileno(), **fold(options)))
        inner.detach()
        return token

    def dial(
        self,
        *,
        is_tls: bool = False,
        buffers: dict[str, int] | None = None,
        target: socket.socket | None = None,
        host: str = HOST,
        **options: object,
    ) -> Dialled:
        """Open a relay to a target that stays with the test, as does the near end of its link.

        Args:
            target: the engine's end; None = one that is connected to the test's.
        """
        near, inner, tls = self.link("b", is_tls=is_tls, buffers=buffers)
        outer = None
        if target is None:
            outer, target = udp_pair(host)
        mouth = self.mouth(outer or socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        return Dialled(near, mouth, self.hand_dial(inner, target, tls=tls, **options))

    def hand_dial(self, inner: socket.socket, target: socket.socket, **options: object) -> int:
        """Open a relay between a link and a target."""
        token = int(self.engine.udp_dial(inner.fileno(), target.fileno(), **fold(options)))
        inner.detach()
        target.detach()
        return token

    def tunnel(
        self,
        peer: int,
        target: socket.socket,
        *,
        is_tls: bool = False,
        bind: dict[str, object] | None = None,
        dial: dict[str, object] | None = None,
    ) -> tuple[int, int]:
        """Join a waiting peer to a target by a link of which the engine has both ends."""
        one, other = self.pair()
        server, client = secure_pair() if is_tls else (None, None)
        return (
            self.hand_bind(peer, one, tls=server, **(bind or {})),
            self.hand_dial(other, target, tls=client, **(dial or {})),
        )

    async def echo(self, sock: socket.socket) -> None:
        """Send everything back to its sender, until cancelled."""
        ear = asyncio.Event()
        self.loop.add_reader(sock, ear.set)
        try:
            while True:
                await ear.wait()
                ear.clear()
                with contextlib.suppress(BlockingIOError):
                    while True:
                        data, address = sock.recvfrom(1 << 16)
                        sock.sendto(data, address)
        finally:
            self.loop.remove_reader(sock)


class Gate:
    """A gate, and how its visitors reach it."""

    def __init__(self, rig: UdpRig, token: int, host: str, port: int) -> None:
        self.rig = rig
        self.token = token
        self.host = {ANY: HOST, "::": "::1"}.get(host, host)
        self.port = port

    def visitor(self, source: str | None = None, *, to: str | None = None) -> Mouth:
        """Return a new visitor: a socket on `source`, connected to the gate at `to`."""
        to = to or self.host
        sock = udp_socket(source or ("::1" if ":" in to else HOST))
        sock.connect((to, self.port))
        return self.rig.mouth(sock)

    async def welcome(self, visitor: Mouth, *datagrams: bytes) -> int:
        """Let a new visitor speak and return its Newcomer's token."""
        visitor.say(*datagrams)
        newcomer = await self.rig.newcomer()
        assert (newcomer.gate, newcomer.host, newcomer.port) == (self.token, *visitor.name)
        return newcomer.token
