"""One end of a TCP connection as a test holds it: bare socket, exact half-close and reset.

No transport and no StreamReader, so that nothing is read before the test asks for it and
a close is seen at once by the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import socket
import struct
import sys
from types import TracebackType
from typing import Final, Self

CHUNK: Final = 256 * 1024
"""Bytes asked of the kernel at a time."""

TCP_CLOSE: Final = 7
"""State in TCP_INFO: include/net/tcp_states.h."""

RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER on, 0 seconds: close() sends RST."""


class Stream:
    """A connected socket; whoever made it closes it, or leaves that to `async with`."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._held = b""
        self._is_finished = False

    async def read(self, size: int = CHUNK) -> bytes:
        """Return what has come, at most size bytes; b"" at the end."""
        if self._held:
            data, self._held = self._held[:size], self._held[size:]
            return data
        data = await self._receive(size)
        if not data and self._was_reset():
            raise ConnectionResetError(errno.ECONNRESET, "reset, and a write has been told before")
        return data

    async def _receive(self, size: int) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.sock, size)

    def _was_reset(self) -> bool:
        """Tell whether an end that looks clean is a reset.

        The kernel reports a reset once, perhaps to a write that waits beside us; the state of
        the connection still tells: a clean end leaves CLOSE-WAIT, as long as we may write.
        """
        if self._is_finished or not hasattr(socket, "TCP_INFO"):
            return False
        return self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE

    async def read_exactly(self, size: int) -> bytes:
        """Return exactly size bytes; EOFError when the stream ends before."""
        parts = bytearray()
        while len(parts) < size:
            data = await self.read(min(CHUNK, size - len(parts)))
            if not data:
                raise EOFError(f"the stream ended after {len(parts)} of {size} bytes")
            parts += data
        return bytes(parts)

    async def read_line(self) -> bytes:
        """Return one line with its LF; b"" when the stream ends first."""
        while b"\n" not in self._held:
            data = await self._receive(CHUNK)
            if not data:
                return b""
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        return line + b"\n"

    async def read_all(self) -> bytes:
        """Return everything up to the end."""
        parts = bytearray()
        while data := await self.read():
            parts += data
        return bytes(parts)

    async def digest(self, size: int = sys.maxsize) -> tuple[int, str]:
        """Hash what comes, up to size bytes or the end; return the count and the SHA-256."""
        total = 0
        sha = hashlib.sha256()
        while total < size and (data := await self.read(min(CHUNK, size - total))):
            total += len(data)
            sha.update(data)
        return total, sha.hexdigest()

    async def write(self, data: bytes | memoryview) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    def finish(self) -> None:
        """Half-close: say that nothing more will be sent."""
        self._is_finished = True
        self.sock.shutdown(socket.SHUT_WR)

    def take_held(self) -> bytes:
        """Hand over what has been read from the kernel and not yet from here."""
        held, self._held = self._held, b""
        return held

    async def is_reset(self) -> bool:
        """Read on to the end; tell whether it was a reset rather than a clean end."""
        try:
            while await self.read():
                pass
        except ConnectionResetError:
            return True
        return False

    def reset(self) -> None:
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.sock.close()

    def close(self) -> None:
        self.sock.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


async def connect(port: int, host: str = "127.0.0.1", *, source: str = "") -> Stream:
    """Connect to a port of this machine, on request from another loopback address."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setblocking(False)
    try:
        if source:
            sock.bind((source, 0))
        with contextlib.suppress(ConnectionResetError):  # it stood, and has ended; reading tells
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
    except BaseException:
        sock.close()
        raise
    return Stream(sock)


async def exchange(port: int, data: bytes, host: str = "127.0.0.1") -> bytes:
    """Send data, half-close, and return the whole answer."""
    async with await connect(port, host) as stream:
        writing = asyncio.create_task(_send(stream, data))
        try:
            return await stream.read_all()
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)


async def _send(stream: Stream, data: bytes) -> None:
    await stream.write(data)
    stream.finish()
