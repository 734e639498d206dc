"""A session against a simple model of it; two sessions joined by a fake wire; any cut."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.property.strategies import (
    cuts,
    garbage,
    native_signals,
    numbers,
    seed_signals,
    visitors,
    words,
)

from nodepass.protocol import lines
from nodepass.protocol import session as rules
from nodepass.protocol.messages import (
    Bye,
    Dialect,
    Drain,
    Fail,
    Idle,
    Kind,
    Launch,
    NativeSignal,
    Ping,
    SeedLaunch,
    SeedSignal,
)
from nodepass.protocol.session import Event, Lost, Role, Session

INTERVAL = 5.0
roles = st.sampled_from(Role)
dialects = st.sampled_from(Dialect)
steps = st.sampled_from([0.0, 0.1, 1.0, 4.9, 5.0, 5.1, 10.0, 15.0, 1e6])
"""Seconds that pass at once; a million is a machine that was put to sleep."""


# ------------------------------------------------------------------------------- cuts


@given(
    st.data(), roles, dialects, st.lists((native_signals | seed_signals).map(lines.pack_signal)),
    garbage,
)  # fmt: skip
def test_events_of_any_cut(
    data: st.DataObject, role: Role, dialect: Dialect, lines: list[bytes], noise: bytes
) -> None:
    """All at once = byte by byte = random cuts, garbage at the end included."""
    stream = b"".join(lines) + noise + b"\n"
    whole = heard_of([stream], role, dialect)
    assert heard_of([bytes([byte]) for byte in stream], role, dialect) == whole
    assert heard_of(data.draw(cuts(stream)), role, dialect) == whole


def heard_of(pieces: list[bytes], role: Role, dialect: Dialect) -> tuple[list[Event], bytes]:
    """Return the events and what is answered."""
    session = Session(role, dialect, now=0.0, interval=INTERVAL)
    events = []
    for piece in pieces:
        events += session.receive_data(piece, 0.0)
    losses = [event for event in events if isinstance(event, Lost)]
    assert len(losses) == (0 if session.is_open else 1)
    assert losses == events[len(events) - len(losses) :], "it comes last"
    return events, session.data_to_send()


@given(st.data(), roles, dialects, st.lists(garbage, max_size=4))
def test_garbage_ends_in_a_loss_at_most(
    data: st.DataObject, role: Role, dialect: Dialect, noise: list[bytes]
) -> None:
    session = Session(role, dialect, now=0.0, interval=INTERVAL)
    for piece in data.draw(cuts(b"\n".join(noise))):
        for event in session.receive_data(piece, 1.0):
            if isinstance(event, Lost):
                assert event.reason.isprintable(), "it goes into a log line"


# --------------------------------------------------------------------- a simple model


class Model:
    """What a native session ought to do, said as plainly as can be."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.is_open = True
        self.has_said_drain = False
        self.heard_at = 0.0
        self.ticked_at = 0.0
        self.beat_at = 0.0
        self.pings = 0
        self.out: list[str] = []

    def hear(self, signal: NativeSignal, now: float) -> list[Event]:
        if not self.is_open:
            return []
        self.heard_at = now
        match signal:
            case Ping(number):
                self.out.append(f"pong://{number}")
            case Bye(reason):
                self.is_open = False
                return [Lost(f"the other side said bye: {reason}", True, reason == "replaced")]
            case Drain():
                return [signal]
            case Launch() | Idle() if self.role is Role.CLIENT:
                return [signal]
            case Fail() if self.role is Role.SERVER:
                return [signal]
        return []

    def tick(self, now: float) -> bool:
        """Return whether the peer is lost."""
        if not self.is_open:
            return False
        if now - self.ticked_at > 2 * INTERVAL:
            self.heard_at = max(self.heard_at, now - 2 * INTERVAL)
        self.ticked_at = now
        if now - self.heard_at >= 3 * INTERVAL:
            self.is_open = False
            return True
        if now >= self.beat_at:
            self.beat_at = now + INTERVAL
            self.pings += 1
            self.out.append(f"ping://{self.pings}")
        return False


