"""eviction: who has to go while every place is taken, and who never."""

from __future__ import annotations

import asyncio
import logging

import pytest
from tests.kit.engines import both
from tests.kit.server_desk import is_reset, launched, serving
from tests.kit.timing import until

from nodepass.observe.log import Log
from nodepass.server import eviction
from nodepass.server.eviction import Eviction


class Visitor:
    """Stands for a Relay."""

    def __init__(self, here: Eviction, up: int, down: int) -> None:
        self.here = here
        self.bytes = (up, down)
        self.is_gone = False

    def live(self) -> tuple[int, int]:
        return self.bytes

    def abort(self) -> None:
        self.is_gone = True
        self.here.part(self)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "SILENCE", 0.1)
    monkeypatch.setattr(eviction, "HEAVY_SILENCE", 0.05)
    monkeypatch.setattr(eviction, "MUMBLING", 0.1)
    monkeypatch.setattr(eviction, "PERIOD", 0.05)


def join(here: Eviction, host: str, count: int, up: int = 0, down: int = 0) -> list[Visitor]:
    made = [Visitor(here, up, down) for _ in range(count)]
    for number, visitor in enumerate(made):
        here.join(visitor, f"{host}:{1000 + number}")  # type: ignore[arg-type]
    return made


@both
async def test_c24_the_silent_of_the_fattest_source_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eviction, "HEAVY_SILENCE", 60.0)
    monkeypatch.setattr(eviction, "MUMBLING", 60.0)
    here = Eviction(32, lambda: True, lambda _: False, Log("server", "none"))
    light = join(here, "192.0.2.1", 4)
    fat = join(here, "[2001:db8::1]", 8)
    neighbours = join(here, "[2001:db8::2]", 8)  # of the same /64
    talking = join(here, "192.0.2.9", 12, up=1)
    listening = join(here, "192.0.2.8", 12, down=5000)
    here.press()
    await until(lambda: here.count == 4, 5, "an eighth of the places")
    assert sum(v.is_gone for v in fat + neighbours) == 4, "they are one source"
    await until(lambda: here.count == 12, 5, "two more looks")
    assert not any(v.is_gone for v in light), "up to here they held fewer"
    await until(lambda: here.count == 20, 5, "all who are silent")
    await asyncio.sleep(0.2)
    assert all(v.is_gone for v in fat + neighbours + light)
    assert not any(v.is_gone for v in talking + listening)
    here.close()


@both
async def test_c24_a_heavy_source_has_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "SILENCE", 60.0)
    here = Eviction(32, lambda: True, lambda _: False, Log("server", "none"))
    half = join(here, "192.0.2.1", 16)
    here.press()
    await asyncio.sleep(0.3)
    assert not any(v.is_gone for v in half), "half of the places is a fair share"
    more = join(here, "192.0.2.1", 6)
    talking = join(here, "192.0.2.1", 2, up=1)
    await until(lambda: here.count >= 16, 5, "half of the places")
    assert here.count == sum(v.is_gone for v in half + more) == 16, "in one look"
    await asyncio.sleep(0.2)
    assert here.count == 16, "now he holds less than a half"
    assert not any(v.is_gone for v in talking)
    here.close()


@both
async def test_c24_a_source_is_heavy_beyond_its_share_with_one_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So two who have half of the places each shut nobody out, nor have seven a seventh each."""
    monkeypatch.setattr(eviction, "SILENCE", 60.0)
    for count in (2, 3, 7):
        here = Eviction(64, lambda: True, lambda _: False, Log("server", "none"))
        crowds = [join(here, f"192.0.2.{n}", 64 // count) for n in range(count)]
        modest = join(here, "192.0.2.99", 64 // (count + 2))
        here.press()
        await until(lambda here=here: here.count, 5, "places")  # type: ignore[misc]
        await asyncio.sleep(0.2)
        assert not any(v.is_gone for v in modest)
        assert sum(v.is_gone for crowd in crowds for v in crowd) == here.count
        here.close()


@both
async def test_c24_a_byte_now_and_then_keeps_no_place_of_a_heavy_source() -> None:
    here = Eviction(32, lambda: True, lambda _: False, Log("server", "none"))
    mumbling = join(here, "192.0.2.1", 20, up=eviction.MUMBLED - 1)
    others = join(here, "192.0.2.2", 4, up=1)
    talking = join(here, "192.0.2.1", 4, up=eviction.MUMBLED)
    answered = join(here, "192.0.2.1", 4, up=1, down=eviction.GREETED + 1)
    here.press()
    await until(lambda: sum(v.is_gone for v in mumbling) >= 16, 5, "half of the places")
    await asyncio.sleep(0.2)
    assert not any(v.is_gone for v in others + talking + answered)
    here.close()


@both
async def test_c24_one_silent_visitor_of_a_heavy_source_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How many have to go follows from their own rank, not from who goes first."""
    here = Eviction(64, lambda: True, lambda _: False, Log("server", "none"))
    join(here, "192.0.2.1", 40, up=5000)
    lone = join(here, "192.0.2.1", 1)
    others = [v for n in range(20) for v in join(here, f"198.51.100.{n}", 1)]
    await asyncio.sleep(0.2)
    here.press()
    await until(lambda: here.count, 5, "the one")
    assert (here.count, lone[0].is_gone) == (1, True)
    await until(lambda: here.count > 1, 5, "an eighth")
    assert here.count == 1 + 64 // eviction.SHARE
    assert sum(v.is_gone for v in others) == 64 // eviction.SHARE
    here.close()


