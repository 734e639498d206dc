"""A peer that never stops talking: what is read of it in a turn, and kept of it, is bounded."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from typing import NamedTuple

import pytest
from tests.kit.client_desk import paired, seeded
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both
from tests.kit.server_desk import serving
from tests.kit.timing import until, within
from tests.unit.tunnel.test_control_tls import Wire as TlsWire

from nodepass.client import refill as filling
from nodepass.engine import relays, running
from nodepass.engine.types import Newcomer
from nodepass.protocol.messages import Dialect, Drain, Fail, Idle, Kind, Launch, Pong
from nodepass.protocol.session import TALK_BURST, TALK_RATE, Event, Lost, Role, Session, State
from nodepass.tunnel.control import LINES_A_TURN, Control
from nodepass.tunnel.idle_links import Link

QUIET = 30.0
"""Report period, seconds, of a session that shall not beat again during its test."""


def session(role: Role, dialect: Dialect = Dialect.NATIVE) -> Session:
    return Session(role, dialect, now=0.0, interval=QUIET)


def losses(events: list[Event]) -> list[Lost]:
    return [event for event in events if isinstance(event, Lost)]


# --- the rules ---------------------------------------------------------------------------------

TALK = [
    (Role.SERVER, Dialect.NATIVE, b"x\n"),
    (Role.SERVER, Dialect.NATIVE, b"\n"),
    (Role.SERVER, Dialect.NATIVE, b"drain://\n"),
    (Role.SERVER, Dialect.NATIVE, b"ping://1\n"),
    (Role.SERVER, Dialect.NATIVE, b"pong://1\n"),
    (Role.SERVER, Dialect.NATIVE, b"fail://1?why=refused\n"),
    (Role.SERVER, Dialect.NATIVE, b"idle://1\n"),
    (Role.SERVER, Dialect.SEED, b"//5f3dd280#1\n"),
    (Role.CLIENT, Dialect.NATIVE, b"idle://1\n"),
    (Role.CLIENT, Dialect.NATIVE, b"drain://\n"),
    (Role.CLIENT, Dialect.NATIVE, b"fail://1\n"),
    (Role.CLIENT, Dialect.SEED, b"\n"),
    (Role.CLIENT, Dialect.SEED, b"remote://1\n"),
]


@pytest.mark.parametrize(("role", "dialect", "line"), TALK)
def test_c22_talk_beyond_the_rate_ends_the_session(
    role: Role, dialect: Dialect, line: bytes
) -> None:
    talker = session(role, dialect)
    assert not losses(talker.receive_data(line * TALK_BURST, 0.0))
    (lost,) = losses(talker.receive_data(line * 2, 0.0))
    assert lost.is_flood
    assert not lost.is_orderly
    assert "signals a second" in lost.reason
    assert talker.state is State.CLOSED


@pytest.mark.parametrize(("role", "dialect", "line"), TALK)
def test_c22_talk_within_the_rate_goes_on(role: Role, dialect: Dialect, line: bytes) -> None:
    talker = session(role, dialect)
    talker.receive_data(line * TALK_BURST, 0.0)
    for second in range(1, 100):
        assert not losses(talker.receive_data(line * int(TALK_RATE), float(second)))
        talker.data_to_send()


def test_c22_answers_are_owed_and_cost_nothing() -> None:
    """As many visitors as a server likes may meet a target that refuses."""
    server = session(Role.SERVER)
    for number in range(3 * TALK_BURST):
        server.launch(Kind.TCP, number, "")
        server.data_to_send()
    answers = b"".join(b"fail://%d?why=refused\n" % n for n in range(3 * TALK_BURST))
    events = server.receive_data(answers, 0.0)
    assert len(events) == 3 * TALK_BURST
    assert all(isinstance(event, Fail) for event in events)


def test_c22_launches_cost_nothing_by_themselves() -> None:
    client = session(Role.CLIENT)
    events = client.receive_data(b"tcp://1?from=192.0.2.1:1\n" * 3 * TALK_BURST, 0.0)
    assert events == [Launch(Kind.TCP, 1, "192.0.2.1:1")] * 3 * TALK_BURST


def test_c22_lines_wait_for_their_turn() -> None:
    client = session(Role.CLIENT)
    assert client.receive_data(b"idle://1\nidle://2\nidle://3\nid", 0.0, 2) == [Idle(1), Idle(2)]
    assert client.has_more
    assert client.read_on(0.0, 2) == [Idle(3)]
    assert not client.has_more
    assert client.receive_data(b"le://4\n", 0.0) == [Idle(4)]


# --- on a connection ---------------------------------------------------------------------------


class Clock:
    """Counts the turns of the loop."""

    def __init__(self) -> None:
        self.turns = 0
        self._is_over = False
        self._tick()

    def _tick(self) -> None:
        self.turns += 1
        if not self._is_over:
            asyncio.get_running_loop().call_soon(self._tick)

    def stop(self) -> None:
        self._is_over = True


@both
@pytest.mark.parametrize("way", ["plain", "tls", "head"])
async def test_c22_a_turn_of_the_loop_reads_few_lines(way: str) -> None:
    clock = Clock()
    heard: list[int] = []
    count = 20 * LINES_A_TURN
    lines = b"drain://\n" * count

    def hear(event: Event) -> None:
        if isinstance(event, Drain):
            heard.append(clock.turns)

    if way == "tls":
        async with TlsWire() as wire:
            wire.control._on_event = hear
            await wire.open()
            await wire.far.write(lines)
            await until(lambda: len(heard) == count, 5, "every line")
    else:
        near, far = tcp_pair()
        rules = Session(
            Role.SERVER, Dialect.NATIVE, now=asyncio.get_running_loop().time(), interval=QUIET
        )
        control = Control(rules, hear)
        await control.open(near, QUIET, lines if way == "head" else b"")
        if way == "plain":
            far.send(lines)
        await until(lambda: len(heard) == count, 5, "every line")
        control.close("stopped")
        await asyncio.sleep(0.01)
        far.close()
    clock.stop()
    most = max(heard.count(turn) for turn in set(heard))
    assert most <= 2 * LINES_A_TURN, "more signals in a turn than there is time for"


@both
async def test_c22_what_a_talker_sends_is_not_read_ahead() -> None:
    """Beyond one turn's worth the bytes stay in the kernel: TCP holds the peer up."""
    near, far = tcp_pair()
    loop = asyncio.get_running_loop()
    events: list[Event] = []
    rules = Session(Role.CLIENT, Dialect.NATIVE, now=loop.time(), interval=QUIET)
    control = Control(rules, events.append)
    most = 0

    def look(event: Event) -> None:
        nonlocal most
        most = max(most, len(rules._lines._data))
        events.append(event)

    control._on_event = look
    far.setblocking(False)
    await control.open(near, QUIET)
    line = b"tcp://1?from=192.0.2.1:1\n"
    sent = 0
    async with within(20):
        while sent < 4 << 20:
            try:
                sent += far.send((line * 1000)[sent % len(line) :])
            except BlockingIOError:
                pass
            except OSError:
                break
            await asyncio.sleep(0)
        await until(lambda: len(events) > 100 * LINES_A_TURN, 5, "many turns")
    control.close("stopped")
    await asyncio.sleep(0.01)
    far.close()
    assert most < 3 * 16384


