"""Many at once: random transfers, bursts of launches, visitors that never read."""

from __future__ import annotations

import asyncio
import random
import struct
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from tests.kit.arena import Arena, Tunnel
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import Target, body_of, digest_of, echo, serve_body, source
from tests.kit.timing import settled, until, within

TRANSFERS: Final = 200
"""Visitors at once: faults.md, F21."""

ORDER: Final = struct.Struct("!IIIB")
"""What a visitor asks of the target: seed, bytes up, bytes down, who ends first."""

VISITOR_FIRST, TARGET_FIRST, TOGETHER = range(3)

SIZES: Final = (0, 1, 1000, 65_536, 300_000, 2_000_000)
"""Bytes of one direction: nothing, one segment, around the engine's buffer, many buffers."""

SLOW: Final = 100
"""Visitors that never read: faults.md, F27."""

PARKED: Final = 1024 * 1024
"""Bytes of memory one stuck flow may cost one process: a buffer of 512 KiB per direction."""

STEADY = {"MIN_POOL_CAPACITY": "8", "MAX_POOL_CAPACITY": "8"}
"""A pool of constant size, so that descriptors can be compared."""


# --- F21: random transfers --------------------------------------------------------------


async def _send(stream: Stream, data: bytes, luck: random.Random) -> None:
    rest = memoryview(data)
    while rest:
        size = luck.choice((1, 100, 1400, 16_000, 70_000, 400_000))
        await stream.write(rest[:size])
        rest = rest[size:]
        if luck.random() < 0.2:
            await asyncio.sleep(0)


async def _answer(stream: Stream) -> None:
    """The target's half of a random transfer; it ends by the digest of what it heard."""
    seed, up, down, order = ORDER.unpack(await stream.read_exactly(ORDER.size))
    luck = random.Random(~seed)
    sending = asyncio.create_task(_send(stream, body_of(~seed, down), luck))
    try:
        if order == TARGET_FIRST:
            await sending
            stream.finish()
        total, digest = await stream.digest(up)
        assert (total, digest) == (up, digest_of(body_of(seed, up))), "scrambled on the way up"
        await sending
        if order != TARGET_FIRST:
            assert await stream.read() == b"", "more bytes than were sent"
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def _transfer(port: int, seed: int, failures: list[str]) -> None:
    luck = random.Random(seed)
    up, down, order = luck.choice(SIZES), luck.choice(SIZES), luck.randrange(3)
    async with await connect(port) as stream:
        await stream.write(ORDER.pack(seed, up, down, order))
        sending = asyncio.create_task(_send(stream, body_of(seed, up), luck))
        try:
            if order == VISITOR_FIRST:
                await sending
                stream.finish()
            heard = await stream.digest(down)
            if heard != (down, digest_of(body_of(~seed, down))):
                failures.append(f"{seed}: {heard[0]} of {down} bytes down, or scrambled")
            await sending
            if order != VISITOR_FIRST:
                stream.finish()
            if await stream.read():
                failures.append(f"{seed}: more bytes than were sent")
        except OSError as error:
            failures.append(f"{seed} ({up} up, {down} down, order {order}): {error!r}")
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def test_f21_200_random_transfers_at_once(tmp_path: Path, engine: str, tls: str) -> None:
    failures: list[str] = []

    async def target(stream: Stream) -> None:
        try:
            await _answer(stream)
        except (AssertionError, EOFError, OSError) as error:
            failures.append(f"target: {error!r}")

    async with Arena(tmp_path, engine, **STEADY) as arena, within(48):
        tunnel = await arena.tunnel(arena.target(target), server=tls)
        await _transfer(tunnel.port, 10_000, failures)  # what is opened once and kept is open now
        await _idle(tunnel)
        before = _sockets(tunnel)
        for first in (0, TRANSFERS):
            async with asyncio.TaskGroup() as group:
                for seed in range(first, first + TRANSFERS):
                    group.create_task(_transfer(tunnel.port, seed, failures))
            assert not failures, "\n".join(failures)
            await until(lambda: _sockets(tunnel) == before, 5, f"sockets to be {before} again")


def _sockets(tunnel: Tunnel) -> tuple[int, int]:
    return tunnel.server.fds("socket:"), tunnel.client.fds("socket:")


async def _idle(tunnel: Tunnel) -> None:
    """Wait until the pool is full: control, eight links, and the listeners of the server."""
    await until(lambda: tunnel.client.fds("socket:") >= 9, 5, "eight idle links")
    await settled(lambda: _sockets(tunnel), 5, "a steady pool")


