"""The password: who has it gets in, who has not gets nothing, and nobody ever reads it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final
from urllib.parse import quote

import pytest
from tests.kit.arena import Arena, Tunnel
from tests.kit.peer import GREETING, NativeClient, NativeServer, SeedClient, SeedServer
from tests.kit.process import PACKAGE, Nodepass
from tests.kit.secure import Truncated
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import BANNER, body_of, echo, speak_first
from tests.kit.timing import free_port, until, within

SECRET: Final = "Xq7-unmistakable_9"

USER_BYTES: Final = b"only for who has the password"

ELSEWHERE: Final = "127.0.0.9"
"""Where strangers come from whose failures are not to slow the client's address."""

SHORT: Final = {"SERVICE_COOLDOWN": "200ms"}


# --- who is let in ----------------------------------------------------------------------


async def test_password_opens_the_tunnel(tmp_path: Path, engine: str, tls: str) -> None:
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo), server=tls, password=SECRET)
        assert await exchange(tunnel.port, USER_BYTES) == USER_BYTES
        await tunnel.server.logged("client connected .*dialect=native")
        assert "whoever reaches the tunnel port can become a client" not in tunnel.server.log


@pytest.mark.parametrize(
    "secret",
    ["p", "ä%ö€ 密码", "a@b/c?d#e&f=g:h", "x" * 1024, "%41"],
    ids=["short", "letters", "signs", "long", "escape"],
)
async def test_password_may_hold_anything(tmp_path: Path, secret: str) -> None:
    """In the URL of one side and the environment of the other; a peer by hand agrees."""
    async with Arena(tmp_path) as arena, within(20):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        await arena.server(port, tunnel_port, password=quote(secret, safe=""))
        await arena.client(tunnel_port, target.port, NODEPASS_PASSWORD=secret)
        assert await exchange(port, USER_BYTES) == USER_BYTES
        async with NativeClient(tunnel_port, password=secret):
            pass


async def test_f01_wrong_password_is_told_on_both_sides(tmp_path: Path, tls: str) -> None:
    """The client keeps trying, and gets in once the server has its password."""
    async with Arena(tmp_path, **SHORT) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        server = await arena.server(port, tunnel_port, tls, password="another")
        client = arena.dialling(tunnel_port, target.port, password=SECRET)
        await client.logged("ERROR.*do not agree.*refused us: auth")
        await server.logged(r"WARN.*client refused.*127\.0\.0\.1.*wrong password")
        assert client.is_running
        assert "tunnel up" not in client.log
        await server.stop()
        assert "client connected" not in server.log
        await arena.server(port, tunnel_port, tls, password=SECRET)
        await client.logged("tunnel up")
        assert await exchange(port, USER_BYTES) == USER_BYTES


@pytest.mark.parametrize(
    ("server", "client", "client_says", "server_says"),
    [
        (SECRET, "", "server wants a password and none is given", "turned away"),
        ("", SECRET, "asks for no password, so it cannot prove", "turned away"),
    ],
    ids=["client has none", "server has none"],
)
async def test_f01_only_one_side_has_a_password(
    tmp_path: Path, tls: str, server: str, client: str, client_says: str, server_says: str
) -> None:
    async with Arena(tmp_path, **SHORT) as arena, within(20):
        tunnel_port = free_port()
        listening = await arena.server(free_port(), tunnel_port, tls, password=server)
        dialling = arena.dialling(tunnel_port, free_port(), password=client)
        await dialling.logged(f"ERROR.*{client_says}")
        await listening.logged(f"WARN.*{server_says}")
        assert dialling.is_running
        assert "client connected" not in listening.log


async def test_f01_stranger_never_becomes_the_client(tmp_path: Path, tls: str) -> None:
    """First on the port, silent, with garbage, without a proof, with a wrong one."""
    async with Arena(tmp_path, HANDSHAKE_TIMEOUT="1500ms") as arena, AsyncExitStack() as stack:
        target, tunnel_port, port = arena.target(speak_first), free_port(), free_port()
        server = await arena.server(port, tunnel_port, tls, password=SECRET)
        async with within(30):
            silent = await stack.enter_async_context(await connect(tunnel_port))
            assert GREETING.fullmatch(greeting := await silent.read_line()), greeting
            assert b"&a=1" in greeting
            assert greeting.startswith(b"//0?"), "seed peers are not invited"
            garbage = await stack.enter_async_context(await connect(tunnel_port))
            await garbage.write(body_of(6, 5000))
            for proof in ("", os.urandom(32).hex()):
                stranger = await stack.enter_async_context(_Opened(tunnel_port, source=ELSEWHERE))
                assert await stranger.hello(proof) == b"refuse://auth\n"
                assert await _until_end(stranger.control) == b""
            guesser = _Opened(tunnel_port, password="guess", source=ELSEWHERE)
            await stack.enter_async_context(guesser)
            assert await guesser.hello() == b"refuse://auth\n"
            await arena.client(tunnel_port, target.port, password=SECRET)
            for _ in range(10):
                assert await exchange(port, USER_BYTES) == BANNER + USER_BYTES
            assert await _until_end(silent) == b""
        await server.logged("client connected")
        assert server.count("client connected") == 1


