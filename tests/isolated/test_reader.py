"""Who reads the log: he stands still, he leaves, he comes back, and the tunnel does not care."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit.timing import free_port

if sys.platform == "win32":
    pytest.skip("needs pipes, terminals and signals of Unix", allow_module_level=True)

import termios

PATIENCE = 20.0
"""Seconds for any step on a busy machine; nothing here needs one."""


class Stuck:
    """A standard error that takes not one more byte, with the end that could read it.

    Args:
        kind: "pipe" = a full one; "terminal" = after Ctrl-S; "closed" = a pipe without a
            reader; "disk" = one without space.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.reader = -1
        if kind == "disk":
            self.fd = os.open("/dev/full", os.O_WRONLY)
        elif kind == "terminal":
            self.reader, self.fd = os.openpty()
            termios.tcflow(self.fd, termios.TCOOFF)
        else:
            self.reader, self.fd = os.pipe()
            if kind == "pipe":
                self.filled = fill(self.fd)
            else:
                os.close(self.reader)

    def __enter__(self) -> Stuck:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)
        if self.kind in ("pipe", "terminal"):
            os.close(self.reader)

    def read(self) -> list[str]:
        """Come back, and read until all who could write have ended."""
        if self.kind == "terminal":
            termios.tcflow(self.fd, termios.TCOON)
        os.close(self.fd)
        data = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            while piece := os.read(self.reader, 1 << 16):
                data += piece
        return data.decode().lstrip("#").splitlines()


def fill(fd: int) -> int:
    """Fill a pipe to the last byte; return how many went in."""
    count = 0
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            count += os.write(fd, b"#")
    os.set_blocking(fd, True)
    return count


KINDS = [
    "pipe",
    "terminal",
    "closed",
    pytest.param(
        "disk",
        marks=pytest.mark.skipif(
            not Path("/dev/full").exists(), reason="this system has no /dev/full"
        ),
    ),
]


@contextlib.contextmanager
def running(stderr: int, *words: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "nodepass", *words]
    process = subprocess.Popen(command, env={**os.environ, **environ}, stderr=stderr)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Tunnel:
    """A server and a client that say all there is to say, to readers who do not read."""

    def __init__(self, stack: contextlib.ExitStack, server: int, client: int) -> None:
        tunnel, self.port = free_port(), free_port()
        self._target = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._target.settimeout(PATIENCE)
        inner = self._target.getsockname()[1]
        # Reports come all the time, as each visitor changes what they say.
        environ = {"REPORT_INTERVAL": "100ms", "NODEPASS_THREADS": "1", "NO_COLOR": "1"}
        there, here = f"127.0.0.1:{tunnel}", f"127.0.0.1:{self.port}"
        self.server = stack.enter_context(
            running(server, f"server://{there}/{here}?log=debug", **environ)
        )
        self.client = stack.enter_context(
            running(client, f"client://{there}/127.0.0.1:{inner}?log=debug", **environ)
        )

    def visit(self) -> None:
        """Send a word through, and hear the answer."""
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                visitor = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
                break
            assert time.monotonic() < end, "the server does not listen"
            time.sleep(0.02)
        with visitor:
            visitor.sendall(b"word")
            accepted, _ = self._target.accept()
            with accepted:
                accepted.settimeout(PATIENCE)
                assert accepted.recv(100) == b"word"
                accepted.sendall(b"answer")
            assert visitor.recv(100) == b"answer"


