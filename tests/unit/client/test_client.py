"""client: finding a server, a session and its end, stopping, with hand-driven servers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket

import pytest
from tests.kit.client_desk import (
    accept,
    hello_again,
    is_reset,
    paired,
    running,
    signal,
    take_links,
    welcome_again,
)
from tests.kit.engine_rig import FullListener
from tests.kit.engines import both
from tests.kit.peer import Listener, NativeServer, SeedServer
from tests.kit.timing import until, within

from nodepass.config.address import join_address
from nodepass.net import tcp, tcp_dial

# --- finding a server ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"", "is this the tunnel port"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "an HTTP server"),
        (b"//0?v=2&n=" + b"00" * 16 + b"&a=1#0\n", "wants a password"),
        (b"//12", "no greeting within"),
        (b"x" * 300, "longer than 256 bytes"),
    ],
)
async def test_what_is_no_server_for_us_is_named_and_tried_again(
    said: bytes, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        listener = Listener()
        async with running(listener.port, "log=warn", handshake_timeout=0.05):
            for _ in range(3):
                async with await accept(listener) as stream:
                    await stream.write(said)
                    with contextlib.suppress(ConnectionResetError):
                        assert await stream.read() == b"", "not a byte of ours for a stranger"
        listener.close()
    assert told in caplog.text
    assert len(caplog.records) == 1, "told once a minute"
    assert "Traceback" not in caplog.text, "nothing is wrong with us"


@both
@pytest.mark.parametrize("how", ["end", "reset"])
async def test_server_that_hangs_up_is_tried_again(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        listener = Listener()
        async with running(listener.port, "log=warn"):
            for _ in range(3):
                stream = await accept(listener)
                if how == "reset":
                    stream.reset()
                else:
                    stream.close()
        listener.close()
    assert "no tunnel; trying again" in caplog.text


@both
async def test_server_that_resets_before_we_have_looked_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = Listener()
    dials = 0
    dial = tcp_dial.dial

    async def dial_and_lose(*address: object) -> socket.socket:
        nonlocal dials
        sock = await dial(*address)  # type: ignore[arg-type]
        (await accept(listener)).reset()
        await until(lambda: tcp.has_ended(sock), 5, "the reset")
        dials += 1
        return sock

    monkeypatch.setattr(tcp_dial, "dial", dial_and_lose)
    async with running(listener.port):
        await until(lambda: dials > 2, 5, "three tries")
    listener.close()


@both
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"refuse://limit\n", "the server refused us: limit"),
        (b"refuse://auth\n", "the server and we do not agree"),
        (b"nonsense\n", "not one of our lines"),
        (b"welcome://" + b"ab" * 8 + b"?idle=2\n", "no session key"),
    ],
)
async def test_server_that_refuses_is_tried_again(
    answer: bytes, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with NativeServer() as server, running(server.listener.port, "log=warn") as desk:
            for _ in range(2):
                stream, _, hello = await server.accept()
                assert hello.startswith("hello://me?")
                await stream.write(answer)
                with contextlib.suppress(ConnectionResetError):
                    assert await stream.read() == b""
            assert desk.figures.sessions == 0
    assert told in caplog.text


@both
async def test_seed_server_without_compat_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with SeedServer() as server, running(server.listener.port, "log=warn&compat=0"):
            await server.greet()
            with contextlib.suppress(ConnectionResetError):
                await server.control.read()
            await until(lambda: caplog.records, 5, "a word about it")
    assert "compat=0" in caplog.text


@both
async def test_greeting_and_welcome_may_come_in_pieces() -> None:
    async with NativeServer() as server, running(server.listener.port) as desk:
        stream = server.keep(await accept(server.listener))
        for piece in (b"//0?v=2&n=" + b"00" * 8, b"00" * 8 + b"&a=0", b"#0\n"):
            await stream.write(piece)
            await asyncio.sleep(0.01)
        assert (await stream.read_line()).startswith(b"hello://me?")
        for text in (
            f"welcome://{server.session}?k=",
            server.key.hex(),
            "&idle=2\nping:",
            "//7\n",
        ):
            await stream.write(text.encode())
            await asyncio.sleep(0.01)
        async with within(5):
            while (line := await stream.read_line()) != b"pong://7\n":
                assert line
        assert desk.figures.sessions_open == 1


@both
async def test_fault_of_ours_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    with caplog.at_level(logging.ERROR, "nodepass"):
        async with NativeServer() as server, running(server.listener.port, "log=error") as desk:
            with monkeypatch.context() as patch:
                patch.setattr("nodepass.client.client.ClientSession", fail)
                await server.welcome()
                with contextlib.suppress(ConnectionResetError):
                    await server.control.read_all()
            async with within(5):
                while not desk.figures.sessions_open:
                    await server.welcome()
                    await asyncio.sleep(0.01)
    assert "an internal error in the client" in caplog.text


@both
async def test_control_that_cannot_be_opened_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no such option")

    async with NativeServer() as server, running(server.listener.port) as desk:
        with monkeypatch.context() as patch:
            patch.setattr("nodepass.tunnel.control.limit_silence", fail)
            await server.welcome()
            with contextlib.suppress(ConnectionResetError):
                await server.control.read_all()
            assert desk.figures.sessions_open == 0
        await server.welcome()
        await take_links(server, 2)


# --- a session -----------------------------------------------------------------------------------


@both
async def test_keeps_as_many_links_as_the_server_wants_within_our_bounds() -> None:
    async with paired(idle=5, max_pool_capacity=8) as (server, desk, first):
        links = dict(first)
        assert sorted(first) == [1, 2, 3, 4, 5]
        await until(lambda: desk.figures.links_idle == 5, 5, "five links")
        for wanted, expected in ((7, 7), (99, 8), (0, 2)):
            await server.say(f"idle://{wanted}")
            await until(lambda expected=expected: desk.figures.links_wanted == expected, 5, "it")  # type: ignore[misc]
            if wanted:
                links |= await take_links(server, expected - len(links))
        assert desk.figures.links_idle == 8, "too many are not thrown away"
        assert desk.figures.links == 8


@both
async def test_dead_idle_link_is_replaced_at_once() -> None:
    async with paired() as (server, desk, links):
        links.pop(1).reset()
        number, _ = await server.link()
        assert number == 3
        links.pop(2).close()
        number, _ = await server.link()
        assert number == 4
        assert desk.figures.links_lost == 2


@both
async def test_replaced_client_goes_on_under_another_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with NativeServer() as server, running(server.listener.port, "log=warn") as desk:
            assert await welcome_again(server) == "me"
            names = []
            for _ in range(2):
                await server.say("bye://replaced")
                names.append(await welcome_again(server))
            assert all(re.fullmatch("me-[0-9a-f]{4}", name) for name in names)
            assert names[0] != names[1]
            assert desk.client._reconnect.name == names[1]
    assert "another client of our name" in caplog.text


@both
@pytest.mark.parametrize("how", ["end", "reset", "bye", "silence"])
async def test_lost_session_costs_idle_links_and_no_relay(how: str) -> None:
    interval = 0.05 if how == "silence" else 5.0
    async with paired(report_interval=interval) as (server, desk, links):
        await server.say("tcp://1?from=10.0.0.1:1")
        visitor = await desk.at_target()
        if how == "end":
            server.control.close()
        elif how == "reset":
            server.control.reset()
        elif how == "bye":
            await server.say("bye://stopped")
        assert await is_reset(links[2])
        assert await welcome_again(server) == "me", "back by itself, under its own name"
        await links[1].write(b"still")
        assert await visitor.read_exactly(5) == b"still"


@both
async def test_round_trip_is_known_after_a_pong() -> None:
    async with paired(report_interval=0.1) as (server, desk, _):
        assert desk.figures.rtt is None
        async with within(5):
            while not (line := await server.control.read_line()).startswith(b"ping://"):
                pass
        await server.say(line.decode().strip().replace("ping", "pong"))
        await until(lambda: desk.figures.rtt is not None, 5, "the round trip")


@both
async def test_links_that_cannot_be_made_are_tried_again_with_pauses() -> None:
    async with NativeServer() as server, running(server.listener.port) as desk:
        await server.welcome(2)
        for said in (b"//9102#0\n", b"HTTP/1.1 400\r\n\r\n", b""):
            for _ in range(2):
                async with await accept(server.listener) as stream:
                    if said:
                        await stream.write(said)
                        with contextlib.suppress(ConnectionResetError):
                            assert await stream.read() == b""
        links = await take_links(server, 2)
        assert sorted(links) == [1, 2]
        assert desk.figures.sessions == 1, "the session was not harmed"


# --- stopping ------------------------------------------------------------------------------------


@both
async def test_stop_drains() -> None:
    async with paired(shutdown_timeout=10.0) as (server, desk, links):
        await server.say("tcp://1?from=10.0.0.1:1")
        target = await desk.at_target()
        (await server.link())[1].close()
        stopping = asyncio.create_task(desk.client.stop())
        assert await signal(server) == "drain://"
        links[2].reset()  # what a server does that has heard of it
        await links[1].write(b"late")
        assert await target.read_exactly(4) == b"late"
        assert not stopping.done()
        links[1].close()
        target.close()
        assert await signal(server) == "bye://stopped"
        async with within(5):
            await stopping
        assert desk.figures.bytes_up == 4


@both
async def test_stop_waits_for_a_launch_on_its_way() -> None:
    """The server has launched before it hears the drain."""
    async with paired(shutdown_timeout=10.0) as (server, desk, links):
        stopping = asyncio.create_task(desk.client.stop())
        assert await signal(server) == "drain://"
        await server.say("tcp://1?from=10.0.0.1:1")
        target = await desk.at_target()
        links[2].reset()
        await links[1].write(b"x")
        assert await target.read_exactly(1) == b"x"
        await asyncio.sleep(0.02)
        assert not stopping.done()
        links[1].close()
        target.close()
        async with within(5):
            await stopping


@both
async def test_c16_stop_ends_with_the_answer_behind_the_drain() -> None:
    """The links need not go first: the answer comes behind every launch."""
    async with paired(shutdown_timeout=20.0) as (server, desk, _):
        stopping = asyncio.create_task(desk.client.stop())
        assert await signal(server) == "drain://"
        for number in range(1, 3):  # the session's first ping, and the one behind the drain
            await server.say(f"pong://{number}")
        async with within(5):
            await stopping


@both
async def test_c16_stop_ends_when_the_last_link_was_launched() -> None:
    async with paired(shutdown_timeout=20.0) as (server, desk, links):
        stopping = asyncio.create_task(desk.client.stop())
        assert await signal(server) == "drain://"
        links[1].reset()
        await server.say("tcp://2?from=10.0.0.1:1")
        target = await desk.at_target()
        links[2].close()
        target.close()
        async with within(5):
            await stopping


@both
async def test_stop_cuts_what_does_not_end(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nodepass"):
        async with paired("log=info", shutdown_timeout=0.05) as (server, desk, _):
            await server.say("tcp://1?from=10.0.0.1:1")
            target = await desk.at_target()
            async with within(5):
                await desk.client.stop()
            assert await is_reset(target)
    assert "SHUTDOWN_TIMEOUT is over" in caplog.text
    assert "relays_cut=1" in caplog.text


@both
async def test_stop_while_a_target_is_dialled() -> None:
    full = FullListener()
    target = join_address(*full.name)
    async with paired(target=target, shutdown_timeout=0.05) as (server, desk, links):
        await server.say("tcp://1?from=10.0.0.1:1")
        await until(lambda: desk.figures.visitors_open == 1, 5, "the launch")
        async with within(5):
            await desk.client.stop()
        assert await is_reset(links[1])
        figures = desk.figures
        assert (figures.visitors_open, figures.relays_open, figures.launches_failed) == (0, 0, 0)
    full.close()


@both
@pytest.mark.parametrize("stage", ["dialling", "greeting", "welcome", "pause"])
async def test_stop_while_still_looking_for_the_server(stage: str) -> None:
    async with NativeServer() as server, running(server.listener.port) as desk:
        if stage == "dialling":
            await asyncio.sleep(0)
        if stage == "pause":
            (await accept(server.listener)).close()
            await asyncio.sleep(0.01)
        elif stage == "greeting":
            server.keep(await accept(server.listener))
        elif stage == "welcome":
            await server.accept()
        async with within(5):
            await desk.client.stop()


@both
async def test_stop_with_a_relay_of_a_lost_session_opens_no_new_one() -> None:
    async with paired(shutdown_timeout=10.0) as (server, desk, links):
        await server.say("tcp://1?from=10.0.0.1:1")
        target = await desk.at_target()
        server.control.close()
        stream, _ = await hello_again(server)
        stopping = asyncio.create_task(desk.client.stop())
        await asyncio.sleep(0.01)
        await stream.write(f"welcome://{server.session}?k={server.key.hex()}&idle=2\n".encode())
        with contextlib.suppress(ConnectionResetError):
            async with within(5):
                assert await stream.read_all() == b""
        assert desk.figures.sessions_open == 0
        await links[1].write(b"late")
        assert await target.read_exactly(4) == b"late"
        links[1].close()
        target.close()
        async with within(5):
            await stopping


@both
async def test_stop_cancelled_while_a_visitor_is_served() -> None:
    async with paired(shutdown_timeout=60.0, semaphore_limit=1) as (server, desk, links):
        await server.say("tcp://1?from=10.0.0.1:1\ntcp://2?from=10.0.0.1:2")
        target = await desk.at_target()
        stopping = asyncio.create_task(desk.client.stop())
        await asyncio.sleep(0.02)
        stopping.cancel()
        async with within(5):
            await asyncio.wait({stopping})
        assert stopping.cancelled()
        assert await is_reset(target)
        assert await is_reset(links[1])
        assert await is_reset(links[2]), "the one that waited for its turn"
        assert desk.figures.visitors_open == 0


@both
async def test_server_that_stops_gets_no_new_links() -> None:
    async with paired() as (server, desk, links):
        await server.say("drain://")
        await asyncio.sleep(0.01)
        links[1].reset()
        await until(lambda: desk.figures.links_lost == 1, 5, "the loss")
        await asyncio.sleep(0.05)
        assert desk.figures.links_idle == 1
        await server.say("bye://stopped")
        assert await welcome_again(server) == "me"
