"""The slow twin's flows: two sides, and the two directions between them.

Part of `engine`, which describes the whole; nobody else comes here.

Ground floor.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from nodepass.net.tcp_dial import BROKEN_LATER, is_mirror

from .legs import Leg, TlsFault

if TYPE_CHECKING:
    from nodepass.net.resolver import SocketAddress

REASON_FINISHED: Final = 0
REASON_RESET: Final = 1
REASON_ABORTED: Final = 2
REASON_IDLE: Final = 3
REASON_UNMET: Final = 4

UNDER_WAY: Final = frozenset({0, errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EINTR})
"""What connect(2) says while nothing is wrong."""

LINGER_SHAPE: Final = "hh" if sys.platform == "win32" else "ii"


class Ending(NamedTuple):
    """Why a flow or a handshake ended; the last fields of a Completion."""

    reason: int
    side: int = 0
    code: int = 0
    detail: int = 0


class Host(Protocol):
    """What a flow needs of the engine."""

    loop: asyncio.AbstractEventLoop
    buffer: memoryview
    patience: float
    turns: int

    def bury(self, flow: Flow, ending: Ending) -> None:
        """Take note that a flow has closed its sockets."""


class Way:
    """One direction of a flow: bytes from `source` to `sink`."""

    __slots__ = (
        "answer", "delivered", "flow", "is_ending", "is_parked", "is_sending", "is_shut", "sink",
        "source",
    )  # fmt: skip

    def __init__(self, flow: Flow, source: Leg, sink: Leg) -> None:
        self.flow = flow
        self.source = source
        self.sink = sink
        self.answer = self
        """The other direction, once there is one."""
        self.delivered = 0
        self.is_parked = False
        """Whether this direction waits for its sink instead of its source."""
        self.is_sending = False
        """Whether it waits for room in the sink's socket."""
        self.is_ending = False
        """Whether the source has ended; the sink hears of it when nothing is parked."""
        self.is_shut = False

    def start(self, head: bytes) -> None:
        """Watch the side that this direction waits for."""
        self.sink.park(memoryview(head))
        self.is_parked = bool(self.sink.backlog)
        if self.is_parked:
            self.watch_sink()
        else:
            self.read_on()

    def watch_sink(self) -> None:
        """Watch for room in the sink's socket, if it is room that is wanted."""
        loop, was_sending = self.flow.engine.loop, self.is_sending
        self.is_sending = self.is_parked and not self.sink.is_stalled
        if self.is_sending and not was_sending:
            loop.add_writer(self.sink.sock, self.flush)
        elif was_sending and not self.is_sending:
            loop.remove_writer(self.sink.sock)

    def read_on(self) -> None:
        """Watch the source."""
        loop = self.flow.engine.loop
        loop.add_reader(self.source.sock, self.copy)
        if self.source.has_more:
            loop.call_soon(self.copy)

    def copy(self) -> None:
        """Move one buffer; park what the sink does not take."""
        flow, engine = self.flow, self.flow.engine
        if self.is_parked or self.is_ending or flow.is_over:
            return  # called for what lies inside the source, and too late
        engine.turns += 1
        try:
            data = self.source.receive(engine.buffer)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as exc:
            flow.reset(self.source, exc)
        else:
            if data:
                self.advance(self.sink.send, data)
            else:
                self.is_ending = True
                self.advance(self.sink.say_end)
        if self.source.backlog and not flow.is_over:
            self.answer.advance(self.source.flush)  # reading may have made TLS say something

    def flush(self) -> None:
        """Send parked bytes; read on once they are gone."""
        self.flow.engine.turns += 1
        self.advance(self.sink.flush)

    def advance(self, send: Callable[..., int], *data: memoryview) -> None:
        """Send by this method of the sink, then watch the side that is waited for."""
        try:
            self.delivered += send(*data)
        except OSError as exc:
            self.flow.reset(self.sink, exc)
            return
        was_parked, self.is_parked = self.is_parked, bool(self.sink.backlog)
        self.watch_sink()
        if self.is_parked:
            if not was_parked:
                self.flow.engine.loop.remove_reader(self.source.sock)
                self.flow.watch_step()
        elif self.is_ending:
            self.finish()
        elif was_parked:
            self.read_on()
        elif self.source.has_more:
            self.flow.engine.loop.call_soon(self.copy)

    def finish(self) -> None:
        """Pass the end of the source on, once; nothing is parked here."""
        flow = self.flow
        flow.engine.loop.remove_reader(self.source.sock)
        try:
            self.sink.shut()
        except OSError as exc:
            flow.reset(self.sink, exc)
            return
        self.is_shut = True
        if flow.ways[0].is_shut and flow.ways[1].is_shut:
            flow.bury(REASON_FINISHED)


def arm_reset(sock: socket.socket, is_armed: bool) -> None:
    """Choose whether closing a socket, by us or by the death of the process, resets it."""
    linger = struct.pack(LINGER_SHAPE, is_armed, 0)
    with contextlib.suppress(OSError):  # macOS refuses options on a socket that was reset
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


