"""server: visitors and links, with hand-driven clients in the same loop."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest
from OpenSSL.SSL import Connection
from tests.kit.engines import both
from tests.kit.server_desk import is_reset, launched, serving
from tests.kit.timing import until

from nodepass.config.environment import Settings
from nodepass.engine.relays import Relay, Relays
from nodepass.net import descriptors

# --- visitors ------------------------------------------------------------------------------------


@both
async def test_visitor_gets_a_link_and_its_launch_says_where_from() -> None:
    async with serving() as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 5)
        visitor = await desk.visit()
        await visitor.write(b"question")
        host, port = visitor.sock.getsockname()
        assert await client.signal() == f"tcp://5?from={host}:{port}"
        assert await link.read_exactly(8) == b"question"
        figures = desk.figures
        assert (figures.visitors, figures.visitors_open, figures.relays_open) == (1, 1, 1)
        await link.write(b"answer")
        link.finish()
        assert await visitor.read_all() == b"answer"
        visitor.close()
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        figures = desk.figures
        assert (figures.bytes_up, figures.bytes_down) == (8, 6)
        assert (figures.relays_open, figures.relays_reset, figures.links_idle) == (0, 0, 0)


@both
async def test_bytes_behind_a_links_line_reach_the_visitor_first() -> None:
    async with serving() as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 1)
        await link.write(b"banner")
        await asyncio.sleep(0.01)
        visitor = await desk.visit()
        assert await visitor.read_exactly(6) == b"banner"


@both
async def test_visitor_waits_for_a_link() -> None:
    async with serving() as desk:
        client = await desk.client()
        visitor = await desk.visit()
        await visitor.write(b"patience")
        await until(lambda: desk.figures.visitors_waiting == 1, 5, "the visitor")
        link = await desk.link(client, 1)
        assert await link.read_exactly(8) == b"patience"
        assert await launched(client) == 1
        assert desk.figures.visitors_waiting == 0


@both
async def test_fault_in_joining_leaves_no_socket_and_no_slot_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving("log=error") as desk:
        client = await desk.client()

        def fail(*_: object, **__: object) -> Relay:
            raise RuntimeError("on purpose")

        with monkeypatch.context() as patch:
            patch.setattr(Relays, "join", fail)
            visitor = await desk.visit()
            await until(lambda: desk.figures.visitors_waiting == 1, 5, "the visitor")
            link = await desk.link(client, 1)
            assert await is_reset(visitor)
            assert await is_reset(link)
        assert desk.figures.visitors_open == 0
        link = await desk.link(client, 2)
        visitor = await desk.visit()
        await visitor.write(b"others")
        assert await link.read_exactly(6) == b"others"
    assert "an internal error in waiting for a link" in caplog.text


@both
@pytest.mark.parametrize("has_client", [True, False])
async def test_visitor_without_a_link_is_reset_in_time(
    has_client: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn", dial_timeout=0.05) as desk:
            if has_client:
                await desk.client()
            visitor = await desk.visit()
            assert await is_reset(visitor)
            figures = desk.figures
            assert (figures.visitors_open, figures.visitors_refused) == (0, 1)
    assert ("no idle link within" if has_client else "no client is connected") in caplog.text


@both
async def test_visitor_that_leaves_while_it_waits_frees_its_place() -> None:
    async with serving() as desk:
        client = await desk.client()
        gone, stays = await desk.visit(), await desk.visit()
        await until(lambda: desk.figures.visitors_waiting == 2, 5, "both")
        gone.reset()
        await until(lambda: desk.figures.visitors_open == 1, 5, "the place")
        link = await desk.link(client, 1)
        await stays.write(b"x")
        assert await link.read_exactly(1) == b"x"


@both
async def test_visitor_that_has_said_all_still_waits_for_its_answer() -> None:
    async with serving() as desk:
        client = await desk.client()
        visitor = await desk.visit()
        await visitor.write(b"question")
        visitor.finish()
        await until(lambda: desk.figures.visitors_waiting == 1, 5, "the visitor")
        await asyncio.sleep(0.02)
        link = await desk.link(client, 1)
        assert await link.read_all() == b"question"
        await link.write(b"answer")
        link.finish()
        assert await visitor.read_all() == b"answer"


@both
async def test_visitors_beyond_the_limit_wait_in_the_kernel() -> None:
    async with serving(semaphore_limit=2) as desk:
        client = await desk.client()
        links = await desk.links(client, 1, 2, 3)
        first = await desk.visit()
        await desk.visit()
        await until(lambda: desk.figures.relays_open == 2, 5, "two relays")
        third = await desk.visit()
        await third.write(b"x")
        await asyncio.sleep(0.05)
        assert desk.figures.visitors == 2
        first.reset()
        await until(lambda: desk.figures.visitors == 3, 5, "the third")
        assert await links[0].read_exactly(1) == b"x", "the newest links went first"


@both
async def test_link_that_died_a_moment_ago_is_passed_over() -> None:
    async with serving() as desk:
        client = await desk.client()
        alive, dead = await desk.links(client, 1, 2)
        dead.reset()
        visitor = await desk.visit()
        await visitor.write(b"x")
        assert await alive.read_exactly(1) == b"x"
        assert await launched(client) == 1
        await until(lambda: desk.figures.links_lost == 1, 5, "the loss counted")


@both
@pytest.mark.parametrize("how", ["end", "reset"])
async def test_visitor_does_not_hang_on_a_link_whose_session_ends_at_that_moment(
    how: str,
) -> None:
    """Whether the launch has left or not: a client resets its idle links with its session."""
    async with serving(dial_timeout=0.3) as desk:
        client = await desk.client()
        visitor = await desk.visit()
        await until(lambda: desk.figures.visitors_waiting == 1, 5, "the visitor")
        link = await desk.link(client, 1)
        if how == "reset":
            client.control.reset()
        else:
            client.control.close()
        await until(lambda: not desk.figures.sessions_open, 5, "the loss")
        link.reset()
        assert await is_reset(visitor)
        await until(lambda: not desk.figures.visitors_open, 5, "the end")


@both
async def test_engine_that_refuses_costs_a_visitor_and_a_link() -> None:
    relays = Relays(Settings(threads=1))
    async with serving(relays=relays) as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 1)
        await relays.close()
        visitor = await desk.visit()
        assert await is_reset(visitor)
        assert await is_reset(link)
        figures = desk.figures
        assert (figures.visitors_refused, figures.visitors_open) == (1, 0)


@both
async def test_relay_without_a_result_is_no_longer_counted() -> None:
    class Keeping(Relays):
        made: list[Relay]

        def join(
            self,
            a: socket.socket,
            b: socket.socket,
            *,
            tls_a: Connection | None = None,
            tls_b: Connection | None = None,
            head_a: bytes = b"",
            head_b: bytes = b"",
        ) -> Relay:
            relay = super().join(a, b, tls_a=tls_a, tls_b=tls_b, head_a=head_a, head_b=head_b)
            self.made = [relay]
            return relay

    relays = Keeping(Settings(threads=1))
    async with serving(relays=relays) as desk:
        client = await desk.client()
        await desk.links(client, 1)
        await desk.visit()
        await until(lambda: desk.figures.relays_open == 1, 5, "the relay")
        relays.made[0].result.cancel()
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        assert desk.figures.relays_open == 0
    await relays.close()


@both
async def test_relay_cut_by_its_engine_is_no_longer_counted() -> None:
    relays = Relays(Settings(threads=1))
    async with serving("log=debug", relays=relays) as desk:
        client = await desk.client()
        await desk.links(client, 1)
        visitor = await desk.visit()
        await until(lambda: desk.figures.relays_open == 1, 5, "the relay")
        await relays.close()
        assert await is_reset(visitor)
        await until(lambda: not desk.figures.visitors_open, 5, "the end")


# --- links ---------------------------------------------------------------------------------------


@both
async def test_link_with_a_wrong_proof_is_reset() -> None:
    async with serving() as desk:
        client = await desk.client()
        link = await desk.link(client, 1, proof="00" * 32)
        assert await is_reset(link)
        figures = desk.figures
        assert (figures.links, figures.strangers) == (0, 1)


@both
async def test_link_of_an_unknown_session_is_reset_and_no_attack() -> None:
    async with serving() as desk:
        stranger = await desk.call()
        await stranger.write(f"link://{'ab' * 8}?i=1&p={'00' * 32}\n".encode())
        assert await is_reset(stranger)
        figures = desk.figures
        assert (figures.links, figures.strangers) == (0, 0)


@both
async def test_link_number_is_good_for_one_link() -> None:
    async with serving() as desk:
        client = await desk.client()
        await desk.links(client, 1)
        assert await is_reset(await desk.link(client, 1)), "it lies ready"
        visitor = await desk.visit()
        assert await launched(client) == 1
        assert await is_reset(await desk.link(client, 1)), "it carries a visitor"
        visitor.reset()
        await until(lambda: not desk.figures.visitors_open, 5, "the end of the relay")
        assert desk.figures.links == 1


@both
async def test_links_beyond_all_bounds_are_reset() -> None:
    async with serving(min_pool_capacity=1, max_pool_capacity=2) as desk:
        client = await desk.client()
        room = descriptors.IDLE_ROOM * 2
        await desk.links(client, *range(room))
        assert await is_reset(await desk.link(client, 99))
        assert desk.figures.links_idle == room
