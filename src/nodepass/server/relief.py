"""Room for others while every place is taken: TCP visitors who say nothing give way.

SEMAPHORE_LIMIT silent connections would otherwise shut everybody out for as long as their owner
likes, and it costs him nothing. Nobody is looked at while there is room.

    silent for HEAVY_SILENCE, of a source with more than half of the places   -> goes first
    silent for SILENCE, of any source, that with most places first            -> goes then
    has said hardly anything in SILENCE, of a source with more than half      -> goes last

Within one source chance decides, so that nobody can keep a place by coming early or late. Who
talks keeps his place, whatever his source. UDP has a rule of its own (`gate`). Called by `server`.

Owns: who the TCP visitors are.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Final

from nodepass.engine.relays import Relay
from nodepass.net import tcp
from nodepass.observe.log import Log

SILENCE: Final = 30.0
"""Seconds after which a visitor may have to go who has not sent a byte."""
HEAVY_SILENCE: Final = 5.0
"""The same where his source holds more than half of the places: a browser that connects ahead of
its request does so some seconds before."""
HEAVY: Final = 2
"""A source is heavy that holds more than one place in so many."""
GREETED: Final = 1024
"""Bytes that he may have got from his target all the same: some greet first. Who gets more is
listening to something."""
MUMBLED: Final = 128
"""Bytes in SILENCE that are as good as none from a heavy source: a byte now and then keeps no
place. Requests, hellos and logins are longer."""
PERIOD: Final = 1.0
"""Seconds between two looks, while every place is taken."""
LARGE: Final = 4096
"""Places that are looked at in one PERIOD: a millisecond or two. More get longer periods."""
SHARE: Final = 8
"""One place in so many is freed in one look."""


class Relief:
    """The TCP visitors of a server.

    Args:
        limit: how many places there are.
        is_full: tells whether all of them are taken.
        is_client: tells whether a client has its session from a source.
        log: where it is told that somebody had to go.
    """

    def __init__(
        self,
        limit: int,
        is_full: Callable[[], bool],
        is_client: Callable[[str], bool],
        log: Log,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = limit
        self._most = (max(1, limit // HEAVY), max(1, limit // SHARE), max(1, limit // SHARE))
        """Places that are freed in one look, at most, by rank."""
        self._is_full = is_full
        self._is_client = is_client
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
            period = PERIOD * max(1.0, self._limit / LARGE)
            self._timer = self._loop.call_later(period, self._look)

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
        now = self._loop.time()
        sources = Counter(_source(visitor) for visitor, _ in self._visitors.values())
        heaviest = max(sources, key=sources.__getitem__, default="")
        if sources[heaviest] > self._limit // HEAVY and self._is_client(heaviest):
            # A client that sees it says so itself; those of the seed dialect cannot, nor can
            # several clients that lead to each other.
            self._log.repeated(
                "warn",
                "circle",
                "most visitors come from a client's own host; does its target lead back here?",
                host=heaviest,
                holds=sources[heaviest],
            )
        found = []
        for relay, (visitor, since) in self._visitors.items():
            if now - since < min(HEAVY_SILENCE, SILENCE):
                continue
            source = _source(visitor)
            rank = _rank(relay, now - since, is_heavy=sources[source] > self._limit // HEAVY)
            if rank is not None:
                found.append((rank, -sources[source], random.random(), relay, source))  # noqa: S311
        found.sort(key=lambda one: one[:3])
        # From a heavy source half of the places at once: as many of its own wait behind them.
        most = self._most[found[0][0]] if found else 0
        for _, _, _, relay, source in found[:most]:
            self.count += 1
            relay.abort()
            self._log.repeated(
                "warn",
                f"relief {source}",
                "a visitor who had said nothing gave way, since every place is taken",
                host=source,
                holds=sources[source],
            )


def _rank(relay: Relay, age: float, *, is_heavy: bool) -> int | None:
    """Return how soon a visitor may have to go, 0 = first; None = never."""
    up, down = relay.live()
    if down > GREETED:
        return None
    if up == 0:
        return 0 if is_heavy else 1 if age >= SILENCE else None
    return 2 if is_heavy and up < MUMBLED and age >= SILENCE else None


def _source(visitor: str) -> str:
    return tcp.source_of(visitor.rpartition(":")[0].strip("[]"))
