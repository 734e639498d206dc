"""So much traffic through the native engine, one message at a time; run under callgrind.

Usage: python rounds.py KIND COUNT

    tcp     COUNT requests and answers through one relay
    udp     COUNT requests and answers as datagrams through a gate, a link and a dialled target
    relays  COUNT relays one after another: a request, an answer, both ends closed

Nothing is sent before the last message was heard: however the threads are scheduled, each message
finds the engine asleep and wakes it once, so the same work is done in every run. Plain sockets
and no event loop, because all of it runs fifty times slower there.
"""

from __future__ import annotations

import select
import socket
import sys

from nodepass import _fastcopy
from nodepass.engine import types

MESSAGE = bytes(range(200))
"""A request or an answer: small, so that the engine's work is seen and not the copying."""

PATIENCE = 20.0
"""Seconds that anything may take; below the limit of the test that started us."""


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return (ours, the engine's) ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), PATIENCE)
        engines, _ = listener.accept()
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    engines.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    engines.setblocking(False)
    return ours, engines


def udp_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(PATIENCE)
    return sock


def news(engine: _fastcopy.Engine) -> object:
    """Wait for the next thing that the engine reports."""
    ready, _, _ = select.select([engine.fileno()], [], [], PATIENCE)
    assert ready, "the engine reports nothing"
    (report,) = engine.poll()
    return report


def carry(source: socket.socket, sink: socket.socket) -> None:
    """Send one message and insist on having it at the other end."""
    source.sendall(MESSAGE)
    heard = b""
    while len(heard) < len(MESSAGE):
        part = sink.recv(len(MESSAGE) - len(heard))
        assert part, "the stream ended"
        heard += part
    assert heard == MESSAGE


def tcp(engine: _fastcopy.Engine, count: int) -> None:
    visitor, a = tcp_pair()
    target, b = tcp_pair()
    engine.relay(a.detach(), b.detach())
    for _ in range(count):
        carry(visitor, target)
        carry(target, visitor)
    visitor.close()
    assert not target.recv(1), "more than was sent"
    target.close()
    news(engine)


def udp(engine: _fastcopy.Engine, count: int) -> None:
    door, visitor, target, socket_to_target = (udp_socket() for _ in range(4))
    visitor.connect(door.getsockname())
    target.connect(socket_to_target.getsockname())
    socket_to_target.connect(target.getsockname())
    for sock in (door, socket_to_target):
        sock.setblocking(False)
    engine.udp_serve(door.detach())
    visitor.sendall(MESSAGE)
    newcomer = news(engine)
    assert isinstance(newcomer, types.Newcomer)
    far, near = tcp_pair()
    far.setblocking(False)
    near.setblocking(False)
    engine.udp_bind(newcomer.token, far.detach())
    engine.udp_dial(near.detach(), socket_to_target.detach())
    assert target.recv(1 << 16) == MESSAGE
    for _ in range(count):
        carry(target, visitor)
        carry(visitor, target)
    visitor.close()
    target.close()


def relays(engine: _fastcopy.Engine, count: int) -> None:
    for _ in range(count):
        tcp(engine, 1)


def main() -> None:
    with_kind = {"tcp": tcp, "udp": udp, "relays": relays}
    engine = _fastcopy.Engine(1, flows=16)
    with_kind[sys.argv[1]](engine, int(sys.argv[2]))
    assert engine.close(PATIENCE)
    print("ok")


main()
