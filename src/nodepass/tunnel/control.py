"""The asyncio face of a control channel: a connection's bytes to and from a Session.

Owns: the control connection once its handshake is done, its timer, and the coalescing of
signals: all that is said in one turn of the loop leaves in one write. Reads so little in one turn
that a peer which never stops delays nobody but itself. Never decides anything; the rules are in
`session`. Called by `server` and `client`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from typing import Final, cast

from nodepass.errors import TlsError, TunnelError
from nodepass.net.tcp import check_room, disarm, finish, is_stalled, limit_silence
from nodepass.protocol.session import MAX_UNSENT, SILENT_PERIODS, Event, Lost, Session
from nodepass.runtime import fork
from nodepass.tls.codec import Records

_UNANSWERED: Final = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH})
"""How a connection ends when nobody answers any more."""
LINES_A_TURN: Final = 64
"""Signals read in one turn of the loop: with a launch in each, some 5 ms."""
READ_SIZE: Final = 16384
"""Bytes read in one turn: 400 launches. Of the smallest TLS records they cost some 3 ms."""


class Control(asyncio.BufferedProtocol):
    """Run a Session over a connected socket until it ends.

    Args:
        session: the rules; its events come out at `on_event`, `Lost` last and once.
        on_event: called in the loop with one event at a time; must not raise.
    """

    def __init__(self, session: Session, on_event: Callable[[Event], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._session = session
        self._on_event = on_event
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_flush_due = False
        self._is_blocked = False
        self._has_told_loss = False
        self._head = b""
        self._records: Records | None = None
        self._is_opening = False
        self._forks = fork.count()
        self._room = memoryview(bytearray(READ_SIZE))
        self._is_paused = False
        """Whether nothing is read from the connection."""
        self._is_reading_on = False
        """Whether `_read_on` is about to be called; nothing more is read before."""
        self._has_ended = False
        """Whether the peer's end has come, maybe behind lines that wait."""
        session.on_output = self._flush_soon
        fork.own(self)

    def disown(self) -> list[int]:
        """Return what a forked child must not touch; it is in one."""
        sock = None if self._transport is None else self._transport.get_extra_info("socket")
        return [] if sock is None else [sock.fileno()]

    async def open(
        self,
        sock: socket.socket,
        interval: float,
        head: bytes = b"",
        records: Records | None = None,
    ) -> None:
        """Take over a connection.

        Args:
            sock: connected, non-blocking; ours from here on, whatever happens.
            interval: report period, seconds.
            head: bytes that were read beyond the handshake, plain.
            records: the connection's TLS, None = it carries plain bytes.

        Raises:
            TunnelError: the kernel has no room to watch one connection more.
            OSError: the connection has gone.
        """
        self._head = head
        self._records = records
        self._is_opening = True
        try:
            # Here the peer always reads, so unacknowledged bytes do mean a dead path.
            limit_silence(sock, SILENT_PERIODS * interval)
            self._take_room(sock)
            await self._loop.create_connection(lambda: self, sock=sock)
        except BaseException:
            self._transport = None  # the loop has closed it, or will
            if isinstance(self._loop, asyncio.SelectorEventLoop) and sock.fileno() >= 0:
                self._loop.remove_reader(sock)
            finish(sock)
            raise
        finally:
            self._is_opening = False
        if self._session.is_open:
            self._tick()
        else:
            self._end()

    def _take_room(self, sock: socket.socket) -> None:
        """Have the kernel watch a connection before the loop does, which could not tell us."""
        try:
            if isinstance(self._loop, asyncio.SelectorEventLoop):
                # Where it watches already, a transport's own reader takes this one's place.
                self._loop.add_reader(sock, _ignore)
            else:
                check_room(sock)
        except OSError as exc:
            raise TunnelError(_no_room(exc)) from exc

    def close(self, reason: str) -> None:
        """End the session from our side: say bye, send what is queued, close. Idempotent."""
        if self._session.is_open:
            self._session.bye(reason)
        self._has_told_loss = True
        self._end()

    @property
    def is_stalled(self) -> bool:
        """Whether the peer has left our bytes unanswered through several resends."""
        sock = None if self._transport is None else self._transport.get_extra_info("socket")
        return sock is not None and is_stalled(sock)

    # ------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._head:
            # Here and not after the await: the loop may read the socket first. It does not read
            # yet, so it cannot be paused; it will in the turn that goes on with this.
            self._is_paused = True
            self._hear(self._head)
            self._is_paused = False

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, count: int) -> None:
        self.data_received(bytes(self._room[:count]))
        if count == READ_SIZE:
            self._read_on_later()  # there is more: in the next turn, when others have had theirs

    def data_received(self, data: bytes) -> None:
        """Take bytes as they came from the connection."""
        records = self._records
        if records is None:
            self._hear(data)
            return
        try:
            plain = records.open(data)
        except TlsError as exc:
            self._cut(str(exc))
            return
        answer = records.flush()
        if answer and self._transport is not None:
            self._transport.write(answer)
            if self._transport.get_write_buffer_size() > MAX_UNSENT:
                self._cut("the other side asks for new keys and reads nothing")
                return
        if plain:
            self._hear(plain)
        if records.has_ended:
            self._hear_end()

    def eof_received(self) -> bool:
        self._hear_end()
        return self._is_reading_on  # then what waits is read first

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._session.has_more:  # what it said before it went counts
            self._deliver(self._session.read_on(self._loop.time()))
        reason = _describe(exc) if exc is not None else "the connection was closed"
        is_silence = isinstance(exc, OSError) and exc.errno in _UNANSWERED
        self._deliver(self._session.cut(reason, self._loop.time(), is_silence=is_silence))
        self._end()

    def pause_writing(self) -> None:
        self._is_blocked = True

    def resume_writing(self) -> None:
        self._is_blocked = False
        self._flush()

    # --------------------------------------------------------------------- private

    def _cut(self, reason: str) -> None:
        self._session.data_to_send()  # what is queued can be neither sealed nor sent any more
        self._deliver(self._session.cut(reason, self._loop.time()))

    def _hear(self, data: bytes) -> None:
        # While lines wait nothing is read, so more comes only from a loop that read ahead.
        most = 1 if self._session.has_more else LINES_A_TURN
        self._deliver(self._session.receive_data(data, self._loop.time(), most))
        if self._session.has_more:
            self._read_on_later()

    def _hear_end(self) -> None:
        self._has_ended = True
        if not self._session.has_more:
            self._deliver(self._session.receive_data(b"", self._loop.time()))

    def _read_on_later(self) -> None:
        if not self._is_reading_on and self._transport is not None:
            self._is_reading_on = True
            self._loop.call_soon(self._read_on)
            self._pause()

    def _pause(self) -> None:
        if self._transport is None or self._is_paused or self._transport.is_closing():
            return
        self._is_paused = True
        self._transport.pause_reading()

    def _read_on(self) -> None:
        self._is_reading_on = False
        if self._session.has_more:
            self._deliver(self._session.read_on(self._loop.time(), LINES_A_TURN))
        if self._session.has_more:
            self._read_on_later()
        elif self._has_ended:
            self._hear_end()
        elif self._is_paused and self._transport is not None:
            self._is_paused = False
            if not self._transport.is_closing():
                self._resume(self._transport)

    def _resume(self, transport: asyncio.Transport) -> None:
        """Have the connection watched again, for which there may be no room any more."""
        try:
            if not isinstance(self._loop, asyncio.SelectorEventLoop):
                check_room(transport.get_extra_info("socket"))
            transport.resume_reading()
        except OSError as exc:
            self._cut(_no_room(exc))

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Lost):
                self._end()
                if self._has_told_loss:
                    continue
                self._has_told_loss = True
            self._on_event(event)

    def _tick(self) -> None:
        self._timer = None
        if self._forks != fork.count():
            return  # the session is the parent's
        self._deliver(self._session.tick(self._loop.time()))
        if self._session.is_open:
            self._timer = self._loop.call_at(self._session.next_tick(), self._tick)

    def _flush_soon(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        # While the peer does not read, signals stay with the session, which counts them and
        # gives up on the peer when there are too many.
        if self._transport is None or self._is_blocked:
            return
        data = self._session.data_to_send()
        if not data:
            return
        if self._records is not None:
            try:
                data = self._records.seal(data)
            except TlsError as exc:
                self._cut(str(exc))
                return
        try:
            self._transport.write(data)
        except OSError as exc:  # what is left would have to be watched for
            self._cut(_no_room(exc))

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # Never within connection_made: uvloop hands the socket over only after that, and would
        # later close a number that belongs to a stranger by then. `open` comes back to this.
        if self._transport is not None and not self._is_opening:
            self._is_blocked = False
            self._flush()
            transport, self._transport = self._transport, None
            if self._records is not None:
                with contextlib.suppress(OSError):
                    transport.write(self._records.end())
            sock = transport.get_extra_info("socket")
            # Not of one that is closing by itself: its number may be a stranger's by now.
            if sock is not None and not transport.is_closing():
                disarm(sock)  # the last lines are to arrive
            transport.close()
            if transport.get_write_buffer_size():
                transport.abort()  # a peer that takes no more must not keep the socket alive


def _ignore() -> None:
    pass


def _no_room(exc: OSError) -> str:
    why = os.strerror(exc.errno or errno.EIO).lower()
    hint = ": raise fs.epoll.max_user_watches" if exc.errno == errno.ENOSPC else ""
    return f"this kernel cannot watch one connection more ({why}{hint})"


def _describe(exc: Exception) -> str:
    known = exc.strerror if isinstance(exc, OSError) else None  # without "[Errno 104]"
    return (known or str(exc)).lower()
