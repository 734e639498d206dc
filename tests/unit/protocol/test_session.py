"""The rules of a live pairing: health, drain, end, and the pauses between two tries."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nodepass.errors import LocalWireError
from nodepass.protocol import session as rules
from nodepass.protocol.backoff import Backoff
from nodepass.protocol.messages import (
    Dialect,
    Drain,
    Fail,
    Idle,
    Kind,
    Launch,
    Ping,
    Pong,
    SeedLaunch,
)
from nodepass.protocol.session import Drained, Event, Lost, Role, Session, State

START = 1000.0
"""A clock begins anywhere."""
INTERVAL = 5.0

Make = Callable[[], Session]


def native(role: Role = Role.CLIENT) -> Session:
    return Session(role, Dialect.NATIVE, now=START, interval=INTERVAL)


def seed(role: Role = Role.CLIENT) -> Session:
    return Session(role, Dialect.SEED, now=START, interval=INTERVAL)


def closed_by_bye() -> Session:
    session = native()
    session.bye("stopped")
    session.data_to_send()
    return session


def closed_by_peer() -> Session:
    session = native(Role.SERVER)
    session.receive_data(b"bye://stopped\n", START)
    return session


def lost(events: list[Event]) -> Lost:
    """Return the loss that ends a list of events."""
    assert events, "no event came"
    event = events[-1]
    assert isinstance(event, Lost), event
    return event


def run(session: Session, until: float, *, beat: float = 0.0) -> float:
    """Tick when due, the peer beating every `beat` seconds; return when it was lost."""
    next_beat = START if beat else float("inf")
    while (now := min(session.next_tick(), next_beat)) <= until:
        if now == next_beat:
            line = b"\n" if session.dialect is Dialect.SEED else b"pong://0\n"
            assert session.receive_data(line, now) == []
            next_beat += beat
        if session.tick(now):
            return now
        session.data_to_send()
    return float("inf")


# ------------------------------------------------------------------- what is heard


@pytest.mark.parametrize(
    ("role", "data", "events"),
    [
        (Role.CLIENT, b"tcp://1?from=x\n", [Launch(Kind.TCP, 1, "x")]),
        (Role.CLIENT, b"udp://2\n", [Launch(Kind.UDP, 2)]),
        (Role.CLIENT, b"idle://9\n", [Idle(9)]),
        (Role.CLIENT, b"idle://1\ntcp://1\n", [Idle(1), Launch(Kind.TCP, 1)]),
        (Role.SERVER, b"fail://1?why=refused\n", [Fail(1, "refused")]),
        (Role.SERVER, b"drain://\n", [Drain()]),
        (Role.CLIENT, b"drain://\ntcp://1\n", [Drain(), Launch(Kind.TCP, 1)]),
        (Role.CLIENT, b"drain://\ndrain://\n", [Drain(), Drain()]),
        # not for this role, from a later release, or without an event
        (Role.SERVER, b"tcp://1\nudp://1\nidle://1\n", []),
        (Role.CLIENT, b"fail://1\n", []),
        (Role.CLIENT, b"later://1\n\n//aaaa0001#1\n\xff\n", []),
        (Role.CLIENT, b"ping://1\npong://1\n", []),
    ],
)
def test_native_events(role: Role, data: bytes, events: list[Event]) -> None:
    assert native(role).receive_data(data, START) == events
    drop_by_drop = native(role)
    heard = [e for byte in data for e in drop_by_drop.receive_data(bytes([byte]), START)]
    assert heard == events


@pytest.mark.parametrize(
    ("role", "data", "events"),
    [
        (Role.CLIENT, b"//aaaa0001#1\n", [SeedLaunch("aaaa0001", Kind.TCP)]),
        (Role.CLIENT, b"\nudp://aaaa0001\n", [SeedLaunch("aaaa0001", Kind.UDP)]),
        (Role.CLIENT, b"ping://1\n//x#1\nremote://9102\ndrain://\nbye://x\n", []),
        (Role.SERVER, b"//aaaa0001#1\n\n\xff\n", []),
    ],
)
def test_seed_events(role: Role, data: bytes, events: list[Event]) -> None:
    session = seed(role)
    assert session.receive_data(data, START) == events
    assert session.is_open


def test_ping_is_answered() -> None:
    session = native()
    assert session.receive_data(b"ping://7\nping://9007199254740991\n", START) == []
    assert session.data_to_send() == b"pong://7\npong://9007199254740991\n"
    assert session.data_to_send() == b""


@pytest.mark.parametrize(
    ("data", "reason", "is_replaced"),
    [
        (b"", "closed the connection", False),
        (b"bye://stopped\n", "said bye: stopped", False),
        (b"bye://replaced\n", "said bye: replaced", True),
        (b"bye://\n", "broke the protocol: bye reason", False),
        (b"tcp://x\n", "broke the protocol: link number", False),
        (b"x" * 1024, "broke the protocol: a line longer than 1024", False),
    ],
)
@pytest.mark.parametrize("role", Role)
def test_the_end(role: Role, data: bytes, reason: str, is_replaced: bool) -> None:
    session = native(role)
    [event] = session.receive_data(data, START)
    assert isinstance(event, Lost)
    assert reason in event.reason
    assert event.is_replaced is is_replaced
    assert not session.is_open
    assert session.state is State.CLOSED


@pytest.mark.parametrize("end", [b"bye://stopped\n", b"tcp://x\n"])
def test_nothing_is_heard_behind_the_end(end: bytes) -> None:
    session = native()
    events = session.receive_data(b"tcp://1\n" + end + b"tcp://2\nping://1\n", START)
    assert events[:-1] == [Launch(Kind.TCP, 1)]
    assert isinstance(events[-1], Lost)
    assert session.data_to_send() == b""


def test_cut_takes_the_reason_of_the_socket() -> None:
    session = seed()
    assert session.cut("connection reset by peer", 1.0) == [Lost("connection reset by peer")]
    assert session.cut("again", 1.0) == []


@pytest.mark.parametrize("make", [closed_by_bye, closed_by_peer])
def test_closed_absorbs(make: Make) -> None:
    session = make()
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    session.on_output = count
    assert session.receive_data(b"tcp://1\nping://1\n", START) == []
    assert session.receive_data(b"", START) == []
    for seconds in (1e9, 1e9 + 9, 1e9 + 18):
        assert session.tick(START + seconds) == []
    assert session.cut("late", 1.0) == []
    session.send(Ping(1))
    session.launch(Kind.TCP, 1, "x")
    session.drain()
    session.bye("again")
    assert session.data_to_send() == b""
    assert calls == 0
    assert session.state is State.CLOSED


# --------------------------------------------------------------------- what is said


def test_output_is_announced() -> None:
    session = native()
    heard = []
    session.on_output = lambda: heard.append(session.data_to_send())
    session.send(Fail(1, "refused"))
    session.send(Pong(2))
    assert heard == [b"fail://1?why=refused\n", b"pong://2\n"]


def test_a_wrong_signal_of_ours_is_not_sent() -> None:
    session = native()
    with pytest.raises(LocalWireError):
        session.send(Ping(-1))
    with pytest.raises(LocalWireError):
        session.bye("not one word")
    assert session.data_to_send() == b""
    assert session.is_open


@pytest.mark.parametrize(
    ("make", "link", "kind", "line"),
    [
        (native, 5, Kind.TCP, b"tcp://5?from=192.0.2.1:80\n"),
        (native, 5, Kind.UDP, b"udp://5?from=192.0.2.1:80\n"),
        (seed, "aaaa0001", Kind.TCP, b"//aaaa0001#1\n"),
        (seed, "aaaa0001", Kind.UDP, b"//aaaa0001#2\n"),
    ],
)
def test_launch(make: Callable[[Role], Session], link: int | str, kind: Kind, line: bytes) -> None:
    session = make(Role.SERVER)
    session.launch(kind, link, "192.0.2.1:80")
    assert session.data_to_send() == line


def test_drain_is_said_once() -> None:
    session = native()
    session.drain()
    session.drain()
    assert session.data_to_send() == b"drain://\n"
    assert session.state is State.DRAINING
    assert session.is_open
    assert session.receive_data(b"tcp://1\ndrain://\n", START) == [Launch(Kind.TCP, 1), Drain()]
    session.bye("stopped")
    assert session.data_to_send() == b"bye://stopped\n"


def test_c16_answer_behind_the_drain() -> None:
    """What the server launched before it saw the drain has come by then."""
    session = native()
    session.tick(START)
    session.drain()
    session.await_drained()
    assert session.data_to_send() == b"ping://1\ndrain://\nping://2\n"
    assert session.receive_data(b"pong://1\n", START) == []
    heard = session.receive_data(b"tcp://1\npong://2\npong://2\n", START)
    assert heard == [Launch(Kind.TCP, 1), Drained()]
    session.bye("stopped")
    session.data_to_send()
    session.await_drained()
    assert session.data_to_send() == b""


def test_drain_is_said_also_after_theirs() -> None:
    """The other side must learn that we stop, whoever began."""
    session = native()
    assert session.receive_data(b"drain://\n", START) == [Drain()]
    assert session.state is State.DRAINING
    session.drain()
    session.drain()
    assert session.data_to_send() == b"drain://\n"


def test_a_seed_peer_hears_neither_drain_nor_bye() -> None:
    session = seed(Role.SERVER)
    states = []
    for step in (session.drain, lambda: session.bye("stopped")):
        step()
        states.append(session.state)
    assert states == [State.DRAINING, State.CLOSED]
    assert session.data_to_send() == b""


@pytest.mark.parametrize("old", State)
@pytest.mark.parametrize("new", State)
def test_moves(old: State, new: State) -> None:
    session = native()
    session.state = old
    if new in rules.MOVES[old]:
        session._move(new)
        assert session.state is new
    else:
        with pytest.raises(AssertionError, match="->"):
            session._move(new)
        assert session.state is old


def test_repr_names_what_it_is() -> None:
    assert repr(native()) == "<Session client native live>"
    assert repr(seed(Role.SERVER)) == "<Session server seed live>"


# --------------------------------------------------------------------------- health


@pytest.mark.parametrize("role", Role)
def test_native_beats_are_pings(role: Role) -> None:
    session = native(role)
    sent = []
    for step in range(4):
        now = session.next_tick()
        assert now == START + step * INTERVAL
        session.receive_data(b"later://\n", now)
        assert session.tick(now) == []
        assert session.tick(now) == [], "once a period"
        sent.append(session.data_to_send())
    assert sent == [b"ping://1\n", b"ping://2\n", b"ping://3\n", b"ping://4\n"]


def test_seed_beats_are_empty_lines_of_the_server() -> None:
    for role, line in ((Role.SERVER, b"\n"), (Role.CLIENT, b"")):
        session = seed(role)
        for step in range(3):
            assert session.next_tick() == START + step * INTERVAL
            assert session.tick(session.next_tick()) == []
            assert session.data_to_send() == line


def test_a_late_tick_beats_once() -> None:
    session = native()
    assert session.tick(START + 2 * INTERVAL) == []
    assert session.data_to_send() == b"ping://1\n"
    assert session.next_tick() == START + 3 * INTERVAL


@pytest.mark.parametrize("role", Role)
def test_silence_of_a_native_peer_is_a_loss(role: Role) -> None:
    session = native(role)
    assert run(session, START + 1000) == START + 3 * INTERVAL
    assert session.cut("late", 1.0) == []


def test_silence_is_named() -> None:
    session = native()
    for step in range(3):
        assert session.tick(START + step * INTERVAL) == []
    assert lost(session.tick(START + 3 * INTERVAL)).reason == "nothing heard for 15.0 s"


def test_any_byte_is_a_sign_of_life() -> None:
    session = native()
    for step in range(20):
        assert session.receive_data(b"x", START + step * 2 * INTERVAL) == []
        assert session.tick(START + step * 2 * INTERVAL) == []


def test_a_seed_client_may_be_silent_for_ever() -> None:
    assert run(seed(Role.SERVER), START + 1e5) == float("inf")


def test_a_seed_server_without_two_heartbeats_may_be_silent() -> None:
    session = seed()
    assert run(session, START + 1000) == float("inf")
    session.receive_data(b"\n", START + 1000)
    assert run(session, START + 3000) == float("inf")


@pytest.mark.parametrize(
    ("beat", "limit"), [(0.1, 15.0), (1.0, 15.0), (5.0, 15.0), (30.0, 90.0), (3600.0, 10800.0)]
)
def test_a_seed_server_has_a_period_of_its_own(beat: float, limit: float) -> None:
    """Its REPORT_INTERVAL is not ours; it is learnt from what comes."""
    session = seed()
    last = START
    for step in range(6):
        last = START + step * beat
        assert run(session, last) == float("inf")
        assert session.receive_data(b"\n", last) == []
    assert run(session, last + 10 * limit) == pytest.approx(last + limit)


def test_launches_between_heartbeats_say_nothing_of_the_period() -> None:
    """A busy server with a minute between its heartbeats may fall quiet for a minute."""
    session = seed()
    for second in range(121):
        now = START + second
        session.receive_data(b"\n" if second % 60 == 0 else b"//aaaa0001#1\n", now)
        assert session.tick(now) == []
    assert run(session, START + 180) == float("inf")
    assert session.receive_data(b"\n", START + 180) == []
    assert session.is_open


def test_heartbeats_in_one_piece_say_nothing_of_the_period() -> None:
    session = seed()
    assert session.receive_data(b"\n\n\n", START) == []
    assert run(session, START + 14.9, beat=14.0) == float("inf")


# ------------------------------------------------------------ when we ourselves stood still


def test_after_a_suspend_the_peer_gets_one_more_period() -> None:
    session = native()
    assert run(session, START + 20, beat=1.0) == float("inf")
    woken = START + 36_000
    assert session.tick(woken) == [], "what it sent meanwhile waits unread"
    assert session.next_tick() == woken + INTERVAL
    assert "nothing heard" in lost(session.tick(woken + INTERVAL)).reason


def test_after_a_suspend_the_peer_is_heard_first() -> None:
    session = native()
    woken = START + 36_000
    assert session.receive_data(b"ping://9\n", woken) == []
    assert session.tick(woken) == []
    assert run(session, woken + 1000) == woken + 3 * INTERVAL


@pytest.mark.parametrize("ticks_first", [False, True])
def test_a_suspend_does_not_count_as_the_servers_period(ticks_first: bool) -> None:
    """Else a dead server would be noticed hours later."""
    session = seed()
    assert run(session, START + 30, beat=5.0) == float("inf")
    woken = START + 36_000
    if ticks_first:
        assert session.tick(woken) == []
    assert session.receive_data(b"\n", woken + 1) == []
    assert session.tick(woken + 1) == []
    assert run(session, woken + 36_000) == pytest.approx(woken + 1 + 3 * INTERVAL)


@pytest.mark.parametrize("ticks_first", [False, True])
def test_a_suspend_does_not_count_as_a_round_trip(ticks_first: bool) -> None:
    session = native()
    session.receive_data(beat(session, START), START + 0.08)
    pong = beat(session, START + 5)
    woken = START + 36_000
    if ticks_first:
        assert session.tick(woken) == []
    assert session.receive_data(pong, woken + 1) == []
    assert session.rtt == pytest.approx(0.08)
    session.receive_data(beat(session, woken + 1), woken + 2)
    assert session.rtt is not None
    assert 0.08 < session.rtt < 1, "it is measured again"


def test_two_periods_late_is_a_suspend() -> None:
    session = native()
    for late in (0, 2.1, 3.0):
        assert session.tick(START + late * INTERVAL) == []
    assert "nothing heard" in lost(session.tick(START + 3.2 * INTERVAL)).reason


def test_a_little_late_is_no_suspend() -> None:
    session = native()
    session.tick(START)
    session.tick(START + 1.9 * INTERVAL)
    assert "nothing heard" in lost(session.tick(START + 3.5 * INTERVAL)).reason


# ------------------------------------------------------------------- a peer that never reads

VISITOR = "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535"
PINGS = b"ping://9007199254740991\n" * 40
"""What one read may bring: 960 bytes, and as many are owed for it."""


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """A small MAX_UNSENT: a megabyte of lines takes a second to write and to read."""
    monkeypatch.setattr(rules, "MAX_UNSENT", 8192)
    return rules.MAX_UNSENT


def test_the_real_limit_has_room_for_many_launches() -> None:
    assert 20_000 * len("tcp://20000?from=255.255.255.255:65535\n") <= rules.MAX_UNSENT


def test_a_peer_that_reads_no_signals_is_lost(limit: int) -> None:
    session = native(Role.SERVER)
    line = len(f"tcp://1?from={VISITOR}\n")
    for _ in range((limit - len("ping://1\n")) // line):
        session.launch(Kind.TCP, 1, VISITOR)
    assert session.tick(START) == [], "so many may wait"
    session.launch(Kind.TCP, 1, VISITOR)
    assert "reads no signals" in lost(session.tick(START)).reason
    assert not session.is_open
    assert session.data_to_send() == b"", "what it does not read is not kept for it"


def test_the_limit_itself_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    session = native(Role.SERVER)
    session.tick(START)
    for signal in (Ping(2), Fail(1, "limit")):
        session.send(signal)
    monkeypatch.setattr(rules, "MAX_UNSENT", len("ping://1\nping://2\nfail://1?why=limit\n"))
    assert session.tick(START) == []
    session.send(Drain())
    assert len(session.tick(START)) == 1


def test_a_peer_that_only_asks_cannot_fill_memory(limit: int) -> None:
    """F27: each ping is owed a pong; the tick that counts them may be an hour away."""
    session = Session(Role.SERVER, Dialect.NATIVE, now=START, interval=3600.0)
    events: list[Event] = []
    reads = 0
    while not events:
        events += session.receive_data(PINGS, START)
        reads += 1
        assert reads <= limit // len(PINGS) + 1
    assert "reads no signals" in lost(events).reason
    assert len(events) == 1
    assert session.receive_data(PINGS, START) == []
    assert len(session.data_to_send()) <= limit


def test_a_peer_that_asks_and_reads_is_served(limit: int) -> None:
    session = native(Role.SERVER)
    for _ in range(2 * limit // len(PINGS)):
        assert session.receive_data(PINGS, START) == []
        assert session.data_to_send() == PINGS.replace(b"ping", b"pong")


# ------------------------------------------------------------------------- round trip


def beat(session: Session, now: float) -> bytes:
    """Tick, and return the pong to the ping that goes out."""
    assert session.tick(now) == []
    return session.data_to_send().replace(b"ping", b"pong")


def test_round_trip_is_smoothed() -> None:
    session = native()
    assert session.rtt is None
    session.receive_data(beat(session, START), START + 0.08)
    assert session.rtt == pytest.approx(0.08)
    session.receive_data(beat(session, START + 5), START + 5.16)
    assert session.rtt == pytest.approx(0.09)


@pytest.mark.parametrize(
    "pong", [b"pong://0\n", b"pong://2\n", b"pong://9007199254740991\n", b"later://1\n"]
)
def test_the_wrong_pong_measures_nothing(pong: bytes) -> None:
    session = native()
    beat(session, START)
    assert session.receive_data(pong, START + 1) == []
    assert session.rtt is None


def test_a_pong_counts_once() -> None:
    session = native()
    assert session.receive_data(b"pong://0\n", START) == []
    pong = beat(session, START)
    session.receive_data(pong + pong, START + 0.1)
    session.receive_data(pong, START + 4)
    assert session.rtt == pytest.approx(0.1)


def test_a_round_trip_longer_than_the_period_is_known_too() -> None:
    session = native()
    under_way = []
    for step in range(6):
        now = START + step * INTERVAL
        under_way.append(beat(session, now))
        if step >= 2:
            session.receive_data(under_way.pop(0), now + 2)
    assert session.rtt == pytest.approx(12.0)


def test_a_seed_peer_has_no_round_trip() -> None:
    session = seed(Role.SERVER)
    session.tick(START)
    session.receive_data(b"pong://1\n", START + 1)
    assert session.rtt is None


# ----------------------------------------------------------------------------- Backoff


def test_pauses_double_up_to_the_ceiling() -> None:
    backoff = Backoff(5.0)
    pauses = [backoff.next_pause(0.5) for _ in range(10)]
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.5, 2.5, 2.5, 2.5])


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.999])
def test_pauses_are_drawn_in_full(fraction: float) -> None:
    """From zero: a thousand clients that lost one server do not come back in step."""
    assert Backoff(5.0).next_pause(fraction) == pytest.approx(0.1 * fraction)


def test_pauses_never_overflow() -> None:
    backoff = Backoff(5.0)
    assert [backoff.next_pause(0.5) for _ in range(5000)][-1] == 2.5


def test_a_ceiling_below_the_first_pause_holds() -> None:
    backoff = Backoff(0.01)
    assert [backoff.next_pause(0.5) for _ in range(2)] == [0.005, 0.005]


@pytest.mark.parametrize(("lasted", "pause"), [(0.0, 0.2), (4.99, 0.2), (5.0, 0.05), (9e9, 0.05)])
def test_only_a_stable_period_starts_over(lasted: float, pause: float) -> None:
    backoff = Backoff(5.0)
    for _ in range(2):
        backoff.next_pause(0.5)
    backoff.reset_after(lasted)
    assert backoff.next_pause(0.5) == pytest.approx(pause)
