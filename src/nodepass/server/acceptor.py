"""Who stands at the tunnel port and has not yet said what it is.

Owns: every accepted connection from the greeting to its first whole line, the deadlines, and
the limits on strangers (docs/protocol.md, "Limits before anyone is trusted"). Runs on
callbacks alone: no task, and a timer or two, so that a stranger costs next to nothing and
one silent connection delays nobody. Called by `server`.

    caller ── [TLS ──] one whole line [── penalty] ──> on_opening(caller, hello or link claim)
       ├───── data port opened from its address ──> promote() ──> a seed client's control
       └───── deadline, EOF, garbage ──> dropped, counted, told once a minute

Where the greeting asks for TLS, the handshake begins with the caller's first byte and runs in
the engine: whoever says nothing costs no key exchange, and nobody's key exchange delays the
loop. While it runs the socket is the engine's; a caller dropped meanwhile is closed when it
comes back.
"""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nodepass.engine.relays import HandshakeResult, Relays
from nodepass.errors import EngineError, PeerWireError, TlsError
from nodepass.net import tcp
from nodepass.net.deadlines import Patience
from nodepass.net.readiness import Watch
from nodepass.observe.log import Log
from nodepass.observe.stats import Counters
from nodepass.protocol import lines
from nodepass.protocol.handshake import ServerHandshake
from nodepass.protocol.messages import NONCE_SIZE, VERSION, Greeting, Hello, LinkClaim
from nodepass.tls.codec import Records

from .pending import Caller
from .throttle import Penalties

if TYPE_CHECKING:
    from nodepass.tls.contexts import ServerTls

MAX_CALLERS: Final = 256
"""Unfinished handshakes at once. Measured: 1 KiB each while they say nothing, 50 KiB in the middle
of a TLS handshake, 85 KiB with another record begun, 104 KiB with the handshake done and a record
begun: 26 MiB for all, and no more after thousands of every kind that came and went."""
MAX_CALLERS_PER_SOURCE: Final = 64
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


