"""Links are broken at random while visitors transfer: whole or reset, never cut clean (F20).

A FIN in the middle cannot be told from the target's own on a plain link, nor a changed byte
from the target's own, so there the proxy only resets; with TLS it does all three. What a
visitor sees as a clean end must be the whole body.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Final

from tests.kit.arena import Arena
from tests.kit.proxy import Channel
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import body_of, digest_of
from tests.kit.timing import free_port, until, within

VISITORS: Final = 20
"""Visitors at a time; each comes again as soon as it is done."""

DURATION: Final = 3.0
"""Seconds of chaos, unscaled: enough for some hundred cuts."""

PAUSE: Final = 0.02
"""Seconds between two cuts, on average."""

BODY = body_of(14, 3_000_000)
WHOLE = digest_of(BODY)


async def _both_ways(stream: Stream) -> None:
    """The target: hear a body up to its end, send the same back, close."""
    assert await stream.digest(len(BODY)) == (len(BODY), WHOLE), "an end with bytes missing"
    assert await stream.read() == b""
    await stream.write(BODY)


async def _come_and_go(port: int, end: float, outcomes: list[str]) -> None:
    loop = asyncio.get_running_loop()
    while loop.time() < end:
        try:
            heard = await exchange(port, BODY)
        except (ConnectionError, BrokenPipeError):
            outcomes.append("reset")
        else:
            outcomes.append("whole" if digest_of(heard) == WHOLE else f"{len(heard)} bytes")


def _break(channel: Channel, luck: random.Random, tls: str) -> None:
    if not tls:
        channel.cut(reset=True)
    elif luck.random() < 0.3:
        channel.is_to_tamper = True
    else:
        channel.cut(reset=luck.random() < 0.5)


async def test_f20_chaos_leaves_streams_whole_or_reset(
    tmp_path: Path, engine: str, tls: str
) -> None:
    failures: list[str] = []
    outcomes: list[str] = []

    async def target(stream: Stream) -> None:
        try:
            await _both_ways(stream)
        except AssertionError as error:
            failures.append(str(error))

    pool = {"MIN_POOL_CAPACITY": "8", "MAX_POOL_CAPACITY": "8"}
    env = {"SERVICE_COOLDOWN": "100ms", "DIAL_TIMEOUT": "10s", **pool}
    async with Arena(tmp_path, engine, **env) as arena, within(45):
        tunnel_port, port = free_port(), free_port()
        proxy = arena.proxy(tunnel_port)
        server = await arena.server(port, tunnel_port, tls)
        client = await arena.client(proxy.port, arena.target(target).port)
        await until(lambda: len(proxy.open_channels) == 9, 5, "eight idle links")
        await until(lambda: all(c.up for c in proxy.open_channels), 5, "them to claim a session")
        before = server.fds("socket:"), client.fds("socket:")
        luck = random.Random(1)
        loop = asyncio.get_running_loop()
        end = loop.time() + DURATION
        async with asyncio.TaskGroup() as group:
            for _ in range(VISITORS):
                group.create_task(_come_and_go(port, end, outcomes))
            while loop.time() < end:
                await asyncio.sleep(luck.random() * 2 * PAUSE)
                if channels := proxy.open_channels:
                    _break(luck.choice(channels), luck, tls)
        for channel in proxy.open_channels:
            channel.is_to_tamper = False
        assert not failures, failures[:5]
        assert set(outcomes) == {"whole", "reset"}, set(outcomes)
        await client.logged("tunnel up", count=client.count("tunnel lost") + 1)
        for _ in range(10):
            assert digest_of(await exchange(port, BODY)) == WHOLE
        await until(lambda: server.fds("socket:") == before[0], 5, f"{before[0]} sockets again")
        await until(lambda: client.fds("socket:") == before[1], 5, f"{before[1]} sockets again")


async def test_visitors_resetting_at_random_harm_nobody(
    tmp_path: Path, engine: str, tls: str
) -> None:
    """Half of the visitors leave by RST at any moment; the others get what they came for."""
    failures: list[str] = []
    async with Arena(tmp_path, engine) as arena, within(45):

        async def target(stream: Stream) -> None:
            await stream.digest(len(BODY))
            await stream.write(BODY)

        service = arena.target(target)
        tunnel = await arena.tunnel(service, server=tls)

        async def leave(seed: int) -> None:
            luck = random.Random(seed)
            async with await connect(tunnel.port) as stream:
                await stream.write(BODY[: luck.randrange(len(BODY))])
                await asyncio.sleep(luck.random() * 0.05)
                stream.reset()

        async def stay() -> None:
            if digest_of(await exchange(tunnel.port, BODY)) != WHOLE:
                failures.append("cut short")

        async with asyncio.TaskGroup() as group:
            for number in range(100):
                group.create_task(leave(number))
                group.create_task(stay())
        assert not failures
        await until(lambda: service.active == 0, 5, "all targets to be left")
        assert "tunnel lost" not in tunnel.server.log + tunnel.client.log
