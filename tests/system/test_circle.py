"""C10: a target that leads back to the visitors of its own tunnel."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from tests.kit.datagram import UdpArena
from tests.kit.process import Nodepass
from tests.kit.stream import connect
from tests.kit.target import echo
from tests.kit.timing import free_port, until, within

PLACES: Final = 96
"""SEMAPHORE_LIMIT."""
LIMIT: Final = {"SEMAPHORE_LIMIT": str(PLACES), "SHUTDOWN_TIMEOUT": "500ms"}
SAID: Final = "WARN  a visitor cannot be served.*leads back to the visitors of this tunnel"


async def _visit(port: int) -> None:
    async with await connect(port) as visitor:
        assert await visitor.is_reset()


async def _goes_on(server: Nodepass, port: int) -> None:
    """The visitor hears of it, at once; the next one, too; no place stays taken."""
    for _ in range(3):
        await _visit(port)
    assert "as many visitors as SEMAPHORE_LIMIT allows" not in server.log
    assert server.is_running


async def test_c10_tcp_circle_is_noticed(tmp_path: Path, engine: str, tls: str) -> None:
    async with UdpArena(tmp_path, engine, **LIMIT) as arena, within(30):
        server = await arena.server(port := free_port(), tunnel_port := free_port(), tls)
        client = await arena.client(tunnel_port, port)
        await _goes_on(server, port)
        await client.logged(SAID)
        await server.logged("the client could not reach its target.*why=circle")


async def test_c10_target_given_by_name(tmp_path: Path) -> None:
    async with UdpArena(tmp_path, **LIMIT) as arena, within(30):
        server = await arena.server(port := free_port(), tunnel_port := free_port())
        client = arena.nodepass(f"client://127.0.0.1:{tunnel_port}/localhost:{port}")
        await client.start()
        await _goes_on(server, port)
        await client.logged(SAID)


async def test_c10_udp_circle_is_noticed(tmp_path: Path, engine: str) -> None:
    async with UdpArena(tmp_path, engine, UDP_IDLE_TIMEOUT="1s", **LIMIT) as arena, within(30):
        server = await arena.server(port := free_port(), tunnel_port := free_port())
        client = await arena.client(tunnel_port, port)
        arena.visitor(port).send(b"round and round")
        await client.logged(SAID)
        before = client.fds("socket:")
        await asyncio.sleep(0.5)
        assert client.fds("socket:") <= before, "the circle goes on"
        assert server.is_running


async def test_c10_circle_through_two_tunnels_of_a_process(tmp_path: Path) -> None:
    """One process with both servers, one with both clients, each leading into the other."""
    async with UdpArena(tmp_path, **LIMIT) as arena, within(30):
        one, two, tunnel_one, tunnel_two = (free_port() for _ in range(4))
        server = arena.nodepass(
            f"server://127.0.0.1:{tunnel_one}/127.0.0.1:{one}",
            f"server://127.0.0.1:{tunnel_two}/127.0.0.1:{two}",
        )
        await server.start()
        client = arena.nodepass(
            f"client://127.0.0.1:{tunnel_one}/127.0.0.1:{two}",
            f"client://127.0.0.1:{tunnel_two}/127.0.0.1:{one}",
        )
        await client.start()
        await _goes_on(server, one)
        await client.logged(SAID)


async def test_c10_both_ends_in_one_command(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, within(20):
        port, tunnel_port = free_port(), free_port()
        both = arena.nodepass(
            f"server://127.0.0.1:{tunnel_port}/127.0.0.1:{port}",
            f"client://127.0.0.1:{tunnel_port}/127.0.0.1:{port}",
        )
        both.spawn()
        assert await both.ended() == 2
        assert "nodepass: error: target: " in both.log
        assert both.log.count("\n") == 1


async def test_c10_ports_that_coincide_are_no_circle(tmp_path: Path, engine: str) -> None:
    """The kernel gives one local port to connections with different far ends."""
    async with UdpArena(tmp_path, engine, SEMAPHORE_LIMIT="512") as arena, within(60):
        count = 400
        target = arena.target(echo)
        tunnel = await arena.tunnel(target)
        visitors = [await connect(tunnel.port) for _ in range(count)]
        for number, visitor in enumerate(visitors):
            await visitor.write(b"%d\n" % number)
            assert await visitor.read_line() == b"%d\n" % number
        await until(lambda: target.accepted == count, 5, "every visitor at the target")
        for visitor in visitors:
            visitor.close()
        assert "leads back" not in tunnel.client.log
