"""The `openssl` program as the peer: another implementation of the outer loop, and the only one
at hand that can ask for key updates."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from OpenSSL import SSL
from tests.kit.engine_rig import PATIENCE, Rig
from tests.kit.tls_rig import HOST, PlainEnd, authority, leaf, our_end

Engine = Callable[..., Rig]
OPENSSL = shutil.which("openssl")

pytestmark = pytest.mark.skipif(OPENSSL is None, reason="there is no openssl program here")


class Program:
    """A running `openssl`, and what it has said."""

    def __init__(self, folder: Path, *words: str, stdin: object = subprocess.PIPE) -> None:
        self.out = folder / "out"
        assert OPENSSL is not None
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [OPENSSL, *words],
                stdin=stdin,  # type: ignore[call-overload]
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> bytes:
        return self.out.read_bytes()

    def tell(self, words: bytes) -> None:
        """Type something; a line that begins with K, k or Q is a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(words)
        self.process.stdin.flush()

    def stop_telling(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    async def exits(self) -> int:
        async with asyncio.timeout(PATIENCE):
            while self.process.poll() is None:
                await asyncio.sleep(0.01)
        return int(self.process.returncode)


@contextlib.contextmanager
def program(folder: Path, *words: str, stdin: object = subprocess.PIPE) -> Iterator[Program]:
    run = Program(folder, *words, stdin=stdin)
    try:
        yield run
    finally:
        run.process.kill()
        if run.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                run.process.stdin.close()
        run.process.wait()


def files(folder: Path) -> tuple[str, str, str]:
    """Write the certificates; return the paths of authority, chain and key."""
    paths = [folder / name for name in ("ca.pem", "chain.pem", "key.pem")]
    authority().cert_pem.write_to_path(paths[0])
    for index, blob in enumerate(leaf().cert_chain_pems):
        blob.write_to_path(paths[1], append=index > 0)
    leaf().private_key_pem.write_to_path(paths[2])
    return str(paths[0]), str(paths[1]), str(paths[2])


@contextlib.asynccontextmanager
async def s_client(
    rig: Rig, folder: Path, *words: str, stdin: object = subprocess.PIPE
) -> AsyncIterator[tuple[Program, PlainEnd, int]]:
    """Let s_client visit: TLS on side a, a plain target behind."""
    trust, _, _ = files(folder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        options = ("-connect", where, "-servername", HOST, "-CAfile", trust)
        with program(
            folder, "s_client", *options, "-verify_return_error", *words, stdin=stdin
        ) as run:
            async with asyncio.timeout(PATIENCE):
                inner, _ = await rig.loop.sock_accept(listener)
            inner.setblocking(False)
            connection = our_end(True)
            await shake(rig, inner, connection)
            target, b = rig.ends()
            yield run, PlainEnd(rig, target), rig.hand_over(inner, b, tls_a=connection)


@contextlib.asynccontextmanager
async def s_server(
    rig: Rig, folder: Path, *words: str
) -> AsyncIterator[tuple[Program, PlainEnd, int]]:
    """Let s_server be the target: TLS on side b, a plain visitor before it."""
    _, chain, key = files(folder)
    options = ("-accept", "127.0.0.1:0", "-naccept", "1", "-cert_chain", chain)
    with program(folder, "s_server", *options, "-cert", chain, "-key", key, *words) as run:
        await rig.until(lambda: re.search(rb"ACCEPT \S+:\d+", run.said()), "s_server listens")
        found = re.search(rb"ACCEPT \S+:(\d+)", run.said())
        assert found
        inner = socket.create_connection(("127.0.0.1", int(found[1])))
        inner.setblocking(False)
        context = SSL.Context(SSL.TLS_METHOD)
        authority().configure_trust(context)
        context.set_verify(SSL.VERIFY_PEER)
        connection = our_end(False, context)
        await shake(rig, inner, connection)
        visitor, a = rig.ends()
        yield run, PlainEnd(rig, visitor), rig.hand_over(a, inner, tls_b=connection)


async def shake(rig: Rig, sock: socket.socket, connection: SSL.Connection) -> None:
    ended = await rig.ended(rig.engine.handshake(sock.fileno(), connection))
    assert ended.reason == rig.kind.module.REASON_FINISHED


async def test_s_client_talks_and_ends(engine: Engine, tmp_path: Path) -> None:
    """It says close_notify and closes TCP in one breath."""
    async with engine() as rig, s_client(rig, tmp_path) as (run, target, token):
        run.tell(b"hello\n")
        assert await target.hear(6) == b"hello\n"
        await target.say(b"the answer\n")
        await rig.until(lambda: b"the answer\n" in run.said(), "the answer arrives")
        assert b"Verify return code: 0 (ok)" in run.said()
        assert b"TLSv1.3" in run.said()
        run.stop_telling()
        assert await target.hear_all() == b""
        await target.end()
        ended = await rig.ended(token)
        assert ended[1:4] == (6, 11, rig.kind.module.REASON_FINISHED)
        assert await run.exits() == 0


async def test_s_server_talks_and_ends(engine: Engine, tmp_path: Path) -> None:
    async with engine() as rig, s_server(rig, tmp_path) as (run, visitor, token):
        await visitor.say(b"hello\n")
        await rig.until(lambda: b"hello\n" in run.said(), "the words arrive")
        run.tell(b"the answer\n")
        assert await visitor.hear(11) == b"the answer\n"
        await visitor.end()
        assert await visitor.hear_all() == b""
        ended = await rig.ended(token)
        assert ended[1:4] == (6, 11, rig.kind.module.REASON_FINISHED)
        assert await run.exits() == 0


KEY_UPDATE = rb"%b TLS 1\.3, Handshake \[length 0005\], KeyUpdate"


@pytest.mark.parametrize("command", [b"K", b"k"])
async def test_key_update_by_the_client(engine: Engine, tmp_path: Path, command: bytes) -> None:
    """K asks for ours in return, k does not; bytes flow before, between and behind."""
    async with engine() as rig, s_client(rig, tmp_path, "-msg") as (run, target, token):
        await key_updates(rig, run, target, command)
        run.stop_telling()
        assert await target.hear_all() == b""
        await target.end()
        assert (await rig.ended(token)).reason == rig.kind.module.REASON_FINISHED


@pytest.mark.parametrize("command", [b"K", b"k"])
async def test_key_update_by_the_server(engine: Engine, tmp_path: Path, command: bytes) -> None:
    async with engine() as rig, s_server(rig, tmp_path, "-msg") as (run, visitor, token):
        await key_updates(rig, run, visitor, command)
        await visitor.end()
        assert await visitor.hear_all() == b""
        assert (await rig.ended(token)).reason == rig.kind.module.REASON_FINISHED


async def key_updates(rig: Rig, run: Program, other: PlainEnd, command: bytes) -> None:
    for turn in range(1, 6):
        run.tell(b"before %d\n" % turn)
        assert await other.hear(9) == b"before %d\n" % turn
        run.tell(command + b"\n")
        await rig.until(
            lambda turn=turn: len(re.findall(KEY_UPDATE % b">>>", run.said())) == turn,
            "a key update is sent",
        )
        run.tell(b"behind %d\n" % turn)
        assert await other.hear(9) == b"behind %d\n" % turn
        await other.say(b"answer %d\n" % turn)
        await rig.until(lambda turn=turn: b"answer %d\n" % turn in run.said(), "an answer arrives")
    answers = len(re.findall(KEY_UPDATE % b"<<<", run.said()))
    assert answers == (5 if command == b"K" else 0)


async def test_a_file_through_s_client(engine: Engine, tmp_path: Path) -> None:
    blob = os.urandom(4_000_000).hex().encode()  # no letter that s_client takes for a command
    path = tmp_path / "file"
    path.write_bytes(blob)
    with path.open("rb") as source:
        options = ("-quiet", "-no_ign_eof")
        async with (
            engine() as rig,
            s_client(rig, tmp_path, *options, stdin=source) as (
                run,
                target,
                token,
            ),
        ):
            got = await target.hear_all()
            assert hashlib.sha256(got).digest() == hashlib.sha256(blob).digest()
            await target.end()
            ended = await rig.ended(token)
            assert ended[1:4] == (len(blob), 0, rig.kind.module.REASON_FINISHED)
            assert await run.exits() == 0


async def test_s_client_is_killed(engine: Engine, tmp_path: Path) -> None:
    """A FIN and no close_notify: the target must not take it for the end."""
    async with engine() as rig, s_client(rig, tmp_path) as (run, target, token):
        run.tell(b"half a\n")
        assert await target.hear(7) == b"half a\n"
        run.process.kill()
        assert await rig.is_reset(target.sock)
        assert (await rig.ended(token)).side == 1
