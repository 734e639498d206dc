"""F11: links are refilled on demand and in parallel, so distance does not queue visitors."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from tests.kit import burst, delay
from tests.kit.arena import Arena
from tests.kit.target import echo
from tests.kit.timing import free_port, limit, until, within

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kit.process import Nodepass

ONE_WAY: Final = 25
"""Milliseconds; a round trip of 50 ms, as faults.md asks."""

VISITORS: Final = 200

DEFAULT_POOL = {"MIN_POOL_CAPACITY": "16"}
"""The program's own default: most of the burst finds no idle link."""


async def test_f11_burst_over_50_ms_with_delaying_proxy(tmp_path: Path) -> None:
    async with Arena(tmp_path, **DEFAULT_POOL) as arena, within(40):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        proxy = arena.proxy(tunnel_port, delay=ONE_WAY / 1000)
        await arena.server(port, tunnel_port)
        await arena.client(proxy.port, target.port)
        await until(lambda: len(proxy.open_channels) >= 17, 5, "16 idle links")
        await until(lambda: all(c.up for c in proxy.open_channels), 5, "them to claim a session")
        took = await burst.burst(port, VISITORS)
        print(f"{VISITORS} visitors over a 50 ms round trip: {took:.2f} s")
        assert target.accepted == VISITORS
        assert took < limit(1)


@contextmanager
def _spaces(milliseconds: int) -> Iterator[tuple[delay.Spaces, int]]:
    """Two namespaces, and the port of an echo target on the client's side; skip if impossible."""
    with ExitStack() as stack:
        try:
            spaces = stack.enter_context(delay.delayed_link(milliseconds))
        except delay.Unavailable as reason:
            pytest.skip(f"the proxy has to do: {reason}")
        port = free_port()
        target = stack.enter_context(
            subprocess.Popen(
                [*spaces.client, sys.executable, burst.__file__, "serve", str(port)],
                stdout=subprocess.PIPE,
            )
        )
        stack.callback(target.kill)
        assert target.stdout is not None
        assert target.stdout.readline() == b"serving\n"
        yield spaces, port


async def _pair(
    arena: Arena, spaces: delay.Spaces, target: int, query: str = ""
) -> tuple[Nodepass, Nodepass, int]:
    tunnel_port, port = free_port(), free_port()
    tunnel = f"{delay.SERVER_ADDRESS}:{tunnel_port}"
    server = arena.nodepass(f"server://{tunnel}/127.0.0.1:{port}{query}")
    client = arena.nodepass(f"client://{tunnel}/127.0.0.1:{target}{query}")
    await server.start(spaces.server)
    await client.start(spaces.client)
    return server, client, port


async def _visit(spaces: delay.Spaces, port: int, count: int) -> tuple[int | None, str]:
    """Let visitors come on the server's side; return the exit code and what was printed."""
    process = await asyncio.create_subprocess_exec(
        *spaces.server, sys.executable, burst.__file__, "visit", str(port), str(count),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with within(30):
            out, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    return process.returncode, out.decode().strip()


@pytest.mark.parametrize("milliseconds", [0, ONE_WAY])
async def test_f11_burst_over_50_ms_with_netem(tmp_path: Path, milliseconds: int) -> None:
    """Two namespaces and a real delay; the first run, without delay, shows the plumbing."""
    with _spaces(milliseconds) as (spaces, target):
        async with Arena(tmp_path, **DEFAULT_POOL) as arena, within(40):
            server, _, port = await _pair(arena, spaces, target)
            await until(lambda: server.fds("socket:") >= 19, 5, "16 idle links")
            code, seconds = await _visit(spaces, port, VISITORS)
            print(f"{VISITORS} visitors over {2 * milliseconds} ms: {seconds} s")
            assert code == 0
            assert float(seconds) < limit(1)


async def test_f16_cable_pulled_and_plugged_in_again(tmp_path: Path) -> None:
    """Nothing answers any more, not even a kernel: visitors do not hang, the tunnel returns."""
    env = {"REPORT_INTERVAL": "300ms", "DIAL_TIMEOUT": "500ms"}
    with _spaces(0) as (spaces, target):
        async with Arena(tmp_path, **env) as arena, within(45):
            server, client, port = await _pair(arena, spaces, target)
            assert (await _visit(spaces, port, 3))[0] == 0
            spaces.plug("down")
            assert (await _visit(spaces, port, 1))[0] == 1, "reset, not left waiting"
            await server.logged("tunnel lost", seconds=5)
            await client.logged("tunnel lost", seconds=5)
            spaces.plug("up")
            await client.logged("tunnel up", count=2, seconds=10)
            assert (await _visit(spaces, port, 3))[0] == 0


async def test_c04_a_talking_visitor_hears_that_the_path_has_died(tmp_path: Path) -> None:
    """So does the target, on the other side of it; TCP alone tries for a quarter of an hour."""
    env = {"REPORT_INTERVAL": "300ms", "DIAL_TIMEOUT": "500ms"}
    with _spaces(0) as (spaces, target):
        async with Arena(tmp_path, **env) as arena, within(45):
            server, client, port = await _pair(arena, spaces, target, "?log=debug")
            talker = await asyncio.create_subprocess_exec(
                *spaces.server, sys.executable, burst.__file__, "talk", str(port),
                stdout=subprocess.PIPE,
            )  # fmt: skip
            assert talker.stdout is not None
            try:
                assert await talker.stdout.readline() == b"talking\n"
                spaces.plug("down")
                assert await talker.stdout.readline() == b"reset\n"
            finally:
                with suppress(ProcessLookupError):
                    talker.kill()
                await talker.wait()
            for process in (server, client):
                await process.logged("reason=etimedout", seconds=5)
