"""server: clients, links and visitors, with hand-driven peers in the same loop."""

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
from OpenSSL.SSL import Connection
from tests.kit.server_desk import Desk, config, is_reset, launched, serving
from tests.kit.stream import connect
from tests.kit.timing import free_port, until, within

from nodepass.config.environment import Settings
from nodepass.engine.relays import Relay, Relays
from nodepass.errors import ListenError, TunnelError
from nodepass.net import tcp
from nodepass.net.listener import Listener
from nodepass.server import connected_client, sessions
from nodepass.server import server as server_module
from nodepass.server.server import Server

both = pytest.mark.loops("asyncio", "uvloop")

NONCE = "00" * 16


# --- visitors ----------------------------------------------------------------------------------


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
    assert "a fault of ours in waiting for a link" in caplog.text


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


# --- links -------------------------------------------------------------------------------------


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
        room = tcp.IDLE_ROOM * 2
        await desk.links(client, *range(room))
        assert await is_reset(await desk.link(client, 99))
        assert desk.figures.links_idle == room


# --- sessions ----------------------------------------------------------------------------------


@both
async def test_client_of_the_same_name_takes_the_place() -> None:
    async with serving() as desk:
        old = await desk.client("twin")
        await desk.links(old, 1, 2)
        visitor = await desk.visit()
        number = await launched(old)
        assert number == 2
        new = await desk.client("twin")
        assert await old.signal() == "bye://replaced"
        assert await old.control.read_all() == b""
        figures = desk.figures
        assert (figures.sessions, figures.sessions_open, figures.links_idle) == (2, 1, 0)
        assert figures.relays_open == 1, "relays outlive their session"
        await desk.links(new, 1)
        await visitor.write(b"x")
        await desk.visit()
        assert await launched(new) == 1


@both
async def test_two_of_one_name_in_one_turn() -> None:
    async with serving() as desk:
        callers = [await desk.call() for _ in range(2)]
        for caller in callers:
            caller.sock.send(f"hello://twin?v=2&n={NONCE}\n".encode())
        async with within(5):
            answers = [await caller.read_line() for caller in callers]
        assert all(answer.startswith(b"welcome://") for answer in answers)
        assert desk.figures.sessions_open == 1
        async with within(2):
            ends = {asyncio.create_task(caller.read_all()) for caller in callers}
            done, alive = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            assert done.pop().result().endswith(b"bye://replaced\n")
        assert len(alive) == 1
        for task in alive:
            task.cancel()
        await asyncio.wait(alive)


