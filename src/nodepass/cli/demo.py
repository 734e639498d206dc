"""`nodepass demo`: a real tunnel on this machine, measured, and taken down again.

Owns: three child processes (an HTTP target, a server, a client) and one temporary folder for
their logs. Must never leave any of them behind, whatever happens. Called by `main`; imports
nothing of ours but `outlet`, so that it sees the program as a user does: as two commands.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import mmap
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import IO, TYPE_CHECKING, Final, NamedTuple

from nodepass.observe.outlet import tell

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

MEGABYTE: Final = 1_000_000
"""Bytes; sizes and rates of the demo are decimal, as network speeds are."""
BLOCK: Final = 32 * 1024 * 1024
"""Bytes that the target holds; the body repeats them, so that the target stays small."""
CHUNK: Final = 1024 * 1024
"""Bytes asked of the kernel at a time: few calls, and the Python side is no bottleneck."""
AT_ONCE: Final = 16
"""Short connections under way at a time, as wrk -c16 would have them."""
ONE_BY_ONE: Final = 100
"""Short connections whose latency is taken: enough for a mean, a fraction of a second."""
START_LIMIT: Final = 10.0
"""Seconds until server and client have found each other; interpreters start in 0.3 s."""
STOP_LIMIT: Final = 8.0
"""Seconds a child may take to stop; SHUTDOWN_TIMEOUT is 5 s."""
STALL_LIMIT: Final = 10.0
"""Seconds without a byte before a transfer counts as failed."""
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"
STOPPERS: Final = signal.SIGINT, signal.SIGTERM
REPLACED: Final = ("NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE")
"""Variables that would change what the two commands do."""


class DemoError(Exception):
    """The demo could not show what it wanted to; one line for the user."""


class Figures(NamedTuple):
    """One way of reaching the target."""

    rate: float
    """Bytes a second, one large fetch."""
    cpu: float | None
    """CPU seconds of server and client for each GB; None where nobody counts them."""
    connections: float
    """Short connections a second, AT_ONCE at a time."""
    latency: float
    """Seconds from connect to answer, mean, one connection at a time."""


# --- the target: a process of its own --------------------------------------------------------


def serve(size: int) -> None:
    """Serve a body of size bytes on a free port until stdin ends.

    Prints the port and the body's SHA-256. The end of stdin also comes when the parent is
    killed, so the target cannot outlive it.
    """
    block = random.Random(size).randbytes(min(BLOCK, size))  # noqa: S311 - a body, not a secret
    sha = hashlib.sha256()
    for offset in range(0, size, len(block)):
        sha.update(memoryview(block)[: size - offset])
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    with tempfile.TemporaryFile() as file:
        file.write(block)
        file.flush()
        work = (listener, file, block, size)
        for _ in range(AT_ONCE * 2):
            threading.Thread(target=_answer_all, args=work, daemon=True).start()
        print(listener.getsockname()[1], sha.hexdigest(), flush=True)
        sys.stdin.buffer.read()


def _answer_all(listener: socket.socket, file: IO[bytes], block: bytes, size: int) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            request = connection.recv(4096)
            if request.startswith(b"GET /body "):
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n"
                connection.sendall(head.encode())
                for offset in range(0, size, BLOCK):
                    _send_block(connection, file, memoryview(block)[: size - offset])
            elif request:
                connection.sendall(ANSWER)


def _send_block(connection: socket.socket, file: IO[bytes], block: memoryview) -> None:
    if not hasattr(os, "sendfile"):
        connection.sendall(block)
        return
    sent = 0
    while sent < len(block):  # by offset: several threads share the file
        sent += os.sendfile(connection.fileno(), file.fileno(), sent, len(block) - sent)


# --- the visitor -----------------------------------------------------------------------------


def fetch(port: int, size: int, *, label: str) -> tuple[float, mmap.mmap]:
    """Fetch the body; return the seconds from first to last byte of it, and the bytes.

    They are kept and hashed later: hashing costs as much CPU as the tunnel does.
    """
    body = mmap.mmap(-1, size)
    view = memoryview(body)
    try:
        for page in range(0, size, mmap.PAGESIZE):
            view[page] = 1  # have the memory now, not while the clock runs
        with _connect(port) as stream:
            stream.sendall(b"GET /body HTTP/1.1\r\nHost: demo\r\n\r\n")
            start = time.monotonic()
            head, found, first = _read_head(stream)
            if not found or not head.startswith(b"HTTP/1.1 200"):
                raise DemoError(f"the target answered {head[:60]!r}")
            view[: len(first)] = first
            _fill(stream, view, len(first), label)
            return time.monotonic() - start, body
    finally:
        view.release()


def _connect(port: int) -> socket.socket:
    stream = socket.create_connection(("127.0.0.1", port), timeout=STALL_LIMIT)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def _read_head(stream: socket.socket) -> tuple[bytes, bytes, bytes]:
    head = b""
    while b"\r\n\r\n" not in head and len(head) < CHUNK and (data := stream.recv(4096)):
        head += data
    return head.partition(b"\r\n\r\n")


def _fill(stream: socket.socket, view: memoryview, got: int, label: str) -> None:
    size = len(view)
    shown = 0
    while got < size:
        count = stream.recv_into(view[got : got + CHUNK])
        if not count:
            raise DemoError(f"the body ended after {got} of {size} bytes")
        got += count
        if got * 100 // size > shown:
            shown = got * 100 // size
            _progress(label, shown)
    if stream.recv(1):
        raise DemoError(f"more than {size} bytes arrived")


def _progress(label: str, percent: int) -> None:
    """Draw a bar on a terminal, nothing elsewhere."""
    if not sys.stdout.isatty():
        return
    bar = "#" * (percent * 30 // 100)
    end = "\r\033[K" if percent == 100 else ""
    print(f"\r{label:22} [{bar:.<30}] {percent:3} %", end=end, flush=True)


def visit(port: int) -> float:
    """Make one short connection; return the seconds from connect to the end of the answer."""
    start = time.monotonic()
    with _connect(port) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\nHost: demo\r\n\r\n")
        answer = b""
        while data := stream.recv(4096):
            answer += data
    if answer != ANSWER:
        raise DemoError(f"a short connection was answered by {answer[:60]!r}")
    return time.monotonic() - start


def measure(
    port: int, size: int, digest: str, connections: int, label: str, pids: Sequence[int]
) -> Figures:
    """Take all figures of one way to the target; pids are the processes that carry it."""
    visit(port)
    before = [_cpu_of(pid) for pid in pids]
    took, body = fetch(port, size, label=label)
    after = [_cpu_of(pid) for pid in pids]
    with body:
        if hashlib.sha256(body).hexdigest() != digest:
            raise DemoError(f"{label}: SHA-256 differs from what the target sent")
    spent = [new - old for new, old in zip(after, before, strict=True) if new and old]
    latency = sum(visit(port) for _ in range(ONE_BY_ONE)) / ONE_BY_ONE
    with ThreadPoolExecutor(AT_ONCE) as pool:
        start = time.monotonic()
        for future in [pool.submit(visit, port) for _ in range(connections)]:
            future.result()
        rate = connections / (time.monotonic() - start)
    cpu = sum(spent) / (size / 1e9) if pids and len(spent) == len(pids) else None
    return Figures(size / took, cpu, rate, latency)


def _cpu_of(pid: int) -> float:
    """CPU seconds of a process so far, user and system; 0 where /proc does not tell."""
    if sys.platform != "linux":
        return 0.0
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the stage -------------------------------------------------------------------------------


class Interrupts:
    """SIGINT and SIGTERM as KeyboardInterrupt, except while they are held back."""

    def __init__(self) -> None:
        self.is_held = False
        self.has_come = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.has_come = True
        self.check()

    def check(self) -> None:
        if self.has_come and not self.is_held:
            raise KeyboardInterrupt


interrupts: Final = Interrupts()


@contextlib.contextmanager
def running(command: list[str], *, errors: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a child for the length of a block; it is gone afterwards, whatever happens."""
    environment = {name: value for name, value in os.environ.items() if name not in REPLACED}
    interrupts.is_held = True  # raised inside Popen it would leave the child to nobody
    try:
        with errors.open("wb") as stderr:
            child = subprocess.Popen(  # noqa: S603 - our own interpreter, our own arguments
                command, stdin=PIPE, stdout=PIPE, stderr=stderr, env=environment
            )
    except BaseException:
        interrupts.is_held = False
        raise
    with child:  # closes the pipes and waits
        try:
            interrupts.is_held = False
            interrupts.check()
            yield child
        finally:
            try:
                child.terminate()
                child.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                child.kill()
            except BaseException:  # a second Ctrl-C
                child.kill()
                raise