class AgainstModel(RuleBasedStateMachine):
    """Whatever happens in whatever order, session and model agree."""

    @initialize(role=roles)
    def begin(self, role: Role) -> None:
        self.now = 0.0
        self.session = Session(role, Dialect.NATIVE, now=0.0, interval=INTERVAL)
        self.model = Model(role)

    @rule(step=steps)
    def wait(self, step: float) -> None:
        self.now += step
        is_lost = bool(self.session.tick(self.now))
        assert is_lost is self.model.tick(self.now)

    @rule(signal=native_signals)
    def hear(self, signal: NativeSignal) -> None:
        events = self.session.receive_data(lines.pack_signal(signal), self.now)
        assert events == self.model.hear(signal, self.now)

    @rule(line=st.sampled_from([b"\n", b"later://1\n", b"//aaaa0001#1\n", b"\xff\n"]))
    def hear_what_means_nothing(self, line: bytes) -> None:
        assert self.session.receive_data(line, self.now) == []
        if self.model.is_open:
            self.model.heard_at = self.now

    @rule(ending=st.sampled_from([b"", b"tcp://x\n", b"bye://\n", b"x" * lines.MAX_LINE]))
    def break_off(self, ending: bytes) -> None:
        events = self.session.receive_data(ending, self.now)
        assert [type(event) for event in events] == [Lost] * self.model.is_open
        self.model.is_open = False

    @rule(number=numbers, visitor=visitors)
    def launch(self, number: int, visitor: str) -> None:
        self.session.launch(Kind.TCP, number, visitor)
        if self.model.is_open:
            query = f"?from={visitor}" if visitor else ""
            self.model.out.append(f"tcp://{number}{query}")

    @rule()
    def drain(self) -> None:
        self.session.drain()
        if self.model.is_open and not self.model.has_said_drain:
            self.model.has_said_drain = True
            self.model.out.append("drain://")

    @rule(reason=words)
    def bye(self, reason: str) -> None:
        self.session.bye(reason)
        if self.model.is_open:
            self.model.is_open = False
            self.model.out.append(f"bye://{reason}")

    @rule()
    def send(self) -> None:
        wanted = "".join(line + "\n" for line in self.model.out)
        assert self.session.data_to_send().decode() == wanted
        self.model.out.clear()

    @precondition(lambda self: not self.model.is_open)
    @rule(role=roles)
    def begin_again(self, role: Role) -> None:
        self.begin(role)

    @precondition(lambda self: hasattr(self, "session"))
    @invariant()
    def both_stand_or_have_fallen(self) -> None:
        assert self.session.is_open is self.model.is_open
        if self.session.is_open:
            assert self.session.next_tick() <= self.model.ticked_at + INTERVAL


def test_session_against_a_model() -> None:
    run_state_machine_as_test(
        AgainstModel, settings=settings(settings.default, stateful_step_count=40)
    )


# ------------------------------------------------------- two sessions and a wire between


