"""Rules of one live server-client pairing: health, drain, reconnect. Sans-IO.

Bytes and the time go in, events and bytes come out. Must never touch a socket, a clock,
randomness or a log: `now` is any steadily growing number of seconds, entropy is an argument.
`control` moves the bytes, `server` and `client` act on the events.

    Session          a live control channel, either role, either dialect
    Backoff          how long to wait before the next try

States of a Session, and what moves it:

    LIVE ──drain sent or received──> DRAINING ──bye, EOF, silence, bad bytes──> CLOSED
      └────────────────── bye, EOF, silence, bad bytes ────────────────────────────^

CLOSED absorbs: whatever comes after is a no-op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from nodepass.errors import PeerWireError

from . import lines
from .messages import (
    Bye,
    Dialect,
    Drain,
    Fail,
    Heartbeat,
    Idle,
    Kind,
    Launch,
    NativeSignal,
    Ping,
    Pong,
    SeedLaunch,
    SeedSignal,
)

SILENT_PERIODS: Final = 3
"""Report periods without a byte after which a peer is lost (docs/protocol.md, "Health")."""
RTT_WEIGHT: Final = 0.125
"""Share of a new sample in the smoothed round-trip time: RFC 6298, alpha."""
MAX_UNSENT: Final = 1024 * 1024
"""Bytes of signals a peer may leave unread (over 20,000 launches): beyond it, it is lost."""
TALK_BURST: Final = 4096
"""Signals that carry nothing which a peer may send at once: heartbeats that have waited for a
process that stood still, an hour of them with a period of a second."""
TALK_RATE: Final = 250.0
"""The same a second, all the time: a hundred times what any of our programs says. To hear so many
costs a thousandth of a processor's time."""
ALL: Final = 1 << 62
"""Lines: more than ever come."""
PINGS_HEARD: Final = 4
"""What is added to that for each of our own periods, which may be a few milliseconds long."""


class Role(Enum):
    """Which end of the control channel a Session is."""

    SERVER = "server"
    CLIENT = "client"


class State(Enum):
    """Life of a Session; the picture stands at the top of the module."""

    LIVE = "live"
    DRAINING = "draining"
    CLOSED = "closed"


MOVES: Final[dict[State, frozenset[State]]] = {
    State.LIVE: frozenset({State.DRAINING, State.CLOSED}),
    State.DRAINING: frozenset({State.DRAINING, State.CLOSED}),
    State.CLOSED: frozenset({State.CLOSED}),
}
"""Allowed moves; anything else is a bug of ours."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The pairing has ended; the last event of a Session."""

    reason: str
    """One clause for the log."""
    is_orderly: bool = False
    """The other side said bye first: a stop or a restart, no fault."""
    is_replaced: bool = False
    """The server ended it because another client came with the same name."""
    silent_since: float | None = None
    """When the last byte came, if it was silence that ended the session."""
    is_flood: bool = False
    """The other side sent more signals that carry nothing than anybody needs to."""


@dataclass(frozen=True, slots=True)
class Drained:
    """The server has seen our drain: no launch is on its way any more."""


Event = Launch | SeedLaunch | Fail | Idle | Drain | Drained | Lost


