"""Who may come in by UDP, how many at once, and how it all ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from tests.kit.datagram import Address, Notes, UdpArena, UdpTarget, Visitor, listen_only
from tests.kit.stream import connect, exchange
from tests.kit.target import echo as tcp_echo
from tests.kit.timing import free_port, limit, until, within

if TYPE_CHECKING:
    from tests.kit.process import Nodepass

TWO: Final = {"SEMAPHORE_LIMIT": "2", "DIAL_TIMEOUT": "30s"}

FULL: Final = "WARN  as many visitors as SEMAPHORE_LIMIT allows; more wait  limit=2"

BUSY: Final = 0.1
"""Seconds between two datagrams of somebody who talks."""

WATCHED: Final = 2.5
"""Seconds that a visitor who has to wait is watched; by then a session is no longer young."""


@asynccontextmanager
async def talking(*visitors: Visitor) -> AsyncIterator[None]:
    """Keep sessions busy for the length of a block, each of its datagrams answered."""

    async def talk(visitor: Visitor) -> None:
        while True:
            assert await visitor.ask(b"talk", 10) == b"talk"
            await asyncio.sleep(BUSY)

    for visitor in visitors:
        assert await visitor.ask(b"talk") == b"talk"
    tasks = [asyncio.create_task(talk(visitor)) for visitor in visitors]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results), results


# --- SEMAPHORE_LIMIT --------------------------------------------------------------------


async def test_semaphore_third_visitor_waits_until_one_ends(tmp_path: Path) -> None:
    """Who talks keeps the place; who has fallen silent loses it when the idle time is over."""
    env = TWO | {"UDP_IDLE_TIMEOUT": "1s"}
    async with UdpArena(tmp_path, **env) as arena, within(30):
        target = arena.udp_target()
        tunnel = await arena.tunnel(target.port)
        first, second, third = (arena.visitor(tunnel.port) for _ in range(3))
        async with talking(first):
            async with talking(second):
                third.send(b"and me?")
                third.send(b"please")
                await tunnel.server.logged(FULL)
                await asyncio.sleep(WATCHED)
                assert not third.heard
                assert len(target.sources) == 2
            assert [await third.read(), await third.read()] == [b"and me?", b"please"]
        assert len(target.sources) == 3


async def test_semaphore_short_exchange_gives_way(tmp_path: Path) -> None:
    """What looks like a finished look-up need not wait for its idle time of two minutes."""
    async with UdpArena(tmp_path, **TWO) as arena, within(30):
        tunnel = await arena.tunnel(arena.udp_target().port)
        for visitor in [arena.visitor(tunnel.port) for _ in range(2)]:
            assert await visitor.ask(b"question") == b"question"
        start = time.monotonic()
        assert await arena.visitor(tunnel.port).ask(b"another", 10) == b"another"
        assert 0.5 < time.monotonic() - start < limit(5)


async def test_semaphore_many_lookups_in_two_places(tmp_path: Path) -> None:
    """Each waits a second for the two before, and none is forgotten."""
    async with UdpArena(tmp_path, **TWO) as arena, within(30):
        tunnel = await arena.tunnel(arena.udp_target().port)
        visitors = [arena.visitor(tunnel.port) for _ in range(4)]
        for number, visitor in enumerate(visitors):
            visitor.send(b"%d" % number)
        for number, visitor in enumerate(visitors):
            assert await visitor.read(15) == b"%d" % number


async def test_semaphore_tcp_and_udp_share_the_places(tmp_path: Path) -> None:
    env = TWO | {"UDP_IDLE_TIMEOUT": "1s"}
    async with UdpArena(tmp_path, **env) as arena, within(30):
        target = arena.target(tcp_echo, port=free_port())
        far = arena.udp_target(port=target.port)
        tunnel = await arena.tunnel(target)
        late = arena.visitor(tunnel.port)
        async with await connect(tunnel.port) as first, await connect(tunnel.port) as second:
            for stream in (first, second):
                await stream.write(b"x")
                assert await stream.read() == b"x"
            late.send(b"by UDP")
            await tunnel.server.logged(FULL)
            await asyncio.sleep(0.3)
            assert far.received == 0
            second.close()
            assert await late.read() == b"by UDP"
            async with talking(late):
                waiting = asyncio.create_task(exchange(tunnel.port, b"by TCP"))
                await asyncio.sleep(0.3)
                assert target.accepted == 2
                first.close()
                async with within(5):
                    assert await waiting == b"by TCP"


async def test_semaphore_who_waits_too_long_is_turned_away(tmp_path: Path) -> None:
    """After DIAL_TIMEOUT; it need not be asked again, its next datagram is a new try."""
    env = TWO | {"DIAL_TIMEOUT": "500ms", "UDP_IDLE_TIMEOUT": "1s", "REPORT_INTERVAL": "200ms"}
    async with UdpArena(tmp_path, **env) as arena, within(30):
        tunnel = await arena.tunnel((target := arena.udp_target(notes := Notes())).port)
        late = arena.visitor(tunnel.port)
        async with talking(*(arena.visitor(tunnel.port) for _ in range(2))):
            late.send(b"in vain")
            await tunnel.server.logged("their source had no link in time.*hint=.*SEMAPHORE_LIMIT")
            assert len(target.sources) == 2
        await late.insist(b"at last")
        assert b"in vain" not in notes.words


# --- tcp= and udp= ----------------------------------------------------------------------


async def test_server_without_udp_does_not_listen(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, within(20):
        target = arena.target(tcp_echo, port=free_port())
        far = arena.udp_target(port=target.port)
        tunnel = await arena.tunnel(target, server="?udp=0")
        visitor = arena.visitor(tunnel.port)
        visitor.send(b"anybody?")
        await until(lambda: visitor.refused, 5, "an ICMP message: the port is closed")
        assert await exchange(tunnel.port, b"hello") == b"hello"
        assert far.received == 0
        await tunnel.server.logged("carries=tcp ")


async def test_server_without_tcp_leaves_the_port_to_others(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(arena.udp_target().port, server="?tcp=0")
        with pytest.raises(ConnectionRefusedError):
            await connect(tunnel.port)
        await tunnel.server.logged("carries=udp ")
        assert await arena.visitor(tunnel.port).ask(b"hello") == b"hello"
        other = arena.target(tcp_echo, port=tunnel.port)
        assert await exchange(other.port, b"hello") == b"hello"
        assert await arena.visitor(tunnel.port).ask(b"still") == b"still"


@pytest.mark.parametrize("off", ["udp", "tcp"])
async def test_client_without_one_of_them_says_so(tmp_path: Path, off: str) -> None:
    """A UDP visitor hears nothing, a TCP visitor is reset; the other kind is served."""
    async with UdpArena(tmp_path) as arena, within(20):
        target = arena.target(tcp_echo, port=free_port())
        far = arena.udp_target(port=target.port)
        tunnel = await arena.tunnel(target, client=f"?{off}=0")
        visitor = arena.visitor(tunnel.port)
        if off == "udp":
            for _ in range(10):
                visitor.send(b"anybody?")
                await asyncio.sleep(0.02)
            assert await exchange(tunnel.port, b"hello") == b"hello"
        else:
            async with await connect(tunnel.port) as stream:
                assert await stream.is_reset()
            assert await visitor.ask(b"hello") == b"hello"
        why = f'a visitor cannot be served.*why="{off}=0 is set here, but not on the server"'
        await tunnel.client.logged(why)
        assert tunnel.client.count("a visitor cannot be served") == 1
        assert (far.received, target.accepted) == ((0, 1) if off == "udp" else (1, 0))
        assert not visitor.heard


@pytest.mark.parametrize("query", ["", "?tcp=0"])
async def test_udp_address_in_use_is_one_line_and_exit_code_1(tmp_path: Path, query: str) -> None:
    """It names udp, and the way to go without."""
    async with UdpArena(tmp_path) as arena, within(20):
        taken = arena.udp_target(listen_only)
        url = f"server://127.0.0.1:{free_port()}/127.0.0.1:{taken.port}"
        server = arena.nodepass(url + query)
        server.spawn()
        assert await server.ended() == 1
        assert server.log.count("\n") == 1, server.log
        for part in (f"udp 127.0.0.1:{taken.port}", "in use", "udp=0"):
            assert part in server.log
        with socket.socket() as probe:  # its TCP listener has not been left behind
            probe.bind(("127.0.0.1", taken.port))
        await arena.nodepass(f"{url}?udp=0").start()


async def test_neither_of_them_is_an_error(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, within(20):
        server = arena.nodepass("server://127.0.0.1:1/127.0.0.1:2?tcp=0&udp=0")
        server.spawn()
        assert await server.ended() == 2
        assert server.log.count("\n") == 1, server.log


# --- F19: the end -----------------------------------------------------------------------


@pytest.mark.parametrize("side", ["server", "client"])
async def test_f19_answer_under_way_survives_sigterm(tmp_path: Path, side: str) -> None:
    """It may take most of a second; then the session counts as over, and nobody waits on."""
    questions: list[Address] = []

    def remember(target: UdpTarget, data: bytes, address: Address) -> None:
        questions.append(address)

    async with UdpArena(tmp_path, SHUTDOWN_TIMEOUT="10s") as arena, within(30):
        target = arena.udp_target(remember)
        tunnel = await arena.tunnel(target.port)
        process: Nodepass = getattr(tunnel, side)
        visitor = arena.visitor(tunnel.port)
        visitor.send(b"question")
        await until(lambda: questions, 5, "the question at the target")
        start = time.monotonic()
        process.send(signal.SIGTERM)
        await process.logged("waiting for open relays  relays=1")
        target.send(b"answer", questions[0])
        assert await visitor.read() == b"answer"
        assert await process.ended() == 0
        process.check()
        assert time.monotonic() - start < limit(5), "well below SHUTDOWN_TIMEOUT"
        assert "relays_cut" not in process.log


@pytest.mark.parametrize("side", ["server", "client"])
async def test_f19_idle_sessions_hold_up_no_stop(tmp_path: Path, side: str) -> None:
    async with UdpArena(tmp_path, SHUTDOWN_TIMEOUT="10s") as arena, within(30):
        tunnel = await arena.tunnel(arena.udp_target().port)
        for _ in range(30):
            assert await arena.visitor(tunnel.port).ask(b"hello") == b"hello"
        process: Nodepass = getattr(tunnel, side)
        assert await process.stop() < limit(5)
        assert "relays_cut" not in process.log


async def test_f19_server_that_drains_lets_no_new_source_in(tmp_path: Path) -> None:
    """Who talks may go on until SHUTDOWN_TIMEOUT; a stop is clean also if he never ends."""
    async with UdpArena(tmp_path, SHUTDOWN_TIMEOUT="2s") as arena, within(30):
        tunnel = await arena.tunnel((target := arena.udp_target()).port)
        old, new = arena.visitor(tunnel.port), arena.visitor(tunnel.port)
        assert await old.ask(b"hello") == b"hello"
        start = time.monotonic()
        tunnel.server.send(signal.SIGTERM)
        await tunnel.server.logged("waiting for open relays")
        while tunnel.server.is_running:
            old.send(b"on and on")
            new.send(b"let me in")
            await asyncio.sleep(0.05)
        assert 1.5 < time.monotonic() - start < limit(6)
        tunnel.server.check()
        assert tunnel.server.code == 0
        assert len(old.heard) > 5
        assert not new.heard
        assert len(target.sources) == 1
        assert "relays_cut=1" in tunnel.server.log


@pytest.mark.parametrize("side", ["server", "client"])
async def test_second_signal_ends_at_once(tmp_path: Path, side: str) -> None:
    async with UdpArena(tmp_path, SHUTDOWN_TIMEOUT="60s") as arena, within(20):
        tunnel = await arena.tunnel(arena.udp_target().port)
        process: Nodepass = getattr(tunnel, side)
        async with talking(arena.visitor(tunnel.port)):
            process.send(signal.SIGTERM)
            await process.logged("waiting for open relays")
        process.send(signal.SIGTERM)
        assert await process.ended(5) == 1
        process.check()


async def test_restart_on_the_same_ports(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, within(30):
        tunnel = await arena.tunnel(arena.udp_target().port)
        visitor = arena.visitor(tunnel.port)
        assert await visitor.ask(b"before") == b"before"
        await tunnel.server.stop()
        again = arena.nodepass(*tunnel.server.urls)
        await again.start()
        await visitor.insist(b"after")
