"""UdpTarget: which sessions have lost their target, and where they go on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field

import pytest
from tests.kit.timing import within

from nodepass.client import udp_target
from nodepass.client.udp_target import UdpTarget
from nodepass.engine.relays import Reason, UdpResult
from nodepass.errors import DialError, EngineError
from nodepass.net import udp
from nodepass.observe.log import Log
from nodepass.observe.stats import Datagrams

HERE = ("127.0.0.1", 9)
THERE = ("127.0.0.2", 9)


class Session:
    """Stands for a UdpRelay."""

    def __init__(self) -> None:
        self.result: asyncio.Future[UdpResult] = asyncio.get_running_loop().create_future()
        self.counts = Datagrams()
        self.got: list[tuple[str, int]] = []
        """Where the sockets were connected to that it has been given."""
        self.fault: EngineError | None = None
        self.is_over = False

    def datagrams(self) -> Datagrams:
        return self.counts

    def add(self, **more: int) -> None:
        grown = {name: getattr(self.counts, name) + count for name, count in more.items()}
        self.counts = self.counts._replace(**grown)

    def retarget(self, sock: socket.socket) -> bool:
        if self.fault is not None:
            raise self.fault
        if self.is_over:
            return False
        self.got.append(sock.getpeername())
        sock.close()
        return True

    def end(self, code: int = 0) -> None:
        if not self.result.done():
            self.result.set_result(UdpResult(self.counts, Reason.RESET, 2, code))


@dataclass
class World:
    """A target with its lookups, and the sessions that go there."""

    targets: UdpTarget
    addresses: list[tuple[str, int]]
    sessions: list[Session] = field(default_factory=list)
    looks: int = 0
    failure: DialError | None = None

    def session(self, source: str = "127.0.0.1") -> Session:
        made = Session()
        self.sessions.append(made)
        self.targets.watch(made, HERE, source)  # type: ignore[arg-type]
        return made

    async def rounds(self, count: int = 3) -> None:
        """Let every session be looked at so many times at least."""
        await asyncio.sleep(0.02 * count + 0.02)


@contextlib.asynccontextmanager
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Yield a world in which a second takes 20 ms."""
    for name in ("PERIOD", "SILENCE", "DESERTION", "LONGEST_PAUSE", "ONE_WAY_PAUSE"):
        monkeypatch.setattr(udp_target, name, getattr(udp_target, name) / 50)
    tasks: set[asyncio.Task[None]] = set()

    def spawn(work: Coroutine[object, object, None], _name: str) -> None:
        tasks.add(asyncio.create_task(work))

    here = World(UdpTarget("svc.test", 9, 1.0, Log("client", "debug"), spawn), [HERE])

    async def look_up(*_: object) -> list[tuple[int, tuple[str, int]]]:
        here.looks += 1
        if here.failure is not None:
            raise here.failure
        return [(socket.AF_INET, address) for address in here.addresses]

    monkeypatch.setattr(udp, "look_up", look_up)
    try:
        yield here
    finally:
        here.targets.close()
        for session in here.sessions:
            session.end()
        await asyncio.gather(*tasks)


async def talk(here: World, session: Session, rounds: int, *, answers: bool) -> None:
    """Let a visitor ask in each round."""
    for _ in range(rounds):
        session.add(up=1, down=1 if answers else 0)
        await here.rounds(1)


async def test_c1_a_session_whose_target_has_moved_follows_its_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nodepass"):
        async with world(monkeypatch) as here:
            session = here.session()
            await talk(here, session, 5, answers=True)
            assert here.looks == 0, "what is answered needs no look"
            here.addresses = [THERE]
            async with within(5):
                while not session.got:
                    await talk(here, session, 1, answers=False)
            assert session.got == [THERE]
            await talk(here, session, 20, answers=True)
            assert session.got == [THERE]
    assert caplog.text.count("UDP sessions go on with their target elsewhere") == 1
    assert "was=127.0.0.1" in caplog.text
    assert "now=127.0.0.2" in caplog.text


