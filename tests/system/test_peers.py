"""Other TLS programs as the other side: openssl's two, Python's ssl, and peers by hand.

`openssl s_client` and `s_server` speak the protocol with lines that the test types for them;
where a proof is wanted it is computed from the keying material that they print themselves.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from tests.kit.arena import Arena
from tests.kit.authority import Authority, Issued, self_signed
from tests.kit.peer import (
    Listener,
    NativeClient,
    NativeServer,
    SeedClient,
    join,
    mac,
    stretch,
)
from tests.kit.secure import (
    PythonSide,
    TlsFault,
    TlsStream,
    Truncated,
    python_client,
    python_server,
    secure,
)
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import answer_after_eof, body_of, digest_of, echo
from tests.kit.timing import free_port, until, within

SECRET: Final = "correct-horse"

BODY: Final = body_of(41, 3_000_000)

ONE_LINK: Final = {"MIN_POOL_CAPACITY": "1", "SERVICE_COOLDOWN": "200ms"}

EXPORT: Final = ("-keymatexport", "EXPORTER-Channel-Binding", "-keymatexportlen", "32")
"""Have openssl print B of docs/protocol.md."""

TLS_13: Final = ("-tls1_3", "-alpn", "nodepass/2")


def _lacks_openssl() -> str:
    """Say what is missing: LibreSSL goes by the same name and prints no keying material."""
    program = shutil.which("openssl")
    if program is None:
        return "not installed: openssl"
    version = subprocess.run([program, "version"], capture_output=True, text=True, check=False)
    return "" if version.stdout.startswith("OpenSSL ") else f"no OpenSSL: {version.stdout.strip()}"


needs_openssl = pytest.mark.skipif(bool(_lacks_openssl()), reason=_lacks_openssl() or "never")


@pytest.fixture
def files(tmp_path: Path) -> Issued:
    return self_signed(tmp_path, "127.0.0.1")


# --- openssl as a program ---------------------------------------------------------------


class Openssl:
    """A running `openssl s_client` or `s_server`: what it printed, what it is told."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.printed = b""

    async def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        await self._process.stdin.drain()

    async def prints(self, pattern: str) -> re.Match[bytes]:
        """Read on until a pattern has been printed."""
        assert self._process.stdout is not None
        wanted = re.compile(pattern.encode())
        while not (found := wanted.search(self.printed)):
            data = await self._process.stdout.read(65536)
            assert data, f"{pattern!r} not in\n{self.printed.decode(errors='replace')}"
            self.printed += data
        return found

    async def binding(self) -> bytes:
        found = await self.prints(r"Keying material: ([0-9A-F]{64})\r?\n")
        return bytes.fromhex(found[1].decode())


@asynccontextmanager
async def openssl(*words: str) -> AsyncIterator[Openssl]:
    """Run openssl for the length of a block."""
    process = await asyncio.create_subprocess_exec(
        "openssl", *words, stdin=PIPE, stdout=PIPE, stderr=STDOUT
    )
    running = Openssl(process)
    try:
        yield running
    except BaseException:
        print(f"--- openssl {' '.join(words)}\n{running.printed.decode(errors='replace')}")
        raise
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _eat_greeting(tunnel_port: int, greetings: list[bytes], near: Stream) -> None:
    """Stand before a tunnel port for those who want TLS at once."""
    async with await connect(tunnel_port) as far:
        greetings.append((await far.read_line())[:-1])
        await _both_ways(near, far)


async def _put_greeting(ports: list[int], greetings: list[bytes], near: Stream) -> None:
    """Stand before TLS servers, one for each connection, that cannot greet by themselves."""
    greeting = f"//0?v=2&n={os.urandom(16).hex()}&a=0#2".encode()
    await near.write(greeting + b"\n")
    greetings.append(greeting)
    if len(greetings) > len(ports):  # a link more than this test needs
        await near.read()
        return
    async with await connect(ports[len(greetings) - 1]) as far:
        await _both_ways(near, far)


async def _both_ways(near: Stream, far: Stream) -> None:
    try:
        async with asyncio.TaskGroup() as pumps:
            pumps.create_task(_pump(near, far))
            pumps.create_task(_pump(far, near))
    except* OSError:
        pass


async def _pump(source: Stream, sink: Stream) -> None:
    while data := await source.read():
        await sink.write(data)
    sink.finish()


