"""The slow twin of the native engine: the same interface and laws in plain asyncio.

Used where there is no _fastcopy, and as the oracle of the engine tests: simple before fast.
It runs inside the event loop that is running when the Engine is made (asyncio or uvloop; on
Windows one with add_reader, i.e. the selector loop) and must only be called from its thread.

Per direction a flow either watches its source for reading, or, while bytes are parked,
its destination for writing; never both, so back-pressure is the kernel's. A socket that is
not being read cannot tell of its death, and libuv stops watching one on which it sees an
error: so a watch asks every socket for its error ten times a second.

UDP: `udp` has the methods, `gate` gates and their relays, `udp_dial` relays to targets,
`udp_relay` what both do with their links, `udp_port` the sockets and counts.
"""

from __future__ import annotations

import atexit
import errno
import functools
import math
import operator
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Final

from nodepass.engine.types import (
    PLAIN,
    Completion,
    EngineStatistics,
    FlowOptions,
    Newcomer,
    UdpCompletion,
    UdpCounts,
)
from nodepass.errors import EngineError

from . import legs
from .base import (
    STREAM,
    Watched,
    check_head,
    make_leg,
    take_address,
    take_float,
    take_options,
    take_whole,
)
from .flow import (
    REASON_ABORTED,
    REASON_FINISHED,
    REASON_IDLE,
    REASON_RESET,
    REASON_UNMET,
    Ending,
    Flow,
    arm_reset,
)
from .legs import HandshakeFlow, Leg, TlsFault, TlsLeg
from .udp import UdpEngine

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

    from nodepass.net.resolver import SocketAddress

__all__ = [
    "ABI", "REASON_ABORTED", "REASON_FINISHED", "REASON_IDLE", "REASON_RESET", "REASON_UNMET",
    "Completion", "Engine", "EngineStatistics", "Newcomer", "UdpCompletion", "UdpCounts",
    "alpn_selector", "tls_trouble",
]  # fmt: skip

ABI: Final = 10

MAX_THREADS: Final = 256  # the native engine's limit, checked alike

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def tls_trouble() -> str | None:
    """Say in a clause what TLS flows lack here, or None."""
    return legs.trouble()


def alpn_selector() -> None:
    """Return that there is no C function: Python's own callback may run here."""


def count_tls(flow: Flow) -> int:
    """Return how many sides of a flow speak TLS."""
    return sum(1 for leg in flow.legs if isinstance(leg, TlsLeg))


