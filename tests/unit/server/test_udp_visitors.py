"""udp_visitors: slots and links for newcomers, with hand-driven clients."""

from __future__ import annotations

import asyncio
import errno
import logging
import time

import pytest
from tests.kit.engines import both, engines
from tests.kit.server_desk import Desk, is_reset, serving
from tests.kit.timing import free_port, has_ipv6, until, within
from tests.kit.udp_visitors_words import come, gone, launched, read, served, waiting
from tests.kit.udp_words import frame, frames

from nodepass.config.environment import Settings
from nodepass.config.url import Config
from nodepass.engine.relays import UdpRelay
from nodepass.errors import EngineError
from nodepass.net import udp
from nodepass.server.server import Server

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


# --- visitors ------------------------------------------------------------------------------------


@both
@engines
async def test_newcomer_gets_a_link_and_its_launch_says_where_from(kind: str) -> None:
    async with serving(engine=kind) as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 5)
        visitor = come(desk, b"question", b"", b"another")
        assert await launched(client) == (5, f"127.0.0.1:{visitor.port}")
        assert [await read(link) for _ in range(3)] == [b"question", b"", b"another"]
        await link.write(frames(b"answer", b""))
        assert [await visitor.read() for _ in range(2)] == [b"answer", b""]
        await until(lambda: desk.figures.bytes_down == 6, 5, "counts, which come behind the send")
        figures = desk.figures
        assert (figures.visitors, figures.visitors_open, figures.relays_open) == (1, 1, 1)
        assert (figures.bytes_up, figures.bytes_down) == (15, 6)
        link.close()
        await gone(desk)
        figures = desk.figures
        assert (figures.bytes_up, figures.bytes_down) == (15, 6)
        assert (figures.relays_open, figures.relays_reset, figures.links_idle) == (0, 0, 0)
        assert figures.datagrams[:4] == (3, 2, 15, 6)


@both
async def test_each_source_has_a_link_of_its_own() -> None:
    async with serving() as desk:
        client = await desk.client()
        one, link_one = await served(desk, client, 1)
        two, link_two = await served(desk, client, 2)
        await link_two.write(frame(b"for two"))
        await link_one.write(frame(b"for one"))
        assert await one.read() == b"for one"
        assert await two.read() == b"for two"
        two.send(b"from two")
        assert await read(link_two) == b"from two"


@both
async def test_datagrams_behind_a_links_line_reach_the_visitor_first() -> None:
    async with serving() as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 1)
        await link.write(frame(b"early"))
        visitor = come(desk, b"x")
        assert await visitor.read() == b"early"


@both
@needs_ipv6
async def test_every_address_is_served_by_its_own_socket() -> None:
    port = free_port()
    url = f"server://127.0.0.1:{free_port()}/:{port}?log=none"
    settings = Settings(threads=1, shutdown_timeout=0.01)
    async with Server(Config.parse(url, {}, settings)) as server, within(20):
        assert server.target_address == ("::", port)
        desk = Desk(server)
        try:
            client = await desk.client()
            for number, host in enumerate(("127.0.0.1", "::1")):
                (link,) = await desk.links(client, number)
                visitor = come(desk, b"x", host=host)
                shown = f"[::1]:{visitor.port}" if host == "::1" else f"127.0.0.1:{visitor.port}"
                assert await launched(client) == (number, shown)
                await link.write(frame(b"answer"))
                assert await visitor.read() == b"answer"
        finally:
            await desk.aclose()


@both
async def test_link_of_the_dead_is_passed_over() -> None:
    async with serving() as desk:
        client = await desk.client()
        alive, dead = await desk.links(client, 1, 2)
        dead.reset()
        come(desk, b"x")
        assert await read(alive) == b"x"
        assert (await launched(client))[0] == 1


# --- without a link ------------------------------------------------------------------------------


@both
@engines
async def test_newcomer_waits_for_a_link(kind: str) -> None:
    async with serving(engine=kind) as desk:
        client = await desk.client()
        visitor = come(desk, b"patience", b"and more")
        await waiting(desk, 1)
        assert desk.figures.visitors_open == 1, "it has a slot already"
        link = await desk.link(client, 1)
        assert [await read(link) for _ in range(2)] == [b"patience", b"and more"]
        assert await launched(client) == (1, f"127.0.0.1:{visitor.port}")
        assert desk.figures.visitors_waiting == 0


