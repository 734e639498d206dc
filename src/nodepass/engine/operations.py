"""What the engine has been given, and how that ended.

    Relay       two streams joined
    Handshake   a TLS handshake under way
    Gate        a bound UDP socket, whose sources become newcomers
    UdpRelay    the datagrams of one UDP visitor, joined with a link

Made by `relays` and held by `server`, `client` and their kin. A reset, a lost datagram and an idle
time-out are results, not errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Protocol, TypeVar

from nodepass.errors import EngineClosed
from nodepass.observe.stats import Datagrams

from .types import (
    PLAIN,
    Completion,
    EngineStatistics,
    FlowOptions,
    Newcomer,
    UdpCompletion,
    UdpCounts,
)

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

    from nodepass.net.resolver import SocketAddress

R = TypeVar("R")
E = TypeVar("E")

_TLS_ENDS: Final = {errno.EBADMSG: "bad TLS record", errno.ENODATA: "truncated"}
"""Ends that only a TLS leg has: tampering or an alert, and a FIN without a close_notify."""


class Reason(IntEnum):
    """Why a relay ended; the engine's numbers."""

    FINISHED = 0
    RESET = 1
    ABORTED = 2
    IDLE = 3
    UNMET = 4
    """Its second side could not be connected: there has been no relay."""


_REASONS: Final = tuple(Reason)
"""By number, which is how the engine says it; to make one takes ten times as long."""


class RelayResult(NamedTuple):
    """How a relay ended. A reset is a result, not an error."""

    up: int
    """Bytes delivered from a to b."""
    down: int
    """Bytes delivered from b to a."""
    reason: Reason
    side: int
    """Which side caused it: 1 = a, 2 = b, 0 = neither."""
    code: int
    """errno behind a reset or a failed dial, 0 otherwise."""

    @property
    def is_met(self) -> bool:
        """Whether there has been a relay at all."""
        return self.reason is not Reason.UNMET

    @property
    def is_clean(self) -> bool:
        """Whether both directions came to their end."""
        return self.reason is Reason.FINISHED

    def describe(self) -> str:
        """Say in a word or two why it ended, for a log line."""
        return _describe(self.reason, self.code)


class UdpResult(NamedTuple):
    """How a UDP relay or a gate ended."""

    datagrams: Datagrams
    """What became of its datagrams."""
    reason: Reason
    side: int
    """Which side caused it: 1 = visitor or link, 2 = link or target, 0 = neither."""
    code: int
    """errno behind a reset, 0 otherwise; ECONNREFUSED = nobody listens at the target."""

    @property
    def up(self) -> int:
        """Bytes carried from the visitor towards the target."""
        return self.datagrams.bytes_up

    @property
    def down(self) -> int:
        """Bytes carried from the target towards the visitor."""
        return self.datagrams.bytes_down

    @property
    def is_clean(self) -> bool:
        """Whether it ended by itself: the link was closed, or nobody said anything any more."""
        return self.reason in (Reason.FINISHED, Reason.IDLE)

    def describe(self) -> str:
        """Say in a word or two why it ended, for a log line."""
        return _describe(self.reason, self.code)


def _describe(reason: Reason, code: int) -> str:
    if reason is Reason.RESET and code:
        if code in _TLS_ENDS:
            return _TLS_ENDS[code]
        return errno.errorcode.get(code, str(code)).lower()
    return reason.name.lower()


