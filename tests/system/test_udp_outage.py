"""UDP through tunnels that break: datagrams get through again, and nobody else is harmed."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.kit.datagram import Notes, UdpArena, Visitor
from tests.kit.stream import connect, exchange
from tests.kit.target import echo as tcp_echo
from tests.kit.timing import free_port, limit, within

if TYPE_CHECKING:
    from tests.kit.process import Nodepass
    from tests.kit.proxy import Channel, Proxy

BACK: float = 8.0
"""Seconds within which a visitor must be served again once everything is back."""

NOBODY = "WARN  nobody listens at the target"


async def _link_of(proxy: Proxy, visitor: Visitor) -> Channel:
    """Find the connection that carries a visitor: the one that grows when it speaks."""
    before = [(channel, channel.down) for channel in proxy.open_channels[1:]]
    word = bytes(3000)  # more than any control line
    assert await visitor.ask(word) == word
    grown = [channel for channel, down in before if channel.down - down > len(word)]
    assert len(grown) == 1
    return grown[0]


# --- links ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "tls", "reset"),
    [("native", "", True), ("native", "?tls=1", False), ("python", "?tls=1", True)],
    ids=["native-plain-rst", "native-tls-fin", "python-tls-rst"],
)
async def test_f12_link_cut_in_the_middle_is_replaced(
    tmp_path: Path, engine: str, tls: str, reset: bool
) -> None:
    """The visitor just goes on; another one, and a TCP visitor, do not even notice."""
    async with UdpArena(tmp_path, engine) as arena, within(30):
        target = arena.target(tcp_echo, port=free_port())
        far = arena.udp_target(port=target.port)
        await arena.server(port := free_port(), tunnel_port := free_port(), tls)
        proxy = arena.proxy(tunnel_port)
        client = await arena.client(proxy.port, target.port)
        hurt, well = arena.visitor(port), arena.visitor(port)
        async with await connect(port) as stream:
            for visitor in (hurt, well):
                await visitor.ask(b"hello")
            await stream.write(b"hello")
            assert await stream.read() == b"hello"
            (await _link_of(proxy, hurt)).cut(reset=reset)
            assert await hurt.insist(b"again") < limit(BACK)
            assert await well.ask(b"unharmed") == b"unharmed"
            await stream.write(b"unharmed")
            assert await stream.read() == b"unharmed"
        assert len(far.sources) == 3, "the one that was cut has a new session"
        assert "tunnel lost" not in client.log


async def test_f12_everything_cut_at_once_comes_back(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, within(30):
        far = arena.udp_target()
        await arena.server(port := free_port(), tunnel_port := free_port())
        proxy = arena.proxy(tunnel_port)
        await arena.client(proxy.port, far.port)
        visitors = [arena.visitor(port) for _ in range(20)]
        for number in range(2):
            for visitor in visitors:
                await visitor.insist(b"round %d" % number)
            for channel in proxy.open_channels:
                channel.cut(reset=bool(number % 2))
        await asyncio.gather(*(visitor.insist(b"at last") for visitor in visitors))


async def test_f18_udp_sessions_outlive_control(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, within(30):
        far = arena.udp_target()
        server = await arena.server(port := free_port(), tunnel_port := free_port())
        proxy = arena.proxy(tunnel_port)
        client = await arena.client(proxy.port, far.port)
        visitor = arena.visitor(port)
        await visitor.ask(b"before")
        proxy.channels[0].cut(reset=True)
        await client.logged("tunnel lost")
        await server.logged("tunnel lost")
        assert await visitor.ask(b"meanwhile") == b"meanwhile"
        await client.logged("tunnel up", count=2)
        assert await visitor.ask(b"after") == b"after"
        assert len(far.sources) == 1


# --- kills ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "side"), [("native", "server"), ("native", "client"), ("python", "client")]
)
async def test_killed_process_comes_back_to_its_visitors(
    tmp_path: Path, engine: str, side: str
) -> None:
    """They only go on sending. What the other side held of them is let go."""
    async with UdpArena(tmp_path, engine) as arena, within(40):
        far = arena.udp_target()
        tunnel = await arena.tunnel(far.port)
        visitors = [arena.visitor(tunnel.port) for _ in range(5)]
        for visitor in visitors:
            assert await visitor.ask(b"hello") == b"hello"
        killed: Nodepass = getattr(tunnel, side)
        other = tunnel.client if side == "server" else tunnel.server
        killed.kill()
        await other.logged("tunnel lost")
        for visitor in visitors:
            visitor.send(b"into the void")
        again = arena.nodepass(*killed.urls)
        await again.start()
        back = time.monotonic()
        await asyncio.gather(*(visitor.insist(b"and again") for visitor in visitors))
        assert time.monotonic() - back < limit(BACK)
        assert len(far.sources) >= 10, "sessions of a killed process are not taken up"


# --- no client --------------------------------------------------------------------------


async def test_first_datagrams_wait_for_a_client(tmp_path: Path, engine: str) -> None:
    """For DIAL_TIMEOUT, in order, several of several visitors."""
    async with UdpArena(tmp_path, engine, DIAL_TIMEOUT="20s") as arena, within(30):
        far = arena.udp_target()
        await arena.server(port := free_port(), tunnel_port := free_port())
        visitors = [arena.visitor(port) for _ in range(3)]
        words = [b"early", b"", b"bird"]
        for word in words:
            for visitor in visitors:
                visitor.send(word)
        await arena.client(tunnel_port, far.port)
        for visitor in visitors:
            assert [await visitor.read() for _ in words] == words


async def test_nobody_waits_longer_than_the_dial_timeout(tmp_path: Path) -> None:
    """It is told why; a client that comes later serves who is still there."""
    env = {"DIAL_TIMEOUT": "300ms", "REPORT_INTERVAL": "100ms"}
    async with UdpArena(tmp_path, **env) as arena, within(30):
        far = arena.udp_target(notes := Notes())
        server = await arena.server(port := free_port(), tunnel_port := free_port())
        visitor = arena.visitor(port)
        visitor.send(b"too early")
        await server.logged('a visitor was turned away  why="no client is connected"')
        await server.logged("WARN  datagrams dropped: their source had no link in time.*count=1 ")
        await arena.client(tunnel_port, far.port)
        await visitor.insist(b"later")
        assert b"too early" not in notes.words


# --- targets ----------------------------------------------------------------------------


async def test_f24_dead_target_is_told_once_and_harms_nobody(tmp_path: Path) -> None:
    """Then it starts, and is found by those who still ask."""
    env = {"REPORT_INTERVAL": "200ms"}
    async with UdpArena(tmp_path, **env) as arena, within(40):
        target = arena.target(tcp_echo, port=free_port())  # TCP is alive on that port
        tunnel = await arena.tunnel(target)
        asking = arena.visitor(tunnel.port)
        async with await connect(tunnel.port) as stream:
            start = time.monotonic()
            while time.monotonic() - start < 2.8:  # beyond the patience with such a target
                asking.send(b"anybody there?")
                await asyncio.sleep(0.05)
            await tunnel.client.logged(f"{NOBODY}.*target=127.0.0.1:{target.port}")
            assert tunnel.client.count(NOBODY) == 1, "once a minute"
            assert not asking.heard
            await stream.write(b"unharmed")
            assert await stream.read() == b"unharmed"
            assert await exchange(tunnel.port, b"served") == b"served"
        arena.udp_target(port=target.port)
        assert await asking.insist(b"now?") < limit(5)
        assert await arena.visitor(tunnel.port).ask(b"at once") == b"at once"


async def test_f24_target_that_restarts_is_found_by_the_same_session(
    tmp_path: Path, engine: str
) -> None:
    """A second without it is no reason to end a session."""
    async with UdpArena(tmp_path, engine) as arena, within(20):
        first = arena.udp_target()
        tunnel = await arena.tunnel(first.port)
        visitor = arena.visitor(tunnel.port)
        await visitor.ask(b"hello")
        first.close()
        for _ in range(5):
            visitor.send(b"nobody hears")
        second = arena.udp_target(port=first.port)
        assert await visitor.insist(b"back") < limit(3)
        assert list(second.sources) == list(first.sources)


async def test_f24_target_that_cannot_be_had_costs_little(tmp_path: Path) -> None:
    """500 datagrams in 2.5 seconds: a launch now and then, no link and no line for each."""
    async with UdpArena(tmp_path) as arena, within(30):
        server = await arena.server(port := free_port(), tunnel_port := free_port(), "?log=debug")
        client = arena.nodepass(
            f"client://127.0.0.1:{tunnel_port}/no-such-host.invalid:53?log=debug"
        )
        await client.start()
        visitor = arena.visitor(port)
        start = time.monotonic()
        while time.monotonic() - start < 2.5:
            visitor.send(b"hello?")
            await asyncio.sleep(0.005)
        await client.logged("WARN  a visitor cannot be served.*target=no-such-host.invalid:53")
        assert client.count("a visitor cannot be served") == 1
        assert 1 <= server.count("DEBUG  relay ended") <= 6
