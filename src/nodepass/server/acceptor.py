"""Who stands at the tunnel port and has not yet said what it is.

Owns: every accepted connection from the greeting to its first whole line, the deadlines, and
the limits on strangers (docs/protocol.md, "Limits before anyone is trusted"). Runs on
callbacks alone: no task, and a timer or two, so that a stranger costs next to nothing and
one silent connection delays nobody. Called by `server`.

    pending ── [TLS ──] one whole line [── penalty] ──> host.take_opening(pending, hello or claim)
       ├───── data port opened from its address ──> promote() ──> a seed client's control
       └───── deadline, EOF, garbage ──> dropped, counted, told once a minute

Where the greeting asks for TLS, the handshake begins with the far end's first byte and runs in
the engine: whoever says nothing costs no key exchange, and nobody's key exchange delays the
loop. While it runs the socket is the engine's; a connection dropped meanwhile is closed when it
comes back.
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import socket
from typing import TYPE_CHECKING, Final, Protocol

from nodepass.engine.relays import HandshakeResult
from nodepass.errors import EngineError, PeerWireError, TlsError
from nodepass.net import descriptors, hosts, tcp
from nodepass.net.deadlines import Deadlines
from nodepass.net.readiness import Watch
from nodepass.protocol import lines, strangers
from nodepass.protocol.handshake import ServerHandshake
from nodepass.protocol.messages import NONCE_SIZE, VERSION, Greeting, Hello, LinkClaim
from nodepass.tls.codec import Records
from nodepass.tunnel.context import Context

from .pending import PendingConnection
from .throttle import Throttle

if TYPE_CHECKING:
    from nodepass.tls.contexts import ServerTls

MAX_PENDING: Final = 256
"""Unfinished handshakes at once. Measured: 1 KiB each while they say nothing, 50 KiB in the middle
of a TLS handshake, 85 KiB with another record begun, 104 KiB with the handshake done and a record
begun: 26 MiB for all, and no more after thousands of every kind that came and went."""
MAX_PENDING_PER_SOURCE: Final = 64
"""Of one source address: a little more than the 60 links that a client dials at once."""
KNOWN_SHARE: Final = 2
"""A source may have so many times as many for each client that is connected from it: TLS is done
for the client half a round trip before it is for us, so its next 60 links may come before the last
have gone."""
CROWD_SHARE: Final = 3 / 4
"""Of all places, for the clients of one source together, if they are several: the rest is for
others."""
READ_SIZE: Final = 2 * lines.MAX_LINE
"""Bytes per read: a whole first line and some."""
MOST_HEARD: Final = 8192
"""Bytes of TLS records that a first line of 1 KiB may take: two reads and twice as much again."""
TLS_FIRST_BYTE: Final = 0x16
"""Content type of a handshake record: RFC 8446, section 5.1."""


class Host(Protocol):
    """Who takes over what the acceptor has understood: `Sessions`."""

    def take_opening(self, pending: PendingConnection, opening: Hello | LinkClaim) -> None:
        """Take a connection and its first line; the socket is the host's from here on."""

    def count_from(self, source: str) -> int:
        """Count the clients that are connected from a source, as `hosts.source_of` names it."""