class HandshakeResult(NamedTuple):
    """How a TLS handshake ended. A failure is a result, not an error."""

    reason: Reason
    """FINISHED = it is done; RESET = it failed; ABORTED = nobody wanted it any more."""
    code: int
    """errno behind a failure: EBADMSG = TLS itself, ENODATA = the peer closed in the middle."""
    detail: int
    """OpenSSL's packed error code, 0 = none; `tls.explain` puts it into words."""

    @property
    def is_done(self) -> bool:
        return self.reason is Reason.FINISHED

    def describe_break(self) -> str:
        """Say how the connection itself ended, empty if it was TLS that failed."""
        if self.code == errno.EBADMSG:
            return ""
        if self.reason is Reason.ABORTED:
            return "the TLS handshake was given up"
        why = "it was closed" if self.code == errno.ENODATA else os.strerror(self.code).lower()
        return f"the connection broke during the TLS handshake: {why}"

    def describe_failure(self, connection: Connection, *, is_server: bool) -> str:
        """Say in one clause why it failed.

        Args:
            connection: whose handshake it was; one of `tls.contexts`.
            is_server: whether this side is the server.
        """
        from nodepass.tls.contexts import explain

        return self.describe_break() or explain(connection, self.detail, is_server=is_server)


class Engine(Protocol):
    """What both twins offer; `_fastcopy.pyi` documents it."""

    def fileno(self) -> int: ...
    def poll(self) -> list[Completion | UdpCompletion | Newcomer]: ...
    def relay(
        self,
        fd_a: int,
        fd_b: int,
        *,
        tls_a: Connection | None = None,
        tls_b: Connection | None = None,
        head_a: bytes = b"",
        head_b: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int: ...
    def dial(
        self,
        fd: int,
        target: int,
        address: SocketAddress | None,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int: ...
    def handshake(self, fd: int, tls: Connection) -> int: ...
    def udp_serve(self, fd: int, *, waiting: int = 512, options: FlowOptions = PLAIN) -> int: ...
    def udp_shut(self, gate: int) -> None: ...
    def udp_relieve(self, gate: int) -> None: ...
    def udp_bind(
        self,
        peer: int,
        fd: int,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int: ...
    def udp_dial(
        self,
        fd: int,
        target: int,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int: ...
    def udp_limit(self, token: int, idle: float) -> None: ...
    def udp_retarget(self, token: int, target: int) -> bool: ...
    def udp_counts(self, token: int) -> UdpCounts | None: ...
    def live(self, token: int) -> tuple[int, int] | None: ...
    def abort(self, token: int) -> None: ...
    def doubt(self, token: int, side: int, *, quiet: bool = False) -> None: ...
    def statistics(self) -> EngineStatistics: ...
    def close(self, deadline: float = 5.0) -> bool: ...


class Work(Generic[R, E]):
    """What the engine has been given; `result` resolves when it is done with it."""

    __slots__ = ("_engine", "ending", "result", "token")

    def __init__(self, engine: Engine, token: int, result: asyncio.Future[R]) -> None:
        self._engine = engine
        self.token = token
        self.result = result
        self.ending: E | None = None
        """The engine's last word on it, from when that was polled; `result` may follow later."""

    def abort(self) -> None:
        """End it at once; the result follows. A no-op once that is there."""
        if not self.result.done():
            with contextlib.suppress(EngineClosed):  # then it is over all the same
                self._engine.abort(self.token)

    def doubt(self, side: int, *, is_quiet: bool = False) -> None:
        """Take it that the far end of a side may be gone: it ends soon unless that answers.

        Args:
            side: 1 = a, 2 = b.
            is_quiet: ask it even if nothing waits for an answer.
        """
        if not self.result.done():
            with contextlib.suppress(EngineClosed):
                self._engine.doubt(self.token, side, quiet=is_quiet)


class Relay(Work[RelayResult, "Completion"]):
    """One joined pair; aborted, both sides are reset."""

    __slots__ = ()

    def live(self) -> tuple[int, int]:
        """Return bytes delivered so far, up and down."""
        if self.result.cancelled():
            return 0, 0  # the engine did not end in time and took its counts along
        if self.ending is not None:
            return self.ending[1:3]
        return self._engine.live(self.token) or (0, 0)

    def finish(self) -> None:
        """Tell that all is over: the engine has had its last word."""
        if self.ending is not None and not self.result.done():
            _, up, down, reason, side, code, _ = self.ending
            self.result.set_result(RelayResult(up, down, _REASONS[reason], side, code))


class Handshake(Work[HandshakeResult, "Completion"]):
    """One TLS handshake; socket and connection are the engine's until `result` is there."""

    __slots__ = ("connection",)

    def __init__(
        self,
        engine: Engine,
        token: int,
        result: asyncio.Future[HandshakeResult],
        connection: Connection,
    ) -> None:
        super().__init__(engine, token, result)
        self.connection = connection

    def finish(self) -> None:
        """Tell that all is over: the engine has had its last word."""
        if self.ending is not None and not self.result.done():
            _, _, _, reason, _, code, detail = self.ending
            self.result.set_result(HandshakeResult(_REASONS[reason], code, detail))


class _UdpWork(Work[UdpResult, "UdpCompletion"]):
    """A gate or a UDP relay."""

    __slots__ = ()

    def datagrams(self) -> Datagrams:
        """Return what has become of its datagrams so far."""
        if self.result.cancelled():
            return Datagrams()  # the engine did not end in time and took its counts along
        if self.ending is not None:
            return Datagrams(*self.ending[1])
        counts = self._engine.udp_counts(self.token)
        return Datagrams() if counts is None else Datagrams(*counts)

    def finish(self) -> None:
        """Tell that all is over: the engine has had its last word."""
        if self.ending is not None and not self.result.done():
            _, counts, reason, side, code, _ = self.ending
            self.result.set_result(UdpResult(Datagrams(*counts), _REASONS[reason], side, code))


class UdpRelay(_UdpWork):
    """One UDP visitor joined with a link; aborted, the link is reset."""

    __slots__ = ()

    def live(self) -> tuple[int, int]:
        """Return bytes carried so far, up and down."""
        datagrams = self.datagrams()
        return datagrams.bytes_up, datagrams.bytes_down

    def retarget(self, target: socket.socket) -> bool:
        """Go on with another UDP socket towards the target, if it is not over.

        Args:
            target: connected, non-blocking.

        Returns:
            Whether the socket is the engine's now; otherwise it is still the caller's.

        Raises:
            EngineError: refused; the socket is still the caller's.
        """
        if self.result.done() or not self._engine.udp_retarget(self.token, target.fileno()):
            return False
        target.detach()
        return True

    def limit(self, idle: float) -> None:
        """Change how many seconds of silence end it."""
        if not self.result.done():
            with contextlib.suppress(EngineClosed):
                self._engine.udp_limit(self.token, idle)


class Gate(_UdpWork):
    """A bound UDP socket; aborted, it is closed and all that came through it is ended.

    Its datagrams are those that were dropped before they reached a relay.
    """

    __slots__ = ("_on_newcomer",)

    def __init__(
        self,
        engine: Engine,
        token: int,
        result: asyncio.Future[UdpResult],
        on_newcomer: Callable[[Gate, Newcomer], None],
    ) -> None:
        super().__init__(engine, token, result)
        self._on_newcomer = on_newcomer

    @property
    def engine(self) -> Engine:
        """The engine that it lives in, and all its relays with it."""
        return self._engine

    def meet(self, newcomer: Newcomer) -> None:
        """Tell the owner of a source that waits for a link."""
        if not self.result.done():
            self._on_newcomer(self, newcomer)

    def shut(self) -> None:
        """Let no more sources in."""
        if not self.result.done():
            with contextlib.suppress(EngineClosed):
                self._engine.udp_shut(self.token)

    def relieve(self) -> None:
        """End some exchanges that look finished, because others wait for their place."""
        if not self.result.done():
            with contextlib.suppress(EngineClosed):
                self._engine.udp_relieve(self.token)

    def turn_away(self, newcomer: Newcomer) -> None:
        """Drop a source that waits; for a moment it is not let in again."""
        if not self.result.done():
            with contextlib.suppress(EngineClosed):
                self._engine.abort(newcomer.token)
