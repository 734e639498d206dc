"""acceptor: connections that have to speak TLS before they say what they are."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Callable

import pytest
from tests.kit.acceptor_desk import Street, oldest, outside
from tests.kit.acceptor_words import CLAIM, HELLO, gone, street
from tests.kit.engines import both, engines
from tests.kit.peer import binding_of
from tests.kit.secure import LibrarySide, PythonSide, Side, library_client, python_client
from tests.kit.timing import limit, until, within

from nodepass.engine.relays import Handshake
from nodepass.protocol import lines
from nodepass.protocol.messages import Hello, LinkClaim
from nodepass.server import acceptor

# --- who gets in ---------------------------------------------------------------------------------


async def test_greeting_asks_for_tls_and_a_password() -> None:
    async with Street(is_secure=True, key=b"k" * 32) as here:
        greeting = lines.parse_greeting(here.greeting(here.come())[:-1])
        assert (greeting.tls, greeting.needs_password) == (1, True)
    async with Street() as here:
        greeting = lines.parse_greeting(here.greeting(here.come())[:-1])
        assert (greeting.tls, greeting.needs_password) == (0, False)


@both
@engines
@pytest.mark.parametrize(("line", "what"), [(HELLO, Hello), (CLAIM, LinkClaim)])
async def test_hands_over_who_has_said_what_it_is(
    kind: str, line: bytes, what: type[Hello | LinkClaim]
) -> None:
    async with street(kind) as here:
        far = await here.secured()
        await far.write(line + b"behind")
        await until(lambda: here.openings, 5, "the opening")
        caller, opening = here.openings[0]
        assert isinstance(opening, what)
        assert caller.handshake.rest() == b"behind"
        assert caller.handshake.binding == binding_of(far)
        assert caller.records is not None
        assert caller.tls is caller.records.connection
        assert (len(here.acceptor), len(here.relays)) == (0, 0)
        caller.send(b"welcome\n")
        async with within(5):
            assert await far.read_line() == b"welcome\n"
        await far.write(b"more")
        await asyncio.sleep(0.01)
        assert caller.records.open(caller.sock.recv(1000)) == b"more", "read by nobody else"
        assert here.counters.strangers == 0


@both
@engines
async def test_line_in_one_segment_with_the_end_of_the_handshake(kind: str) -> None:
    async with street(kind) as here:
        far = here.greeted()
        async with within(5):
            while not far.side.shake():
                await outside(far).write(far.side.give())
                far.side.take(await outside(far).read())
            await far.write(HELLO + b"behind")
        await until(lambda: here.openings, 5, "the opening")
        assert here.openings[0][0].handshake.rest() == b"behind"


@both
@engines
async def test_c29_without_room_in_the_kernel_a_caller_leaves(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC of epoll_ctl(2), when he is watched again behind the TLS handshake."""
    async with street(kind) as here:
        far = here.greeted()

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(here.watch, "readable", full)
        with contextlib.suppress(OSError):
            async with within(5):
                await far.shake()
        await gone(here)
        assert not here.openings


@both
@engines
async def test_line_in_pieces(kind: str) -> None:
    """In several records, and each of them in several segments."""
    async with street(kind) as here:
        far = await here.secured()
        for piece in (HELLO[:1], HELLO[1:20], HELLO[20:]):
            assert not here.openings
            far.side.write(piece)
            data = far.side.give()
            for cut in (data[:3], data[3:9], data[9:]):
                await outside(far).write(cut)
                await asyncio.sleep(0.005)
        await until(lambda: here.openings, 5, "the opening")
        assert here.counters.strangers == 0


@both
@engines
async def test_c23_records_before_a_first_line_are_bounded(kind: str) -> None:
    """A record for each letter: 23 bytes, far more than the line itself."""
    async with street(kind) as here:
        far = await here.secured()
        count = 0
        while len(here.acceptor) and count < acceptor.MOST_HEARD:
            count += 1
            far.side.write(b"x")
            data = far.side.give()
            with contextlib.suppress(OSError):
                await outside(far).write(data)
            await asyncio.sleep(0)
        await gone(here)
        assert count < acceptor.MOST_HEARD // 8, "long before the line is too long by itself"
        assert count >= acceptor.MOST_HEARD // 40
        assert here.counters.strangers == 1
        assert not here.openings