class Engine(UdpEngine[Completion]):
    """Callbacks in the running event loop that join pairs of sockets.

    Arguments and methods are those of the native Engine, documented in _fastcopy.pyi; `threads`
    is checked and otherwise unused, `splice` is unused. Needs a running event loop.
    """

    def __init__(
        self,
        threads: int = 1,
        *,
        flows: int = 65536,
        splice: bool = True,
        patience: float = 50.0,
    ) -> None:
        take_whole("threads", threads, MAX_THREADS)
        bool(splice)
        super().__init__(flows, patience)
        self._flows: dict[int, Flow] = {}
        self._shakes: dict[int, HandshakeFlow] = {}
        self._ended: dict[int, tuple[int, int]] = {}
        """Bytes up and down of flows and handshakes that nobody has polled yet."""
        self._waiting = 0
        """Flows among those that have ended."""
        self._tls_waiting = 0
        """Connections of flows and handshakes that have ended."""
        self._counts = {"flows": 0, "handshakes": 0, "failed": 0}
        self._bytes = [0, 0]
        _engines.add(self)

    def __del__(self) -> None:
        if not self._is_closed and self._pid == os.getpid():
            warnings.warn("an Engine was dropped without close()", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        if self._is_closed:
            return "<Engine closed>"
        return f"<Engine threads=0 flows={self._places_taken()}>"

    def relay(
        self,
        fd_a: int,
        fd_b: int,
        *,
        tls_a: Connection | None = None,
        tls_b: Connection | None = None,
        head_a: bytes = b"",
        head_b: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int:
        """Join two connected non-blocking stream sockets; own both on success."""
        self._check("relay")
        wishes = take_options(options)
        for head in (head_a, head_b):
            check_head(head)
        a, b, tls = operator.index(fd_a), operator.index(fd_b), (tls_a, tls_b)
        with self._admit("relay", (a, STREAM), (b, STREAM), tls=tls) as sockets:
            token = self._require_token("relay")
            legs = make_leg(sockets[0], tls_a), make_leg(sockets[1], tls_b)
            flow = Flow(self, token, legs, wishes.idle)
            try:
                flow.start((head_a, head_b))
            except BaseException:
                flow.is_over = True
                raise
        for sock in sockets:
            arm_reset(sock, True)
        self._lend(token, *tls)
        self._counts["flows"] += 1
        self._flows[token] = flow
        self._keep_watch()
        return token

    def dial(
        self,
        fd: int,
        target: int,
        address: SocketAddress | None,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int:
        """Connect a stream socket, and join a connected one with it; own both on success."""
        self._check("dial")
        wishes = take_options(options)
        check_head(head)
        goal = None if address is None else take_address(address)
        a, b = operator.index(fd), operator.index(target)
        with self._admit("dial", (a, STREAM), (b, STREAM), tls=(tls,)) as sockets:
            token = self._require_token("dial")
            flow = Flow(self, token, (make_leg(sockets[0], tls), Leg(sockets[1])), wishes.idle)
            self._flows[token] = flow
            try:
                flow.dial(goal, wishes.timeout, head)
            except BaseException:
                flow.is_over = True
                del self._flows[token]
                raise
        for sock in sockets:
            arm_reset(sock, True)
        self._lend(token, tls)
        self._counts["flows"] += 1
        self._keep_watch()
        return token

    def handshake(self, fd: int, tls: Connection) -> int:
        """Do a TLS handshake on a borrowed non-blocking stream socket."""
        self._check("handshake")
        descriptor = operator.index(fd)
        if tls is None:
            raise EngineError("handshake", errno.EOPNOTSUPP)
        with self._admit("handshake", (descriptor, STREAM), tls=(tls,)) as sockets:
            token = self._next
            report = functools.partial(self._end_handshake, token)
            self._shakes[token] = HandshakeFlow(self.loop, sockets[0], tls, report)
        self._next += 1
        self._lend(token, tls)
        self._counts["handshakes"] += 1
        return token

    def _watched(self) -> list[Watched]:
        return [*self._flows.values(), *self._udp_watched()]

    def _is_over(self, token: int) -> bool:
        return not (token in self._flows or token in self._shakes or token in self._udp_relays)

    def _places_taken(self) -> int:
        return len(self._flows) + self._waiting + self._udp_places()

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
        self._ended[completion.token] = completion.up, completion.down
        self._tell(completion)

    def live(self, token: int) -> tuple[int, int] | None:
        """Return (up, down) of a flow; None once its completion was polled."""
        token = operator.index(token)
        flow = self._flows.get(token)
        if flow is not None:
            return flow.ways[0].delivered, flow.ways[1].delivered
        if token in self._shakes:
            return 0, 0
        return self._ended.get(token)

    def abort(self, token: int) -> None:
        """Reset both sides of a flow, or give up a handshake; others are left alone."""
        self._check("abort")
        token = operator.index(token)
        self._check("abort")
        self._abort(token)

    def _abort(self, token: int) -> None:
        if token in self._flows:
            self._flows[token].bury(REASON_ABORTED)
        elif token in self._shakes:
            self._shakes[token].forget()
            self._bury_handshake(token, Ending(REASON_ABORTED))
        else:
            self._abort_udp(token)

    def doubt(self, token: int, side: int, *, quiet: bool = False) -> None:
        """Take it that the far end of one side may be gone; others are left alone."""
        self._check("doubt")
        token, side, is_quiet = operator.index(token), operator.index(side), bool(quiet)
        if side not in (1, 2):
            raise ValueError(f"side: {side} is not 1 or 2")
        self._check("doubt")
        if token in self._flows:
            self._flows[token].doubt(side, quiet=is_quiet)
        else:
            self._doubt_udp(token, side, quiet=is_quiet)

    def poll(self) -> list[Completion | UdpCompletion | Newcomer]:
        """Collect what has ended, and the sources that gates did not know; also after close()."""
        self._check_process("poll")
        self._ended.clear()
        self._waiting = self._tls_waiting = 0
        self._forget_polled()
        return self._take_news()

    def statistics(self) -> EngineStatistics:
        """Return a snapshot of all counters; also after close()."""
        self._check_process("statistics")
        flows, udp = self._flows.values(), self._udp_figures()
        legs = [leg for flow in flows for leg in flow.legs]
        return EngineStatistics(
            threads=0,
            flows_open=self._places_taken(),
            flows_total=self._counts["flows"],
            flows_refused=self._refused,
            bytes_up=self._bytes[0] + sum(flow.ways[0].delivered for flow in flows),
            bytes_down=self._bytes[1] + sum(flow.ways[1].delivered for flow in flows),
            parked_bytes=sum(leg.backlog for leg in legs) + sum(len(flow.head) for flow in flows),
            buffers_in_use=sum(1 for leg in legs if leg.backlog)
            + sum(1 for flow in flows if flow.head),
            pipes_in_use=0,
            pipes_pooled=0,
            splice_promotions=0,
            turns=self.turns,
            wakeups=self.turns,
            stale_events=0,
            bugs=0,
            fds_open=len(legs) + udp.fds,
            tls_in_use=len(self._shakes)
            + sum(map(count_tls, flows))
            + self._tls_waiting
            + udp.tls,
            handshakes=self._counts["handshakes"],
            handshakes_failed=self._counts["failed"],
            gates_open=udp.gates,
            peers_waiting=udp.peers,
            datagrams_up=udp.up,
            datagrams_down=udp.down,
            datagrams_dropped=udp.dropped,
            datagram_bytes_held=udp.held,
        )

    def close(self, deadline: float = 5.0) -> bool:
        """Reset every flow and leave the event loop; never waits, hence always True."""
        if math.isnan(take_float(deadline)):
            raise ValueError("deadline: it is not a number")
        if self._is_closed or self._pid != os.getpid():
            return True
        for token in [*self._flows, *self._shakes]:
            self._abort(token)
        self._close_udp()
        self._shut_base()
        _engines.discard(self)
        return True


@atexit.register
def _close_all() -> None:
    for engine in list(_engines):
        engine.close()
