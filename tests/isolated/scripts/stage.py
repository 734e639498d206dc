"""What the scripts share: the engine named on the command line, and traffic for it."""

from __future__ import annotations

import asyncio
import importlib
import socket
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kit.engine_rig import Joined, Kind

if TYPE_CHECKING:
    from tests.kit.tls_rig import Secured

KIND = Kind(importlib.import_module(f"nodepass.{sys.argv[1]}"), True, 2)


def play(script: Coroutine[object, object, None]) -> None:
    """Run a script and say that it came to its end."""

    async def unhurried() -> None:
        # In development mode asyncio complains of slow steps; a busy machine is no fault.
        asyncio.get_running_loop().slow_callback_duration = 60
        await script

    asyncio.run(unhurried())
    print("ok", flush=True)


def pour(flow: Joined) -> list[threading.Thread]:
    """Push bytes through a flow without end, from daemon threads."""
    return push_and_pull(flow.visitor, flow.target, lambda: bytes(1 << 20))


def pour_secured(flow: Secured) -> list[threading.Thread]:
    """Do the same with a flow that may speak TLS; what arrives is not decrypted."""
    from tests.kit.tls_rig import TlsEnd  # loads OpenSSL

    chunk = bytes(1 << 18)
    visitor = flow.visitor
    seal = visitor.seal if isinstance(visitor, TlsEnd) else bytes
    return push_and_pull(visitor.sock, flow.target.sock, lambda: seal(chunk))


def push_and_pull(
    visitor: socket.socket, target: socket.socket, make: Callable[[], bytes]
) -> list[threading.Thread]:
    def push() -> None:
        try:
            while True:
                visitor.sendall(make())
        except OSError:
            return

    def pull() -> None:
        room = bytearray(1 << 20)
        try:
            while target.recv_into(room):
                pass
        except OSError:
            return

    visitor.setblocking(True)
    target.setblocking(True)
    threads = [threading.Thread(target=act, daemon=True) for act in (push, pull)]
    for thread in threads:
        thread.start()
    return threads


def descriptors() -> set[str]:
    """Return the numbers of this process's open descriptors; empty where nobody tells."""
    listing = Path("/proc/self/fd")
    return {entry.name for entry in listing.iterdir()} if listing.exists() else set()


def shut(*socks: socket.socket) -> None:
    """Close the script's own ends."""
    for sock in socks:
        sock.close()