@both
@engines
async def test_handshake_byte_by_byte(kind: str) -> None:
    async with street(kind) as here:
        far = here.greeted()
        async with within(20):
            while not far.side.shake():
                hello = far.side.give()
                for place in range(0, len(hello), 100):
                    await outside(far).write(hello[place : place + 100])
                    await asyncio.sleep(0)
                far.side.take(await outside(far).read())
            far.side.write(HELLO)
            for byte in far.side.give():
                await outside(far).write(bytes([byte]))
                await asyncio.sleep(0)
        await until(lambda: here.openings, 5, "the opening")


@both
@engines
async def test_deadline_does_not_hit_who_has_passed(kind: str) -> None:
    async with street(kind, timeout=0.5) as here:
        far = await here.secured()
        await far.write(HELLO)
        await until(lambda: here.openings, 5, "the opening")
        await asyncio.sleep(0.6)
        assert here.openings[0][0].sock.fileno() >= 0
        assert here.counters.strangers == 0


@both
@engines
async def test_half_a_handshake_delays_nobody(kind: str) -> None:
    async with street(kind) as here:
        await here.shaking(40, "10.9.9.9")
        async with within(5):
            await (await here.secured()).write(HELLO)
            await until(lambda: here.openings, 5, "the opening")
        assert len(here.acceptor) == 40


# --- who does not --------------------------------------------------------------------------------


@both
@engines
async def test_silent_caller_costs_no_key_exchange(kind: str) -> None:
    async with street(kind, timeout=0.05) as here:
        assert here.tls is not None
        fars = [here.come() for _ in range(30)]
        await asyncio.sleep(0.02)
        assert (here.tls.accepted, len(here.relays)) == (0, 0)
        await gone(here)
        assert here.tls.accepted == 0
        assert here.counters.strangers == len(fars)


