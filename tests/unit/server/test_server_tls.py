"""server: TLS and passwords, with hand-driven clients in the same loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path

import pytest
from tests.kit.acceptor_desk import outside
from tests.kit.authority import Authority, Issued
from tests.kit.engines import both, engines
from tests.kit.hand_seal import HandSealer
from tests.kit.peer import NativeClient, join, mac, stretch
from tests.kit.secure import (
    LibrarySide,
    PythonSide,
    TlsStream,
    library_client,
    python_client,
    secure,
)
from tests.kit.server_desk import Desk, config, is_reset, launched, serving
from tests.kit.stream import Stream, connect
from tests.kit.timing import limit, until, within

from nodepass.config.environment import Settings
from nodepass.engine.relays import Relays
from nodepass.errors import ConfigError
from nodepass.net import tcp
from nodepass.server import seed_port
from nodepass.server.server import Server

PASSWORD = "correct-horse"
NONCE = "00" * 16


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def files_query(issued: Issued, log: str = "none") -> str:
    return f"log={log}&tls=2&crt={issued.crt}&key={issued.key}"


async def carries(desk_visit: Stream, link: Stream, size: int = 100_000) -> None:
    """Send bytes both ways between a visitor and its link."""
    up, down = os.urandom(size), os.urandom(size)
    async with within(20):
        writing = asyncio.gather(desk_visit.write(up), link.write(down))
        assert await link.read_exactly(size) == up
        assert await desk_visit.read_exactly(size) == down
        await writing


# --- TLS ---------------------------------------------------------------------------------------


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


# --- passwords ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("tls", ["0", "1"])
async def test_client_with_the_password_gets_in(tls: str) -> None:
    """NativeClient checks the server's proof, and that no key travels."""
    async with serving(f"log=none&tls={tls}", password=PASSWORD) as desk:
        client = await desk.client(password=PASSWORD)
        (link,) = await desk.links(client, 1)
        await carries(await desk.visit(), link, 1000)
        assert desk.figures.strangers == 0


