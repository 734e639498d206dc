"""F3: a middle man on loopback who swaps, lowers and replays what he can.

In every case not one byte of a visitor gets to him, or out at the target, and both logs say
that something is wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Unpack

import pytest
from tests.kit.arena import Arena
from tests.kit.authority import Authority, self_signed
from tests.kit.middle import (
    MiddleMan,
    Rewrite,
    Talk,
    Tricks,
    drop_password,
    look_like_seed,
    lower_tls,
)
from tests.kit.peer import Listener
from tests.kit.process import Nodepass
from tests.kit.stream import Stream, connect, exchange
from tests.kit.target import Target, echo
from tests.kit.timing import free_port, until, within

VISITOR: Final = b"what only the target may read"

SECRET: Final = "correct-horse"

SHORT: Final = {"DIAL_TIMEOUT": "700ms", "SERVICE_COOLDOWN": "200ms"}
"""A visitor's patience, and the client's longest pause between two tries."""


@dataclass
class Scene:
    """A server, a client, a middle man between them, and a visitor that has come."""

    server: Nodepass
    client: Nodepass
    man: MiddleMan
    target: Target

    async def nothing_got_out(self) -> None:
        """Insist on it while the client keeps trying."""
        tries = len(self.man.talks)
        await until(lambda: len(self.man.talks) >= tries + 2, 10, "two more tries")
        assert self.target.accepted == 0, "the client dialled its target for somebody"
        assert VISITOR not in self.man.heard, "the middle man could read the visitor"
        assert "tunnel up" not in self.client.log
        assert "client connected" not in self.server.log
        assert self.client.is_running


@asynccontextmanager
async def _between(
    folder: Path,
    *,
    server: str,
    client: str = "",
    password: str = "",
    **tricks: Unpack[Tricks],
) -> AsyncIterator[Scene]:
    """Set a middle man before a server, let a visitor and a client come.

    Whatever the middle man achieves, in the end the visitor is to be turned away unheard.
    """
    async with Arena(folder, **SHORT) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        listening = await arena.server(port, tunnel_port, server, password=password)
        man = arena.middle_man(tunnel_port, **tricks)
        dialling = arena.dialling(man.port, target.port, client, password=password)
        async with await connect(port) as visitor:
            await visitor.write(VISITOR)
            yield Scene(listening, dialling, man, target)
            assert await visitor.is_reset(), "nobody was there to serve it"


# --- (a) another certificate in mode 1 --------------------------------------------------


async def test_f03_swapped_certificate_is_of_no_use(tmp_path: Path) -> None:
    """Nobody verifies it in mode 1, but the password's proof is bound to the connection."""
    files = self_signed(tmp_path, "nodepass")
    async with _between(tmp_path, server="?tls=1", password=SECRET, files=files) as scene:
        await scene.client.logged("ERROR.*do not agree.*refused us: auth")
        await scene.server.logged("WARN.*client refused.*wrong password")
        await scene.nothing_got_out()
        assert b"hello://" in scene.man.heard, "he did read what was said inside TLS"
        assert SECRET.encode() not in scene.man.heard
        assert b"refuse://auth" in scene.man.heard


async def test_f03_swapped_certificate_beside_the_right_path(tmp_path: Path) -> None:
    """The same while another client is served past him: still he gets none of its visitors."""
    files = self_signed(tmp_path, "nodepass")
    async with Arena(tmp_path, **SHORT) as arena, within(30):
        tunnel = await arena.tunnel(arena.target(echo), server="?tls=1", password=SECRET)
        man = arena.middle_man(tunnel.tunnel_port, files=files)
        other = arena.target(echo)
        victim = arena.dialling(man.port, other.port, "?name=victim", password=SECRET)
        for _ in range(20):
            assert await exchange(tunnel.port, VISITOR) == VISITOR
        await victim.logged("ERROR.*refused us: auth")
        assert VISITOR not in man.heard
        assert other.accepted == 0


# --- (b) a lowered greeting -------------------------------------------------------------


