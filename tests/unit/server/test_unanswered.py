"""silence and dataport: no visitor waits on a launch that a Go client cannot have understood."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Coroutine

import pytest
from tests.kit.engines import both
from tests.kit.peer import SeedClient
from tests.kit.server_desk import Desk, is_reset, serving
from tests.kit.stream import Stream, connect
from tests.kit.timing import until, within

from nodepass.server import unanswered

BOOKKEEPING = 0.02
"""Seconds that a client takes from reading an id to storing it."""
BURST = 30
STOCK = 8


class SlowClient:
    """As the Go program: ids are read one after another and stored a while later; a launch of an
    id that is not stored is forgotten without a word."""

    def __init__(self, peer: SeedClient) -> None:
        self._peer = peer
        self._stored: dict[str, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.forgotten = 0

    def run(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def __aenter__(self) -> SlowClient:
        self.run(self._refill())
        self.run(self._obey())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _refill(self) -> None:
        while True:
            if len(self._stored) >= STOCK:
                await asyncio.sleep(0.001)
                continue
            name = await self._peer.dial()
            await asyncio.sleep(BOOKKEEPING)
            self._stored[name] = self._peer.links.pop(name)

    async def _obey(self) -> None:
        while True:
            signal = await self._peer.signal()
            link = self._stored.pop(signal[2:10], None)
            if link is None:
                self.forgotten += 1
            else:
                self.run(self._answer(link))

    async def _answer(self, link: Stream) -> None:
        """Read to the end and answer with a digest, as a target would."""
        said = b""
        while data := await link.read(65536):
            said += data
        await link.write(hashlib.sha256(said).digest())
        link.close()


async def ask(desk: Desk, number: int) -> None:
    body = b"%d" % number * 1000
    async with await connect(desk.target) as visitor:
        await visitor.write(body)
        visitor.finish()
        answer = b""
        while data := await visitor.read(100):
            answer += data
        assert answer == hashlib.sha256(body).digest()


@both
async def test_c11_no_visitor_of_a_burst_is_lost() -> None:
    async with serving("log=debug", min_pool_capacity=STOCK) as desk:
        async with SlowClient(await desk.seed()) as client:
            for _ in range(3):
                await until(lambda: desk.figures.links_idle >= STOCK // 2, 10, "idle links")
                async with within(15):
                    await asyncio.gather(*(ask(desk, number) for number in range(BURST)))
            assert client.forgotten == 0
        assert desk.figures.visitors_refused == 0


@both
async def test_c11_a_link_is_nobodys_before_its_id_is_known() -> None:
    """A client that has not dialled yet gets no launch of what it is just being told."""
    async with serving() as desk:
        client = await desk.seed()
        visitor = await desk.visit()
        await visitor.write(b"x")
        name = await client.dial()
        assert desk.figures.links_idle == 0
        assert desk.figures.visitors_waiting == 1, "not launched in the turn that sends the id"
        link = await client.launched()
        assert await link.read_exactly(1) == b"x"
        assert name


@both
async def test_c11_a_client_may_leave_before_its_link_is_ripe() -> None:
    async with serving() as desk:
        client = await desk.seed()
        name = await client.dial()
        client.links[name].close()
        await until(lambda: desk.figures.links_lost == 1, 5, "the loss")
        assert desk.figures.links_idle == 0


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unanswered, "REPEAT_AFTER", 0.1)
    monkeypatch.setattr(unanswered, "GIVE_UP_AFTER", 0.2)


@both
@pytest.mark.usefixtures("hasty")
async def test_c11_a_launch_without_a_sign_of_life_is_said_again() -> None:
    async with serving() as desk:
        client = await desk.seed()
        name = await client.dial()
        await desk.idle(1)
        visitor = await desk.visit()
        await visitor.write(b"x")
        assert await client.signal() == f"//{name}#1", "which is forgotten"
        link = await client.launched()
        assert await link.read_exactly(1) == b"x"
        await link.write(b"y")
        assert await visitor.read_exactly(1) == b"y"
        await asyncio.sleep(0.3)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                pytest.fail(f"said once more: {await client.signal()}")
        assert desk.figures.visitors_refused == 0


@both
@pytest.mark.usefixtures("hasty")
async def test_c11_a_visitor_of_a_launch_that_nobody_understands_is_reset(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn") as desk:
            client = await desk.seed()
            await client.dial()
            await desk.idle(1)
            visitor = await desk.visit()
            await visitor.write(b"x")
            assert await is_reset(visitor)
            await until(lambda: desk.figures.relays_open == 0, 5, "the end")
            assert desk.figures.visitors_refused == 1
            assert desk.figures.launches_failed == 1
    assert "a launch was not understood; its visitor is reset" in caplog.text


@both
@pytest.mark.usefixtures("hasty")
async def test_c11_a_target_may_be_silent() -> None:
    """A client that has replaced the link has taken it: its target is waiting, or thinking."""
    async with serving() as desk:
        client = await desk.seed()
        await client.dial()
        await desk.idle(1)
        visitor = await desk.visit()
        await visitor.write(b"x")
        link = await client.launched()
        await client.dial()
        await asyncio.sleep(0.6)
        await link.write(b"late")
        assert await visitor.read_exactly(4) == b"late"
        assert desk.figures.visitors_refused == 0


@both
@pytest.mark.usefixtures("hasty")
async def test_c11_a_lost_session_leaves_its_relays_alone() -> None:
    async with serving() as desk:
        client = await desk.seed()
        await client.dial()
        await desk.idle(1)
        visitor = await desk.visit()
        await visitor.write(b"x")
        link = await client.launched()
        assert await link.read_exactly(1) == b"x"
        await link.write(b"y")
        assert await visitor.read_exactly(1) == b"y"
        client.control.close()
        await until(lambda: desk.figures.sessions_open == 0, 5, "the loss")
        await asyncio.sleep(0.4)
        await link.write(b"z")
        assert await visitor.read_exactly(1) == b"z"
