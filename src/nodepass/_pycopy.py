"""The slow twin of the native engine: the same interface and laws in plain asyncio.

Used where there is no _fastcopy, and as the oracle of the engine tests: simple before fast.
It runs inside the event loop that is running when the Engine is made (asyncio or uvloop; on
Windows one with add_reader, i.e. the selector loop) and must only be called from its thread.

Per direction a flow either watches its source for reading, or, while bytes are parked,
its destination for writing; never both, so back-pressure is the kernel's. A socket that is
not being read cannot tell of its death, and libuv stops watching one on which it sees an
error: so a watch asks every socket for its error ten times a second.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import os
import socket
import struct
import sys
import time
import warnings
import weakref
from dataclasses import dataclass
from typing import Final, NamedTuple

from nodepass.errors import EngineClosed, EngineError

ABI: Final = 1
REASON_FINISHED: Final = 0
REASON_RESET: Final = 1
REASON_ABORTED: Final = 2
REASON_IDLE: Final = 3

BUFFER_BYTES: Final = 524288  # one recv; the native size, and the bound per direction
WATCH_SECONDS: Final = 0.1  # step of the idle limit, as the native engine's wheel
MAX_THREADS: Final = 256  # the native engine's limits, checked alike
MAX_FLOWS: Final = 1 << 24
MAX_IDLE: Final = 4e6  # seconds
NO_SIGNAL: Final[int] = getattr(socket, "MSG_NOSIGNAL", 0)
LINGER_SHAPE: Final = "hh" if sys.platform == "win32" else "ii"

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Completion(NamedTuple):
    """How a flow ended."""

    token: int
    up: int
    down: int
    reason: int
    side: int
    code: int


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot of an engine's counters and balances."""

    threads: int
    flows_open: int
    flows_total: int
    flows_refused: int
    bytes_up: int
    bytes_down: int
    parked_bytes: int
    buffers_in_use: int
    pipes_in_use: int
    pipes_pooled: int
    splice_promotions: int
    turns: int
    wakeups: int
    stale_events: int
    bugs: int
    fds_open: int


