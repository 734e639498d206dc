"""client: UDP launches, against hand-driven servers in the same loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Sequence

import pytest
from OpenSSL.SSL import Connection
from tests.kit.authority import Authority
from tests.kit.client_desk import (
    Desk,
    is_reset,
    paired,
    running,
    seeded,
    signal,
    take_links,
    welcome_again,
)
from tests.kit.datagram import Address, Handler, UdpTarget, echo, listen_only
from tests.kit.engines import both, engines
from tests.kit.peer import NativeServer
from tests.kit.stream import Stream
from tests.kit.timing import free_port, limit, until, within
from tests.kit.udp_words import frame, frames

from nodepass.client import udp_target as targets
from nodepass.client import visitors
from nodepass.config.environment import Settings
from nodepass.engine.relays import Reason, Relays, UdpRelay, UdpResult
from nodepass.net import udp
from nodepass.observe.stats import NOTHING, Datagrams

VISITOR = "from=10.0.0.1:1"


def teach(monkeypatch: pytest.MonkeyPatch, **names: Sequence[str]) -> None:
    """Make the system resolve these names, and no others but 127.0.0.1."""

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[object]:
        if host not in names and host != "127.0.0.1":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in names.get(host, [host])
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def target(
    desk: Desk, handler: Handler = echo, *, host: str = "127.0.0.1", port: int = 0
) -> UdpTarget:
    """Serve UDP where the desk's client dials, or elsewhere; the target leaves with the desk."""
    made = UdpTarget(handler, host=host, port=port or desk.client.config.target.port)
    desk.stack.callback(made.close)
    return made


async def read(link: Stream) -> bytes:
    """Return the next datagram of a link."""
    async with within(5):
        return await link.read_exactly(int.from_bytes(await link.read_exactly(2), "big"))


async def ask(link: Stream, data: bytes = b"question") -> bytes:
    """Send a datagram over a link and return the next that comes back."""
    await link.write(frame(data))
    return await read(link)


class Keeping(Relays):
    """An engine whose UDP relays a test can reach, and what they were asked for."""

    def __init__(self, **settings: object) -> None:
        super().__init__(Settings(threads=1, **settings))  # type: ignore[arg-type]
        self.made: list[UdpRelay] = []
        self.idle: list[float] = []

    def dial(
        self,
        link: socket.socket,
        target: socket.socket,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        idle: float,
        is_raw: bool = False,
    ) -> UdpRelay:
        relay = super().dial(link, target, tls=tls, head=head, idle=idle, is_raw=is_raw)
        self.made.append(relay)
        self.idle.append(idle)
        return relay


# --- launches ----------------------------------------------------------------------------------


