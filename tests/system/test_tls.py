"""TLS between two of our own processes: modes, names, one port, strangers, ends of life.

That what a visitor sees is the same with TLS as without is in `test_law` and `test_stress`.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import pytest
from tests.kit.arena import Arena
from tests.kit.authority import Authority, Issued
from tests.kit.secure import PythonSide, Truncated, python_client, secure
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import (
    answer_after_eof,
    body_of,
    digest_of,
    echo,
    hold,
    serve_body,
    speak_first,
)
from tests.kit.timing import free_port, has_ipv6, settled, until, within
from tests.system.conftest import HAS_NATIVE

BODY: Final = body_of(31, 8_000_000)

FINGERPRINT: Final = re.compile(r"fingerprint=(SHA256:[0-9A-F]{2}(?::[0-9A-F]{2}){31})")

HALF_OPEN: Final = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)) + b"\x20" + bytes(40)
)
"""The first bytes of a ClientHello of 512 bytes that never goes on."""


def mode_2(files: Issued) -> str:
    return f"?tls=2&crt={files.crt}&key={files.key}"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


# --- both modes -------------------------------------------------------------------------


async def test_self_signed_tunnel_carries_bytes_both_ways(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(30):
        tunnel = await arena.tunnel(arena.target(echo), server="?tls=1", client="?tls=1")
        assert await exchange(tunnel.port, BODY) == BODY
        await tunnel.server.logged(FINGERPRINT.pattern)
        shown = FINGERPRINT.findall(tunnel.server.log)
        assert FINGERPRINT.findall(tunnel.client.log) == shown, "the client names the same one"
        await tunnel.client.logged("tunnel up .*tls=1")
        await tunnel.server.logged("server listening .*tls=1")


async def test_verified_tunnel_carries_bytes_both_ways(
    tmp_path: Path, engine: str, authority: Authority
) -> None:
    files = authority.issue("127.0.0.1", is_indirect=True)
    async with Arena(tmp_path, engine) as arena, within(30):
        tunnel = await arena.tunnel(
            arena.target(answer_after_eof), server=mode_2(files), client=f"?ca={authority.ca}"
        )
        answer = await exchange(tunnel.port, BODY)
        assert answer.decode() == f"{len(BODY)} {digest_of(BODY)}\n"
        await tunnel.client.logged("tunnel up .*tls=2")
        await tunnel.server.logged(FINGERPRINT.pattern)
        assert FINGERPRINT.findall(tunnel.client.log) == FINGERPRINT.findall(tunnel.server.log)


@pytest.mark.parametrize(
    ("dialled", "query", "name"),
    [("localhost", "", "localhost"), ("127.0.0.1", "&sni=tunnel.example", "tunnel.example")],
    ids=["host name", "sni"],
)
async def test_name_is_verified(
    tmp_path: Path, authority: Authority, dialled: str, query: str, name: str
) -> None:
    files = authority.issue(name)
    async with Arena(tmp_path) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        await arena.server(port, tunnel_port, mode_2(files))
        client = arena.nodepass(
            f"client://{dialled}:{tunnel_port}/127.0.0.1:{target.port}?ca={authority.ca}{query}"
        )
        await client.start()
        assert await exchange(port, b"hello") == b"hello"


async def test_client_takes_the_mode_of_its_server(tmp_path: Path) -> None:
    """Without a floor the server says what is spoken, also when it comes back with another."""
    async with Arena(tmp_path, SERVICE_COOLDOWN="200ms") as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        server = await arena.server(port, tunnel_port)
        client = await arena.client(tunnel_port, target.port)
        for count, mode in ((2, 1), (3, 0)):
            await server.stop()
            server = await arena.server(port, tunnel_port, f"?tls={mode}")
            await client.logged("tunnel up", count=count)
            assert f"tls={mode}" in re.findall("tunnel up .*", client.log)[-1]
            assert await exchange(port, b"hello") == b"hello"


WRONG: Final = {
    "name": r"is for other\.example, not for 127\.0\.0\.1.*sni=",
    "expired": r"certificate expired 20\d\d-\d\d-\d\d.*ago",
    "early": r"valid from 20\d\d-\d\d-\d\d",
    "untrusted": r"comes from an authority.*ca=",
    "system": r"comes from an authority.*what this machine trusts.*ca=FILE",
}


@pytest.mark.parametrize("what", WRONG)
async def test_client_says_what_is_wrong_with_a_certificate(
    tmp_path: Path, authority: Authority, what: str
) -> None:
    """And goes on trying; what the server may get to know stands in its log, too."""
    ca = {"untrusted": Authority(tmp_path / "other").ca, "system": ""}.get(what, authority.ca)
    names = ("other.example",) if what == "name" else ("127.0.0.1",)
    files = authority.issue(*names)
    async with Arena(tmp_path, SERVICE_COOLDOWN="200ms") as arena, within(30):
        target, tunnel_port = arena.target(echo), free_port()
        shown = {"expired": authority.issue_expired, "early": authority.issue_early}.get(what)
        if shown is None:
            server = await arena.server(free_port(), tunnel_port, mode_2(files))
        else:  # our own server refuses to show these
            server = None
            tunnel_port = arena.tls_greeter(shown(*names)).port
        client = arena.dialling(tunnel_port, target.port, f"?tls=2{ca and '&ca=' + ca}")
        await client.logged(f"ERROR.*no secure tunnel.*{WRONG[what]}")
        if server is not None:
            await server.logged("WARN.*turned away.*the client")
        assert client.is_running
        assert "tunnel up" not in client.log


@pytest.mark.parametrize(("floor", "offered"), [(1, 0), (2, 0), (2, 1)])
async def test_less_than_the_floor_is_refused(tmp_path: Path, floor: int, offered: int) -> None:
    async with Arena(tmp_path, SERVICE_COOLDOWN="200ms") as arena, within(20):
        server = await arena.server(free_port(), tunnel_port := free_port(), f"?tls={offered}")
        client = arena.dialling(tunnel_port, free_port(), f"?tls={floor}")
        await client.logged(f"(WARN|ERROR).*tls={offered}.*less than the tls={floor}")
        await server.logged("turned away", seconds=5)
        assert client.is_running
        assert "tunnel up" not in client.log


async def test_more_than_the_floor_is_welcome(tmp_path: Path, authority: Authority) -> None:
    """Who has asked for tls=1 is verified in mode 2 all the same; here IPv6 is, too."""
    if not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    files = authority.issue("::1")
    async with Arena(tmp_path, SSL_CERT_FILE=authority.ca) as arena, within(20):
        target, tunnel_port, port = arena.target(echo), free_port("::1"), free_port()
        server = arena.nodepass(f"server://[::1]:{tunnel_port}/127.0.0.1:{port}{mode_2(files)}")
        client = arena.nodepass(f"client://[::1]:{tunnel_port}/127.0.0.1:{target.port}?tls=1")
        await server.start()
        await client.start()
        await client.logged("tunnel up .*tls=2")
        assert await exchange(port, b"hello") == b"hello"


# --- one port ---------------------------------------------------------------------------


async def test_f14_one_port_carries_everything(tmp_path: Path) -> None:
    """With TLS and a password nothing but the tunnel port is open, or needed by the client."""
    async with Arena(tmp_path) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        server = await arena.server(port, tunnel_port, "?tls=1", password="secret")
        firewall = arena.proxy(tunnel_port)  # lets one port through, as `docker run -p` does
        client = await arena.client(firewall.port, target.port, password="secret")
        assert server.listening() == {tunnel_port, port}
        assert client.listening() == set()
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(exchange(port, b"%d" % n)) for n in range(100)]
        assert [answer.result() for answer in answers] == [b"%d" % n for n in range(100)]
        assert all(channel.up > 100 for channel in firewall.channels[:100])


async def test_f14_no_data_port_without_seed_peers(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo), server="?tls=1&compat=0")
        async with await connect(tunnel.tunnel_port) as stranger:
            assert (await stranger.read_line()).startswith(b"//0?v=2&")
        assert tunnel.server.listening() == {tunnel.tunnel_port, tunnel.port}


# --- who is let in ----------------------------------------------------------------------


async def test_plain_words_on_a_tls_port_get_nothing(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo), server="?tls=1")
        async with await connect(tunnel.tunnel_port) as stranger:
            await stranger.read_line()
            await stranger.write(b"hello://plain?v=2&n=" + b"0" * 32 + b"\n")
            assert await _until_end(stranger) == b""
        await tunnel.server.logged("WARN.*turned away.*does not speak TLS")
        assert await exchange(tunnel.port, b"hello") == b"hello"


@pytest.mark.parametrize(
    ("alpn", "latest", "why"),
    [
        ("", ssl.TLSVersion.TLSv1_3, "nodepass/2"),
        ("http/1.1", ssl.TLSVersion.TLSv1_3, "nodepass/2"),
        ("nodepass/2", ssl.TLSVersion.TLSv1_2, r"TLS 1\.3"),
    ],
    ids=["no ALPN", "other ALPN", "TLS 1.2"],
)
async def test_another_tls_program_is_turned_away(
    tmp_path: Path, engine: str, alpn: str, latest: ssl.TLSVersion, why: str
) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        server = await arena.server(free_port(), tunnel_port := free_port(), "?tls=1")
        context = python_client(alpn=alpn)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = latest
        async with await connect(tunnel_port) as stream:
            await stream.read_line()
            try:
                inner = await secure(stream, PythonSide(context))
                await inner.write(b"hello://stranger?v=2&n=" + b"0" * 32 + b"\n")
                assert await inner.read() == b"", "the server has answered a stranger"
            except (OSError, Truncated):
                pass  # the handshake itself may have failed, or its end come as a reset
        await server.logged(f"WARN.*turned away.*{why}")


async def test_f02_stranger_inside_tls_gets_no_visitor(tmp_path: Path) -> None:
    """Whoever can do TLS is still no link of anybody's session."""
    quick = {"HANDSHAKE_TIMEOUT": "1s"}
    async with Arena(tmp_path, **quick) as arena, AsyncExitStack() as stack, within(30):
        tunnel = await arena.tunnel(arena.target(speak_first), server="?tls=1")
        context = python_client(alpn="nodepass/2")
        strangers = []
        claim = b"link://" + b"0" * 16 + b"?i=1&p=" + b"0" * 64 + b"\n"
        for line in (b"", claim, BODY[:5000]):
            for _ in range(4):
                stream = await stack.enter_async_context(await connect(tunnel.tunnel_port))
                await stream.read_line()
                inner = await secure(stream, PythonSide(context))
                await inner.write(line)
                strangers.append(inner)
        for _ in range(20):
            assert (await exchange(tunnel.port, b"only for the target")).endswith(b"target")
        for stranger in strangers:
            assert await _until_end(stranger) == b""