class _Opened(NativeClient):
    """A client that is not let in."""

    async def __aenter__(self) -> _Opened:
        return self


async def test_f02_stranger_cannot_bring_links(tmp_path: Path, tls: str) -> None:
    """Of a session that lives, with wrong proofs, and in the name of another's session."""
    async with Arena(tmp_path) as arena, within(30):
        server = await arena.server(port := free_port(), tunnel_port := free_port(), tls,
                                    password=SECRET)  # fmt: skip
        async with NativeClient(tunnel_port, "real", password=SECRET) as client:
            thief = _Opened(tunnel_port, "thief")
            async with thief:
                thief.session = client.session
                thief.key = b"0" * 32
                forged = [await thief.link(number) for number in range(1, 4)]
                for link in forged:
                    assert await _until_end(link) == b""
                visitor = asyncio.create_task(exchange(port, USER_BYTES))
                link = await client.link(7)
                assert (await client.signal()).startswith("tcp://7?")
                assert await link.read_exactly(len(USER_BYTES)) == USER_BYTES
                await link.write(b"served")
                link.finish()
                assert await visitor == b"served"
        await server.logged("WARN.*proof was wrong")


async def test_password_shuts_seed_peers_out(tmp_path: Path) -> None:
    async with Arena(tmp_path, HANDSHAKE_TIMEOUT="300ms", **SHORT) as arena, within(20):
        server = await arena.server(free_port(), tunnel_port := free_port(), password=SECRET)
        async with SeedClient(tunnel_port) as seed:
            assert seed.data_port == 0
            assert await seed.control.is_reset() in (True, False), "an end of some kind"
        assert "client connected" not in server.log
        async with SeedServer() as seed_server:
            client = arena.dialling(seed_server.listener.port, free_port(), password=SECRET)
            await seed_server.greet()
            await client.logged("ERROR.*asks for no password, so it cannot prove")
            assert "tunnel up" not in client.log


async def test_server_must_prove_the_password_too(tmp_path: Path) -> None:
    """A server by hand that only claims to know it: no launch of it is done."""
    async with (
        Arena(tmp_path, **SHORT) as arena,
        NativeServer(password=SECRET) as server,
        within(20),
    ):
        target = arena.target(echo)
        client = arena.dialling(server.listener.port, target.port, password=SECRET)
        control, _, hello = await server.accept()
        assert "&p=" in hello
        lie = f"welcome://{server.session}?p={os.urandom(32).hex()}&idle=2"
        await control.write(f"{lie}\ntcp://1?from=192.0.2.1:1\n".encode())
        await client.logged("ERROR.*could not prove that it has our password")
        assert target.accepted == 0
        await server.welcome(idle=1)
        number, link = await server.link()
        await server.say(f"tcp://{number}?from=192.0.2.1:1")
        await link.write(b"hello")
        assert await link.read() == b"hello", "the real one is believed"


async def test_failed_guesses_cost_the_guesser_alone(tmp_path: Path) -> None:
    """Each failure of an address makes its next guess slower; another one is served at once."""
    async with Arena(tmp_path) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        server = await arena.server(port, tunnel_port, password=SECRET)

        async def guess(number: int) -> bytes:
            stranger = _Opened(tunnel_port, password=f"{number % 4}", source=ELSEWHERE)
            async with stranger:
                return await stranger.hello()

        assert await guess(0) == b"refuse://auth\n"
        start = time.monotonic()
        guesses = [asyncio.create_task(guess(number)) for number in range(40)]
        await arena.client(tunnel_port, target.port, password=SECRET)
        assert await exchange(port, USER_BYTES) == USER_BYTES
        answers = await asyncio.gather(*guesses)
        assert time.monotonic() - start > 0.2, "guesses are answered at once"
        assert answers == [b"refuse://auth\n"] * 40
        await server.logged("client refused")
        assert server.count("client refused") == 1, "counted, not repeated"


