"""Real programs through the tunnel: curl, nginx, wrk, ssh, rsync, PostgreSQL, nc.

Each test needs programs that a machine may not have; what is missing is named in the skip.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from tests.kit.arena import Arena
from tests.kit.target import answer_after_eof, body_of, digest_of
from tests.kit.timing import free_port, limit, until, within

if TYPE_CHECKING:
    from collections.abc import Iterator

BIG: Final = 256 * 1024 * 1024
"""Bytes of the file that curl fetches."""

USER: Final = os.environ.get("USER") or os.environ.get("LOGNAME") or "root"


def _needs(*names: str) -> list[str]:
    """Find programs, also where only administrators look; skip the test when one is missing."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"))
    found = [shutil.which(name, path=path) for name in names]
    missing = [name for name, place in zip(names, found, strict=True) if place is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return [place for place in found if place is not None]


async def _run(
    *command: str | Path, seconds: float = 30, stdin: bytes = b"", code: int = 0
) -> bytes:
    """Run a program to its end; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with within(seconds):
            out, err = await process.communicate(stdin)
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == code, f"{command}: {process.returncode}\n{err.decode()}"
    return out


@contextlib.contextmanager
def _daemon(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Keep a program running for the length of a block."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(limit(5))
            except subprocess.TimeoutExpired:
                process.kill()


async def _answers(port: int, name: str) -> None:
    """Wait until a daemon accepts connections."""

    def is_up() -> bool:
        with contextlib.closing(socket.socket()) as probe:
            return bool(probe.connect_ex(("127.0.0.1", port)) == 0)

    await until(is_up, 10, name)


# --- the web ----------------------------------------------------------------------------


@contextlib.contextmanager
def _nginx(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    (program,) = _needs("nginx")
    root = folder / "www"
    root.mkdir()
    (root / "small").write_bytes(b"ok\n")
    config = folder / "nginx.conf"
    config.write_text(f"""
        daemon off; master_process off; worker_processes 1;
        error_log {folder}/error.log; pid {folder}/nginx.pid;
        events {{ worker_connections 2000; }}
        http {{
            access_log off; sendfile on; keepalive_requests 1000000;
            client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
            fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
            server {{ listen 127.0.0.1:{port} backlog=2000; root {root}; }}
        }}
    """)
    with _daemon(program, "-c", config, "-e", folder / "start.log", "-p", folder) as process:
        yield process


async def test_curl_fetches_a_big_file(tmp_path: Path, engine: str) -> None:
    (curl,) = _needs("curl")
    port = free_port()
    with _nginx(tmp_path, port):
        sha = hashlib.sha256()
        with (tmp_path / "www" / "big").open("wb") as file:
            block = body_of(10, 16 * 1024 * 1024)
            for number in range(BIG // len(block)):
                sized = b"%08d" % number + block[8:]
                file.write(sized)
                sha.update(sized)
        await _answers(port, "nginx")
        async with Arena(tmp_path, engine) as arena, within(45):
            tunnel = await arena.tunnel(port)
            copy = tmp_path / "copy"
            await _run(curl, "-sSf", "-o", copy, f"http://127.0.0.1:{tunnel.port}/big")
            with copy.open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == sha.hexdigest()
    (tmp_path / "www" / "big").unlink()
    copy.unlink()


@pytest.mark.parametrize("header", ["keep-alive", "close"])
async def test_wrk_sees_no_error(tmp_path: Path, engine: str, header: str) -> None:
    (wrk,) = _needs("wrk")
    port = free_port()
    with _nginx(tmp_path, port):
        await _answers(port, "nginx")
        async with Arena(tmp_path, engine) as arena, within(30):
            tunnel = await arena.tunnel(port)
            load = (wrk, "-t1", "-c64", "-d2s", "--timeout", f"{limit(5):.0f}s")
            head = ("-H", f"Connection: {header}")
            url = f"http://127.0.0.1:{tunnel.port}/small"
            report = (await _run(*load, *head, url)).decode()
            print(report)
            assert "Socket errors" not in report, report
            assert "Non-2xx" not in report, report
            found = re.search(r"(\d+) requests in", report)
            assert found is not None, report
            assert int(found[1]) > 100, report
            assert "tunnel lost" not in tunnel.server.log + tunnel.client.log


# --- ssh and rsync ----------------------------------------------------------------------


@contextlib.contextmanager
def _sshd(folder: Path, port: int) -> Iterator[tuple[str | Path, ...]]:
    """Run an sshd of our own with keys of our own; yield the options that ssh needs."""
    sshd, keygen, _ = _needs("sshd", "ssh-keygen", "ssh")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists on it
    for name in ("host", "user"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    config = folder / "sshd.conf"
    config.write_text(f"""
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/authorized
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
""")
    with _daemon(sshd, "-D", "-f", config, "-E", folder / "sshd.log"):
        yield (
            "-i", folder / "user", "-F", "none", "-o", "BatchMode=yes",
            "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={folder}/known",
            "-o", "LogLevel=ERROR",
        )  # fmt: skip


async def test_ssh_works(tmp_path: Path, engine: str) -> None:
    (ssh,) = _needs("ssh")
    port = free_port()
    body = body_of(11, 20_000_000)
    with _sshd(tmp_path, port) as options:
        await _answers(port, "sshd")
        async with Arena(tmp_path, engine) as arena, within(40):
            tunnel = await arena.tunnel(port)
            command = (ssh, *options, "-p", str(tunnel.port), f"{USER}@127.0.0.1")
            assert await _run(*command, "echo hello") == b"hello\n"
            heard = await _run(*command, "sha256sum", stdin=body)
            assert heard.split()[0].decode() == digest_of(body)
            await _run(*command, "exit 3", code=3)


async def test_rsync_works(tmp_path: Path) -> None:
    (rsync,) = _needs("rsync")
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "deep" / "er").mkdir(parents=True)
    for number in range(200):
        (source / "deep" / f"{number}").write_bytes(body_of(number, number * 37))
    (source / "deep" / "er" / "large").write_bytes(body_of(12, 30_000_000))
    port = free_port()
    with _sshd(tmp_path, port) as options:
        await _answers(port, "sshd")
        async with Arena(tmp_path) as arena, within(40):
            tunnel = await arena.tunnel(port)
            shell = " ".join(("ssh", *map(str, options), "-p", str(tunnel.port)))
            await _run(rsync, "-a", "-e", shell, f"{source}/", f"{USER}@127.0.0.1:{copy}/")
    assert _tree(copy) == _tree(source)
    shutil.rmtree(copy)
    shutil.rmtree(source)


def _tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): digest_of(path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- a database -------------------------------------------------------------------------


@contextlib.contextmanager
def _postgres(port: int) -> Iterator[None]:
    """Run a database of our own; as root it belongs to the user postgres, as it insists."""
    homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)  # Debian's place
    home = homes[0] if homes else None
    initdb, postgres = (
        (home / "initdb", home / "postgres") if home else _needs("initdb", "postgres")
    )
    prefix: list[str] = []
    with tempfile.TemporaryDirectory(prefix="np-pg-", dir="/tmp") as name:
        if os.geteuid() == 0:
            (runuser,) = _needs("runuser")
            prefix = [runuser, "-u", "postgres", "--"]
            try:
                shutil.chown(name, "postgres")
            except LookupError:
                pytest.skip("no user postgres on this machine")
        made = subprocess.run(
            [*prefix, initdb, "-D", f"{name}/data", "-A", "trust", "-U", "visitor", "--no-sync"],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
        if made.returncode:
            pytest.skip(f"initdb does not work here: {made.stderr.strip()[-200:]}")
        folders = ("-D", f"{name}/data", "-k", name)
        network = ("-h", "127.0.0.1", "-p", str(port))
        with _daemon(*prefix, postgres, *folders, *network, "-c", "fsync=off"):
            yield


async def test_psql_works(tmp_path: Path) -> None:
    (psql,) = _needs("psql")
    port = free_port()
    with _postgres(port):
        await _answers(port, "postgres")
        async with Arena(tmp_path) as arena, within(40):
            tunnel = await arena.tunnel(port)
            command = (psql, "-X", "-At", "-h", "127.0.0.1", "-p", str(tunnel.port),
                       "-U", "visitor", "-d", "postgres", "-v", "ON_ERROR_STOP=1")  # fmt: skip
            assert await _run(*command, "-c", "select 6 * 7") == b"42\n"
            rows = "".join(f"{n}\t{n * n}\n" for n in range(100_000)).encode()
            script = (
                b"create table t (a bigint, b bigint);\ncopy t from stdin;\n" + rows + b"\\.\n"
            )
            await _run(*command, "-q", stdin=script)
            assert await _run(*command, "-c", "copy t to stdout") == rows
            sums = await _run(*command, "-c", "select count(*), sum(b) from t")
            assert sums == b"100000|%d\n" % sum(n * n for n in range(100_000))


# --- nc ---------------------------------------------------------------------------------


async def test_f13_printf_into_nc(tmp_path: Path, engine: str) -> None:
    """The reply comes after the request's FIN: with socat where no OpenBSD nc is installed."""
    nc = shutil.which("nc.openbsd")
    command = (nc, "-N", "127.0.0.1") if nc else (*_needs("socat"), "-t", "10", "-")
    async with Arena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.target(answer_after_eof))
        last = str(tunnel.port) if nc else f"TCP:127.0.0.1:{tunnel.port}"
        heard = await _run(*command, last, stdin=b"request")
        assert heard.decode() == f"7 {digest_of(b'request')}\n"