@both
@pytest.mark.parametrize(
    ("hello", "most", "reason"),
    [("v=1", 9, b"version"), ("v=2", 0, b"limit")],
)
@pytest.mark.parametrize("stays", [True, False])
async def test_hello_that_is_refused(
    hello: str, most: int, reason: bytes, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_CLIENTS", most)
    async with serving() as desk:
        caller = await desk.call()
        caller.sock.send(f"hello://me?{hello}&n={NONCE}\n".encode())
        if stays:
            assert await caller.read_all() == b"refuse://" + reason + b"\n"
        else:
            caller.reset()
        await until(lambda: desk.figures.strangers == 1, 5, "the refusal")
        assert desk.figures.sessions == 0


async def _hello(desk: Desk, name: str, source: str = "") -> bytes:
    caller = await desk.call(source)
    caller.sock.send(f"hello://{name}?v=2&n={NONCE}\n".encode())
    return await caller.read_line()


@both
async def test_c24_sessions_of_one_source_leave_room_to_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A source has as many as are left: half if it is alone, a third beside another."""
    monkeypatch.setattr(sessions, "MAX_CLIENTS", 9)
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn") as desk:
            admitted = []
            for step in range(5):
                for source in ("127.0.0.1", "127.0.0.9"):
                    answer = await _hello(desk, f"{source}-{step}", source)
                    admitted.append(answer.startswith(b"welcome://"))
            assert admitted == [True] * 6 + [False] * 4
            assert (await _hello(desk, "other", "127.0.0.10")).startswith(b"welcome://")
            # Who comes back for its own session makes none more, and nobody else may by its name.
            assert (await _hello(desk, "127.0.0.1-0", "127.0.0.1")).startswith(b"welcome://")
            assert await _hello(desk, "127.0.0.9-0", "127.0.0.1") == b"refuse://limit\n"
            await until(lambda: desk.figures.sessions_open == 7, 5, "seven sessions")
    assert "there are 3 clients of this address, and room for only 3 more" in caplog.text


@both
async def test_c24_who_has_the_password_is_not_counted_by_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "MAX_CLIENTS", 4)
    async with serving(password="secret") as desk:
        for number in range(4):
            await desk.client(f"c{number}", password="secret")
        assert desk.figures.sessions_open == 4


@both
async def test_c23_lost_sessions_that_are_remembered_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each with a relay that goes on without it."""
    monkeypatch.setattr(sessions, "MAX_GONE", 2)
    async with serving() as desk:
        visitors = []
        for number in range(4):
            client = await desk.client(f"c{number}")
            (link,) = await desk.links(client, 1)
            visitors.append(await desk.visit())
            await launched(client)
            client.control.close()
            await until(lambda n=number: desk.figures.sessions_open == 0, 5, "the loss")  # type: ignore[misc]
            await link.write(b"still here")
            assert await visitors[-1].read_exactly(10) == b"still here"
        assert len(desk.server._sessions._gone) == 2


@both
async def test_c23_relays_that_have_ended_are_soon_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their client may still say why one failed; what it never says must not pile up."""
    monkeypatch.setattr(connected_client, "PARTED", 2)
    async with serving() as desk:
        client = await desk.client()
        for number in range(1, 6):
            await desk.links(client, number)
            visitor = await desk.visit()
            await launched(client)
            visitor.reset()
            await until(lambda: desk.figures.relays_open == 0, 5, "the end of a relay")
        (known,) = desk.server._sessions._clients.values()
        assert list(known.parted) == [4, 5]
        assert not known.launched


@both
async def test_client_that_leaves_during_its_handshake() -> None:
    async with serving() as desk:
        for _ in range(5):
            caller = await desk.call()
            caller.sock.send(f"hello://me?v=2&n={NONCE}\n".encode())
            caller.reset()
        await asyncio.sleep(0.05)
        await until(lambda: not desk.figures.sessions_open, 5, "nobody")
        await desk.client("me")
        assert desk.figures.sessions_open == 1


@both
async def test_client_whose_connection_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as desk:

        def fail(*_: object) -> None:
            raise OSError("no such option")

        monkeypatch.setattr("nodepass.tunnel.control.limit_silence", fail)
        client = await desk.client()
        await client.control.read_all()
        await until(lambda: not desk.figures.sessions_open, 5, "the end of the session")


@both
async def test_failed_launch_resets_its_visitor() -> None:
    async with serving() as desk:
        client = await desk.client()
        await desk.links(client, 1)
        visitor = await desk.visit()
        number = await launched(client)
        await client.say("fail://77?why=refused")
        await client.say(f"fail://{number}?why=refused")
        assert await is_reset(visitor)
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        figures = desk.figures
        assert (figures.launches_failed, figures.visitors_refused) == (1, 1)
        await client.say(f"fail://{number}?why=refused")
        await client.say("ping://9")
        async with within(5):
            while await client.control.read_line() != b"pong://9\n":
                pass
        assert desk.figures.launches_failed == 1, "said twice counts once"


@both
async def test_client_that_drains_gets_no_visitors() -> None:
    async with serving() as desk:
        leaving, staying = await desk.client("leaving"), await desk.client("staying")
        (idle,) = await desk.links(leaving, 1)
        await desk.links(staying, 1)
        await leaving.say("drain://")
        assert await is_reset(idle), "nothing will be launched on it"
        await desk.visit()
        assert await launched(staying) == 1
        late = await desk.link(leaving, 2)
        assert await is_reset(late)


@both
@pytest.mark.parametrize("how", ["end", "reset", "bye", "garbage"])
async def test_lost_control_costs_idle_links_and_no_relay(how: str) -> None:
    async with serving() as desk:
        client = await desk.client()
        idle, used = await desk.links(client, 1, 2)
        visitor = await desk.visit()
        assert await launched(client) == 2
        if how == "end":
            client.control.close()
        elif how == "reset":
            client.control.reset()
        else:
            await client.say("bye://stopped" if how == "bye" else "x" * 3000)
        assert await is_reset(idle)
        assert desk.figures.sessions_open == 0
        await visitor.write(b"still")
        assert await used.read_exactly(5) == b"still"


@both
async def test_silent_client_is_lost() -> None:
    async with serving(report_interval=0.05) as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 1)
        await until(lambda: not desk.figures.sessions_open, 5, "the loss")
        assert await is_reset(link)


@both
async def test_silent_client_costs_the_visitors_it_may_never_have_heard_of() -> None:
    async with serving(report_interval=0.2) as desk:
        client = await desk.client()
        unheard_link, heard_link = await desk.links(client, 1, 2)
        heard, unheard = await desk.visit(), await desk.visit()
        assert {await launched(client), await launched(client)} == {1, 2}
        await heard_link.write(b"answer")
        assert await heard.read_exactly(6) == b"answer"
        await until(lambda: not desk.figures.sessions_open, 5, "the loss")
        assert await is_reset(unheard)
        assert await is_reset(unheard_link)
        await heard.write(b"x")
        assert await heard_link.read_exactly(1) == b"x"


@both
async def test_round_trip_is_known_after_a_pong() -> None:
    async with serving(report_interval=0.1) as desk:
        client = await desk.client()
        assert desk.figures.rtt is None
        async with within(5):
            while not (line := await client.control.read_line()).startswith(b"ping://"):
                pass
            await client.say(line.decode().strip().replace("ping", "pong"))
        await until(lambda: desk.figures.rtt is not None, 5, "the round trip")


@both
async def test_demand_is_announced_and_shrinks_in_quiet() -> None:
    async with serving(report_interval=0.1, min_pool_capacity=2, dial_timeout=20.0) as desk:
        client = await desk.client()
        assert client.idle == 2
        visitors = [await desk.visit() for _ in range(20)]
        seen: list[int] = []

        async def listen() -> None:
            while line := await client.control.read_line():
                text = line.decode().strip()
                if text.startswith("idle://"):
                    seen.append(int(text.removeprefix("idle://")))
                elif text.startswith("ping://"):
                    await client.say(text.replace("ping", "pong"))

        listening = asyncio.create_task(listen())
        await until(lambda: seen and seen[-1] >= 22, 5, "the wish for more")
        for visitor in visitors:
            visitor.reset()
        links = [await desk.link(client, number) for number in range(seen[-1])]
        await until(lambda: seen[-1] == 2, 10, "the wish for fewer")
        await until(lambda: desk.figures.links_idle <= 3, 5, "the retirement")
        assert desk.figures.links_wanted == 2
        assert sum(tcp.has_ended(link.sock) for link in links) >= len(links) - 4
        listening.cancel()
        await asyncio.wait({listening})


@both
async def test_crowd_at_the_tunnel_port_does_not_push_a_client_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The handshakes of an address that has a client are spared when room has to be made."""
    monkeypatch.setattr("nodepass.server.acceptor.MAX_PENDING", 8)
    async with serving() as desk:
        await desk.client()
        ours = [await desk.call() for _ in range(7)]
        stranger = await desk.call("127.0.0.2")
        await desk.call()
        assert await is_reset(stranger)
        assert not any(tcp.has_ended(stream.sock) for stream in ours)


# --- the seed dialect --------------------------------------------------------------------------


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


# --- life --------------------------------------------------------------------------------------


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


# --- limits of the machine ---------------------------------------------------------------------


@both
async def test_few_descriptors_bound_visitors_and_links(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tcp, "descriptor_limit", lambda: tcp.RESERVED_DESCRIPTORS + 8)
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


# --- silence and crowds ------------------------------------------------------------------------


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
    monkeypatch.setattr(tcp, "descriptor_limit", lambda: tcp.RESERVED_DESCRIPTORS + 24)
    async with serving() as desk:  # a stock of 6
        hog, honest = await desk.client("hog"), await desk.client("honest")
        links = await desk.links(hog, *range(6))
        await desk.links(honest, 1, 2)
        assert desk.figures.links_idle == 6
        assert await is_reset(links[0])
        assert await is_reset(links[1])
