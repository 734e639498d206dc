"""What a server and a client have in common: being started, watched and stopped.

Owns: the life cycle (new -> running -> stopping -> stopped), the task group that every task
of a tunnel lives in, the counters and the report line. Knows nothing of who listens and who
dials. `server` and `client` build on it.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from types import TracebackType
from typing import Self

from .config import Config, Mode
from .errors import ConfigError, TunnelError
from .log import Log
from .relay import Reason, Relay, RelayResult, Relays
from .stats import Counters, TunnelStatistics


class Tunnel(ABC):
    """One side of a tunnel.

    Args:
        url: what the command line takes, or a Config.
        relays: the engine to use; None = one of its own.
    """

    mode: Mode

    def __init__(self, url: str | Config, *, relays: Relays | None = None) -> None:
        self.config = url if isinstance(url, Config) else Config.parse(url, os.environ)
        if self.config.mode is not self.mode:
            raise ConfigError("scheme", f"must be {self.mode}:// here")
        self.settings = self.config.settings
        self.log = Log(str(self.mode), self.config.log)
        self.counters = Counters()
        self._shared_relays = relays
        self._relays: Relays | None = relays
        self._open_relays: set[Relay] = set()
        self._group: asyncio.TaskGroup | None = None
        self._main: asyncio.Task[None] | None = None
        self._closed: asyncio.Event | None = None
        self._report_timer: asyncio.TimerHandle | None = None
        self._last_report: dict[str, object] = {}
        self.is_stopping = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.config.url} relays={len(self._open_relays)}>"

    @property
    def relays(self) -> Relays:
        if self._relays is None:
            raise TunnelError("the tunnel has not been started")
        return self._relays

    async def start(self) -> None:
        """Begin; returns when connections are accepted or being dialled.

        Raises:
            ListenError: an address cannot be had.
            TunnelError: it has been started before.

        After: `stop` it, or use `async with`.
        """
        if self._closed is not None:
            raise TunnelError("a tunnel can be started once only")
        self._closed = asyncio.Event()
        try:
            if self._relays is None:
                self._relays = Relays(self.settings)
            await self._open()
        except BaseException:
            self.is_stopping = True
            self._shut()
            await self._close_relays()
            self._closed.set()
            raise
        started = asyncio.get_running_loop().create_future()
        self._main = asyncio.create_task(self._hold_group(started))
        await started
        self._arm_report()
        self._begin()

    async def stop(self) -> None:
        """Serve no new visitors, let open relays finish in SHUTDOWN_TIMEOUT, end. Idempotent."""
        if self._closed is None:
            return
        if self._main is None or self.is_stopping:
            await self._closed.wait()
            return
        self.is_stopping = True
        try:
            await self._drain()
        finally:
            await self._end()

    async def abort(self) -> None:
        """End at once: open relays are reset. Idempotent."""
        if self._closed is None or self._main is None:
            return
        self.is_stopping = True
        await self._end()

    async def wait_closed(self) -> None:
        """Wait until the tunnel has ended."""
        if self._closed is not None:
            await self._closed.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    @abstractmethod
    def statistics(self) -> TunnelStatistics:
        """Return one look at the tunnel."""

    # ------------------------------------------------- for server and client to fill in

    @abstractmethod
    async def _open(self) -> None:
        """Take what the start needs; raise if it cannot be had."""

    @abstractmethod
    def _begin(self) -> None:
        """Go to work; the task group stands."""

    @abstractmethod
    async def _drain(self) -> None:
        """Take no new visitors and wait, in bounded time, for what is open."""

    @abstractmethod
    def _shut(self) -> None:
        """Close every socket that is ours; idempotent, also after a failed start."""

    # ------------------------------------------------------- for server and client to use

    def spawn(self, work: Coroutine[object, object, None], what: str) -> None:
        """Run a task in the tunnel's group; a fault in it is logged, never silent."""
        if self._group is None or (self._main is not None and self._main.done()):
            work.close()
            return
        self._group.create_task(self._guard(work, what))

    def hold(self, relay: Relay) -> None:
        """Count a relay as open until its result is there."""
        self._open_relays.add(relay)

    def release(self, relay: Relay, result: RelayResult) -> None:
        """Add a finished relay to the counters."""
        self._open_relays.discard(relay)
        self.counters.bytes_up += result.up
        self.counters.bytes_down += result.down
        if result.reason is not Reason.FINISHED:
            self.counters.relays_reset += 1

    async def wait_relays(self, timeout: float) -> None:  # noqa: ASYNC109
        """Wait until no relay is open, at most so many seconds."""
        results = {relay.result for relay in self._open_relays}
        if results:
            await asyncio.wait(results, timeout=timeout)

    def live_bytes(self) -> tuple[int, int]:
        """Return bytes up and down since the start, open relays included."""
        up, down = self.counters.bytes_up, self.counters.bytes_down
        for relay in self._open_relays:
            live_up, live_down = relay.live()
            up += live_up
            down += live_down
        return up, down

    # ------------------------------------------------------------------------- private

    async def _hold_group(self, started: asyncio.Future[None]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                started.set_result(None)
                await asyncio.get_running_loop().create_future()  # until cancelled
        finally:
            self._group = None

    async def _guard(self, work: Coroutine[object, object, None], what: str) -> None:
        try:
            await work
        except Exception as exc:
            self.log.error(f"a fault of ours in {what}; please report it", error=exc)

    async def _end(self) -> None:
        if self._closed is None or self._main is None:
            return
        if self._report_timer is not None:
            self._report_timer.cancel()
            self._report_timer = None
        self._shut()
        self._main.cancel()
        await asyncio.wait({self._main})
        open_relays = list(self._open_relays)
        for relay in open_relays:
            relay.abort()
        await self.wait_relays(1.0)  # an abort takes one turn of the engine
        await self._close_relays()
        if not self._closed.is_set():
            self._closed.set()
            cut = {"relays_cut": len(open_relays)} if open_relays else {}
            self.log.info("stopped", **cut)

    async def _close_relays(self) -> None:
        if self._relays is not None and self._shared_relays is None:
            await self._relays.close()

    def _arm_report(self) -> None:
        if self.log.is_debug:
            loop = asyncio.get_running_loop()
            self._report_timer = loop.call_later(self.settings.report_interval, self._report)

    def _report(self) -> None:
        fields = self.statistics().report()
        if fields != self._last_report:
            self._last_report = fields
            self.log.debug("report", **fields)
        self._arm_report()
