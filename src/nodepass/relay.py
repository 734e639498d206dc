"""Relays: two connections joined by the engine, and what became of them; TLS handshakes too.

The only importer of the engine. Owns: the choice between the native engine and its slow
twin, handing sockets down, and turning completions into results. Called by `server` and
`client`; one `Relays` serves every tunnel of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib
import os
import socket
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Protocol, TypeVar, cast

from .environment import Settings
from .log import Log

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

    from ._fastcopy import Completion, EngineStatistics

R = TypeVar("R")

CLOSE_GRACE: Final = 5.0
"""Seconds that closing may wait for engine threads: a hundred times what they need."""


_TLS_ENDS: Final = {errno.EBADMSG: "bad TLS record", errno.ENODATA: "truncated"}
"""Ends that only a TLS leg has: tampering or an alert, and a FIN without a close_notify."""


class Reason(IntEnum):
    """Why a relay ended; the engine's numbers."""

    FINISHED = 0
    RESET = 1
    ABORTED = 2
    IDLE = 3


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
    """errno behind a reset, 0 otherwise."""

    def describe(self) -> str:
        """Say in a word or two why it ended, for a log line."""
        if self.reason is Reason.RESET and self.code:
            if self.code in _TLS_ENDS:
                return _TLS_ENDS[self.code]
            return errno.errorcode.get(self.code, str(self.code)).lower()
        return self.reason.name.lower()


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


class Engine(Protocol):
    """What both twins offer; `_fastcopy.pyi` documents it."""

    def fileno(self) -> int: ...
    def poll(self) -> list[Completion]: ...
    def relay(
        self,
        fd_a: int,
        fd_b: int,
        *,
        tls_a: Connection | None = None,
        tls_b: Connection | None = None,
        head_a: bytes = b"",
        head_b: bytes = b"",
        idle: float = 0.0,
    ) -> int: ...
    def handshake(self, fd: int, tls: Connection) -> int: ...
    def live(self, token: int) -> tuple[int, int] | None: ...
    def abort(self, token: int) -> None: ...
    def statistics(self) -> EngineStatistics: ...
    def close(self, deadline: float = 5.0) -> bool: ...


class _Work(Generic[R]):
    """What the engine has been given; `result` resolves when it is done with it."""

    __slots__ = ("_engine", "result", "token")

    def __init__(self, engine: Engine, token: int, result: asyncio.Future[R]) -> None:
        self._engine = engine
        self.token = token
        self.result = result

    def abort(self) -> None:
        """End it at once; the result follows. A no-op once that is there."""
        if not self.result.done():
            self._engine.abort(self.token)


class Relay(_Work[RelayResult]):
    """One joined pair; aborted, both sides are reset."""

    __slots__ = ()

    def live(self) -> tuple[int, int]:
        """Return bytes delivered so far, up and down."""
        if self.result.cancelled():
            return 0, 0  # the engine did not end in time and took its counts along
        if self.result.done():
            return self.result.result()[:2]
        return self._engine.live(self.token) or (0, 0)

    def finish(self, completion: Completion) -> None:
        """Take the engine's word that all is over."""
        if not self.result.done():
            _, up, down, reason, side, code, _ = completion
            self.result.set_result(RelayResult(up, down, Reason(reason), side, code))


class Handshake(_Work[HandshakeResult]):
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

    def finish(self, completion: Completion) -> None:
        """Take the engine's word that all is over."""
        if not self.result.done():
            _, _, _, reason, _, code, detail = completion
            self.result.set_result(HandshakeResult(Reason(reason), code, detail))


class _Crew:
    """One engine and what runs on it."""

    def __init__(self, engine: Engine) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine = engine
        self.open: dict[int, Relay | Handshake] = {}
        self._loop.add_reader(engine.fileno(), self.drain)

    def drain(self) -> None:
        for completion in self.engine.poll():
            work = self.open.pop(completion[0], None)
            if work is not None:
                work.finish(completion)

    def leave_loop(self) -> None:
        self._loop.remove_reader(self.engine.fileno())

    def forget(self) -> None:
        """Let go of what the engine did not end in time."""
        self.drain()
        for work in self.open.values():
            work.result.cancel()
        self.open.clear()