async def test_f03_lowered_tls_meets_the_floor(tmp_path: Path) -> None:
    async with _between(
        tmp_path,
        server="?tls=1",
        client="?tls=1",
        rewrite=lower_tls,
        files=self_signed(tmp_path, "nodepass"),
    ) as scene:
        await scene.client.logged(r"(WARN|ERROR).*tls=0.*less than.*tls=1.*in between")
        await scene.server.logged("WARN.*turned away")
        await scene.nothing_got_out()
        assert not any(talk.up for talk in scene.man.talks), "the client said something"


async def test_f03_lowered_tls_without_a_floor_breaks_the_proof(tmp_path: Path) -> None:
    async with _between(
        tmp_path,
        server="?tls=1",
        password=SECRET,
        rewrite=lower_tls,
        files=self_signed(tmp_path, "nodepass"),
    ) as scene:
        await scene.client.logged("ERROR.*refused us: auth")
        await scene.server.logged("WARN.*client refused.*wrong password")
        await scene.nothing_got_out()
        assert b"hello://" in scene.man.heard, "he has made the client talk without TLS"


async def test_f03_lowered_mode_2_meets_the_floor(tmp_path: Path) -> None:
    """ca= alone asks for mode 2; a middle man may not make it an unverified mode 1."""
    authority = Authority(tmp_path / "good")
    real = authority.issue("127.0.0.1")
    async with _between(
        tmp_path,
        server=f"?tls=2&crt={real.crt}&key={real.key}",
        client=f"?ca={authority.ca}",
        rewrite=lambda greeting: greeting.replace(b"#2", b"#1"),
        files=self_signed(tmp_path, "127.0.0.1"),
    ) as scene:
        await scene.client.logged(r"(WARN|ERROR).*tls=1.*less than.*tls=2.*in between")
        await scene.server.logged("WARN.*turned away")
        await scene.nothing_got_out()


@pytest.mark.parametrize(
    ("rewrite", "why"),
    [(drop_password, "asks for no password"), (look_like_seed, "asks for no password")],
    ids=["no password wanted", "seed dialect"],
)
async def test_f03_server_that_need_not_prove_itself_is_refused(
    tmp_path: Path, rewrite: Rewrite, why: str
) -> None:
    async with _between(tmp_path, server="", password=SECRET, rewrite=rewrite) as scene:
        await scene.client.logged(f"ERROR.*{why}.*cannot prove")
        await scene.server.logged("WARN.*turned away")
        await scene.nothing_got_out()


# --- (c) a replay -----------------------------------------------------------------------


def _openings(man: MiddleMan, word: bytes) -> list[Talk]:
    return [talk for talk in man.talks if talk.up.startswith(word)]


async def _until_end(stream: Stream) -> bytes:
    heard = bytearray()
    try:
        while data := await stream.read():
            heard += data
    except ConnectionResetError:
        pass
    return bytes(heard)


@pytest.mark.parametrize("tls", [0, 1])
async def test_f03_replayed_session_opens_nothing(tmp_path: Path, tls: int) -> None:
    """All that a client has said is said again, word for word, while its session lives."""
    async with Arena(tmp_path, **SHORT) as arena, AsyncExitStack() as stack, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        server = await arena.server(port, tunnel_port, f"?tls={tls}", password=SECRET)
        man = arena.middle_man(tunnel_port)
        client = await arena.client(man.port, target.port, "?name=real", password=SECRET)
        assert await exchange(port, VISITOR) == VISITOR
        await until(lambda: sum(bool(talk.up) for talk in man.talks) >= 6, 5, "control and links")
        if not tls:
            assert _openings(man, b"hello://real")
            assert len(_openings(man, b"link://")) >= 5
        replayed = []
        for talk in list(man.talks):
            stranger = await stack.enter_async_context(await connect(tunnel_port))
            replayed.append(stranger)
            assert await stranger.read_line() != talk.greeting, "a fresh greeting each time"
            await stranger.write(bytes(talk.up))
            with suppress(OSError):  # it may have been thrown out by now
                stranger.finish()
        for _ in range(20):
            assert await exchange(port, VISITOR) == VISITOR
        for stranger in replayed:
            async with within(10):
                answer = await _until_end(stranger)
            if tls:  # at most the server's part of a handshake that cannot go on
                assert VISITOR not in answer
                assert answer == b"" or answer[0] in (0x16, 0x15), answer
            else:
                assert answer in (b"", b"refuse://auth\n"), answer
        await server.logged("WARN.*(turned away|client refused|proof was wrong)")
        assert server.count("client connected") == 1
        assert "tunnel lost" not in server.log + client.log


