"""Room for others while every place is taken: TCP visitors who say nothing give way.

SEMAPHORE_LIMIT silent connections would otherwise shut everybody out for as long as their owner
likes, and cost nothing. Nobody is looked at while there is room.

    silent for HEAVY_SILENCE, of a heavy source                               -> goes first
    silent for SILENCE, of any source, that with most places first            -> goes then
    has said hardly anything, and came MUMBLING ago, of a heavy source        -> goes then

A source is heavy that has more than its share would be if one more came: half of the places if
it is alone, a third beside another, and so on down to an eighth. Within one source chance decides,
so that nobody can keep a place by coming early or late.
A visitor that has talked keeps its place, whatever its source and however long it is quiet: to
cut a session that somebody only looks away from is what TCP_IDLE_TIMEOUT is for. UDP has a rule
of its own (`udp_visitors`). Called by `server`.

Owns: who the TCP visitors are.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nodepass.engine.relays import Relay
from nodepass.net import hosts
from nodepass.observe.log import Log

SILENCE: Final = 30.0
"""Seconds after which a visitor may have to go who has not sent a byte."""
HEAVY_SILENCE: Final = 2.0
"""The same where its source is heavy: who wants something says so within a round trip or two, and
most of those who wait are of the same source."""
GREETED: Final = 1024
"""Bytes that it may have got from its target all the same: some greet first. Who gets more is
listening to something."""
MUMBLED: Final = 128
"""Bytes that are as good as none from a heavy source: a byte now and then keeps no place.
Requests, hellos and logins are longer."""
MUMBLING: Final = 15.0
"""Seconds that it has to say more: a short request may have to wait for its answer."""
HALVINGS: Final = 3
"""How often patience with a source is halved."""
LEAST: Final = 1.0
"""Seconds that it never goes below: a round trip and its resend."""
PERIOD: Final = 1.0
"""Seconds between two looks, while every place is taken."""
LARGE: Final = 4096
"""Places that are looked at in one PERIOD: a millisecond or two. More get longer periods."""
SHARE: Final = 8
"""One place in so many is freed in one look, and is a fair share for any source."""
BATCH: Final = 2
"""One place in so many is freed in one look of a heavy source's: as many of its own wait behind
them."""


@dataclass(slots=True)
class _Visitor:
    """What is known of a visitor."""

    source: str
    since: float
    """When it came, seconds of the loop."""


class Eviction:
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
        few, many = max(1, limit // SHARE), max(1, limit // BATCH)
        self._most = (many, few, many)
        """Places that are freed in one look, at most, by the first rank that is found."""
        self._is_full = is_full
        self._is_client = is_client
        self._log = log
        self._visitors: dict[Relay, _Visitor] = {}
        self._losses: dict[str, int] = {}
        """Looks in a row, about, at which a heavy source has lost places."""
        self._timer: asyncio.TimerHandle | None = None
        self.count = 0
        """Visitors who had to go."""

    def join(self, relay: Relay, visitor: str) -> None:
        """Take note of a visitor, by its address as "host:port"."""
        now = self._loop.time()
        self._visitors[relay] = _Visitor(_source(visitor), now)

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
        self._losses.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._is_full():
            self._losses.clear()
            return
        self.press()
        now = self._loop.time()
        sources = Counter(visitor.source for visitor in self._visitors.values())
        share = max(1, self._limit // min(len(sources) + 1, SHARE))
        self._tell_circle(sources)
        self._losses = {source: n for source, n in self._losses.items() if source in sources}
        found = []
        for relay, visitor in self._visitors.items():
            holds = sources[visitor.source]
            haste = 1 << min(self._losses.get(visitor.source, 0), HALVINGS) if holds > share else 0
            rank = _rank(relay, now - visitor.since, haste)
            if rank is not None:
                found.append((rank, -holds, random.random(), relay, visitor.source))  # noqa: S311
        found.sort(key=lambda one: one[:3])
        worst = found[0][0] if found else 0
        gone = [one for one in found if one[0] == worst][: self._most[worst]]
        for source in {source for rank, _, _, _, source in gone if rank in (0, 2)}:
            self._losses[source] = self._losses.get(source, 0) + 1
        for _, _, _, relay, source in gone:
            self.count += 1
            relay.abort()
            self._log.repeated(
                "warn",
                f"relief {source}",
                "a visitor who said nothing gave way, since every place is taken",
                host=source,
                holds=sources[source],
            )

    def _tell_circle(self, sources: Counter[str]) -> None:
        """Tell of most visitors coming from where a client is.

        A client that sees it says so itself; those of the seed dialect cannot, nor can several
        clients that lead to each other.
        """
        for host, holds in sources.most_common(1):
            if holds > self._limit // 2 and self._is_client(host):
                self._log.repeated(
                    "warn",
                    "circle",
                    "most visitors come from a client's own host; does its target lead back here?",
                    host=host,
                    holds=holds,
                )


def _rank(relay: Relay, age: float, haste: int) -> int | None:
    """Return how soon a visitor may have to go, 0 = first; None = not now.

    Args:
        age: seconds since it came.
        haste: what patience with its source is divided by; 0 = it is not heavy.
    """
    up, down = relay.live()
    if down > GREETED or up >= MUMBLED:
        return None
    if up:
        return 2 if haste and age >= _patience(MUMBLING, haste) else None
    if haste and age >= _patience(HEAVY_SILENCE, haste):
        return 0
    return 1 if age >= SILENCE else None


def _patience(seconds: float, haste: int) -> float:
    return max(seconds / haste, min(LEAST, seconds))


def _source(visitor: str) -> str:
    return hosts.source_of(visitor.rpartition(":")[0].strip("[]"))