class Relays:
    """The engine of this process, and every relay and TLS handshake that runs on it.

    Args:
        settings: which engine, how many threads, whether splice may be used.

    Must be made in the loop that uses it, and closed.
    """

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self.kind, self._module = _choose(settings.engine)
        """"native" or "python"."""
        self._crew = self._hire(self._module)
        self._tls_module: _Module | None = None
        self._tls_crew: _Crew | None = None
        self._is_closed = False

    def __len__(self) -> int:
        return sum(len(crew.open) for crew in self._crews())

    def __repr__(self) -> str:
        return f"<Relays {self.kind} open={len(self)}>"

    def join(
        self,
        a: socket.socket,
        b: socket.socket,
        *,
        tls_a: Connection | None = None,
        tls_b: Connection | None = None,
        head_a: bytes = b"",
        head_b: bytes = b"",
    ) -> Relay:
        """Join two connections; both belong to the engine from here on.

        Args:
            a: connected, non-blocking, known to no task, transport or watch.
            b: the same.
            tls_a: TLS of a, its handshake done; None = a carries plain bytes.
            tls_b: TLS of b.
            head_a: plaintext already read from a, owed to b first.
            head_b: plaintext already read from b, owed to a first.

        Raises:
            EngineError: the engine is full or closed; both sockets are still the caller's.
        """
        if tls_a is None and tls_b is None:
            crew = self._crew
            token = crew.engine.relay(a.fileno(), b.fileno(), head_a=head_a, head_b=head_b)
        else:
            crew = self._tls()
            token = crew.engine.relay(
                a.fileno(), b.fileno(), tls_a=tls_a, tls_b=tls_b, head_a=head_a, head_b=head_b
            )
        a.detach()
        b.detach()
        relay = Relay(crew.engine, token, self._loop.create_future())
        crew.open[token] = relay
        return relay

    def shake(self, sock: socket.socket, connection: Connection) -> Handshake:
        """Begin a TLS handshake; socket and connection are lent until its result is there.

        Args:
            sock: connected, non-blocking, known to no task, transport or watch.
            connection: on memory BIOs, in accept or connect state.

        Raises:
            EngineError: the engine is full or closed; nothing has been lent.
        """
        crew = self._tls()
        token = crew.engine.handshake(sock.fileno(), connection)
        handshake = Handshake(crew.engine, token, self._loop.create_future(), connection)
        crew.open[token] = handshake
        return handshake

    async def secure(self, sock: socket.socket, connection: Connection) -> HandshakeResult:
        """Do a TLS handshake; cancelled, it ends when socket and connection are back.

        Raises:
            EngineError: as `shake`.
        """
        handshake = self.shake(sock, connection)
        try:
            return await asyncio.shield(handshake.result)
        except asyncio.CancelledError:
            handshake.abort()
            while not handshake.result.done():
                # An abort takes one turn of the engine; the number must not be reused before.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({handshake.result})
            raise

    def drain(self) -> None:
        """Take note of what has ended by now, without waiting for the loop to come to it."""
        for crew in self._crews():
            crew.drain()

    def load_tls(self) -> None:
        """Load what TLS needs; slow the first time (0.1 s), so not within a running loop.

        May be called from any thread.
        """
        if self._tls_module is not None:
            return
        trouble = self._module.tls_trouble()
        if trouble is None:
            self._tls_module = self._module
            return
        Log("relay").warn(
            "TLS cannot run on the native engine; it runs on the slow Python engine instead",
            cause=trouble,
        )
        self._tls_module = _twin()

    @property
    def alpn_selector(self) -> int | None:
        """Address of the C function that picks our ALPN name; None = let Python do it."""
        self.load_tls()
        assert self._tls_module is not None
        return self._tls_module.alpn_selector()

    def statistics(self) -> EngineStatistics:
        """Return the engine's own figures."""
        return self._crew.engine.statistics()

    async def close(self, deadline: float = CLOSE_GRACE) -> bool:
        """Abort what is open and stop the engine; idempotent.

        Args:
            deadline: seconds that its threads may take to end.

        Returns:
            False if a thread did not end in time and was left alone.
        """
        if self._is_closed:
            return True
        self._is_closed = True
        is_joined = True
        for crew in self._crews():
            crew.leave_loop()
            if crew is self._crew and self.kind == "native":
                # Joining threads blocks for a moment; the twin has none and lives on this loop.
                is_joined = await asyncio.to_thread(crew.engine.close, deadline)
            else:
                crew.engine.close(deadline)
            crew.forget()
        await asyncio.sleep(0)  # whoever has lent a socket hears that it is back
        return is_joined

    def _hire(self, module: _Module) -> _Crew:
        return _Crew(module.Engine(self._settings.threads, splice=self._settings.splice))

    def _tls(self) -> _Crew:
        if self._tls_crew is None:
            self.load_tls()
            assert self._tls_module is not None
            is_same = self._tls_module is self._module
            self._tls_crew = self._crew if is_same else self._hire(self._tls_module)
        return self._tls_crew

    def _crews(self) -> list[_Crew]:
        if self._tls_crew is None or self._tls_crew is self._crew:
            return [self._crew]
        return [self._crew, self._tls_crew]


class _Module(Protocol):
    Engine: Callable[..., Engine]

    def tls_trouble(self) -> str | None: ...
    def alpn_selector(self) -> int | None: ...


def _choose(wish: str) -> tuple[str, _Module]:
    if wish == "native":
        try:
            native = importlib.import_module("._fastcopy", __package__)
            twin = importlib.import_module("._pycopy", __package__)
            if native.ABI != twin.ABI:
                raise ImportError("it was built from another release")
            return "native", native
        except ImportError as exc:
            Log("relay").warn(
                "the native engine cannot be loaded; the slow Python engine runs instead",
                cause=str(exc),
            )
    else:
        Log("relay").warn("the slow Python engine runs, as NODEPASS_ENGINE=python asks")
    return "python", _twin()


def _twin() -> _Module:
    return cast(_Module, importlib.import_module("._pycopy", __package__))
