"""What the slow twin's flows have on their two sides, plain or TLS, and its TLS handshakes.

Part of `engine`, which describes the whole; nobody else comes here. TLS is a pyOpenSSL
Connection on memory BIOs; errors of TLS come out as OSError, like those of a socket.

Ground floor. OpenSSL is loaded at the first use of TLS, not with this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import importlib
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nodepass.tls import _openssl
from nodepass.tls.codec import Records, reason_of

from .pulse import Pulse

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

NO_SIGNAL: Final[int] = getattr(socket, "MSG_NOSIGNAL", 0)
RECORD_BYTES: Final = 16384  # plaintext of the largest TLS record (RFC 8446, section 5.1)
ERR_LIB_SSL: Final = 20  # OpenSSL's err.h: a packed code is library << 23 | reason
ERR_LIB_SHIFT: Final = 23
MAX_REASON: Final = 4096  # above the largest SSL_R_* number
FRUITLESS_BYTES: Final = 65536  # of a read: four records, of which an honest peer has one for us
MAX_ANSWERS: Final = 65536  # bytes that wait for a peer: 2400 key updates asked for and unread


class TlsFault(OSError):
    """TLS with one side failed; `detail` is OpenSSL's packed error code, 0 = none."""

    def __init__(self, detail: int) -> None:
        super().__init__(errno.EBADMSG, "TLS failed")
        self.detail = detail


def trouble() -> str | None:
    """Say in a clause what TLS lacks here, or None."""
    try:
        importlib.import_module("OpenSSL.SSL")
    except (ImportError, AttributeError) as exc:  # the latter: beside another cryptography
        return f"pyOpenSSL cannot be loaded ({exc})"
    return None


def is_usable(value: object) -> bool:
    """Tell whether this is a Connection that TLS can run on: one on memory BIOs."""
    from OpenSSL import SSL

    if not isinstance(value, SSL.Connection):
        return False
    try:
        # It passes on what it has not to its socket, where it has one.
        return not hasattr(value, "fileno")
    except RecursionError:  # it was never initialised
        return False


def fault(exc: Exception) -> TlsFault:
    """Return the fault behind a pyOpenSSL error."""
    return TlsFault(_codes().get(reason_of(exc), 0))


@functools.cache
def _codes() -> dict[str, int]:
    """Map OpenSSL's words to its numbers, of which pyOpenSSL keeps only the words."""
    try:
        packed = [ERR_LIB_SSL << ERR_LIB_SHIFT | reason for reason in range(1, MAX_REASON)]
        # Numbers that mean nothing have no words.
        return {words: code for code in packed if (words := _openssl.describe(code))}
    except _openssl.Moved:
        return {}


