"""The slow twin's gates: the sources that write to them, and the UDP relays of those sources.

Part of `engine`, which describes the whole; nobody else comes here.

    unknown --datagram--> waiting --udp_bind()--> bound --end--> unknown
                             |                      | early reset, end or abort
                             +------abort()----> cooling --a second later--> unknown

A gate reads its socket always, so that one visitor never waits for another: what a slow link does
not take is dropped.
"""

from __future__ import annotations

import errno
import time
from collections import Counter, deque
from typing import Any, Final, Protocol

from nodepass.engine.types import Newcomer
from nodepass.net.hosts import plain_host, source_of

from .flow import REASON_ABORTED, REASON_FINISHED, REASON_IDLE, Ending
from .legs import Leg
from .udp_flow import HEADER_BYTES, TURN_DATAGRAMS, UdpFlow, UdpHost
from .udp_port import MAX_PAYLOAD, Parcel, Remark, Tally, UdpPort

CROWD_SHARE: Final = 4  # an address may have so many times the waiting places that are left
PARKED_BYTES: Final = 65536  # of one source that waits, 2 more for each datagram
QUEUE_BYTES: Final = 131072  # of one relay whose link is slow, 2 more for each datagram
COOLING_SECONDS: Final = 1.0  # a link that fails at once would be asked for again at once
NO_SOURCE: Final = frozenset({errno.EINVAL, errno.EADDRNOTAVAIL, errno.ENODEV})
"""Answers of the kernel to a source address that nothing can leave from."""
RELIEVED: Final = 64  # relays ended by one udp_relieve()
GROWN_SECONDS: Final = 30.0  # keepalives come more often
YOUNG_SECONDS: Final = 2.0  # a look-up by name has its answer by then, or its next try
ANSWERED_SECONDS: Final = 1.0  # of silence behind the one answer
UNANSWERED_SECONDS: Final = 5.0  # of silence without any; what resolvers wait


class GateHost(UdpHost, Protocol):
    """What gates need of the engine besides."""

    def admit(self, source: Source) -> bool:
        """Give a source a token and announce it; False: every place is taken."""

    def announce(self, source: Source) -> None:
        """Tell of a source that waits."""

    def bury_source(self, source: Source, reason: int) -> None:
        """Take note that a source waits no more."""

    def bury_gate(self, gate: GateFlow, ending: Ending) -> None:
        """Take note that a gate has closed its socket."""


class Source:
    """A UDP address that a gate knows."""

    __slots__ = (
        "address", "gate", "has_heard", "key", "local", "parked", "parked_bytes", "relay", "token",
        "until",
    )  # fmt: skip

    def __init__(self, gate: GateFlow, key: object, parcel: Parcel) -> None:
        self.gate = gate
        self.key = key
        self.address: Any = parcel.address
        self.local: Remark | None = parcel.local
        self.has_heard = False
        """Whether an answer has left for it."""
        self.token = 0
        self.parked: deque[bytes] = deque()
        self.parked_bytes = 0
        self.relay: Bound | None = None
        self.until = 0.0
        """When it is forgotten, on the monotonic clock, if it is cooling."""

    def newcomer(self) -> Newcomer:
        """Return what the caller hears of this source."""
        return Newcomer(self.token, self.gate.token, plain_host(self.address[0]), self.address[1])

    def park(self, data: bytes) -> None:
        """Keep a datagram; drop the oldest for it."""
        self.parked.append(data)
        self.parked_bytes += HEADER_BYTES + len(data)
        while self.parked_bytes > PARKED_BYTES:
            self.take()
            self.gate.tally.no_link += 1

    def take(self) -> bytes:
        """Return the oldest datagram, which is parked no more."""
        data = self.parked.popleft()
        self.parked_bytes -= HEADER_BYTES + len(data)
        return data

    def drop(self) -> None:
        """Give up what is parked."""
        self.gate.tally.no_link += len(self.parked)
        self.parked.clear()
        self.parked_bytes = 0


