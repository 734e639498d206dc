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
import errno
import functools
import os
import socket
import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from . import _pytls
from ._pyflow import (
    REASON_ABORTED,
    REASON_FINISHED,
    REASON_IDLE,
    REASON_RESET,
    Ending,
    Flow,
    arm_reset,
)
from ._pytls import Handshake, Leg, TlsFault, TlsLeg, is_usable
from .errors import EngineClosed, EngineError

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

__all__ = [
    "ABI", "REASON_ABORTED", "REASON_FINISHED", "REASON_IDLE", "REASON_RESET", "Completion",
    "Engine", "EngineStatistics", "alpn_selector", "tls_trouble",
]  # fmt: skip

ABI: Final = 2

BUFFER_BYTES: Final = 524288  # one recv; the native size, and the bound per direction
WATCH_SECONDS: Final = 0.1  # step of the idle limit, as the native engine's wheel
MAX_THREADS: Final = 256  # the native engine's limits, checked alike
MAX_FLOWS: Final = 1 << 24
MAX_IDLE: Final = 4e6  # seconds

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def tls_trouble() -> str | None:
    """Say in a clause what TLS flows lack here, or None."""
    return _pytls.trouble()


def alpn_selector() -> None:
    """Return that there is no C function: Python's own callback may run here."""


class Completion(NamedTuple):
    """How a flow ended."""

    token: int
    up: int
    down: int
    reason: int
    side: int
    code: int
    detail: int


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
    tls_in_use: int
    handshakes: int
    handshakes_failed: int


