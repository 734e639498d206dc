"""What a visitor sees equals what the target does: ends, resets, refusals, early bytes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from tests.system.rig.arena import Arena
from tests.system.rig.stream import Stream, connect, exchange
from tests.system.rig.target import answer_after_eof, body_of, digest_of, echo, sink
from tests.system.rig.timing import free_port, limit, until, within

BODY = body_of(3, 8_000_000)


# --- F10: idle links, early bytes -------------------------------------------------------


async def test_f10_early_bytes_are_delivered(tmp_path: Path, engine: str) -> None:
    """What a visitor sends before any link exists, or at once with its FIN, arrives."""
    async with Arena(tmp_path, engine, DIAL_TIMEOUT="20s") as arena, within(30):
        target, tunnel_port, port = arena.target(answer_after_eof), free_port(), free_port()
        await arena.server(port, tunnel_port)
        async with await connect(port) as visitor:
            await visitor.write(BODY[:50_000])
            visitor.finish()
            await arena.client(tunnel_port, target.port)
            answer = await visitor.read_all()
        assert answer.decode() == f"50000 {digest_of(BODY[:50_000])}\n"


async def test_f10_dead_idle_links_are_replaced_at_once(tmp_path: Path) -> None:
    """Links that a firewall resets while idle never reach a visitor."""
    async with Arena(tmp_path) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        proxy = arena.proxy(tunnel_port)
        await arena.server(port, tunnel_port)
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


async def test_f12_visitor_reset_reaches_the_target(tmp_path: Path, engine: str) -> None:
    ends: list[str] = []

    async def listen_to_the_end(stream: Stream) -> None:
        await stream.write(b"ready")
        ends.append("reset" if await stream.is_reset() else "clean")

    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(listen_to_the_end))
        async with await connect(tunnel.port) as visitor:
            assert await visitor.read_exactly(5) == b"ready"
            visitor.reset()
        await until(lambda: ends, 3, "the target to see an end")
        assert ends == ["reset"]


async def test_f12_target_reset_reaches_the_visitor(tmp_path: Path, engine: str) -> None:
    async def answer_and_reset(stream: Stream) -> None:
        await stream.read()
        stream.reset()

    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(answer_and_reset))
        async with await connect(tunnel.port) as visitor:
            await visitor.write(b"x")
            async with within(3):
                assert await visitor.is_reset()


@pytest.mark.parametrize("reset", [True, False])
async def test_f12_lost_link_resets_both_ends(tmp_path: Path, engine: str, reset: bool) -> None:
    """A link cut in the middle never looks like a clean end with bytes missing."""
    ends: list[str] = []

    async def listen_to_the_end(stream: Stream) -> None:
        await stream.write(b"ready")
        ends.append("reset" if await stream.is_reset() else "clean")

    async with Arena(tmp_path, engine) as arena, within(20):
        target, tunnel_port, port = arena.target(listen_to_the_end), free_port(), free_port()
        proxy = arena.proxy(tunnel_port)
        await arena.server(port, tunnel_port)
        await arena.client(proxy.port, target.port)
        await until(lambda: len(proxy.open_channels) == 5, 5, "four idle links")
        await until(lambda: all(c.up for c in proxy.open_channels), 5, "them to claim a session")
        before = [(channel, channel.up) for channel in proxy.open_channels[1:]]
        async with await connect(port) as visitor:
            assert await visitor.read_exactly(5) == b"ready"
            (busy,) = (channel for channel, up in before if channel.up > up)
            busy.cut(reset=reset)
            async with within(3):
                # plain TCP cannot tell a FIN in between from the target's own
                assert await visitor.is_reset() is reset
        await until(lambda: ends, 3, "the target to see an end")
        assert ends == ["reset" if reset else "clean"]


# --- F13: half-close --------------------------------------------------------------------


async def test_f13_reply_after_half_close(tmp_path: Path, engine: str) -> None:
    """`printf request | nc -N`, and rsh: the request ends, then the answer comes."""
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(answer_after_eof))
        for size in (0, 1, 70_000, len(BODY)):
            answer = await exchange(tunnel.port, BODY[:size])
            assert answer.decode() == f"{size} {digest_of(BODY[:size])}\n"


async def test_f13_target_half_closes_first(tmp_path: Path, engine: str) -> None:
    heard: list[bytes] = []

    async def speak_then_listen(stream: Stream) -> None:
        await stream.write(b"over to you")
        stream.finish()
        heard.append(await stream.read_all())

    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(speak_then_listen))
        async with await connect(tunnel.port) as visitor:
            assert await visitor.read_all() == b"over to you"
            await visitor.write(BODY[:300_000])
            visitor.finish()
            await until(lambda: heard, 3, "the late bytes")
        assert heard == [BODY[:300_000]]


async def test_f13_half_closed_connection_lives_on(tmp_path: Path, engine: str) -> None:
    """One direction shut, the other goes on turn by turn; nobody ends it for being half open."""
    async with Arena(tmp_path, engine) as arena, within(20):
        steps = asyncio.Event()

        async def drip(stream: Stream) -> None:
            assert await stream.read_all() == b"go"
            for number in range(5):
                await stream.write(b"%d" % number)
                await steps.wait()
                steps.clear()

        tunnel = await arena.tunnel(arena.target(drip))
        async with await connect(tunnel.port) as visitor:
            await visitor.write(b"go")
            visitor.finish()
            for number in range(5):
                assert await visitor.read() == b"%d" % number
                steps.set()
            assert await visitor.read() == b""


# --- F20: a close must not overtake parked bytes ----------------------------------------


async def test_f20_close_behind_parked_bytes(tmp_path: Path, engine: str) -> None:
    """The target sends and closes while the visitor has not read a byte: all of it arrives."""
    done = asyncio.Event()

    async def send_and_close(stream: Stream) -> None:
        await stream.write(BODY)
        done.set()

    async with Arena(tmp_path, engine) as arena, within(30):
        tunnel = await arena.tunnel(arena.target(send_and_close))
        async with await connect(tunnel.port) as visitor:
            await until(lambda: tunnel.client.rss() > 0, 1, "the client to run")
            total, first = await visitor.digest(100_000)
            assert (total, first) == (100_000, digest_of(BODY[:100_000]))
            rest = len(BODY) - 100_000
            assert await visitor.digest() == (rest, digest_of(BODY[100_000:]))
        assert done.is_set()


async def test_f20_upload_behind_parked_bytes(tmp_path: Path, engine: str) -> None:
    """The visitor sends, half-closes and leaves the rest to the tunnel; the target reads late."""
    may_read = asyncio.Event()
    heard: list[tuple[int, str]] = []

    async def read_late(stream: Stream) -> None:
        await may_read.wait()
        heard.append(await stream.digest())

    body = BODY[:2_000_000]
    async with Arena(tmp_path, engine) as arena, within(30):
        target = arena.target(read_late)
        tunnel = await arena.tunnel(target)
        async with await connect(tunnel.port) as visitor:
            await visitor.write(body)
            visitor.finish()
            await until(lambda: target.active, 3, "the target to be reached")
            may_read.set()
            assert await visitor.read() == b""
        assert heard == [(len(body), digest_of(body))]


# --- F24: refused targets ---------------------------------------------------------------


async def test_f24_refused_target_resets_the_visitor(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(free_port())
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


async def test_visitors_that_leave_free_both_sides(tmp_path: Path, engine: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        target = arena.target(sink)
        tunnel = await arena.tunnel(target)
        visitors = [await connect(tunnel.port) for _ in range(20)]
        await until(lambda: target.accepted == 20, 5, "20 visitors at the target")
        for number, visitor in enumerate(visitors):
            if number % 2:
                visitor.reset()
            else:
                visitor.close()
        await until(lambda: target.active == 0, 5, "20 visitors to be gone")
