"""A program with a tunnel in it forks; however the child leaves, the parent serves on.

fork_embedding.py ENGINE LOOP WAY
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable

from nodepass import Client, Server

# CPython 3.12+ warns that the process has threads; that is what this script is about.
warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)

ENGINE, LOOP, WAY = sys.argv[1:]
os.environ["NODEPASS_ENGINE"] = "python" if ENGINE == "engine.twin.engine" else "native"
os.environ["REPORT_INTERVAL"] = "200ms"
# Some releases of libuv hand epoll_ctl to io_uring, a piece of memory that the child's copy of the
# loop shares with the parent's; nobody but libuv can take that apart. docs/engine.md.
os.environ["UV_USE_IO_URING"] = "0"
VISITS = 5
PATIENCE = 10.0
NAP = 0.7
"""Seconds, three reports: time enough for a child that would be heard of."""


def answer(target: socket.socket) -> None:
    while True:
        try:
            sock, _ = target.accept()
        except OSError:
            return
        with sock:
            sock.sendall(sock.recv(100).upper())


def visit_now(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.settimeout(PATIENCE)
        sock.sendall(b"hello")
        assert sock.recv(100) == b"HELLO"


async def visit(port: int) -> None:
    for _ in range(VISITS):
        await asyncio.to_thread(visit_now, port)


def free_port() -> int:
    """A port that nobody has, TCP or UDP."""
    while True:
        with socket.socket() as sock, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            sock.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError):
                datagrams.bind(sock.getsockname())
                return int(sock.getsockname()[1])


def silence() -> None:
    """What this child says on its way out is its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


async def pause_and_exit() -> None:
    time.sleep(NAP)
    sys.exit(7)


async def raise_here() -> None:
    silence()
    raise RuntimeError("the child's own fault")


async def stop_here() -> None:
    for side in SIDES:
        await side.stop()
    os._exit(7)


async def exit_here() -> None:
    sys.exit(7)


async def exit_hard() -> None:
    os._exit(7)


async def exec_another() -> None:
    os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(7)"])


async def run_a_loop_of_its_own() -> None:
    """Also with a tunnel of its own, which nothing of the parent's stands in the way of."""

    async def main() -> None:
        # On a busy machine a step may well take its time; that is no news.
        asyncio.get_running_loop().slow_callback_duration = 60.0
        target = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=answer, args=(target,), daemon=True).start()
        async with tunnel(target) as port:
            await visit(port)
        target.close()

    loop = threading.Thread(target=run, args=(main(),))
    loop.start()
    loop.join()
    os._exit(7)


async def fork_once_more() -> None:
    pid = os.fork()
    if pid == 0:
        sys.exit(7)
    _, status = os.waitpid(pid, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


async def be_signalled() -> None:
    """The signal is the child's: what wakes the parent's loop must not hear of it."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(NAP)
    sys.exit(7)


WAYS: dict[str, Callable[[], object]] = {
    way.__name__: way
    for way in (
        pause_and_exit, raise_here, stop_here, exit_here, exit_hard, exec_another,
        run_a_loop_of_its_own, fork_once_more, be_signalled,
    )
}  # fmt: skip
SIDES: list[Server | Client] = []


@contextlib.asynccontextmanager
async def tunnel(target: socket.socket):  # type: ignore[no-untyped-def]  # a script
    port, inside = free_port(), free_port()
    async with (
        Server(f"server://127.0.0.1:{inside}/127.0.0.1:{port}?log=warn&tls=1") as server,
        Client(
            f"client://127.0.0.1:{inside}/127.0.0.1:{target.getsockname()[1]}?log=warn"
        ) as client,
    ):
        SIDES[:] = server, client
        yield port
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(server.stop(), client.stop())


async def script() -> None:
    loop = asyncio.get_running_loop()
    loop.slow_callback_duration = 60
    heard: list[int] = []
    loop.add_signal_handler(signal.SIGUSR1, heard.append, 1)
    target = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=answer, args=(target,), daemon=True).start()
    try:
        async with tunnel(target) as port:
            await visit(port)
            if WAY == "preexec":
                subprocess.run(["true"], preexec_fn=lambda: None, check=True)
                pid = 0
            else:
                pid = os.fork()
                if pid == 0:
                    await WAYS[WAY]()  # type: ignore[misc]
                    return
            await visit(port)
            if pid:
                async with asyncio.timeout(PATIENCE):
                    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
                wanted = 1 if WAY == "raise_here" else 7
                assert os.waitstatus_to_exitcode(status) == wanted, status
            await visit(port)
            sessions = [side.statistics().sessions for side in SIDES]
            assert sessions == [1, 1], f"the session was lost: {sessions}"
            await visit(port)
            assert not heard
    finally:
        target.close()


def run(work) -> None:  # type: ignore[no-untyped-def]
    if LOOP == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work)
    else:
        asyncio.run(work)


run(script())
print("ok", flush=True)