class Leg:
    """One side of a flow that speaks plain TCP."""

    __slots__ = ("active", "parked", "pulse", "sock")

    can_outlive_reset = False
    """Whether what a reset connection has said can still be told whole from cut."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.active = 0.0
        """When the socket last took something, on the monotonic clock."""
        self.parked = memoryview(b"")
        self.pulse = Pulse(sock)

    @property
    def has_more(self) -> bool:
        """Whether `receive` has something to say although the socket may stay silent."""
        return False

    @property
    def is_stalled(self) -> bool:
        """Whether what is parked waits for something else than room in the socket."""
        return False

    @property
    def backlog(self) -> int:
        """Bytes that wait for the socket."""
        return len(self.parked)

    def receive(self, room: memoryview) -> memoryview:
        """Return what has come, which may lie in `room`; nothing at all = the end.

        Raises:
            BlockingIOError: nothing for now.
            OSError: the side is broken.
        """
        return room[: self.sock.recv_into(room)]

    def park(self, data: memoryview) -> None:
        """Keep bytes of the flow to be sent first."""
        self.parked = data

    def send(self, data: memoryview) -> int:
        """Send, or park what the socket does not take; return how many bytes it took."""
        sent = self._try(data)
        if sent < len(data):
            self.parked = memoryview(bytes(data[sent:]))
        return sent

    def flush(self) -> int:
        """Send what is parked; return how many bytes of the flow the socket took."""
        sent = self._try(self.parked)
        self.parked = self.parked[sent:]
        return sent

    def say_end(self) -> int:
        """Send what goes before the end of the stream; nothing is parked yet."""
        return 0

    def shut(self) -> None:
        """Send the end of the stream."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            gone = errno.ECONNRESET if exc.errno == errno.ENOTCONN else exc.errno
            raise OSError(code or gone, "") from exc

    def _try(self, data: memoryview) -> int:
        try:
            sent = self.sock.send(data, NO_SIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        self.active = time.monotonic()
        return sent


class TlsLeg(Leg):
    """One side of a flow that speaks TLS, its handshake done.

    Args:
        sock: the connection.
        connection: what lies inside it comes before what the socket brings.
    """

    __slots__ = ("_failure", "_has_looked", "_is_ended", "_outbox", "_records", "_unsealed")

    can_outlive_reset = True

    def __init__(self, sock: socket.socket, connection: Connection) -> None:
        super().__init__(sock)
        self._records = Records(connection)
        self._outbox: deque[tuple[memoryview, int]] = deque()
        """Ciphertext, and how many bytes of the flow have arrived when all of it is sent."""
        self._unsealed = memoryview(b"")
        """Bytes of the flow that OpenSSL does not take while it has read half a message."""
        self._failure: TlsFault | None = None
        self._has_looked = False
        self._is_ended = False
        """Whether we have said our end."""
        self._queue(self._records.flush())

    @property
    def has_more(self) -> bool:
        """True before the first look inside, and from the end on."""
        return not self._has_looked or self._records.has_ended or self._failure is not None

    @property
    def backlog(self) -> int:
        return sum(len(data) for data, _ in self._outbox) + len(self._unsealed)

    @property
    def is_stalled(self) -> bool:
        return bool(self._unsealed) and not self._outbox

    def receive(self, room: memoryview) -> memoryview:
        plain = self._open(b"") if not self._has_looked else b""
        self._has_looked = True
        if not plain and not self.has_more:
            size = self.sock.recv_into(room)
            if not size:
                raise OSError(errno.ENODATA, "the stream was cut: no close_notify")
            plain = self._open(room[:size].tobytes())
            if size >= FRUITLESS_BYTES and not plain and not self.has_more:
                raise OSError(errno.ENOBUFS, "the peer talks much and says nothing")
        self._take_words()
        if sum(len(data) for data, size in self._outbox if not size) > MAX_ANSWERS:
            raise OSError(errno.ENOBUFS, "the peer asks much and reads no answer")
        if not plain:
            if self._failure is not None:
                raise self._failure
            if not self._records.has_ended:
                raise BlockingIOError(errno.EAGAIN, "no whole record")
        return memoryview(plain)

    def _open(self, data: bytes) -> bytes:
        """Return all plaintext up to a bad record or the end, and note either.

        Records.open would keep back what came before a bad record.
        """
        from OpenSSL import SSL

        connection, parts = self._records.connection, []
        if data:
            connection.bio_write(data)
        try:
            while True:
                parts.append(connection.recv(RECORD_BYTES))
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self._records.has_ended = True
        except SSL.Error as exc:
            self._failure = fault(exc)
        return b"".join(parts)

    def park(self, data: memoryview) -> None:
        from OpenSSL import SSL

        while data:
            piece = data[:RECORD_BYTES].tobytes()
            try:
                self._records.connection.send(piece)  # takes all of a record or nothing
            except SSL.WantReadError:
                break
            except SSL.Error as exc:  # reading has failed: the connection is dead both ways
                raise self._failure or fault(exc) from exc
            self._queue(self._records.flush(), len(piece))
            data = data[RECORD_BYTES:]
        self._unsealed = memoryview(bytes(data))

    def send(self, data: memoryview) -> int:
        self.park(data)
        return self.flush()

    def flush(self) -> int:
        """Send what is parked, behind it an alert or an answer that OpenSSL wants to send."""
        self.park(self._unsealed)
        self._take_words()
        delivered = 0
        while self._outbox:
            data, size = self._outbox[0]
            try:
                sent = self._try(data)
            except OSError:
                if delivered:
                    break  # it counts; the next attempt meets the same error
                if not self._is_ended or any(size for _, size in self._outbox):
                    raise
                # Only our end is unsaid, and nobody is there to hear it: a peer that has said its
                # own may close at once. Whether it has, reading tells.
                self._outbox.clear()
                break
            if sent < len(data):
                self._outbox[0] = data[sent:], size
                break
            self._outbox.popleft()
            delivered += size
        return delivered

    def say_end(self) -> int:
        words = self._records.end()
        if not words:
            raise self._failure or TlsFault(0)
        self._queue(words)
        self._is_ended = True
        return self.flush()

    def shut(self) -> None:
        with contextlib.suppress(OSError):  # see flush
            super().shut()

    def _take_words(self) -> None:
        """Queue what OpenSSL says by itself: alerts, and answers to key updates."""
        words = self._records.flush()
        if not self._is_ended:
            self._queue(words)

    def _queue(self, data: bytes, size: int = 0) -> None:
        if data:
            self._outbox.append((memoryview(data), size))


class HandshakeFlow:
    """A TLS handshake on a borrowed socket.

    Args:
        loop: the running loop.
        sock: around the borrowed descriptor; detached before the end is reported.
        connection: told already whether it accepts or connects.
        report: called once with None (done), or with what went wrong.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        connection: Connection,
        report: Callable[[OSError | None], None],
    ) -> None:
        self._loop = loop
        self._leg = Leg(sock)
        self._connection = connection
        self._report = report
        self._is_done = False
        self._is_over = False
        loop.add_reader(sock, self._read)
        # Our first words, or what lies in the Connection already: no event tells of either.
        loop.call_soon(self._step)

    def _read(self) -> None:
        try:
            data = self._leg.sock.recv(RECORD_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self.end(exc)
            return
        if not data:
            self.end(OSError(errno.ENODATA, "the peer closed in the middle"))
            return
        self._connection.bio_write(data)
        self._step()

    def _step(self) -> None:
        """Go as far as the bytes that are here allow."""
        from OpenSSL import SSL

        if self._is_over:
            return
        failure: OSError | None = None
        try:
            self._connection.do_handshake()
            self._is_done = True
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            failure = OSError(errno.ENODATA, "the peer ended TLS in the middle")
        except SSL.Error as exc:
            failure = fault(exc)
        words = memoryview(bytes(self._leg.parked) + Records(self._connection).flush())
        try:
            self._leg.parked = words
            self._leg.flush()
        except OSError as exc:
            self.end(failure or exc)
            return
        if failure is not None:
            self.end(failure)
        else:
            self._watch()

    def _write(self) -> None:
        try:
            self._leg.flush()
        except OSError as exc:
            self.end(exc)
            return
        self._watch()

    def _watch(self) -> None:
        """Watch the socket for what is missing; whatever is here was used."""
        sock, backlog = self._leg.sock, self._leg.backlog
        if self._is_done and not backlog:
            self.end(None)
            return
        if self._is_done:
            # What comes now is data: it stays in the socket until the caller has it back.
            self._loop.remove_reader(sock)
        if backlog:
            self._loop.add_writer(sock, self._write)
        else:
            self._loop.remove_writer(sock)

    def forget(self) -> None:
        """Leave the event loop and the socket."""
        self._is_over = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._leg.sock)
            self._loop.remove_writer(self._leg.sock)
        self._leg.sock.detach()

    def end(self, exc: OSError | None) -> None:
        """Give the socket back and report."""
        self.forget()
        self._report(exc)