async def _until_end(stream: Stream) -> bytes:
    heard = bytearray()
    try:
        async with within(5):
            while data := await stream.read():
                heard += data
    except (ConnectionError, Truncated):
        pass
    return bytes(heard)


# --- F23: nobody ever reads it ----------------------------------------------------------


def _words(process: Nodepass) -> bytes:
    return Path(f"/proc/{process.pid}/cmdline").read_bytes()


def _insist_on_silence(*processes: Nodepass) -> None:
    for process in processes:
        assert SECRET not in process.log, process.log
        assert quote(SECRET, safe="") not in process.log
        assert SECRET not in process.printed
        if process.is_running:
            words = _words(process)
            assert SECRET.encode() not in words
            assert b"127.0.0.1" in words, "only the password is overwritten"


async def _troubled_life(arena: Arena, tunnel: Tunnel) -> None:
    """Let happen what makes both sides talk: visitors, strangers, guesses, a lost tunnel."""
    assert await exchange(tunnel.port, USER_BYTES) == USER_BYTES
    async with await connect(tunnel.tunnel_port) as stranger:
        await stranger.write(body_of(6, 3000))
    async with NativeClient(tunnel.tunnel_port, "by-hand", password=SECRET):
        pass
    async with _Opened(tunnel.tunnel_port, password="wrong") as guesser:
        await guesser.hello()
    await until(lambda: tunnel.server.count("report"), 5, "a report")
    await tunnel.server.logged("(turned away|client refused)", count=2)
    await tunnel.server.stop()
    await tunnel.client.logged("tunnel lost")
    await tunnel.client.logged("no tunnel")


@pytest.mark.parametrize("form", ["url", "environment", "file"])
async def test_f23_password_shows_nowhere(tmp_path: Path, tls: str, form: str) -> None:
    """Neither in the logs at debug level nor in the process list, wherever it comes from."""
    query = (tls + "&log=debug") if tls else "?log=debug"
    secret_file = tmp_path / "secret"
    secret_file.write_text(SECRET + "\n")
    given = {
        "url": {},
        "environment": {"NODEPASS_PASSWORD": SECRET},
        "file": {"NODEPASS_PASSWORD_FILE": str(secret_file)},
    }[form]
    env = {"REPORT_INTERVAL": "200ms", **SHORT, **given}
    async with Arena(tmp_path, **env) as arena, within(30):
        tunnel = await arena.tunnel(
            arena.target(echo),
            server=query,
            client="?log=debug",
            password=SECRET if form == "url" else "",
        )
        _insist_on_silence(tunnel.server, tunnel.client)
        if form == "url":
            assert b"//***@127.0.0.1" in _words(tunnel.server)
            assert b"//***@127.0.0.1" in _words(tunnel.client)
        await _troubled_life(arena, tunnel)
        _insist_on_silence(tunnel.server, tunnel.client)
        await tunnel.client.stop()
        _insist_on_silence(tunnel.client)


async def test_f23_password_shows_nowhere_in_json_logs(tmp_path: Path) -> None:
    async with Arena(tmp_path, LOG_FORMAT="json", **SHORT) as arena, within(20):
        server = await arena.server(free_port(), tunnel_port := free_port(), "?log=debug",
                                    password=SECRET)  # fmt: skip
        client = arena.dialling(tunnel_port, free_port(), "?log=debug", password=SECRET + "x")
        await client.logged("auth")
        _insist_on_silence(server, client)
        for line in server.log.splitlines():
            json.loads(line)


