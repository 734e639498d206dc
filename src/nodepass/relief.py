"""Room for others while every place is taken: TCP visitors who have said nothing give way.

SEMAPHORE_LIMIT silent connections would otherwise shut everybody out for as long as their owner
likes, and it costs him nothing. Nobody is looked at while there is room. UDP has a rule of its own
(`gate`). Called by `server`.

Owns: who the TCP visitors are.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

from . import net
from .log import Log
from .relay import Relay

SILENCE: Final = 30.0
"""Seconds after which a visitor may have to go who has not sent a byte."""
GREETED: Final = 1024
"""Bytes that he may have got from his target all the same: some greet first. Who gets more is
listening to something."""
PERIOD: Final = 5.0
"""Seconds between two looks, while every place is taken."""
SHARE: Final = 8
"""One place in so many is freed in one look."""


class Relief:
    """The TCP visitors of a server.

    Args:
        limit: how many places there are.
        is_full: tells whether all of them are taken.
        log: where it is told that somebody had to go.
    """

    def __init__(self, limit: int, is_full: Callable[[], bool], log: Log) -> None:
        self._loop = asyncio.get_running_loop()
        self._most = max(1, limit // SHARE)
        self._is_full = is_full
        self._log = log
        self._visitors: dict[Relay, tuple[str, float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.count = 0
        """Visitors who had to go."""

    def join(self, relay: Relay, visitor: str) -> None:
        """Take note of a visitor, by his address as "host:port"."""
        self._visitors[relay] = (visitor, self._loop.time())

    def part(self, relay: Relay) -> None:
        """Forget a visitor; idempotent."""
        self._visitors.pop(relay, None)

    def press(self) -> None:
        """Begin to look, since the last place has been taken; harmless to call at any time."""
        if self._timer is None:
            self._timer = self._loop.call_later(PERIOD, self._look)

    def close(self) -> None:
        """Look no more; idempotent."""
        self._visitors.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._is_full():
            return
        self.press()
        latest = self._loop.time() - SILENCE
        sources = Counter(_source(visitor) for visitor, _ in self._visitors.values())
        silent = [
            (relay, _source(visitor))
            for relay, (visitor, since) in self._visitors.items()
            if since <= latest and _is_silent(relay)
        ]
        # The source that holds most first, and its oldest: to sort keeps the order of equals.
        silent.sort(key=lambda one: -sources[one[1]])
        for relay, source in silent[: self._most]:
            self.count += 1
            relay.abort()
            self._log.repeated(
                "warn",
                f"relief {source}",
                "a visitor who had said nothing gave way, since every place is taken",
                host=source,
                holds=sources[source],
            )


def _source(visitor: str) -> str:
    return net.source_of(visitor.rpartition(":")[0].strip("[]"))


def _is_silent(relay: Relay) -> bool:
    up, down = relay.live()
    return up == 0 and down <= GREETED
