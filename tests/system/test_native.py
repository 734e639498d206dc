"""The native dialect against hand-driven peers: what a well-behaved pair never shows."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from tests.kit.arena import Arena
from tests.kit.peer import NativeClient, NativeServer
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import body_of, echo
from tests.kit.timing import free_port, within

BODY = body_of(8, 1_000_000)


def _client(arena: Arena, server: NativeServer, target_port: int) -> str:
    del arena
    return f"client://127.0.0.1:{server.listener.port}/127.0.0.1:{target_port}?name=unit%2D7"


async def _links(server: NativeServer, count: int) -> dict[int, Stream]:
    return dict([await server.link() for _ in range(count)])


async def test_client_opens_as_many_links_as_the_server_wants(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, NativeServer() as server, within(20):
        client = arena.nodepass(_client(arena, server, arena.target(echo).port))
        client.spawn()
        assert await server.welcome(idle=3) in ("unit-7", "unit%2D7")
        links = await _links(server, 3)
        assert len(links) == 3, "numbers differ"
        await client.logged("tunnel up .*dialect=native")
        await server.say("idle://6")
        links |= await _links(server, 3)
        for number, link in links.items():
            await server.say(f"tcp://{number}?from=192.0.2.1:4711")
            await link.write(BODY[:1000])
            assert await link.read_exactly(1000) == BODY[:1000]


async def test_f06_launch_of_an_unknown_link_is_answered(tmp_path: Path) -> None:
    env = {"HANDSHAKE_TIMEOUT": "500ms"}
    async with Arena(tmp_path, **env) as arena, NativeServer() as server, within(20):
        client = arena.nodepass(_client(arena, server, arena.target(echo).port))
        client.spawn()
        await server.welcome(idle=1)
        ((number, link),) = (await _links(server, 1)).items()
        await server.say("tcp://4242?from=192.0.2.1:4711")
        assert await server.signal() == "fail://4242?why=unknown"
        await server.say(f"tcp://{number}?from=192.0.2.1:4711")
        await link.write(b"hello")
        assert await link.read() == b"hello"


async def test_f24_refused_target_is_answered_at_once(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, NativeServer() as server, within(20):
        client = arena.nodepass(_client(arena, server, free_port()))
        client.spawn()
        await server.welcome(idle=1)
        ((number, link),) = (await _links(server, 1)).items()
        await server.say(f"tcp://{number}?from=192.0.2.1:4711")
        assert await server.signal() == f"fail://{number}?why=refused"
        async with within(3):
            assert await link.is_reset()


async def test_client_answers_pings_and_ignores_what_it_does_not_know(tmp_path: Path) -> None:
    env = {"REPORT_INTERVAL": "60s"}
    async with Arena(tmp_path, **env) as arena, NativeServer() as server, within(20):
        client = arena.nodepass(_client(arena, server, free_port()))
        client.spawn()
        await server.welcome(idle=1)
        await server.say("future://thing?x=1")
        await server.say("")
        await server.say("ping://77")
        while (line := await server.control.read_line()).startswith(b"ping://"):
            continue
        assert line == b"pong://77\n"


async def test_client_ends_its_session_politely(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, NativeServer() as server, within(20):
        client = arena.nodepass(_client(arena, server, free_port()))
        client.spawn()
        await server.welcome(idle=1)
        await client.logged("tunnel up")
        await client.stop()
        said = []
        while line := await server.signal():
            said.append(line)
        assert said[0] == "drain://"
        assert re.fullmatch(r"bye://[a-z-]+", said[-1])


async def test_client_returns_after_a_refusal(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, NativeServer() as server, within(20):
        client = arena.nodepass(_client(arena, server, free_port()))
        client.spawn()
        control, _, hello = await server.accept()
        assert hello.startswith("hello://")
        await control.write(b"refuse://limit\n")
        control.close()
        await client.logged("(WARN|ERROR).*limit")
        await server.welcome(idle=1)
        await client.logged("tunnel up")


async def test_server_waits_for_links_and_reports_failures(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port())
        async with NativeClient(tunnel_port) as client:
            assert client.idle == 4, "MIN_POOL_CAPACITY"
            visitor = await connect(port)
            async with visitor:
                link = await client.link(5)
                launch = await client.signal()
                assert re.fullmatch(r"tcp://5\?from=127\.0\.0\.1:\d+", launch), launch
                await client.say("fail://5?why=refused")
                link.reset()
                async with within(3):
                    assert await visitor.is_reset()


async def test_server_gives_up_on_links_that_end_unused(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port())
        async with NativeClient(tunnel_port) as client:
            for number in range(5):
                (await client.link(number)).close()
            good = await client.link(5)
            visitor = asyncio.create_task(exchange(port, b"hello"))
            while not (launch := await client.signal()).startswith("tcp://5?"):
                assert launch, "control ended"
            assert await good.read_all() == b"hello"
            await good.write(b"served")
            good.close()
            assert await visitor == b"served"


async def test_server_says_bye_and_keeps_the_launched_link(tmp_path: Path) -> None:
    async with Arena(tmp_path, SHUTDOWN_TIMEOUT="20s") as arena, within(30):
        server = await arena.server(port := free_port(), tunnel_port := free_port())
        async with NativeClient(tunnel_port) as client:
            link = await client.link(1)
            async with await connect(port) as visitor:
                await visitor.write(b"x")
                assert (await client.signal()).startswith("tcp://1?")
                assert await link.read() == b"x"
                stopping = asyncio.create_task(server.stop(seconds=20))
                assert await client.signal() == "drain://"
                await link.write(BODY)
                link.finish()
                assert await visitor.read_all() == BODY
            await stopping
