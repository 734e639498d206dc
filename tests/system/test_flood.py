"""1,000 attackers at the tunnel port at once, while visitors go on being served."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Final

import pytest
from tests.kit.arena import Arena
from tests.kit.middle import MiddleMan
from tests.kit.stream import exchange
from tests.kit.target import body_of, echo
from tests.kit.timing import free_port, limit, settled, until, within

ATTACKERS: Final = 1000

SECRET: Final = "correct-horse"

USER_BYTES: Final = b"for the target alone " + body_of(51, 1000)

CALM: Final = 150
"""Requests before the attack: what a quiet day looks like."""

STEADY: Final = {"MIN_POOL_CAPACITY": "8", "MAX_POOL_CAPACITY": "8"}
"""A pool of constant size, so that descriptors can be compared."""

ATTACK: Final = 3.0
"""Seconds of requests under attack."""

WORST: Final = 1.0
"""Seconds, before scaling, that 99 of 100 requests must stay below: no more than a hang."""

GROWTH: Final = 64 * 1024 * 1024
"""Bytes that the server may grow by: 256 strangers with TLS buffers of 80 KiB are 20 MiB."""

FLOOD: Final = Path(__file__).parents[1] / "kit" / "flood.py"


@dataclass
class Flood:
    """What the attackers have to report, once they are gone."""

    made: int = 0
    most: int = 0
    heard: tuple[str, ...] = ()


@asynccontextmanager
async def _under_attack(tunnel_port: int, tape: Path) -> AsyncIterator[Flood]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, FLOOD, str(tunnel_port), str(ATTACKERS), tape, stdin=PIPE, stdout=PIPE
    )
    flood = Flood()
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"at it\n"
        yield flood
        printed, _ = await process.communicate(b"")  # the end of its stdin is its end
        flood.__dict__.update(json.loads(printed))
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def _request(port: int) -> float:
    """Make one request, insist on the right answer; return the seconds it took."""
    start = time.monotonic()
    assert await exchange(port, USER_BYTES) == USER_BYTES
    return time.monotonic() - start


def _p99(times: list[float]) -> float:
    return quantiles(times, n=100)[98]


async def _record(man: MiddleMan, tape: Path) -> None:
    """Keep what the real client has sent on its connections, for those who replay."""
    await until(lambda: sum(bool(talk.up) for talk in man.talks) >= 5, 5, "a session to record")
    tape.write_text(json.dumps([bytes(talk.up).hex() for talk in man.talks if talk.up]))


@pytest.mark.parametrize("query", ["?tls=1", ""], ids=["tls", "plain"])
async def test_flood_of_attackers_leaves_visitors_served(tmp_path: Path, query: str) -> None:
    """Every request is answered rightly, no attacker hears a byte of it, memory is bounded."""
    async with Arena(tmp_path, **STEADY) as arena, within(45):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        server = await arena.server(port, tunnel_port, query, password=SECRET)
        man = arena.middle_man(tunnel_port)
        recorded = await arena.client(man.port, target.port, password=SECRET)
        await _record(man, tape := tmp_path / "tape")
        await recorded.stop()
        client = await arena.client(tunnel_port, target.port, password=SECRET)
        for _ in range(CALM // 5):  # what is opened once and kept is open now
            await _request(port)
        calm = [await _request(port) for _ in range(CALM)]
        before = server.rss(), client.rss()
        await settled(lambda: server.fds("socket:"), 5, "a steady pool")
        sockets = server.fds("socket:")
        async with _under_attack(tunnel_port, tape) as flood:
            stormy: list[float] = []
            end = time.monotonic() + ATTACK
            while time.monotonic() < end or len(stormy) < CALM:
                stormy.append(await _request(port))
            late = await arena.client(tunnel_port, target.port, "?name=late", password=SECRET)
            grown = [
                new - old for new, old in zip((server.rss(), client.rss()), before, strict=True)
            ]
        print(
            f"{len(stormy)} requests under {flood.made} attacks, {flood.most} at once: p99 "
            f"{_p99(calm) * 1000:.1f} ms before, {_p99(stormy) * 1000:.1f} ms during; grown by "
            f"{[size // 1024 for size in grown]} KiB"
        )
        assert flood.made >= ATTACKERS
        assert not flood.heard, flood.heard[:3]
        assert _p99(stormy) < limit(WORST)
        assert max(grown) < GROWTH, f"bytes grown: {grown}"
        assert "tunnel lost" not in client.log
        assert server.log.count("\n") < 400, "strangers are counted, not told one by one"
        await late.stop()
        await until(lambda: server.fds("socket:") <= sockets + 8, 10, f"{sockets} sockets again")
        assert await exchange(port, b"after") == b"after"
