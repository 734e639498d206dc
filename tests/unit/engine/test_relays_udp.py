"""relay: UDP sockets go to the engine, newcomers and results come back, and GSO is asked for."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections import deque
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import pytest
from tests.kit.datagram import UdpTarget, Visitor, echo
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both, engines
from tests.kit.stream import Stream
from tests.kit.timing import until, within
from tests.kit.udp_words import closed_target, frame, frames, secure_pair, udp_socket

from nodepass.config.environment import Settings
from nodepass.engine.operations import Work
from nodepass.engine.relays import Gate, Reason, Relays, UdpRelay, UdpResult
from nodepass.engine.twin import engine as twin
from nodepass.engine.types import PLAIN, FlowOptions, Newcomer, UdpCompletion, UdpCounts
from nodepass.errors import EngineClosed, EngineError
from nodepass.observe.stats import NOTHING, Datagrams

R = TypeVar("R")


class House:
    """One Relays, gates of its own, and the far ends of all that it was given."""

    def __init__(self, kind: str, **settings: object) -> None:
        self.relays = Relays(Settings(threads=1, engine=kind, **settings))  # type: ignore[arg-type]
        self.newcomers: deque[Newcomer] = deque()
        self._ends: list[socket.socket | Visitor | UdpTarget] = []

    def meet(self, gate: Gate, newcomer: Newcomer) -> None:
        self.newcomers.append(newcomer)

    def keep(self, sock: socket.socket) -> socket.socket:
        self._ends.append(sock)
        return sock

    def serve(self, *, has_tls: bool = False) -> tuple[Gate, Visitor]:
        """Open a gate, and let somebody come to it who has said nothing yet."""
        sock = self.keep(udp_socket())
        port = sock.getsockname()[1]
        gate = self.relays.serve(sock, self.meet, has_tls=has_tls)
        return gate, self.visitor(port)

    def visitor(self, port: int) -> Visitor:
        visitor = Visitor(port)
        self._ends.append(visitor)
        return visitor

    def target(self) -> UdpTarget:
        target = UdpTarget(echo)
        self._ends.append(target)
        return target

    def connected(self, target: UdpTarget) -> socket.socket:
        sock = self.keep(udp_socket())
        sock.connect(("127.0.0.1", target.port))
        return sock

    def link(self) -> tuple[Stream, socket.socket]:
        """Return the far and the near end of a link."""
        far, near = tcp_pair()
        self.keep(far)
        self.keep(near)
        return Stream(far), near

    async def newcomer(self) -> Newcomer:
        await until(lambda: self.newcomers, 5, "a newcomer")
        return self.newcomers.popleft()

    async def bound(self, *, idle: float = 0.0) -> tuple[Gate, Visitor, UdpRelay, Stream]:
        """Open a gate and serve somebody whose first word is on the link."""
        gate, visitor = self.serve()
        visitor.send(b"first")
        far, near = self.link()
        relay = self.relays.bind(gate, await self.newcomer(), near, idle=idle)
        async with within(5):
            assert await far.read_exactly(7) == frame(b"first")
        return gate, visitor, relay, far

    async def __aenter__(self) -> House:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.relays.close()
        for end in self._ends:
            end.close()


async def ended(work: Work[R, Any]) -> R:
    async with within(5):
        return await work.result


# --- gates and their visitors ------------------------------------------------------------------


@both
@engines
async def test_newcomer_is_told_and_its_datagrams_go_both_ways(kind: str) -> None:
    async with House(kind) as house:
        gate, visitor = house.serve()
        for data in (b"one", b"", b"three"):
            visitor.send(data)
        newcomer = await house.newcomer()
        assert (newcomer.host, newcomer.port) == ("127.0.0.1", visitor.port)
        assert newcomer.gate == gate.token
        far, near = house.link()
        relay = house.relays.bind(gate, newcomer, near, head=frame(b"early"), idle=0.0)
        assert near.fileno() == -1, "the engine's now"
        assert len(house.relays) == 1, "a gate is no relay"
        async with within(5):
            said = frames(b"one", b"", b"three")
            assert await far.read_exactly(len(said)) == said
            assert await visitor.read() == b"early"
            await far.write(frame(b"answer"))
            assert await visitor.read() == b"answer"
        await until(lambda: relay.live() == (8, 11), 5, "the live count")
        far.close()
        result = await ended(relay)
        counts = Datagrams(up=3, down=2, bytes_up=8, bytes_down=11)
        assert result == UdpResult(counts, Reason.FINISHED, 0, 0)
        assert relay.datagrams() == counts
        assert gate.datagrams() == NOTHING
        assert len(house.relays) == 0
        assert house.relays.statistics().gates_open == 1


@both
@engines
async def test_newcomer_that_is_turned_away_is_heard_no_more(kind: str) -> None:
    async with House(kind) as house:
        gate, visitor = house.serve()
        visitor.send(b"one")
        gate.turn_away(await house.newcomer())
        await until(lambda: gate.datagrams().no_link == 1, 5, "the parked one to be dropped")
        visitor.send(b"two")
        await until(lambda: gate.datagrams().no_link == 2, 5, "the next one to be dropped")
        assert not house.newcomers
        gate.abort()
        result = await ended(gate)
        assert result == UdpResult(Datagrams(no_link=2), Reason.ABORTED, 0, 0)
        assert not result.is_clean


@both
@engines
async def test_gate_that_is_shut_still_serves_whom_it_knows(kind: str) -> None:
    async with House(kind) as house:
        gate, visitor, _, far = await house.bound()
        gate.shut()
        late = house.visitor(visitor.sock.getpeername()[1])
        late.send(b"too late")
        await until(lambda: gate.datagrams().no_link == 1, 5, "the late one to be dropped")
        visitor.send(b"again")
        async with within(5):
            assert await far.read_exactly(7) == frame(b"again")
        assert not house.newcomers


@both
@engines
async def test_abort_of_a_gate_ends_all_that_came_through_it(kind: str) -> None:
    async with House(kind) as house:
        gate, visitor, relay, far = await house.bound()
        port = visitor.sock.getpeername()[1]
        house.visitor(port).send(b"waits")
        await house.newcomer()
        gate.abort()
        result = await ended(gate)
        assert (result.reason, result.describe()) == (Reason.ABORTED, "aborted")
        assert result.datagrams.no_link == 1
        assert (await ended(relay)).reason is Reason.ABORTED
        async with within(5):
            assert await far.is_reset()
        udp_socket(port=port).close()  # the address is free again at once


@both
@engines
async def test_abort_of_a_relay_resets_its_link_alone(kind: str) -> None:
    async with House(kind) as house:
        gate, _, relay, far = await house.bound()
        relay.abort()
        assert (await ended(relay)).reason is Reason.ABORTED
        async with within(5):
            assert await far.is_reset()
        assert not gate.result.done()


@both
@engines
async def test_silence_beyond_the_limit_ends_a_relay_politely(kind: str) -> None:
    async with House(kind) as house:
        _, _, relay, far = await house.bound()
        relay.limit(0.05)
        result = await ended(relay)
        assert (result.reason, result.is_clean) == (Reason.IDLE, True)
        async with within(5):
            assert not await far.is_reset()


@both
@engines
async def test_raw_bind_is_one_datagram_and_one_answer(kind: str) -> None:
    async with House(kind) as house:
        gate, visitor = house.serve()
        visitor.send(b"question")
        far, near = house.link()
        relay = house.relays.bind(gate, await house.newcomer(), near, idle=5.0, is_raw=True)
        async with within(5):
            assert await far.read_exactly(8) == b"question"
            await far.write(b"answer")
            far.close()
            assert await visitor.read() == b"answer"
        assert (await ended(relay)).reason is Reason.FINISHED


# --- targets -----------------------------------------------------------------------------------


@both
@engines
async def test_dialled_target_gets_datagrams_and_answers(kind: str) -> None:
    async with House(kind) as house:
        target = house.target()
        far, near = house.link()
        sock = house.connected(target)
        relay = house.relays.dial(near, sock, head=frame(b"early"), idle=0.0)
        assert (near.fileno(), sock.fileno()) == (-1, -1), "the engine's now"
        async with within(5):
            await far.write(frame(b"late"))
            said = frames(b"early", b"late")
            assert await far.read_exactly(len(said)) == said
        far.close()
        counts = Datagrams(up=2, down=2, bytes_up=9, bytes_down=9)
        assert await ended(relay) == UdpResult(counts, Reason.FINISHED, 0, 0)


@both
@engines
async def test_raw_dial_is_one_datagram_and_one_answer(kind: str) -> None:
    async with House(kind) as house:
        far, near = house.link()
        relay = house.relays.dial(near, house.connected(house.target()), idle=5.0, is_raw=True)
        async with within(5):
            await far.write(b"question")
            assert await far.read_all() == b"question", "and a polite end"
        assert (await ended(relay)).reason is Reason.FINISHED


@both
@engines
async def test_longest_datagram_is_that_of_the_settings(kind: str) -> None:
    async with House(kind, udp_data_buf_size=100) as house:
        gate, visitor = house.serve()
        visitor.send(bytes(101))
        visitor.send(bytes(100))
        far, near = house.link()
        house.relays.bind(gate, await house.newcomer(), near, idle=0.0)
        async with within(5):
            assert await far.read_exactly(102) == frame(bytes(100))
        assert gate.datagrams() == Datagrams(too_large=1)
        target = UdpTarget(lambda this, data, address: this.send(bytes(int(data)), address))
        house._ends.append(target)
        far, near = house.link()
        relay = house.relays.dial(near, house.connected(target), idle=0.0)
        async with within(5):
            await far.write(frames(b"101", b"100"))
            assert await far.read_exactly(102) == frame(bytes(100))
        assert relay.datagrams().too_large == 1


# --- inside TLS --------------------------------------------------------------------------------


async def carries_inside_tls(house: House) -> tuple[UdpRelay, UdpRelay]:
    """Both halves of a tunnel on one Relays, TLS between them."""
    gate, visitor = house.serve(has_tls=True)
    one, two = tcp_pair()
    server, client = secure_pair()
    visitor.send(b"secret")
    newcomer = await house.newcomer()
    bound = house.relays.bind(gate, newcomer, house.keep(one), tls=server, idle=0.0)
    target = house.connected(house.target())
    dialled = house.relays.dial(house.keep(two), target, tls=client, idle=0.0)
    assert await visitor.read() == b"secret"
    assert await visitor.ask(b"more") == b"more"
    return bound, dialled


@both
@engines
async def test_link_may_speak_tls(kind: str) -> None:
    async with House(kind) as house:
        bound, dialled = await carries_inside_tls(house)
        dialled.abort()
        assert (await ended(dialled)).reason is Reason.ABORTED
        assert (await ended(bound)).up == 10


def moved_engine() -> ModuleType:
    """A native engine that cannot do TLS, and must not be given any."""

    class Engine(twin.Engine):
        def udp_serve(self, *_: object, **__: object) -> int:
            raise AssertionError("a gate with TLS was opened on an engine that cannot")

    module = ModuleType("nodepass._fastcopy")
    vars(module).update(
        ABI=twin.ABI,
        Engine=Engine,
        Newcomer=twin.Newcomer,
        tls_trouble=lambda: "SSL_read is not where it was",
    )
    return module


@both
async def test_gate_with_tls_is_opened_where_its_tls_can_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "nodepass._fastcopy", moved_engine())
    async with House("native") as house:
        far, near = house.link()
        plain = house.relays.dial(near, house.connected(house.target()), idle=0.0)
        await far.write(frame(b"open"))
        async with within(5):
            assert await far.read_exactly(6) == frame(b"open")
        bound, dialled = await carries_inside_tls(house)
        assert len(house.relays) == 3
        statistics = house.relays.statistics()
        assert (statistics.flows_open, statistics.gates_open) == (1, 0), "plain ones stay behind"
        assert await house.relays.close()
        for relay in (plain, bound, dialled):
            assert (await relay.result).reason is Reason.ABORTED


# --- who owns what -----------------------------------------------------------------------------


@both
@engines
async def test_serve_moves_ownership_on_success_only(kind: str) -> None:
    async with House(kind) as house:
        stream, _ = house.link()
        with pytest.raises(EngineError):
            house.relays.serve(stream.sock, house.meet, has_tls=False)
        assert stream.sock.fileno() >= 0, "still ours"
        await house.relays.close()
        sock = house.keep(udp_socket())
        with pytest.raises(EngineClosed):
            house.relays.serve(sock, house.meet, has_tls=False)
        assert sock.fileno() >= 0


@both
@engines
async def test_bind_moves_ownership_on_success_only(kind: str) -> None:
    async with House(kind) as house:
        gate, visitor = house.serve()
        visitor.send(b"x")
        newcomer = await house.newcomer()
        far, near = house.link()
        with pytest.raises(EngineError) as caught:
            house.relays.bind(gate, newcomer._replace(token=12345), near, idle=0.0)
        assert caught.value.errno == errno.ENOENT
        assert near.fileno() >= 0, "still ours"
        house.relays.bind(gate, newcomer, near, idle=0.0)
        async with within(5):
            assert await far.read_exactly(3) == frame(b"x"), "and still good"


@both
@engines
async def test_dial_moves_ownership_on_success_only(kind: str) -> None:
    async with House(kind) as house:
        _, near = house.link()
        sock = house.keep(closed_target())
        with pytest.raises(EngineError):
            house.relays.dial(sock, near, idle=0.0)
        assert min(near.fileno(), sock.fileno()) >= 0, "still ours"
        assert len(house.relays) == 0


# --- closing -----------------------------------------------------------------------------------


@both
@engines
async def test_close_ends_gates_and_relays(kind: str) -> None:
    async with House(kind) as house:
        gate, visitor, relay, far = await house.bound()
        house.visitor(visitor.sock.getpeername()[1]).send(b"waits")
        await house.newcomer()
        dialled = house.relays.dial(house.link()[1], house.connected(house.target()), idle=0.0)
        assert await house.relays.close()
        for work in (gate, relay, dialled):
            assert work.result.done()
            assert (await work.result).reason is Reason.ABORTED
        assert gate.datagrams().no_link == 1
        assert relay.live() == (5, 0)
        relay.limit(1.0)
        gate.shut()
        async with within(5):
            assert await far.is_reset()


@both
@engines
@pytest.mark.parametrize("order", ["relieve", "turn_away"])
async def test_newcomer_that_nobody_has_heard_of_at_the_close(kind: str, order: str) -> None:
    """Whatever its owner does about it, the close goes on and all ends are told."""
    async with House(kind) as house:
        sock = house.keep(udp_socket())
        visitor = house.visitor(sock.getsockname()[1])

        def meet(gate: Gate, newcomer: Newcomer) -> None:
            if order == "relieve":
                gate.relieve()
            else:
                gate.turn_away(newcomer)

        gate = house.relays.serve(sock, meet, has_tls=False)
        house.relays._running.leave_loop()  # nobody polls any more
        visitor.send(b"x")
        await until(lambda: house.relays.statistics().peers_waiting == 1, 5, "the newcomer")
        assert await house.relays.close()
        assert gate.result.done()


class Stuck:
    """An engine that does not end, and tells what the test wants."""

    def __init__(self, *_: object, **__: object) -> None:
        self._near, self._far = socket.socketpair()
        self._given: list[int] = []
        self.news: list[tuple[object, ...]] = []

    def fileno(self) -> int:
        return self._near.fileno()

    def udp_serve(self, *fds: int, **__: object) -> int:
        self._given += fds
        return len(self._given)

    udp_dial = udp_serve

    def poll(self) -> list[tuple[object, ...]]:
        news, self.news = self.news, []
        return news

    def close(self, deadline: float) -> bool:
        self._near.close()
        self._far.close()
        for fd in self._given:
            os.close(fd)
        return False


async def test_news_of_what_is_no_more_and_of_what_never_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("nodepass._fastcopy")
    vars(module).update(ABI=twin.ABI, Engine=Stuck, Newcomer=twin.Newcomer)
    monkeypatch.setitem(sys.modules, "nodepass._fastcopy", module)
    async with House("native") as house:
        gate = house.relays.serve(house.keep(udp_socket()), house.meet, has_tls=False)
        relay = house.relays.dial(house.link()[1], house.keep(udp_socket()), idle=0.0)
        engine = house.relays._running.engine
        assert isinstance(engine, Stuck)
        counts = UdpCounts(*[0] * 10)
        engine.news = [
            Newcomer(9, relay.token, "10.0.0.1", 1),
            Newcomer(9, 77, "10.0.0.1", 1),
            UdpCompletion(77, counts, 0, 0, 0, 0),
            Newcomer(9, gate.token, "10.0.0.1", 2),
        ]
        house.relays.drain()
        assert [newcomer.port for newcomer in house.newcomers] == [2]
        assert not await house.relays.close(0.1)
        assert gate.result.cancelled()
        assert relay.result.cancelled()
        assert (relay.live(), gate.datagrams()) == ((0, 0), NOTHING)


# --- GSO ---------------------------------------------------------------------------------------


def running_on(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the twin was asked of GSO, call by call."""
    made: list[bool] = []

    class Watched(twin.Engine):
        def udp_serve(self, fd: int, *, waiting: int = 512, options: FlowOptions = PLAIN) -> int:
            made.append(options.gso)
            return super().udp_serve(fd, waiting=waiting, options=options)

        def udp_dial(self, *fds: int, options: FlowOptions = PLAIN, **more: object) -> int:
            made.append(options.gso)
            return super().udp_dial(*fds, options=options, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(twin, "Engine", Watched)
    return made


@pytest.mark.parametrize(
    ("release", "is_sound"),
    [
        ("6.18.44-generic", True),
        ("6.18", True),
        ("7.0.0", False),
        ("7.0.0-rc3+", False),
        ("7.0", False),
        ("7.1", False),
        ("7.1.4-arch1", False),
        ("7.1.5", True),
        ("7.2", True),
        ("10.0.1", True),
        ("weird", True),
        ("", True),
    ],
)
@pytest.mark.parametrize("wish", ["1", "0"])
async def test_gso_is_used_where_it_is_asked_for_and_sound(
    release: str,
    is_sound: bool,
    wish: str,
    asked: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    running_on(monkeypatch, release)
    settings = Settings.from_environment({"NODEPASS_UDP_GSO": wish})
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with House("python", udp_gso=settings.udp_gso) as house:
            house.serve()
            house.relays.dial(house.link()[1], house.connected(house.target()), idle=0.0)
    is_used = wish == "1" and is_sound
    assert asked == [is_used, is_used]
    told = [r.getMessage() for r in caplog.records if "NODEPASS_UDP_GSO" in r.getMessage()]
    assert len(told) == (wish == "1" and not is_sound)
    assert all(release in line for line in told)


async def test_gso_where_nobody_names_the_kernel(
    asked: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "uname")
    async with House("python", udp_gso=True) as house:
        house.serve()
    assert asked == [True]


@both
@engines
async def test_equal_datagrams_arrive_whole_with_gso(kind: str) -> None:
    """Wherever the kernel cannot do it, or must not, they are sent one by one."""
    async with House(kind, udp_gso=True) as house:
        _, visitor, _, far = await house.bound()
        bodies = [bytes([number]) * 1000 for number in range(40)]
        async with within(5):
            await far.write(frames(*bodies))
            assert [await visitor.read() for _ in bodies] == bodies
