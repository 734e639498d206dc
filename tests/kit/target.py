"""What stands behind the client: small real TCP services for the far end of the tunnel."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from .stream import Stream
from .timing import free_port

BACKLOG: Final = 4096
"""Connections the kernel may hold for us: bursts of these tests reach 1000."""

Handler = Callable[[Stream], Awaitable[None]]

BANNER: Final = b"SSH-2.0-OpenSSH_9.6\r\n"


class Target:
    """A listening service; each connection is handled in a task and closed afterwards."""

    def __init__(self, handler: Handler, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._handler = handler
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.socket(family)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port = port or free_port(host)
        self._sock.bind((host, self.port))
        self._sock.listen(BACKLOG)
        self._sock.setblocking(False)
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept())
        self.accepted = 0
        self.active = 0
        self.most_active = 0
        self.sent = 0
        """Bytes that `source` has got rid of, all connections together."""

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._sock)
            self.accepted += 1
            stream = Stream(sock)
            task = asyncio.create_task(self._serve(stream))
            self._tasks.add(task)
            task.add_done_callback(partial(self._forget, stream))

    def _forget(self, stream: Stream, task: asyncio.Task[None]) -> None:
        stream.close()  # a task that is cancelled before its first step closes nothing itself
        self._tasks.discard(task)

    async def _serve(self, stream: Stream) -> None:
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            await self._handler(stream)
        except OSError:  # visitors of these tests come and go as they like
            pass
        finally:
            stream.close()
            self.active -= 1

    async def close(self) -> None:
        tasks = [self._accepting, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()


async def echo(stream: Stream) -> None:
    """Send everything back; end when the other side ends."""
    while data := await stream.read():
        await stream.write(data)


async def answer_after_eof(stream: Stream) -> None:
    """Hear the whole request first, then answer with its digest, as rsh and `nc -N` users do."""
    total, digest = await stream.digest()
    await stream.write(f"{total} {digest}\n".encode())


async def speak_first(stream: Stream) -> None:
    """Greet like an SSH server, then echo."""
    await stream.write(BANNER)
    await echo(stream)


async def sink(stream: Stream) -> None:
    """Take everything, answer nothing."""
    while await stream.read():
        pass


async def hold(stream: Stream) -> None:
    """Read nothing and say nothing until the connection is cancelled from our side."""
    del stream
    await asyncio.get_running_loop().create_future()


def body_of(seed: int, size: int) -> bytes:
    """Bytes that both ends can make for themselves, and that do not compress or repeat."""
    return random.Random(seed).randbytes(size)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def serve_body(body: bytes) -> Handler:
    """Make a handler that sends one body to everybody and closes."""

    async def handler(stream: Stream) -> None:
        await stream.write(body)

    return handler


def source(chunk: bytes, sent: Callable[[int], None]) -> Handler:
    """Make a handler that sends for ever, and reports each chunk that the kernel took."""

    async def handler(stream: Stream) -> None:
        while True:
            await stream.write(chunk)
            sent(len(chunk))

    return handler