@both
async def test_c24_who_has_talked_keeps_his_place() -> None:
    """However long he is quiet, and however many there are of his source."""
    here = Eviction(32, lambda: True, lambda _: False, Log("server", "none"))
    quiet = join(here, "192.0.2.1", 30, up=eviction.MUMBLED)
    here.press()
    await asyncio.sleep(0.6)
    assert not any(v.is_gone for v in quiet)
    here.close()


@both
async def test_c24_patience_with_a_source_that_comes_back_shrinks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And is whole again when there has been room."""
    monkeypatch.setattr(eviction, "MUMBLING", 0.8)
    monkeypatch.setattr(eviction, "LEAST", 0.0)
    is_full = True
    here = Eviction(32, lambda: is_full, lambda _: False, Log("server", "none"))
    loop = asyncio.get_running_loop()
    waits = []
    for _ in range(4):
        start, gone = loop.time(), here.count
        crowd = join(here, "192.0.2.1", 32, up=1)
        here.press()
        await until(lambda: here.count > gone, 5, "places")  # noqa: B023
        waits.append(loop.time() - start)
        for visitor in crowd:
            here.part(visitor)  # type: ignore[arg-type]
    assert waits[0] >= 0.75
    assert min(waits[1:]) < 0.75
    is_full = False
    await asyncio.sleep(0.2)
    is_full = True
    start, gone = loop.time(), here.count
    join(here, "192.0.2.1", 32, up=1)
    here.press()
    await until(lambda: here.count > gone, 5, "places")
    assert loop.time() - start >= 0.75
    here.close()


@both
async def test_c24_the_only_place_is_nobodys_too_much() -> None:
    here = Eviction(1, lambda: True, lambda _: False, Log("server", "none"))
    (lone,) = join(here, "192.0.2.1", 1, up=1)
    here.press()
    await asyncio.sleep(0.3)
    assert not lone.is_gone
    here.close()


@both
async def test_c24_chance_decides_within_a_source() -> None:
    gone = set()
    for _ in range(20):
        here = Eviction(8, lambda: True, lambda _: False, Log("server", "none"))
        silent = join(here, "192.0.2.1", 8)
        here.press()
        while not here.count:
            await asyncio.sleep(0.01)
        gone |= {number for number, v in enumerate(silent) if v.is_gone}
        here.close()
    assert len(gone) > 1


@both
async def test_c24_while_there_is_room_nobody_goes() -> None:
    here = Eviction(32, lambda: False, lambda _: False, Log("server", "none"))
    silent = join(here, "192.0.2.1", 20)
    here.press()
    await asyncio.sleep(0.3)
    assert not any(v.is_gone for v in silent)
    here.close()


@both
async def test_c24_silent_connections_do_not_shut_everybody_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As many as SEMAPHORE_LIMIT, and one who wants to be served."""
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn", semaphore_limit=4) as desk:
            client = await desk.client()
            links = await desk.links(client, 1, 2, 3, 4, 5)
            silent = [await desk.visit() for _ in range(4)]
            for _ in silent:
                await launched(client)
            late = await desk.visit()
            await late.write(b"x")
            number = await launched(client)
            assert await links[number - 1].read_exactly(1) == b"x"
            ends = [asyncio.create_task(is_reset(one)) for one in silent]
            done, rest = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            assert all(end.result() for end in done)
            for end in rest:
                end.cancel()
    assert "a visitor who said nothing gave way" in caplog.text
    assert "host=127.0.0.1" in caplog.text


@both
async def test_c10_most_places_of_a_client_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """A circle of the seed dialect, or through several clients, is seen from here only."""
    with caplog.at_level(logging.WARNING, "nodepass"):
        here = Eviction(8, lambda: True, "192.0.2.1".__eq__, Log("server", "warn"))
        join(here, "192.0.2.1", 4, up=200)
        here.press()
        await asyncio.sleep(0.2)
        assert "lead back" not in caplog.text, "half of the places is nothing to worry about"
        join(here, "192.0.2.1", 1, up=200)
        await until(lambda: "lead back here?" in caplog.text, 5, "a line")
        assert "host=192.0.2.1" in caplog.text
        here.close()
