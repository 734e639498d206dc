"""client: the seed dialect, with a hand-driven server in the same loop."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from tests.kit.client_desk import (
    accept,
    is_reset,
    paired,
    running,
    seeded,
)
from tests.kit.engines import both
from tests.kit.peer import Listener, SeedServer
from tests.kit.timing import until, within


@both
async def test_seed_launch_joins_the_link_with_the_target() -> None:
    async with seeded() as (server, desk):
        name = next(iter(server.links))
        await until(lambda: desk.figures.links_idle == 2, 5, "both links")
        link = await server.launch(name)
        await link.write(b"question")
        target = await desk.at_target()
        assert await target.read_exactly(8) == b"question"
        await target.write(b"answer")
        target.finish()
        assert await link.read_all() == b"answer"
        async with within(5):
            await server.take()


@both
async def test_seed_launch_may_overtake_its_id() -> None:
    async with SeedServer() as server, running(server.listener.port) as desk:
        await server.greet()
        link = server.keep(await accept(server.data))
        await server.say("//aaaa0001#1")
        await asyncio.sleep(0.03)
        await link.write(b"aaaa")
        await asyncio.sleep(0.01)
        await link.write(b"0001question")
        target = await desk.at_target()
        assert await target.read_exactly(8) == b"question", "not a byte more than the id was taken"


@both
async def test_seed_launch_of_what_never_comes() -> None:
    async with seeded(handshake_timeout=0.1) as (server, desk):
        await server.say("//ffffffff#1")
        await until(lambda: desk.figures.launches_failed == 1, 5, "the end of the wait")
        assert desk.figures.visitors_open == 0


@both
async def test_seed_launch_of_a_protocol_that_is_off_resets_its_link() -> None:
    async with seeded("udp=0&log=none") as (server, desk):
        name, link = next(iter(server.links.items()))
        await until(lambda: desk.figures.links_idle == 2, 5, "both links")
        await server.say(f"//{name}#2")
        assert await is_reset(link)
        async with within(5):
            await server.take()


@both
@pytest.mark.parametrize("said", [b"NOTHEX!!", b"\xff" * 8, b"abc", b""])
async def test_seed_data_port_that_gives_no_id(said: bytes) -> None:
    async with (
        SeedServer() as server,
        running(server.listener.port, handshake_timeout=0.05) as desk,
    ):
        await server.greet(beat=0.05)
        for attempt in range(4):
            async with await accept(server.data) as link:
                await link.write(said)
                if attempt >= 2 or len(said) == 8:
                    with contextlib.suppress(ConnectionResetError):
                        assert await link.read() == b""
        async with within(5):
            await server.take()
        await until(lambda: desk.figures.links_idle >= 1, 5, "a link after all")
        assert desk.figures.sessions == 1


@both
async def test_seed_demand_is_ours_to_guess() -> None:
    """A seed server says nothing of how many links it wants: we count its launches."""
    async with seeded() as (server, desk):
        for _ in range(6):
            await until(lambda: desk.figures.links_idle, 5, "a link")
            await until(lambda: server.links, 5, "its name")
            await server.launch(next(iter(server.links)))
            async with within(5):
                await server.take()
        await until(lambda: desk.figures.links_wanted > 4, 5, "a wish for more")


@both
async def test_seed_stop_lets_relays_finish() -> None:
    async with seeded(shutdown_timeout=10.0) as (server, desk):
        await until(lambda: desk.figures.links_idle == 2, 5, "both links")
        link = await server.launch(next(iter(server.links)))
        target = await desk.at_target()
        stopping = asyncio.create_task(desk.client.stop())
        await asyncio.sleep(0.02)
        await link.write(b"late")
        assert await target.read_exactly(4) == b"late"
        link.close()
        target.close()
        async with within(5):
            await stopping


@both
async def test_seed_server_that_falls_silent_is_lost() -> None:
    async with seeded(report_interval=0.05) as (server, desk):
        await until(lambda: server.beats >= 3, 5, "heartbeats")
        server.fall_silent()
        await until(lambda: not desk.figures.sessions_open, 5, "the loss")


@both
async def test_fault_in_joining_a_target_that_has_a_name_ends_that_one_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = Listener()
    name = f"localhost:{target.port}"
    async with paired("log=error", target=name) as (server, desk, links):

        def fail(*_: object, **__: object) -> bool:
            raise RuntimeError("on purpose")

        monkeypatch.setattr(desk.relays, "join", fail)
        await server.say("tcp://1?from=10.0.0.1:1")
        assert await is_reset(links[1])
        async with await accept(target) as stream:
            assert await is_reset(stream)
        monkeypatch.undo()
        await until(lambda: not desk.figures.visitors_open, 5, "the end of its serving")
        await server.say("tcp://2?from=10.0.0.1:1")
        async with await accept(target) as stream:
            await links[2].write(b"others")
            assert await stream.read_exactly(6) == b"others"
            assert desk.client._places._slots._free == desk.client._places._limit - 1
    target.close()
    assert "an internal error in serving a visitor" in caplog.text