class Pair(RuleBasedStateMachine):
    """A server and a client whose bytes arrive late and in pieces, but in time.

    Nobody is ever lost, and each hears what the other said, in its order.
    """

    dialect = Dialect.NATIVE

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.ends = {
            role: Session(role, self.dialect, now=0.0, interval=INTERVAL) for role in Role
        }
        self.under_way = dict.fromkeys(Role, b"")
        self.said: dict[Role, list[Event]] = {role: [] for role in Role}
        self.heard: dict[Role, list[Event]] = {role: [] for role in Role}
        self.launches = 0

    @rule(step=st.floats(0, 4))
    def wait(self, step: float) -> None:
        """At most four seconds under way, so a line is never older than the limit."""
        self.now += step
        for role, end in self.ends.items():
            if self.now >= end.next_tick():
                assert end.tick(self.now) == []
            self.deliver(role, 1 << 20)

    @rule(sender=roles, size=st.integers(1, 40))
    def deliver(self, sender: Role, size: int) -> None:
        self.under_way[sender] += self.ends[sender].data_to_send()
        piece = self.under_way[sender][:size]
        self.under_way[sender] = self.under_way[sender][size:]
        if piece:
            receiver = other(sender)
            self.heard[receiver] += self.ends[receiver].receive_data(piece, self.now)

    @rule(visitor=visitors, kind=st.sampled_from(Kind))
    def launch(self, visitor: str, kind: Kind) -> None:
        self.launches += 1
        if self.dialect is Dialect.NATIVE:
            self.ends[Role.SERVER].launch(kind, self.launches, visitor)
            self.said[Role.SERVER].append(Launch(kind, self.launches, visitor))
        else:
            self.ends[Role.SERVER].launch(kind, f"{self.launches:08x}", visitor)
            self.said[Role.SERVER].append(SeedLaunch(f"{self.launches:08x}", kind))

    @precondition(lambda self: self.dialect is Dialect.NATIVE)
    @rule(count=numbers)
    def ask(self, count: int) -> None:
        self.ends[Role.SERVER].send(Idle(count))
        self.said[Role.SERVER].append(Idle(count))

    @precondition(lambda self: self.dialect is Dialect.NATIVE)
    @rule(number=numbers, why=words)
    def fail(self, number: int, why: str) -> None:
        self.ends[Role.CLIENT].send(Fail(number, why))
        self.said[Role.CLIENT].append(Fail(number, why))

    @rule(role=roles)
    def drain(self, role: Role) -> None:
        self.ends[role].drain()
        if self.dialect is Dialect.NATIVE and Drain() not in self.said[role]:
            self.said[role].append(Drain())

    def teardown(self) -> None:
        if not hasattr(self, "ends"):
            return
        for role in Role:
            self.deliver(role, 1 << 20)
            assert self.heard[other(role)] == self.said[role]
        for role in Role:  # what the last round asked for: pongs
            self.deliver(role, 1 << 20)
        assert self.under_way == dict.fromkeys(Role, b"")
        if self.dialect is Dialect.SEED:
            assert self.ends[Role.CLIENT].data_to_send() == b"", "a seed client never writes"
        self.part()

    def part(self) -> None:
        self.ends[Role.SERVER].bye("stopped")
        self.heard[Role.CLIENT].clear()
        self.deliver(Role.SERVER, 1 << 20)
        if self.dialect is Dialect.NATIVE:
            assert self.heard[Role.CLIENT] == [Lost("the other side said bye: stopped", True)]
        else:
            assert self.ends[Role.CLIENT].is_open, "the seed dialect has no word for it"


def other(role: Role) -> Role:
    return Role.CLIENT if role is Role.SERVER else Role.SERVER


class SeedPair(Pair):
    """The same in the seed dialect."""

    dialect = Dialect.SEED


def test_two_native_ends_agree() -> None:
    run_state_machine_as_test(Pair, settings=settings(settings.default, stateful_step_count=30))


def test_two_seed_ends_agree() -> None:
    run_state_machine_as_test(
        SeedPair, settings=settings(settings.default, stateful_step_count=30)
    )


# ----------------------------------------------------------------------------- bounds


@patch.object(rules, "MAX_UNSENT", 8192)
@given(st.lists(st.sampled_from(["ping", "tick", "read", "launch"]), max_size=200))
def test_what_is_owed_is_bounded(turns: list[str]) -> None:
    """F27: a peer that never reads is given up, however it goes about it."""
    session = Session(Role.SERVER, Dialect.NATIVE, now=0.0, interval=INTERVAL)
    burst = b"ping://9007199254740991\n" * 40
    limit = 8192 + len(burst)
    for turn in turns:
        match turn:
            case "ping":
                session.receive_data(burst, 0.0)
            case "tick":
                session.tick(0.0)
            case "read":
                session.data_to_send()
            case _:  # a visitor's; how many there are is the server's limit
                session.launch(Kind.TCP, 1, "192.0.2.1:80")
                limit += len("tcp://1?from=192.0.2.1:80\n")
        assert len(session._out) <= limit


@given(st.lists(seed_signals, max_size=20), st.lists(steps, max_size=20))
def test_a_seed_server_never_speaks_of_more_than_launches(
    signals: list[SeedSignal], times: list[float]
) -> None:
    """Whatever comes from a seed client, which ought to be silent, is passed over."""
    session = Session(Role.SERVER, Dialect.SEED, now=0.0, interval=INTERVAL)
    now = 0.0
    for step in times:
        now += step
        assert session.tick(now) == []
        for signal in signals:
            assert session.receive_data(lines.pack_signal(signal), now) == []
    assert set(session.data_to_send()) <= set(b"\n")