@needs_openssl
async def test_s_client_opens_a_session(tmp_path: Path) -> None:
    """With a password: the proof is made from what openssl's own exporter says."""
    async with Arena(tmp_path) as arena, within(20):
        server = await arena.server(free_port(), tunnel_port := free_port(), "?tls=1",
                                    password=SECRET)  # fmt: skip
        greetings: list[bytes] = []
        door = arena.target(partial(_eat_greeting, tunnel_port, greetings))
        address = ("-connect", f"127.0.0.1:{door.port}")
        async with openssl("s_client", *address, *TLS_13, *EXPORT) as client:
            await client.prints(r"ALPN protocol: nodepass/2")
            binding = await client.binding()
            hello = f"hello://s_client?v=2&n={os.urandom(16).hex()}"
            script = join(greetings[0], binding, hello.encode())
            key = stretch(SECRET)
            await client.say(f"{hello}&p={mac(key, b'nodepass/2 client', script)}")
            found = await client.prints(r"welcome://([0-9a-f]{16})\?p=([0-9a-f]{64})&idle=4")
            assert found[2].decode() == mac(key, b"nodepass/2 server", script, found[1])
            assert b"TLSv1.3" in client.printed
            await server.logged("client connected .*client=s_client")
            await client.say("ping://7")
            await client.prints(r"pong://7")
            await client.say("K")  # a key update, and the server's in answer to it
            await client.prints("KEYUPDATE")
            await client.say("ping://8")
            await client.prints(r"pong://8")


@needs_openssl
async def test_s_client_is_a_seed_data_link(tmp_path: Path, engine: str) -> None:
    """The data port speaks TLS at once; a key update in the middle is taken in stride."""
    async with Arena(tmp_path, engine) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port(), "?tls=1")
        async with SeedClient(tunnel_port) as control:
            address = f"127.0.0.1:{control.data_port}"
            async with openssl("s_client", "-connect", address, "-tls1_3") as link:
                name = (await link.prints(r"---\n(?:.|\n)*?([0-9a-f]{8})$"))[1].decode()
                async with await connect(port) as visitor:
                    await visitor.write(b"to the client")
                    assert await control.signal() == f"//{name}#1"
                    await link.prints("to the client")
                    await link.say("before")
                    assert await visitor.read_exactly(7) == b"before\n"
                    await link.say("K")
                    await link.prints("KEYUPDATE")
                    await link.say("after")
                    assert await visitor.read_exactly(6) == b"after\n"
                    await visitor.write(b"still there")
                    await link.prints("still there")


@needs_openssl
async def test_s_server_serves_our_client(tmp_path: Path, engine: str) -> None:
    """Two of them, control and link, verified in mode 2; the link's proof is checked, too."""
    authority = Authority(tmp_path / "authority")
    files = authority.issue("127.0.0.1")
    session, key = os.urandom(8).hex(), os.urandom(32)
    ports, greetings = [free_port(), free_port()], list[bytes]()
    words = ("s_server", "-cert", files.crt, "-key", files.key, *TLS_13, *EXPORT)
    async with (
        Arena(tmp_path, engine, **ONE_LINK) as arena,
        openssl(*words, "-accept", f"127.0.0.1:{ports[0]}") as control,
        openssl(*words, "-accept", f"127.0.0.1:{ports[1]}") as link,
        within(20),
    ):
        for server in (control, link):
            await server.prints("ACCEPT")
        door = arena.target(partial(_put_greeting, ports, greetings))
        client = arena.dialling(door.port, arena.target(echo).port, f"?ca={authority.ca}")
        await control.prints(r"hello://\S+\?v=2&n=[0-9a-f]{32}\n")
        await control.say(f"welcome://{session}?k={key.hex()}&idle=1")
        await client.logged("tunnel up .*tls=2")
        found = await link.prints(rf"link://{session}\?i=(\d+)&p=([0-9a-f]{{64}})\n")
        proof = mac(key, b"nodepass/2 link", greetings[1], await link.binding(),
                    session.encode(), found[1])  # fmt: skip
        assert found[2].decode() == proof
        await control.say(f"tcp://{found[1].decode()}?from=192.0.2.1:4711")
        await link.say("there and back")
        await link.prints("there and back")


# --- Python's ssl -----------------------------------------------------------------------


