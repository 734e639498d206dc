"""`from nodepass import Server, Client`: both in one event loop, on asyncio and uvloop."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
from tests.kit.arena import Arena
from tests.kit.datagram import UdpArena
from tests.kit.stream import connect, exchange
from tests.kit.target import body_of, digest_of, echo, serve_body
from tests.kit.timing import free_port, until, within

from nodepass import Client, Server

BODY = body_of(9, 10_000_000)


@pytest.mark.loops("asyncio", "uvloop")
async def test_pair_in_one_loop(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODEPASS_ENGINE", engine)
    async with Arena(tmp_path) as arena, within(20):
        target, tunnel, port = arena.target(serve_body(BODY)), free_port(), free_port()
        async with (
            Server(f"server://127.0.0.1:{tunnel}/127.0.0.1:{port}?log=none") as server,
            Client(f"client://127.0.0.1:{tunnel}/127.0.0.1:{target.port}?log=none") as client,
        ):
            assert server.tunnel_address == ("127.0.0.1", tunnel)
            assert server.target_address == ("127.0.0.1", port)
            for _ in range(3):
                async with await connect(port) as visitor:
                    assert await visitor.digest() == (len(BODY), digest_of(BODY))
            for side in (server, client):
                figures = side.statistics()
                assert dataclasses.is_dataclass(figures)
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(figures, dataclasses.fields(figures)[0].name, None)
        async with within(2):
            await asyncio.gather(server.wait_closed(), client.wait_closed())
        with pytest.raises(ConnectionRefusedError):
            await connect(port)


@pytest.mark.loops("asyncio", "uvloop")
async def test_udp_pair_in_one_loop(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its datagrams are counted on both sides, and a target that was away is found again."""
    monkeypatch.setenv("NODEPASS_ENGINE", engine)
    monkeypatch.setenv("SHUTDOWN_TIMEOUT", "20ms")
    async with UdpArena(tmp_path) as arena, within(20):
        target, tunnel, port = arena.udp_target(), free_port(), free_port()
        async with (
            Server(f"server://127.0.0.1:{tunnel}/127.0.0.1:{port}?log=none&tcp=0") as server,
            Client(f"client://127.0.0.1:{tunnel}/127.0.0.1:{target.port}?log=none") as client,
        ):
            assert server.target_address == ("127.0.0.1", port)
            visitor = arena.visitor(port)
            for size in (0, 1400, 8192):
                assert await visitor.ask(BODY[:size]) == BODY[:size]
            for side in (server, client):
                # The engine counts a datagram when it has been sent, and it may be heard before.
                await until(lambda side=side: side.statistics().datagrams.down == 3, 5, "counts")  # type: ignore[misc]
                figures = side.statistics()
                assert (figures.relays_open, figures.visitors) == (1, 1)
                assert (figures.bytes_up, figures.bytes_down) == (9592, 9592)
                counts = figures.datagrams
                assert (counts.up, counts.down, counts.dropped) == (3, 3, 0)
            target.close()
            visitor.send(b"nobody hears")
            await until(lambda: client.statistics().datagrams.refused, 5, "a refusal")
            arena.udp_target(port=target.port)
            await visitor.insist(b"back")
        visitor.send(b"closed")
        await until(lambda: visitor.refused, 5, "an ICMP message: the port is closed")


async def test_stop_twice_is_harmless(tmp_path: Path) -> None:
    server = Server(f"server://127.0.0.1:{free_port()}/127.0.0.1:{free_port()}?log=none")
    await server.start()
    await server.stop()
    await server.stop()


async def test_start_failure_leaves_nothing_open(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        taken = arena.target(echo).port
        free = free_port()
        for tunnel, target in ((taken, free), (free, taken)):
            server = Server(f"server://127.0.0.1:{tunnel}/127.0.0.1:{target}?log=none")
            with pytest.raises(OSError, match="in use"):
                await server.start()
            await server.stop()
        # the port bound before the failure is free again
        async with Server(f"server://127.0.0.1:{free}/127.0.0.1:{free_port()}?log=none"):
            pass


async def test_restart_on_the_same_ports(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(30):
        target, tunnel, port = arena.target(echo), free_port(), free_port()
        async with Client(f"client://127.0.0.1:{tunnel}/127.0.0.1:{target.port}?log=none"):
            for _ in range(3):
                async with Server(f"server://127.0.0.1:{tunnel}/127.0.0.1:{port}?log=none"):
                    assert await exchange(port, b"hello") == b"hello"
