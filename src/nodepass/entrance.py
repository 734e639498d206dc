"""Who stands at the tunnel port and has not yet said what it is.

Owns: every accepted connection from the greeting to its first whole line, the deadlines, and
the limits on strangers (docs/protocol.md, "Limits before anyone is trusted"). Runs on
callbacks alone: no task, no timer beyond one, so that a stranger costs next to nothing and
one silent connection delays nobody. Called by `server`.

    caller ── one whole line ──> on_opening(caller, hello or link claim)
       ├───── data port opened from its address ──> promote() ──> a seed client's control
       └───── deadline, EOF, garbage ──> dropped, counted, told once a minute
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from typing import Final

from . import net, wire
from .errors import PeerWireError
from .handshake import ServerHandshake
from .log import Log
from .message import NONCE_SIZE, VERSION, Greeting, Hello, LinkClaim
from .stats import Counters

MAX_CALLERS: Final = 256
"""Unfinished handshakes at once: what 256 strangers cost is some 2 KiB each."""
MAX_CALLERS_PER_SOURCE: Final = 64
"""Of one source address: twice what a client needs to refill in parallel."""
READ_SIZE: Final = 2 * wire.MAX_LINE
"""Bytes per read: a whole first line and some."""


class Caller:
    """One connection that has been greeted and not yet understood."""

    __slots__ = ("deadline", "handshake", "host", "port", "said", "since", "sock", "source")

    def __init__(
        self,
        sock: socket.socket,
        host: str,
        port: int,
        handshake: ServerHandshake,
        since: float,
    ) -> None:
        self.sock = sock
        self.host = host
        self.source = net.source_of(host)
        self.port = port
        self.handshake = handshake
        self.since = since
        """Seconds of the loop's clock at which it was greeted."""
        self.deadline: asyncio.TimerHandle | None = None
        self.said = b""
        """What it wrote so far, at most one line."""

    @property
    def address(self) -> str:
        return net.join_address(self.host, self.port)


class Entrance:
    """Greet connections and find out what they are.

    Args:
        timeout: seconds from accept to a whole first line.
        on_opening: called with the caller, whose socket is then the hearer's, and its line.
        is_known: tells whether a client is connected from a source (`net.source_of`).
        counters: `strangers` grows by each connection that is turned away.
    """

    def __init__(
        self,
        log: Log,
        timeout: float,
        on_opening: Callable[[Caller, Hello | LinkClaim], None],
        is_known: Callable[[str], bool],
        counters: Counters,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._timeout = timeout
        self._on_opening = on_opening
        self._is_known = is_known
        self._counters = counters
        self._callers: dict[int, Caller] = {}
        self._per_source: dict[str, int] = {}
        self._has_swept = False
        # Strangers must not be able to take all the files that this process may open.
        self._most = max(8, min(MAX_CALLERS, net.descriptor_limit() // 8))
        self.data_port = 0
        """What the greeting offers to seed clients; 0 = they are not admitted."""

    def __len__(self) -> int:
        return len(self._callers)

    def admit(self, sock: socket.socket, host: str, port: int) -> None:
        """Greet a fresh connection; it is the entrance's from here on."""
        source = net.source_of(host)
        if self._is_full(source):
            self._sweep()
            if self._per_source.get(source, 0) >= MAX_CALLERS_PER_SOURCE:
                self._evict(source)
            elif self._is_full(source):
                self.make_room()
        nonce = secrets.token_bytes(NONCE_SIZE)
        handshake = ServerHandshake(Greeting(self.data_port, 0, nonce, False, VERSION))
        try:
            # A fresh socket's send buffer takes 53 bytes at once, or the peer is gone already.
            sock.send(handshake.greeting_line)
        except OSError:
            self._turn_away(sock, host, "it left before the greeting")
            return
        caller = Caller(sock, host, port, handshake, self._loop.time())
        self._callers[sock.fileno()] = caller
        self._per_source[source] = self._per_source.get(source, 0) + 1
        self._loop.add_reader(sock.fileno(), self._read, caller)
        caller.deadline = self._loop.call_later(self._timeout, self._expire, caller)

    def promote(self, host: str, least_silence: float) -> Caller | None:
        """Release the newest silent caller of an address: its data connection has come.

        Args:
            least_silence: seconds; younger callers may still be native ones whose line is
                on its way.
        """
        self._sweep()
        latest = self._loop.time() - least_silence
        for caller in reversed(self._callers.values()):
            if caller.host == host and not caller.said and caller.since <= latest:
                self._release(caller)
                return caller
        return None

    def close(self) -> None:
        """Drop everybody; idempotent."""
        for caller in list(self._callers.values()):
            self._release(caller)
            net.reset(caller.sock)

    def _is_full(self, source: str) -> bool:
        if self._per_source.get(source, 0) >= MAX_CALLERS_PER_SOURCE:
            return True
        return len(self._callers) >= self._most

    def make_room(self) -> None:
        """Drop the oldest caller of the address that holds most, sparing those of clients."""
        if self._per_source:
            strange = [source for source in self._per_source if not self._is_known(source)]
            self._evict(max(strange or self._per_source, key=self._per_source.__getitem__))

    def _evict(self, source: str) -> None:
        # A client needs a round trip, a stranger may stay for HANDSHAKE_TIMEOUT: whoever has
        # stood here longest is the one least likely to be wanted. Turning the newcomer away
        # instead would let a silent crowd shut out every client behind its address.
        oldest = next(caller for caller in self._callers.values() if caller.source == source)
        self._release(oldest)
        self._turn_away(oldest.sock, oldest.host, "too many unfinished handshakes")

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
        for caller in list(self._callers.values()):
            self._read(caller)

    def _allow_sweep(self) -> None:
        self._has_swept = False

    def _read(self, caller: Caller) -> None:
        try:
            data = caller.sock.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._drop(caller, "it closed without a word" if not caller.said else "cut short")
            return
        caller.said = (caller.said + data)[: wire.MAX_LINE]
        try:
            opening = caller.handshake.receive(data)
        except PeerWireError as exc:
            self._drop(caller, str(exc))
            return
        if opening is not None:
            self._release(caller)
            self._on_opening(caller, opening)

    def _expire(self, caller: Caller) -> None:
        if caller.said:
            self._drop(caller, f"its first line stayed unfinished; {wire.identify(caller.said)}")
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
        self._turn_away(caller.sock, caller.host, why)

    def _turn_away(self, sock: socket.socket, host: str, why: str) -> None:
        net.reset(sock)
        self._counters.strangers += 1
        key = f"stranger {net.source_of(host)}"
        self._log.repeated("warn", key, "turned away", host=host, why=why)

    def _release(self, caller: Caller) -> None:
        fd = caller.sock.fileno()
        self._loop.remove_reader(fd)
        del self._callers[fd]
        if caller.deadline is not None:
            caller.deadline.cancel()
        left = self._per_source[caller.source] - 1
        if left:
            self._per_source[caller.source] = left
        else:
            del self._per_source[caller.source]
