"""server: TLS on control and links, with hand-driven clients in the same loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest
from tests.kit.acceptor_desk import outside
from tests.kit.authority import Authority
from tests.kit.engines import both, engines
from tests.kit.hand_seal import HandSealer
from tests.kit.secure import (
    LibrarySide,
    TlsStream,
    library_client,
    secure,
)
from tests.kit.server_desk import Desk, is_reset, launched, serving
from tests.kit.server_tls_words import NONCE, PASSWORD, carries, files_query
from tests.kit.timing import until, within

from nodepass.config.environment import Settings
from nodepass.engine.relays import Relays
from nodepass.net import tcp

# --- TLS -----------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("mode", [1, 2])
async def test_visitor_is_carried_inside_tls(
    kind: str, mode: int, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    query = "log=info&tls=1" if mode == 1 else files_query(authority.issue("127.0.0.1"), "info")
    with caplog.at_level(logging.INFO, "nodepass"):
        async with serving(query, engine=kind) as desk:
            client = await desk.client()
            (link,) = await desk.links(client, 1)
            assert isinstance(link, TlsStream)
            shown = link.side.fingerprint()
            visitor = await desk.visit()
            assert await launched(client) == 1
            await carries(visitor, link)
            visitor.finish()
            async with within(5):
                assert await link.read() == b"", "a close_notify"
                await link.write(b"late")
                assert await visitor.read_exactly(4) == b"late"
                link.finish(fin=False)
                assert await visitor.read() == b""
            await until(lambda: not desk.figures.visitors_open, 5, "the end")
            figures = desk.figures
            assert (figures.bytes_up, figures.bytes_down) == (100_000, 100_004)
            assert figures.relays_reset == 0
    assert shown in caplog.text, "the certificate's fingerprint, to be compared"
    assert f"tls={mode}" in caplog.text


@engines
async def test_early_bytes_behind_a_claim_inside_tls(kind: str) -> None:
    """In the record of the claim, and in further ones that lie in the engine's hands."""
    async with serving("log=none&tls=1", engine=kind) as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 1)
        await link.write(b"banner")
        await asyncio.sleep(0.01)
        visitor = await desk.visit()
        async with within(5):
            assert await visitor.read_exactly(6) == b"banner"


@engines
async def test_truncated_link_resets_its_visitor(kind: str) -> None:
    async with serving("log=none&tls=1", engine=kind) as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 1)
        visitor = await desk.visit()
        assert await launched(client) == 1
        await link.write(b"half")
        async with within(5):
            assert await visitor.read_exactly(4) == b"half"
        assert isinstance(link, TlsStream)
        outside(link).finish()
        assert await is_reset(visitor)
        await until(lambda: not desk.figures.visitors_open, 5, "the end")


@both
async def test_dead_idle_link_inside_tls_is_noticed() -> None:
    async with serving("log=none&tls=1") as desk:
        client = await desk.client()
        links = await desk.links(client, 1, 2, 3)
        links[0].reset()
        links[1].close()
        links[2].finish()
        await until(lambda: desk.figures.links_lost == 3, 5, "the losses")
        assert desk.figures.links_idle == 0


@both
async def test_client_inside_tls_says_goodbye_by_closing() -> None:
    async with serving("log=none&tls=1") as desk:
        client = await desk.client()
        await desk.links(client, 1)
        assert isinstance(client.control, TlsStream)
        client.control.finish(fin=False)
        await until(lambda: not desk.figures.sessions_open, 5, "the loss")
        assert desk.figures.links_idle == 0


@both
async def test_bad_record_on_control_unseats_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn&tls=1") as desk:
            client = await desk.client()
            assert isinstance(client.control, TlsStream)
            await outside(client.control).write(b"\x17\x03\x03\x00\x20" + bytes(32))
            await until(lambda: not desk.figures.sessions_open, 5, "the loss")
    assert "a TLS record is bad" in caplog.text


@engines
async def test_stop_ends_control_inside_tls_cleanly(kind: str) -> None:
    async with serving("log=none&tls=1", shutdown_timeout=5.0, engine=kind) as desk:
        client = await desk.client()
        idle, used = await desk.links(client, 1, 2)
        visitor = await desk.visit()
        assert await launched(client) == 2
        stopping = asyncio.create_task(desk.server.stop())
        assert await client.signal() == "drain://"
        assert isinstance(idle, TlsStream)
        assert await is_reset(outside(idle))
        await visitor.write(b"late")
        async with within(5):
            assert await used.read_exactly(4) == b"late"
            visitor.close()
            used.finish()
            assert await client.signal() == "bye://stopped"
            assert await client.control.read_all() == b"", "to a close_notify"
            await stopping


