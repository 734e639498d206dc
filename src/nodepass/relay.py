"""Relays: two connections joined by the engine, and what became of them.

The only importer of the engine. Owns: the choice between the native engine and its slow
twin, handing sockets down, and turning completions into results. Called by `server` and
`client`; one `Relays` serves every tunnel of a process.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import socket
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from .environment import Settings
from .log import Log

if TYPE_CHECKING:
    from ._fastcopy import Completion, EngineStatistics

CLOSE_GRACE: Final = 5.0
"""Seconds that closing may wait for engine threads: a hundred times what they need."""


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
            return errno.errorcode.get(self.code, str(self.code)).lower()
        return self.reason.name.lower()


class Engine(Protocol):
    """What both twins offer; `_fastcopy.pyi` documents it."""

    def fileno(self) -> int: ...
    def poll(self) -> list[Completion]: ...
    def relay(
        self, fd_a: int, fd_b: int, *, head_a: bytes = b"", head_b: bytes = b"", idle: float = 0.0
    ) -> int: ...
    def live(self, token: int) -> tuple[int, int] | None: ...
    def abort(self, token: int) -> None: ...
    def statistics(self) -> EngineStatistics: ...
    def close(self, deadline: float = 5.0) -> bool: ...


class Relay:
    """One joined pair; `result` resolves when the engine is done with it."""

    __slots__ = ("_engine", "result", "token")

    def __init__(self, engine: Engine, token: int, result: asyncio.Future[RelayResult]) -> None:
        self._engine = engine
        self.token = token
        self.result = result

    def live(self) -> tuple[int, int]:
        """Return bytes delivered so far, up and down."""
        if self.result.cancelled():
            return 0, 0  # the engine did not end in time and took its counts along
        if self.result.done():
            return self.result.result()[:2]
        return self._engine.live(self.token) or (0, 0)

    def abort(self) -> None:
        """Reset both sides; the result follows. A no-op once it is there."""
        if not self.result.done():
            self._engine.abort(self.token)


class Relays:
    """The engine of this process, and every relay that runs on it.

    Args:
        settings: which engine, how many threads, whether splice may be used.

    Must be made in the loop that uses it, and closed.
    """

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.get_running_loop()
        self.kind, module = _choose(settings.engine)
        """"native" or "python"."""
        self._engine: Engine = module.Engine(settings.threads, splice=settings.splice)
        self._open: dict[int, Relay] = {}
        self._is_closed = False
        self._loop.add_reader(self._engine.fileno(), self._drain)

    def __len__(self) -> int:
        return len(self._open)

    def __repr__(self) -> str:
        return f"<Relays {self.kind} open={len(self._open)}>"

    def join(
        self, a: socket.socket, b: socket.socket, *, head_a: bytes = b"", head_b: bytes = b""
    ) -> Relay:
        """Join two connections; both belong to the engine from here on.

        Args:
            a: connected, non-blocking, known to no task, transport or watch.
            b: the same.
            head_a: bytes already read from a, owed to b first.
            head_b: bytes already read from b, owed to a first.

        Raises:
            EngineError: the engine is full or closed; both sockets are still the caller's.
        """
        token = self._engine.relay(a.fileno(), b.fileno(), head_a=head_a, head_b=head_b)
        a.detach()
        b.detach()
        relay = Relay(self._engine, token, self._loop.create_future())
        self._open[token] = relay
        return relay

    def statistics(self) -> EngineStatistics:
        """Return the engine's own figures."""
        return self._engine.statistics()

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
        self._loop.remove_reader(self._engine.fileno())
        is_joined = await self._stop_engine(deadline)
        for completion in self._engine.poll():
            self._finish(completion)
        for relay in self._open.values():
            relay.result.cancel()
        self._open.clear()
        return is_joined

    def _stop_engine(self, deadline: float) -> Awaitable[bool]:
        # Joining threads blocks for a moment; the twin has none and lives on this loop.
        if self.kind == "python":
            done: asyncio.Future[bool] = self._loop.create_future()
            done.set_result(self._engine.close(deadline))
            return done
        return asyncio.to_thread(self._engine.close, deadline)

    def _drain(self) -> None:
        for completion in self._engine.poll():
            self._finish(completion)

    def _finish(self, completion: Completion) -> None:
        token, up, down, reason, side, code = completion
        relay = self._open.pop(token, None)
        if relay is not None and not relay.result.done():
            relay.result.set_result(RelayResult(up, down, Reason(reason), side, code))


class _Module(Protocol):
    Engine: Callable[..., Engine]


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
    return "python", importlib.import_module("._pycopy", __package__)