async def test_c1_a_target_that_merely_says_nothing_keeps_its_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as here:
        session = here.session()
        await talk(here, session, 3, answers=True)
        await talk(here, session, 40, answers=False)
        assert here.looks >= 2, "somebody has looked"
        assert session.got == []


async def test_c1_another_address_is_tried_when_one_has_long_been_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as here:
        here.addresses = [HERE, THERE]
        session = here.session()
        await talk(here, session, 3, answers=True)
        async with within(5):
            while not session.got:
                await talk(here, session, 1, answers=False)
        assert session.got == [THERE]
        sock, address = await here.targets.dial()
        sock.close()
        assert address == THERE, "the next session need not find out by itself"


async def test_c1_a_session_that_asks_nothing_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as here:
        session = here.session()
        await talk(here, session, 3, answers=True)
        here.addresses = [THERE]
        await here.rounds(30)
        assert (here.looks, session.got) == (0, [])


async def test_c1_what_the_kernel_will_not_send_gets_another_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as here:
        session = here.session()
        async with within(5):
            while not session.got:
                session.add(unsent=1)
                await here.rounds(1)
        assert session.got == [HERE]


async def test_c1_another_address_of_ours_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as here:
        session = here.session(source="192.0.2.1")  # it was ours once
        await talk(here, session, 3, answers=True)
        async with within(5):
            while not session.got:
                await talk(here, session, 1, answers=False)
        assert session.got == [HERE]
        await talk(here, session, 30, answers=False)
        assert session.got == [HERE], "once is enough"


async def test_c1_a_one_way_stream_follows_its_name_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as here:
        session = here.session()
        here.addresses = [THERE]
        async with within(5):
            while here.looks < 1:
                await talk(here, session, 1, answers=False)
        assert session.got == [], "one look is too little: a pool may answer in parts"
        async with within(5):
            while not session.got:
                await talk(here, session, 1, answers=False)
        assert session.got == [THERE]


async def test_c1_one_lookup_serves_many_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as here:
        many = [here.session() for _ in range(300)]
        for session in many:
            session.add(up=1, down=1)
        await here.rounds(6)
        here.addresses = [THERE]
        async with within(10):
            while not all(session.got for session in many):
                for session in many:
                    session.add(up=1)
                await here.rounds(1)
        assert all(session.got == [THERE] for session in many)
        assert here.looks < 60


async def test_c1_a_name_that_is_gone_is_told_and_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with world(monkeypatch) as here:
            session = here.session()
            await talk(here, session, 3, answers=True)
            here.failure = DialError("udp svc.test:9", errno.EHOSTUNREACH, 0, "no such name")
            async with within(5):
                while here.looks < 2:
                    await talk(here, session, 1, answers=False)
            here.failure, here.addresses = None, [THERE]
            async with within(5):
                while not session.got:
                    await talk(here, session, 1, answers=False)
    assert "the target cannot be found" in caplog.text


async def test_c1_the_end_of_a_session_may_come_at_any_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world(monkeypatch) as here:
        over, full, fine = here.session(), here.session(), here.session()
        over.is_over = True
        full.fault = EngineError("udp_retarget", errno.ENOBUFS)
        for session in here.sessions:
            session.add(up=1, down=1)
        await here.rounds(3)
        here.addresses = [THERE]
        async with within(5):
            while not fine.got:
                for session in here.sessions:
                    session.add(up=1)
                await here.rounds(1)
        over.end()
        await here.rounds(3)
        assert (over.got, full.got, fine.got) == ([], [], [THERE])


async def test_c1_who_refused_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(monkeypatch) as here:
        here.addresses = [HERE, THERE]
        here.session().end(errno.ECONNREFUSED)
        await asyncio.sleep(0)
        sock, address = await here.targets.dial()
        sock.close()
        assert address == THERE