class Session:
    """A live control channel.

    Args:
        role: which end we are.
        dialect: what the two ends agreed on.
        now: seconds; the session begins to count here.
        interval: report period, seconds.
    """

    def __init__(self, role: Role, dialect: Dialect, *, now: float, interval: float) -> None:
        self.role = role
        self.dialect = dialect
        self.state = State.LIVE
        self.rtt: float | None = None
        """Seconds, smoothed; None until the first pong, and always with a seed peer."""
        self.on_output: Callable[[], None] | None = None
        """Called when there is something to send; the hearer sends it when it suits it."""
        self._interval = interval
        self._lines = lines.LineBuffer()
        self._out = bytearray()
        self._heard_at = now
        self._ticked_at = now
        self._beat_at = now
        self._pings = 0
        self._ping_timed = 0
        self._ping_sent_at: float | None = None
        self._has_said_drain = False
        self._drain_ping: int | None = None
        """The ping behind our drain, until its answer."""
        self._beat_heard_at: float | None = None
        self._longest_gap: float | None = None
        self._launches = 0
        """Those sent that have not been answered by a `fail`."""
        self._talk = float(TALK_BURST)
        """Signals that carry nothing which the peer may still send, as of `_talked_at`."""
        self._talked_at = now
        self._talk_rate = TALK_RATE + PINGS_HEARD / interval
        self.has_more = False
        """Whether what has come may hold another line: call `read_on`."""

    def __repr__(self) -> str:
        return f"<Session {self.role.value} {self.dialect} {self.state.value}>"

    @property
    def is_open(self) -> bool:
        return self.state is not State.CLOSED

    def receive_data(self, data: bytes, now: float, most: int = ALL) -> list[Event]:
        """Take bytes from the peer; empty bytes are the end of the stream.

        Args:
            most: lines to read; the rest is for `read_on`, and comes before any further bytes.
        """
        if self.state is State.CLOSED:
            return []
        if not data:
            return [self._lose("the other side closed the connection")]
        self._heard_at = now
        self._lines.feed(data)
        return self.read_on(now, most)

    def read_on(self, now: float, most: int = ALL) -> list[Event]:
        """Read more lines of what has come, at most so many."""
        events: list[Event] = []
        self.has_more = False
        try:
            while self.state is not State.CLOSED:
                line = self._lines.next_line()
                if line is None:
                    break
                self._take_line(line, now, events)
                most -= 1
                if not most:
                    self.has_more = self.is_open
                    break
        except PeerWireError as exc:
            events.append(self._lose(f"the other side broke the protocol: {exc}"))
        return self._bound(events)

    def waste(self, now: float) -> None:
        """Take it that a signal of the peer's was good for nothing; with too many, it is lost.

        Whoever acts on events calls it for those that name nothing known. The end comes with the
        events of the next call that returns some.
        """
        self._talk = min(TALK_BURST, self._talk + self._talk_rate * (now - self._talked_at)) - 1.0
        self._talked_at = now

    def cut(self, reason: str, now: float, *, is_silence: bool = False) -> list[Event]:
        """Take it that the connection is gone, for a reason that the socket gave.

        Args:
            is_silence: the peer did not end it; our bytes went unanswered.
        """
        if not self.is_open:
            return []
        self._move(State.CLOSED)
        # TCP is told to give up after the same time; a seed client is never heard at all.
        latest = now - SILENT_PERIODS * self._interval
        return [Lost(reason, silent_since=max(latest, self._heard_at) if is_silence else None)]

    def tick(self, now: float) -> list[Event]:
        """Send what is due and notice silence; call it at `next_tick`, or later."""
        if self.state is State.CLOSED:
            return []
        if self._was_stopped(now):
            # What the peer sent meanwhile waits unread, so it gets one more period before it
            # counts as silent; and the time that we slept is neither the path's nor its period.
            self._ping_sent_at = None
            self._beat_heard_at = None
            self._heard_at = max(self._heard_at, now - (SILENT_PERIODS - 1) * self._interval)
        self._ticked_at = now
        limit = self._silence_limit()
        if limit is not None and now - self._heard_at >= limit:
            self._move(State.CLOSED)
            reason = f"nothing heard for {now - self._heard_at:.1f} s"
            return [Lost(reason, silent_since=self._heard_at)]
        if now >= self._beat_at:
            self._beat_at = now + self._interval
            self._beat(now)
        return self._bound([])

    def next_tick(self) -> float:
        """Return when `tick` is due, in the seconds of `now`."""
        limit = self._silence_limit()
        if limit is None:
            return self._beat_at
        return min(self._beat_at, self._heard_at + limit)

    def send(self, signal: NativeSignal | SeedSignal) -> None:
        """Queue a signal; after the end it goes nowhere."""
        if self.state is State.CLOSED:
            return
        self._out += lines.pack_signal(signal)
        if self.on_output is not None:
            self.on_output()

    def launch(self, kind: Kind, link: int | str, visitor: str) -> None:
        """Ask the client to join a link; a number is native, an id is seed."""
        self._launches += 1
        if isinstance(link, str):
            self.send(SeedLaunch(link, kind))
        else:
            self.send(Launch(kind, link, visitor))

    def drain(self) -> None:
        """Say that we are stopping; a seed peer has no word for it."""
        if not self.is_open or self._has_said_drain:
            return
        self._has_said_drain = True
        if self.dialect is Dialect.NATIVE:
            self.send(Drain())
        self._move(State.DRAINING)

    def await_drained(self) -> None:
        """Ask a native server, behind our drain, whether it has seen that.

        After: `Drained`. Lines keep their order, so behind the answer comes no launch any more.
        """
        if self.is_open:
            self._pings += 1
            self._drain_ping = self._pings
            self.send(Ping(self._pings))

    def bye(self, reason: str) -> None:
        """End the session from our side."""
        if self.dialect is Dialect.NATIVE:
            self.send(Bye(reason))
        self._move(State.CLOSED)

    def data_to_send(self) -> bytes:
        """Hand over all queued bytes."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def _take_line(self, line: bytes, now: float, events: list[Event]) -> None:
        signal = lines.parse_signal(line, self.dialect)
        is_client = self.role is Role.CLIENT
        match signal:
            case Launch() | SeedLaunch() if is_client:
                events.append(signal)  # who knows the links knows whether it was any good
            case Fail() if not is_client:
                if self._launches:
                    self._launches -= 1  # an answer, and nobody can give more than were asked for
                else:
                    self.waste(now)
                events.append(signal)
            case Idle() if is_client:
                self.waste(now)
                events.append(signal)
            case Ping(number):
                self.waste(now)
                self.send(Pong(number))
            case Pong(number):
                self.waste(now)
                self._take_pong(number, now)
                if self._drain_ping is not None and number >= self._drain_ping:
                    self._drain_ping = None
                    events.append(Drained())
            case Drain():
                self.waste(now)
                self._move(State.DRAINING)
                events.append(signal)
            case Bye(reason):
                self._move(State.CLOSED)
                events.append(
                    Lost(f"the other side said bye: {reason}", True, reason == "replaced")
                )
            case Heartbeat():
                self.waste(now)
                self._take_heartbeat(now)
            case _:
                self.waste(now)  # a later release's, or another role's: the protocol says ignore

    def _take_pong(self, number: int, now: float) -> None:
        if self._ping_sent_at is None or number != self._ping_timed:
            return
        sample = now - self._ping_sent_at
        self._ping_sent_at = None
        if self._was_stopped(now):
            return  # the time that we slept is not the path's
        self.rtt = sample if self.rtt is None else self.rtt + RTT_WEIGHT * (sample - self.rtt)

    def _take_heartbeat(self, now: float) -> None:
        if self._beat_heard_at is not None and not self._was_stopped(now):
            self._longest_gap = max(self._longest_gap or 0.0, now - self._beat_heard_at)
        self._beat_heard_at = now

    def _was_stopped(self, now: float) -> bool:
        """Tell whether we ourselves stood still lately: a suspend, a starved machine."""
        return now - self._ticked_at > 2 * self._interval

    def _silence_limit(self) -> float | None:
        if self.dialect is Dialect.NATIVE:
            return SILENT_PERIODS * self._interval
        if self.role is Role.SERVER or self._longest_gap is None:
            # A seed client never writes, and a seed server's period is not known before its
            # second heartbeat: until then only TCP itself can tell.
            return None
        return SILENT_PERIODS * max(self._interval, self._longest_gap)

    def _bound(self, events: list[Event]) -> list[Event]:
        is_flood = self._talk < 0
        if self.is_open and (is_flood or len(self._out) > MAX_UNSENT):
            reason = "the other side reads no signals"
            if is_flood:
                rate = f"{self._talk_rate:.0f} signals a second"
                reason = f"the other side sends over {rate} that mean nothing"
            self._move(State.CLOSED)
            events.append(Lost(reason, is_flood=is_flood))
            self._out.clear()
        return events

    def _beat(self, now: float) -> None:
        if self.dialect is Dialect.NATIVE:
            self._pings += 1
            if self._ping_sent_at is None:
                # One at a time is timed: on a path slower than the period, the newest ping's
                # pong would never be the next to come.
                self._ping_timed = self._pings
                self._ping_sent_at = now
            self.send(Ping(self._pings))
        elif self.role is Role.SERVER:
            self.send(Heartbeat())

    def _lose(self, reason: str) -> Lost:
        self._move(State.CLOSED)
        return Lost(reason)

    def _move(self, new: State) -> None:
        if new not in MOVES[self.state]:
            raise AssertionError(f"session: {self.state} -> {new}")
        self.state = new
