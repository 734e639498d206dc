"""F22 and F23: running out of descriptors, and what may never be shown."""

from __future__ import annotations

import asyncio
import resource
import shutil
import sys
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.kit.arena import Arena
from tests.kit.stream import connect, exchange
from tests.kit.target import echo
from tests.kit.timing import free_port, limit, until, within

if TYPE_CHECKING:
    from tests.kit.process import Nodepass

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits of another process are set with prlimit: Linux"
)

SPARE = 6
"""Descriptors left to the process under test; a visitor needs one, a link another."""

OBSERVED = 2.0
"""Seconds that the CPU time of a process without descriptors is watched."""

FEW = 256
"""Open files that a small machine may allow a process, and the visitors that come at once."""

SECRET = "correct-horse"


def _squeeze(process: Nodepass) -> None:
    """Leave a running process hardly any descriptors."""
    highest = process.fds() + SPARE
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (highest, highest))


async def test_f22_server_out_of_descriptors_resumes(tmp_path: Path, engine: str) -> None:
    pool = {"MIN_POOL_CAPACITY": "2", "MAX_POOL_CAPACITY": "2", "DIAL_TIMEOUT": "1s"}
    async with Arena(tmp_path, engine, **pool) as arena, AsyncExitStack() as stack, within(40):
        tunnel = await arena.tunnel(arena.target(echo))
        assert await exchange(tunnel.port, b"warm") == b"warm"
        _squeeze(tunnel.server)
        visitors = [await stack.enter_async_context(await connect(tunnel.port)) for _ in range(40)]
        await tunnel.server.logged("(?i)descriptor|too many open|EMFILE")
        before = tunnel.server.cpu()
        await asyncio.sleep(OBSERVED)
        assert tunnel.server.cpu() - before < 0.3, "the accept loop backs off"
        for visitor in visitors:
            visitor.reset()
        await _served(tunnel.port)
        assert tunnel.server.log.count("\n") < 60, "repeated faults are counted, not repeated"


async def test_f22_client_out_of_descriptors_resumes(tmp_path: Path, engine: str) -> None:
    pool = {"MIN_POOL_CAPACITY": "2", "MAX_POOL_CAPACITY": "2", "DIAL_TIMEOUT": "1s"}
    async with Arena(tmp_path, engine, **pool) as arena, AsyncExitStack() as stack, within(40):
        tunnel = await arena.tunnel(arena.target(echo))
        assert await exchange(tunnel.port, b"warm") == b"warm"
        _squeeze(tunnel.client)
        visitors = []
        for _ in range(40):
            with suppress(ConnectionResetError):  # turned away in the very moment it connects
                visitors.append(await stack.enter_async_context(await connect(tunnel.port)))
        await tunnel.client.logged("(?i)descriptor|too many open|EMFILE")
        for visitor in visitors:
            visitor.reset()
        await _served(tunnel.port)


async def test_f22_crowd_beyond_the_descriptors_is_served_in_turn(
    tmp_path: Path, engine: str
) -> None:
    """More visitors than descriptors: those that fit are served, the others wait outside."""
    pool = {"MIN_POOL_CAPACITY": "4", "MAX_POOL_CAPACITY": "16", "DIAL_TIMEOUT": "30s"}
    low = ("prlimit", f"--nofile={FEW}:{FEW}")
    if shutil.which(low[0]) is None:
        pytest.skip("not installed: prlimit (util-linux)")
    async with Arena(tmp_path, engine, **pool) as arena, AsyncExitStack() as stack, within(40):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        server = arena.nodepass(f"server://127.0.0.1:{tunnel_port}/127.0.0.1:{port}")
        client = arena.nodepass(f"client://127.0.0.1:{tunnel_port}/127.0.0.1:{target.port}")
        await server.start(low)
        await client.start()
        visitors = [await stack.enter_async_context(await connect(port)) for _ in range(FEW)]
        for visitor in visitors:
            await visitor.write(b"x")
        for visitor in visitors:  # whoever is served makes room for the next
            assert await visitor.read() == b"x"
            visitor.close()
        assert target.accepted == FEW