class Flow:
    """Two sides and the two directions between them."""

    __slots__ = (
        "born", "engine", "head", "idle", "is_dialling", "is_over", "legs", "token", "until",
        "ways",
    )  # fmt: skip

    def __init__(self, engine: Host, token: int, legs: tuple[Leg, Leg], idle: float) -> None:
        self.engine = engine
        self.token = token
        self.legs = legs
        self.ways = (Way(self, legs[0], legs[1]), Way(self, legs[1], legs[0]))
        for way, answer in zip(self.ways, self.ways[::-1], strict=True):
            way.answer = answer
        self.idle = idle
        self.born = time.monotonic()
        self.is_over = False
        self.is_dialling = False
        """Whether the second side has no answer yet; nothing is read from the first meanwhile."""
        self.until = 0.0
        """When it must have one, on the monotonic clock; 0 = there is no limit."""
        self.head = b""
        """What the second side is owed when it is connected."""

    def start(self, heads: tuple[bytes, bytes]) -> None:
        """Begin with both directions; each has bytes that come first."""
        for way, head in zip(self.ways, heads, strict=True):
            way.start(head)

    def dial(self, goal: tuple[int, SocketAddress] | None, timeout: float, head: bytes) -> None:
        """Connect the second side first; the goal is a family and an address, None: begun."""
        self.is_dialling = True
        self.until = time.monotonic() + timeout if timeout else 0.0
        self.head = head
        sock = self.legs[1].sock
        code = 0
        if goal is not None:
            family, address = goal
            code = sock.connect_ex(address) if sock.family == family else errno.EAFNOSUPPORT
        if code in UNDER_WAY:
            self.engine.loop.add_writer(sock, self.meet)
        else:
            self.bury(REASON_UNMET, 2, code)

    def meet(self) -> None:
        """Take the answer of the second side."""
        leg = self.legs[1]
        self.engine.loop.remove_writer(leg.sock)
        self.is_dialling = False
        self.born = time.monotonic()  # what it waited for its answer is no idleness
        code = leg.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code and is_mirror(leg.sock):
            code = errno.ECONNREFUSED
        if code in BROKEN_LATER:
            self.reset(leg, OSError(code, ""))
        elif code:
            self.bury(REASON_UNMET, 2, code)
        else:
            head, self.head = self.head, b""
            try:
                self.start((head, b""))
            except OSError as exc:
                self.reset(leg, exc)

    def doubt(self, side: int, *, quiet: bool) -> None:
        """Take it that the far end of a side, 1 or 2, may be gone."""
        if not (self.is_dialling and side == 2):
            self.legs[side - 1].pulse.doubt(quiet=quiet)

    def watch_dial(self) -> None:
        """Give up a dial whose time is over, or for which nobody is left."""
        code = self.legs[0].sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.bury(REASON_UNMET, 1, code)
        elif self.until and time.monotonic() >= self.until:
            self.bury(REASON_UNMET, 2, errno.ETIMEDOUT)

    def watch_step(self) -> None:
        """Look for what no event tells: idle limits, errors of unread sockets, lost ends."""
        if self.is_dialling:
            self.watch_dial()
            return
        for side, leg in enumerate(self.legs, 1):
            if leg.pulse.look(self.engine.patience):
                self.bury(REASON_RESET, side, errno.ETIMEDOUT)
                return
        for leg, way in zip(self.legs, self.ways, strict=True):
            code = leg.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if leg.can_outlive_reset and way.answer.is_shut:
                way.copy()  # a loop may have stopped watching; an error is met behind what came
                if self.is_over:
                    return
            elif code:
                self.reset(leg, OSError(code, ""))
                return
        active = max(self.born, self.legs[0].active, self.legs[1].active)
        if self.idle and time.monotonic() - active >= self.idle:
            self.bury(REASON_IDLE)

    def reset(self, leg: Leg, exc: OSError) -> None:
        """Apply the reset law; the side at fault says its last words first, and hears ours."""
        index = self.legs.index(leg)
        self.pass_last_words(index)
        if isinstance(exc, TlsFault):
            with contextlib.suppress(OSError):
                self.ways[1 - index].delivered += leg.flush()  # up to our alert
        detail = exc.detail if isinstance(exc, TlsFault) else 0
        self.bury(REASON_RESET, index + 1, exc.errno or errno.EIO, detail)

    def pass_last_words(self, index: int) -> None:
        """Deliver what a dead side has received; what is parked is older and stays so."""
        way = self.ways[index]
        with contextlib.suppress(OSError):
            while not (way.sink.backlog or way.is_ending):
                data = way.source.receive(self.engine.buffer)
                if not data:
                    return
                way.delivered += way.sink.send(data)

    def forget_events(self) -> None:
        """Leave the event loop; before close, so that a reused number meets no old watcher."""
        for leg in self.legs:
            self.engine.loop.remove_reader(leg.sock)
            self.engine.loop.remove_writer(leg.sock)

    def bury(self, reason: int, side: int = 0, code: int = 0, detail: int = 0) -> None:
        """Close both sockets, politely only if finished, and report."""
        self.is_over = True
        if not self.engine.loop.is_closed():
            self.forget_events()
        for leg in self.legs:
            arm_reset(leg.sock, reason != REASON_FINISHED)
            leg.sock.close()
        self.engine.bury(self, Ending(reason, side, code, detail))