def _wait_for(line: str, log: Path, child: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_LIMIT
    while line not in (text := log.read_text(errors="replace")):
        if child.poll() is not None or time.monotonic() > end:
            last = (text.strip().splitlines() or ["it said nothing"])[-1]
            raise DemoError(f"no {line!r} from {shlex.join(child.args)}: {last}")  # type: ignore[arg-type]
        time.sleep(0.01)


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        probes = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [probe.getsockname()[1] for probe in probes]


def run(size: int, connections: int) -> None:
    """Build the stage, measure, print, and leave nothing behind."""
    _check_memory(size)
    with tempfile.TemporaryDirectory(prefix="nodepass-demo-") as name:
        folder = Path(name)
        start = [sys.executable, "-m", "nodepass.cli.demo", str(size)]
        with running(start, errors=folder / "target.log") as target:
            assert target.stdout is not None
            words = target.stdout.readline().decode().split()
            if len(words) != 2:
                raise DemoError("the HTTP target did not start")
            port, digest = int(words[0]), words[1]
            direct = measure(port, size, digest, connections, "direct", ())
            tunnel_port, visitor_port = free_ports(2)
            urls = (
                f"server://127.0.0.1:{tunnel_port}/127.0.0.1:{visitor_port}",
                f"client://127.0.0.1:{tunnel_port}/127.0.0.1:{port}",
            )
            tunnelled = _through(urls, folder, visitor_port, size, digest, connections)
    _report(tunnelled, direct, size, connections, digest, urls)


def _through(
    urls: tuple[str, str], folder: Path, port: int, size: int, digest: str, connections: int
) -> Figures:
    command = [sys.executable, "-m", "nodepass"]
    logs = folder / "server.log", folder / "client.log"
    with running([*command, urls[0]], errors=logs[0]) as server:
        _wait_for("server listening", logs[0], server)
        with running([*command, urls[1]], errors=logs[1]) as client:
            _wait_for("tunnel up", logs[1], client)
            pids = server.pid, client.pid
            figures = measure(port, size, digest, connections, "through the tunnel", pids)
    if os.name == "posix" and (server.returncode, client.returncode) != (0, 0):
        raise DemoError(f"exit codes {server.returncode} and {client.returncode}, expected 0")
    return figures


def _check_memory(size: int) -> None:
    """Refuse a body that this machine cannot hold, before it starts to swap."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
        if size + 2 * BLOCK > free:
            raise DemoError(f"{free // MEGABYTE} MB of memory are free: try a smaller --size")


def _report(
    tunnel: Figures, direct: Figures, size: int, connections: int, digest: str, urls: Sequence[str]
) -> None:
    cpu = "–" if tunnel.cpu is None else f"{tunnel.cpu:.2f} s/GB"
    rows = (
        ("", "through the tunnel", "direct"),
        ("throughput", f"{tunnel.rate / 1e9:.2f} GB/s", f"{direct.rate / 1e9:.2f} GB/s"),
        ("CPU, server + client", cpu, "–"),
        ("new connections", f"{tunnel.connections:.0f} /s", f"{direct.connections:.0f} /s"),
        ("mean latency", f"{tunnel.latency * 1e3:.2f} ms", f"{direct.latency * 1e3:.2f} ms"),
        ("mean added latency", f"{(tunnel.latency - direct.latency) * 1e3:.2f} ms", ""),
    )
    print(f"{size // MEGABYTE} MB fetched, SHA-256 equal ({digest[:16]}…)")
    print(f"{connections} short connections answered, {AT_ONCE} at a time\n")
    for name, through, without in rows:
        print(f"  {name:<22}{through:>20}{without:>16}".rstrip())
    print(
        "\nMeasured without TLS. The two commands as they should be used, and a password for them:"
    )
    print("  (umask 077; nodepass keygen | head -n 1 > ~/nodepass.secret)")
    for url in urls:
        print(f'  NODEPASS_PASSWORD_FILE=~/nodepass.secret nodepass "{url}?tls=1"')
    print("For two machines: nodepass keygen HOST")


# --- the command -----------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Run `nodepass demo`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="nodepass demo",
        description="Build a tunnel on this machine, send a large file and many short "
        "connections through it, and show what that cost.",
    )
    parser.add_argument("--size", type=_count, default=512, metavar="MB", help="default: 512")
    parser.add_argument(
        "--connections", type=_count, default=500, metavar="N", help="default: 500"
    )
    # Its own error would repeat the words, and a password in one of them.
    options, surplus = parser.parse_known_args(argv)
    if surplus:
        parser.error("takes no URL and no other words but these")
    interrupts.has_come = False
    previous = {number: signal.signal(number, interrupts) for number in STOPPERS}
    try:
        run(options.size * MEGABYTE, options.connections)
    except KeyboardInterrupt:
        tell("nodepass demo: interrupted\n")
        return 130
    except (DemoError, OSError) as error:
        tell(f"nodepass demo: {error}\n")
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= 100_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 100000")
    return int(text)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