@both
async def test_c22_the_end_comes_behind_the_lines_before_it() -> None:
    near, far = tcp_pair()
    loop = asyncio.get_running_loop()
    events: list[Event] = []
    rules = Session(Role.CLIENT, Dialect.NATIVE, now=loop.time(), interval=QUIET)
    control = Control(rules, events.append)
    await control.open(near, QUIET)
    far.send(b"idle://1\n" * 500 + b"bye://stopped\n")
    far.shutdown(socket.SHUT_WR)
    await until(lambda: losses(events), 5, "the end")
    assert len(events) == 501
    assert losses(events)[0].is_orderly
    await asyncio.sleep(0.01)
    far.close()
    control.close("stopped")


# --- on a server and a client ------------------------------------------------------------------


@both
async def test_c22_a_talker_costs_its_own_session_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nodepass.server")
    async with serving("log=info") as desk:
        talker, client = await desk.client("talker"), await desk.client("client")
        await desk.links(client, 1)
        await talker.say("\n".join(["drain://"] * 300))
        assert await client.control.read_line() == b"ping://1\n"
        await until(lambda: "client is stopping" in caplog.text, 5, "the drain")
        for _ in range(TALK_BURST // 1000 + 2):
            await talker.say("\n".join(["x"] * 1000))
        await until(lambda: desk.figures.sessions_open == 1, 5, "the end of the talker")
        visitor = await desk.visit()
        assert (await client.control.read_line()).startswith(b"tcp://1?")
        visitor.close()
    assert caplog.text.count("client is stopping") == 1, "one line however often it is said"
    assert "signals a second" in caplog.text


@both
async def test_c22_launches_of_nothing_are_answered_and_bounded() -> None:
    async with paired() as (server, desk, links):
        before = len(asyncio.all_tasks())
        await server.say("\n".join(f"tcp://{n}" for n in range(9000, 9000 + 1000)))
        answers: set[bytes] = set()
        async with within(10):
            while len(answers) < 1000:
                line = await server.control.read_line()
                if line.startswith(b"fail://"):
                    answers.add(line)
        assert len(asyncio.all_tasks()) <= before + 2, "no task for a launch of nothing"
        assert desk.figures.launches_failed == 1000
        number = next(iter(links))
        await server.say(f"tcp://{number}")
        await desk.at_target()
        for start in range(20_000, 20_000 + TALK_BURST, 512):
            await server.say("\n".join(f"tcp://{n}" for n in range(start, start + 512)))
        await until(lambda: desk.client._reconnect.session is None, 5, "the end of the flood")


@both
async def test_c23_launches_that_wait_for_their_link_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(filling, "MAX_CLAIMS", 8)
    async with seeded() as (server, desk):
        before = len(asyncio.all_tasks())
        await server.say("\n".join(f"//{n:08x}#1" for n in range(100)))
        await until(lambda: desk.figures.launches_failed == 92, 5, "the oldest given up")
        assert len(asyncio.all_tasks()) <= before + 8 + 2
        pairing = desk.client._reconnect.session
        assert pairing is not None
        assert list(pairing.refill._claims) == [f"{n:08x}" for n in range(92, 100)]


@both
async def test_c23_who_comes_in_time_is_given_his_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "MAX_CLAIMS", 2)
    async with seeded() as (_, desk):
        pairing = desk.client._reconnect.session
        assert pairing is not None
        claims = [
            asyncio.ensure_future(pairing.refill.claim(f"0000000{n}", 5.0)) for n in range(3)
        ]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(asyncio.wait([claims[0]]), 5)
        assert "too many others wait" in str(claims[0].exception())
        near, far = tcp_pair()
        pairing.refill._give(Link(near, "00000002"))
        assert (await claims[2]).sock is near
        claims[1].cancel()
        await asyncio.wait([claims[1]])
        near.close()
        far.close()