class GateFlow:
    """A bound UDP socket and the sources that write to it."""

    def __init__(
        self, host: GateHost, token: int, port: UdpPort, tally: Tally, waiting: int
    ) -> None:
        self.host = host
        self.token = token
        self.port = port
        self.tally = tally
        self.is_shut = False
        """Whether sources that are not known yet stay outside."""
        self.is_over = False
        self._most_waiting = waiting
        self._sources: dict[object, Source] = {}
        self._cooling: dict[object, Source] = {}
        self.waiting: dict[int, Source] = {}
        self.relays: dict[int, UdpFlow] = {}
        self._crowds: Counter[str | bytes] = Counter()
        """Sources without a link, by the machine that they are of."""
        self._crowd: dict[int, UdpFlow] = {}
        """Relays that wait for room in the socket."""

    @property
    def linkless(self) -> int:
        """Sources without a link."""
        return len(self.waiting) + len(self._cooling)

    @property
    def is_cooling(self) -> bool:
        """Whether there is something for `watch_step` to do."""
        return bool(self._cooling)

    @property
    def held(self) -> int:
        """Bytes of datagrams that wait here for a link."""
        return sum(source.parked_bytes for source in self.waiting.values())

    def read(self) -> None:
        """Take a turn's worth of datagrams."""
        self.host.turns += 1
        for _ in range(TURN_DATAGRAMS):
            if self.is_over:
                return
            try:
                parcel = self.port.receive()
            except OSError:
                return  # nothing more; or, on Windows, ICMP's word on an answer of ours
            if parcel.is_whole:
                self._sort(parcel)
            else:
                self.tally.too_large += 1

    def _sort(self, parcel: Parcel) -> None:
        # What IPv6 says besides host and port is (flow label, scope): only the scope is where.
        key = (*parcel.address[:2], parcel.address[3:], parcel.local)
        source = self._sources.get(key)
        if source is not None and source.until and source.until <= time.monotonic():
            self._forget(source)
            source = None
        if source is None:
            source = self._welcome(key, parcel)
        if source is None or source.until:
            self.tally.no_link += 1
        elif source.relay is not None:
            source.relay.take(parcel.data)
        else:
            source.park(parcel.data)

    def _welcome(self, key: object, parcel: Parcel) -> Source | None:
        left = self._most_waiting - self.linkless
        if self.is_shut or left <= 0:
            return None
        # The scarcer the places, the fewer for one address.
        if self._crowds[source_of(plain_host(parcel.address[0]))] >= CROWD_SHARE * left:
            return None
        source = Source(self, key, parcel)
        if not self.host.admit(source):
            return None
        self._sources[key] = self.waiting[source.token] = source
        self._count(source, 1)
        return source

    def _forget(self, source: Source) -> None:
        if self._cooling.pop(source.key, None) is not None:
            self._count(source, -1)
        del self._sources[source.key]

    def _count(self, source: Source, step: int) -> None:
        crowd = source_of(plain_host(source.address[0]))
        self._crowds[crowd] += step
        if not self._crowds[crowd]:
            del self._crowds[crowd]

    def bind(self, source: Source, relay: Bound) -> None:
        """Take note of the relay of a source that waits."""
        self.relays[relay.token] = relay
        relay.fill()
        if source.parked:
            self.host.announce(source)
            return
        del self.waiting[source.token]
        self._count(source, -1)
        if relay.is_raw:
            self._forget(source)
        else:
            source.relay = relay
        self.host.bury_source(source, REASON_FINISHED)

    def reject(self, source: Source) -> None:
        """Give up a source that waits, and be deaf to it for a while."""
        del self.waiting[source.token]
        source.drop()
        self._cool(source, time.monotonic() + COOLING_SECONDS)
        self.host.bury_source(source, REASON_ABORTED)

    def _cool(self, source: Source, until: float) -> None:
        source.until = until
        self._cooling[source.key] = source

    def release(self, relay: Bound, reason: int) -> None:
        """Take note that a relay has ended."""
        del self.relays[relay.token]
        self._crowd.pop(relay.token, None)
        source = relay.source
        if source.relay is not relay:
            return
        source.relay = None
        until = relay.born + COOLING_SECONDS
        if reason == REASON_IDLE or self.is_over or until <= time.monotonic():
            self._forget(source)
        else:
            self._count(source, 1)
            self._cool(source, until)

    def await_room(self, relay: UdpFlow) -> None:
        """Call a relay's `step` when there is room in the socket."""
        if not self._crowd:
            self.host.loop.add_writer(self.port.sock, self._have_room)
        self._crowd[relay.token] = relay

    def _have_room(self) -> None:
        self.host.loop.remove_writer(self.port.sock)
        crowd, self._crowd = self._crowd, {}
        for relay in crowd.values():
            relay.step()

    def relieve(self) -> None:
        """End the oldest of the exchanges that seem to be over."""
        now = time.monotonic()
        over = [relay for relay in self.relays.values() if seems_over(relay, now)]
        for relay in sorted(over, key=lambda relay: relay.born)[:RELIEVED]:
            relay.bury(REASON_IDLE)

    def watch_step(self) -> None:
        """Forget the sources that have cooled."""
        now = time.monotonic()
        for source in [source for source in self._cooling.values() if source.until <= now]:
            self._forget(source)

    def bury(self, reason: int) -> None:
        """Close the socket and end all that belongs to it."""
        self.is_over = True
        for relay in list(self.relays.values()):
            relay.bury(reason)
        for source in list(self.waiting.values()):
            source.drop()
            self.host.bury_source(source, reason)
        self.waiting.clear()
        self._cooling.clear()
        self._sources.clear()
        self._crowds.clear()
        sock = self.port.sock
        if not self.host.loop.is_closed():
            self.host.loop.remove_reader(sock)
            self.host.loop.remove_writer(sock)
        sock.close()
        self.host.bury_gate(self, Ending(reason))