class _Way:
    """One direction of a flow: bytes from `source` to `sink`."""

    __slots__ = ("delivered", "flow", "is_shut", "parked", "sink", "source")

    def __init__(self, flow: _Flow, source: int, head: bytes) -> None:
        self.flow = flow
        self.source = source
        self.sink = 1 - source
        self.parked = memoryview(head)
        self.delivered = 0
        self.is_shut = False

    def start(self) -> None:
        """Watch the side that this direction waits for."""
        loop, sockets = self.flow.engine.loop, self.flow.sockets
        if self.parked:
            loop.add_writer(sockets[self.sink], self.flush)
        else:
            loop.add_reader(sockets[self.source], self.copy)

    def copy(self) -> None:
        """Move one buffer; park what the sink does not take."""
        flow, engine = self.flow, self.flow.engine
        engine.turns += 1
        try:
            size = flow.sockets[self.source].recv_into(engine.buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            flow.reset(self.source, exc)
            return
        if size == 0:
            self.finish()
            return
        sent = self.send(engine.buffer[:size])
        if 0 <= sent < size:
            self.parked = memoryview(bytes(engine.buffer[sent:size]))
            engine.loop.remove_reader(flow.sockets[self.source])
            engine.loop.add_writer(flow.sockets[self.sink], self.flush)
            flow.watch_step()

    def flush(self) -> None:
        """Send parked bytes; read on once they are gone."""
        flow, engine = self.flow, self.flow.engine
        engine.turns += 1
        sent = self.send(self.parked)
        if sent < 0:
            return
        self.parked = self.parked[sent:]
        if not self.parked:
            self.parked = memoryview(b"")
            engine.loop.remove_writer(flow.sockets[self.sink])
            engine.loop.add_reader(flow.sockets[self.source], self.copy)

    def send(self, data: memoryview) -> int:
        """Return how many bytes the sink took, -1 if that ended the flow."""
        try:
            sent = self.flow.sockets[self.sink].send(data, NO_SIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as exc:
            self.flow.reset(self.sink, exc)
            return -1
        self.delivered += sent
        self.flow.active = time.monotonic()
        return sent

    def finish(self) -> None:
        """Pass the end of the source on, once; nothing is parked here."""
        flow = self.flow
        flow.engine.loop.remove_reader(flow.sockets[self.source])
        try:
            flow.sockets[self.sink].shutdown(socket.SHUT_WR)
        except OSError as exc:
            code = flow.sockets[self.sink].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            gone = errno.ECONNRESET if exc.errno == errno.ENOTCONN else exc.errno
            flow.reset(self.sink, OSError(code or gone, ""))
            return
        self.is_shut = True
        if flow.ways[0].is_shut and flow.ways[1].is_shut:
            flow.bury(REASON_FINISHED)


def arm_reset(sock: socket.socket, is_armed: bool) -> None:
    """Choose whether closing a socket, by us or by the death of the process, resets it."""
    linger = struct.pack(LINGER_SHAPE, is_armed, 0)
    with contextlib.suppress(OSError):  # macOS refuses options on a socket that was reset
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


class _Flow:
    """Two sockets and the two directions between them."""

    __slots__ = ("active", "engine", "idle", "sockets", "token", "ways")

    def __init__(
        self,
        engine: Engine,
        token: int,
        sockets: tuple[socket.socket, socket.socket],
        heads: tuple[bytes, bytes],
        idle: float,
    ) -> None:
        self.engine = engine
        self.token = token
        self.sockets = sockets
        self.ways = (_Way(self, 0, heads[0]), _Way(self, 1, heads[1]))
        self.idle = idle
        self.active = time.monotonic()

    def watch_step(self) -> None:
        """Look for what no event tells: the idle limit, and errors of unread sockets."""
        for side, sock in enumerate(self.sockets, 1):
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self.reset(side - 1, OSError(code, ""))
                return
        if self.idle and time.monotonic() - self.active >= self.idle:
            self.bury(REASON_IDLE)

    def reset(self, index: int, exc: OSError) -> None:
        """Apply the reset law; `index` is the socket at fault, whose last words come first."""
        self.pass_last_words(index)
        self.bury(REASON_RESET, index + 1, exc.errno or errno.EIO)

    def pass_last_words(self, index: int) -> None:
        """Deliver what a dead socket has received; what is parked is older and stays so."""
        way, buffer = self.ways[index], self.engine.buffer
        if way.parked or way.is_shut:
            return
        with contextlib.suppress(OSError):
            while size := self.sockets[index].recv_into(buffer):
                sent = self.sockets[1 - index].send(buffer[:size], NO_SIGNAL)
                way.delivered += sent
                if sent < size:
                    return

    def forget_events(self) -> None:
        """Leave the event loop; before close, so that a reused number meets no old watcher."""
        for sock in self.sockets:
            self.engine.loop.remove_reader(sock)
            self.engine.loop.remove_writer(sock)

    def bury(self, reason: int, side: int = 0, code: int = 0) -> None:
        """Close both sockets, politely only if finished, and report."""
        if not self.engine.loop.is_closed():
            self.forget_events()
        for sock in self.sockets:
            arm_reset(sock, reason != REASON_FINISHED)
            sock.close()
        for way in self.ways:
            way.parked = memoryview(b"")
        up, down = self.ways[0].delivered, self.ways[1].delivered
        self.engine.complete(Completion(self.token, up, down, reason, side, code))


class Engine:
    """Callbacks in the running event loop that join pairs of sockets.

    Arguments and methods are those of the native Engine, documented in _fastcopy.pyi; `threads`
    is checked and otherwise unused, `splice` is unused. Needs a running event loop.
    """

    _is_closed = True  # until everything is open; __del__ also runs after a refused argument

    def __init__(self, threads: int = 1, *, flows: int = 65536, splice: bool = True) -> None:
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads: {threads} is not within 1..{MAX_THREADS}")
        if not 1 <= flows <= MAX_FLOWS:
            raise ValueError(f"flows: {flows} is not within 1..{MAX_FLOWS}")
        del splice
        self.loop = asyncio.get_running_loop()
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
        self.turns = 0
        self._capacity = flows
        self._flows: dict[int, _Flow] = {}
        self._ended: list[Completion] = []
        self._next = 1
        self._refused = 0
        self._bytes = [0, 0]
        self._watch: asyncio.TimerHandle | None = None
        self._pid = os.getpid()
        try:
            self._bell, self._ear = socket.socketpair()
        except OSError as exc:
            raise EngineError("start", exc.errno or errno.EIO) from exc
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._is_closed = False
        _engines.add(self)

    def __del__(self) -> None:
        if not self._is_closed and self._pid == os.getpid():
            warnings.warn("an Engine was dropped without close()", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        if self._is_closed:
            return "<Engine closed>"
        return f"<Engine threads=0 flows={len(self._flows) + len(self._ended)}>"

    def _check(self, operation: str) -> None:
        if self._pid != os.getpid():
            raise EngineClosed(operation, errno.ECHILD)
        if self._is_closed:
            raise EngineClosed(operation, errno.ESHUTDOWN)

    def fileno(self) -> int:
        """Return the descriptor that is readable while completions wait."""
        self._check("fileno")
        return self._ear.fileno()

    def relay(
        self,
        fd_a: int,
        fd_b: int,
        *,
        tls_a: object | None = None,
        tls_b: object | None = None,
        head_a: bytes = b"",
        head_b: bytes = b"",
        idle: float = 0.0,
    ) -> int:
        """Join two connected non-blocking stream sockets; own both on success."""
        self._check("relay")
        if tls_a is not None or tls_b is not None:
            raise EngineError("relay", errno.EOPNOTSUPP)
        if not 0.0 <= idle <= MAX_IDLE:
            raise ValueError(f"idle: {idle} is not within 0..4000000 seconds")
        for head in (head_a, head_b):
            if not isinstance(head, bytes):
                raise TypeError(f"heads are bytes, not {type(head).__name__}")
        sockets = self._adopt(fd_a, fd_b)
        if len(self._flows) + len(self._ended) >= self._capacity:
            self._refused += 1
            self._disown(sockets)
            raise EngineError("relay", errno.ENOBUFS)
        flow = _Flow(self, self._next, (sockets[0], sockets[1]), (head_a, head_b), idle)
        try:
            for way in flow.ways:
                way.start()
        except (OSError, NotImplementedError) as exc:
            self._disown(sockets)
            code = exc.errno if isinstance(exc, OSError) else None
            raise EngineError("relay", code or errno.EOPNOTSUPP) from exc
        for sock in sockets:
            arm_reset(sock, True)
        self._next += 1
        self._flows[flow.token] = flow
        if self._watch is None:
            self._watch = self.loop.call_later(WATCH_SECONDS, self._watch_all)
        return flow.token

    def _adopt(self, fd_a: int, fd_b: int) -> list[socket.socket]:
        sockets: list[socket.socket] = []
        try:
            for fd in (fd_a, fd_b):
                if fd < 0:
                    raise OSError(errno.EBADF, "")
                sockets.append(socket.socket(fileno=fd))
                if sockets[-1].type != socket.SOCK_STREAM:
                    raise OSError(errno.EPROTOTYPE, "")
                if os.get_blocking(fd) or fd_a == fd_b:
                    raise OSError(errno.EINVAL, "")
                sockets[-1].setblocking(False)
        except OSError as exc:
            self._disown(sockets)
            raise EngineError("relay", exc.errno or errno.EIO) from exc
        return sockets

    def _disown(self, sockets: list[socket.socket]) -> None:
        for sock in sockets:
            if sock.fileno() >= 0:
                self.loop.remove_reader(sock)
                self.loop.remove_writer(sock)
                sock.detach()

    def _watch_all(self) -> None:
        for flow in list(self._flows.values()):
            flow.watch_step()
        self._watch = None
        if self._flows:
            self._watch = self.loop.call_later(WATCH_SECONDS, self._watch_all)

    def complete(self, completion: Completion) -> None:
        """Take a flow's end from the flow and ring."""
        del self._flows[completion.token]
        self._bytes[0] += completion.up
        self._bytes[1] += completion.down
        self._ended.append(completion)
        if len(self._ended) == 1:
            self._bell.send(b"!")

    def live(self, token: int) -> tuple[int, int] | None:
        """Return (up, down) of a flow; None once its completion was polled."""
        flow = self._flows.get(token)
        if flow is not None:
            return flow.ways[0].delivered, flow.ways[1].delivered
        for ended in self._ended:
            if ended.token == token:
                return ended.up, ended.down
        return None

    def abort(self, token: int) -> None:
        """Reset both sides of a flow; unknown and finished flows are left alone."""
        self._check("abort")
        flow = self._flows.get(token)
        if flow is not None:
            flow.bury(REASON_ABORTED)

    def poll(self) -> list[Completion]:
        """Collect the flows that have ended; also after close()."""
        if self._pid != os.getpid():
            raise EngineClosed("poll", errno.ECHILD)
        ended, self._ended = self._ended, []
        if ended and not self._is_closed:
            self._ear.recv(1)
        return ended

    def statistics(self) -> EngineStatistics:
        """Return a snapshot of all counters; also after close()."""
        if self._pid != os.getpid():
            raise EngineClosed("statistics", errno.ECHILD)
        ways = [way for flow in self._flows.values() for way in flow.ways]
        return EngineStatistics(
            threads=0,
            flows_open=len(self._flows) + len(self._ended),
            flows_total=self._next - 1,
            flows_refused=self._refused,
            bytes_up=self._bytes[0] + sum(way.delivered for way in ways if way.source == 0),
            bytes_down=self._bytes[1] + sum(way.delivered for way in ways if way.source == 1),
            parked_bytes=sum(len(way.parked) for way in ways),
            buffers_in_use=sum(1 for way in ways if way.parked),
            pipes_in_use=0,
            pipes_pooled=0,
            splice_promotions=0,
            turns=self.turns,
            wakeups=self.turns,
            stale_events=0,
            bugs=0,
            fds_open=2 * len(self._flows),
        )

    def close(self, deadline: float = 5.0) -> bool:
        """Reset every flow and leave the event loop; never waits, hence always True."""
        del deadline
        if self._is_closed or self._pid != os.getpid():
            return True
        for flow in list(self._flows.values()):
            flow.bury(REASON_ABORTED)
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._is_closed = True
        self._bell.close()
        self._ear.close()
        _engines.discard(self)
        return True


@atexit.register
def _close_all() -> None:
    for engine in list(_engines):
        engine.close()