def test_c22_pongs_nobody_asked_for_are_no_round_trip() -> None:
    client = session(Role.CLIENT)
    client.receive_data(b"pong://77\n", 1.0)
    assert client.rtt is None
    assert Pong(77).number == 77


# --- the engine's news ---------------------------------------------------------------------------


class News(NamedTuple):
    """Stands for a Completion."""

    token: int


class Teller:
    """An engine with much to tell at once."""

    def __init__(self) -> None:
        self.told: list[News | Newcomer] = []
        self._bell = socket.socketpair()

    def fileno(self) -> int:
        return self._bell[0].fileno()

    def poll(self) -> list[News | Newcomer]:
        told, self.told = self.told, []
        return told

    def close(self) -> None:
        for sock in self._bell:
            sock.close()


class Ear:
    """Stands for what runs on the engine."""

    def __init__(self, heard: list[int]) -> None:
        self._heard = heard
        self.ending: News | None = None

    def finish(self) -> None:
        assert self.ending is not None
        self._heard.append(self.ending.token)


@both
async def test_c22_news_of_the_engine_leave_the_loop_to_others() -> None:
    """Thousands of ends at once are handed out in turns, in order, and so are newcomers."""
    engine = Teller()
    heard: list[int] = []
    here = running.RunningEngine(engine)  # type: ignore[arg-type]
    count = 10 * running.ENDS_A_TURN
    for token in range(count):
        here.open[token] = Ear(heard)  # type: ignore[assignment]
    met: list[int] = []
    gate = relays.Gate(engine, 0, asyncio.Future(), lambda _, one: met.append(one.token))  # type: ignore[arg-type]
    here.open[-1] = gate
    engine.told = [
        Newcomer(5, -1, "", 0),
        *map(News, range(count)),
        *(Newcomer(n, -1, "", 0) for n in range(500)),
    ]
    here.drain()
    turns = []
    while len(met) < 501 or len(heard) < count:
        turns.append((len(heard), len(met)))
        await asyncio.sleep(0)
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(turns)]
    assert all(ends <= running.ENDS_A_TURN for ends, _ in steps), steps
    assert all(new <= running.NEWCOMERS_A_TURN for _, new in steps), steps
    assert len(turns) >= 9
    assert heard == list(range(count))
    assert met == [5, *range(500)]
    here.leave_loop()
    engine.close()


@both
async def test_c22_the_last_news_are_handed_out_at_once() -> None:
    engine = Teller()
    heard: list[int] = []
    here = running.RunningEngine(engine)  # type: ignore[arg-type]
    for token in range(3 * running.ENDS_A_TURN):
        here.open[token] = Ear(heard)  # type: ignore[assignment]
    engine.told = [News(token) for token in range(3 * running.ENDS_A_TURN)]
    here.drain()
    here.leave_loop()
    here.forget()
    assert heard == list(range(3 * running.ENDS_A_TURN))
    await asyncio.sleep(0)
    assert len(heard) == 3 * running.ENDS_A_TURN
    engine.close()
