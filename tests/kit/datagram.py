"""UDP as a test holds it: visitors that write to a tunnel, targets that answer behind it.

The loop reads each socket as soon as something comes, and nothing is sent twice unless the
test says so (`insist`). Loopback drops what a full socket cannot take, so whoever sends much
has to keep count of what is under way (`Target.room`).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

from .arena import Arena, Tunnel
from .timing import free_port, limit, settled, until, within

STEADY: Final = {"MIN_POOL_CAPACITY": "8", "MAX_POOL_CAPACITY": "8", "UDP_IDLE_TIMEOUT": "500ms"}
"""A pool of constant size and short sessions, so that descriptors can be compared."""

Address = tuple[str, int] | tuple[str, int, int, int]

WANTED: Final = 8 * 1024 * 1024
"""Bytes of receive buffer to ask for; without CAP_NET_ADMIN the system gives less."""

SO_RCVBUFFORCE: Final = 33
"""include/uapi/asm-generic/socket.h; the socket module does not have it."""

COST: Final = 32 * 1024
"""Bytes of that buffer which a datagram of 8 KiB may use up, the kernel's own part included."""

TURN: Final = 64
"""Datagrams read at once before others have their turn."""

EVERY: Final = 0.1
"""Seconds between two datagrams of somebody who insists."""


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class _Endpoint:
    """A UDP socket that the loop reads."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.refused = 0
        """How often the kernel said that nobody listens there."""
        sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._watch()

    def _watch(self) -> None:
        self._loop.add_reader(self.sock.fileno(), self._drain)

    def _drain(self) -> None:
        for _ in range(TURN):
            try:
                data, address = self.sock.recvfrom(65536)
            except BlockingIOError:
                return
            except ConnectionRefusedError:
                self.refused += 1
                self._loop.remove_reader(self.sock.fileno())
                self._watch()  # uvloop looks at a socket no more once that has had an error
                continue
            self._take(data, address)

    def _take(self, data: bytes, address: Address) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Close it; idempotent."""
        if self.sock.fileno() >= 0:
            self._loop.remove_reader(self.sock.fileno())
            self.sock.close()


class Visitor(_Endpoint):
    """Somebody who writes to one address, and hears only what comes from there.

    Args:
        source: own address, if not the one that the kernel picks.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", *, source: str = "") -> None:
        sock = socket.socket(_family(host), socket.SOCK_DGRAM)
        try:
            if source:
                sock.bind((source, 0))
            sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        super().__init__(sock)
        self.heard: deque[bytes] = deque()
        """What has come and nobody has read."""
        self._news = asyncio.Event()

    @property
    def port(self) -> int:
        """Its own port."""
        return int(self.sock.getsockname()[1])

    def _take(self, data: bytes, address: Address) -> None:
        self.heard.append(data)
        self._news.set()

    def send(self, data: bytes) -> None:
        """Send one datagram; an old refusal that the kernel tells us of now is only counted."""
        while True:
            try:
                self.sock.send(data)
                return
            except ConnectionRefusedError:
                self.refused += 1

    async def read(self, seconds: float = 5.0) -> bytes:
        """Return the next datagram; TimeoutError when none comes."""
        async with within(seconds):
            while not self.heard:
                self._news.clear()
                await self._news.wait()
        return self.heard.popleft()

    async def ask(self, data: bytes, seconds: float = 5.0) -> bytes:
        """Send one datagram, once, and return the next that comes."""
        self.send(data)
        return await self.read(seconds)

    async def insist(self, data: bytes, seconds: float = 10.0) -> float:
        """Send the same again and again until it comes back; return the seconds that it took."""
        start = time.monotonic()
        while time.monotonic() - start < limit(seconds):
            self.send(data)
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY):
                    while await self.read(EVERY) != data:
                        pass
                return time.monotonic() - start
        raise AssertionError(f"{data[:40]!r} did not come back within {limit(seconds):.1f} s")


class UdpTarget(_Endpoint):
    """A UDP service behind the client.

    Args:
        handler: called with each datagram; may `send` as often as it likes, now or later.
    """

    def __init__(self, handler: Handler, *, host: str = "127.0.0.1", port: int = 0) -> None:
        sock = socket.socket(_family(host), socket.SOCK_DGRAM)
        try:
            _widen(sock)
            sock.bind((host, port or free_port(host)))
        except BaseException:
            sock.close()
            raise
        super().__init__(sock)
        self.port = int(sock.getsockname()[1])
        self.sources: dict[Address, int] = {}
        """Who has written, in the order of their first datagram, and how often: one for each
        session."""
        self.received = 0
        self.last: tuple[bytes, Address] | None = None
        self._handler = handler

    @property
    def room(self) -> int:
        """How many datagrams of 8 KiB may wait here without being dropped."""
        size = int(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
        return max(1, size // COST)

    def _take(self, data: bytes, address: Address) -> None:
        self.received += 1
        self.sources[address] = self.sources.get(address, 0) + 1
        self.last = data, address
        self._handler(self, data, address)

    def send(self, data: bytes, address: Address) -> None:
        """Answer."""
        with suppress(ConnectionRefusedError):  # the session has ended; it is for another one
            self.sock.sendto(data, address)


def _widen(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, WANTED)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WANTED)


Handler = Callable[[UdpTarget, bytes, Address], None]


class Notes:
    """An echo that keeps what it has heard."""

    def __init__(self) -> None:
        self.words: list[bytes] = []

    def __call__(self, target: UdpTarget, data: bytes, address: Address) -> None:
        self.words.append(data)
        echo(target, data, address)


def echo(target: UdpTarget, data: bytes, address: Address) -> None:
    """Send everything back."""
    target.send(data, address)


def listen_only(target: UdpTarget, data: bytes, address: Address) -> None:
    """Say nothing."""


def descriptors(tunnel: Tunnel) -> tuple[int, int]:
    """Count what server and client hold."""
    return tunnel.server.fds(), tunnel.client.fds()


async def at_rest(tunnel: Tunnel) -> tuple[int, int]:
    """Wait until no session is open and the pool of a STEADY tunnel is full; count then."""
    await until(lambda: tunnel.client.fds("socket:") >= 9, 5, "control and eight idle links")
    await settled(lambda: descriptors(tunnel), 10, "a steady pool", looks=70)
    return descriptors(tunnel)


async def back_to(tunnel: Tunnel, before: tuple[int, int]) -> None:
    """Wait until server and client hold as many descriptors as they did."""
    await until(
        lambda: descriptors(tunnel) == before,
        10,
        f"descriptors to be {before} again; they are {descriptors(tunnel)}",
    )


class UdpArena(Arena):
    """An arena that owns visitors and UDP targets besides.

    A stop waits a moment for UDP sessions to have their last word: most tests leave some open
    and are not about that, so they cut it short.
    """

    def __init__(self, folder: Path, engine: str = "", **env: str) -> None:
        super().__init__(folder, engine, **({"SHUTDOWN_TIMEOUT": "20ms"} | env))
        self._endpoints: list[_Endpoint] = []

    def visitor(self, port: int, host: str = "127.0.0.1", *, source: str = "") -> Visitor:
        """Let somebody come; all that the words mean is at `Visitor`."""
        visitor = Visitor(port, host, source=source)
        self._endpoints.append(visitor)
        return visitor

    def udp_target(
        self, handler: Handler = echo, *, host: str = "127.0.0.1", port: int = 0
    ) -> UdpTarget:
        """Serve a handler."""
        target = UdpTarget(handler, host=host, port=port)
        self._endpoints.append(target)
        return target

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            for endpoint in self._endpoints:
                endpoint.close()
