"""TLS by hand, on top of a Stream: two libraries, one interface.

`PythonSide` is Python's own `ssl` with its own OpenSSL, `LibrarySide` is pyOpenSSL, which
also gives the exporter that proofs are bound to. A `TlsStream` is a Stream whose bytes are
plaintext: its clean end is the other side's close_notify, and a bare FIN is `Truncated`.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, cast

from OpenSSL import SSL

from .authority import Issued
from .stream import CHUNK, Stream

ALPN: Final = b"nodepass/2"

BINDING: Final = b"EXPORTER-Channel-Binding"
"""Label of RFC 9266; its 32 bytes are B of docs/protocol.md."""


class TlsFault(ConnectionError):
    """The library refused what came; the text holds its reason, an alert's name for one."""


class Truncated(EOFError):
    """The connection ended without a close_notify."""


class Side(Protocol):
    """One end of a TLS connection, bytes in and bytes out."""

    def shake(self) -> bool:
        """Go on with the handshake; tell whether it is done."""

    def take(self, data: bytes) -> None:
        """Take ciphertext."""

    def give(self) -> bytes:
        """Return the ciphertext to be sent."""

    def read(self, size: int) -> bytes | None:
        """Return plaintext; None = more is needed, b"" = the peer's close_notify."""

    def write(self, data: bytes) -> None:
        """Take plaintext."""

    def end(self) -> None:
        """Say close_notify."""

    def fingerprint(self) -> str:
        """Return the peer's certificate as logs show it."""


class PythonSide:
    """Python's `ssl`."""

    def __init__(
        self, context: ssl.SSLContext, *, is_server: bool = False, name: str | None = None
    ) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self._in, self._out, server_side=is_server, server_hostname=name
        )

    def shake(self) -> bool:
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise TlsFault(error.reason) from error
        return True

    def take(self, data: bytes) -> None:
        self._in.write(data)

    def give(self) -> bytes:
        return self._out.read()

    def read(self, size: int) -> bytes | None:
        try:
            return self.tls.read(size)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            return b""
        except ssl.SSLError as error:
            raise TlsFault(error.reason) from error

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.tls.write(view) :]

    def end(self) -> None:
        # It wants the peer's close_notify, too, and has sent ours by the time it says so.
        with suppress(ssl.SSLError):
            self.tls.unwrap()

    def fingerprint(self) -> str:
        certificate = self.tls.getpeercert(binary_form=True)
        assert certificate is not None
        return _shown(hashlib.sha256(certificate).digest())


class LibrarySide:
    """pyOpenSSL."""

    def __init__(
        self,
        context: SSL.Context,
        *,
        is_server: bool = False,
        name: bytes = b"",
        alpn: Sequence[bytes] = (ALPN,),
    ) -> None:
        self.tls = SSL.Connection(context, None)
        if is_server:
            self.tls.set_accept_state()
            return
        if alpn:
            self.tls.set_alpn_protos(list(alpn))
        if name:
            self.tls.set_tlsext_host_name(name)
        self.tls.set_connect_state()

    def shake(self) -> bool:
        try:
            self.tls.do_handshake()
        except SSL.WantReadError:
            return False
        except SSL.Error as error:
            raise TlsFault(str(error)) from error
        return True

    def take(self, data: bytes) -> None:
        if data:
            self.tls.bio_write(data)

    def give(self) -> bytes:
        parts = bytearray()
        with suppress(SSL.WantReadError):
            while True:
                parts += self.tls.bio_read(CHUNK)
        return bytes(parts)

    def read(self, size: int) -> bytes | None:
        try:
            return self.tls.recv(size)
        except SSL.WantReadError:
            return None
        except SSL.ZeroReturnError:
            return b""
        except SSL.Error as error:
            raise TlsFault(str(error)) from error

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.tls.send(view[:CHUNK].tobytes()) :]

    def end(self) -> None:
        self.tls.shutdown()

    def fingerprint(self) -> str:
        from cryptography.hazmat.primitives.hashes import SHA256

        certificate = self.tls.get_peer_certificate(as_cryptography=True)
        assert certificate is not None
        return _shown(certificate.fingerprint(SHA256()))

    def binding(self) -> bytes:
        """Return what proofs are bound to."""
        tls = cast(Any, self.tls)  # the stubs ask for a context, which may be left out
        return bytes(tls.export_keying_material(BINDING, 32))


def _shown(digest: bytes) -> str:
    return "SHA256:" + digest.hex(":").upper()


class TlsStream(Stream):
    """A Stream inside TLS; made by `secure`, closes the connection underneath."""

    def __init__(self, stream: Stream, side: Side) -> None:
        super().__init__(stream.sock)
        self.side = side
        self._writing = asyncio.Lock()
        side.take(stream.take_held())

    async def shake(self) -> None:
        """Do the handshake."""
        while True:
            try:
                is_done = self.side.shake()
            finally:
                await self._flush()  # an alert of ours, too
            if is_done:
                return
            await self._feed()

    async def write(self, data: bytes | memoryview) -> None:
        async with self._writing:
            self.side.write(bytes(data))
        await self._flush()

    def finish(self, *, fin: bool = True) -> None:
        """Say close_notify, and FIN unless the peer is to be like the Go program."""
        self._is_finished = True
        self.side.end()
        rest = self.side.give()
        assert self.sock.send(rest) == len(rest), "no room for a close_notify"
        if fin:
            super().finish()

    async def _receive(self, size: int) -> bytes:
        while (data := self.side.read(size)) is None:
            if not self._writing.locked():  # a writer that waits for the peer must not stop us
                await self._flush()  # an answer to a key update
            await self._feed()
        return data

    async def _feed(self) -> None:
        data = await super()._receive(CHUNK)
        if not data:
            raise Truncated("no close_notify before the end")
        self.side.take(data)

    async def _flush(self) -> None:
        async with self._writing:
            while data := self.side.give():
                await super().write(data)

    def _was_reset(self) -> bool:
        return False  # close_notify was the end, whatever became of the connection afterwards


async def secure(stream: Stream, side: Side) -> TlsStream:
    """Put TLS on a connection; closed with the TlsStream, or here if the handshake fails."""
    inner = TlsStream(stream, side)
    try:
        await inner.shake()
    except BaseException:
        inner.close()
        raise
    return inner


# --- contexts ---------------------------------------------------------------------------


def python_server(files: Issued, alpn: str = "") -> ssl.SSLContext:
    """TLS 1.3 for a server; like Go's, it sends session tickets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(files.crt, files.key)
    if alpn:
        context.set_alpn_protocols([alpn])
    return context


def python_client(ca: str | None = None, alpn: str = "") -> ssl.SSLContext:
    """TLS 1.3 for a client; without trust anchors nothing is verified."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if ca is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(ca)
    if alpn:
        context.set_alpn_protocols([alpn])
    return context


def library_server(files: Issued) -> SSL.Context:
    """TLS 1.3 for a server that speaks nodepass/2."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.use_certificate_chain_file(files.crt)
    context.use_privatekey_file(files.key)
    context.set_alpn_select_callback(lambda _, offered: ALPN if ALPN in offered else b"")
    return context


def library_client() -> SSL.Context:
    """TLS 1.3 for a client that verifies nothing."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    return context
