"""TLS for the engine's tests: certificates, and outer ends that speak TLS or do not.

The outer ends are Python's own `ssl`, which is another copy of OpenSSL than the engine's.

    visitor == ssl == [a  engine  b] == ssl or plain == target
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from typing import NamedTuple, Protocol

import trustme
from OpenSSL import SSL
from tests.kit.engine_rig import CHUNK, PATIENCE, Kind, Rig, reset_on_close

from nodepass.tls import _openssl

ALPN = b"nodepass/2"
HOST = "tunnel.test"
RECORD = 16384
"""Bytes of plaintext in the largest TLS record."""
SHAPES = ("a", "b", "ab")
"""Which sides of a flow speak TLS."""


# --- certificates and contexts -------------------------------------------------------------------


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def leaf() -> trustme.LeafCert:
    return authority().issue_cert(HOST, "127.0.0.1")


@functools.cache
def their_context(is_server: bool, *, verifies: bool = False) -> ssl.SSLContext:
    """Return the context of an outer end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if is_server:
        leaf().configure_cert(context)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED if verifies else ssl.CERT_NONE
    return context


@functools.cache
def our_context(is_server: bool) -> SSL.Context:
    """Return the context of an end inside the engine."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    if is_server:
        leaf().configure_cert(context)
    return context


def our_end(is_server: bool, context: SSL.Context | None = None) -> SSL.Connection:
    """Return a Connection on memory BIOs, ready for its handshake."""
    connection = SSL.Connection(context or our_context(is_server), None)
    if is_server:
        connection.set_accept_state()
    else:
        connection.set_connect_state()
    return connection


def alpn_context(kind: Kind) -> SSL.Context:
    """Return a server's context that takes nodepass/2 only, as each twin wants it made."""
    context = SSL.Context(SSL.TLS_METHOD)
    leaf().configure_cert(context)
    address = kind.module.alpn_selector()
    if address is not None:
        _openssl.set_alpn_selector(context, address)
        return context
    context.set_alpn_select_callback(
        lambda _, offered: ALPN if ALPN in offered else SSL.NO_OVERLAPPING_PROTOCOLS
    )
    return context


# --- outer ends ----------------------------------------------------------------------------------


class End(Protocol):
    """One outer end of a flow, in the hands of a test."""

    sock: socket.socket

    async def say(self, data: bytes) -> None:
        """Send everything."""

    async def hear(self, size: int) -> bytes:
        """Receive exactly `size` bytes; fewer only if the stream ends."""

    async def hear_all(self) -> bytes:
        """Receive up to the end of the stream, which must be an honest one."""

    async def end(self) -> None:
        """End what this end says."""


class PlainEnd:
    """An outer end without TLS."""

    def __init__(self, rig: Rig, sock: socket.socket) -> None:
        self.rig = rig
        self.sock = sock

    async def say(self, data: bytes) -> None:
        await self.rig.send(self.sock, data)

    async def hear(self, size: int) -> bytes:
        return await self.rig.receive(self.sock, size)

    async def hear_all(self) -> bytes:
        return await self.rig.drain(self.sock)

    async def end(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)