@both
@pytest.mark.parametrize(
    ("said", "what"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "an HTTP client"),
        (HELLO, "it wrote 'hello://somebody"),
        (b"\x17\x03\x03\x00\x01", "no release we know"),
        (b"\x00", "no release we know"),
        (b"\n", "no release we know"),
    ],
)
async def test_whoever_speaks_no_tls_is_told_apart_by_one_byte(
    said: bytes, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with street("python", level="warn") as here:
            assert here.tls is not None
            far = here.come()
            far.send(said)
            await gone(here)
            assert here.is_out(far)
            assert here.tls.accepted == 0, "no key exchange for that"
            assert here.counters.strangers == 1
            assert not here.openings
    assert "it does not speak TLS" in caplog.text
    assert what in caplog.text


@both
@engines
async def test_half_a_handshake_ends_at_the_deadline(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with street(kind, timeout=limit(0.3), level="warn") as here:
            (far,) = await here.shaking()
            assert len(here.acceptor) == 1
            await gone(here)
            assert here.is_out(far.sock)
            assert here.counters.strangers == 1
    assert "its TLS handshake stayed unfinished" in caplog.text


@both
@engines
@pytest.mark.parametrize(
    ("said", "why"),
    [(b"", "it said nothing inside TLS"), (HELLO[:10], "its first line stayed unfinished")],
)
async def test_silence_after_the_handshake_ends_at_the_deadline(
    kind: str, said: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with street(kind, level="warn") as here:
            far = await here.secured()
            (caller,) = here.acceptor._pending.values()
            if said:
                await far.write(said)
            await until(lambda: caller.records and caller.said == said, 5, "what it says")
            here.acceptor._expire(caller)
            await gone(here)
            assert here.is_out(far.sock)
            assert not here.openings
    assert why in caplog.text


@both
@engines
@pytest.mark.parametrize("how", ["end", "reset"])
async def test_caller_that_leaves_in_the_middle(
    kind: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with street(kind, level="warn") as here:
            (far,) = await here.shaking()
            if how == "end":
                far.close()
            else:
                far.reset()
            await gone(here)
            assert here.counters.strangers == 1
    assert "the connection broke during the TLS handshake" in caplog.text


@both
@engines
@pytest.mark.parametrize(
    ("side", "why"),
    [
        (lambda: PythonSide(oldest()), "does not speak TLS 1.3"),
        (lambda: PythonSide(python_client(alpn="http/1.1")), "nodepass/2 inside TLS"),
    ],
    ids=["TLS 1.2", "another ALPN"],
)
async def test_handshake_that_is_refused(
    kind: str, side: Callable[[], Side], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with street(kind, level="warn") as here:
            far = here.greeted(side())
            with contextlib.suppress(OSError, EOFError):
                async with within(5):
                    await far.shake()
                    await far.write(HELLO)
            await gone(here)
            assert here.is_out(far.sock)
            assert (here.counters.strangers, here.openings) == (1, [])
    assert why in caplog.text


@both
@engines
async def test_caller_that_offers_no_protocol(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with street(kind, level="warn") as here:
            far = await here.secured(LibrarySide(library_client(), alpn=()))
            await gone(here)
            assert here.is_out(far.sock)
            assert (here.counters.strangers, here.openings) == (1, [])
    assert "it does not speak nodepass/2 inside TLS" in caplog.text


@both
@engines
@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n", b"x" * 3000, b"\n"])
async def test_garbage_inside_tls(kind: str, garbage: bytes) -> None:
    async with street(kind) as here:
        far = await here.secured()
        await far.write(garbage)
        await gone(here)
        assert here.counters.strangers == 1
        assert not here.openings


@both
@engines
@pytest.mark.parametrize("said", [b"", HELLO[:10]])
@pytest.mark.parametrize("how", ["close_notify", "end", "reset", "bad record"])
async def test_caller_that_leaves_after_the_handshake(kind: str, said: bytes, how: str) -> None:
    async with street(kind) as here:
        far = await here.secured()
        (caller,) = here.acceptor._pending.values()
        if said:
            await far.write(said)
        # libuv tells of bytes and of a reset once if both are there; the deadline has the rest.
        await until(lambda: caller.records and caller.said == said, 5, "what it says")
        if how == "close_notify":
            far.finish(fin=False)
        elif how == "end":
            far.close()
        elif how == "reset":
            far.reset()
        else:
            await outside(far).write(b"\x17\x03\x03\x00\x20" + bytes(32))
        await gone(here)
        assert here.counters.strangers == 1
        assert not here.openings


@both
async def test_whole_line_counts_though_nothing_follows_it() -> None:
    async with street("python") as here:
        far = await here.secured()
        far.side.write(HELLO)
        far.side.end()
        await outside(far).write(far.side.give())
        await until(lambda: here.openings, 5, "the opening")
        assert here.counters.strangers == 0


@both
async def test_engine_that_takes_no_handshake(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with street("python", level="warn") as here:
            far = here.greeted()
            await here.relays.close()
            far.side.shake()
            await outside(far).write(far.side.give())
            await gone(here)
            assert here.counters.strangers == 1
    assert "engine handshake" in caplog.text


@both
@engines
async def test_engine_closed_under_a_handshake(kind: str) -> None:
    async with street(kind) as here:
        await here.shaking(3)
        await here.relays.close()
        await gone(here)
        assert here.counters.strangers == 3


@both
async def test_engine_that_keeps_a_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads did not end in time; whoever shook is gone, and once only."""
    async with street("python") as here:
        await here.shaking(2)
        monkeypatch.setattr(Handshake, "finish", lambda *_: None)
        await here.relays.close()
        for shake in [caller.shake for caller in here.acceptor._pending.values()]:
            assert shake is not None
            shake.result.cancel()
        await gone(here)
        here.acceptor.close()
        assert here.counters.strangers == 2


@both
@engines
async def test_client_that_leaves_in_the_middle_is_no_stranger(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It stops while it refills its links."""
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with street(kind, level="debug") as here:
            here.known.add("10.0.0.1")
            (far,) = await here.shaking()
            far.reset()
            await gone(here)
            assert here.counters.strangers == 0
    assert [r.levelname for r in caplog.records if "broke during" in r.getMessage()] == ["DEBUG"]