async def test_f03_replayed_server_is_not_believed(tmp_path: Path) -> None:
    """The other way round: a client is told, word for word, what the real server once said."""
    async with Arena(tmp_path, **SHORT) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        server = await arena.server(port, tunnel_port, password=SECRET)
        man = arena.middle_man(tunnel_port)
        client = await arena.client(man.port, target.port, password=SECRET)
        assert await exchange(port, VISITOR) == VISITOR
        await client.stop()
        await server.stop()
        before = target.accepted
        (hello,) = _openings(man, b"hello://")
        assert b"tcp://" in hello.down, "the launch is part of the record"
        listener = Listener()
        try:
            victim = arena.dialling(listener.port, target.port, password=SECRET)
            async with await listener.accept() as fake:
                await fake.write(hello.greeting)
                assert (await fake.read_line()).startswith(b"hello://")
                await fake.write(bytes(hello.down))
                assert await _until_end(fake) == b""
            await victim.logged("ERROR.*could not prove that it has our password")
        finally:
            listener.close()
        assert target.accepted == before
        assert "tunnel up" not in victim.log


# --- (d) another certificate in mode 2 --------------------------------------------------


WRONG: Final = ("self-signed", "another authority", "another name", "expired")


@pytest.mark.parametrize("wrong", WRONG)
async def test_f03_certificate_of_a_middle_man_is_refused(tmp_path: Path, wrong: str) -> None:
    good, evil = Authority(tmp_path / "good"), Authority(tmp_path / "evil")
    real = good.issue("127.0.0.1")
    shown, why, alert = {
        "self-signed": (self_signed(tmp_path, "127.0.0.1"), "self-signed", "unknown ca"),
        "another authority": (evil.issue("127.0.0.1"), "authority", "unknown ca"),
        "another name": (
            good.issue("evil.example", "192.0.2.1", label="other"),
            "is for evil.example, 192.0.2.1, not for 127.0.0.1",
            "certificate",
        ),
        "expired": (good.issue_expired("127.0.0.1"), "expired 20", "certificate expired"),
    }[wrong]
    async with _between(
        tmp_path,
        server=f"?tls=2&crt={real.crt}&key={real.key}",
        client=f"?tls=2&ca={good.ca}",
        files=shown,
    ) as scene:
        await scene.client.logged(f"ERROR.*no secure tunnel.*{why}")
        await scene.server.logged("WARN.*turned away")
        await scene.nothing_got_out()
        assert not any(talk.up for talk in scene.man.talks), "a word before the verdict"
        assert any(alert in fault.replace("_", " ").lower() for fault in scene.man.faults)


async def test_f03_middle_man_learns_nothing_from_untouched_tls(tmp_path: Path) -> None:
    """The counter-check: letting everything pass, he carries the tunnel and reads nothing."""
    async with Arena(tmp_path) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        await arena.server(port, tunnel_port, "?tls=1", password=SECRET)
        man = arena.middle_man(tunnel_port)
        await arena.client(man.port, target.port, "?name=named", password=SECRET)
        answers = await asyncio.gather(*(exchange(port, VISITOR * 1000) for _ in range(5)))
        assert answers == [VISITOR * 1000] * 5
        assert len(man.heard) > 2 * 5 * 1000 * len(VISITOR), "all of it went by him"
        for word in (VISITOR, b"hello://", b"link://", b"tcp://", b"named"):
            assert word not in man.heard, word


async def test_f03_middle_man_could_read_it_without_a_password(tmp_path: Path) -> None:
    """The rig is sharp: what a password prevents, he does where there is none."""
    async with Arena(tmp_path) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        await arena.server(port, tunnel_port, "?tls=1")
        man = arena.middle_man(tunnel_port, files=self_signed(tmp_path, "nodepass"))
        client = await arena.client(man.port, target.port)
        assert b"?k=" in man.heard, "the key that all links prove themselves with"
        await client.logged("WARN.*without a password: nobody has verified")
