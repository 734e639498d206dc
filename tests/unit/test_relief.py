"""relief: who has to go while every place is taken, and who never."""

from __future__ import annotations

import asyncio
import logging

import pytest
from tests.system.rig.timing import until
from tests.unit.server_desk import is_reset, launched, serving

from nodepass import relief
from nodepass.log import Log
from nodepass.relief import Relief

both = pytest.mark.loops("asyncio", "uvloop")


class Visitor:
    """Stands for a Relay."""

    def __init__(self, here: Relief, up: int, down: int) -> None:
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
    monkeypatch.setattr(relief, "SILENCE", 0.1)
    monkeypatch.setattr(relief, "PERIOD", 0.05)


def join(here: Relief, host: str, count: int, up: int = 0, down: int = 0) -> list[Visitor]:
    made = [Visitor(here, up, down) for _ in range(count)]
    for number, visitor in enumerate(made):
        here.join(visitor, f"{host}:{1000 + number}")  # type: ignore[arg-type]
    return made


@both
async def test_c24_the_silent_of_the_fattest_source_go_first() -> None:
    here = Relief(32, lambda: True, Log("server", "none"))
    light = join(here, "192.0.2.1", 4)
    fat = join(here, "[2001:db8::1]", 8)
    neighbours = join(here, "[2001:db8::2]", 8)  # of the same /64
    talking = join(here, "192.0.2.9", 12, up=1)
    listening = join(here, "192.0.2.8", 12, down=5000)
    here.press()
    await until(lambda: here.count == 4, 5, "an eighth of the places")
    assert [v.is_gone for v in fat] == [True] * 4 + [False] * 4, "the oldest of them"
    await until(lambda: here.count == 12, 5, "two more looks")
    assert all(v.is_gone for v in fat)
    assert not any(v.is_gone for v in light)
    await until(lambda: here.count == 20, 5, "all who are silent")
    await asyncio.sleep(0.2)
    assert all(v.is_gone for v in neighbours + light)
    assert not any(v.is_gone for v in talking + listening)
    here.close()


@both
async def test_c24_while_there_is_room_nobody_goes() -> None:
    here = Relief(32, lambda: False, Log("server", "none"))
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
            assert await is_reset(silent[0]), "the oldest of them"
    assert "a visitor who had said nothing gave way" in caplog.text
    assert "host=127.0.0.1" in caplog.text