async def test_f21_no_descriptor_is_left_behind(tmp_path: Path, engine: str) -> None:
    """Without splice no pipes are kept for later: every kind of descriptor must come back."""
    failures: list[str] = []
    async with Arena(tmp_path, engine, **STEADY, NODEPASS_SPLICE="0") as arena, within(40):
        tunnel = await arena.tunnel(arena.target(_answer))
        await _transfer(tunnel.port, 20_000, failures)
        await _idle(tunnel)
        before = tunnel.server.fds(), tunnel.client.fds()
        async with asyncio.TaskGroup() as group:
            for seed in range(1000, 1050):
                group.create_task(_transfer(tunnel.port, seed, failures))
        assert not failures, "\n".join(failures)
        await until(
            lambda: (tunnel.server.fds(), tunnel.client.fds()) == before,
            5,
            f"descriptors to be {before} again",
        )


# --- F27: visitors that never read ------------------------------------------------------


async def test_f27_slow_readers_do_not_fill_memory(tmp_path: Path, engine: str, tls: str) -> None:
    async with Arena(tmp_path, engine) as arena, AsyncExitStack() as stack, within(45):
        sent = [0]

        def count(size: int) -> None:
            sent[0] += size

        target = arena.target(source(bytes(1_000_000), count))
        tunnel = await arena.tunnel(target, server=tls)
        async with await connect(tunnel.port) as warm:
            await warm.read_exactly(10_000_000)
        before = tunnel.server.rss(), tunnel.client.rss()
        for _ in range(SLOW):
            visitor = await connect(tunnel.port)
            stack.callback(visitor.reset)
        await until(lambda: target.accepted == SLOW + 1, 10, "all visitors at the target")
        await _still(sent)
        after = tunnel.server.rss(), tunnel.client.rss()
        grown = [new - old for new, old in zip(after, before, strict=True)]
        assert max(grown) < SLOW * PARKED, f"bytes grown: {grown}"
        async with await connect(tunnel.port) as quick:
            await quick.read_exactly(10_000_000)  # nobody else is held up by them


async def _still(sent: list[int]) -> None:
    """Wait until the kernel's buffers are full everywhere: nothing moves for a while."""
    await settled(lambda: sent[0], 20, "the sources to be stuck", looks=30)


async def test_f27_paused_reader_is_not_cut_off(tmp_path: Path, engine: str) -> None:
    """A reader may pause for many times every time limit there is; nothing is lost by it."""
    short = {
        "REPORT_INTERVAL": "100ms",
        "DIAL_TIMEOUT": "200ms",
        "HANDSHAKE_TIMEOUT": "200ms",
        "SERVICE_COOLDOWN": "100ms",
        "UDP_IDLE_TIMEOUT": "100ms",
    }
    body = body_of(13, 30_000_000)
    async with Arena(tmp_path, engine, **short) as arena, within(30):
        tunnel = await arena.tunnel(arena.target(serve_body(body)))
        async with await connect(tunnel.port) as visitor:
            assert await visitor.read_exactly(1000) == body[:1000]
            await asyncio.sleep(3)  # the pause is what is tested
            assert await visitor.digest() == (len(body) - 1000, digest_of(body[1000:]))


# --- F28: a burst of launches -----------------------------------------------------------


async def test_f28_heartbeats_survive_1000_launches(tmp_path: Path) -> None:
    async with Arena(tmp_path, REPORT_INTERVAL="300ms", DIAL_TIMEOUT="30s") as arena, within(45):
        target = arena.target(echo)
        tunnel = await arena.tunnel(target)
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(exchange(tunnel.port, b"%d" % n)) for n in range(1000)]
        assert [answer.result() for answer in answers] == [b"%d" % n for n in range(1000)]
        assert target.accepted == 1000
        assert "tunnel lost" not in tunnel.server.log + tunnel.client.log


# --- the semaphore ----------------------------------------------------------------------


async def test_semaphore_lets_visitors_wait_their_turn(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine, SEMAPHORE_LIMIT="4") as arena, within(30):
        target = arena.target(echo)
        tunnel = await arena.tunnel(target)
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(exchange(tunnel.port, b"%d" % n)) for n in range(20)]
        assert [answer.result() for answer in answers] == [b"%d" % n for n in range(20)]
        # the target may see the next visitor a moment before it sees the last one end
        assert target.most_active <= 8


async def test_semaphore_holds_the_fifth_until_one_leaves(tmp_path: Path) -> None:
    async with (
        Arena(tmp_path, SEMAPHORE_LIMIT="4") as arena,
        AsyncExitStack() as stack,
        within(30),
    ):
        target: Target = arena.target(echo)
        tunnel = await arena.tunnel(target)
        visitors = [await stack.enter_async_context(await connect(tunnel.port)) for _ in range(5)]
        for visitor in visitors[:4]:
            await visitor.write(b"x")
            assert await visitor.read() == b"x"
        await visitors[4].write(b"y")
        answer = asyncio.create_task(visitors[4].read())
        await asyncio.sleep(0.2)
        assert not answer.done()
        assert target.accepted == 4
        visitors[0].close()
        async with within(3):
            assert await answer == b"y"
