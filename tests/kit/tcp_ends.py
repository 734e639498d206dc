"""Listeners and those who hear of connections, for the tests of sockets."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator, Sequence

import pytest
from tests.kit.timing import free_port

NO_IPV6 = not socket.has_ipv6


needs_ipv6 = pytest.mark.skipif(NO_IPV6, reason="this machine has no IPv6")


def teach(monkeypatch: pytest.MonkeyPatch, **names: Sequence[str]) -> None:
    """Make the system resolve these names, and no others; addresses stay what they are."""

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[object]:
        if host not in names and not re.fullmatch(r"[0-9.]+|[0-9a-f:]*:[0-9a-f:]*", host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found: list[object] = []
        for address in names.get(host, [host]):
            if ":" in address:
                found.append((socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0)))
            else:
                found.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)))
        return found

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@contextlib.contextmanager
def listening(host: str = "127.0.0.1", port: int = 0) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port or free_port("0.0.0.0" if ":" not in host else host)))
        sock.listen(100)
        yield sock


@contextlib.contextmanager
def closing(socks: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


class Hearer:
    """Keeps what a Listener hands over, and what it complains of."""

    def __init__(self) -> None:
        self.socks: list[socket.socket] = []
        self.peers: list[tuple[str, int]] = []
        self.complaints: list[OSError] = []

    def accept(self, sock: socket.socket, host: str, port: int) -> None:
        self.socks.append(sock)
        self.peers.append((host, port))

    def complain(self, exc: OSError) -> None:
        self.complaints.append(exc)

    def __enter__(self) -> Hearer:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.socks:
            sock.close()
