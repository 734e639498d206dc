"""server: starts and stops, the seed dialect, limits of the machine, crowds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import secrets
import socket
import sys
from pathlib import Path

import pytest
from tests.kit.engines import both
from tests.kit.server_desk import config, is_reset, launched, serving
from tests.kit.stream import connect
from tests.kit.timing import free_port, until, within

from nodepass.errors import ListenError, TunnelError
from nodepass.net import descriptors, tcp
from nodepass.net.listener import Listener
from nodepass.server import server as server_module
from nodepass.server.server import Server

# --- the seed dialect ----------------------------------------------------------------------------


@both
async def test_silent_caller_with_a_data_connection_is_a_seed_client() -> None:
    async with serving(report_interval=0.1) as desk:
        client = await desk.seed()
        assert desk.figures.sessions_open == 0
        name = await client.dial()
        assert desk.figures.sessions_open == 1
        await client.dial()
        await desk.idle(2)
        visitor = await desk.visit()
        await visitor.write(b"x")
        link = await client.launched()
        assert await link.read_exactly(1) == b"x"
        assert len(client.links) == 1
        assert name
        await asyncio.sleep(0.25)
        assert desk.figures.sessions_open == 1, "its silence is no loss; nothing is announced"


@both
async def test_stranger_at_the_data_port_gets_nothing() -> None:
    async with serving() as desk:
        assert await is_reset(await desk.data()), "nobody has called"
        client = await desk.seed()
        await client.dial()
        stranger = await desk.data("127.0.0.2")
        assert await is_reset(stranger)
        assert desk.figures.links == 1
        assert desk.figures.strangers >= 2


@both
async def test_second_seed_client_of_another_address_is_turned_away() -> None:
    async with serving() as desk:
        first = await desk.seed("127.0.0.1")
        await first.dial()
        second = await desk.seed("127.0.0.2")
        assert await is_reset(desk.knock(second.data_port, "127.0.0.2"))
        assert await is_reset(second.control)
        await first.dial()
        await desk.idle(2)
        assert desk.figures.sessions == 1


@both
async def test_seed_client_that_answers_keeps_its_place() -> None:
    """A port check from the same address must not be able to take it."""
    async with serving() as desk:
        old = await desk.seed()
        await old.dial()
        second = await desk.seed()
        await second.dial()
        assert await is_reset(second.control)
        await old.dial()
        assert not tcp.has_ended(old.control.sock) or old.control.sock.recv(10) == b"\n"
        assert (desk.figures.sessions, desk.figures.sessions_open) == (1, 1)


@both
async def test_seed_client_that_does_not_answer_loses_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nodepass.tunnel.control.is_stalled", lambda sock: True)
    async with serving() as desk:
        old = await desk.seed()
        name = await old.dial()
        await asyncio.sleep(0.01)
        new = await desk.seed()
        await new.dial()
        async with within(5):
            assert set(await old.control.read_all()) <= set(b"\n")
            assert await old.links[name].is_reset()
        assert (desk.figures.sessions, desk.figures.sessions_open) == (2, 1)
        await desk.visit()
        async with within(5):
            await new.launched()


@both
async def test_data_connection_that_has_left_already() -> None:
    async with serving() as desk:
        client = await desk.seed()
        await client.dial()
        for _ in range(5):
            (await desk.data()).reset()
        await client.dial()
        await desk.idle(2)


@both
async def test_seed_caller_beside_a_native_client_needs_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A link of the native client that has not spoken yet must not be taken for a seed one."""
    monkeypatch.setattr(server_module, "NATIVE_PATIENCE", 0.1)
    async with serving() as desk:
        native = await desk.client()
        late_link, greeting = await native.greeted()
        data = await desk.data()
        assert await is_reset(data)
        assert greeting
        assert not tcp.has_ended(late_link.sock), "it may still say that it is a link"
        await asyncio.sleep(0.15)
        data = await desk.data()
        async with within(5):
            assert len(await data.read(8)) == 8, "so long silent: a seed client after all"


@both
async def test_seed_ids_do_not_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as desk:
        client = await desk.seed()
        name = await client.dial()
        ids = [name, name, "0123abcd"]
        monkeypatch.setattr(secrets, "token_hex", lambda _: ids.pop(0))
        assert await client.dial() == "0123abcd"


@both
async def test_without_compat_there_is_no_data_port() -> None:
    async with (
        serving("compat=0&log=none", handshake_timeout=0.05) as desk,
        await connect(desk.tunnel) as caller,
    ):
        assert (await caller.read_line()).startswith(b"//0?")
        assert await is_reset(caller), "silence is no way in"


# --- life ----------------------------------------------------------------------------------------


async def test_addresses_and_figures_need_a_start() -> None:
    server = Server(config())
    for look in (
        lambda: server.tunnel_address,
        lambda: server.target_address,
        server.statistics,
    ):
        with pytest.raises(TunnelError, match="not been started"):
            look()
    async with server:
        assert server.tunnel_address == ("127.0.0.1", server.config.tunnel.port)
    assert server.target_address == ("127.0.0.1", server.config.target.port)
    assert server.statistics().sessions == 0


@both
async def test_start_fails_where_an_address_is_taken() -> None:
    async with serving() as desk:
        for own in ("tunnel", "target"):
            other = free_port()
            hosts = [f"127.0.0.1:{getattr(desk, own)}", f"127.0.0.1:{other}"]
            second = Server(f"server://{'/'.join(hosts)}?log=none")
            with pytest.raises(ListenError, match="in use"):
                await second.start()
            async with within(1):
                await second.stop()