@engines
async def test_stop_in_the_middle_of_handshakes(kind: str) -> None:
    """The leak guard looks for what is lent to the engine."""
    async with serving("log=none&tls=1", engine=kind) as desk:
        callers = [await desk.call() for _ in range(5)]
        seed = await desk.seed()
        await seed.dial()
        data = desk.knock(seed.data_port)
        for stream in [*callers, data]:
            side = LibrarySide(library_client())
            side.shake()
            await stream.write(side.give()[:80])
        await until(lambda: len(desk.relays) == 6, 5, "handshakes under way")
        async with within(5):
            await desk.server.stop()
        assert [await is_reset(stream) for stream in [*callers, data]] == [True] * 6


@engines
async def test_stop_gives_up_handshakes_on_a_shared_engine(kind: str) -> None:
    relays = Relays(Settings(threads=1, engine=kind))  # type: ignore[arg-type]
    try:
        async with serving("log=none&tls=1", relays=relays) as desk:
            caller, seed = await desk.call(), await desk.seed()
            await seed.dial()
            side = LibrarySide(library_client())
            side.shake()
            await caller.write(side.give()[:80])
            data = desk.knock(seed.data_port)
            await until(lambda: len(relays) == 2, 5, "handshakes under way")
            async with within(5):
                await desk.server.stop()
            await until(lambda: len(relays) == 0, 1, "their end")
            assert await is_reset(caller)
            assert await is_reset(data)
    finally:
        await relays.close()


@both
async def test_engine_shared_by_two_servers_with_tls() -> None:
    relays = Relays(Settings(threads=1))
    try:
        async with (
            serving("log=none&tls=1", relays=relays) as one,
            serving("log=none&tls=1", relays=relays) as two,
        ):
            for desk in (one, two):
                client = await desk.client()
                (link,) = await desk.links(client, 1)
                await carries(await desk.visit(), link, 1000)
    finally:
        await relays.close()


# --- half a message of TLS -----------------------------------------------------------------------


async def broken_hello(desk: Desk, name: str = "me") -> TlsStream:
    """Say hello, and behind it begin a message whose rest keeps the server from writing."""
    hand = HandSealer()
    async with within(5):
        inner = await secure(await desk.call(), hand.side)
    line = f"hello://{name}?v=2&n={NONCE}\n".encode()
    await outside(inner).write(hand.seal(line) + hand.half_message())
    return inner


@both
async def test_hello_that_cannot_be_refused_is_counted_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with serving("log=warn&tls=1", password=PASSWORD) as desk:
            for _ in range(3):
                assert await is_out(await broken_hello(desk))
            await until(lambda: desk.figures.strangers == 3, 5, "the count")
            assert desk.figures.sessions == 0
    assert "no password" in caplog.text
    assert len(caplog.records) == 1, "once a minute"


@both
async def test_hello_that_cannot_be_welcomed_is_no_client() -> None:
    async with serving("log=none&tls=1") as desk:
        for _ in range(3):
            assert await is_out(await broken_hello(desk))
        assert desk.figures.sessions == 0
        await desk.client()


async def is_out(stream: TlsStream) -> bool:
    """Whether the connection ends, with a word or without."""
    with contextlib.suppress(OSError, EOFError):
        async with within(5):
            assert not (await stream.read_line()).startswith(b"welcome")
    return tcp.has_ended(stream.sock)


@both
@pytest.mark.parametrize("then", ["replaced", "stopped"])
async def test_client_that_we_cannot_write_to_does_not_stay(then: str) -> None:
    """Its place is free for the next of its name, and the others hear of our stop."""
    async with serving("log=none&tls=1") as desk:
        other = await desk.client("other")
        hand = HandSealer()
        async with within(5):
            inner = await secure(await desk.call(), hand.side)
            await outside(inner).write(hand.seal(f"hello://me?v=2&n={NONCE}\n".encode()))
            assert (await inner.read_line()).startswith(b"welcome://")
            while not (await inner.read_line()).startswith(b"ping://"):
                pass
        assert desk.figures.sessions_open == 2
        await outside(inner).write(hand.half_message())
        await asyncio.sleep(0.02)
        if then == "replaced":
            client = await desk.client("me")
            (link,) = await desk.links(client, 1)
            await carries(await desk.visit(), link, 1000)
            assert desk.figures.sessions_open == 2
        else:
            async with within(5):
                await desk.server.stop()
                assert await other.signal() == "drain://"
                assert await other.signal() == "bye://stopped"
