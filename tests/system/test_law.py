"""What a visitor sees equals what the target does: ends, resets, refusals, early bytes.

Without TLS on the links and with it.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from tests.kit.arena import Arena
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import (
    answer_after_eof,
    body_of,
    digest_of,
    echo,
    serve_body,
    sink,
)
from tests.kit.timing import free_port, limit, until, within

BODY = body_of(3, 8_000_000)


# --- F10: idle links, early bytes -------------------------------------------------------


async def test_f10_early_bytes_are_delivered(tmp_path: Path, engine: str, tls: str) -> None:
    """What a visitor sends before any link exists, or at once with its FIN, arrives."""
    async with Arena(tmp_path, engine, DIAL_TIMEOUT="20s") as arena, within(30):
        target, tunnel_port, port = arena.target(answer_after_eof), free_port(), free_port()
        await arena.server(port, tunnel_port, tls)
        async with await connect(port) as visitor:
            await visitor.write(BODY[:50_000])
            visitor.finish()
            await arena.client(tunnel_port, target.port)
            answer = await visitor.read_all()
        assert answer.decode() == f"50000 {digest_of(BODY[:50_000])}\n"


async def test_f10_dead_idle_links_are_replaced_at_once(tmp_path: Path, tls: str) -> None:
    """Links that a firewall resets while idle never reach a visitor."""
    async with Arena(tmp_path) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        proxy = arena.proxy(tunnel_port)
        await arena.server(port, tunnel_port, tls)
        await arena.client(proxy.port, target.port)
        await until(lambda: len(proxy.open_channels) >= 5, 5, "four idle links")
        for reset in (True, False):
            links = proxy.open_channels[1:]
            for link in links:
                link.cut(reset=reset)
            await until(lambda: not any(link.is_open for link in links), 5, "the cut")  # noqa: B023
            await until(lambda: len(proxy.open_channels) >= 5, 5, "fresh links")
            for _ in range(10):
                assert await exchange(port, b"hello") == b"hello"


# --- F12: resets ------------------------------------------------------------------------


async def test_f12_visitor_reset_reaches_the_target(tmp_path: Path, engine: str, tls: str) -> None:
    ends: list[str] = []

    async def listen_to_the_end(stream: Stream) -> None:
        await stream.write(b"ready")
        ends.append("reset" if await stream.is_reset() else "clean")

    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(listen_to_the_end), server=tls)
        async with await connect(tunnel.port) as visitor:
            assert await visitor.read_exactly(5) == b"ready"
            visitor.reset()
        await until(lambda: ends, 3, "the target to see an end")
        assert ends == ["reset"]


async def test_f12_target_reset_reaches_the_visitor(tmp_path: Path, engine: str, tls: str) -> None:
    async def answer_and_reset(stream: Stream) -> None:
        await stream.read()
        stream.reset()

    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(answer_and_reset), server=tls)
        async with await connect(tunnel.port) as visitor:
            await visitor.write(b"x")
            async with within(3):
                assert await visitor.is_reset()


@pytest.mark.parametrize("reset", [True, False])
async def test_f12_lost_link_resets_both_ends(
    tmp_path: Path, engine: str, tls: str, reset: bool
) -> None:
    """A link cut in the middle never looks like a clean end with bytes missing.

    Plain TCP cannot tell a FIN from in between from the target's own; TLS can.
    """
    ends: list[bool] = []

    async def listen_to_the_end(stream: Stream) -> None:
        await stream.write(b"ready")
        ends.append(await stream.is_reset())

    async with Arena(tmp_path, engine, MIN_POOL_CAPACITY="1") as arena, within(20):
        target, tunnel_port, port = arena.target(listen_to_the_end), free_port(), free_port()
        proxy = arena.proxy(tunnel_port)
        await arena.server(port, tunnel_port, tls)
        await arena.client(proxy.port, target.port)
        await until(lambda: len(proxy.channels) == 2, 5, "control and the only link")
        async with await connect(port) as visitor:
            assert await visitor.read_exactly(5) == b"ready"
            proxy.channels[1].cut(reset=reset)
            async with within(3):
                assert await visitor.is_reset() is (reset or bool(tls))
        await until(lambda: ends, 3, "the target to see an end")
        assert ends == [reset or bool(tls)]


# --- F13: half-close --------------------------------------------------------------------


async def test_f13_reply_after_half_close(tmp_path: Path, engine: str, tls: str) -> None:
    """`printf request | nc -N`, and rsh: the request ends, then the answer comes."""
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(answer_after_eof), server=tls)
        for size in (0, 1, 16_384, 16_385, 70_000, len(BODY)):
            answer = await exchange(tunnel.port, BODY[:size])
            assert answer.decode() == f"{size} {digest_of(BODY[:size])}\n"


async def test_f13_target_half_closes_first(tmp_path: Path, engine: str, tls: str) -> None:
    heard: list[bytes] = []

    async def speak_then_listen(stream: Stream) -> None:
        await stream.write(b"over to you")
        stream.finish()
        heard.append(await stream.read_all())

    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(speak_then_listen), server=tls)
        async with await connect(tunnel.port) as visitor:
            assert await visitor.read_all() == b"over to you"
            await visitor.write(BODY[:300_000])
            visitor.finish()
            await until(lambda: heard, 3, "the late bytes")
        assert heard == [BODY[:300_000]]


async def test_f13_half_closed_connection_lives_on(tmp_path: Path, engine: str, tls: str) -> None:
    """One direction shut, the other goes on turn by turn; nobody ends it for being half open."""
    async with Arena(tmp_path, engine) as arena, within(20):
        steps = asyncio.Event()

        async def drip(stream: Stream) -> None:
            assert await stream.read_all() == b"go"
            for number in range(5):
                await stream.write(b"%d" % number)
                await steps.wait()
                steps.clear()

        tunnel = await arena.tunnel(arena.target(drip), server=tls)
        async with await connect(tunnel.port) as visitor:
            await visitor.write(b"go")
            visitor.finish()
            for number in range(5):
                assert await visitor.read() == b"%d" % number
                steps.set()
            assert await visitor.read() == b""


# --- F20: a close must not overtake parked bytes ----------------------------------------


async def test_f20_close_behind_parked_bytes(tmp_path: Path, engine: str, tls: str) -> None:
    """The target sends and closes; a slow reader takes its time and misses nothing."""
    body = BODY * 2
    async with Arena(tmp_path, engine) as arena, within(30):
        tunnel = await arena.tunnel(arena.target(serve_body(body)), server=tls)
        async with await connect(tunnel.port) as visitor:
            first = await visitor.read_exactly(100_000)
            await asyncio.sleep(0.2)  # everything in between is full by now
            for _ in range(20):
                first += await visitor.read_exactly(20_000)
                await asyncio.sleep(0.002)
            assert first == body[: len(first)]
            rest = len(body) - len(first)
            assert await visitor.digest() == (rest, digest_of(body[len(first) :]))


async def test_f20_upload_behind_parked_bytes(tmp_path: Path, engine: str, tls: str) -> None:
    """The visitor sends, half-closes and leaves the rest to the tunnel; the target reads late."""
    may_read = asyncio.Event()
    heard: list[tuple[int, str]] = []

    async def read_late(stream: Stream) -> None:
        await may_read.wait()
        heard.append(await stream.digest())

    body = BODY[:2_000_000]
    async with Arena(tmp_path, engine) as arena, within(30):
        target = arena.target(read_late)
        tunnel = await arena.tunnel(target, server=tls)
        async with await connect(tunnel.port) as visitor:
            await visitor.write(body)
            visitor.finish()
            await until(lambda: target.active, 3, "the target to be reached")
            may_read.set()
            assert await visitor.read() == b""
        assert heard == [(len(body), digest_of(body))]


# --- F24: refused targets ---------------------------------------------------------------


async def test_f24_refused_target_resets_the_visitor(
    tmp_path: Path, engine: str, tls: str
) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(free_port(), server=tls)
        for _ in range(5):
            start = time.monotonic()
            assert await _meets_reset(tunnel.port)
            assert time.monotonic() - start < limit(1)


async def _meets_reset(port: int) -> bool:
    """Tell whether a visitor is reset; that may be so quick that connect() reports it."""
    try:
        async with await connect(port) as visitor:
            return await visitor.is_reset()
    except ConnectionResetError:
        return True


async def test_f24_target_that_comes_back_is_used(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        port = free_port()
        tunnel = await arena.tunnel(port)
        assert await _meets_reset(tunnel.port)
        arena.target(echo, port=port)
        assert await exchange(tunnel.port, b"hello") == b"hello"


async def test_f24_no_link_in_time_ends_the_wait(tmp_path: Path) -> None:
    """F6 for a server without any client: the visitor hangs no longer than DIAL_TIMEOUT."""
    async with Arena(tmp_path, DIAL_TIMEOUT="300ms") as arena, within(20):
        port = free_port()
        await arena.server(port, free_port())
        async with await connect(port) as visitor:
            start = time.monotonic()
            assert await visitor.is_reset()
            assert 0.25 < time.monotonic() - start < limit(3)


async def test_visitors_that_leave_free_port_sides(tmp_path: Path, engine: str, tls: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        target = arena.target(sink)
        tunnel = await arena.tunnel(target, server=tls)
        visitors = [await connect(tunnel.port) for _ in range(20)]
        await until(lambda: target.accepted == 20, 5, "20 visitors at the target")
        for number, visitor in enumerate(visitors):
            if number % 2:
                visitor.reset()
            else:
                visitor.close()
        await until(lambda: target.active == 0, 5, "20 visitors to be gone")
