"""The seed dialect in both roles, against peers that do what the Go program does.

With TLS that means what Go's crypto/tls does: control stays plain, the data port speaks TLS
1.3 at once, a server sends session tickets, 8 characters of id follow the handshake at once,
and a half-close is a close_notify without FIN.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from tests.kit.arena import Arena
from tests.kit.authority import Authority, Issued, self_signed
from tests.kit.peer import SeedClient, SeedServer
from tests.kit.secure import PythonSide, TlsStream, Truncated, python_server, secure
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import answer_after_eof, body_of, digest_of, echo
from tests.kit.timing import free_port, until, within

BODY = body_of(7, 5_000_000)

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(params=[0, 1], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> int:
    """TLS mode of the server."""
    return int(request.param)


@pytest.fixture
def files(tmp_path: Path) -> Issued:
    return self_signed(tmp_path, "127.0.0.1")


def go_ends(link: Stream) -> None:
    """End one direction as Go does: close_notify alone in TLS, FIN without it."""
    if isinstance(link, TlsStream):
        link.finish(fin=False)
    else:
        link.finish()


# --- our server, their client -----------------------------------------------------------


async def test_server_talks_as_recorded(tmp_path: Path, engine: str, tls: int) -> None:
    """The TCP part of tests/data/seed-server.json, row by row."""
    rows = json.loads((DATA / "seed-server.json").read_text())
    spoken = {row["text"] for row in rows}
    assert {"hello tcp", "answer", "late"} <= spoken
    async with Arena(tmp_path, engine, REPORT_INTERVAL="1s") as arena, within(20):
        server = await arena.server(port := free_port(), tunnel_port := free_port(), f"?tls={tls}")
        async with SeedClient(tunnel_port) as client:
            assert client.tls == tls
            for _ in range(3):
                await client.dial()
            await server.logged("client connected .*dialect=seed")
            assert await client.control.read_line() == b"\n", "a heartbeat at once"
            async with await connect(port) as visitor:
                await visitor.write(b"hello tcp")
                link = await client.launched()
                assert await link.read() == b"hello tcp"
                await link.write(b"answer")
                assert await visitor.read() == b"answer"
                visitor.finish()
                assert await link.read() == b"", "the visitor's FIN arrives"
                await link.write(b"late")
                go_ends(link)
                assert await visitor.read_all() == b"late"


async def test_server_beats_for_a_seed_client(tmp_path: Path) -> None:
    async with Arena(tmp_path, REPORT_INTERVAL="100ms") as arena, within(20):
        await arena.server(free_port(), tunnel_port := free_port())
        async with SeedClient(tunnel_port) as client:
            await client.dial()
            assert [await client.control.read_line() for _ in range(5)] == [b"\n"] * 5


async def test_server_does_not_expect_words_from_a_seed_client(tmp_path: Path) -> None:
    """The Go client never writes on control: silence for many periods is no loss."""
    async with Arena(tmp_path, REPORT_INTERVAL="100ms") as arena, within(20):
        server = await arena.server(port := free_port(), tunnel_port := free_port())
        async with SeedClient(tunnel_port) as client:
            await client.dial()
            for _ in range(15):
                assert await client.control.read_line() == b"\n"
            assert "tunnel lost" not in server.log
            visitor = asyncio.create_task(exchange(port, b"hello"))
            link = await client.launched()
            assert await link.read_all() == b"hello"
            link.close()
            assert await visitor == b""


async def test_server_serves_many_through_a_seed_client(
    tmp_path: Path, engine: str, tls: int
) -> None:
    async with Arena(tmp_path, engine) as arena, within(30):
        await arena.server(port := free_port(), tunnel_port := free_port(), f"?tls={tls}")
        async with SeedClient(tunnel_port) as client:

            async def refill_and_echo() -> None:
                for _ in range(4):
                    await client.dial()
                async with asyncio.TaskGroup() as echoes:
                    for _ in range(40):
                        link = await client.launched()
                        echoes.create_task(echo_and_finish(link))
                        await client.dial()

            async def echo_and_finish(link: Stream) -> None:
                await echo(link)
                go_ends(link)

            serving = asyncio.create_task(refill_and_echo())
            answers = await asyncio.gather(
                *(exchange(port, b"%d" % n + BODY[:100_000]) for n in range(40))
            )
            assert answers == [b"%d" % n + BODY[:100_000] for n in range(40)]
            await serving


async def test_server_visitor_waits_for_a_seed_link(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port())
        visitor = asyncio.create_task(exchange(port, b"early"))
        async with SeedClient(tunnel_port) as client:
            await client.dial()
            link = await client.launched()
            assert await link.read_all() == b"early"
            await link.write(b"late")
            link.close()
            assert await visitor == b"late"


async def test_server_live_seed_client_keeps_its_place(tmp_path: Path) -> None:
    """A second one, or a port probe, from the same address must not push it out."""
    async with Arena(tmp_path, REPORT_INTERVAL="100ms") as arena, within(20):
        server = await arena.server(port := free_port(), tunnel_port := free_port())
        async with SeedClient(tunnel_port) as first:
            await first.dial()
            await server.logged("client connected")
            async with SeedClient(tunnel_port) as second:
                await second.dial()
                async with within(3):
                    await second.control.is_reset()  # an end of some kind
            assert "tunnel lost" not in server.log
            assert server.count("client connected") == 1
            await _served_by(first, port)


async def test_server_takes_the_next_seed_client_once_the_first_is_gone(tmp_path: Path) -> None:
    async with Arena(tmp_path, REPORT_INTERVAL="100ms") as arena, within(20):
        server = await arena.server(port := free_port(), tunnel_port := free_port())
        for number in (1, 2, 3):
            async with SeedClient(tunnel_port) as client:
                await client.dial()
                await server.logged("client connected", count=number)
                await _served_by(client, port)
            await server.logged("tunnel lost", count=number)


async def _served_by(client: SeedClient, port: int) -> None:
    visitor = asyncio.create_task(exchange(port, b"hello"))
    link = await client.launched()
    assert await link.read_all() == b"hello"
    await link.write(b"served")
    go_ends(link)
    assert await visitor == b"served"


async def test_server_seed_client_that_leaves_is_lost(tmp_path: Path) -> None:
    async with Arena(tmp_path, REPORT_INTERVAL="100ms") as arena, within(20):
        server = await arena.server(free_port(), tunnel_port := free_port())
        async with SeedClient(tunnel_port) as client:
            await client.dial()
            await server.logged("client connected")
        await server.logged("tunnel lost", seconds=5)


async def test_server_without_compat_turns_seed_clients_away(tmp_path: Path) -> None:
    async with Arena(tmp_path, HANDSHAKE_TIMEOUT="300ms") as arena, within(20):
        await arena.server(free_port(), tunnel_port := free_port(), "?compat=0")
        async with SeedClient(tunnel_port) as client:
            assert client.data_port == 0
            assert await client.control.is_reset() in (True, False), "an end of some kind"


async def test_server_verified_by_a_seed_client(tmp_path: Path) -> None:
    """Mode 2: Go verifies chain and name of the data port; the control channel stays plain."""
    authority = Authority(tmp_path / "authority")
    shown = authority.issue("127.0.0.1")
    async with Arena(tmp_path) as arena, within(20):
        query = f"?tls=2&crt={shown.crt}&key={shown.key}"
        await arena.server(port := free_port(), tunnel_port := free_port(), query)
        async with SeedClient(tunnel_port, ca=authority.ca) as client:
            assert client.tls == 2
            await client.dial()
            await _served_by(client, port)


async def test_server_data_port_that_is_not_spoken_tls_to(tmp_path: Path) -> None:
    """A seed client whose links say nothing, or nonsense, harms nobody but itself."""
    async with Arena(tmp_path, HANDSHAKE_TIMEOUT="500ms") as arena, within(20):
        server = await arena.server(port := free_port(), tunnel_port := free_port(), "?tls=1")
        async with SeedClient(tunnel_port) as client:
            mute = [client.keep(await connect(client.data_port)) for _ in range(30)]
            await mute[0].write(b"not TLS at all, whatever the greeting has said")
            await server.logged("client connected .*dialect=seed")
            await server.logged("WARN.*TLS failed.*the data port.*does not speak TLS")
            await client.dial()
            await _served_by(client, port)
            for stream in mute[1:]:
                async with within(3):
                    await stream.is_reset()  # an end of some kind


async def test_f20_truncated_seed_link_resets_the_visitor(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port(), "?tls=1")
        async with SeedClient(tunnel_port) as client:
            await client.dial()
            async with await connect(port) as visitor:
                link = await client.launched()
                await link.write(b"half of it")
                assert await visitor.read_exactly(10) == b"half of it"
                Stream.finish(link)  # FIN and no close_notify
                async with within(3):
                    assert await visitor.is_reset()


# --- our client, their server -----------------------------------------------------------


async def test_client_talks_as_recorded(
    tmp_path: Path, engine: str, tls: int, files: Issued
) -> None:
    """The TCP part of tests/data/seed-client.json, row by row."""
    env = {"MIN_POOL_CAPACITY": "2"}
    async with (
        Arena(tmp_path, engine, **env) as arena,
        SeedServer(files=files) as server,
        within(20),
    ):
        heard: list[bytes] = []

        async def target(stream: Stream) -> None:
            heard.append(await stream.read_exactly(3))
            await stream.write(b"OK")

        client = arena.nodepass(
            f"client://127.0.0.1:{server.listener.port}/127.0.0.1:{arena.target(target).port}"
        )
        client.spawn()
        await server.greet(tls, query="?nonce=00ff")
        first, second = await server.take(), await server.take()
        await client.logged("tunnel up .*dialect=seed")
        link = await server.launch(first)
        await link.write(b"GET")
        assert await link.read_all() == b"OK"
        assert heard == [b"GET"]
        await server.take()  # refill by the client
        await server.say("//deadbeef#1")  # unknown: no answer, no harm
        link = await server.launch(second)
        await link.write(b"PUT")
        assert await link.read_all() == b"OK"


@pytest.mark.parametrize("form", ["//{}#1", "tcp://{}"])
async def test_client_half_close_and_digests(
    tmp_path: Path, engine: str, form: str, tls: int, files: Issued
) -> None:
    async with Arena(tmp_path, engine) as arena, SeedServer(files=files) as server, within(30):
        target = arena.target(answer_after_eof)
        client = arena.nodepass(
            f"client://127.0.0.1:{server.listener.port}/127.0.0.1:{target.port}"
        )
        client.spawn()
        await server.greet(tls)
        for size in (0, 1, len(BODY)):
            link = await server.launch(await server.take(), form)
            await link.write(BODY[:size])
            go_ends(link)
            answer = await link.read_all()
            assert answer.decode() == f"{size} {digest_of(BODY[:size])}\n"


async def test_f06_launch_overtakes_the_link_id(
    tmp_path: Path, engine: str, tls: int, files: Issued
) -> None:
    """The signal arrives before the id of its link is written: the claim waits for it."""
    async with Arena(tmp_path, engine) as arena, SeedServer() as server, within(20):
        client = arena.nodepass(
            f"client://127.0.0.1:{server.listener.port}/127.0.0.1:{arena.target(echo).port}"
        )
        client.spawn()
        await server.greet(tls)
        await client.logged("tunnel up")
        link = server.keep(await server.data.accept())
        await server.say("//0123abcd#1")
        await server.say("ping://1")  # any later line: the launch has been read by then
        await asyncio.sleep(0.1)
        if tls:
            link = await secure(link, PythonSide(python_server(files), is_server=True))
        await link.write(b"0123abcd")
        await link.write(b"hello")
        async with within(3):
            assert await link.read() == b"hello"


async def test_client_keeps_links_ready_for_a_seed_server(tmp_path: Path) -> None:
    async with Arena(tmp_path, MIN_POOL_CAPACITY="4") as arena, SeedServer() as server, within(20):
        client = arena.nodepass(
            f"client://127.0.0.1:{server.listener.port}/127.0.0.1:{arena.target(echo).port}"
        )
        client.spawn()
        await server.greet()
        for name in [await server.take() for _ in range(4)]:
            link = await server.launch(name)
            await link.write(b"x")
            assert await link.read() == b"x"
            await server.take()


async def test_client_notices_a_silent_seed_server(tmp_path: Path) -> None:
    async with (
        Arena(tmp_path, REPORT_INTERVAL="200ms") as arena,
        SeedServer() as server,
        within(20),
    ):
        client = arena.nodepass(
            f"client://127.0.0.1:{server.listener.port}/127.0.0.1:{arena.target(echo).port}"
        )
        client.spawn()
        await server.greet(beat=0.1)
        await client.logged("tunnel up")
        await until(lambda: server.beats > 3, 3, "the client to learn the period")
        server.fall_silent()
        await client.logged("tunnel lost", seconds=5)
        await server.greet()
        await client.logged("tunnel up", count=2, seconds=5)


async def test_client_returns_when_a_seed_server_closes(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, SeedServer() as server, within(20):
        target = arena.target(echo)
        client = arena.nodepass(
            f"client://127.0.0.1:{server.listener.port}/127.0.0.1:{target.port}"
        )
        client.spawn()
        await server.greet()
        old = await server.launch(await server.take())
        await old.write(b"x")
        assert await old.read() == b"x"
        server.fall_silent()
        server.control.close()
        await client.logged("tunnel lost")
        await server.greet()
        await client.logged("tunnel up", count=2)
        await old.write(b"y")
        assert await old.read() == b"y", "F18: the open relay goes on"


async def test_f24_refused_target_resets_a_seed_link(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, SeedServer() as server, within(20):
        client = arena.nodepass(
            f"client://127.0.0.1:{server.listener.port}/127.0.0.1:{free_port()}"
        )
        client.spawn()
        await server.greet()
        link = await server.launch(await server.take())
        async with within(3):
            assert await link.is_reset()


async def test_client_verifies_a_seed_server(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    good, bad = authority.issue("127.0.0.1"), authority.issue("elsewhere", label="bad")
    for shown, is_good in ((good, True), (bad, False)):
        async with Arena(tmp_path) as arena, SeedServer(files=shown) as server, within(20):
            client = arena.dialling(
                server.listener.port, arena.target(echo).port, f"?ca={authority.ca}&log=debug"
            )
            await server.greet(2)
            if is_good:
                link = await server.launch(await server.take())
                await link.write(b"x")
                assert await link.read() == b"x"
            else:
                with pytest.raises((OSError, Truncated)):
                    await server.take()
                await client.logged("cannot make a link.*is for elsewhere, not for 127")


async def test_client_with_a_floor_refuses_a_plain_seed_server(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, SeedServer() as server, within(20):
        client = arena.dialling(server.listener.port, free_port(), "?tls=1")
        await server.greet()
        await client.logged("(WARN|ERROR).*tls=0.*less than")
        await server.greet()  # it tries again, and refuses again
        assert "tunnel up" not in client.log


async def test_client_with_a_floor_warns_of_a_plain_control_channel(
    tmp_path: Path, files: Issued
) -> None:
    """What a floor is worth with a seed server: its links have TLS, its signals have not."""
    async with Arena(tmp_path) as arena, SeedServer(files=files) as server, within(20):
        client = arena.dialling(server.listener.port, arena.target(echo).port, "?tls=1")
        await server.greet(1)
        link = await server.launch(await server.take())
        await link.write(b"x")
        assert await link.read() == b"x"
        await client.logged("WARN.*control channel is plain.*compat=0")


async def test_client_names_a_data_port_that_speaks_no_tls(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, SeedServer() as server, within(20):
        client = arena.dialling(server.listener.port, free_port(), "?log=debug")
        await server.greet(1)
        for _ in range(2):
            async with server.keep(await server.data.accept()) as link:
                await link.write(b"0123abcd")
                await link.is_reset()
        await client.logged("cannot make a link.*server does not speak TLS")
        assert client.is_running


async def test_client_without_compat_refuses_a_seed_server(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, SeedServer() as server, within(20):
        client = arena.nodepass(
            f"client://127.0.0.1:{server.listener.port}/127.0.0.1:{free_port()}?compat=0"
        )
        client.spawn()
        await server.greet()
        await client.logged("(WARN|ERROR).*(seed|compat)")
        await server.greet()  # it tries again, and refuses again
        assert "tunnel up" not in client.log