async def test_f23_password_shows_in_no_traceback(tmp_path: Path) -> None:
    """Errors at the start: taken ports, wrong values, unreadable files, contradictions."""
    missing = tmp_path / "missing"
    urls = [
        (f"server://{SECRET}@127.0.0.1:{{taken}}/127.0.0.1:{{free}}", 1),
        (f"server://{SECRET}@127.0.0.1:{{free}}/127.0.0.1:{{taken}}?log=debug", 1),
        (f"server://{SECRET}@127.0.0.1:{{free}}/127.0.0.1:1?tls=2&crt={missing}&key=x", 1),
        (f"server://{SECRET}@127.0.0.1:{{free}}/127.0.0.1:1?tls=9", 2),
        (f"server://{SECRET}@127.0.0.1:{{free}}/127.0.0.1:1?compat=1", 2),
        (f"server://{SECRET}@127.0.0.1:{{free}}/127.0.0.1:1?data=99", 2),
        (f"server://{SECRET}@127.0.0.1:{{free}}/127.0.0.1:1?nonsense=1", 2),
        (f"client://{SECRET}@127.0.0.1:{{free}}/127.0.0.1:1?tls=2&ca={missing}", 1),
        (f"client://{SECRET}@127.0.0.1/127.0.0.1:1", 2),
        (f"client://user:{SECRET}@127.0.0.1:99999/127.0.0.1:1", 2),
        (f"ftp://{SECRET}@127.0.0.1:{{free}}/127.0.0.1:1", 2),
        (f"server://{SECRET}%FF@127.0.0.1:{{free}}/127.0.0.1:1", 2),
        (f"server://{SECRET}%zz@127.0.0.1:{{free}}/127.0.0.1:1", 2),
        (f"server://{SECRET * 100}@127.0.0.1:{{free}}/127.0.0.1:1", 2),
    ]
    async with Arena(tmp_path) as arena, within(30):
        taken = arena.target(echo).port
        started = []
        for url, code in urls:
            process = arena.nodepass(url.format(taken=taken, free=free_port()))
            process.spawn()
            started.append((process, code))
        for process, code in started:
            assert await process.ended() == code, process.log
            assert process.log.count("nodepass: error: ") == 1, process.log
            _insist_on_silence(process)


# --- where it comes from ----------------------------------------------------------------


async def test_password_of_the_url_goes_before_the_environment(tmp_path: Path) -> None:
    async with Arena(tmp_path, NODEPASS_PASSWORD="something else") as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo), password=SECRET)
        assert await exchange(tunnel.port, USER_BYTES) == USER_BYTES


@pytest.mark.parametrize(
    ("content", "end"),
    [(b"", "empty"), (b"\xff\xfe", "UTF-8"), (b"x" * 2000, "too long"), (None, "cannot read")],
    ids=["empty", "binary", "long", "missing"],
)
async def test_useless_password_file_is_one_line(
    tmp_path: Path, content: bytes | None, end: str
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    async with Arena(tmp_path, NODEPASS_PASSWORD_FILE=str(path)) as arena, within(20):
        process = arena.nodepass(f"server://127.0.0.1:{free_port()}/127.0.0.1:{free_port()}")
        process.spawn()
        assert await process.ended() == 2
        assert process.log.count("\n") == 1
        assert re.search(f"NODEPASS_PASSWORD_FILE: .*{end}", process.log), process.log


async def test_two_tunnels_of_one_process_have_their_own_passwords(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        target, ports, tunnels = arena.target(echo), [free_port(), free_port()], []
        tunnels = [free_port(), free_port()]
        server = arena.nodepass(
            *(
                f"server://{secret}@127.0.0.1:{tunnel}/127.0.0.1:{port}"
                for secret, tunnel, port in zip(("one", "two"), tunnels, ports, strict=True)
            )
        )
        await server.start()
        await arena.client(tunnels[0], target.port, password="one")
        await arena.client(tunnels[1], target.port, password="two")
        for port in ports:
            assert await exchange(port, USER_BYTES) == USER_BYTES
        async with _Opened(tunnels[0], password="two") as confused:
            assert await confused.hello() == b"refuse://auth\n"


async def test_keygen_gives_lines_that_work(tmp_path: Path) -> None:
    """Both command lines as printed, with the ports of this test put in."""
    printed = subprocess.run(
        [sys.executable, "-m", "nodepass", "keygen", "127.0.0.1"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    secret = tmp_path / "secret"
    secret.write_text(printed.splitlines(keepends=True)[0])
    lines = re.findall(r"^NODEPASS_PASSWORD_FILE=\S+ nodepass '(\S+)'$", printed, re.MULTILINE)
    assert len(lines) == 2, printed
    async with Arena(tmp_path) as arena, within(20):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        for url in lines:
            url = url.replace("10101", str(tunnel_port)).replace("/:8080", f"/127.0.0.1:{port}")  # noqa: PLW2901
            assert url.count("tls=1") == 1
            process = arena.nodepass(
                url.replace(":80?", f":{target.port}?"), NODEPASS_PASSWORD_FILE=str(secret)
            )
            await process.start()
        assert await exchange(port, USER_BYTES) == USER_BYTES
