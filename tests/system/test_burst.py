"""F11: links are refilled on demand and in parallel, so distance does not queue visitors."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from tests.system.rig import burst, delay
from tests.system.rig.arena import Arena
from tests.system.rig.target import echo
from tests.system.rig.timing import free_port, limit, until, within

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


@pytest.mark.parametrize("milliseconds", [0, ONE_WAY])
async def test_f11_burst_over_50_ms_with_netem(tmp_path: Path, milliseconds: int) -> None:
    """Two namespaces and a real delay; the first run, without delay, shows the plumbing."""
    with ExitStack() as stack:
        try:
            spaces = stack.enter_context(delay.delayed_link(milliseconds))
        except delay.Unavailable as reason:
            pytest.skip(f"the delaying proxy has to do: {reason}")
        async with Arena(tmp_path, **DEFAULT_POOL) as arena, within(40):
            target_port, tunnel_port, port = free_port(), free_port(), free_port()
            target = stack.enter_context(
                subprocess.Popen(
                    [*spaces.client, sys.executable, burst.__file__, "serve", str(target_port)],
                    stdout=subprocess.PIPE,
                )
            )
            stack.callback(target.kill)
            assert target.stdout is not None
            assert target.stdout.readline() == b"serving\n"
            server = arena.nodepass(
                f"server://{delay.SERVER_ADDRESS}:{tunnel_port}/127.0.0.1:{port}"
            )
            client = arena.nodepass(
                f"client://{delay.SERVER_ADDRESS}:{tunnel_port}/127.0.0.1:{target_port}"
            )
            await server.start(spaces.server)
            await client.start(spaces.client)
            await until(lambda: server.fds("socket:") >= 19, 5, "16 idle links")
            done = subprocess.run(
                [*spaces.server, sys.executable, burst.__file__, "visit", str(port), "200"],
                capture_output=True,
                text=True,
                timeout=limit(30),
                check=True,
            )
            print(f"{VISITORS} visitors over {2 * milliseconds} ms: {done.stdout.strip()} s")
            assert float(done.stdout) < limit(1)
