"""Whoever dies without a word: a killed process never looks like a clean end to anybody.

For each kind of connection that a process may hold, and with many of them under load.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.kit.arena import Arena
from tests.kit.peer import NativeClient, NativeServer, SeedClient, SeedServer
from tests.kit.process import Nodepass
from tests.kit.stream import Stream, connect
from tests.kit.target import hold, serve_body
from tests.kit.timing import free_port, settled, until, within

KILLS: Final = 5
"""Of one side under load."""
CROWD: Final = 24
"""Visitors at once."""
BODY: Final = bytes(20_000)
"""What each is to get."""
SYN_SENT: Final = "02"
"""State in /proc/net/tcp: include/net/tcp_states.h."""


@contextlib.contextmanager
def full_port() -> Iterator[int]:
    """Open a port whose callers get no answer: its queue is full."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", free_port()))
        full.listen(0)
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())
        yield full.getsockname()[1]


def callers(port: int) -> int:
    """Count the connections to a port of this machine that have no answer yet."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == SYN_SENT for row in rows)


async def kill_and_look(process: Nodepass, *streams: Stream) -> None:
    """Kill a process; each of these must hear a reset of it."""
    process.kill()
    async with within(5):
        assert [await stream.is_reset() for stream in streams] == [True] * len(streams)


# --- the server dies ----------------------------------------------------------------------------


async def test_c21_visitors_that_wait_for_a_link(tmp_path: Path, engine: str, tls: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        server = await arena.server(port := free_port(), free_port(), tls)
        async with await connect(port) as eager, await connect(port) as quiet:
            await eager.write(b"hello")
            await until(lambda: server.fds("socket:") >= 4, 5, "both to be accepted")
            await kill_and_look(server, eager, quiet)


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGKILL])
async def test_c21_links_of_a_native_client(
    tmp_path: Path, engine: str, number: signal.Signals
) -> None:
    """Idle ones, and one that carries datagrams or will; the control connection, too."""
    async with Arena(tmp_path, engine) as arena, within(20):
        server = await arena.server(port := free_port(), tunnel_port := free_port())
        async with NativeClient(tunnel_port) as client, await connect(tunnel_port) as caller:
            await caller.read_line()
            links = [await client.link(1), await client.link(2)]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as visitor:
                visitor.sendto(b"hello", ("127.0.0.1", port))
                # The newest that has come by then: the second may still be on its way.
                said = re.match(r"udp://([12])\?", text := await client.signal())
                assert said, text
                assert await links[int(said[1]) - 1].read_exactly(7) == b"\0\5hello"
                server.send(number)
                await kill_and_look(server, *links, client.control, caller)


async def test_c21_links_of_a_seed_client(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        server = await arena.server(free_port(), tunnel_port := free_port())
        async with SeedClient(tunnel_port) as client:
            for _ in range(2):
                await client.dial()
            assert await client.control.read_line() == b"\n"
            await kill_and_look(server, *client.links.values(), client.control)


# --- the client dies ----------------------------------------------------------------------------


async def test_c21_link_that_lies_on_a_shelf(tmp_path: Path, engine: str, tls: str) -> None:
    """The server has given it a visitor; the launch is on its way."""
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(hold), server=tls)
        await settled(tunnel.server.fds, 5, "its idle links")
        before = tunnel.server.fds()
        tunnel.client.send(signal.SIGSTOP)
        async with await connect(tunnel.port) as eager, await connect(tunnel.port) as quiet:
            await eager.write(b"hello")
            await until(lambda: tunnel.server.fds() >= before + 2, 5, "both to be accepted")
            await kill_and_look(tunnel.client, eager, quiet)


async def test_c21_link_that_waits_for_the_dial_of_a_name(
    tmp_path: Path, engine: str, tls: str
) -> None:
    async with Arena(tmp_path, engine, DIAL_TIMEOUT="20s") as arena, within(20):
        with full_port() as target:
            server = await arena.server(port := free_port(), tunnel_port := free_port(), tls)
            client = arena.nodepass(f"client://127.0.0.1:{tunnel_port}/localhost:{target}")
            await client.start()
            await server.logged("client connected")
            before = callers(target)
            async with await connect(port) as visitor:
                await until(lambda: callers(target) > before, 5, "the dial")
                await kill_and_look(client, visitor)


async def test_c21_client_of_a_seed_server(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20), SeedServer() as server:
        client = arena.dialling(server.listener.port, free_port())
        await server.greet()
        for _ in range(2):
            await server.take()
        await client.logged("tunnel up")
        await kill_and_look(client, *server.links.values(), server.control)


async def test_c21_client_in_the_middle_of_a_handshake(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20), NativeServer() as server:
        client = arena.dialling(server.listener.port, free_port())
        stream = server.keep(await server.listener.accept())
        await stream.write(b"//0?v=2&n=" + b"0" * 32 + b"&a=0#1\n")
        assert (await stream.read_exactly(1)) == b"\x16"
        await kill_and_look(client, stream)


# --- under load ---------------------------------------------------------------------------------


async def visit(port: int, seen: Counter[str], is_over: asyncio.Event) -> None:
    """Fetch the body again and again, and count how that ends."""
    while not is_over.is_set():
        got = 0
        try:
            async with await connect(port) as stream, within(10):
                got, _ = await stream.digest()
        except ConnectionRefusedError:
            await asyncio.sleep(0.01)
        except ConnectionResetError:
            seen["reset"] += 1
        else:
            seen["whole" if got == len(BODY) else f"clean end after {got} bytes"] += 1


@pytest.mark.slow
@pytest.mark.deadline(60)
@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_c21_kills_under_load(tmp_path: Path, engine: str, side: str, host: str) -> None:
    seen: Counter[str] = Counter()
    is_over = asyncio.Event()
    target_port, tunnel_port, port = free_port(), free_port(), free_port()
    urls = {
        "server": f"server://127.0.0.1:{tunnel_port}/127.0.0.1:{port}?udp=0",
        "client": f"client://127.0.0.1:{tunnel_port}/{host}:{target_port}?udp=0",
    }
    async with Arena(tmp_path, engine, MIN_POOL_CAPACITY="16", SERVICE_COOLDOWN="50ms") as arena:
        arena.target(serve_body(BODY), port=target_port)
        processes = {name: arena.nodepass(url) for name, url in urls.items()}
        for process in processes.values():
            await process.start()
        async with asyncio.TaskGroup() as group:
            for _ in range(CROWD):
                group.create_task(visit(port, seen, is_over))
            try:
                for _ in range(KILLS):
                    served = seen["whole"] + 2 * CROWD
                    await until(lambda: seen["whole"] >= served, 10, "some visits")  # noqa: B023
                    await asyncio.sleep(random.uniform(0, 0.05))
                    processes[side].kill()
                    processes[side] = arena.nodepass(urls[side])
                    await processes[side].start()
            finally:
                is_over.set()
    assert seen["reset"], "nobody has noticed"
    assert set(seen) == {"whole", "reset"}, seen
