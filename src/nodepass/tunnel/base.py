"""What a server and a client have in common: being started, watched and stopped.

Owns: the life cycle (new -> running -> stopping -> stopped), the task group that every task
of a tunnel lives in, the counters and the report line. Knows nothing of who listens and who
dials. `server` and `client` build on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Final, Self

from nodepass.config.environment import Settings
from nodepass.config.parameters import Mode
from nodepass.config.url import Config
from nodepass.engine.relays import Relays
from nodepass.errors import ConfigError, TunnelError
from nodepass.net import descriptors
from nodepass.observe.log import Log
from nodepass.observe.loss import DropReport
from nodepass.observe.stats import Counters, Datagrams, Gauges, TunnelStatistics
from nodepass.protocol.proof import stretch_password
from nodepass.runtime import fork, threads

from .context import Context
from .open_relays import OpenRelays

DROP_PAUSE: Final = 5.0
"""Seconds between two looks at what was lost: for who reads the log "at once"."""
ABORT_GRACE: Final = 1.0
"""Seconds to wait for the results of aborted relays: an abort takes one turn of the engine."""


def tell_remarks(log: Log, settings: Settings) -> None:
    """Say which variables were not read, though somebody may think that they were."""
    for remark in settings.remarks:
        if remark.why:
            log.warn(
                "a variable is left aside, since its value can hardly be meant for us",
                variable=remark.name,
                why=remark.why,
                kept=remark.default,
                unmistakable=remark.meant,
            )
        else:
            log.warn(
                "a variable is not read, though its name is almost one of ours",
                variable=remark.name,
                meant=remark.meant,
            )


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
        self._settings = self.config.settings
        label = self.config.label
        self._log = Log(str(self.mode), self.config.log, **({"tunnel": label} if label else {}))
        self._log.tunnel = label or f"{self.mode}://{self.config.tunnel}"
        if isinstance(url, str):
            tell_remarks(self._log, self._settings)
        self._counters = Counters()
        self._shared_relays = relays
        self._common: Context | None = None
        self._open_relays = OpenRelays(self._settings, self._log, self._counters)
        self._counts: list[Callable[[], Datagrams]] = [self._open_relays.datagrams]
        """Everything that counts datagrams."""
        self._waits: list[Callable[[float], Awaitable[None]]] = [self._open_relays.wait]
        """How to wait for what the engine has of ours, at most so many seconds each."""
        self._drops = DropReport(self._log, self._drop_fields)
        self._drop_timer: asyncio.TimerHandle | None = None
        self._group: asyncio.TaskGroup | None = None
        self._main: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()
        self._life = asyncio.Lock()
        self._has_begun = False
        self._is_running = False
        self._resources = contextlib.ExitStack()
        """How to give back what `_open` has taken; the last taken goes first."""
        self._report_timer: asyncio.TimerHandle | None = None
        self._reload_timer: asyncio.TimerHandle | None = None
        self._last_report: dict[str, object] = {}
        self._is_stopping = False
        self._forks = fork.count()

    def __repr__(self) -> str:
        name = type(self).__name__
        if "_open_relays" not in self.__dict__:  # what it was to be made of was refused
            return f"<{name} never made>"
        return f"<{name} {self.config.url} relays={len(self._open_relays)}>"

    async def start(self) -> None:
        """Begin; returns when connections are accepted or being dialled.

        Raises:
            ListenError: an address cannot be had.
            TunnelError: it has been started before.

        After: `stop` it, or use `async with`.
        """
        if self._has_begun:
            raise TunnelError("a tunnel can be started once only")
        self._has_begun = True
        async with self._life:
            try:
                relays = self._shared_relays
                if relays is None:
                    relays = Relays(self._settings)
                self._common = Context(
                    self.config,
                    self._log,
                    self._counters,
                    relays,
                    self._open_relays,
                    self._spawn,
                )
                await self._open(self._common)
                started = asyncio.get_running_loop().create_future()
                self._main = asyncio.create_task(self._hold_group(started))
                await started
                self._begin(self._common)
            except BaseException:
                self._is_stopping = True
                await self._end()
                raise
            self._is_running = True
            self._arm_report()
            self._arm_reload()
            if self.config.udp:
                self._look_at_drops()

    async def stop(self) -> None:
        """Serve no new visitors, let open relays finish in SHUTDOWN_TIMEOUT, end. Idempotent.

        Cancelled, it ends at once: open relays are reset.
        """
        async with self._life:
            if self._closed.is_set() or not self._has_begun:
                return
            self._is_stopping = True
            if self._forks != fork.count():
                self._leave()
                return
            cut = 0
            try:
                await self._drain()
            finally:
                cut = len(self._open_relays)
                await self._end()
                self._log.info("stopped", **({"relays_cut": cut} if cut else {}))

    def reload(self) -> bool:
        """Read certificate files again; return whether there are any. Open relays go on."""
        return self._is_running and not self._is_stopping and self._reload(force=True)

    async def wait_closed(self) -> None:
        """Wait until the tunnel has ended, or has failed to start."""
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

    def statistics(self) -> TunnelStatistics:
        """Return one look at the tunnel, also after its end.

        Raises:
            TunnelError: it has never run.
        """
        self._require_running()
        gauges, counters = self._gauges(), self._counters
        up, down = self._open_relays.live_bytes()
        return TunnelStatistics(
            mode=str(self.mode),
            sessions_open=gauges.sessions_open,
            sessions=counters.sessions,
            visitors_open=gauges.visitors_open,
            visitors_waiting=gauges.visitors_waiting,
            visitors=counters.visitors,
            visitors_refused=counters.visitors_refused,
            relays_open=len(self._open_relays),
            relays_reset=counters.relays_reset,
            launches_failed=counters.launches_failed,
            links_idle=gauges.links_idle,
            links_wanted=gauges.links_wanted,
            links=counters.links,
            links_lost=counters.links_lost,
            strangers=counters.strangers,
            bytes_up=up,
            bytes_down=down,
            datagrams=self._datagrams(),
            rtt=gauges.rtt,
        )

    # ------------------------------------------------- for server and client to fill in

    @abstractmethod
    async def _open(self, context: Context) -> None:
        """Take what the start needs, each with its undo in `_resources`; raise if it cannot."""

    @abstractmethod
    def _begin(self, context: Context) -> None:
        """Go to work; the task group stands."""

    @abstractmethod
    async def _drain(self) -> None:
        """Take no new visitors and wait, in bounded time, for what is open."""

    @abstractmethod
    def _gauges(self) -> Gauges:
        """Read what there is at this moment."""

    def _reload(self, *, force: bool) -> bool:  # noqa: ARG002 - for those that have files
        """Read certificate files that have changed, or all; return whether there are any."""
        return False

    # ------------------------------------------------------- for server and client to use

    async def _stretch_password(self) -> bytes | None:
        """Return the key of the proofs, None without a password."""
        password = self.config.password
        if password is None:
            return None
        # It takes 0.1 s on purpose, and other tunnels of this loop may be at work.
        return await threads.run(lambda: stretch_password(password.reveal()))

    def _share_descriptors(self) -> descriptors.Shares:
        """Return how many visitors and idle links fit the limit of open files; warn if few."""
        wanted = self._settings.semaphore_limit
        shares = descriptors.share_descriptors(wanted, self._settings.max_pool_capacity)
        if shares.visitors < wanted:
            self._log.warn(
                "the limit of open files (ulimit -n) is too low for SEMAPHORE_LIMIT visitors",
                files=descriptors.descriptor_limit(),
                visitors=shares.visitors,
                wanted=wanted,
            )
        return shares

    def _spawn(self, work: Coroutine[object, object, None], what: str) -> None:
        """Run a task in the tunnel's group; a fault in it is logged, never silent."""
        if self._group is None:
            work.close()  # the group has ended, and its tasks with it
            return
        self._group.create_task(self._guard(work, what))

    def _require_running(self) -> None:
        """Raise TunnelError if the tunnel has never run."""
        if not self._is_running:
            raise TunnelError("the tunnel has not been started")

    def _datagrams(self) -> Datagrams:
        """Return what has become of datagrams since the start."""
        return Datagrams.total(count() for count in self._counts)

    def _drop_fields(self, cause: str) -> dict[str, object]:
        if cause == "too_large":
            return {"limit": self._settings.udp_data_buf_size}
        return {"target": self.config.target} if cause == "refused" else {}

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
        except Exception as exc:  # noqa: BLE001 - a task's outer edge
            self._log.error(f"an internal error in {what}; please report it", error=exc)

    async def _end(self) -> None:
        """Give everything back, whatever has been taken so far."""
        try:
            self._cancel_timers()
            self._resources.close()
            if self._main is not None:
                self._main.cancel()
                await asyncio.wait({self._main})
            self._open_relays.abort()
            for wait in self._waits:
                await wait(ABORT_GRACE)
            self._drops.look(self._datagrams(), asyncio.get_running_loop().time(), is_last=True)
        finally:
            # Whoever cancels us here still gets the engine's threads back.
            try:
                await self._close_relays()
            finally:
                self._closed.set()

    def _leave(self) -> None:
        """Let go in a forked child, where nothing of all this is ours."""
        self._cancel_timers()
        self._resources.close()
        if self._main is not None:
            self._main.cancel()
        self._open_relays.clear()
        self._closed.set()

    def _cancel_timers(self) -> None:
        for timer in (self._report_timer, self._reload_timer, self._drop_timer):
            if timer is not None:
                timer.cancel()
        self._report_timer = self._reload_timer = self._drop_timer = None

    async def _close_relays(self) -> None:
        if self._common is not None and self._shared_relays is None:
            await self._common.relays.close()

    def _arm_report(self) -> None:
        if self._log.is_debug:
            loop = asyncio.get_running_loop()
            self._report_timer = loop.call_later(self._settings.report_interval, self._report)

    def _report(self) -> None:
        fields = self.statistics().report()
        if fields != self._last_report:
            self._last_report = fields
            self._log.debug("report", **fields)
        self._arm_report()

    def _look_at_drops(self) -> None:
        loop = asyncio.get_running_loop()
        self._drops.look(self._datagrams(), loop.time())
        pause = min(self._settings.report_interval, DROP_PAUSE)
        self._drop_timer = loop.call_later(pause, self._look_at_drops)

    def _arm_reload(self) -> None:
        loop = asyncio.get_running_loop()
        self._reload_timer = loop.call_later(self._settings.reload_interval, self._look_at_files)

    def _look_at_files(self) -> None:
        self._reload(force=False)
        self._arm_reload()
