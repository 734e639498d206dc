"""Tunnels break and come back: cuts, kills, silence, moving names, restarts, stops."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.kit.arena import Arena
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import body_of, digest_of, echo, serve_body
from tests.kit.timing import free_port, limit, until, within

if TYPE_CHECKING:
    from tests.kit.process import Nodepass

OUTAGE = 5.0
"""Seconds that the CPU time of a client without its server is watched."""

BEAT = "300ms"
"""REPORT_INTERVAL where silence must be noticed: three of them, then the peer is lost."""

BIG = 200_000_000
"""Bytes of the transfer that must survive a stop: faults.md, F19."""


# --- F5: an outage costs nothing --------------------------------------------------------


async def test_f05_no_spin_while_server_is_down(tmp_path: Path) -> None:
    async with Arena(tmp_path, SERVICE_COOLDOWN="5s") as arena, within(40):
        tunnel = await arena.tunnel(arena.target(echo))
        never = arena.nodepass(f"client://127.0.0.1:{free_port()}/127.0.0.1:{free_port()}")
        never.spawn()
        await until(lambda: "cannot reach" in never.log, 10, f"a failed dial\n{never.log}")
        tunnel.server.kill()
        await tunnel.client.logged("tunnel lost")
        before = [client.cpu() for client in (tunnel.client, never)]
        await asyncio.sleep(OUTAGE)
        spent = [
            client.cpu() - start
            for client, start in zip((tunnel.client, never), before, strict=True)
        ]
        assert max(spent) < 0.1, f"CPU seconds in {OUTAGE} s of outage: {spent}"
        assert tunnel.client.log.count("\n") < 20, "repeated faults are counted, not repeated"


async def test_f05_no_spin_while_links_are_refused(tmp_path: Path) -> None:
    """The tunnel port accepts and resets: the same back-off applies."""
    async with Arena(tmp_path, SERVICE_COOLDOWN="5s") as arena, within(40):
        proxy = arena.proxy(free_port())
        proxy.is_refusing = True
        client = arena.nodepass(f"client://127.0.0.1:{proxy.port}/127.0.0.1:{free_port()}")
        client.spawn()
        await until(lambda: "WARN" in client.log or "ERROR" in client.log, 10, "a failure")
        before = client.cpu()
        await asyncio.sleep(OUTAGE / 2)
        assert client.cpu() - before < 0.1


# --- F16: silence and takeover ----------------------------------------------------------


async def test_f16_both_sides_notice_silence(tmp_path: Path) -> None:
    env = {"REPORT_INTERVAL": BEAT}
    async with Arena(tmp_path, **env) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        proxy = arena.proxy(tunnel_port)
        server = await arena.server(port, tunnel_port)
        client = await arena.client(proxy.port, target.port)
        assert await exchange(port, b"hello") == b"hello"
        for channel in proxy.open_channels:
            channel.stall()
        await server.logged("tunnel lost", seconds=5)
        await client.logged("tunnel lost", seconds=5)
        await server.logged(r"tunnel lost .*reason=\S")
        await client.logged(r"tunnel lost .*reason=\S")
        await client.logged("tunnel up", count=2, seconds=5)
        assert await exchange(port, b"hello") == b"hello"


async def test_f16_namesake_takes_over_from_a_dead_mapping(tmp_path: Path) -> None:
    """A NAT forgets the mapping; the client behind it returns before the server notices."""
    async with Arena(tmp_path, REPORT_INTERVAL="60s") as arena, within(30):
        first, second = arena.target(serve_body(b"old")), arena.target(serve_body(b"new"))
        tunnel_port, port = free_port(), free_port()
        proxy = arena.proxy(tunnel_port)
        server = await arena.server(port, tunnel_port)
        await arena.client(proxy.port, first.port, "?name=box")
        assert await exchange(port, b"") == b"old"
        for channel in proxy.open_channels:
            channel.stall()
        await arena.client(tunnel_port, second.port, "?name=box")
        await server.logged("client connected", count=2)
        await server.logged("replaced")
        for _ in range(10):
            assert await exchange(port, b"") == b"new", "no visitor may be given a dead link"


async def test_f16_quiet_tunnel_is_not_lost(tmp_path: Path) -> None:
    """Heartbeats alone keep it: nothing else travels for seven silence limits."""
    async with Arena(tmp_path, REPORT_INTERVAL="100ms") as arena, within(30):
        tunnel = await arena.tunnel(arena.target(echo))
        await asyncio.sleep(2)
        assert "tunnel lost" not in tunnel.server.log + tunnel.client.log
        assert await exchange(tunnel.port, b"hello") == b"hello"


# --- F18: control loss does not touch relays --------------------------------------------


@pytest.mark.parametrize("reset", [True, False])
async def test_f18_relays_outlive_control(tmp_path: Path, engine: str, reset: bool) -> None:
    async with Arena(tmp_path, engine) as arena, within(30):
        body = body_of(4, 30_000_000)
        target, tunnel_port, port = arena.target(serve_body(body)), free_port(), free_port()
        proxy = arena.proxy(tunnel_port)
        server = await arena.server(port, tunnel_port)
        client = await arena.client(proxy.port, target.port)
        async with await connect(port) as visitor:
            start = await visitor.read_exactly(1_000_000)
            proxy.channels[0].cut(reset=reset)
            await client.logged("tunnel lost")
            await server.logged("tunnel lost")
            rest = len(body) - len(start)
            assert start == body[: len(start)]
            assert await visitor.digest() == (rest, digest_of(body[len(start) :]))
        await client.logged("tunnel up", count=2)
        async with await connect(port) as visitor:
            assert await visitor.digest() == (len(body), digest_of(body))


# --- F19: a stop lets transfers finish --------------------------------------------------


@pytest.mark.parametrize("side", ["server", "client"])
async def test_f19_transfer_survives_sigterm(tmp_path: Path, engine: str, side: str) -> None:
    chunk = body_of(5, 1_000_000)

    async def send_big(stream: Stream) -> None:
        for _ in range(BIG // len(chunk)):
            await stream.write(chunk)

    async with Arena(tmp_path, engine, SHUTDOWN_TIMEOUT="20s") as arena, within(45):
        tunnel = await arena.tunnel(arena.target(send_big))
        stopping = getattr(tunnel, side)
        async with await connect(tunnel.port) as visitor:
            assert await visitor.read_exactly(len(chunk)) == chunk
            stopping.send(signal.SIGTERM)
            await _refuses_new_visitors(tunnel.port, side)
            total = len(chunk)
            while data := await visitor.read():
                offset = total % len(chunk)
                expected = chunk[offset : offset + len(data)]
                assert data.startswith(expected), f"wrong bytes behind {total}"
                assert data[len(expected) :] == chunk[: len(data) - len(expected)]
                total += len(data)
            assert total == BIG
            assert stopping.is_running or stopping.code == 0
        await stopping.ended(3)
        stopping.check()
        assert stopping.code == 0


async def _refuses_new_visitors(port: int, side: str) -> None:
    if side == "client":
        return  # the server's door stays open while its client is away

    async def is_refused() -> bool:
        try:
            (await connect(port)).close()
        except ConnectionRefusedError:
            return True
        return False

    async with within(5):
        while not await is_refused():
            await asyncio.sleep(0.01)


async def test_f19_what_does_not_finish_is_reset_in_time(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine, SHUTDOWN_TIMEOUT="500ms") as arena, within(30):
        tunnel = await arena.tunnel(arena.target(echo))
        async with await connect(tunnel.port) as visitor:
            await visitor.write(b"x")
            assert await visitor.read() == b"x"
            assert 0.4 < await tunnel.server.stop() < limit(4)
            assert await visitor.is_reset()


async def test_f19_client_that_drains_gets_no_new_visitors(tmp_path: Path) -> None:
    async with Arena(tmp_path, SHUTDOWN_TIMEOUT="20s") as arena, within(30):
        first, second = arena.target(echo), arena.target(echo)
        tunnel = await arena.tunnel(first, client="?name=first")
        async with await connect(tunnel.port) as visitor:
            await visitor.write(b"x")
            assert await visitor.read() == b"x"
            await arena.client(tunnel.tunnel_port, second.port, "?name=second")
            await tunnel.server.logged("client connected", count=2)
            tunnel.client.send(signal.SIGTERM)
            await tunnel.server.logged("client is stopping")
            for _ in range(10):
                assert await exchange(tunnel.port, b"hello") == b"hello"
            assert (first.accepted, second.accepted) == (1, 10)
            await visitor.write(b"y")
            assert await visitor.read() == b"y", "its open relay continues"


# --- kills ------------------------------------------------------------------------------


async def test_killed_client_returns_to_waiting_visitors(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine, DIAL_TIMEOUT="20s") as arena, within(40):
        target = arena.target(echo)
        tunnel = await arena.tunnel(target)
        tunnel.client.kill()
        await tunnel.server.logged("tunnel lost")
        waiting = [asyncio.create_task(exchange(tunnel.port, b"hello")) for _ in range(50)]
        client = arena.nodepass(*tunnel.client.urls)
        await client.start()
        back = time.monotonic()
        assert await asyncio.gather(*waiting) == [b"hello"] * 50
        assert time.monotonic() - back < limit(1), "served within a second of its return"


@pytest.mark.parametrize("side", ["server", "client"])
async def test_f20_killed_process_resets_its_relays(
    tmp_path: Path, engine: str, side: str
) -> None:
    """The kernel closes what a killed process held: no stream may look complete for that."""
    ends: list[str] = []

    async def half_a_body(stream: Stream) -> None:
        await stream.write(b"half")
        ends.append("reset" if await stream.is_reset() else "clean")

    async with Arena(tmp_path, engine) as arena, within(30):
        tunnel = await arena.tunnel(arena.target(half_a_body))
        async with await connect(tunnel.port) as visitor:
            assert await visitor.read_exactly(4) == b"half"
            killed: Nodepass = getattr(tunnel, side)
            killed.kill()
            async with within(3):
                assert await visitor.is_reset()
        await until(lambda: ends, 3, "the target to see an end")
        assert ends == ["reset"]


async def test_killed_server_is_found_again(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(40):
        tunnel = await arena.tunnel(arena.target(echo))
        tunnel.server.kill()
        await tunnel.client.logged("tunnel lost")
        server = arena.nodepass(*tunnel.server.urls)
        await server.start()
        await tunnel.client.logged("tunnel up", count=2, seconds=5)
        assert await exchange(tunnel.port, b"hello") == b"hello"


async def test_tunnel_cut_again_and_again_always_returns(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(40):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        proxy = arena.proxy(tunnel_port)
        server = await arena.server(port, tunnel_port, DIAL_TIMEOUT="10s")
        client = await arena.client(proxy.port, target.port)
        for number in range(2, 8):
            for channel in proxy.open_channels:
                channel.cut(reset=bool(number % 2))
            await server.logged("tunnel lost", count=number - 1)
            visitor = asyncio.create_task(exchange(port, b"hello"))
            await client.logged("tunnel up", count=number)
            assert await visitor == b"hello"