@pytest.mark.parametrize("kind", KINDS)
def test_c3_a_reader_that_stands_still_stops_nobody(kind: str) -> None:
    """Visitors are served, and SIGTERM is a good end, though its last lines cannot be written."""
    with Stuck(kind) as near, Stuck(kind) as far, contextlib.ExitStack() as stack:
        tunnel = Tunnel(stack, near.fd, far.fd)
        for _ in range(50):
            tunnel.visit()
        for process in (tunnel.client, tunnel.server):
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_c3_a_reader_that_comes_back_gets_it_all(kind: str) -> None:
    with Stuck(kind) as near, Stuck("pipe") as far, contextlib.ExitStack() as stack:
        tunnel = Tunnel(stack, near.fd, far.fd)
        for _ in range(50):
            tunnel.visit()
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(near.read()))
        reader.start()
        tunnel.server.send_signal(signal.SIGTERM)
        assert tunnel.server.wait(PATIENCE) == 0
        reader.join(PATIENCE)
    times = [line[:23] for line in said]
    assert times == sorted(times)
    assert "server listening" in said[0] + said[1]
    assert sum("visitor=" in line for line in said) >= 50
    assert said[-1].endswith("INFO  stopped")


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize(("word", "code"), [("server://:1/:1", 2), ("taken", 1)])
def test_c3_a_failed_start_ends_where_nobody_reads(kind: str, word: str, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder, Stuck(kind) as stuck:
        port = holder.getsockname()[1]
        url = f"server://127.0.0.1:{port}/127.0.0.1:{free_port()}" if code == 1 else word
        with running(stuck.fd, url) as process:
            assert process.wait(PATIENCE) == code


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for children in /proc")
def test_c3_a_demo_that_nobody_reads_can_be_stopped() -> None:
    with Stuck("pipe") as out, Stuck("pipe") as errors:
        command = [sys.executable, "-m", "nodepass", "demo", "--size", "1"]
        process = subprocess.Popen(command, stdout=out.fd, stderr=errors.fd)
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            end = time.monotonic() + PATIENCE
            while not children.read_text():
                assert time.monotonic() < end
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 130
        finally:
            process.kill()
            process.wait()


BOOM = """
import sys
from nodepass.cli import main as cli, runner as process
async def boom(*rest):
    raise ZeroDivisionError("server://hunter2@h:1")
process.serve = boom
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_c3_a_crash_is_told_in_full(fmt: str) -> None:
    done = crash(subprocess.PIPE, fmt)
    assert done.returncode == 1
    text = done.stderr.decode()
    if fmt == "json":
        line = json.loads(text)
        assert line["level"] == "fatal"
        text = line["message"] + "  " + line["traceback"]
    assert "an internal error ends the program; please report it" in text
    assert "Traceback (most recent call last)" in text
    assert "ZeroDivisionError: server://***@h:1" in text


def crash(stderr: int, fmt: str) -> subprocess.CompletedProcess[bytes]:
    url = f"server://127.0.0.1:{free_port()}/127.0.0.1:{free_port()}"
    return subprocess.run(
        [sys.executable, "-c", BOOM, url],
        env={**os.environ, "LOG_FORMAT": fmt},
        stderr=stderr,
        timeout=PATIENCE,
        check=False,
    )


def test_c3_a_crash_where_nobody_reads() -> None:
    with Stuck("pipe") as stuck:
        assert crash(stuck.fd, "text").returncode == 1


FAULTS = """
import faulthandler, sys, threading
from nodepass.cli import main as cli, runner as process
class Dropped:
    def __del__(self):
        raise ValueError("in a finalizer")
async def serve(*rest):
    import asyncio
    def fail():
        raise ValueError("in a thread")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    Dropped()
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    async def die():
        raise ValueError("in a task")
    task = asyncio.ensure_future(die())
    await asyncio.sleep(0.01)
    del task
    import warnings
    warnings.warn("a warning")
    faulthandler.dump_traceback()
    return 0
process.serve = serve
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_c3_no_fault_of_any_kind_waits(kind: str) -> None:
    script = FAULTS.replace("    faulthandler.dump_traceback()\n", "")
    with Stuck(kind) as stuck:
        assert faults(script, stuck.fd, "text").returncode == 0


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_c18_faults_of_all_kinds_are_told(fmt: str) -> None:
    done = faults(FAULTS, subprocess.PIPE, fmt)
    assert done.returncode == 0
    lines = done.stderr.decode().splitlines()
    if fmt == "json":
        # The interpreter's own handler of crashes writes past everything.
        ours = [
            line for line in lines if not re.match(r"(Current thread|  File|$|Thread 0x)", line)
        ]
        lines = [
            text
            for said in map(json.loads, ours)
            for text in (said["message"], *said.get("traceback", "").splitlines())
        ]
    text = "\n".join(lines)
    for words in ("in a finalizer", "in a thread", "division by zero", "in a task", "a warning"):
        assert words in text


def faults(script: str, stderr: int, fmt: str) -> subprocess.CompletedProcess[bytes]:
    url = f"server://127.0.0.1:{free_port()}/127.0.0.1:{free_port()}"
    return subprocess.run(
        [sys.executable, "-c", script, url],
        env={**os.environ, "LOG_FORMAT": fmt, "PYTHONWARNINGS": "default"},
        stderr=stderr,
        timeout=PATIENCE,
        check=False,
    )


SLOW_END = """
import asyncio, sys
from nodepass.cli import main as cli, runner as process
real = process.serve
class Slow:
    async def start(self):
        print("started", file=sys.stderr)
    async def stop(self):
        print("stopping", file=sys.stderr)
        await asyncio.shield(asyncio.sleep(60))
    async def wait_closed(self):
        await asyncio.sleep(60)
    def reload(self):
        return False
class House:
    def relays(self, settings):
        return self
    def tunnel(self, config, relays):
        return Slow()
    async def close(self):
        print("closing", file=sys.stderr)
        await asyncio.sleep(60)
process.serve = lambda configs, settings, house, leave: real(configs, settings, House(), leave)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("is_read", [True, False])
def test_c3_a_third_signal_lets_the_last_lines_out(is_read: bool) -> None:
    url = f"server://127.0.0.1:{free_port()}/127.0.0.1:{free_port()}"
    read, write = os.pipe()
    with (
        os.fdopen(read, "rb", buffering=0) as reader,  # so that select() sees all that is left
        subprocess.Popen([sys.executable, "-c", SLOW_END, url], stderr=write) as process,
    ):
        for line in (b"started", b"stopping", b"closing"):
            said = b""
            while line not in said:
                assert select.select([read], [], [], PATIENCE)[0], f"never said: {line!r}"
                said = reader.readline()
            if not is_read and line == b"closing":
                fill(write)
            process.send_signal(signal.SIGTERM)
        os.close(write)
        assert process.wait(PATIENCE) == 1
        if is_read:
            assert b"ended on the spot by a third signal" in reader.read()


FORK = """
import os, sys
from nodepass.observe.console import Console
with Console():
    print("parent", file=sys.stderr)
    child = os.fork()
    print("child" if child == 0 else "parent", file=sys.stderr)
    if child:
        assert os.waitpid(child, 0)[1] == 0
sys.exit(0)
"""


def test_c3_a_forked_child_has_its_own_voice() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0
    assert sorted(done.stderr.split()) == [b"child", b"parent", b"parent"]
