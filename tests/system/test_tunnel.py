"""The plain life of a tunnel: it starts, carries bytes both ways, and stops."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.kit.arena import Arena
from tests.kit.stream import connect, exchange
from tests.kit.target import (
    BANNER,
    answer_after_eof,
    body_of,
    digest_of,
    echo,
    serve_body,
    speak_first,
)
from tests.kit.timing import free_port, has_ipv6, until, within

if TYPE_CHECKING:
    from tests.kit.process import Nodepass

BODY = body_of(2, 20_000_000)


async def test_bytes_come_back(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo), client="?name=alpha")
        assert await exchange(tunnel.port, BODY[:1_000_000]) == BODY[:1_000_000]
        await tunnel.client.logged(r"tunnel up .*dialect=native")
        await tunnel.server.logged(r"client connected .*client=alpha.*dialect=native")


async def test_download_arrives_whole(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(serve_body(BODY)))
        async with await connect(tunnel.port) as visitor:
            assert await visitor.digest() == (len(BODY), digest_of(BODY))


async def test_upload_arrives_whole(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(answer_after_eof))
        answer = await exchange(tunnel.port, BODY)
        assert answer.decode() == f"{len(BODY)} {digest_of(BODY)}\n"


async def test_target_speaks_first(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(speak_first))
        async with await connect(tunnel.port) as visitor:
            assert await visitor.read_exactly(len(BANNER)) == BANNER
            await visitor.write(b"hello")
            assert await visitor.read_exactly(5) == b"hello"


async def test_ipv6_from_end_to_end(tmp_path: Path) -> None:
    if not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    async with Arena(tmp_path) as arena, within(20):
        target = arena.target(echo, host="::1")
        tunnel_port, port = free_port("::1"), free_port("::1")
        server = arena.nodepass(f"server://[::1]:{tunnel_port}/[::1]:{port}")
        client = arena.nodepass(f"client://[::1]:{tunnel_port}/[::1]:{target.port}")
        await server.start()
        await client.start()
        assert f"tunnel=[::1]:{tunnel_port}" in server.log
        assert await exchange(port, BODY[:100_000], "::1") == BODY[:100_000]


async def test_empty_host_listens_on_every_address(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        target = arena.target(echo)
        tunnel_port, port = free_port(), free_port()
        server = arena.nodepass(f"server://:{tunnel_port}/:{port}")
        client = arena.nodepass(f"client://localhost:{tunnel_port}/localhost:{target.port}")
        await server.start()
        await client.start()
        for host in ["127.0.0.1", "127.0.0.2", *(["::1"] if has_ipv6() else [])]:
            assert await exchange(port, b"hello", host) == b"hello"


async def test_several_urls_in_one_process(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        far = [arena.target(serve_body(name)) for name in (b"first", b"second")]
        near = [free_port(), free_port()]
        tunnels = [free_port(), free_port()]
        servers = arena.nodepass(
            *(
                f"server://127.0.0.1:{tunnel}/127.0.0.1:{port}"
                for tunnel, port in zip(tunnels, near, strict=True)
            )
        )
        await servers.start()
        clients = arena.nodepass(
            *(
                f"client://127.0.0.1:{tunnel}/127.0.0.1:{target.port}"
                for tunnel, target in zip(tunnels, far, strict=True)
            )
        )
        await clients.start()
        assert [await exchange(port, b"") for port in near] == [b"first", b"second"]


async def test_server_and_client_in_one_process(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        target = arena.target(echo)
        tunnel, port = free_port(), free_port()
        both = arena.nodepass(
            f"client://127.0.0.1:{tunnel}/127.0.0.1:{target.port}",
            f"server://127.0.0.1:{tunnel}/127.0.0.1:{port}",
        )
        await both.start()
        assert await exchange(port, BODY[:500_000]) == BODY[:500_000]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_with_exit_code_0(tmp_path: Path, number: signal.Signals) -> None:
    async with Arena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo))
        for process in (tunnel.client, tunnel.server):
            assert await process.stop(number) < 2, "nothing was open, nothing to wait for"
            assert process.count("INFO  stopped") == 1


async def test_signal_while_still_looking_for_the_server(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        client = arena.nodepass(f"client://127.0.0.1:{free_port()}/127.0.0.1:{free_port()}")
        client.spawn()
        await until(lambda: "cannot reach" in client.log, 10, f"a failed dial\n{client.log}")
        assert await client.stop() < 2


@pytest.mark.parametrize("side", ["server", "client"])
async def test_second_signal_ends_at_once(tmp_path: Path, side: str) -> None:
    async with Arena(tmp_path, SHUTDOWN_TIMEOUT="60s") as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo))
        process: Nodepass = getattr(tunnel, side)
        async with await connect(tunnel.port) as visitor:
            await visitor.write(b"x")
            assert await visitor.read() == b"x"
            process.send(signal.SIGTERM)
            await process.logged("waiting for open relays")
            await visitor.write(b"y")
            assert await visitor.read() == b"y", "an open relay holds it for a minute"
            process.send(signal.SIGTERM)
            assert await process.ended(5) == 1
            process.check()
            assert await visitor.is_reset()


async def test_hangup_is_no_reason_to_end(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo))
        for process in (tunnel.server, tunnel.client):
            process.send(signal.SIGHUP)
        assert await exchange(tunnel.port, b"hello") == b"hello"


@pytest.mark.parametrize("taken", ["tunnel", "target"])
async def test_address_in_use_is_one_line_and_exit_code_1(tmp_path: Path, taken: str) -> None:
    async with Arena(tmp_path) as arena, within(20):
        other = arena.target(echo)
        free = free_port()
        ports = (other.port, free) if taken == "tunnel" else (free, other.port)
        server = arena.nodepass("server://127.0.0.1:{}/127.0.0.1:{}".format(*ports))
        server.spawn()
        assert await server.ended() == 1
        assert server.log.count("\n") == 1, server.log
        assert f"127.0.0.1:{other.port}" in server.log
        assert "in use" in server.log


async def test_two_clients_share_the_visitors(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        first, second = arena.target(echo), arena.target(echo)
        tunnel = await arena.tunnel(first, client="?name=first")
        await arena.client(tunnel.tunnel_port, second.port, "?name=second")
        await tunnel.server.logged("client connected", count=2)
        visitors = [await connect(tunnel.port) for _ in range(8)]
        try:
            for visitor in visitors:
                await visitor.write(b"x")
                assert await visitor.read() == b"x"
            assert (first.active, second.active) == (4, 4), "fewest open relays first"
        finally:
            for visitor in visitors:
                visitor.close()


async def test_one_of_two_clients_leaves(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        first, second = arena.target(echo), arena.target(echo)
        tunnel = await arena.tunnel(first, client="?name=first")
        await arena.client(tunnel.tunnel_port, second.port, "?name=second")
        await tunnel.server.logged("client connected", count=2)
        tunnel.client.kill()
        for _ in range(20):
            assert await exchange(tunnel.port, b"hello") == b"hello"
        assert second.accepted >= 19, "at most one visitor met a link that was just dying"


async def test_many_short_visitors_one_after_another(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(30):
        target = arena.target(echo)
        tunnel = await arena.tunnel(target)
        for number in range(300):
            message = f"visitor {number}".encode()
            assert await exchange(tunnel.port, message) == message
        assert target.accepted == 300


async def test_links_are_cut_into_small_pieces(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(30):
        target, server_port, port = arena.target(echo), free_port(), free_port()
        proxy = arena.proxy(server_port, piece=3)
        server = arena.nodepass(f"server://127.0.0.1:{server_port}/127.0.0.1:{port}")
        await server.start()
        await arena.client(proxy.port, target.port)
        message = BODY[:6000]
        assert await exchange(port, message) == message


async def test_visitor_waits_for_the_first_client(tmp_path: Path) -> None:
    async with Arena(tmp_path, DIAL_TIMEOUT="20s") as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        await arena.server(port, tunnel_port)
        early = asyncio.create_task(exchange(port, b"early"))
        await arena.client(tunnel_port, target.port)
        async with within(2):
            assert await early == b"early"