class Entrance:
    """Greet connections and find out what they are.

    Args:
        timeout: seconds from accept to a whole first line.
        on_opening: called with the caller, whose socket is then the hearer's, and its line.
        count_clients: tells how many clients are connected from a source (`tcp.source_of`).
        counters: `strangers` grows by each connection that is turned away.
        relays: do the TLS handshakes.
        watch: tells when callers say something; the one that links are watched with later.
        key: the stretched password, None where there is none.
        tls: the server's certificate, None = plain.
        penalties: how long a source has to wait for its hello to be looked at.
    """

    def __init__(
        self,
        log: Log,
        timeout: float,
        on_opening: Callable[[Caller, Hello | LinkClaim], None],
        count_clients: Callable[[str], int],
        counters: Counters,
        relays: Relays,
        watch: Watch,
        key: bytes | None = None,
        tls: ServerTls | None = None,
        penalties: Penalties | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._relays = relays
        self._key = key
        self._tls = tls
        self._penalties = Penalties() if penalties is None else penalties
        self._watch = watch
        self._log = log
        self._timeout = timeout
        self._patience = Patience[Caller](timeout, self._expire)
        self._on_opening = on_opening
        self._count_clients = count_clients
        self._counters = counters
        self._callers: dict[int, Caller] = {}
        self._per_source: dict[str, int] = {}
        self._has_swept = False
        # Strangers must not be able to take all the files that this process may open.
        self._most = max(8, min(MAX_CALLERS, tcp.descriptor_limit() // 8))
        self.data_port = 0
        """What the greeting offers to seed clients; 0 = they are not admitted."""

    def __len__(self) -> int:
        return len(self._callers)

    def admit(self, sock: socket.socket, host: str, port: int) -> None:
        """Greet a fresh connection; it is the entrance's from here on."""
        source = tcp.source_of(host)
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
        caller = Caller(sock, host, port, source, handshake, self._loop.time())
        self._callers[sock.fileno()] = caller
        self._per_source[source] = self._per_source.get(source, 0) + 1
        self._patience.add(caller)
        caller.on_ready = functools.partial(self._read, caller)
        try:
            self._watch.readable(sock, caller.on_ready)
        except OSError as exc:
            self._leave(caller, f"it cannot be watched: {exc.strerror}")

    def promote(self, host: str, least_silence: float) -> Caller | None:
        """Release the newest silent caller of an address: its data connection has come.

        Args:
            least_silence: seconds; younger callers may still be native ones whose line is
                on its way.
        """
        self._sweep()
        latest = self._loop.time() - least_silence
        for caller in reversed(self._callers.values()):
            if caller.host == host and caller.is_silent and caller.since <= latest:
                self._release(caller)
                return caller
        return None

    def close(self) -> None:
        """Drop everybody; idempotent."""
        for caller in list(self._callers.values()):
            self._release(caller)
            self._dismiss(caller)
        self._patience.close()

    def _is_full(self, source: str) -> bool:
        return self._is_crowded(source) or len(self._callers) >= self._most

    def _is_crowded(self, source: str) -> bool:
        count = self._per_source.get(source, 0)
        if count < MAX_CALLERS_PER_SOURCE:
            return False
        clients = self._count_clients(source)
        own = KNOWN_SHARE * MAX_CALLERS_PER_SOURCE
        return count >= (max(own, min(clients * own, CROWD_SHARE * self._most)) if clients else 0)

    def make_room(self) -> None:
        """Drop a caller of the address that holds most, sparing those of clients."""
        if self._per_source:
            strange = [source for source in self._per_source if not self._count_clients(source)]
            self._evict(max(strange or self._per_source, key=self._per_source.__getitem__))

    def _evict(self, source: str) -> None:
        # Turning the newcomer away instead would let a silent crowd shut out every client behind
        # its address. The largest of three parts gives way, so that neither those who say nothing,
        # nor those who begin and do not end, nor those who guess can push the others out. Of the
        # silent and the guessers anybody: a client may need a round trip longer than a flood
        # needs for a whole crowd. Of those who have begun the oldest, the least likely to end.
        silent: list[Caller] = []
        speaking: list[Caller] = []
        waiting: list[Caller] = []
        for caller in self._callers.values():
            if caller.source == source:
                part = silent if caller.is_silent else speaking
                (part if caller.wait is None else waiting).append(caller)
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
        for caller in list(self._callers.values()):
            if caller.shake is not None and caller.shake.result.done():
                self._on_secured(caller, caller.shake.result)
            self._read(caller)

    def _allow_sweep(self) -> None:
        self._has_swept = False

    def _read(self, caller: Caller) -> None:
        # To the very end: it is told but once what has come.
        while caller.shake is None and caller.wait is None and not caller.is_released:
            is_fresh = self._tls is not None and caller.records is None
            try:
                # The first bytes of a TLS handshake are the engine's.
                data = caller.sock.recv(READ_SIZE, socket.MSG_PEEK if is_fresh else 0)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self._drop(caller, "cut short" if caller.said else "it closed without a word")
            elif not is_fresh:
                self._hear(caller, data)
            elif data[0] == TLS_FIRST_BYTE:
                self._secure(caller)
            else:
                self._drop(caller, f"it does not speak TLS; {lines.identify(data)}")

    def _secure(self, caller: Caller) -> None:
        assert self._tls is not None
        self._watch.remove(caller.sock)
        connection = self._tls.accept(is_native=True)
        try:
            caller.shake = self._relays.shake(caller.sock, connection)
        except EngineError as exc:
            self._drop(caller, str(exc))
            return
        caller.shake.result.add_done_callback(functools.partial(self._on_secured, caller))

    def _on_secured(self, caller: Caller, result: asyncio.Future[HandshakeResult]) -> None:
        if caller.shake is None:
            return  # a sweep was here first
        connection, caller.shake = caller.shake.connection, None
        if caller.is_released:
            tcp.reset(caller.sock)
            return
        if result.cancelled():
            self._drop(caller, "the engine has ended")
            return
        from nodepass.tls import contexts

        outcome = result.result()
        if not outcome.is_done:
            broke = outcome.describe_break()
            if broke and self._count_clients(caller.source):
                self._leave(caller, broke)  # a client that stops in the middle of its refill
            else:
                self._drop(
                    caller, broke or contexts.explain(connection, outcome.detail, is_server=True)
                )
            return
        try:
            contexts.check_alpn(connection)
        except TlsError as exc:
            self._drop(caller, str(exc))
            return
        caller.records = Records(connection)
        caller.handshake.binding = caller.records.binding()
        self._hear(caller, b"")  # the first line may have come along with the handshake
        if self._callers.get(caller.sock.fileno()) is caller and caller.wait is None:
            assert caller.on_ready is not None
            try:
                self._watch.readable(caller.sock, caller.on_ready)
            except OSError as exc:
                self._leave(caller, f"it cannot be watched: {exc.strerror}")

    def _hear(self, caller: Caller, data: bytes) -> None:
        try:
            if caller.records is not None:
                caller.heard += len(data)
                if caller.heard > MOST_HEARD:
                    raise PeerWireError("it sends too much before its first line is whole")
                data = caller.records.open(data)
            caller.said = (caller.said + data)[: lines.MAX_LINE]
            opening = caller.handshake.receive(data)
            if opening is None and caller.records is not None and caller.records.has_ended:
                raise PeerWireError("it closed before its first line was whole")
        except (PeerWireError, TlsError) as exc:
            self._drop(caller, str(exc))
            return
        if opening is not None:
            self._weigh(caller, opening)

    def _weigh(self, caller: Caller, opening: Hello | LinkClaim) -> None:
        """Pass an opening on, at once or when its source has served its time."""
        delay = 0.0
        if isinstance(opening, Hello):
            now = self._loop.time()
            # The caller's own patience is no longer than ours: half of it is left for the answer.
            left = caller.since + self._timeout - now
            delay = min(self._penalties.delay(caller.source, now), max(0.0, left / 2))
        if delay:
            self._watch.remove(caller.sock)
            caller.wait = self._loop.call_later(delay, self._open, caller, opening)
        else:
            self._open(caller, opening)

    def _open(self, caller: Caller, opening: Hello | LinkClaim) -> None:
        self._forget(caller)
        # It holds the caller as the caller holds it, and would outlive him until the next
        # collection, with all that his TLS has allocated.
        on_ready, caller.on_ready = caller.on_ready, None
        fd = caller.sock.fileno()
        try:
            self._on_opening(caller, opening)
        finally:
            # Not before: a link that goes to a shelf is watched there, too.
            if on_ready is not None:
                self._watch.release(fd, on_ready)

    def _expire(self, caller: Caller) -> None:
        if caller.shake is not None:
            self._drop(caller, "its TLS handshake stayed unfinished")
        elif caller.records is not None and not caller.said:
            self._drop(caller, "it said nothing inside TLS")
        elif caller.said:
            self._drop(caller, f"its first line stayed unfinished; {lines.identify(caller.said)}")
        elif self.data_port:
            self._drop(
                caller,
                f"it stayed silent; if it is a NodePass 1.0.3/1.0.4 client, it cannot reach the "
                f"data port {self.data_port}",
            )
        else:
            self._drop(caller, "it stayed silent; seed clients are not admitted here")

    def _drop(self, caller: Caller, why: str) -> None:
        self._release(caller)
        self._dismiss(caller)
        self._tell(caller.host, why)

    def _leave(self, caller: Caller, why: str) -> None:
        self._release(caller)
        self._dismiss(caller)
        self._log.debug("a caller left", host=caller.host, why=why)

    def _dismiss(self, caller: Caller) -> None:
        if caller.shake is not None:
            caller.shake.abort()  # closed when the engine has given it back
        elif self._tls is not None and caller.records is None:
            tcp.finish(caller.sock)  # not reset: an alert that says why may be on its way
        else:
            tcp.reset(caller.sock)

    def _turn_away(self, sock: socket.socket, host: str, why: str) -> None:
        tcp.reset(sock)
        self._tell(host, why)

    def _tell(self, host: str, why: str) -> None:
        self._counters.strangers += 1
        key = f"stranger {tcp.source_of(host)}"
        self._log.repeated("warn", key, "turned away", host=host, why=why)

    def _release(self, caller: Caller) -> None:
        self._watch.remove(caller.sock)
        caller.on_ready = None
        self._forget(caller)

    def _forget(self, caller: Caller) -> None:
        caller.is_released = True
        self._patience.remove(caller)
        del self._callers[caller.sock.fileno()]
        if caller.wait is not None:
            caller.wait.cancel()
        left = self._per_source[caller.source] - 1
        if left:
            self._per_source[caller.source] = left
        else:
            del self._per_source[caller.source]
