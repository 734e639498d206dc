"""The rig itself: what the other files rely on is shown here with bare sockets."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from pathlib import Path

import pytest
from tests.kit.arena import Arena
from tests.kit.authority import self_signed
from tests.kit.secure import (
    LibrarySide,
    PythonSide,
    Side,
    TlsFault,
    TlsStream,
    Truncated,
    library_client,
    library_server,
    python_client,
    python_server,
    secure,
)
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import (
    BANNER,
    answer_after_eof,
    body_of,
    digest_of,
    echo,
    hold,
    serve_body,
    speak_first,
)
from tests.kit.timing import free_port, until, within

DELAY = 0.02
"""Seconds one way; loops that count whole milliseconds wake a little early."""

BODY = body_of(1, 3_000_000)


async def test_proxy_passes_bytes_and_half_close(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(10):
        proxy = arena.proxy(arena.target(answer_after_eof).port)
        answer = await exchange(proxy.port, BODY)
        assert answer.decode() == f"{len(BODY)} {digest_of(BODY)}\n"
        assert proxy.channels[0].up == len(BODY)
        assert proxy.channels[0].down == len(answer)
        await until(lambda: not proxy.open_channels, 2, "the channel to end")


async def test_proxy_passes_small_pieces_in_order(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(10):
        proxy = arena.proxy(arena.target(echo).port, piece=7)
        assert await exchange(proxy.port, BODY[:5000]) == BODY[:5000]


async def test_proxy_passes_a_reset(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(10):
        target = arena.target(echo)
        proxy = arena.proxy(target.port)
        async with await connect(proxy.port) as visitor:
            await visitor.write(b"x")
            assert await visitor.read() == b"x"
            visitor.reset()
        await until(lambda: target.active == 0, 2, "the reset to arrive")


@pytest.mark.parametrize("reset", [False, True])
async def test_proxy_cuts(tmp_path: Path, reset: bool) -> None:
    async with Arena(tmp_path) as arena, within(10):
        target = arena.target(echo)
        proxy = arena.proxy(target.port)
        async with await connect(proxy.port) as visitor:
            await visitor.write(b"x")
            assert await visitor.read() == b"x"
            proxy.channels[0].cut(reset=reset)
            assert await visitor.is_reset() is reset
        await until(lambda: target.active == 0, 2, "the cut to arrive")


async def test_proxy_stalls_and_resumes(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(10):
        proxy = arena.proxy(arena.target(echo).port)
        async with await connect(proxy.port) as visitor:
            await visitor.write(b"x")
            assert await visitor.read() == b"x"
            proxy.channels[0].stall()
            await visitor.write(b"y")
            visitor.finish()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await visitor.read()
            proxy.channels[0].resume()
            assert await visitor.read_all() == b"y"


async def test_proxy_delays(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(10):
        proxy = arena.proxy(arena.target(speak_first).port, delay=DELAY)
        start = time.monotonic()
        async with await connect(proxy.port) as visitor:
            assert await visitor.read() == BANNER
            assert time.monotonic() - start > 3.5 * DELAY, (
                "three crossings to connect, one to speak"
            )
            start = time.monotonic()
            await visitor.write(b"x")
            assert await visitor.read() == b"x"
            assert time.monotonic() - start > 1.5 * DELAY, "there and back"


async def test_proxy_resets_what_leads_nowhere(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(10):
        proxy = arena.proxy(free_port())
        async with await connect(proxy.port) as visitor:
            assert await visitor.is_reset()


async def test_target_serves_a_body(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(10):
        target = arena.target(serve_body(BODY))
        async with await connect(target.port) as visitor:
            assert await visitor.digest() == (len(BODY), digest_of(BODY))
        assert target.accepted == 1


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
async def test_kernel_takes_a_closed_window_for_silence(tmp_path: Path) -> None:
    """Why no relay may have TCP_USER_TIMEOUT: it ends a connection whose reader merely pauses."""
    async with Arena(tmp_path) as arena, within(20):
        target = arena.target(hold)
        async with await connect(target.port) as visitor:
            visitor.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)
            with pytest.raises(OSError) as caught:  # noqa: PT012 - which write fails is open
                while True:
                    await visitor.write(bytes(1_000_000))
            assert caught.value.errno == errno.ETIMEDOUT


# --- TLS by hand ------------------------------------------------------------------------


@pytest.fixture(params=["python", "library"])
def server_side(request: pytest.FixtureRequest, tmp_path: Path) -> Side:
    files = self_signed(tmp_path, "127.0.0.1")
    if request.param == "python":
        return PythonSide(python_server(files, alpn="nodepass/2"), is_server=True)
    return LibrarySide(library_server(files), is_server=True)


@pytest.fixture(params=["python", "library"])
def client_side(request: pytest.FixtureRequest) -> Side:
    if request.param == "python":
        return PythonSide(python_client(alpn="nodepass/2"))
    return LibrarySide(library_client())


async def _pair(server_side: Side, client_side: Side) -> tuple[TlsStream, TlsStream]:
    near, far = socket.socketpair()
    async with asyncio.TaskGroup() as both:
        server = both.create_task(secure(Stream(near), server_side))
        client = both.create_task(secure(Stream(far), client_side))
    return server.result(), client.result()


async def test_tls_passes_bytes_and_ends_each_way_by_itself(
    server_side: Side, client_side: Side
) -> None:
    server, client = await _pair(server_side, client_side)
    async with server, client, within(10):
        sending = asyncio.create_task(client.write(BODY))
        assert await server.digest(len(BODY)) == (len(BODY), digest_of(BODY))
        await sending
        client.finish(fin=False)
        assert await server.read() == b""
        await server.write(BODY[:100_000])
        server.finish()
        assert await client.read_all() == BODY[:100_000]


async def test_tls_tells_a_cut_from_an_end(server_side: Side, client_side: Side) -> None:
    server, client = await _pair(server_side, client_side)
    async with server, client, within(10):
        await client.write(b"half")
        Stream.finish(client)
        assert await server.read_exactly(4) == b"half"
        with pytest.raises(Truncated):
            await server.read()


async def test_tls_refuses_a_changed_byte(server_side: Side, client_side: Side) -> None:
    server, client = await _pair(server_side, client_side)
    async with server, client, within(10):
        client.side.write(b"something")
        record = bytearray(client.side.give())
        record[-1] ^= 1
        await Stream.write(client, bytes(record))
        with pytest.raises(TlsFault):
            await server.read()


async def test_both_libraries_name_the_same_certificate(tmp_path: Path) -> None:
    files = self_signed(tmp_path, "127.0.0.1")
    names = set()
    for side in (PythonSide(python_client()), LibrarySide(library_client())):
        server, client = await _pair(LibrarySide(library_server(files), is_server=True), side)
        async with server, client:
            names.add(client.side.fingerprint())
    assert len(names) == 1


async def test_exporter_is_the_same_at_both_ends_and_new_each_time(tmp_path: Path) -> None:
    context = library_server(self_signed(tmp_path, "127.0.0.1"))
    seen = set()
    for _ in range(2):
        ends = LibrarySide(context, is_server=True), LibrarySide(library_client())
        server, client = await _pair(*ends)
        async with server, client:
            assert ends[0].binding() == ends[1].binding()
            seen.add(ends[0].binding())
    assert len(seen) == 2