def seems_over(relay: UdpFlow, now: float) -> bool:
    """Tell whether a short exchange has had its answer or waits in vain, or a stream is still."""
    answers = relay.tally.datagrams_down
    if answers > 1 and relay.active - relay.born >= YOUNG_SECONDS:
        return now - relay.active >= GROWN_SECONDS
    patience = ANSWERED_SECONDS if answers else UNANSWERED_SECONDS
    return now - relay.active >= patience


class Bound(UdpFlow):
    """A source whose datagrams are carried over a link."""

    side = 2
    is_raw = False

    def __init__(
        self, host: GateHost, token: int, leg: Leg, idle: float, head: bytes, *, source: Source
    ) -> None:
        super().__init__(host, token, leg, idle, head)
        self.source = source
        self._queue: deque[bytes] = deque()
        self._queued = 0
        """Bytes of the queue, headers included."""
        self._is_passing = False
        """Whether `pass_on` is about to be called."""

    @property
    def held(self) -> int:
        return super().held + self._queued

    def fill(self) -> None:
        """Take over what is parked."""
        while self.source.parked:
            self._enqueue(self.source.take())

    def _enqueue(self, data: bytes) -> None:
        self._queue.append(data)
        self._queued += HEADER_BYTES + len(data)

    def take(self, data: bytes) -> None:
        """Carry a datagram of the visitor's, or keep it until the link has room, or drop it."""
        if self.leg.backlog + self._queued + HEADER_BYTES + len(data) > QUEUE_BYTES or self.ending:
            self.tally.slow_link += 1
            return
        self._enqueue(data)
        self.pass_on()

    def pass_on(self) -> None:
        self._is_passing = False
        for _ in range(TURN_DATAGRAMS):
            if self.is_over or self.ending or self.leg.backlog or not self._queue:
                break
            data = self._queue[0]
            if not self.give(self.dress(data)):
                break
            self._queue.popleft()
            self._queued -= HEADER_BYTES + len(data)
            self.tally.go_up(data)
        self.watch_link()
        if self._queue and not (self.is_over or self.ending or self.leg.backlog):
            self._pass_on_soon()

    def _pass_on_soon(self) -> None:
        if not self._is_passing:
            self._is_passing = True
            self.host.loop.call_soon(self.pass_on)

    def dress(self, data: bytes) -> bytes:
        """Return what goes over the link for a datagram."""
        return len(data).to_bytes(HEADER_BYTES, "big") + data

    def emit(self, data: bytes) -> bool:
        source = self.source
        try:
            source.gate.port.send(data, source.address, source.local)
        except (BlockingIOError, InterruptedError):
            source.gate.await_room(self)
            return False
        except OSError as exc:
            if source.local is not None and not source.has_heard and exc.errno in NO_SOURCE:
                source.local = None  # nothing ever leaves from there: it is a broadcast
                return self.emit(data)
            self.tally.lose()
        else:
            source.has_heard = True
            self.tally.go_down(data)
            self.active = time.monotonic()
        return True

    def close(self, ending: Ending) -> None:
        self.tally.slow_link += len(self._queue)
        self._queue.clear()
        self._queued = 0
        self.source.gate.release(self, ending.reason)


class RawBound(Bound):
    """The seed dialect: one datagram, and all that comes back is its answer."""

    is_raw = True
    _is_spilt = False
    """Whether the answer is too long for a datagram."""

    def fill(self) -> None:
        self._enqueue(self.source.take())

    def dress(self, data: bytes) -> bytes:
        return data

    def step(self) -> None:
        """Wait for the whole answer; then send it."""
        self._is_due = self.is_blocked = False
        if self.is_over:
            return
        if len(self.inbox) > MAX_PAYLOAD and not self._is_spilt:
            self._is_spilt = True
            self.tally.too_large += 1
        if self._is_spilt:
            self.inbox.clear()
        if self.is_drained and self.inbox and self.ending == Ending(REASON_FINISHED):
            self.is_blocked = not self._send_answer()
        self.settle(False)

    def _send_answer(self) -> bool:
        if not self.emit(bytes(self.inbox)):
            return False
        self.inbox.clear()
        return True

    def tire(self) -> None:
        if self.inbox and not self.is_blocked and self._send_answer():
            self.bury(REASON_FINISHED)
        else:
            self.bury(REASON_IDLE)
