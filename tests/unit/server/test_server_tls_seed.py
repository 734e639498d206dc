"""server: seed clients with TLS, certificates that change, what the start says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

import pytest
from tests.kit.acceptor_desk import outside
from tests.kit.authority import Authority
from tests.kit.engines import both, engines
from tests.kit.peer import NativeClient
from tests.kit.secure import (
    LibrarySide,
    PythonSide,
    TlsStream,
    library_client,
    python_client,
    secure,
)
from tests.kit.server_desk import config, is_reset, launched, serving
from tests.kit.server_tls_words import PASSWORD, carries, files_query
from tests.kit.timing import limit, until, within

from nodepass.config.environment import Settings
from nodepass.engine.relays import Relays
from nodepass.errors import ConfigError
from nodepass.net import descriptors
from nodepass.server import seed_port
from nodepass.server.server import Server

# --- seed clients with TLS -----------------------------------------------------------------------


@engines
@pytest.mark.parametrize("mode", [1, 2])
async def test_seed_client_with_tls(kind: str, mode: int, authority: Authority) -> None:
    """As the Go program does it: the id in one record, half-close by a bare close_notify."""
    query = "log=none&tls=1" if mode == 1 else files_query(authority.issue("127.0.0.1"))
    async with serving(query, engine=kind) as desk:
        client = await desk.seed(ca=authority.ca)
        assert client.tls == mode
        await client.dial()
        await client.dial()
        await desk.idle(2)
        visitor = await desk.visit()
        link = await client.launched()
        assert isinstance(link, TlsStream)
        await carries(visitor, link)
        link.finish(fin=False)
        async with within(5):
            assert await visitor.read() == b""
            await visitor.write(b"late")
            assert await link.read_exactly(4) == b"late"
            visitor.finish()
            assert await link.read() == b"", "a close_notify"
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        assert desk.figures.relays_reset == 0


@engines
async def test_seed_id_comes_alone_and_at_once(kind: str) -> None:
    """Right behind the handshake, before any byte of ours: the Go client reads once."""
    async with serving("log=none&tls=1", engine=kind) as desk:
        client = await desk.seed()
        await client.dial()
        data = desk.knock(client.data_port)
        side = LibrarySide(library_client(), alpn=())
        async with within(5):
            while not side.shake():
                await data.write(side.give())
                side.take(await data.read())
            await data.write(side.give())
            while (name := side.read(1000)) is None:
                side.take(await data.read())
        assert len(name) == 8
        assert side.read(1000) is None, "nothing behind it"


async def test_seed_client_may_offer_any_protocol_inside_tls() -> None:
    async with serving("log=none&tls=1") as desk:
        client = await desk.seed()
        await client.dial()
        async with within(5):
            context = python_client(alpn="h2")
            link = await secure(desk.knock(client.data_port), PythonSide(context))
            assert len(await link.read(100)) == 8


@engines
@pytest.mark.parametrize(
    ("said", "why"),
    [(b"GET / HTTP/1.1\r\n\r\n", "does not speak TLS"), (b"", "given up"), (None, "was closed")],
)
async def test_data_connection_that_makes_no_handshake(
    kind: str, said: bytes | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving("log=warn&tls=1", engine=kind, handshake_timeout=limit(0.4)) as desk:
            client = await desk.seed()
            await client.dial()
            data = desk.knock(client.data_port)
            if said is None:
                data.finish()
            else:
                await data.write(said)
            await until(lambda: desk.figures.strangers == 1, 5, "the count")
            await is_reset(data)  # has an end
            await client.dial()
            assert desk.figures.sessions_open == 1, "the client is not harmed"
    assert "TLS failed at the data port" in caplog.text
    assert why in caplog.text


@both
async def test_data_connections_of_strangers_cost_no_handshake() -> None:
    async with serving("log=none&tls=1") as desk:
        client = await desk.seed()
        await client.dial()
        before = desk.relays.statistics().handshakes
        assert await is_reset(desk.knock(client.data_port, "127.0.0.2"))
        assert desk.relays.statistics().handshakes == before


@both
async def test_handshakes_at_the_data_port_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed_port, "MAX_SHAKES", 2)
    async with serving("log=none&tls=1") as desk:
        client = await desk.seed()
        await client.dial()
        held = [desk.knock(client.data_port) for _ in range(2)]
        await until(lambda: len(desk.relays) == 2, 5, "two handshakes")
        assert await is_reset(desk.knock(client.data_port))
        for stream in held:
            stream.close()
        await until(lambda: len(desk.relays) == 0, 5, "their end")
        await client.dial()


@engines
async def test_seed_client_that_leaves_during_a_handshake(kind: str) -> None:
    async with serving("log=none&tls=1", engine=kind) as desk:
        client = await desk.seed()
        await client.dial()
        data = desk.knock(client.data_port)
        await until(lambda: len(desk.relays) == 1, 5, "the handshake")
        client.control.close()
        await until(lambda: not desk.figures.sessions_open, 5, "the loss")
        side = LibrarySide(library_client(), alpn=())
        async with within(5):
            far = TlsStream(data, side)
            with contextlib.suppress(EOFError, OSError):
                await far.shake()
                await far.read()
        await until(lambda: len(desk.relays) == 0, 5, "the end")
        assert await is_reset(outside(far))
        assert desk.figures.links_idle == 0


@both
async def test_data_port_gives_no_link_beyond_all_bounds() -> None:
    async with serving("log=none&tls=1", min_pool_capacity=1, max_pool_capacity=1) as desk:
        client = await desk.seed()
        for _ in range(descriptors.IDLE_ROOM):
            await client.dial()
        await desk.idle(descriptors.IDLE_ROOM)
        before = desk.relays.statistics().handshakes
        assert await is_reset(desk.knock(client.data_port))
        assert desk.relays.statistics().handshakes == before


@both
async def test_handshakes_under_way_give_no_links_beyond_the_bounds() -> None:
    """They were begun while there was room for each of them."""
    async with serving("log=none&tls=1", min_pool_capacity=1, max_pool_capacity=1) as desk:
        client = await desk.seed()
        await client.dial()
        streams = [desk.knock(client.data_port) for _ in range(3)]
        await until(lambda: len(desk.relays) == 3, 5, "handshakes under way")
        given = 0
        for stream in streams:
            with contextlib.suppress(EOFError, OSError):
                async with within(5):
                    link = await secure(stream, PythonSide(python_client()))
                    given += len(await link.read(100)) == 8
        assert given == descriptors.IDLE_ROOM - 1
        await desk.idle(descriptors.IDLE_ROOM)


@both
async def test_engine_that_takes_no_handshake_at_the_data_port() -> None:
    relays = Relays(Settings(threads=1))
    async with serving("log=none&tls=1", relays=relays) as desk:
        client = await desk.seed()
        await client.dial()
        await relays.close()
        assert await is_reset(desk.knock(client.data_port))


# --- certificates that change --------------------------------------------------------------------


async def shown_by(desk_tunnel: int) -> str:
    """Return the fingerprint that a new connection is shown."""
    client = NativeClient(desk_tunnel)
    async with within(5):
        stream, _ = await client.greeted()
    assert isinstance(stream, TlsStream)
    stream.close()
    return stream.side.fingerprint()


@engines
async def test_reload_shows_the_new_certificate_to_new_links_only(
    kind: str, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nodepass"):
        async with serving(files_query(authority.issue("127.0.0.1"), "info"), engine=kind) as desk:
            client = await desk.client()
            first, second = await desk.links(client, 1, 2)
            visitor = await desk.visit()
            assert await launched(client) == 2
            before = await shown_by(desk.tunnel)
            authority.issue("127.0.0.1")
            assert await shown_by(desk.tunnel) == before, "nobody has looked yet"
            assert desk.server.reload()
            after = await shown_by(desk.tunnel)
            assert after != before
            await carries(visitor, second)
            (third,) = await desk.links(client, 3)
            assert isinstance(third, TlsStream)
            assert third.side.fingerprint() == after
            await carries(await desk.visit(), third, 1000)
            await carries(await desk.visit(), first, 1000)
            assert desk.figures.sessions == 1
    assert "certificate reloaded" in caplog.text
    assert after in caplog.text


@both
async def test_reload_of_a_broken_file_keeps_the_old(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    issued = authority.issue("127.0.0.1")
    with caplog.at_level(logging.ERROR, "nodepass"):
        async with serving(files_query(issued, "error")) as desk:
            before = await shown_by(desk.tunnel)
            Path(issued.crt).write_text("half a file")
            assert desk.server.reload()
            assert await shown_by(desk.tunnel) == before
    assert "not reloaded" in caplog.text


@both
async def test_changed_files_are_noticed(authority: Authority) -> None:
    async with serving(files_query(authority.issue("127.0.0.1")), reload_interval=0.05) as desk:
        before = await shown_by(desk.tunnel)
        authority.issue("127.0.0.1")
        async with within(10):
            while await shown_by(desk.tunnel) == before:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("query", ["log=none", "log=none&tls=1"])
async def test_nothing_to_reload_without_files(query: str) -> None:
    async with serving(query) as desk:
        assert not desk.server.reload()


async def test_nothing_to_reload_before_the_start_and_after_the_end(authority: Authority) -> None:
    server = Server(config(files_query(authority.issue("127.0.0.1"))))
    assert not server.reload()
    async with server:
        assert server.reload()
    assert not server.reload()


async def test_start_fails_with_a_certificate_that_cannot_be_used(authority: Authority) -> None:
    issued = authority.issue("127.0.0.1")
    Path(issued.key).write_text("no key")
    server = Server(config(files_query(issued)))
    with pytest.raises(ConfigError, match="key"):
        await server.start()
    async with within(1):
        await server.wait_closed()


# --- what the start says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "password", "warning"),
    [
        ("log=warn", "", "no password and no TLS"),
        ("log=warn&tls=1", "", "no password: whoever reaches the tunnel port"),
        ("log=warn", PASSWORD, "no TLS: whoever sees the wire"),
        ("log=warn&tls=1", PASSWORD, ""),
    ],
)
async def test_start_warns_of_what_is_left_open(
    query: str, password: str, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with serving(query, password=password):
            pass
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == int(bool(warning)), told
    assert warning in caplog.text
    assert PASSWORD not in caplog.text
