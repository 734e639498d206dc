"""server: sessions, how they come and go, with hand-driven clients."""

from __future__ import annotations

import asyncio
import logging

import pytest
from tests.kit.engines import both
from tests.kit.server_desk import Desk, is_reset, launched, serving
from tests.kit.timing import until, within

from nodepass.net import tcp
from nodepass.server import connected_client, sessions

NONCE = "00" * 16


# --- sessions ------------------------------------------------------------------------------------


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
