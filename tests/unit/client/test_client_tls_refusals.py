"""client: servers that are none for us, passwords, links that cannot be made."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path

import pytest
from tests.kit.acceptor_desk import outside
from tests.kit.authority import Authority, Issued, self_signed
from tests.kit.client_desk import (
    accept,
    running,
    take_links,
)
from tests.kit.client_tls_words import as_tls, carries, paired
from tests.kit.engines import both, engines
from tests.kit.peer import Listener, NativeServer
from tests.kit.secure import (
    LibrarySide,
    PythonSide,
    TlsFault,
    python_server,
    secure,
)
from tests.kit.timing import limit, until, within

PASSWORD = "correct-horse"


# --- servers that are none for us ----------------------------------------------------------------


@engines
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the server does not speak TLS"),
        (b"welcome://0123456789abcdef?k=00&idle=2\n", "the server does not speak TLS"),
        (b"", "the connection broke during the TLS handshake: it was closed"),
        (None, "the server has not finished the TLS handshake in"),
    ],
)
async def test_server_that_makes_no_handshake(
    kind: str, answer: bytes | None, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    timeout = limit(0.3) if answer is None else 30.0
    with caplog.at_level(logging.WARNING, "nodepass"):
        listener = Listener()
        async with running(
            listener.port, "log=warn", engine=kind, handshake_timeout=timeout
        ) as desk:
            for _ in range(2):
                async with await accept(listener) as stream:
                    await stream.write(b"//0?v=2&n=" + b"00" * 16 + b"&a=0#1\n")
                    async with within(5):
                        hello = await stream.read()
                        assert hello[:1] == b"\x16", "it begins at once"
                        if answer is not None:
                            await stream.write(answer)
                            stream.finish()
                        with contextlib.suppress(ConnectionResetError):
                            assert b"hello://" not in hello + await stream.read_all()
            assert desk.figures.sessions == 0
        listener.close()
    assert told in caplog.text
    assert "Traceback" not in caplog.text


@engines
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("wrong name", "is for other.example, not for 127.0.0.1"),
        ("expired", "the server's certificate expired"),
        ("early", "the server's certificate is valid from"),
        ("untrusted", "comes from an authority"),
        ("self-signed", "is self-signed and not among"),
    ],
)
async def test_mode_2_refuses_and_says_which(
    kind: str,
    what: str,
    told: str,
    authority: Authority,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shown = {
        "wrong name": lambda: authority.issue("other.example"),
        "expired": lambda: authority.issue_expired("127.0.0.1"),
        "early": lambda: authority.issue_early("127.0.0.1"),
        "untrusted": lambda: Authority(tmp_path / "other").issue("127.0.0.1"),
        "self-signed": lambda: self_signed(tmp_path, "127.0.0.1"),
    }[what]()
    with caplog.at_level(logging.ERROR, "nodepass"):
        async with (
            NativeServer(tls=2, files=shown) as server,
            running(server.listener.port, f"log=error&ca={authority.ca}", engine=kind) as desk,
        ):
            for _ in range(2):
                async with within(10):
                    with pytest.raises(TlsFault, match="alert"):
                        await server.accept()
            assert desk.figures.sessions == 0
    assert "no secure tunnel; trying again" in caplog.text
    assert told in caplog.text


@engines
async def test_sni_is_the_name_that_is_checked(kind: str, authority: Authority) -> None:
    async with paired(
        authority.issue("tunnel.example"),
        f"log=none&ca={authority.ca}&sni=tunnel.example",
        tls=2,
        engine=kind,
    ) as (server, _, _):
        side = as_tls(server.control).side
        assert isinstance(side, LibrarySide)
        assert side.tls.get_servername() == b"tunnel.example"


@engines
@pytest.mark.parametrize("alpn", ["", "http/1.1"])
async def test_server_inside_tls_that_is_another_program(
    kind: str, alpn: str, files: Issued, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "nodepass"):
        listener = Listener()
        async with running(listener.port, "log=error", engine=kind):
            async with await accept(listener) as stream:
                await stream.write(b"//0?v=2&n=" + b"00" * 16 + b"&a=0#1\n")
                side = PythonSide(python_server(files, alpn), is_server=True)
                with contextlib.suppress(OSError, EOFError):
                    async with within(5):
                        inner = await secure(stream, side)
                        assert await inner.read_all() == b"", "not a word of ours"
            await until(lambda: caplog.records, 5, "a word about it")
        listener.close()
    assert "nodepass/2" in caplog.text


@both
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("close_notify", "closed the connection before answering"),
        ("end", "closed the connection during the handshake"),
        ("silent", "has not answered our hello in"),
        ("bad record", "a TLS record is bad"),
    ],
)
async def test_server_that_hears_our_hello_and_says_nothing(
    how: str, told: str, files: Issued, caplog: pytest.LogCaptureFixture
) -> None:
    timeout = limit(0.3) if how == "silent" else 30.0
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with (
            NativeServer(tls=1, files=files) as server,
            running(server.listener.port, "log=warn", handshake_timeout=timeout) as desk,
        ):
            async with within(10):
                stream, _, hello = await server.accept()
            assert hello.startswith("hello://me?")
            inner = as_tls(stream)
            if how == "close_notify":
                inner.finish(fin=False)
            elif how == "end":
                outside(inner).finish()
            elif how == "bad record":
                await outside(inner).write(b"\x17\x03\x03\x00\x20" + bytes(32))
            await until(lambda: caplog.records, 5, "a word about it")
            assert desk.figures.sessions == 0
    assert told in caplog.text


@both
@pytest.mark.parametrize("floor", [1, 2])
@pytest.mark.parametrize("greeting", [b"//0?v=2&n=" + b"00" * 16 + b"&a=0#0\n", b"//9102#0\n"])
async def test_f03_floor_is_kept_without_a_byte_of_ours(
    floor: int, greeting: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        listener = Listener()
        async with (
            running(listener.port, f"log=warn&tls={floor}"),
            await accept(listener) as stream,
        ):
            await stream.write(greeting)
            async with within(5):
                with contextlib.suppress(ConnectionResetError):
                    assert await stream.read_all() == b""
            await until(lambda: caplog.records, 5, "a word about it")
        listener.close()
    assert f"offers tls=0, less than the tls={floor} asked for" in caplog.text


# --- passwords -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("tls", [0, 1])
async def test_both_prove_the_password(
    tls: int, files: Issued, caplog: pytest.LogCaptureFixture
) -> None:
    """NativeServer checks the client's proof, and those of its links with the derived key."""
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with paired(files, "log=debug", tls=tls, password=PASSWORD) as (server, desk, links):
            await server.say("tcp://1?from=10.0.0.1:1")
            await carries(links[1], await desk.at_target(), 1000)
    assert PASSWORD not in caplog.text
    assert "nobody has verified" not in caplog.text, "the proofs are bound to the certificate"


