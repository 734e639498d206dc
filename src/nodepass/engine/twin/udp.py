"""The UDP half of the slow twin's Engine: its methods, and the books of gates and UDP relays.

Part of `engine`, which describes the whole; nobody else comes here.
"""

from __future__ import annotations

import errno
import operator
import socket
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from nodepass.engine.types import PLAIN, FlowOptions, Newcomer, UdpCompletion, UdpCounts
from nodepass.errors import EngineError

from .base import (
    DATAGRAM,
    STREAM,
    EngineBase,
    Watched,
    check_head,
    make_leg,
    take_options,
    take_seconds,
    take_whole,
)
from .flow import REASON_ABORTED, Ending
from .gate import Bound, GateFlow, RawBound, Source
from .udp_dial import Dialled, RawDialled
from .udp_flow import UdpFlow
from .udp_port import Tally, UdpPort, dropped

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

MAX_WAITING: Final = 4096  # the native engine's limits, checked alike
MAX_HEAD: Final = 262144  # bytes
NO_COUNTS: Final = Tally().counts()

Other = TypeVar("Other")


class UdpFigures(NamedTuple):
    """UDP's share of EngineStatistics."""

    flows: int
    fds: int
    tls: int
    gates: int
    peers: int
    up: int
    down: int
    dropped: int
    held: int


