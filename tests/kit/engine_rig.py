"""An engine under test with sockets on both of its sides, and its books checked at the end.

    visitor == pair == [a  engine  b] == pair == target

`visitor` and `target` are the outer ends, in the hands of the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NamedTuple, Self

from tests.kit.options import fold

from nodepass.engine.twin.engine import Completion
from nodepass.net.resolver import SocketAddress

PATIENCE = 20.0
"""Seconds that anything may take before the test is called hung; sanitizers are slow."""

CHUNK = 1 << 16
"""Bytes asked for in one read by the test's own ends."""


def tcp_pair(sndbuf: int = 0, rcvbuf: int = 0) -> tuple[socket.socket, socket.socket]:
    """Return two connected TCP sockets on loopback; buffers in bytes, 0 = the kernel's choice."""
    with socket.socket() as listener:
        if rcvbuf:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        outer = socket.socket()
        if rcvbuf:
            outer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        outer.connect(listener.getsockname())
        inner, _ = listener.accept()
    for end in (outer, inner):
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sndbuf:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
    return outer, inner


def unix_pair(sndbuf: int = 0, rcvbuf: int = 0) -> tuple[socket.socket, socket.socket]:
    """Return two connected AF_UNIX stream sockets."""
    outer, inner = socket.socketpair()
    for end in (outer, inner):
        end.setblocking(False)
        if sndbuf:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
        if rcvbuf:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    return outer, inner


PAIRS = {"tcp": tcp_pair, "unix": unix_pair}


def resident_bytes() -> int:
    """Return this process's resident memory; 0 where nobody tells."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def reset_on_close(sock: socket.socket) -> None:
    """Make the coming close() send RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


class Joined(NamedTuple):
    """One flow, seen from outside."""

    visitor: socket.socket
    target: socket.socket
    token: int


class Begun(NamedTuple):
    """One flow whose target is yet to be connected, seen from outside."""

    visitor: socket.socket
    token: int


def family_of(address: SocketAddress) -> socket.AddressFamily:
    """Return what an address is of."""
    return socket.AF_INET6 if ":" in address[0] else socket.AF_INET


def stream_for(address: SocketAddress) -> socket.socket:
    """Return a non-blocking stream socket that can be connected there."""
    sock = socket.socket(family_of(address))
    sock.setblocking(False)
    return sock


class FullListener:
    """A listener whose backlog is full, so that it leaves the first SYN of others unanswered.

    The kernel repeats it after a second, and meets what the listener is by then.
    """

    def __init__(self) -> None:
        self.sock = socket.socket()
        self.sock.bind(("127.0.0.1", 0))
        self.sock.listen(0)
        self.sock.setblocking(False)
        self.early = [stream_for(self.name) for _ in range(4)]
        """What fills the backlog."""
        for sock in self.early:
            sock.connect_ex(self.name)

    @property
    def name(self) -> tuple[str, int]:
        host, port = self.sock.getsockname()
        return host, port

    def relent(self) -> None:
        """Let everybody in."""
        self.sock.listen(100)

    async def accept(self, rig: Rig) -> socket.socket:
        """Take the first connection that others have made."""
        strangers = {sock.getsockname() for sock in self.early}
        while True:
            sock = await rig.accept(self.sock)
            if sock.getpeername() not in strangers:
                return sock

    def close(self) -> None:
        """Close everything: whoever still waits will be refused."""
        for sock in (self.sock, *self.early):
            sock.close()


@dataclass(frozen=True)
class Kind:
    """Which engine, and how it is set up."""

    module: ModuleType
    splice: bool
    threads: int

    @property
    def is_native(self) -> bool:
        return self.module.__name__.endswith("_fastcopy")