@both
@engines
async def test_launch_joins_the_link_with_the_target(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with paired("log=debug", engine=kind) as (server, desk, links):
            service = target(desk)
            await links[1].write(frames(b"early", b""))
            await asyncio.sleep(0.01)
            await server.say(f"udp://1?{VISITOR}")
            assert [await read(links[1]) for _ in range(2)] == [b"early", b""]
            assert await ask(links[1], b"late") == b"late"
            assert len(service.sources) == 1, "one socket for the whole session"
            figures = desk.figures
            assert (figures.visitors, figures.visitors_open, figures.relays_open) == (1, 1, 1)
            links[1].close()
            await until(lambda: not desk.figures.visitors_open, 5, "the end")
            figures = desk.figures
            assert (figures.bytes_up, figures.bytes_down, figures.relays_reset) == (9, 9, 0)
            assert figures.datagrams == Datagrams(up=3, down=3, bytes_up=9, bytes_down=9)
            assert (await server.link())[0] == 3, "and another lies ready"
    (line,) = [r.getMessage() for r in caplog.records if "relay ended" in r.getMessage()]
    assert "visitor=10.0.0.1:1  link=1  up=9  down=9  reason=finished" in line
    assert "carries=tcp,udp" in caplog.text


@both
async def test_each_launch_has_a_socket_of_its_own() -> None:
    async with paired() as (server, desk, links):
        service = target(desk)
        await server.say(f"udp://1?{VISITOR}\nudp://2?{VISITOR}")
        assert await ask(links[1], b"one") == b"one"
        assert await ask(links[2], b"two") == b"two"
        assert len(service.sources) == 2


@both
@engines
async def test_datagrams_travel_inside_tls(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = Authority(tmp_path_factory.mktemp("authority")).issue("127.0.0.1")
    async with (
        NativeServer(tls=1, files=files) as server,
        running(server.listener.port, engine=kind) as desk,
    ):
        await server.welcome(2)
        links = await take_links(server, 2)
        target(desk)
        await server.say(f"udp://1?{VISITOR}")
        assert await ask(links[1]) == b"question"


@both
async def test_launch_of_a_link_that_never_was() -> None:
    async with paired() as (server, desk, _):
        await server.say(f"udp://77?{VISITOR}")
        assert await signal(server) == "fail://77?why=unknown"
        assert desk.figures.visitors_open == 0


@both
@pytest.mark.parametrize("kind", ["udp", "tcp"])
async def test_a_protocol_that_is_off_is_refused(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with paired(f"{kind}=0&log=warn") as (server, desk, links):
            await server.say(f"{kind}://1?{VISITOR}")
            assert await signal(server) == "fail://1?why=refused"
            assert await is_reset(links[1])
            if kind == "tcp":
                target(desk)
                await server.say(f"udp://2?{VISITOR}")
                assert await ask(links[2]) == b"question"
    assert f"{kind}=0 is set here, but not on the server" in caplog.text


@both
async def test_launches_beyond_the_limit_wait_their_turn_with_tcp() -> None:
    async with paired(semaphore_limit=1, idle=3) as (server, desk, links):
        target(desk)
        await server.say(f"tcp://1?{VISITOR}\nudp://2?{VISITOR}\ntcp://3?{VISITOR}")
        first = await desk.at_target()
        await until(lambda: desk.figures.visitors_waiting == 2, 5, "the others")
        await links[2].write(frame(b"patience"))
        first.reset()
        assert await read(links[2]) == b"patience"
        assert desk.figures.visitors_waiting == 1
        links[2].close()
        await desk.at_target()


# --- targets that cannot be had ----------------------------------------------------------------


@both
async def test_name_that_does_not_resolve_is_answered_and_the_link_reset(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teach(monkeypatch)
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with paired("log=warn", target="nowhere:53", semaphore_limit=1) as kit:
            server, desk, links = kit
            for number in (1, 2):
                await server.say(f"udp://{number}?{VISITOR}")
                assert await signal(server) == f"fail://{number}?why=unreachable"
                assert await is_reset(links[number])
            figures = desk.figures
            assert (figures.launches_failed, figures.visitors_refused) == (2, 2)
            assert figures.visitors_open == 0
    assert "cannot reach udp nowhere:53: the name does not resolve" in caplog.text


@both
@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ENETUNREACH, "unreachable"),
        (errno.EMFILE, "limit"),
        (errno.ENOBUFS, "limit"),
        (errno.ETIMEDOUT, "timeout"),
    ],
)
async def test_failure_of_the_target_has_a_name(
    code: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> socket.socket:
        raise OSError(code, "as it happens")

    async with paired() as (server, _, links):
        monkeypatch.setattr(udp, "_connect", fail)
        await server.say(f"udp://1?{VISITOR}")
        assert await signal(server) == f"fail://1?why={why}"
        assert await is_reset(links[1])


@engines
@pytest.mark.slow
async def test_target_that_refuses_ends_the_session_and_is_avoided(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After two seconds of nothing else, so that a service may be restarted."""
    teach(monkeypatch, service=["127.0.0.2", "127.0.0.1"])
    port = free_port()
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with paired(
            "log=debug", target=f"service:{port}", report_interval=0.2, engine=kind
        ) as (server, desk, links):
            target(desk)  # on 127.0.0.1 alone
            talking = asyncio.create_task(talk(server))
            await server.say(f"udp://1?{VISITOR}")
            began = time.monotonic()
            while desk.figures.relays_reset == 0:
                assert time.monotonic() - began < limit(10)
                with contextlib.suppress(ConnectionError):  # it may have ended at this moment
                    await links[1].write(frame(b"anybody?"))
                await asyncio.sleep(0.05)
            assert time.monotonic() - began > 1.5
            assert await is_reset(links[1])
            assert desk.figures.datagrams.refused > 5
            await server.say(f"udp://2?{VISITOR}")
            assert await ask(links[2]) == b"question", "the other address is taken"
            talking.cancel()
            await asyncio.wait({talking})
    lines = [record.getMessage() for record in caplog.records]
    assert any("reason=econnrefused" in line for line in lines)
    told = [line for line in lines if line.startswith("nobody listens at the target")]
    assert told
    assert f"target=service:{port}" in told[0]
    assert "hint=" in told[0]


async def talk(server: NativeServer) -> None:
    """Keep a session with short report intervals alive."""
    while line := await server.control.read_line():
        text = line.decode().strip()
        if text.startswith("ping://"):
            await server.say(text.replace("ping", "pong"))


def refuse(relay: UdpRelay) -> None:
    """End a relay, as far as the client can tell, because its target refuses."""
    relay.result.set_result(UdpResult(NOTHING, Reason.RESET, 2, errno.ECONNREFUSED))


@both
async def test_only_the_last_refusal_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch, service=["127.0.0.1", "127.0.0.2"])
    port = free_port()
    relays = Keeping()
    async with paired(target=f"service:{port}", relays=relays, idle=4) as (server, desk, links):
        one, two = target(desk), target(desk, host="127.0.0.2")
        for number, expected in ((1, one), (2, two), (3, one)):
            await server.say(f"udp://{number}?{VISITOR}")
            before = expected.received
            assert await ask(links[number]) == b"question"
            assert expected.received == before + 1
            refuse(relays.made[-1])
            await until(lambda: not desk.figures.relays_open, 5, "the refusal")
    await relays.close()


@both
async def test_late_refusal_of_one_address_does_not_speak_against_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two sessions at the bad address: when the second ends, the good one is in use already."""
    teach(monkeypatch, service=["127.0.0.1", "127.0.0.2"])
    port = free_port()
    relays = Keeping()
    try:
        async with paired(target=f"service:{port}", relays=relays, idle=4) as kit:
            server, desk, links = kit
            bad, good = target(desk), target(desk, host="127.0.0.2")
            for number in (1, 2):
                await server.say(f"udp://{number}?{VISITOR}")
                assert await ask(links[number]) == b"question"
            assert bad.received == 2
            refuse(relays.made[0])
            await until(lambda: desk.figures.relays_open == 1, 5, "the first refusal")
            await server.say(f"udp://3?{VISITOR}")
            assert await ask(links[3]) == b"question"
            assert good.received == 1
            refuse(relays.made[1])
            await until(lambda: desk.figures.relays_reset == 2, 5, "the second refusal")
            await server.say(f"udp://4?{VISITOR}")
            assert await ask(links[4]) == b"question"
            assert good.received == 2
    finally:
        await relays.close()


# --- the engine --------------------------------------------------------------------------------


@both
async def test_engine_that_refuses_is_answered() -> None:
    relays = Relays(Settings(threads=1))
    async with paired(relays=relays, semaphore_limit=1) as (server, desk, links):
        await relays.close()
        for number in (1, 2):
            await server.say(f"udp://{number}?{VISITOR}")
            assert await signal(server) == f"fail://{number}?why=limit"
            assert await is_reset(links[number])
        assert desk.figures.visitors_open == 0


@both
async def test_relay_without_a_result_is_no_longer_counted() -> None:
    relays = Keeping()
    async with paired(relays=relays) as (server, desk, _):
        await server.say(f"udp://1?{VISITOR}")
        await until(lambda: desk.figures.relays_open == 1, 5, "the relay")
        relays.made[0].result.cancel()
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        assert desk.figures.relays_open == 0
    await relays.close()


@both
async def test_link_that_cannot_be_tuned_is_the_engines_to_find(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    async with paired() as (server, desk, links):
        target(desk)
        monkeypatch.setattr(udp, "tune_link", fail)
        await server.say(f"udp://1?{VISITOR}")
        assert await ask(links[1]) == b"question"


# --- sessions ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("given", "expected"), [(120.0, 120.0 + visitors.IDLE_MARGIN), (0.5, 1.0)]
)
async def test_silence_is_suffered_longer_than_on_the_server(
    given: float, expected: float
) -> None:
    relays = Keeping()
    async with paired(relays=relays, udp_idle_timeout=given) as (server, _, __):
        await server.say(f"udp://1?{VISITOR}")
        await until(lambda: relays.idle, 5, "the relay")
        assert relays.idle == [expected]
    await relays.close()


@both
@engines
async def test_silence_ends_a_session_politely(kind: str) -> None:
    async with paired(udp_idle_timeout=0.05, engine=kind) as (server, desk, links):
        target(desk, listen_only)
        await server.say(f"udp://1?{VISITOR}")
        await links[1].write(frame(b"x"))
        assert not await is_reset(links[1])
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        assert desk.figures.relays_reset == 0


@both
async def test_lost_session_costs_no_relay() -> None:
    async with paired() as (server, desk, links):
        target(desk)
        await server.say(f"udp://1?{VISITOR}")
        assert await ask(links[1]) == b"question"
        server.control.reset()
        assert await is_reset(links[2])
        assert await welcome_again(server) == "me"
        assert await ask(links[1], b"still") == b"still"


# --- stopping ----------------------------------------------------------------------------------


@both
@engines
async def test_stop_cuts_what_does_not_end(kind: str) -> None:
    async with paired(shutdown_timeout=0.05, engine=kind) as (server, desk, links):
        target(desk)
        await server.say(f"udp://1?{VISITOR}")
        assert await ask(links[1]) == b"question"
        async with within(5):
            await desk.client.stop()
        assert await is_reset(links[1])
        assert desk.figures.datagrams == Datagrams(up=1, down=1, bytes_up=8, bytes_down=8)
        assert desk.figures.relays_reset == 1


@pytest.mark.slow
async def test_stop_waits_for_silence_and_not_for_the_idle_time() -> None:
    async with paired(shutdown_timeout=20.0) as (server, desk, links):
        target(desk)
        await server.say(f"udp://1?{VISITOR}")
        assert await ask(links[1]) == b"question"
        stopping = asyncio.create_task(desk.client.stop())
        assert await signal(server) == "drain://"
        links[2].reset()  # what a server does that has heard of it
        try:
            async with asyncio.timeout(limit(2.5)):
                await asyncio.shield(stopping)
        finally:
            stopping.cancel()
            await asyncio.wait({stopping})
        assert not await is_reset(links[1]), "a polite end"


@both
async def test_stop_lets_a_session_end_by_itself() -> None:
    async with paired(shutdown_timeout=20.0) as (server, desk, links):
        target(desk)
        await server.say(f"udp://1?{VISITOR}")
        assert await ask(links[1]) == b"question"
        stopping = asyncio.create_task(desk.client.stop())
        assert await signal(server) == "drain://"
        links[2].reset()
        assert await ask(links[1], b"late") == b"late"
        links[1].close()
        async with within(5):
            await stopping


# --- the seed dialect --------------------------------------------------------------------------


@both
@engines
async def test_seed_launch_is_one_datagram_and_one_answer(kind: str) -> None:
    async with seeded(engine=kind) as (server, desk):
        service = target(desk)
        name = next(iter(server.links))
        await until(lambda: desk.figures.links_idle == 2, 5, "both links")
        link = await server.launch(name, "//{}#2")
        await link.write(b"question")
        async with within(5):
            assert await link.read_all() == b"question", "unframed, and a polite end"
        assert service.received == 1
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        assert desk.figures.datagrams == Datagrams(up=1, down=1, bytes_up=8, bytes_down=8)
        async with within(5):
            await server.take()


@both
async def test_seed_datagram_may_overtake_its_launch() -> None:
    async with seeded() as (server, desk):
        target(desk)
        name, link = next(iter(server.links.items()))
        await until(lambda: desk.figures.links_idle == 2, 5, "both links")
        await link.write(b"early")
        await asyncio.sleep(0.01)
        await server.launch(name, "//{}#2")
        async with within(5):
            assert await link.read_all() == b"early"


@both
async def test_seed_datagram_without_an_answer_ends_in_its_time() -> None:
    relays = Keeping()
    async with seeded(relays=relays, udp_read_timeout=0.1) as (server, desk):
        service = target(desk, listen_only)
        await until(lambda: desk.figures.links_idle == 2, 5, "both links")
        name, link = next(iter(server.links.items()))
        await link.write(b"question")
        await server.launch(name, "//{}#2")
        async with within(5):
            assert await link.read_all() == b"", "a polite end"
        assert service.received == 1
        assert relays.idle == [0.1]
    await relays.close()


@both
async def test_launch_that_finds_no_slot_in_time_is_told_so() -> None:
    async with paired(semaphore_limit=1, dial_timeout=0.2) as (server, desk, links):
        await server.say("tcp://1?from=10.0.0.1:1")
        await desk.at_target()
        await server.say("udp://2?from=10.0.0.1:2")
        assert await signal(server) == "fail://2?why=limit"
        assert await is_reset(links[2])
        assert desk.figures.visitors_waiting == 0


@both
async def test_launches_without_a_slot_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodepass.client.places.LEAST_QUEUE", 2)
    async with paired(idle=6, semaphore_limit=1, dial_timeout=20.0) as (server, desk, _):
        await server.say("tcp://1?from=10.0.0.1:1")
        await desk.at_target()
        await server.say("\n".join(f"udp://{n}?from=10.0.0.1:{n}" for n in range(2, 6)))
        assert await signal(server) == "fail://4?why=limit"
        assert await signal(server) == "fail://5?why=limit"
        assert desk.figures.visitors_waiting == 2


# --- a target that moves -------------------------------------------------------------------------


@both
@engines
async def test_c1_a_session_follows_its_target(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The machine is gone without a word, and the name stands for another one."""
    for name in ("PERIOD", "SILENCE"):
        monkeypatch.setattr(targets, name, getattr(targets, name) / 10)
    teach(monkeypatch, service=["127.0.0.1"])
    port = free_port()
    with caplog.at_level(logging.INFO, "nodepass"):
        async with paired("log=info", target=f"service:{port}", engine=kind) as (
            server,
            desk,
            links,
        ):
            is_gone = False

            def answer(target: UdpTarget, data: bytes, source: Address) -> None:
                if not is_gone:
                    echo(target, data, source)

            target(desk, answer)
            spare = target(desk, host="127.0.0.2")
            await server.say(f"udp://1?{VISITOR}")
            assert await ask(links[1], b"one") == b"one"
            is_gone = True
            teach(monkeypatch, service=["127.0.0.2"])
            count = 0
            async with within(10):
                while not spare.sources:  # a visitor that never pauses
                    count += 1
                    await links[1].write(frame(b"%d" % count))
                    await asyncio.sleep(0.05)
            heard = await read(links[1])
            assert 1 <= int(heard) <= count
            while int(heard) < count:  # in order, none twice
                later = await read(links[1])
                assert int(later) == int(heard) + 1
                heard = later
            assert desk.figures.visitors == 1, "it is the same session"
    assert "was=127.0.0.1  now=127.0.0.2" in caplog.text