@both
@pytest.mark.parametrize("has_client", [True, False])
async def test_newcomers_without_a_link_are_turned_away(
    has_client: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn", dial_timeout=0.05) as desk:
            if has_client:
                await desk.client()
            for _ in range(2):
                come(desk, b"one", b"two")
            await until(lambda: desk.figures.visitors_refused == 2, 5, "the end of patience")
            await until(lambda: desk.figures.datagrams.no_link == 4, 5, "the drops")
            figures = desk.figures
            assert (figures.visitors, figures.visitors_open) == (2, 0), "their slots are free"
    told = [record.getMessage() for record in caplog.records]
    (line,) = [text for text in told if "a visitor was turned away" in text]
    assert ("no idle link within" if has_client else "no client is connected") in line
    (line,) = [text for text in told if "had no link in time" in text]
    assert "count=4" in line


@engines
@pytest.mark.slow
async def test_who_was_turned_away_may_try_again_a_second_later(kind: str) -> None:
    async with serving(dial_timeout=0.05, engine=kind) as desk:
        visitor = come(desk, b"one")
        await until(lambda: desk.figures.visitors_refused == 1, 5, "the end of its patience")
        turned_away = time.monotonic()

        def tries_again() -> bool:
            visitor.send(b"again")
            return desk.figures.visitors > 1

        await until(tries_again, 5, "another try")
        assert time.monotonic() - turned_away > 0.9, "for a second nobody listens to it"
        await until(lambda: desk.figures.visitors_refused == 2, 5, "the end of that one")
        assert desk.figures.datagrams.no_link >= 3


@both
@pytest.mark.parametrize("fault", ["engine", "link", "nobody"])
async def test_engine_that_refuses_costs_a_visitor_and_a_link(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> UdpRelay:
        if fault == "link":
            raise OSError(errno.EINVAL, "Invalid argument")
        raise EngineError("udp_bind", errno.ENOENT if fault == "nobody" else errno.ENOBUFS)

    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn") as desk:
            client = await desk.client()
            (link,) = await desk.links(client, 1)
            with monkeypatch.context() as patch:
                if fault == "link":
                    patch.setattr(udp, "tune_link", fail)
                else:
                    patch.setattr(desk.relays, "bind", fail)
                come(desk, b"x")
                assert await is_reset(link)
            figures = desk.figures
            assert (figures.visitors_refused, figures.visitors_open) == (1, 0)
            await served(desk, client, 2)
    assert "a visitor was turned away" in caplog.text


@both
async def test_fault_of_ours_while_a_newcomer_waits_costs_no_slot(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(timeout: float) -> None:
        raise ZeroDivisionError("oops")

    with caplog.at_level(logging.ERROR, "nodepass"):
        async with serving("log=error", semaphore_limit=1) as desk:
            client = await desk.client()
            with monkeypatch.context() as patch:
                patch.setattr(desk.server._pool, "take", fail)
                come(desk, b"x")
                await until(lambda: desk.figures.visitors == 1, 5, "the newcomer")
                await gone(desk)
            await served(desk, client, 1)
    assert "an internal error in waiting for a link" in caplog.text


# --- slots ---------------------------------------------------------------------------------------


@both
@engines
async def test_newcomer_beyond_the_limit_waits_for_a_slot(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn", semaphore_limit=2, engine=kind) as desk:
            client = await desk.client()
            _, link = await served(desk, client, 1)
            await served(desk, client, 2)
            (idle,) = await desk.links(client, 3)
            third = come(desk, b"third", b"and more")
            await waiting(desk, 1)
            assert (desk.figures.visitors_open, desk.figures.links_idle) == (3, 1)
            link.close()
            assert await launched(client) == (3, f"127.0.0.1:{third.port}")
            assert [await read(idle) for _ in range(2)] == [b"third", b"and more"]
            assert (desk.figures.visitors_open, desk.figures.visitors_waiting) == (2, 0)
    assert "SEMAPHORE_LIMIT" in caplog.text


@both
async def test_who_waits_for_a_slot_is_turned_away_in_time() -> None:
    async with serving(semaphore_limit=1, dial_timeout=0.15) as desk:
        client = await desk.client()
        visitor, link = await served(desk, client, 1)
        for _ in range(2):
            come(desk, b"waits")
        await until(lambda: desk.figures.visitors_refused == 2, 5, "the end of patience")
        assert (desk.figures.visitors_open, desk.figures.visitors_waiting) == (1, 0)
        await until(lambda: desk.figures.datagrams.no_link == 2, 5, "what they said, dropped")
        visitor.send(b"still")
        assert await read(link) == b"still", "who is served is not harmed"
        link.close()
        await served(desk, client, 2)


@both
async def test_tcp_and_udp_take_turns_when_slots_get_free() -> None:
    async with serving(semaphore_limit=1) as desk:
        client = await desk.client()
        links = dict(zip(range(1, 6), await desk.links(client, *range(1, 6)), strict=True))

        async def next_served() -> tuple[str, int]:
            async with within(5):
                kind, _, rest = (await client.signal()).partition("://")
            return kind, int(rest.partition("?")[0])

        come(desk, b"first")
        order = [await next_served()]
        for _ in range(2):
            come(desk, b"waits")
        callers = [await desk.visit() for _ in range(2)]
        await waiting(desk, 2)
        await asyncio.sleep(0.02)
        assert desk.figures.visitors == 3, "TCP visitors wait in the kernel"
        for _ in range(4):
            links[order[-1][1]].reset()
            order.append(await next_served())
            assert desk.server._slots.taken == 1
        assert [kind for kind, _ in order] == ["udp", "udp", "tcp", "udp", "tcp"]
        assert desk.figures.visitors == 5
        assert desk.figures.visitors_refused == 0
        for caller in callers:
            caller.reset()
        await gone(desk)


@both
async def test_slot_that_nobody_of_the_other_kind_wants_is_given_to_who_waits() -> None:
    async with serving(semaphore_limit=1) as desk:
        client = await desk.client()
        links = dict(zip((1, 2, 3), await desk.links(client, 1, 2, 3), strict=True))
        come(desk, b"first")
        number, _ = await launched(client)
        for _ in range(2):
            come(desk, b"waits")
        await waiting(desk, 2)
        for _ in range(2):
            links[number].close()
            async with within(1.5):
                number, _ = await launched(client)


@engines
@pytest.mark.slow
async def test_exchange_that_looks_finished_gives_way(kind: str) -> None:
    """A second after its one answer, instead of after its idle time."""
    async with serving(semaphore_limit=1, dial_timeout=10.0, engine=kind) as desk:
        client = await desk.client()
        visitor, link = await served(desk, client, 1)
        (other,) = await desk.links(client, 2)
        await link.write(frame(b"answer"))
        assert await visitor.read() == b"answer"
        come(desk, b"next")
        await waiting(desk, 1)
        assert not await is_reset(link), "a polite end"
        assert await read(other) == b"next"
        assert desk.figures.relays_reset == 0
