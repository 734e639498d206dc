"""client: what becomes of a launch, with hand-driven servers in the same loop."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket

import pytest
from OpenSSL.SSL import Connection
from tests.kit.client_desk import (
    accept,
    is_reset,
    paired,
    signal,
)
from tests.kit.engine_rig import FullListener
from tests.kit.engines import both
from tests.kit.peer import Listener
from tests.kit.timing import until

from nodepass.config.address import join_address
from nodepass.config.environment import Settings
from nodepass.engine.relays import Reason, Relay, Relays
from nodepass.net import tcp
from nodepass.net.resolver import SocketAddress


@both
async def test_launch_joins_the_link_with_the_target(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with paired("log=debug") as (server, desk, links):
            await links[1].write(b"early")
            await asyncio.sleep(0.01)
            await server.say("tcp://1?from=10.0.0.1:1")
            target = await desk.at_target()
            assert await target.read_exactly(5) == b"early"
            figures = desk.figures
            assert (figures.visitors, figures.visitors_open, figures.relays_open) == (1, 1, 1)
            await target.write(b"answer")
            target.finish()
            assert await links[1].read_all() == b"answer"
            links[1].finish()
            await until(lambda: not desk.figures.visitors_open, 5, "the end")
            figures = desk.figures
            assert (figures.bytes_up, figures.bytes_down, figures.relays_reset) == (5, 6, 0)
            assert (await server.link())[0] == 3, "and another lies ready"
    assert "relay ended" in caplog.text


@both
@pytest.mark.parametrize("question", [b"", b"question"])
async def test_visitors_end_may_overtake_its_launch(question: bytes) -> None:
    async with paired() as (server, desk, links):
        await links[1].write(question)
        links[1].finish()
        await asyncio.sleep(0.03)
        await server.say("tcp://1?from=10.0.0.1:1")
        target = await desk.at_target()
        assert await target.read_all() == question
        await target.write(b"answer")
        target.finish()
        assert await links[1].read_all() == b"answer"


@both
async def test_link_that_was_reset_before_its_launch() -> None:
    async with paired() as (server, desk, links):
        links[1].reset()
        await until(lambda: desk.figures.links_lost == 1, 5, "the loss")
        await server.say("tcp://1?from=10.0.0.1:1")
        assert await signal(server) == "fail://1?why=unknown"
        figures = desk.figures
        assert (figures.launches_failed, figures.visitors_open) == (1, 0)


@both
async def test_launch_of_a_link_that_never_was_or_is_taken() -> None:
    async with paired() as (server, desk, links):
        await server.say("tcp://77?from=10.0.0.1:1")
        assert await signal(server) == "fail://77?why=unknown"
        await server.say("tcp://1?from=10.0.0.1:1\ntcp://1?from=10.0.0.1:1")
        assert await signal(server) == "fail://1?why=unknown"
        target = await desk.at_target()
        await links[1].write(b"x")
        assert await target.read_exactly(1) == b"x", "the first launch is not harmed"
        assert desk.figures.launches_failed == 2


@both
async def test_refused_target_is_answered_and_the_link_reset() -> None:
    async with paired() as (server, desk, links):
        desk.target.close()
        await server.say("tcp://1?from=10.0.0.1:1")
        assert await signal(server) == "fail://1?why=refused"
        assert await is_reset(links[1])
        figures = desk.figures
        assert (figures.launches_failed, figures.visitors_refused) == (1, 1)
        assert figures.visitors_open == 0


@both
@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ETIMEDOUT, "timeout"),
        (errno.EMFILE, "limit"),
        (errno.EHOSTUNREACH, "unreachable"),
        (0, "unreachable"),
    ],
)
async def test_failure_of_the_target_has_a_name(
    code: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Relay.finish

    def fail(relay: Relay) -> None:
        assert relay.ending is not None
        assert (relay.ending.reason, relay.ending.side) == (Reason.UNMET, 2)
        relay.ending = relay.ending._replace(code=code)
        finish(relay)

    async with paired() as (server, desk, links):
        desk.target.close()
        monkeypatch.setattr(Relay, "finish", fail)
        await server.say("tcp://1?from=10.0.0.1:1")
        assert await signal(server) == f"fail://1?why={why}"
        assert await is_reset(links[1])
        figures = desk.figures
        assert (figures.launches_failed, figures.visitors_refused) == (1, 1)
        assert (figures.visitors_open, figures.relays_open, figures.relays_reset) == (0, 0, 0)
        assert desk.client._places._slots._free == desk.client._places._limit


@both
async def test_target_that_does_not_answer_in_time() -> None:
    full = FullListener()
    target = join_address(*full.name)
    async with paired(target=target, dial_timeout=0.1) as (server, desk, links):
        await server.say("tcp://1?from=10.0.0.1:1")
        assert await signal(server) == "fail://1?why=timeout"
        assert await is_reset(links[1])
        assert desk.client._places._slots._free == desk.client._places._limit
    full.close()


@both
async def test_the_longest_time_to_dial_is_no_fault() -> None:
    longest = 8760 * 3600.0
    async with paired(dial_timeout=longest) as (server, desk, _links):
        await server.say("tcp://1?from=10.0.0.1:1")
        await until(lambda: desk.figures.relays_open == 1, 5, "the relay")
        await asyncio.sleep(0.05)
        assert (desk.figures.relays_open, desk.figures.visitors_refused) == (1, 0)


@both
async def test_visitor_that_has_gone_while_its_target_is_dialled() -> None:
    """The server knows, and there has been no relay: nobody is told anything."""
    full = FullListener()
    async with paired(target=join_address(*full.name)) as (server, desk, links):
        await server.say("tcp://1?from=10.0.0.1:1")
        await until(lambda: desk.figures.relays_open == 1, 5, "the dial")
        links[1].reset()
        await until(lambda: desk.figures.visitors_open == 0, 5, "its end")
        await server.say("tcp://77?from=10.0.0.1:1")
        assert await signal(server) == "fail://77?why=unknown", "the first word that is said"
        figures = desk.figures
        assert (figures.relays_open, figures.relays_reset, figures.launches_failed) == (0, 0, 1)
        assert desk.client._places._slots._free == desk.client._places._limit
    full.close()


@both
async def test_no_socket_to_dial_the_target_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "too many open files")

    async with paired() as (server, desk, links):
        monkeypatch.setattr(tcp, "open_stream", fail)
        await server.say("tcp://1?from=10.0.0.1:1")
        assert await signal(server) == "fail://1?why=limit"
        assert await is_reset(links[1])
        assert desk.figures.visitors_open == 0
        assert desk.client._places._slots._free == desk.client._places._limit


@both
@pytest.mark.parametrize("where", ["open_stream", "connect"])
async def test_fault_in_one_launch_ends_that_one_only(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with paired("log=error") as (server, desk, links):

        def fail(*_: object, **__: object) -> bool:
            raise RuntimeError("on purpose")

        monkeypatch.setattr(desk.relays if where == "connect" else tcp, where, fail)
        await server.say("tcp://1?from=10.0.0.1:1")
        assert await is_reset(links[1])
        monkeypatch.undo()
        await until(lambda: not desk.figures.visitors_open, 5, "the end of its serving")
        await server.say("tcp://2?from=10.0.0.1:1")
        target = await desk.at_target()
        await links[2].write(b"others")
        assert await target.read_exactly(6) == b"others"
        assert desk.client._places._slots._free == desk.client._places._limit - 1
    assert "an internal error in serving a visitor" in caplog.text


@both
async def test_engine_that_refuses_is_answered() -> None:
    relays = Relays(Settings(threads=1))
    async with paired(relays=relays) as (server, desk, links):
        await relays.close()
        await server.say("tcp://1?from=10.0.0.1:1")
        assert await signal(server) == "fail://1?why=limit"
        assert await is_reset(links[1])
        assert desk.figures.visitors_open == 0
        assert desk.client._places._slots._free == desk.client._places._limit


@both
async def test_engine_that_refuses_a_target_with_a_name_is_answered() -> None:
    relays = Relays(Settings(threads=1))
    target = Listener()
    name = f"localhost:{target.port}"
    async with paired(relays=relays, target=name) as (server, desk, links):
        await relays.close()
        await server.say("tcp://1?from=10.0.0.1:1")
        assert await signal(server) == "fail://1?why=limit"
        assert await is_reset(links[1])
        async with await accept(target) as stream:
            assert await is_reset(stream)
        assert desk.client._places._slots._free == desk.client._places._limit
    target.close()


@both
async def test_relay_without_a_result_is_no_longer_counted() -> None:
    class Keeping(Relays):
        made: list[Relay]

        def connect(
            self,
            link: socket.socket,
            sock: socket.socket,
            address: SocketAddress | None,
            *,
            tls: Connection | None = None,
            head: bytes = b"",
            timeout: float,
        ) -> Relay:
            relay = super().connect(link, sock, address, tls=tls, head=head, timeout=timeout)
            self.made = [relay]
            return relay

    relays = Keeping(Settings(threads=1))
    async with paired(relays=relays) as (server, desk, _):
        await server.say("tcp://1?from=10.0.0.1:1")
        await desk.at_target()
        await until(lambda: desk.figures.relays_open == 1, 5, "the relay")
        relays.made[0].result.cancel()
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        assert desk.figures.relays_open == 0
    await relays.close()


@both
@pytest.mark.parametrize("kind", ["udp", "tcp"])
async def test_a_protocol_that_is_off_is_refused(kind: str) -> None:
    async with paired(f"{kind}=0&log=none") as (server, _, links):
        await server.say(f"{kind}://1?from=10.0.0.1:1")
        assert await signal(server) == "fail://1?why=refused"
        assert await is_reset(links[1])
        assert (await server.link())[0] == 3, "and another takes its place"


@both
async def test_launches_beyond_the_limit_wait_their_turn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with paired("log=warn", semaphore_limit=1) as (server, desk, links):
            await server.say("tcp://1?from=10.0.0.1:1\ntcp://2?from=10.0.0.1:2")
            first = await desk.at_target()
            await until(lambda: desk.figures.visitors_waiting == 1, 5, "the second")
            await links[2].write(b"x")
            first.reset()
            second = await desk.at_target()
            assert await second.read_exactly(1) == b"x"
    assert "SEMAPHORE_LIMIT" in caplog.text
