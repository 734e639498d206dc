"""A process that is killed in mid transfer resets its flows: no cut stream looks whole."""

import asyncio
import os
import signal
import socket

from tests.isolated.scripts.stage import KIND, play
from tests.kit.engine_rig import tcp_pair

SIZE = 100_000
"""Bytes sent each way before the kill."""


def carry(a: socket.socket, b: socket.socket, ready: int) -> None:
    """Runs in the child, until it is killed."""

    async def forever() -> None:
        engine = KIND.module.Engine(1)
        engine.relay(a.detach(), b.detach())
        os.write(ready, b"x")
        await asyncio.sleep(60)

    asyncio.run(forever())


def receive(sock: socket.socket, size: int) -> int:
    left = size
    while left:
        data = sock.recv(left)
        assert data, "the stream ended"
        left -= len(data)
    return size


def ending(sock: socket.socket) -> str:
    """Say how a stream ends."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return "reset"
    return "clean"


async def script() -> None:
    visitor, a = tcp_pair()
    b, target = tcp_pair()
    told, ready = os.pipe()
    for sock in (a, b):
        sock.setblocking(False)
    pid = os.fork()
    if pid == 0:
        try:
            visitor.close()
            target.close()
            carry(a, b, ready)
        finally:
            os._exit(2)
    a.close()
    b.close()
    for sock in (visitor, target):
        sock.setblocking(True)
        sock.settimeout(20)
    assert os.read(told, 1) == b"x"
    visitor.sendall(bytes(SIZE))
    assert receive(target, SIZE) == SIZE
    target.sendall(bytes(SIZE))
    assert receive(visitor, SIZE) == SIZE
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert ending(visitor) == "reset"
    assert ending(target) == "reset"
    for sock in (visitor, target):
        sock.close()
    os.close(told)
    os.close(ready)


play(script())