async def test_f04_half_open_tls_leaves_service_unharmed(tmp_path: Path, engine: str) -> None:
    """300 connections stop before, in and after the first TLS record; links go on being made."""
    async with Arena(tmp_path, engine) as arena, AsyncExitStack() as stack, within(30):
        tunnel = await arena.tunnel(arena.target(echo), server="?tls=1", password="secret")
        for number in range(300):
            source = f"127.0.1.{number % 30 + 1}"
            try:
                stream = await connect(tunnel.tunnel_port, source=source)
            except ConnectionResetError:
                continue  # shown the door before its connect() was through
            stack.callback(stream.close)
            await stream.write((b"", HALF_OPEN[:1], HALF_OPEN)[number % 3])
        for _ in range(30):
            assert await exchange(tunnel.port, b"hello") == b"hello"
        late = arena.target(speak_first)
        await arena.client(tunnel.tunnel_port, late.port, "?name=late", password="secret")


async def _until_end(stream: Stream) -> bytes:
    heard = bytearray()
    try:
        async with within(10):
            while data := await stream.read():
                heard += data
    except (ConnectionError, Truncated):
        pass
    return bytes(heard)


# --- more than the laws of test_law.py -----------------------------------------------------


async def test_f18_relays_outlive_their_control_channel(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine, SERVICE_COOLDOWN="200ms") as arena, within(20):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        proxy = arena.proxy(tunnel_port)
        server = await arena.server(port, tunnel_port, "?tls=1", password="secret")
        client = await arena.client(proxy.port, target.port, password="secret")
        async with await connect(port) as visitor:
            await visitor.write(b"before")
            assert await visitor.read_exactly(6) == b"before"
            proxy.channels[0].cut()
            await server.logged("tunnel lost")
            await client.logged("tunnel up", count=2)
            await visitor.write(b"after")
            assert await visitor.read_exactly(5) == b"after"