class UdpEngine(EngineBase[Other | UdpCompletion | Newcomer]):
    """What an Engine can do with UDP; the methods are documented in _fastcopy.pyi."""

    def __init__(self, flows: int, patience: float) -> None:
        super().__init__(flows, patience)
        self._gates: dict[int, GateFlow] = {}
        self._sources: dict[int, Source] = {}
        """Those that wait, by token."""
        self._udp_relays: dict[int, UdpFlow] = {}
        self._udp_ended: dict[int, UdpCounts] = {}
        """Of gates and relays that nobody has polled yet."""
        self._unpolled = {"gates": 0, "peers": 0, "tls": 0}
        self._udp_total = Tally()
        """Of all that have ended."""

    # --- admission ---

    def udp_serve(self, fd: int, *, waiting: int = 512, options: FlowOptions = PLAIN) -> int:
        """Open a gate on a bound non-blocking UDP socket; own it on success."""
        self._check("udp_serve")
        descriptor = operator.index(fd)
        most = take_whole("waiting", waiting, MAX_WAITING)
        size = take_options(options).datagram
        with self._admit("udp_serve", (descriptor, DATAGRAM)) as sockets:
            token, tally = self._require_token("udp_serve"), Tally()
            if sockets[0].family not in {socket.AF_INET, socket.AF_INET6}:
                raise OSError(errno.EAFNOSUPPORT, "")
            if not sockets[0].getsockname()[1]:
                raise OSError(errno.EINVAL, "it is not bound")
            gate = GateFlow(self, token, UdpPort(sockets[0], size, tally), tally, most)
            self.loop.add_reader(sockets[0], gate.read)
        self._gates[token] = gate
        return token

    def udp_bind(
        self,
        peer: int,
        fd: int,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int:
        """Carry the datagrams of a waiting peer over a link; own it on success."""
        self._check("udp_bind")
        name, descriptor = operator.index(peer), operator.index(fd)
        wishes = take_options(options)
        check_head(head)
        kind = RawBound if wishes.raw else Bound
        with self._admit("udp_bind", (descriptor, STREAM), tls=(tls,)) as sockets:
            source = self._sources.get(name)
            if source is None:
                raise EngineError("udp_bind", errno.ENOENT)
            if len(head) > MAX_HEAD:
                raise EngineError("udp_bind", errno.EMSGSIZE)
            token = self._require_token("udp_bind")
            leg = make_leg(sockets[0], tls)
            relay = kind(self, token, leg, wishes.idle, head, source=source)
        self._start(relay, tls)
        source.gate.bind(source, relay)
        return token

    def udp_dial(
        self,
        fd: int,
        target: int,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int:
        """Carry the frames of a link as datagrams of a connected socket; own both on success."""
        self._check("udp_dial")
        a, b = operator.index(fd), operator.index(target)
        wishes = take_options(options)
        check_head(head)
        kind = RawDialled if wishes.raw else Dialled
        with self._admit("udp_dial", (a, STREAM), (b, DATAGRAM), tls=(tls,)) as sockets:
            if len(head) > MAX_HEAD:
                raise EngineError("udp_dial", errno.EMSGSIZE)
            sockets[1].getpeername()
            token = self._require_token("udp_dial")
            leg = make_leg(sockets[0], tls)
            relay = kind(self, token, leg, wishes, head, target=sockets[1])
        self._start(relay, tls)
        return token

    def _start(self, relay: UdpFlow, tls: Connection | None) -> None:
        self._udp_relays[relay.token] = relay
        self._lend(relay.token, tls)
        # Not now: the caller must know the token before anything can happen to it.
        self.loop.call_soon(relay.begin)
        self._keep_watch()

    # --- wishes ---

    def udp_shut(self, gate: int) -> None:
        """Let no more sources in at a gate."""
        gate = operator.index(gate)
        self._check("udp_shut")
        if gate in self._gates:
            self._gates[gate].is_shut = True

    def udp_relieve(self, gate: int) -> None:
        """End some short exchanges of a gate that seem to be over."""
        gate = operator.index(gate)
        self._check("udp_relieve")
        if gate in self._gates:
            self._gates[gate].relieve()

    def udp_limit(self, token: int, idle: float) -> None:
        """Change the idle limit of a UDP relay."""
        self._check("udp_limit")
        token, limit = operator.index(token), take_seconds(idle)
        self._check("udp_limit")
        if token in self._udp_relays:
            self._udp_relays[token].idle = limit

    def udp_retarget(self, token: int, target: int) -> bool:
        """Go on with another UDP socket towards the target; own it on success."""
        self._check("udp_retarget")
        name, descriptor = operator.index(token), operator.index(target)
        with self._admit("udp_retarget", (descriptor, DATAGRAM)) as sockets:
            relay = self._udp_relays.get(name)
            if not isinstance(relay, Dialled) or isinstance(relay, RawDialled):
                sockets.pop().detach()
                return False
            sockets[0].getpeername()
            relay.retarget(sockets[0])
        return True

    def _doubt_udp(self, token: int, side: int, *, quiet: bool) -> None:
        relay = self._udp_relays.get(token)
        if relay is not None and relay.side == side:
            relay.leg.pulse.doubt(quiet=quiet)

    def udp_counts(self, token: int) -> UdpCounts | None:
        """Return the running counts of a gate or a UDP relay; None once that was polled."""
        token = operator.index(token)
        for open_ones in (self._gates, self._udp_relays):
            if token in open_ones:
                return open_ones[token].tally.counts()
        return self._udp_ended.get(token)

    def _abort_udp(self, token: int) -> None:
        if token in self._gates:
            self._gates[token].bury(REASON_ABORTED)
        elif token in self._udp_relays:
            self._udp_relays[token].bury(REASON_ABORTED)
        elif token in self._sources:
            source = self._sources[token]
            source.gate.reject(source)

    # --- what gates and relays tell ---

    def admit(self, source: Source) -> bool:
        """Give a source a token and announce it; False: every place is taken."""
        source.token = self._take_token()
        if not source.token:
            return False
        self._sources[source.token] = source
        self.announce(source)
        return True

    def announce(self, source: Source) -> None:
        """Tell of a source that waits."""
        self._tell(source.newcomer())

    def bury_source(self, source: Source, reason: int) -> None:
        """Take note that a source waits no more."""
        del self._sources[source.token]
        self._unpolled["peers"] += 1
        self._tell(UdpCompletion(source.token, NO_COUNTS, *Ending(reason)))
        self._keep_watch()  # it may have to cool

    def bury_relay(self, relay: UdpFlow, ending: Ending) -> None:
        """Take note that a UDP relay has closed its sockets."""
        del self._udp_relays[relay.token]
        self._unpolled["tls"] += relay.is_tls
        self._end(relay.token, relay.tally.counts(), ending)

    def bury_gate(self, gate: GateFlow, ending: Ending) -> None:
        """Take note that a gate has closed its socket."""
        del self._gates[gate.token]
        self._unpolled["gates"] += 1
        self._end(gate.token, gate.tally.counts(), ending)

    def _end(self, token: int, counts: UdpCounts, ending: Ending) -> None:
        self._udp_ended[token] = counts
        self._udp_total.add(counts)
        self._tell(UdpCompletion(token, counts, *ending))

    # --- books ---

    def _udp_watched(self) -> list[Watched]:
        gates = [gate for gate in self._gates.values() if gate.is_cooling]
        return [*gates, *self._udp_relays.values()]

    def _forget_polled(self) -> None:
        self._udp_ended.clear()
        self._unpolled = dict.fromkeys(self._unpolled, 0)

    def _udp_places(self) -> int:
        open_ones = len(self._gates) + len(self._udp_relays) + len(self._sources)
        return open_ones + len(self._udp_ended) + self._unpolled["peers"]

    def _close_udp(self) -> None:
        for gate in list(self._gates.values()):
            gate.bury(REASON_ABORTED)
        for relay in list(self._udp_relays.values()):
            relay.bury(REASON_ABORTED)

    def _udp_figures(self) -> UdpFigures:
        total = Tally()
        for tally in [self._udp_total, *(one.tally for one in self._gates.values()),
                      *(one.tally for one in self._udp_relays.values())]:  # fmt: skip
            total.add(tally.counts())
        gates, relays = self._gates.values(), self._udp_relays.values()
        dialled = sum(1 for relay in relays if isinstance(relay, Dialled))
        return UdpFigures(
            flows=self._udp_places(),
            fds=len(gates) + len(relays) + dialled,
            tls=sum(relay.is_tls for relay in relays) + self._unpolled["tls"],
            gates=len(gates) + self._unpolled["gates"],
            peers=sum(gate.linkless for gate in gates) + self._unpolled["peers"],
            up=total.datagrams_up,
            down=total.datagrams_down,
            dropped=dropped(total.counts()),
            held=sum(gate.held for gate in gates) + sum(relay.held for relay in relays),
        )