@both
@pytest.mark.parametrize("tls", [0, 1])
@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("refuse://auth", "another password, or somebody in between"),
        (f"welcome://{'ab' * 8}?p={'00' * 32}&idle=2", "could not prove that it has our password"),
        (f"welcome://{'ab' * 8}?k={'00' * 32}&idle=2", "could not prove that it has our password"),
    ],
)
async def test_server_without_our_password(
    tls: int, answer: str, told: str, files: Issued, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "nodepass"):
        async with (
            NativeServer(tls=tls, files=files, password="another") as server,
            running(server.listener.port, "log=error", password=PASSWORD) as desk,
        ):
            async with within(10):
                stream, _, hello = await server.accept()
                assert re.fullmatch(r"hello://me\?v=2&n=[0-9a-f]{32}&p=[0-9a-f]{64}", hello)
                await stream.write(f"{answer}\n".encode())
                await until(lambda: caplog.records, 5, "a word about it")
            assert desk.figures.sessions == 0
    assert "the server and we do not agree" in caplog.text
    assert told in caplog.text
    assert ("fingerprint=SHA256:" in caplog.text) is bool(tls), "to be compared with the server's"


@both
@pytest.mark.parametrize(
    ("password", "greeting", "told"),
    [
        (PASSWORD, b"//0?v=2&n=" + b"00" * 16 + b"&a=0#1\n", "asks for no password"),
        (PASSWORD, b"//9102#1\n", "asks for no password"),
        ("", b"//0?v=2&n=" + b"00" * 16 + b"&a=1#1\n", "wants a password and none is given"),
    ],
)
async def test_password_on_one_side_only(
    password: str, greeting: bytes, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Said before anything is proven, and before a key exchange."""
    with caplog.at_level(logging.ERROR, "nodepass"):
        listener = Listener()
        async with (
            running(listener.port, "log=error", password=password),
            await accept(listener) as stream,
        ):
            await stream.write(greeting)
            async with within(5):
                with contextlib.suppress(ConnectionResetError):
                    assert await stream.read_all() == b""
            await until(lambda: caplog.records, 5, "a word about it")
        listener.close()
    assert told in caplog.text


# --- links that cannot be made -------------------------------------------------------------------


@both
async def test_links_that_fail_are_tried_again_and_harm_no_session(files: Issued) -> None:
    async with (
        NativeServer(tls=1, files=files) as server,
        running(server.listener.port, handshake_timeout=limit(1.0)) as desk,
    ):
        async with within(10):
            await server.welcome()
        greeting = b"//0?v=2&n=" + b"00" * 16 + b"&a=0"
        for said, then in (
            (greeting + b"#0\n", b""),
            (b"//9102#1\n", b""),
            (greeting + b"#1\n", b"no TLS at all\n"),
            (greeting + b"#1\n", b""),
        ):
            async with await accept(server.listener) as stream:
                await stream.write(said)
                if said.startswith(greeting + b"#1"):
                    async with within(5):
                        assert (await stream.read())[:1] == b"\x16"
                    await stream.write(then)
                else:
                    async with within(5):
                        with contextlib.suppress(ConnectionResetError):
                            assert await stream.read() == b"", "no claim where it is not secure"
        links = await take_links(server, 2)
        assert len(links) == 2
        assert desk.figures.sessions == 1