def count_tls(flow: Flow) -> int:
    """Return how many sides of a flow speak TLS."""
    return sum(1 for leg in flow.legs if isinstance(leg, TlsLeg))


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
        self._flows: dict[int, Flow] = {}
        self._shakes: dict[int, Handshake] = {}
        self._ended: list[Completion] = []
        self._waiting = 0
        """Flows among those that have ended."""
        self._tls_waiting = 0
        """Connections of flows and handshakes that have ended."""
        self._next = 1
        self._counts = {"flows": 0, "refused": 0, "handshakes": 0, "failed": 0}
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
        return f"<Engine threads=0 flows={len(self._flows) + self._waiting}>"

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
        tls_a: Connection | None = None,
        tls_b: Connection | None = None,
        head_a: bytes = b"",
        head_b: bytes = b"",
        idle: float = 0.0,
    ) -> int:
        """Join two connected non-blocking stream sockets; own both on success."""
        self._check("relay")
        for tls in (tls_a, tls_b):
            self._require("relay", tls is None or is_usable(tls))
        if not 0.0 <= idle <= MAX_IDLE:
            raise ValueError(f"idle: {idle} is not within 0..4000000 seconds")
        for head in (head_a, head_b):
            if not isinstance(head, bytes):
                raise TypeError(f"heads are bytes, not {type(head).__name__}")
        sockets = self._adopt("relay", fd_a, fd_b)
        if len(self._flows) + self._waiting >= self._capacity:
            self._counts["refused"] += 1
            self._disown(sockets)
            raise EngineError("relay", errno.ENOBUFS)
        legs = [
            Leg(sock) if tls is None else TlsLeg(sock, tls)
            for sock, tls in zip(sockets, (tls_a, tls_b), strict=True)
        ]
        flow = Flow(self, self._next, (legs[0], legs[1]), idle)
        try:
            for way, head in zip(flow.ways, (head_a, head_b), strict=True):
                way.start(head)
        except (OSError, NotImplementedError) as exc:
            flow.is_over = True
            raise self._refuse("relay", sockets, exc) from exc
        for sock in sockets:
            arm_reset(sock, True)
        self._next += 1
        self._counts["flows"] += 1
        self._flows[flow.token] = flow
        if self._watch is None:
            self._watch = self.loop.call_later(WATCH_SECONDS, self._watch_all)
        return flow.token

    def handshake(self, fd: int, tls: Connection) -> int:
        """Do a TLS handshake on a borrowed non-blocking stream socket."""
        self._check("handshake")
        self._require("handshake", is_usable(tls))
        sockets = self._adopt("handshake", fd)
        token = self._next
        report = functools.partial(self._end_handshake, token)
        try:
            self._shakes[token] = Handshake(self.loop, sockets[0], tls, report)
        except (OSError, NotImplementedError) as exc:
            raise self._refuse("handshake", sockets, exc) from exc
        self._next += 1
        self._counts["handshakes"] += 1
        return token

    def _require(self, operation: str, is_supported: bool) -> None:
        if not is_supported:
            raise EngineError(operation, errno.EOPNOTSUPP)

    def _adopt(self, operation: str, *fds: int) -> list[socket.socket]:
        sockets: list[socket.socket] = []
        try:
            for fd in fds:
                if fd < 0:
                    raise OSError(errno.EBADF, "")
                sockets.append(socket.socket(fileno=fd))
                if sockets[-1].type != socket.SOCK_STREAM:
                    raise OSError(errno.EPROTOTYPE, "")
                if os.get_blocking(fd) or fds.count(fd) > 1:
                    raise OSError(errno.EINVAL, "")
                sockets[-1].setblocking(False)
        except OSError as exc:
            raise self._refuse(operation, sockets, exc) from exc
        return sockets

    def _refuse(self, operation: str, sockets: list[socket.socket], exc: Exception) -> EngineError:
        self._disown(sockets)
        code = exc.errno if isinstance(exc, OSError) else errno.EOPNOTSUPP
        return EngineError(operation, code or errno.EIO)

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

    def bury(self, flow: Flow, ending: Ending) -> None:
        """Take a flow's end from the flow."""
        del self._flows[flow.token]
        self._waiting += 1
        self._tls_waiting += count_tls(flow)
        up, down = flow.ways[0].delivered, flow.ways[1].delivered
        self._bytes[0] += up
        self._bytes[1] += down
        self._complete(Completion(flow.token, up, down, *ending))

    def _end_handshake(self, token: int, exc: OSError | None) -> None:
        if exc is None:
            self._bury_handshake(token, Ending(REASON_FINISHED))
        else:
            detail = exc.detail if isinstance(exc, TlsFault) else 0
            self._bury_handshake(token, Ending(REASON_RESET, 1, exc.errno or errno.EIO, detail))

    def _bury_handshake(self, token: int, ending: Ending) -> None:
        del self._shakes[token]
        self._tls_waiting += 1
        self._counts["failed"] += ending.reason == REASON_RESET
        self._complete(Completion(token, 0, 0, *ending))

    def _complete(self, completion: Completion) -> None:
        self._ended.append(completion)
        if len(self._ended) == 1:
            self._bell.send(b"!")

    def live(self, token: int) -> tuple[int, int] | None:
        """Return (up, down) of a flow; None once its completion was polled."""
        flow = self._flows.get(token)
        if flow is not None:
            return flow.ways[0].delivered, flow.ways[1].delivered
        if token in self._shakes:
            return 0, 0
        for ended in self._ended:
            if ended.token == token:
                return ended.up, ended.down
        return None

    def abort(self, token: int) -> None:
        """Reset both sides of a flow, or give up a handshake; others are left alone."""
        self._check("abort")
        self._abort(token)

    def _abort(self, token: int) -> None:
        if token in self._flows:
            self._flows[token].bury(REASON_ABORTED)
        elif token in self._shakes:
            self._shakes[token].forget()
            self._bury_handshake(token, Ending(REASON_ABORTED))

    def poll(self) -> list[Completion]:
        """Collect the flows that have ended; also after close()."""
        if self._pid != os.getpid():
            raise EngineClosed("poll", errno.ECHILD)
        ended, self._ended = self._ended, []
        self._waiting = self._tls_waiting = 0
        if ended and not self._is_closed:
            self._ear.recv(1)
        return ended

    def statistics(self) -> EngineStatistics:
        """Return a snapshot of all counters; also after close()."""
        if self._pid != os.getpid():
            raise EngineClosed("statistics", errno.ECHILD)
        flows = self._flows.values()
        legs = [leg for flow in flows for leg in flow.legs]
        return EngineStatistics(
            threads=0,
            flows_open=len(flows) + self._waiting,
            flows_total=self._counts["flows"],
            flows_refused=self._counts["refused"],
            bytes_up=self._bytes[0] + sum(flow.ways[0].delivered for flow in flows),
            bytes_down=self._bytes[1] + sum(flow.ways[1].delivered for flow in flows),
            parked_bytes=sum(leg.backlog for leg in legs),
            buffers_in_use=sum(1 for leg in legs if leg.backlog),
            pipes_in_use=0,
            pipes_pooled=0,
            splice_promotions=0,
            turns=self.turns,
            wakeups=self.turns,
            stale_events=0,
            bugs=0,
            fds_open=len(legs),
            tls_in_use=len(self._shakes) + sum(map(count_tls, flows)) + self._tls_waiting,
            handshakes=self._counts["handshakes"],
            handshakes_failed=self._counts["failed"],
        )

    def close(self, deadline: float = 5.0) -> bool:
        """Reset every flow and leave the event loop; never waits, hence always True."""
        del deadline
        if self._is_closed or self._pid != os.getpid():
            return True
        for token in [*self._flows, *self._shakes]:
            self._abort(token)
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
