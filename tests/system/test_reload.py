"""F17: certificate files that are wrong, and files that change while the tunnel runs."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
from tests.kit.arena import Arena
from tests.kit.authority import Authority, Issued, self_signed
from tests.kit.process import Nodepass
from tests.kit.secure import PythonSide, python_client, secure
from tests.kit.stream import connect, exchange
from tests.kit.target import echo
from tests.kit.timing import free_port, until, within

LOOKS: Final = {"RELOAD_INTERVAL": "100ms"}

DAY: Final = timedelta(days=1)


def mode_2(files: Issued) -> str:
    return f"?tls=2&crt={files.crt}&key={files.key}"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


async def shown(tunnel_port: int) -> str:
    """Return the fingerprint of the certificate that a fresh connection is shown."""
    async with await connect(tunnel_port) as stream:
        await stream.read_line()
        inner = await secure(stream, PythonSide(python_client(alpn="nodepass/2")))
        return inner.side.fingerprint()


# --- at the start -----------------------------------------------------------------------


def _garbage(path: str, data: str = "no PEM at all\n") -> str:
    Path(path).write_text(data)
    return path


def _wrong_files(folder: Path) -> dict[str, tuple[Issued, str]]:
    """Return files that no server may show, each with what the error says."""
    authority = Authority(folder / "a")
    good = authority.issue("127.0.0.1")
    other = authority.issue("127.0.0.1", label="other")
    broken = authority.issue("127.0.0.1", label="broken")
    text = Path(broken.crt).read_text()
    return {
        "no crt": (Issued(str(folder / "none.crt"), good.key), "crt: .*cannot read.*no such file"),
        "no key": (Issued(good.crt, str(folder / "none.key")), "key: .*cannot read.*no such file"),
        "a folder": (Issued(str(folder), good.key), "crt: .*not a regular file"),
        "garbage": (Issued(_garbage(str(folder / "g")), good.key), "crt: .*no PEM"),
        "cut off": (Issued(_garbage(broken.crt, text[:300]), broken.key), "crt: .*cut off"),
        "swapped": (Issued(good.key, good.crt), "crt: .*a key and no certificate"),
        "mismatch": (Issued(good.crt, other.key), "key: .*does not belong"),
        "expired": (authority.issue_expired("127.0.0.1"), "crt: .*expired 20"),
        "early": (authority.issue_early("127.0.0.1"), "crt: .*valid from 20"),
    }


async def test_f17_wrong_files_are_one_line_and_exit_code_1(tmp_path: Path) -> None:
    """Never a start in a weaker mode."""
    async with Arena(tmp_path) as arena, within(30):
        started: list[tuple[str, Nodepass, int, str]] = []
        for name, (files, why) in _wrong_files(tmp_path).items():
            port = free_port()
            server = arena.nodepass(
                f"server://127.0.0.1:{port}/127.0.0.1:{free_port()}{mode_2(files)}"
            )
            server.spawn()
            started.append((name, server, port, why))
        for name, server, port, why in started:
            assert await server.ended() == 1, f"{name}: {server.log}"
            assert server.count(f"nodepass: error: {why}") == 1, f"{name}: {server.log}"
            assert "listening" not in server.log
            with pytest.raises(ConnectionRefusedError):
                await connect(port)


async def test_f17_wrong_ca_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        for ca, why in (("none.pem", "cannot read"), (_garbage(str(tmp_path / "g")), "no PEM")):
            client = arena.dialling(free_port(), free_port(), f"?ca={tmp_path / ca}")
            assert await client.ended() == 1
            assert client.count(f"nodepass: error: ca: .*{why}") == 1, client.log


async def test_certificate_near_its_end_is_complained_about(
    tmp_path: Path, authority: Authority
) -> None:
    files = authority.issue("127.0.0.1", start=-80 * DAY, end=10 * DAY)
    async with Arena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(
            arena.target(echo), server=mode_2(files), client=f"?ca={authority.ca}"
        )
        await tunnel.server.logged("WARN.*about to expire.*expires=")
        assert tunnel.server.count("about to expire") == 1
        assert await exchange(tunnel.port, b"hello") == b"hello"


# --- good files -------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["SIGHUP", "RELOAD_INTERVAL"])
async def test_f17_new_links_show_the_new_certificate(
    tmp_path: Path, authority: Authority, engine: str, by: str
) -> None:
    """Open relays, idle links and the control channel go on as if nothing had happened."""
    files = authority.issue("127.0.0.1")
    env = LOOKS if by == "RELOAD_INTERVAL" else {}
    async with Arena(tmp_path, engine, **env) as arena, within(30):
        tunnel = await arena.tunnel(
            arena.target(echo), server=mode_2(files), client=f"?ca={authority.ca}"
        )
        old = await shown(tunnel.tunnel_port)
        async with await connect(tunnel.port) as visitor:
            await visitor.write(b"before")
            assert await visitor.read_exactly(6) == b"before"
            authority.issue("127.0.0.1")
            if by == "SIGHUP":
                tunnel.server.send(signal.SIGHUP)
            await tunnel.server.logged("INFO.*certificate reloaded.*expires=")
            new = await shown(tunnel.tunnel_port)
            assert new != old
            await tunnel.server.logged(f"fingerprint={new}")
            await visitor.write(b"after")
            assert await visitor.read_exactly(5) == b"after", "the open relay goes on"
        for _ in range(10):  # links of before and after
            assert await exchange(tunnel.port, b"hello") == b"hello"
        assert "tunnel lost" not in tunnel.server.log + tunnel.client.log


async def test_f17_client_gets_in_once_the_certificate_is_right(
    tmp_path: Path, authority: Authority
) -> None:
    files = authority.issue("other.example")
    async with Arena(tmp_path, SERVICE_COOLDOWN="200ms", **LOOKS) as arena, within(30):
        target, tunnel_port, port = arena.target(echo), free_port(), free_port()
        await arena.server(port, tunnel_port, mode_2(files))
        client = arena.dialling(tunnel_port, target.port, f"?ca={authority.ca}")
        await client.logged("ERROR.*not for 127")
        authority.issue("127.0.0.1")
        await client.logged("tunnel up")
        assert await exchange(port, b"hello") == b"hello"


async def test_f17_client_reads_its_ca_again(tmp_path: Path) -> None:
    """The authority changes on both machines; whoever comes first, the relay goes on."""
    first, second = Authority(tmp_path / "first"), Authority(tmp_path / "second")
    files = first.issue("127.0.0.1")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(Path(first.ca).read_bytes())
    async with Arena(tmp_path, SERVICE_COOLDOWN="200ms") as arena, within(30):
        tunnel = await arena.tunnel(arena.target(echo), server=mode_2(files), client=f"?ca={ca}")
        async with await connect(tunnel.port) as visitor:
            fresh = second.issue("127.0.0.1")
            Path(files.crt).write_bytes(Path(fresh.crt).read_bytes())
            Path(files.key).write_bytes(Path(fresh.key).read_bytes())
            tunnel.server.send(signal.SIGHUP)
            await tunnel.server.logged("certificate reloaded")
            ca.write_bytes(Path(second.ca).read_bytes())
            tunnel.client.send(signal.SIGHUP)
            await tunnel.client.logged("INFO.*ca reloaded")
            for _ in range(10):
                assert await exchange(tunnel.port, b"hello") == b"hello"
            await visitor.write(b"after")
            assert await visitor.read_exactly(5) == b"after"


# --- bad files --------------------------------------------------------------------------


def _remove(files: Issued, _: Authority) -> None:
    Path(files.crt).unlink()


def _cut_off(files: Issued, _: Authority) -> None:
    text = Path(files.crt).read_text()
    Path(files.crt).write_text(text[: len(text) // 2])


def _mismatch(files: Issued, authority: Authority) -> None:
    other = authority.issue("127.0.0.1", label="other")
    Path(files.key).write_bytes(Path(other.key).read_bytes())


def _expire(files: Issued, authority: Authority) -> None:
    old = authority.issue_expired("127.0.0.1")
    Path(files.crt).write_bytes(Path(old.crt).read_bytes())
    Path(files.key).write_bytes(Path(old.key).read_bytes())


Spoil = Callable[[Issued, Authority], None]

SPOILS: Final = {
    "removed": (_remove, "crt: .*cannot read"),
    "cut off": (_cut_off, "crt: .*cut off"),
    "mismatch": (_mismatch, "key: .*does not belong"),
    "expired": (_expire, "crt: .*expired"),
}


async def test_f17_bad_files_keep_the_old_certificate(
    tmp_path: Path, authority: Authority
) -> None:
    """Asked by SIGHUP, each is answered by a line; links are made as before."""
    files = authority.issue("127.0.0.1")
    async with Arena(tmp_path) as arena, within(30):
        tunnel = await arena.tunnel(
            arena.target(echo), server=mode_2(files), client=f"?ca={authority.ca}"
        )
        old = await shown(tunnel.tunnel_port)
        kept = Path(files.crt).read_bytes(), Path(files.key).read_bytes()
        for spoil, why in SPOILS.values():
            spoil(files, authority)
            tunnel.server.send(signal.SIGHUP)
            await tunnel.server.logged(f"ERROR.*certificate not reloaded.*old one stays.*{why}")
            assert await shown(tunnel.tunnel_port) == old
            Path(files.crt).write_bytes(kept[0])
            Path(files.key).write_bytes(kept[1])
        for _ in range(10):
            assert await exchange(tunnel.port, b"hello") == b"hello"
        authority.issue("127.0.0.1")
        tunnel.server.send(signal.SIGHUP)
        await tunnel.server.logged("certificate reloaded")
        assert await shown(tunnel.tunnel_port) != old
        assert "tunnel lost" not in tunnel.server.log + tunnel.client.log


async def test_f17_bad_files_found_by_a_look_are_told_once(
    tmp_path: Path, authority: Authority
) -> None:
    """A renewal caught half way: told once however often it is looked at, then taken over."""
    files = authority.issue("127.0.0.1")
    async with Arena(tmp_path, **LOOKS) as arena, within(30):
        tunnel = await arena.tunnel(
            arena.target(echo), server=mode_2(files), client=f"?ca={authority.ca}"
        )
        old = await shown(tunnel.tunnel_port)
        fresh = authority.issue("127.0.0.1", label="fresh")
        # In one step: a look at a file that is being written finds another fault, once.
        Path(fresh.crt).replace(files.crt)
        await tunnel.server.logged("ERROR.*certificate not reloaded.*key: .*does not belong")
        assert await shown(tunnel.tunnel_port) == old
        before = tunnel.server.cpu()
        await asyncio.sleep(0.5)  # five more looks
        assert tunnel.server.count("not reloaded") == 1, "repeated faults are counted"
        assert tunnel.server.cpu() - before < 0.5
        Path(files.key).write_bytes(Path(fresh.key).read_bytes())
        await tunnel.server.logged("certificate reloaded")
        assert await shown(tunnel.tunnel_port) != old
        assert await exchange(tunnel.port, b"hello") == b"hello"


async def test_f17_bad_ca_keeps_the_old_one(tmp_path: Path, authority: Authority) -> None:
    files = authority.issue("127.0.0.1")
    async with Arena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(
            arena.target(echo), server=mode_2(files), client=f"?ca={authority.ca}"
        )
        Path(authority.ca).write_text("half a")
        tunnel.client.send(signal.SIGHUP)
        await tunnel.client.logged("ERROR.*ca not reloaded.*old one stays.*ca: ")
        for _ in range(10):  # more than there were idle links: fresh ones are verified still
            assert await exchange(tunnel.port, b"hello") == b"hello"


async def test_hangup_without_files_says_so(tmp_path: Path) -> None:
    async with Arena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(echo), server="?tls=1")
        for process in (tunnel.server, tunnel.client):
            process.send(signal.SIGHUP)
            await process.logged("INFO.*nothing to reload")
        assert await exchange(tunnel.port, b"hello") == b"hello"
        assert "tunnel lost" not in tunnel.server.log + tunnel.client.log


async def test_key_that_everybody_can_read_is_complained_about(tmp_path: Path) -> None:
    files = self_signed(tmp_path, "127.0.0.1")
    Path(files.key).chmod(0o644)
    async with Arena(tmp_path) as arena, within(20):
        server = await arena.server(free_port(), free_port(), mode_2(files))
        await until(lambda: server.count("WARN.*can read the key"), 2, "a warning")
