"""Connections whose paths can be cut in silence: no packet arrives any more, and nobody says so.

They live in a network namespace of their own, which takes root, iproute2 and iptables.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from tests.kit.engine_rig import tcp_pair

CLONE_NEWNET: Final = 0x40000000
Made = TypeVar("Made")
_numbers = itertools.count()


class Unavailable(Exception):
    """This machine cannot do it; the text says why."""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


class Street:
    """A namespace with nothing but a loopback device in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def pair(self, **buffers: int) -> tuple[socket.socket, socket.socket]:
        """Return two connected TCP sockets, as `tcp_pair` does."""
        return self.make(lambda: tcp_pair(**buffers))

    def make(self, maker: Callable[[], Made]) -> Made:
        """Call what makes sockets, in the namespace."""
        made: list[Made] = []

        def make() -> None:
            # A namespace is a thread's own; its sockets stay where they were made.
            libc = ctypes.CDLL(None, use_errno=True)
            fd = os.open(Path("/run/netns") / self.name, os.O_RDONLY)
            try:
                if libc.setns(fd, CLONE_NEWNET) == 0:
                    made.append(maker())
            finally:
                os.close(fd)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if not made:
            raise Unavailable("setns: no")
        return made[0]

    def own(self, address: str) -> None:
        """Give the namespace an IPv4 address."""
        _run("ip", "-n", self.name, "addr", "add", f"{address}/32", "dev", "lo")

    def route(self, address: str) -> None:
        """Have it that an address is to be had on its loopback device."""
        _run("ip", "-n", self.name, "route", "add", f"{address}/32", "dev", "lo")

    def lose(self, address: str) -> None:
        """Take it away again."""
        _run("ip", "-n", self.name, "addr", "del", f"{address}/32", "dev", "lo")

    def cut(self, *socks: socket.socket) -> None:
        """Drop from now on what these sockets send and what is sent to them."""
        for sock in socks:
            port = str(sock.getsockname()[1])
            for side in ("--sport", "--dport"):
                self._filter("-A", "INPUT", "-p", "tcp", side, port, "-j", "DROP")

    def mend(self) -> None:
        """Let everything pass again."""
        self._filter("-F", "INPUT")

    def _filter(self, *words: str) -> None:
        _run("ip", "netns", "exec", self.name, "iptables", "-w", *words)


@contextmanager
def street() -> Iterator[Street]:
    """Open a street.

    Raises:
        Unavailable: no root, no `ip` or `iptables`, or a kernel without what they need.
    """
    if shutil.which("ip") is None or shutil.which("iptables") is None:
        raise Unavailable("needs ip (iproute2) and iptables")
    place = Street(f"np-street-{os.getpid()}-{next(_numbers)}")
    _run("ip", "netns", "add", place.name)
    try:
        _run("ip", "-n", place.name, "link", "set", "lo", "up")
        place.mend()
        yield place
    finally:
        subprocess.run(["ip", "netns", "del", place.name], capture_output=True, check=False)