async def test_f19_transfer_survives_a_stop(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine, SHUTDOWN_TIMEOUT="20s") as arena, within(30):
        tunnel = await arena.tunnel(arena.target(serve_body(BODY * 4)), server="?tls=1")
        async with await connect(tunnel.port) as visitor:
            first = await visitor.read_exactly(1000)
            stopping = [
                asyncio.create_task(process.stop(seconds=20))
                for process in (tunnel.server, tunnel.client)
            ]
            await tunnel.server.logged("waiting for open relays")
            rest = (BODY * 4)[len(first) :]
            assert await visitor.digest() == (len(rest), digest_of(rest))
        await asyncio.gather(*stopping)


@pytest.mark.parametrize("side", ["server", "client"])
async def test_f20_killed_process_never_looks_like_an_end(
    tmp_path: Path, engine: str, side: str
) -> None:
    """Its kernel says FIN for it; without a close_notify that is no end."""
    ends: list[bool] = []

    async def listen_to_the_end(stream: Stream) -> None:
        await stream.write(b"ready")
        ends.append(await stream.is_reset())

    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(listen_to_the_end), server="?tls=1")
        async with await connect(tunnel.port) as visitor:
            assert await visitor.read_exactly(5) == b"ready"
            (tunnel.server if side == "server" else tunnel.client).kill()
            if side == "client":
                async with within(3):
                    assert await visitor.is_reset()
            else:
                await until(lambda: ends, 3, "the target to see an end")
                assert ends == [True]


