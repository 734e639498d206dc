"""TLS records of one connection whose handshake is done: bytes in, bytes out. Sans-IO.

For the few connections that Python itself reads and writes: first lines, control channels,
and everything on the slow twin. Relays on the native engine never come here.

Ground floor.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, cast

from nodepass.errors import TlsError

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

READ_SIZE: Final = 65536
"""Bytes per call; a record holds at most 16 KiB."""
FEED_SIZE: Final = 16384
"""Bytes given to OpenSSL at once; its buffer for them grows to that and never shrinks."""
MOST_FRUITLESS: Final = 20480
"""Bytes in a row without any plaintext: an unfinished record has up to 17 KiB, tickets and
answers to key updates are small. A key update costs us 7 us and its sender 27 bytes."""
BINDING_LABEL: Final = b"EXPORTER-Channel-Binding"
"""RFC 9266: what both ends of one TLS connection know and nobody in between."""
BINDING_SIZE: Final = 32


class Records:
    """Both directions of one TLS connection.

    Args:
        connection: on memory BIOs, its handshake done; used by nobody else from here on.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._fruitless = 0
        self.has_ended = False
        """Whether the peer has sent its close_notify: no more plaintext will come."""

    def open(self, data: bytes) -> bytes:
        """Take ciphertext and return all plaintext that is complete by now.

        Raises:
            TlsError: a record is bad, the peer has sent an alert, or nothing but records that
                carry no plaintext; `flush` holds what we have to say to it.
        """
        if not data:
            return self._read()  # what the handshake has brought along
        parts: list[bytes] = []
        for start in range(0, len(data), FEED_SIZE):
            piece = data[start : start + FEED_SIZE]
            self.connection.bio_write(piece)
            plain = self._read()
            self._fruitless = 0 if plain else self._fruitless + len(piece)
            if self._fruitless > MOST_FRUITLESS:
                raise TlsError("it sends TLS records that carry nothing")
            parts.append(plain)
        return b"".join(parts)

    def _read(self) -> bytes:
        from OpenSSL import SSL

        parts: list[bytes] = []
        try:
            while True:
                parts.append(self.connection.recv(READ_SIZE))
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self.has_ended = True
        except SSL.Error as exc:
            raise TlsError(f"a TLS record is bad: {reason_of(exc)}") from exc
        return b"".join(parts)

    def seal(self, data: bytes) -> bytes:
        """Return the ciphertext of some plaintext, and what OpenSSL has to say besides.

        Raises:
            TlsError: the connection has failed before, or has been ended.
        """
        from OpenSSL import SSL

        view = memoryview(data)
        try:
            while view:
                view = view[self.connection.send(view[:READ_SIZE].tobytes()) :]
        except SSL.Error as exc:
            raise TlsError(f"TLS cannot be written to: {reason_of(exc)}") from exc
        return self.flush()

    def flush(self) -> bytes:
        """Return what OpenSSL wants to send by itself: alerts, answers to key updates."""
        from OpenSSL import SSL

        parts: list[bytes] = []
        try:
            while True:
                parts.append(self.connection.bio_read(READ_SIZE))
        except SSL.WantReadError:
            return b"".join(parts)

    def end(self) -> bytes:
        """Return our close_notify; nothing may be sealed afterwards."""
        from OpenSSL import SSL

        with contextlib.suppress(SSL.Error):  # it has failed before: its alert is all there is
            self.connection.shutdown()
        return self.flush()

    def binding(self) -> bytes:
        """Return the bytes that proofs are bound to."""
        connection = cast(Any, self.connection)  # the stubs want the context, which is optional
        return bytes(connection.export_keying_material(BINDING_LABEL, BINDING_SIZE))


def reason_of(exc: Exception) -> str:
    """Return OpenSSL's own words from a pyOpenSSL error."""
    errors = exc.args[0] if exc.args else None
    if isinstance(errors, list) and errors:
        return str(errors[0][-1])
    return str(exc) or type(exc).__name__