async def test_python_ssl_serves_our_client(tmp_path: Path, files: Issued, engine: str) -> None:
    """It sends session tickets like Go's, and ends a direction by close_notify alone."""
    context = python_server(files, alpn="nodepass/2")
    session = os.urandom(8).hex()

    async def accept(listener: Listener) -> tuple[TlsStream, str]:
        stream = await listener.accept()
        await stream.write(f"//0?v=2&n={os.urandom(16).hex()}&a=0#1\n".encode())
        inner = await secure(stream, PythonSide(context, is_server=True))
        return inner, (await inner.read_line()).decode()

    listener = Listener()
    try:
        async with Arena(tmp_path, engine, **ONE_LINK) as arena, within(20):
            target = arena.target(answer_after_eof)
            client = arena.dialling(listener.port, target.port)
            control, hello = await accept(listener)
            async with control:
                assert hello.startswith("hello://")
                await control.write(f"welcome://{session}?k={'5' * 64}&idle=1\n".encode())
                await client.logged("tunnel up .*tls=1")
                link, claim = await accept(listener)
                number = re.search(r"\?i=(\d+)&", claim)
                assert number, claim
                await control.write(f"tcp://{number[1]}?from=192.0.2.1:1\n".encode())
                async with link:
                    await link.write(BODY)
                    link.finish(fin=False)
                    answer = await link.read_all()
                    assert answer.decode() == f"{len(BODY)} {digest_of(BODY)}\n"
    finally:
        listener.close()


async def test_python_ssl_is_a_native_client(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        server = await arena.server(free_port(), tunnel_port := free_port(), "?tls=1")
        async with await connect(tunnel_port) as stream:
            await stream.read_line()
            inner = await secure(stream, PythonSide(python_client(alpn="nodepass/2")))
            await inner.write(f"hello://ssl?v=2&n={os.urandom(16).hex()}\n".encode())
            assert (await inner.read_line()).startswith(b"welcome://")
            await server.logged("client connected .*client=ssl")
            await inner.write(b"ping://1\nbye://enough\n")
            said = await inner.read_all()  # to the close_notify: a clean end
            assert b"pong://1\n" in said
        await server.logged("INFO.*tunnel lost.*bye")


# --- native peers by hand ---------------------------------------------------------------


async def test_link_by_hand_ends_as_go_does(tmp_path: Path, engine: str) -> None:
    """close_notify without FIN is an end, in each direction by itself."""
    async with Arena(tmp_path, engine) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port(), "?tls=1",
                           password=SECRET)  # fmt: skip
        async with NativeClient(tunnel_port, password=SECRET) as client:
            link = await client.link(1)
            assert isinstance(link, TlsStream)
            async with await connect(port) as visitor:
                await visitor.write(b"question")
                visitor.finish()
                assert (await client.signal()).startswith("tcp://1?")
                assert await link.read_all() == b"question", "up to its close_notify"
                await link.write(BODY)
                link.finish(fin=False)
                assert await visitor.digest() == (len(BODY), digest_of(BODY))
            link = await client.link(2)
            assert isinstance(link, TlsStream)
            async with await connect(port) as visitor:
                assert (await client.signal()).startswith("tcp://2?")
                await link.write(b"banner")
                link.finish(fin=False)
                assert await visitor.read_all() == b"banner"
                await visitor.write(BODY[:300_000])
                visitor.finish()
                assert await link.read_all() == BODY[:300_000]


async def test_claim_and_early_bytes_in_one_record(tmp_path: Path, engine: str) -> None:
    """What a link says before its launch belongs to the visitor: first, and whole."""
    async with Arena(tmp_path, engine) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port(), "?tls=1")
        async with NativeClient(tunnel_port) as client:
            link = await client.link(1, more=b"220 ready\r\n")
            await link.write(BODY[:50_000])
            async with await connect(port) as visitor:
                assert (await client.signal()).startswith("tcp://1?")
                assert await visitor.read_exactly(11) == b"220 ready\r\n"
                assert await visitor.read_exactly(50_000) == BODY[:50_000]
                await visitor.write(b"QUIT")
                assert await link.read_exactly(4) == b"QUIT"


Cut = Callable[[TlsStream], Awaitable[None]]


async def _fin_only(link: TlsStream) -> None:
    Stream.finish(link)


async def _garbage(link: TlsStream) -> None:
    await Stream.write(link, b"\x17\x03\x03\x00\x40" + bytes(64))


async def _plain(link: TlsStream) -> None:
    await Stream.write(link, b"GET / HTTP/1.1\r\n\r\n")


async def _close_notify_only(link: TlsStream) -> None:
    link.finish(fin=False)


async def _rst(link: TlsStream) -> None:
    link.reset()