async def test_stop_in_the_middle_of_handshakes(tmp_path: Path, engine: str) -> None:
    """Of strangers at the server; of a client with a server that says nothing more."""
    async with Arena(tmp_path, engine) as arena, AsyncExitStack() as stack, within(20):
        server = await arena.server(free_port(), tunnel_port := free_port(), "?tls=1")
        for number in range(40):
            stream = await stack.enter_async_context(await connect(tunnel_port))
            await stream.read_line()
            await stream.write(HALF_OPEN[: 5 + number * 10])

        async def greet_and_hold(stream: Stream) -> None:
            await stream.write(b"//0?v=2&n=" + b"0" * 32 + b"&a=0#1\n")
            await hold(stream)

        mute = arena.target(greet_and_hold)
        client = arena.dialling(mute.port, free_port())
        await until(lambda: mute.active, 5, "a dial")
        for process in (client, server):
            assert await process.stop() < 2


async def test_client_gives_a_mute_server_up(tmp_path: Path) -> None:
    async def greet_and_hold(stream: Stream) -> None:
        await stream.write(b"//0?v=2&n=" + b"0" * 32 + b"&a=0#1\n")
        await hold(stream)

    env = {"HANDSHAKE_TIMEOUT": "300ms", "SERVICE_COOLDOWN": "100ms"}
    async with Arena(tmp_path, **env) as arena, within(20):
        mute = arena.target(greet_and_hold)
        client = arena.dialling(mute.port, free_port())
        await client.logged("WARN.*no tunnel.*not finished the TLS handshake")
        await until(lambda: mute.accepted >= 3, 5, "it to be tried again")
        assert client.is_running


@pytest.mark.parametrize("native", ["server", "client"])
async def test_engines_may_differ(tmp_path: Path, native: str) -> None:
    if not HAS_NATIVE:
        pytest.skip("the native engine is not built here")
    kinds = {"server": "python", "client": "python"} | {native: "native"}
    async with Arena(tmp_path) as arena, within(20):
        target, tunnel_port, port = arena.target(answer_after_eof), free_port(), free_port()
        await arena.server(port, tunnel_port, "?tls=1", NODEPASS_ENGINE=kinds["server"])
        await arena.client(tunnel_port, target.port, NODEPASS_ENGINE=kinds["client"])
        answer = await exchange(port, BODY)
        assert answer.decode() == f"{len(BODY)} {digest_of(BODY)}\n"


async def test_both_ends_in_one_process(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        both = arena.nodepass(
            f"server://secret@127.0.0.1:{tunnel_port}/127.0.0.1:{port}?tls=1",
            f"client://secret@127.0.0.1:{tunnel_port}/127.0.0.1:{target.port}?tls=1",
        )
        await both.start()
        assert await exchange(port, BODY) == BODY


async def test_tls_links_are_cut_into_small_pieces(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        proxy = arena.proxy(tunnel_port, piece=7)
        await arena.server(port, tunnel_port, "?tls=1", password="secret")
        await arena.client(proxy.port, target.port, password="secret")
        assert await exchange(port, BODY[:20_000]) == BODY[:20_000]


async def test_tls_links_leave_nothing_behind(tmp_path: Path, engine: str) -> None:
    """Memory and descriptors after 600 visitors are what they were after 200."""
    steady = {"MIN_POOL_CAPACITY": "4", "MAX_POOL_CAPACITY": "4"}
    async with Arena(tmp_path, engine, **steady) as arena, within(40):
        tunnel = await arena.tunnel(arena.target(echo), server="?tls=1")
        processes = tunnel.server, tunnel.client

        def sockets_now() -> list[int]:
            return [process.fds("socket:") for process in processes]

        async def visits(count: int) -> None:
            for _ in range(count):
                assert await exchange(tunnel.port, b"hello") == b"hello"

        await visits(200)
        await until(lambda: tunnel.client.fds("socket:") >= 5, 5, "four idle links")
        await settled(sockets_now, 5, "a steady pool")
        sockets = sockets_now()
        memory = [process.rss() for process in processes]
        await visits(400)
        grown = [process.rss() - old for process, old in zip(processes, memory, strict=True)]
        assert max(grown) < 400 * 8 * 1024, f"bytes grown: {grown}; a connection has 35 KiB"
        await until(lambda: sockets_now() == sockets, 5, f"sockets to be {sockets} again")