class TlsEnd:
    """An outer end that speaks TLS."""

    def __init__(
        self,
        rig: Rig,
        sock: socket.socket,
        *,
        is_server: bool,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.rig = rig
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = (context or their_context(is_server)).wrap_bio(
            self.incoming,
            self.outgoing,
            server_side=is_server,
            server_hostname=None if is_server else HOST,
        )
        self.early = b""
        """What was read while nobody listened."""
        self._turn = asyncio.Lock()
        """One sender at a time: ciphertext must leave in the order in which it was made."""

    async def shake(self) -> None:
        """Do the handshake over the socket."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    self.object.do_handshake()
                except ssl.SSLWantReadError:
                    await self.flush()
                    await self._fill()
                except ssl.SSLError:
                    await self.flush()
                    raise
                else:
                    await self.flush()
                    return

    async def flush(self) -> None:
        """Send what OpenSSL has written; a sender at work will take it along."""
        if self._turn.locked():
            return  # who listens must not wait for who speaks
        async with self._turn:
            while data := self.outgoing.read():
                await self.rig.send(self.sock, data)

    async def _fill(self) -> None:
        data = await self.rig.loop.sock_recv(self.sock, 1 << 16)
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    def seal(self, data: bytes) -> bytes:
        """Return the ciphertext of some bytes, not sent."""
        view = memoryview(data)
        while view:
            view = view[self.object.write(view[:RECORD]) :]
        return self.outgoing.read()

    def seal_end(self) -> bytes:
        """Return our close_notify, not sent."""
        # Python's unwrap looks for the peer's close_notify, too, and stumbles over data.
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while part := self.object.read(1 << 16):
                self.early += part
        with contextlib.suppress(ssl.SSLWantReadError):
            self.object.unwrap()
        return self.outgoing.read()

    async def say(self, data: bytes) -> None:
        for start in range(0, len(data), 1 << 18):
            async with self._turn:
                await self.rig.send(self.sock, self.seal(data[start : start + (1 << 18)]))

    async def hear_some(self, size: int) -> bytes:
        """Receive something; nothing at all = a close_notify.

        Raises:
            ssl.SSLError: an alert, or a cut (ssl.SSLEOFError).
            ConnectionResetError: the connection was reset.
        """
        async with asyncio.timeout(PATIENCE):
            while True:
                if self.early:
                    part, self.early = self.early[:size], self.early[size:]
                    return part
                try:
                    return self.object.read(min(size, CHUNK))
                except ssl.SSLWantReadError:
                    await self.flush()
                    await self._fill()
                except ssl.SSLZeroReturnError:
                    return b""

    async def hear(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            part = await self.hear_some(size)
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    async def hear_all(self) -> bytes:
        return await self.hear(1 << 30)

    async def end_softly(self) -> None:
        """Send a close_notify and no FIN, as the Go program does."""
        async with self._turn:
            await self.rig.send(self.sock, self.seal_end())

    async def end(self) -> None:
        await self.end_softly()
        self.sock.shutdown(socket.SHUT_WR)


def shake_in_memory(theirs: TlsEnd, ours: SSL.Connection) -> None:
    """Do a handshake without sockets; session tickets may stay with the server."""
    is_done = [False, False]
    while not all(is_done):
        with contextlib.suppress(ssl.SSLWantReadError):
            theirs.object.do_handshake()
            is_done[0] = True
        if theirs.outgoing.pending:
            ours.bio_write(theirs.outgoing.read())
        with contextlib.suppress(SSL.WantReadError):
            ours.do_handshake()
            is_done[1] = True
        move_out(ours, theirs)


def move_out(ours: SSL.Connection, theirs: TlsEnd) -> None:
    """Carry what our Connection has written to the other one."""
    with contextlib.suppress(SSL.WantReadError):
        while True:
            theirs.incoming.write(ours.bio_read(1 << 16))


async def is_cut(end: End) -> bool:
    """Tell whether a stream ended in a way that nobody takes for a good one."""
    try:
        while await end.hear(CHUNK):
            pass
    except (ConnectionResetError, BrokenPipeError, ssl.SSLError):
        return True
    return False


def cut(end: End) -> None:
    """Reset the connection."""
    reset_on_close(end.sock)
    end.sock.close()


# --- flows ---------------------------------------------------------------------------------------


class Secured(NamedTuple):
    """One flow, some of whose sides speak TLS, seen from outside."""

    visitor: End
    target: End
    token: int

    def tls_end(self) -> TlsEnd:
        """Return an end that speaks TLS."""
        end = self.visitor if isinstance(self.visitor, TlsEnd) else self.target
        assert isinstance(end, TlsEnd)
        return end

    def other(self, end: End) -> End:
        """Return the end across."""
        return self.target if end is self.visitor else self.visitor

    def side(self, end: End) -> int:
        """Return the engine's number of an end."""
        return 1 if end is self.visitor else 2


def ends_for(
    rig: Rig, letter: str, shape: str, *, buffers: dict[str, int] | None = None
) -> tuple[End, socket.socket, SSL.Connection | None]:
    """Make one side of a flow: (outer end, inner socket, inner Connection if it speaks TLS).

    On side a the engine is the TLS server, on side b the client.
    """
    outer, inner = rig.ends(**(buffers or {}))
    if letter not in shape:
        return PlainEnd(rig, outer), inner, None
    end = TlsEnd(rig, outer, is_server=letter == "b")
    connection = our_end(letter == "a")
    shake_in_memory(end, connection)
    return end, inner, connection


def join(
    rig: Rig, shape: str, *, buffers: dict[str, int] | None = None, **options: object
) -> Secured:
    """Make two connections, `shape` of them with TLS, and hand them to the engine."""
    visitor, a, tls_a = ends_for(rig, "a", shape, buffers=buffers)
    target, b, tls_b = ends_for(rig, "b", shape, buffers=buffers)
    token = rig.hand_over(a, b, tls_a=tls_a, tls_b=tls_b, **options)
    return Secured(visitor, target, token)
