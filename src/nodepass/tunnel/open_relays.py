"""The open relays of one tunnel: counted while they last, added up when they end.

Owns: which relays are open, and what the counters get from each. Made by `base`, handed to
whoever begins relays.
"""

from __future__ import annotations

import asyncio
from typing import Final

from nodepass.config.environment import Settings, show_duration
from nodepass.engine.relays import Reason, Relay, RelayResult, UdpRelay, UdpResult
from nodepass.observe.log import Log
from nodepass.observe.stats import Counters, Datagrams

Result = asyncio.Future[RelayResult] | asyncio.Future[UdpResult]

LAST_WORDS: Final = 1.0
"""Seconds of silence after which a UDP session counts as done once the tunnel stops."""


class OpenRelays:
    """Every relay of a tunnel that has not ended.

    Args:
        counters: bytes, datagrams and resets are added to them.
    """

    def __init__(self, settings: Settings, log: Log, counters: Counters) -> None:
        self._settings = settings
        self._log = log
        self._counters = counters
        self._relays: set[Relay | UdpRelay] = set()
        self._is_hurried = False

    def __len__(self) -> int:
        return len(self._relays)

    def hold(self, relay: Relay | UdpRelay) -> None:
        """Count a relay as open until `end`."""
        self._relays.add(relay)
        if self._is_hurried and isinstance(relay, UdpRelay):
            self._limit(relay)  # its launch was on its way when the others were hurried

    def end(
        self, relay: Relay | UdpRelay, result: Result, **names: object
    ) -> RelayResult | UdpResult | None:
        """Take a relay as ended, and add it to the counters.

        Args:
            result: done.
            names: what a log line is to say of it.

        Returns:
            How it ended; None = it never will, or not for us to know.
        """
        self._relays.discard(relay)
        if result.cancelled():
            return None
        outcome = result.result()
        if isinstance(outcome, RelayResult) and not outcome.is_met:
            return outcome  # there has been no relay
        self._count(outcome)
        if self._log.is_debug:
            self._log.debug(
                "relay ended",
                **names,
                up=outcome.up,
                down=outcome.down,
                reason=outcome.describe(),
            )
        return outcome

    async def wait(self, timeout: float) -> None:  # noqa: ASYNC109
        """Wait until no relay is open, at most so many seconds."""
        results: set[Result] = {relay.result for relay in self._relays}
        if results:
            await asyncio.wait(results, timeout=timeout)

    def abort(self) -> None:
        """Reset all; their results come a turn of the engine later."""
        for relay in list(self._relays):
            relay.abort()

    def clear(self) -> None:
        """Forget all: in a forked child they are the parent's."""
        self._relays.clear()

    def hurry(self) -> None:
        """Let UDP sessions end soon after their last datagram, not only after their idle time."""
        self._is_hurried = True
        for relay in self._relays:
            if isinstance(relay, UdpRelay):
                self._limit(relay)

    def doubt_links(self, side: int, *, is_back: bool = False) -> None:
        """Have the engine find out which relays have lost the far end of their link.

        Args:
            side: which of a relay's two is the link.
            is_back: there is a path again, so a link that does not even answer when it is asked
                is gone; otherwise its path may come back while nobody says anything.
        """
        for relay in self._relays:
            relay.doubt(side, is_quiet=is_back)

    def live_bytes(self) -> tuple[int, int]:
        """Return bytes up and down since the start, open relays included."""
        up, down = self._counters.bytes_up, self._counters.bytes_down
        for relay in self._relays:
            live_up, live_down = relay.live()
            up += live_up
            down += live_down
        return up, down

    def datagrams(self) -> Datagrams:
        """Return what has become of datagrams since the start, open relays included."""
        open_ones = [relay.datagrams() for relay in self._relays if isinstance(relay, UdpRelay)]
        return Datagrams.total([self._counters.datagrams, *open_ones])

    def _limit(self, relay: UdpRelay) -> None:
        relay.limit(min(LAST_WORDS, self._settings.udp_idle_timeout))

    def _count(self, outcome: RelayResult | UdpResult) -> None:
        counters = self._counters
        counters.bytes_up += outcome.up
        counters.bytes_down += outcome.down
        if isinstance(outcome, UdpResult):
            counters.datagrams = Datagrams.total((counters.datagrams, outcome.datagrams))
        elif outcome.reason is Reason.IDLE:
            self._log.repeated(
                "info",
                "idle",
                "a silent connection has been ended, as TCP_IDLE_TIMEOUT asks",
                limit=show_duration(self._settings.tcp_idle_timeout),
            )
        if not outcome.is_clean:
            counters.relays_reset += 1
