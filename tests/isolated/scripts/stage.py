"""What the scripts share: the engine named on the command line, and traffic for it."""

from __future__ import annotations

import asyncio
import importlib
import socket
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path

from tests.engine.rig import Joined, Kind

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

    def push() -> None:
        chunk = bytes(1 << 20)
        try:
            while True:
                flow.visitor.sendall(chunk)
        except OSError:
            return

    def pull() -> None:
        room = bytearray(1 << 20)
        try:
            while flow.target.recv_into(room):
                pass
        except OSError:
            return

    flow.visitor.setblocking(True)
    flow.target.setblocking(True)
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
