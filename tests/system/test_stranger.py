"""Who is not a peer gets nothing: strangers on both ports, and peers of other versions."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.kit.arena import Arena
from tests.kit.peer import GREETING, NativeClient, SeedClient
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import body_of, echo, hold, speak_first
from tests.kit.timing import free_port, until, within

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

USER_BYTES = b"only for the real client"

GARBAGE = {
    "zeros": bytes(2000),
    "random": body_of(6, 5000),
    "no end of line": b"hello://" + b"x" * 2000,
    "empty line": b"\n",
    "half a hello": b"hello://name?v=2\n",
    "old version": b"hello://name?v=1&n=" + b"0" * 32 + b"\n",
    "wrong session": b"link://" + b"0" * 16 + b"?i=1&p=" + b"0" * 64 + b"\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


# --- F1, F2, F4: strangers --------------------------------------------------------------


async def test_garbage_on_the_tunnel_port_gets_nothing(tmp_path: Path, tls: str) -> None:
    """Nothing but a refusal, or the alert that says why TLS has failed."""
    async with Arena(tmp_path, HANDSHAKE_TIMEOUT="1s") as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo), server=tls)
        for name, garbage in GARBAGE.items():
            async with await connect(tunnel.tunnel_port) as stranger:
                assert GREETING.fullmatch(await stranger.read_line())
                await stranger.write(garbage)
                heard = await _until_end(stranger)
                wanted = b"\x15\x03" if tls else b"refuse://"
                assert heard == b"" or heard.startswith(wanted), (name, heard)
            assert await exchange(tunnel.port, USER_BYTES) == USER_BYTES, name


async def _until_end(stream: Stream) -> bytes:
    heard = b""
    try:
        while data := await stream.read():
            heard += data
    except ConnectionResetError:
        pass
    return heard


async def _try(stack: AsyncExitStack, port: int, source: str = "") -> Stream | None:
    """Connect as a stranger; None when it is shown the door before the handshake is through."""
    try:
        return await stack.enter_async_context(await connect(port, source=source))
    except ConnectionResetError:
        return None


async def test_f01_silent_stranger_is_dropped_by_the_deadline(tmp_path: Path) -> None:
    async with Arena(tmp_path, HANDSHAKE_TIMEOUT="500ms") as arena, within(20):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        await arena.server(port, tunnel_port)
        async with await connect(tunnel_port) as stranger:  # first on the port, before any client
            assert GREETING.fullmatch(await stranger.read_line())
            await arena.client(tunnel_port, target.port)
            assert await exchange(port, USER_BYTES) == USER_BYTES
            async with within(3):
                assert await _until_end(stranger) == b""


async def test_f02_wrong_link_proof_gets_no_visitor(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo))
        async with NativeClient(tunnel.tunnel_port, "other") as other:
            good = await other.link(1)
            forged = [await other.link(number, proof=os.urandom(32).hex()) for number in (2, 3)]
            for link in forged:
                async with within(3):
                    assert await _until_end(link) == b""
            await tunnel.client.stop()
            visitor = asyncio.create_task(exchange(tunnel.port, USER_BYTES))
            launch = await other.signal()
            while not launch.startswith("tcp://"):
                launch = await other.signal()
            assert launch.startswith("tcp://1?from=127.0.0.1:")
            assert await good.read_exactly(len(USER_BYTES)) == USER_BYTES
            await good.write(USER_BYTES)
            good.finish()
            assert await visitor == USER_BYTES


async def test_f02_stranger_on_the_data_port_gets_zero_bytes(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        port, tunnel_port, data_port = free_port(), free_port(), free_port()
        await arena.server(port, tunnel_port, f"?data={data_port}")
        async with SeedClient(tunnel_port) as client, AsyncExitStack() as stack:
            assert client.data_port == data_port
            await client.dial()
            strangers = [await _try(stack, data_port, source=f"127.0.0.{n}") for n in (2, 3, 4)]
            visitor = asyncio.create_task(exchange(port, USER_BYTES))
            link = await client.launched()
            assert await link.read_exactly(len(USER_BYTES)) == USER_BYTES
            await link.write(USER_BYTES)
            link.finish()
            assert await visitor == USER_BYTES
            for stranger in filter(None, strangers):
                async with within(3):
                    assert await _until_end(stranger) == b""


async def test_f02_stranger_on_the_data_port_beside_a_native_client(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        data_port = free_port()
        tunnel = await arena.tunnel(arena.target(speak_first), server=f"?data={data_port}")
        async with AsyncExitStack() as stack:
            strangers = [await _try(stack, data_port) for _ in range(8)]
            for _ in range(8):
                assert (await exchange(tunnel.port, USER_BYTES)).endswith(USER_BYTES)
            for stranger in filter(None, strangers):
                async with within(3):
                    assert await _until_end(stranger) == b""


async def test_f04_silent_crowd_leaves_service_unharmed(tmp_path: Path) -> None:
    """300 connections that say nothing, from many addresses: limits hold, links refill."""
    async with Arena(tmp_path) as arena, AsyncExitStack() as stack, within(30):
        tunnel = await arena.tunnel(arena.target(echo))
        for number in range(300):
            await _try(stack, tunnel.tunnel_port, source=f"127.0.1.{number % 30 + 1}")
        for _ in range(30):
            assert await exchange(tunnel.port, USER_BYTES) == USER_BYTES


async def test_f04_one_address_cannot_lock_others_out(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, AsyncExitStack() as stack, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        await arena.server(port, tunnel_port)
        for _ in range(300):
            await _try(stack, tunnel_port, source="127.0.1.1")
        await arena.client(tunnel_port, target.port)
        assert await exchange(port, USER_BYTES) == USER_BYTES


async def test_nodepass_without_seed_peers_has_no_data_port(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo), server="?compat=0")
        async with await connect(tunnel.tunnel_port) as stranger:
            assert (await stranger.read_line()).startswith(b"//0?v=2&")
        assert await exchange(tunnel.port, USER_BYTES) == USER_BYTES


# --- F26: other versions, other programs ------------------------------------------------


def _says(line: bytes) -> Callable[[Stream], Awaitable[None]]:
    async def handler(stream: Stream) -> None:
        await stream.write(line)
        await stream.read()

    return handler


SERVERS = {
    "HTTP": (_says(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"), "HTTP"),
    "SSH": (speak_first, "SSH"),
    "TLS": (_says(b"\x15\x03\x01\x00\x02\x02\x28"), "TLS"),
    "NodePass 1.1": (_says(b"//#0\n"), r"1\.1"),
    "NodePass 1.2": (_says(b"//-#0\n"), r"1\.2"),
    "NodePass 1.6": (_says(b"np://1024/-#0\n"), r"1\.6"),
    "waits for us": (hold, r"1\.4|1\.13|1\.14"),
}


@pytest.mark.parametrize(("handler", "name"), SERVERS.values(), ids=SERVERS.keys())
async def test_f26_client_names_what_answers(
    tmp_path: Path, handler: Callable[[Stream], Awaitable[None]], name: str
) -> None:
    async with Arena(tmp_path, HANDSHAKE_TIMEOUT="500ms") as arena, within(20):
        other = arena.target(handler)
        client = arena.nodepass(f"client://127.0.0.1:{other.port}/127.0.0.1:{free_port()}")
        client.spawn()
        await client.logged(f"(WARN|ERROR).*{name}")
        await until(lambda: other.accepted >= 2, 5, "it to be tried again")
        assert client.is_running


BEARER = (
    b"GET / HTTP/1.1\r\nHost: none\r\nUser-Agent: Go-http-client/1.1\r\n"
    b"Authorization: Bearer " + b"0" * 64 + b"\r\nAccept-Encoding: gzip\r\n\r\n"
)
"""How NodePass 1.13 and 1.14 open a tunnel."""

CLIENTS = {
    "NodePass 1.14": (BEARER, r"1\.13"),
    "browser": (GARBAGE["HTTP"], "HTTP"),
    "TLS": (GARBAGE["TLS"], "TLS"),
    "ssh": (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
}


@pytest.mark.parametrize(("opening", "name"), CLIENTS.values(), ids=CLIENTS.keys())
async def test_f26_server_names_what_calls(tmp_path: Path, opening: bytes, name: str) -> None:
    async with Arena(tmp_path, HANDSHAKE_TIMEOUT="500ms") as arena, within(20):
        server = await arena.server(free_port(), tunnel_port := free_port())
        async with await connect(tunnel_port) as stranger:
            await stranger.write(opening)
            await server.logged(f"(WARN|ERROR).*{name}")
            assert (await _until_end(stranger)).count(b"\n") <= 2, "greeting, refusal"