class Acceptor:
    """Greet connections and find out what they are.

    Args:
        host: takes them over.
        watch: tells when they say something; the one that links are watched with later.
        throttle: how long a source has to wait for its hello to be looked at.
        key: the stretched password, None where there is none.
        tls: the server's certificate, None = plain.
    """

    def __init__(
        self,
        context: Context,
        host: Host,
        watch: Watch,
        throttle: Throttle,
        key: bytes | None = None,
        tls: ServerTls | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = context.log
        self._counters = context.counters
        self._relays = context.relays
        self._host = host
        self._watch = watch
        self._throttle = throttle
        self._key = key
        self._tls = tls
        self._timeout = context.settings.handshake_timeout
        """Seconds from accept to a whole first line."""
        self._deadlines = Deadlines[PendingConnection](self._timeout, self._expire)
        self._pending: dict[int, PendingConnection] = {}
        self._per_source: dict[str, int] = {}
        self._has_swept = False
        # Strangers must not be able to take all the files that this process may open.
        self._most = max(8, min(MAX_PENDING, descriptors.descriptor_limit() // 8))
        self.data_port = 0
        """What the greeting offers to seed clients; 0 = they are not admitted."""

    def __len__(self) -> int:
        return len(self._pending)

    def admit(self, sock: socket.socket, host: str, port: int) -> None:
        """Greet a fresh connection; it is the acceptor's from here on."""
        source = hosts.source_of(host)
        if self._is_full(source):
            self._sweep()
            if self._is_crowded(source):
                self._evict(source)
            elif self._is_full(source):
                self.make_room()
        nonce = os.urandom(NONCE_SIZE)
        mode = 0 if self._tls is None else self._tls.mode
        greeting = Greeting(self.data_port, mode, nonce, self._key is not None, VERSION)
        handshake = ServerHandshake(greeting, self._key)
        try:
            # A fresh socket's send buffer takes 53 bytes at once, or the peer is gone already.
            sock.send(handshake.greeting_line)
        except OSError:
            self._turn_away(sock, host, "it left before the greeting")
            return
        pending = PendingConnection(sock, host, port, source, handshake, self._loop.time())
        self._pending[sock.fileno()] = pending
        self._per_source[source] = self._per_source.get(source, 0) + 1
        self._deadlines.add(pending)
        pending.on_ready = functools.partial(self._read, pending)
        try:
            self._watch.readable(sock, pending.on_ready)
        except OSError as exc:
            self._leave(pending, f"it cannot be watched: {exc.strerror}")

    def promote(self, host: str, least_silence: float) -> PendingConnection | None:
        """Release the newest silent pending of an address: its data connection has come.

        Args:
            least_silence: seconds; younger ones may still be native, their line on its way.
        """
        self._sweep()
        latest = self._loop.time() - least_silence
        for pending in reversed(self._pending.values()):
            if pending.host == host and pending.is_silent and pending.since <= latest:
                self._release(pending)
                return pending
        return None

    def close(self) -> None:
        """Drop everybody; idempotent."""
        for pending in list(self._pending.values()):
            self._release(pending)
            self._dismiss(pending)
        self._deadlines.close()

    def _is_full(self, source: str) -> bool:
        return self._is_crowded(source) or len(self._pending) >= self._most

    def _is_crowded(self, source: str) -> bool:
        count = self._per_source.get(source, 0)
        if count < MAX_PENDING_PER_SOURCE:
            return False
        clients = self._host.count_from(source)
        own = KNOWN_SHARE * MAX_PENDING_PER_SOURCE
        return count >= (max(own, min(clients * own, CROWD_SHARE * self._most)) if clients else 0)

    def make_room(self) -> None:
        """Drop a connection of the address that holds most, sparing those of clients."""
        if self._per_source:
            strange = [source for source in self._per_source if not self._host.count_from(source)]
            self._evict(max(strange or self._per_source, key=self._per_source.__getitem__))

    def _evict(self, source: str) -> None:
        # Turning the newcomer away instead would let a silent crowd shut out every client behind
        # its address. The largest of three parts gives way, so that neither those who say nothing,
        # nor those who begin and do not end, nor those who guess can push the others out. Of the
        # silent and the guessers anybody: a client may need a round trip longer than a flood
        # needs for a whole crowd. Of those who have begun the oldest, the least likely to end.
        silent: list[PendingConnection] = []
        speaking: list[PendingConnection] = []
        waiting: list[PendingConnection] = []
        for pending in self._pending.values():
            if pending.source == source:
                part = silent if pending.is_silent else speaking
                (part if pending.wait is None else waiting).append(pending)
        crowd = max(silent, speaking, waiting, key=len)
        victim = crowd[0 if crowd is speaking else secrets.randbelow(len(crowd))]
        self._drop(victim, "too many unfinished handshakes")

    def _sweep(self) -> None:
        """Hear those whose line has come but not had its turn of the loop yet.

        A client that refills in a burst may have more connections accepted in one turn than
        the limit allows; that alone makes it no stranger. Once a turn, so that a flood of
        silent connections cannot make us look at all of them again for each new one.
        """
        if self._has_swept:
            return
        self._has_swept = True
        self._loop.call_soon(self._allow_sweep)
        if self._tls is not None:
            self._relays.drain()
        for pending in list(self._pending.values()):
            if pending.shake is not None and pending.shake.result.done():
                self._on_secured(pending, pending.shake.result)
            self._read(pending)

    def _allow_sweep(self) -> None:
        self._has_swept = False

    def _read(self, pending: PendingConnection) -> None:
        # To the very end: it is told but once what has come.
        while pending.shake is None and pending.wait is None and not pending.is_released:
            is_fresh = self._tls is not None and pending.records is None
            try:
                # The first bytes of a TLS handshake are the engine's.
                data = pending.sock.recv(READ_SIZE, socket.MSG_PEEK if is_fresh else 0)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self._drop(pending, "cut short" if pending.said else "it closed without a word")
            elif not is_fresh:
                self._hear(pending, data)
            elif data[0] == TLS_FIRST_BYTE:
                self._secure(pending)
            else:
                self._drop(pending, f"it does not speak TLS; {strangers.identify(data)}")

    def _secure(self, pending: PendingConnection) -> None:
        assert self._tls is not None
        self._watch.remove(pending.sock)
        connection = self._tls.accept(is_native=True)
        try:
            pending.shake = self._relays.shake(pending.sock, connection)
        except EngineError as exc:
            self._drop(pending, str(exc))
            return
        pending.shake.result.add_done_callback(functools.partial(self._on_secured, pending))

    def _on_secured(
        self, pending: PendingConnection, result: asyncio.Future[HandshakeResult]
    ) -> None:
        if pending.shake is None:
            return  # a sweep was here first
        connection, pending.shake = pending.shake.connection, None
        if pending.is_released:
            tcp.reset(pending.sock)
            return
        if result.cancelled():
            self._drop(pending, "the engine has ended")
            return
        from nodepass.tls import contexts

        outcome = result.result()
        if not outcome.is_done:
            broke = outcome.describe_break()
            if broke and self._host.count_from(pending.source):
                self._leave(pending, broke)  # a client that stops in the middle of its refill
            else:
                self._drop(pending, outcome.describe_failure(connection, is_server=True))
            return
        try:
            contexts.check_alpn(connection)
        except TlsError as exc:
            self._drop(pending, str(exc))
            return
        pending.records = Records(connection)
        pending.handshake.binding = pending.records.binding()
        self._hear(pending, b"")  # the first line may have come along with the handshake
        if self._pending.get(pending.sock.fileno()) is pending and pending.wait is None:
            assert pending.on_ready is not None
            try:
                self._watch.readable(pending.sock, pending.on_ready)
            except OSError as exc:
                self._leave(pending, f"it cannot be watched: {exc.strerror}")

    def _hear(self, pending: PendingConnection, data: bytes) -> None:
        try:
            if pending.records is not None:
                pending.heard += len(data)
                if pending.heard > MOST_HEARD:
                    raise PeerWireError("it sends too much before its first line is whole")
                data = pending.records.open(data)
            pending.said = (pending.said + data)[: lines.MAX_LINE]
            opening = pending.handshake.receive(data)
            if opening is None and pending.records is not None and pending.records.has_ended:
                raise PeerWireError("it closed before its first line was whole")
        except (PeerWireError, TlsError) as exc:
            self._drop(pending, str(exc))
            return
        if opening is not None:
            self._weigh(pending, opening)

    def _weigh(self, pending: PendingConnection, opening: Hello | LinkClaim) -> None:
        """Pass an opening on, at once or when its source has served its time."""
        delay = 0.0
        if isinstance(opening, Hello):
            now = self._loop.time()
            # The pending's own patience is no longer than ours: half of it is left for the answer.
            left = pending.since + self._timeout - now
            delay = min(self._throttle.delay(pending.source, now), max(0.0, left / 2))
        if delay:
            self._watch.remove(pending.sock)
            pending.wait = self._loop.call_later(delay, self._open, pending, opening)
        else:
            self._open(pending, opening)

    def _open(self, pending: PendingConnection, opening: Hello | LinkClaim) -> None:
        self._forget(pending)
        # The two hold each other, and would live until the next collection of garbage, with all
        # that its TLS has allocated.
        on_ready, pending.on_ready = pending.on_ready, None
        fd = pending.sock.fileno()
        try:
            self._host.take_opening(pending, opening)
        finally:
            # Not before: an idle link is watched, too.
            if on_ready is not None:
                self._watch.release(fd, on_ready)

    def _expire(self, pending: PendingConnection) -> None:
        if pending.shake is not None:
            self._drop(pending, "its TLS handshake stayed unfinished")
        elif pending.records is not None and not pending.said:
            self._drop(pending, "it said nothing inside TLS")
        elif pending.said:
            self._drop(
                pending, f"its first line stayed unfinished; {strangers.identify(pending.said)}"
            )
        elif self.data_port:
            self._drop(
                pending,
                f"it stayed silent; if it is a NodePass 1.0.3/1.0.4 client, it cannot reach the "
                f"data port {self.data_port}",
            )
        else:
            self._drop(pending, "it stayed silent; seed clients are not admitted here")

    def _drop(self, pending: PendingConnection, why: str) -> None:
        self._release(pending)
        self._dismiss(pending)
        self._tell(pending.host, why)

    def _leave(self, pending: PendingConnection, why: str) -> None:
        self._release(pending)
        self._dismiss(pending)
        self._log.debug("a connection left before it was understood", host=pending.host, why=why)

    def _dismiss(self, pending: PendingConnection) -> None:
        if pending.shake is not None:
            pending.shake.abort()  # closed when the engine has given it back
        elif self._tls is not None and pending.records is None:
            tcp.finish(pending.sock)  # not reset: an alert that says why may be on its way
        else:
            tcp.reset(pending.sock)

    def _turn_away(self, sock: socket.socket, host: str, why: str) -> None:
        tcp.reset(sock)
        self._tell(host, why)

    def _tell(self, host: str, why: str) -> None:
        self._counters.strangers += 1
        key = f"stranger {hosts.source_of(host)}"
        self._log.repeated("warn", key, "turned away", host=host, why=why)

    def _release(self, pending: PendingConnection) -> None:
        self._watch.remove(pending.sock)
        pending.on_ready = None
        self._forget(pending)

    def _forget(self, pending: PendingConnection) -> None:
        pending.is_released = True
        self._deadlines.remove(pending)
        del self._pending[pending.sock.fileno()]
        if pending.wait is not None:
            pending.wait.cancel()
        left = self._per_source[pending.source] - 1
        if left:
            self._per_source[pending.source] = left
        else:
            del self._per_source[pending.source]