@both
@pytest.mark.parametrize("tls", ["0", "1"])
@pytest.mark.parametrize(
    ("password", "proof", "why"),
    [("", None, "no password"), (PASSWORD, "00" * 32, "a wrong password")],
)
async def test_client_without_it_is_refused(
    tls: str, password: str, proof: str | None, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with serving(f"log=debug&tls={tls}", password=PASSWORD) as desk:
            guest = await desk.guest(password=password)
            async with within(5):
                assert await guest.hello(proof) == b"refuse://auth\n"
            await until(lambda: desk.figures.strangers == 1, 5, "the count")
            figures = desk.figures
            assert (figures.sessions, figures.sessions_open) == (0, 0)
    assert "client refused" in caplog.text
    assert why in caplog.text
    assert PASSWORD not in caplog.text


@both
async def test_greeting_with_a_password_admits_no_seed_client() -> None:
    async with (
        serving("log=none", password=PASSWORD, handshake_timeout=0.1) as desk,
        await connect(desk.tunnel) as caller,
    ):
        greeting = await caller.read_line()
        assert greeting.startswith(b"//0?")
        assert b"&a=1#" in greeting
        assert await is_reset(caller), "silence is no way in"


@both
@pytest.mark.parametrize("tls", ["0", "1"])
async def test_replayed_hello_is_refused(tls: str) -> None:
    """Heard on one connection and said on another, by somebody who knows no password."""
    async with serving(f"log=none&tls={tls}", password=PASSWORD) as desk:
        heard: list[bytes] = []
        client = await desk.guest(password=PASSWORD)

        async def overhear(line: str) -> None:
            heard.append(line.encode() + b"\n")
            await client.control.write(heard[-1])

        client.say = overhear  # type: ignore[method-assign]
        assert (await client.hello()).startswith(b"welcome://")
        thief = await desk.guest(password=PASSWORD)
        stream, _ = await thief.greeted()
        await stream.write(heard[0])
        async with within(5):
            assert await stream.read_line() == b"refuse://auth\n"
        assert desk.figures.sessions == 1


@both
@pytest.mark.parametrize("password", ["", PASSWORD])
@pytest.mark.parametrize("tls", ["0", "1"])
async def test_replayed_claim_of_a_link_is_refused(tls: str, password: str) -> None:
    async with serving(f"log=none&tls={tls}", password=password) as desk:
        client = await desk.client(password=password)
        stream, greeting = await client.greeted()
        session = client.session.encode()
        binding = b""
        if isinstance(stream, TlsStream):
            assert isinstance(stream.side, LibrarySide)
            binding = stream.side.binding()
        proof = mac(client.key, b"nodepass/2 link", greeting, binding, session, b"1")
        claim = f"link://{client.session}?i=1&p={proof}\n".encode()
        replayed, _ = await client.greeted()
        await replayed.write(claim)
        assert await is_reset(bare(replayed))
        await stream.write(claim)
        await until(lambda: desk.figures.links == 1, 5, "the true one")
        assert desk.figures.strangers == 1


def bare(stream: Stream) -> Stream:
    """Return the connection itself."""
    return outside(stream) if isinstance(stream, TlsStream) else stream


@both
@pytest.mark.parametrize("bound_to", ["nothing", "the control connection"])
async def test_link_is_bound_to_its_own_tls(bound_to: str) -> None:
    """A middle man has a TLS connection with each side; no proof passes through him."""
    async with serving("log=none&tls=1") as desk:
        client = await desk.client()
        assert isinstance(client.control, TlsStream)
        assert isinstance(client.control.side, LibrarySide)
        binding = b"" if bound_to == "nothing" else client.control.side.binding()
        stream, greeting = await client.greeted()
        proof = mac(
            client.key, b"nodepass/2 link", greeting, binding, client.session.encode(), b"1"
        )
        await stream.write(f"link://{client.session}?i=1&p={proof}\n".encode())
        assert await is_reset(bare(stream))
        figures = desk.figures
        assert (figures.links, figures.strangers) == (0, 1)


@both
async def test_hello_is_bound_to_its_tls() -> None:
    async with serving("log=none&tls=1", password=PASSWORD) as desk:
        stream, greeting = await (await desk.guest()).greeted()
        hello = f"hello://me?v=2&n={NONCE}"
        script = join(greeting, b"", hello.encode())  # as if there were no TLS
        proof = mac(stretch(PASSWORD), b"nodepass/2 client", script)
        await stream.write(f"{hello}&p={proof}\n".encode())
        async with within(5):
            assert await stream.read_line() == b"refuse://auth\n"


async def test_no_repr_shows_a_session_key() -> None:
    """asyncio prints callbacks that fail or are slow, and their arguments with them."""
    async with serving() as desk:
        client = await desk.client()
        (member,) = desk.server._sessions
        assert member.key is not None
        for text in (repr(member), repr(member.key)):
            assert repr(client.key) not in text
            assert client.key.hex() not in text


# --- throttle ---------------------------------------------------------------------------------


@both
async def test_wrong_password_slows_down_its_source_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nodepass.server.throttle.FIRST_DELAY", 0.3)
    async with serving("log=none", password=PASSWORD) as desk:
        guesser = await desk.guest(password=PASSWORD)
        assert await guesser.hello("00" * 32) == b"refuse://auth\n"
        async with await connect(desk.tunnel, source="127.0.0.2") as other:
            await other.read_line()
            start = time.monotonic()
            await other.write(f"hello://other?v=2&n={NONCE}\n".encode())
            assert await other.read_line() == b"refuse://auth\n"
            assert time.monotonic() - start < 0.3, "it has not failed before"
        start = time.monotonic()
        client = await desk.client(password=PASSWORD)
        assert time.monotonic() - start >= 0.3
        start = time.monotonic()
        await desk.links(client, 1, 2, 3)
        assert time.monotonic() - start < 0.3, "links do not wait"


@both
async def test_wrong_proof_of_a_link_counts_as_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodepass.server.throttle.FIRST_DELAY", 0.3)
    async with serving() as desk:
        client = await desk.client()
        assert await is_reset(await desk.link(client, 1, proof="00" * 32))
        start = time.monotonic()
        await desk.client("other")
        assert time.monotonic() - start >= 0.3


@both
async def test_links_of_ended_sessions_and_old_versions_are_no_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nodepass.server.throttle.FIRST_DELAY", 60.0)
    async with serving() as desk:
        stale = await desk.call()
        await stale.write(f"link://{'ab' * 8}?i=1&p={'00' * 32}\n".encode())
        assert await is_reset(stale)
        old = await desk.call()
        await old.write(f"hello://me?v=1&n={NONCE}\n".encode())
        assert await old.read_line() == b"refuse://version\n"
        start = time.monotonic()
        await desk.client()
        assert time.monotonic() - start < limit(2.0), "half of HANDSHAKE_TIMEOUT is 2.5"


# --- half a message of TLS ---------------------------------------------------------------------


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


# --- seed clients with TLS ---------------------------------------------------------------------


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
        for _ in range(tcp.IDLE_ROOM):
            await client.dial()
        await desk.idle(tcp.IDLE_ROOM)
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
        assert given == tcp.IDLE_ROOM - 1
        await desk.idle(tcp.IDLE_ROOM)


@both
async def test_engine_that_takes_no_handshake_at_the_data_port() -> None:
    relays = Relays(Settings(threads=1))
    async with serving("log=none&tls=1", relays=relays) as desk:
        client = await desk.seed()
        await client.dial()
        await relays.close()
        assert await is_reset(desk.knock(client.data_port))


# --- certificates that change ------------------------------------------------------------------


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


# --- what the start says -----------------------------------------------------------------------


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
