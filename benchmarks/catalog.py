"""The catalog of loads: all that there are, in the order in which they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from benchmarks.bulk import Bulk
from benchmarks.datagram import Udp
from benchmarks.load import Load
from benchmarks.machine import BenchmarkError
from benchmarks.message import PingPong
from benchmarks.request import Http
from benchmarks.start import Help
from benchmarks.visit import FirstByte, Idle

LOADS: Final[tuple[Load, ...]] = (
    *(Bulk(streams, back) for back in (False, True) for streams in (1, 4, 16)),
    *(Http(connections) for connections in (1, 16, 256)),
    Http(16, is_closing=True),
    PingPong(),
    FirstByte(),
    *(
        Udp(size, visitors, window)
        for size in (200, 1400)
        for visitors, window in ((1, 64), (64, 1), (100, 1))
    ),
    Idle(5000),
    Help(),
)
ALL: Final = tuple(load.name for load in LOADS)
QUICK: Final = ("bulk-up-1", "http-16", "new-16", "first-byte", "udp-200-1", "help")
"""Names of the loads that --quick takes."""


def choose(words: Sequence[str]) -> list[Load]:
    """Return the loads that these words mean, in our order: names, or the beginning of some.

    Raises:
        BenchmarkError: a word means none.
    """
    for word in words:
        if not any(load.belongs_to(word) for load in LOADS):
            names = ", ".join(ALL)
            raise BenchmarkError(f"{word!r} is none of {names}, nor the beginning of one")
    return [load for load in LOADS if any(map(load.belongs_to, words))]