@both
async def test_stop_says_drain_and_bye_and_turns_waiting_visitors_away() -> None:
    async with serving(shutdown_timeout=5.0) as desk:
        client = await desk.client()
        idle, used = await desk.links(client, 1, 2)
        visitor = await desk.visit()
        assert await launched(client) == 2
        stopping = asyncio.create_task(desk.server.stop())
        assert await client.signal() == "drain://"
        assert await is_reset(idle)
        with pytest.raises(ConnectionRefusedError):
            desk.knock(desk.target)
        await visitor.write(b"late")
        assert await used.read_exactly(4) == b"late"
        visitor.close()
        used.close()
        assert await client.signal() == "bye://stopped"
        async with within(5):
            await stopping
        assert desk.figures.bytes_up == 4


@both
async def test_stop_turns_waiting_visitors_and_callers_away() -> None:
    async with serving() as desk:
        caller = await desk.call()
        visitor = await desk.visit()
        await until(lambda: desk.figures.visitors_waiting == 1, 5, "the visitor")
        async with within(5):
            await desk.server.stop()
        assert await is_reset(visitor)
        assert await is_reset(caller)
        assert desk.figures.visitors_open == 0


@both
async def test_stop_cuts_what_does_not_end() -> None:
    async with serving(shutdown_timeout=0.05) as desk:
        client = await desk.client()
        await desk.links(client, 1)
        visitor = await desk.visit()
        assert await launched(client) == 1
        async with within(5):
            await desk.server.stop()
        assert await is_reset(visitor)
        assert desk.figures.relays_reset == 1


@both
async def test_stop_cancelled_with_visitors_of_every_kind() -> None:
    async with serving(shutdown_timeout=60.0) as desk:
        client = await desk.client()
        await desk.links(client, 1)
        served, waiting = await desk.visit(), await desk.visit()
        await until(lambda: desk.figures.visitors_waiting == 1, 5, "the second")
        stopping = asyncio.create_task(desk.server.stop())
        await asyncio.sleep(0.02)
        stopping.cancel()
        async with within(5):
            await asyncio.wait({stopping})
        assert stopping.cancelled()
        assert await is_reset(served)
        assert await is_reset(waiting)


@both
async def test_stop_resumes_no_paused_listener() -> None:
    async with serving(semaphore_limit=1) as desk:
        client = await desk.client()
        await desk.links(client, 1)
        visitor = await desk.visit()
        await until(lambda: desk.figures.relays_open == 1, 5, "the relay")
        stopping = asyncio.create_task(desk.server.stop())
        await asyncio.sleep(0.01)
        visitor.reset()
        async with within(5):
            await stopping


# --- limits of the machine -----------------------------------------------------------------------


@both
async def test_few_descriptors_bound_visitors_and_links(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        descriptors, "descriptor_limit", lambda: descriptors.RESERVED_DESCRIPTORS + 8
    )
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn") as desk:
            client = await desk.client()
            assert client.idle <= 2
            await desk.links(client, 1, 2)
            for _ in range(4):
                await desk.visit()
            await until(lambda: desk.figures.visitors == 3, 5, "three visitors")
            await asyncio.sleep(0.02)
            assert desk.figures.visitors == 3
    assert "visitors=3" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
@both
async def test_out_of_descriptors_is_told_with_advice(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with caplog.at_level(logging.ERROR, "nodepass"):
        async with serving("log=error") as desk:
            with socket.socket() as visitor:
                top = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
                fillers = []
                try:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, hard))
                    with contextlib.suppress(OSError):
                        while True:
                            fillers.append(os.dup(visitor.fileno()))
                    visitor.connect(("127.0.0.1", desk.target))
                    await until(lambda: "cannot accept" in caplog.text, 5, "the complaint")
                    assert desk.figures.visitors == 0
                finally:
                    for fd in fillers:
                        os.close(fd)
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                await until(lambda: desk.figures.visitors == 1, 5, "the visitor after all")
    assert "ulimit -n" in caplog.text


async def test_trouble_of_another_kind_is_told_without_advice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Listener):
        def resume(self) -> None:
            super().resume()
            self._on_trouble(OSError(12, "Cannot allocate memory"))

    monkeypatch.setattr("nodepass.server.server.Listener", Broken)
    with caplog.at_level(logging.ERROR, "nodepass"):
        async with serving("log=error"):
            pass
    assert "Cannot allocate memory" in caplog.text
    assert "ulimit" not in caplog.text


# --- silence and crowds --------------------------------------------------------------------------


@both
async def test_f06_visitors_launched_into_a_silence_are_reset() -> None:
    """The client stands still: whom it may never have heard of is not left waiting."""
    async with serving(report_interval=0.1) as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 1)
        visitor = await desk.visit()
        await launched(client)
        assert await is_reset(visitor), "nothing was heard from the client after the launch"
        assert await is_reset(link)
        assert desk.figures.sessions_open == 0


@both
async def test_f18_visitors_that_were_served_survive_the_silence() -> None:
    async with serving(report_interval=0.1) as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 1)
        visitor = await desk.visit()
        await launched(client)
        await link.write(b"an answer")
        assert await visitor.read() == b"an answer"
        await until(lambda: desk.figures.sessions_open == 0, 5, "the loss")
        await visitor.write(b"more")
        assert await link.read() == b"more"


@both
async def test_who_has_most_links_gives_way_when_the_stock_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        descriptors, "descriptor_limit", lambda: descriptors.RESERVED_DESCRIPTORS + 24
    )
    async with serving() as desk:  # a stock of 6
        hog, honest = await desk.client("hog"), await desk.client("honest")
        links = await desk.links(hog, *range(6))
        await desk.links(honest, 1, 2)
        assert desk.figures.links_idle == 6
        assert await is_reset(links[0])
        assert await is_reset(links[1])
