"""udp_visitors: what becomes of a UDP session, the seed dialect, opening and closing."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time

import pytest
from tests.kit.engines import both, engines, native
from tests.kit.peer import SeedClient
from tests.kit.server_desk import is_reset, serving
from tests.kit.stream import Stream
from tests.kit.timing import free_port, until, within
from tests.kit.udp_visitors_words import come, gone, launched, read, served, waiting
from tests.kit.udp_words import frame, udp_socket

from nodepass.config.environment import Settings
from nodepass.engine.relays import Gate, Relays
from nodepass.errors import EngineError
from nodepass.net import udp
from nodepass.observe.stats import NOTHING
from nodepass.server.server import Server

# --- what becomes of a session -------------------------------------------------------------------


@both
@engines
async def test_failed_launch_ends_the_relay_and_frees_its_slot(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn", engine=kind) as desk:
            client = await desk.client()
            visitor, link = await served(desk, client, 1)
            await client.say("fail://1?why=unreachable")
            assert await is_reset(link)
            await gone(desk)
            figures = desk.figures
            assert (figures.launches_failed, figures.visitors_refused) == (1, 1)
            visitor.send(b"again")
            await until(lambda: desk.figures.datagrams.no_link == 1, 5, "the drop")
            assert desk.figures.visitors == 1, "it has to wait for a second"
    assert "the client could not reach its target" in caplog.text


@both
@pytest.mark.parametrize("how", ["end", "reset", "bye"])
async def test_lost_control_costs_idle_links_and_no_relay(how: str) -> None:
    async with serving() as desk:
        client = await desk.client()
        visitor, link = await served(desk, client, 1)
        (idle,) = await desk.links(client, 2)
        if how == "end":
            client.control.close()
        elif how == "reset":
            client.control.reset()
        else:
            await client.say("bye://stopped")
        assert await is_reset(idle)
        assert desk.figures.sessions_open == 0
        visitor.send(b"still")
        assert await read(link) == b"still"
        come(desk, b"x")
        await waiting(desk, 1)


@both
async def test_silent_client_costs_the_visitors_it_may_never_have_heard_of() -> None:
    async with serving(report_interval=0.2) as desk:
        client = await desk.client()
        heard, heard_link = await served(desk, client, 1)
        unheard, unheard_link = await served(desk, client, 2)
        await heard_link.write(frame(b"answer"))
        assert await heard.read() == b"answer"
        await until(lambda: not desk.figures.sessions_open, 5, "the loss")
        assert await is_reset(unheard_link)
        heard.send(b"x")
        assert await read(heard_link) == b"x"
        assert not unheard.heard


@both
@engines
async def test_silence_ends_a_session_and_the_next_word_begins_another(kind: str) -> None:
    async with serving(udp_idle_timeout=0.05, engine=kind) as desk:
        client = await desk.client()
        visitor, link = await served(desk, client, 1)
        assert not await is_reset(link)
        await gone(desk)
        assert desk.figures.relays_reset == 0, "silence is a clean end"
        (link,) = await desk.links(client, 2)
        visitor.send(b"back")
        assert await launched(client) == (2, f"127.0.0.1:{visitor.port}")
        assert await read(link) == b"back"


# --- the seed dialect ----------------------------------------------------------------------------


async def seed_launched(client: SeedClient) -> Stream:
    """Wait for a UDP launch; return its link."""
    async with within(5):
        name, _, kind = (await client.signal()).removeprefix("//").partition("#")
    assert kind == "2"
    return client.links.pop(name)


@both
@engines
async def test_seed_client_gets_one_datagram_and_gives_one_answer(kind: str) -> None:
    async with serving(engine=kind) as desk:
        client = await desk.seed()
        await client.dial()
        await desk.idle(1)
        visitor = come(desk, b"question")
        link = await seed_launched(client)
        async with within(5):
            assert await link.read_exactly(8) == b"question", "no frame"
            await link.write(b"ans")
            await link.write(b"wer")
            link.close()
            assert await visitor.read() == b"answer", "all up to the end of the link"
        await gone(desk)
        figures = desk.figures
        assert (figures.visitors, figures.relays_reset) == (1, 0)
        assert figures.datagrams[:4] == (1, 1, 8, 6)


@both
@engines
async def test_seed_client_gets_a_link_for_each_of_two_datagrams(kind: str) -> None:
    async with serving(engine=kind) as desk:
        client = await desk.seed()
        await client.dial()
        await client.dial()
        await desk.idle(2)
        visitor = come(desk, b"one", b"two")
        links = [await seed_launched(client) for _ in range(2)]
        async with within(5):
            asked = [await link.read_exactly(3) for link in links]
            assert sorted(asked) == [b"one", b"two"]
            for link, question in zip(links, asked, strict=True):
                await link.write(question + b"!")
                link.close()
            assert {await visitor.read() for _ in range(2)} == {b"one!", b"two!"}
        await gone(desk)
        assert desk.figures.datagrams[:2] == (2, 2)


@both
async def test_seed_answer_need_not_be_followed_by_an_end() -> None:
    async with serving(udp_read_timeout=0.3, udp_idle_timeout=60.0) as desk:
        client = await desk.seed()
        await client.dial()
        await desk.idle(1)
        visitor = come(desk, b"question")
        link = await seed_launched(client)
        await link.write(b"answer")
        assert await visitor.read() == b"answer"
        await gone(desk)


# --- opening, shutting, closing ------------------------------------------------------------------


@both
async def test_without_udp_nothing_is_bound() -> None:
    async with serving("udp=0&log=none") as desk:
        visitor = come(desk, b"x")
        await until(lambda: visitor.refused, 5, "the kernel's word that nobody listens")
        assert desk.figures.datagrams == NOTHING
        await desk.visit()


@both
async def test_shut_drops_newcomers_and_serves_whom_it_knows() -> None:
    async with serving(shutdown_timeout=10.0, semaphore_limit=1) as desk:
        client = await desk.client()
        visitor, link = await served(desk, client, 1)
        come(desk, b"waits")
        await waiting(desk, 1)
        stopping = asyncio.create_task(desk.server.stop())
        await until(lambda: desk.figures.visitors_refused == 1, 5, "who waited for a slot")
        assert desk.figures.visitors_waiting == 0
        come(desk, b"late")
        await until(lambda: desk.figures.datagrams.no_link == 2, 5, "the late one's drop")
        visitor.send(b"more")
        assert await read(link) == b"more"
        assert desk.figures.visitors == 2
        link.close()
        async with within(5):
            await stopping
        desk.server._udp_visitors.close()
        desk.server._udp_visitors.shut()


@native
@both
async def test_newcomer_on_its_way_to_us_when_we_stop_is_turned_away() -> None:
    """The engine has told of it, and the loop has not come to it."""
    async with serving(shutdown_timeout=10.0) as desk:
        client = await desk.client()
        await desk.links(client, 1)
        come(desk, b"x")
        end = time.monotonic() + 5
        while not desk.relays.statistics().peers_waiting:
            assert time.monotonic() < end
            time.sleep(0.001)
        async with within(5):
            await desk.server.stop()
        figures = desk.figures
        # If its gate has gone in the same moment nobody has to turn it away.
        assert (figures.visitors - figures.visitors_refused, figures.visitors_open) == (0, 0)
        assert await client.signal() == "drain://", "and no launch before it"


@both
@engines
@pytest.mark.parametrize("is_waiting", [True, False])
async def test_close_frees_the_address_at_once_on_a_shared_engine(
    kind: str, is_waiting: bool
) -> None:
    relays = Relays(Settings(threads=1, engine=kind))  # type: ignore[arg-type]
    async with serving(relays=relays) as desk:
        client = await desk.client()
        links = []
        if is_waiting:
            come(desk, b"x")
            await waiting(desk, 1)
        else:
            links.append((await served(desk, client, 1))[1])
        await desk.server.stop()
        udp_socket(port=desk.target).close()
        assert relays.statistics().gates_open == 0
        for link in links:
            assert await is_reset(link)
        assert desk.figures.visitors_open == 0
        assert desk.figures.datagrams.no_link == is_waiting
    await until(lambda: not relays.statistics().flows_open, 5, "nothing left in the engine")
    await relays.close()


@both
async def test_gates_of_a_start_that_fails_later_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One was opened, the next was not."""
    opened: list[Gate] = []
    relays = Relays(Settings(threads=1))
    serve = relays.serve

    def serve_one(*args: object, **options: bool) -> Gate:
        if opened:
            raise EngineError("udp_serve", errno.ENOBUFS)
        opened.append(serve(*args, **options))  # type: ignore[arg-type]
        return opened[0]

    async def listen(host: str, port: int, _on_absent: object) -> list[socket.socket]:
        return [udp_socket(host, port), udp_socket("127.0.0.2", port)]

    monkeypatch.setattr(relays, "serve", serve_one)
    monkeypatch.setattr(udp, "listen", listen)
    port = free_port()
    server = Server(f"server://127.0.0.1:{free_port()}/127.0.0.1:{port}?log=none", relays=relays)
    with pytest.raises(EngineError):
        await server.start()
    assert opened[0].result.done()
    for host in ("127.0.0.1", "127.0.0.2"):
        udp_socket(host, port).close()
    await relays.close()