async def _served(port: int) -> None:
    """Wait until five visitors in a row are served."""
    async with within(15):
        row = 0
        while row < 5:
            try:
                row = row + 1 if await exchange(port, b"hello") == b"hello" else 0
            except ConnectionResetError:
                row = 0  # still queueing behind those who left


# --- F23: secrets -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["server://{}@127.0.0.1:99999/127.0.0.1:1", "client://{}@127.0.0.1/x", "ftp://{}@x:1/y:2"],
)
async def test_f23_wrong_url_does_not_show_its_password(tmp_path: Path, url: str) -> None:
    async with Arena(tmp_path) as arena, within(20):
        process = arena.nodepass(url.format(SECRET))
        process.spawn()
        assert await process.ended() == 2
        assert process.log.strip(), "a wrong URL is named"
        assert SECRET not in process.log


# --- TCP_IDLE_TIMEOUT ---------------------------------------------------------------------


@pytest.mark.parametrize("side", ["server", "client"])
async def test_c24_silent_connections_end(
    tmp_path: Path, engine: str, tls: str, side: str
) -> None:
    """Who talks may stay; at the end both sides hear a reset, and the log says why."""
    limited = {"TCP_IDLE_TIMEOUT": "600ms"}
    async with Arena(tmp_path, engine) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        here, there = (limited, {}) if side == "server" else ({}, limited)
        server = await arena.server(port, tunnel_port, tls, **here)
        client = await arena.client(tunnel_port, target.port, **there)
        async with await connect(port) as talker, await connect(port) as silent:
            for _ in range(12):
                await talker.write(b"not yet")
                assert await talker.read_exactly(7) == b"not yet"
                await asyncio.sleep(0.1)
            assert await silent.is_reset()
            assert await talker.is_reset()
        limiter = server if side == "server" else client
        await limiter.logged("INFO  a silent connection has been ended.*limit=600ms")
        await until(lambda: target.active == 0, 5, "both ends at the target")


async def test_c24_no_limit_is_the_default(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo))
        async with await connect(tunnel.port) as visitor:
            await asyncio.sleep(1)
            await visitor.write(b"hello")
            assert await visitor.read_exactly(5) == b"hello"


# --- one source that wants every place ----------------------------------------------------


PLACES = 64
GREEDY = "127.0.0.9"


async def _hold_on(port: int, source: str, pause: float) -> None:
    """Take a place, and say a byte now and then, or nothing; come back at once when it is lost."""
    while True:
        with suppress(OSError):
            async with await connect(port, source=source) as greedy:
                while pause:
                    await greedy.write(b"x")
                    await asyncio.sleep(pause)
                await greedy.is_reset()


@pytest.mark.parametrize(
    ("pause", "sources"), [(0.0, 1), (0.0, 2), (0.9, 1)], ids=["silent", "two", "trickling"]
)
async def test_c24_one_source_does_not_shut_out_the_others(
    tmp_path: Path, pause: float, sources: int
) -> None:
    """Though it comes back at once, and has as many waiting as there are places."""
    async with Arena(tmp_path, SEMAPHORE_LIMIT=str(PLACES)) as arena, within(120):
        tunnel = await arena.tunnel(arena.target(echo))
        hosts = [GREEDY, "127.0.0.10"][:sources]
        greedy = [
            asyncio.create_task(_hold_on(tunnel.port, hosts[n % sources], pause))
            for n in range(2 * PLACES)
        ]
        try:
            await tunnel.server.logged("as many visitors as SEMAPHORE_LIMIT allows")
            for _ in range(1 if pause else 3):
                start = time.monotonic()
                async with asyncio.timeout(limit(50)):
                    assert await exchange(tunnel.port, b"hello") == b"hello"
                print(f"served after {time.monotonic() - start:.1f} s")
        finally:
            for task in greedy:
                task.cancel()
            await asyncio.gather(*greedy, return_exceptions=True)
        for host in hosts:
            assert tunnel.server.count(f"gave way.*host={host} ") <= 1, "told once a minute"
        assert tunnel.server.count("gave way") >= 1