class Rig:
    """An engine, the sockets a test uses with it, and its completions."""

    def __init__(
        self, kind: Kind, *, pair: str = "tcp", flows: int = 1024, **options: object
    ) -> None:
        self.kind = kind
        self.pair = PAIRS[pair]
        self.engine = kind.module.Engine(kind.threads, flows=flows, splice=kind.splice, **options)
        self.loop = asyncio.get_running_loop()
        self.socks: list[socket.socket] = []
        """Outer ends, closed with the rig."""
        self._ended: dict[int, Completion] = {}
        self._wanted: dict[int, asyncio.Future[Completion]] = {}
        self._is_closed = False

    async def __aenter__(self) -> Self:
        self.loop.add_reader(self.engine.fileno(), self._collect)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sock in self.socks:
            sock.close()
        await self.close()
        if exc is None:
            self.check_balance()

    async def close(self) -> bool:
        """Close the engine and collect what it still reports."""
        if not self._is_closed:
            self._is_closed = True
            self.loop.remove_reader(self.engine.fileno())
        joined = bool(self.engine.close(PATIENCE))
        self._collect()
        return joined

    def check_balance(self) -> None:
        """Assert that nothing is left in the engine's books."""
        left = self.engine.statistics()
        held = {
            "flows_open": left.flows_open,
            "parked_bytes": left.parked_bytes,
            "buffers_in_use": left.buffers_in_use,
            "pipes_in_use": left.pipes_in_use,
            "pipes_pooled": left.pipes_pooled,
            "fds_open": left.fds_open,
            "tls_in_use": left.tls_in_use,
            "bugs": left.bugs,
        }
        assert not any(held.values()), f"the engine still holds {held}"

    def ends(self, **buffers: int) -> tuple[socket.socket, socket.socket]:
        """Return (outer, inner) ends of a connection; the outer one is closed with the rig."""
        outer, inner = self.pair(**buffers)
        self.socks.append(outer)
        return outer, inner

    def join(self, *, buffers: dict[str, int] | None = None, **options: object) -> Joined:
        """Make two connections and hand their inner ends to the engine."""
        visitor, a = self.ends(**(buffers or {}))
        target, b = self.ends(**(buffers or {}))
        return Joined(visitor, target, self.hand_over(a, b, **options))

    def hand_over(self, a: socket.socket, b: socket.socket, **options: object) -> int:
        """Give two sockets to the engine."""
        token = int(self.engine.relay(a.fileno(), b.fileno(), **fold(options)))
        a.detach()
        b.detach()
        return token

    def listen(self, host: str = "127.0.0.1", *, rcvbuf: int = 0) -> socket.socket:
        """Return a listener at a free port, closed with the rig; buffer in bytes."""
        listener = socket.socket(family_of((host, 0)))
        self.socks.append(listener)
        if rcvbuf:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        listener.bind((host, 0))
        listener.listen(1024)
        listener.setblocking(False)
        return listener

    def listen_to_nobody(self) -> FullListener:
        """Return a listener with a full backlog, closed with the rig."""
        full = FullListener()
        self.socks += [full.sock, *full.early]
        return full

    async def accept(self, listener: socket.socket) -> socket.socket:
        """Take a connection, closed with the rig."""
        async with asyncio.timeout(PATIENCE):
            sock, _ = await self.loop.sock_accept(listener)
        self.socks.append(sock)
        return sock

    def where_nobody_listens(self, host: str = "127.0.0.1") -> SocketAddress:
        """Return an address that refuses, held so that nobody comes to listen there."""
        holder = socket.socket(family_of((host, 0)))
        self.socks.append(holder)
        holder.bind((host, 0))
        address: SocketAddress = holder.getsockname()
        return address

    def connect(self, address: SocketAddress, **options: object) -> Begun:
        """Make one connection, and have the engine dial the other one."""
        visitor, a = self.ends()
        return Begun(visitor, self.hand_over_to(a, address, **options))

    def hand_over_to(
        self,
        a: socket.socket,
        address: SocketAddress,
        b: socket.socket | None = None,
        /,
        **options: object,
    ) -> int:
        """Give a socket to the engine, and another one, new if not given, that it is to dial."""
        target = b or stream_for(address)
        try:
            token = int(self.engine.dial(a.fileno(), target.fileno(), address, **fold(options)))
        except BaseException:
            if b is None:
                target.close()
            raise
        a.detach()
        target.detach()
        return token

    def _collect(self) -> None:
        for ended in self.engine.poll():
            assert ended.token not in self._ended, "a flow was reported twice"
            completion = Completion(*ended)
            self._ended[completion.token] = completion
            waiter = self._wanted.pop(completion.token, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(completion)

    async def ended(self, token: int) -> Completion:
        """Wait for the completion of a flow."""
        if token not in self._ended:
            waiter = self._wanted[token] = self.loop.create_future()
            async with asyncio.timeout(PATIENCE):
                await waiter
        return self._ended[token]

    def has_ended(self, token: int) -> bool:
        """Tell whether a completion has been collected."""
        return token in self._ended

    async def send(self, sock: socket.socket, data: bytes) -> None:
        """Send everything."""
        async with asyncio.timeout(PATIENCE):
            await self.loop.sock_sendall(sock, data)

    async def receive(self, sock: socket.socket, size: int) -> bytes:
        """Receive exactly `size` bytes; fewer only if the stream ends."""
        parts: list[bytes] = []
        async with asyncio.timeout(PATIENCE):
            while size:
                part = await self.loop.sock_recv(sock, min(size, CHUNK))
                if not part:
                    break
                parts.append(part)
                size -= len(part)
        return b"".join(parts)

    async def drain(self, sock: socket.socket) -> bytes:
        """Receive up to the end of the stream."""
        return await self.receive(sock, 1 << 62)

    async def carried(self, token: int, up: int, down: int) -> None:
        """Wait until a flow's counts are these: they come behind the send, which may be heard."""
        await self.until(lambda: self.engine.live(token) == (up, down), f"{up} up, {down} down")

    async def until(self, condition: object, what: str) -> None:
        """Wait until `condition()` holds."""
        assert callable(condition)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    await asyncio.sleep(0.005)
                return
        raise AssertionError(f"never came true: {what}")

    async def chat(self, visitor: socket.socket, target: socket.socket) -> None:
        """Say something through a flow, and hear an answer."""
        await self.send(visitor, b"ping")
        assert await self.receive(target, 4) == b"ping"
        await self.send(target, b"pong")
        assert await self.receive(visitor, 4) == b"pong"

    async def heard_before_reset(self, sock: socket.socket) -> bytes:
        """Receive up to the reset; a clean end is a failure."""
        heard = b""
        try:
            async with asyncio.timeout(PATIENCE):
                while part := await self.loop.sock_recv(sock, CHUNK):
                    heard += part
        except ConnectionResetError:
            return heard
        raise AssertionError(f"a clean end, behind {heard[:40]!r}")

    async def is_reset(self, sock: socket.socket) -> bool:
        """Tell whether the connection was reset, reading away whatever comes before."""
        try:
            await self.drain(sock)
        except (ConnectionResetError, BrokenPipeError):
            return True
        return False


def is_called(listener: socket.socket) -> bool:
    """Tell whether anybody waits to be accepted; who does is turned away."""
    try:
        sock, _ = listener.accept()
    except BlockingIOError:
        return False
    sock.close()
    return True


def is_open(fd: int) -> bool:
    """Tell whether a number is that of an open descriptor."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def owned(*socks: socket.socket) -> Iterator[tuple[socket.socket, ...]]:
    """Close sockets that a test kept, whatever happens."""
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()
