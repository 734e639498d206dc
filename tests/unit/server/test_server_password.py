"""server: passwords, and how long a source waits after a wrong one."""

from __future__ import annotations

import logging
import time

import pytest
from tests.kit.acceptor_desk import outside
from tests.kit.engines import both
from tests.kit.peer import join, mac, stretch
from tests.kit.secure import (
    LibrarySide,
    TlsStream,
)
from tests.kit.server_desk import is_reset, serving
from tests.kit.server_tls_words import NONCE, PASSWORD, carries
from tests.kit.stream import Stream, connect
from tests.kit.timing import limit, until, within

# --- passwords -----------------------------------------------------------------------------------


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


# --- throttle ------------------------------------------------------------------------------------


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