CUTS: Final = {
    "FIN without close_notify": _fin_only,
    "forged record": _garbage,
    "plaintext": _plain,
    "RST": _rst,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
async def test_f20_broken_tls_link_never_looks_like_an_end(
    tmp_path: Path, engine: str, cut: Cut
) -> None:
    """Whoever cuts or forges, the visitor is reset, and everybody else served on."""
    async with Arena(tmp_path, engine) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port(), "?tls=1")
        async with NativeClient(tunnel_port) as client:
            link = await client.link(1)
            assert isinstance(link, TlsStream)
            async with await connect(port) as visitor:
                assert (await client.signal()).startswith("tcp://1?")
                await link.write(BODY[:100_000])
                assert await visitor.read_exactly(100_000) == BODY[:100_000]
                await cut(link)
                async with within(3):
                    assert await visitor.is_reset()
                if cut in (_garbage, _plain):  # and told why, as RFC 8446 asks
                    with pytest.raises((TlsFault, ConnectionResetError, Truncated)):
                        await link.read_all()
            spare = await client.link(2)
            visitor_2 = asyncio.create_task(exchange(port, b"next"))
            assert (await client.signal()).startswith("tcp://2?")
            assert await spare.read_exactly(4) == b"next"
            await spare.write(b"served")
            spare.finish()
            assert await visitor_2 == b"served"


async def test_idle_tls_links_that_end_are_given_to_nobody(tmp_path: Path, engine: str) -> None:
    """By close_notify alone, by FIN, by RST, by nonsense; the one that is left serves."""
    async with Arena(tmp_path, engine) as arena, within(20):
        server = await arena.server(port := free_port(), tunnel_port := free_port(),
                                    "?tls=1&log=debug")  # fmt: skip
        async with NativeClient(tunnel_port) as client:
            cuts = [_close_notify_only, *CUTS.values()]
            spare = await client.link(99)  # the oldest, which would be taken last
            before = server.fds("socket:")
            links = [await client.link(number) for number in range(len(cuts))]
            await until(lambda: server.fds("socket:") >= before + len(cuts), 3, "all links")
            for cut, link in zip(cuts, links, strict=True):
                assert isinstance(link, TlsStream)
                await cut(link)
            visitor = asyncio.create_task(exchange(port, b"hello"))
            assert (await client.signal()).startswith("tcp://99?")
            assert await spare.read_exactly(5) == b"hello"
            await spare.write(b"served")
            spare.finish()
            assert await visitor == b"served"


async def test_server_by_hand_with_password_and_tls(
    tmp_path: Path, files: Issued, engine: str
) -> None:
    async with (
        Arena(tmp_path, engine) as arena,
        NativeServer(tls=1, files=files, password=SECRET) as server,
        within(20),
    ):
        target = arena.target(answer_after_eof)
        client = arena.dialling(server.listener.port, target.port, "?tls=1", password=SECRET)
        await server.welcome(idle=2)
        await client.logged("tunnel up .*dialect=native.*tls=1")
        for _ in range(2):
            number, link = await server.link()
            assert isinstance(link, TlsStream)
            await server.say(f"tcp://{number}?from=192.0.2.1:4711")
            await link.write(BODY[:70_000])
            link.finish(fin=False)
            answer = await link.read_all()
            assert answer.decode() == f"70000 {digest_of(BODY[:70_000])}\n"


async def test_server_that_changes_its_mode_gets_no_link(tmp_path: Path, files: Issued) -> None:
    """Links are dialled with the mode of their session: one that is lowered is dropped."""
    async with (
        Arena(tmp_path, **ONE_LINK) as arena,
        NativeServer(tls=1, files=files) as server,
        within(20),
    ):
        client = arena.dialling(server.listener.port, arena.target(echo).port, "?log=debug")
        await server.welcome(idle=1)
        await client.logged("tunnel up")
        server.tls = 0
        with pytest.raises((AssertionError, ConnectionResetError)):
            await server.link()  # no claim comes, only an end
        await client.logged("cannot make a link.*changed its dialect or its TLS mode")


@pytest.mark.parametrize(
    ("host", "query", "seen"),
    [("localhost", "", "localhost"), ("127.0.0.1", "", None), ("127.0.0.1", "&sni=a.example", "")],
    ids=["name", "address", "sni"],
)
async def test_name_is_sent_unless_it_is_an_address(
    tmp_path: Path, host: str, query: str, seen: str | None
) -> None:
    authority = Authority(tmp_path / "authority")
    files = authority.issue("127.0.0.1", "localhost", "a.example")
    context = python_server(files, alpn="nodepass/2")
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)

    async def greet(stream: Stream) -> None:
        await stream.write(f"//0?v=2&n={os.urandom(16).hex()}&a=0#2\n".encode())
        await secure(stream, PythonSide(context, is_server=True))

    async with Arena(tmp_path, **ONE_LINK) as arena, within(20):
        server = arena.target(greet)
        client = arena.nodepass(
            f"client://{host}:{server.port}/127.0.0.1:1?ca={authority.ca}{query}"
        )
        client.spawn()
        await until(lambda: names, 10, "a ClientHello")
        assert names[0] == (seen if seen != "" else "a.example")
