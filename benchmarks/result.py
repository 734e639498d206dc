"""The results: figures of all runs, their medians, and their ratios to others' of the same round.

Owns: nothing. Must never measure or print.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Final

from benchmarks.load import Load

STRAIGHT: Final = "direct"
"""The contender that all others are divided by."""
RIVALS: Final = {False: "haproxy", True: "haproxy-tls"}
"""The one that a contender is divided by besides, without and with TLS."""

Figures = dict[str, float]
"""One run, in seconds and bytes: what a load's Sample has; errors; and the cores that others used
meanwhile (strangers). Of a contender that has processes also cost, in the load's unit, cores (CPU
seconds a second) and memory."""


@dataclass(slots=True)
class Result:
    """All runs of one contender under one load."""

    load: Load
    contender: str
    is_tls: bool
    runs: dict[int, Figures] = field(default_factory=dict)
    """By round, so that neighbours can be compared."""


@dataclass(slots=True)
class Outcome:
    """All that a benchmark has found."""

    results: list[Result] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Contenders and loads that were not tried, and why."""
    failed: dict[str, str] = field(default_factory=dict)
    """Those that were tried in vain, and why."""

    def find(self, load: Load, contender: str) -> Result | None:
        """Return the runs of one contender under one load."""
        for result in self.results:
            if (result.load, result.contender) == (load, contender):
                return result
        return None

    def loads(self) -> list[Load]:
        """The loads that have results, in their order."""
        return list(dict.fromkeys(result.load for result in self.results))


def median(result: Result, figure: str) -> float | None:
    """The median of those runs that have this figure, or None."""
    values = [run[figure] for run in result.runs.values() if figure in run]
    return statistics.median(values) if values else None


def quotients(result: Result, other: Result | None, figure: str) -> list[float]:
    """What runs of one are of those of the other in the same round; nothing is divided by 0."""
    if other is None:
        return []
    return [
        run[figure] / other.runs[turn][figure]
        for turn, run in result.runs.items()
        if figure in run and other.runs.get(turn, {}).get(figure)
    ]


def ratio(result: Result, other: Result | None, figure: str) -> float | None:
    """The median of the quotients, or None without any."""
    found = quotients(result, other, figure)
    return statistics.median(found) if found else None


def loss(result: Result) -> float | None:
    """Datagrams lost of all that were sent, all runs together; None if none were sent."""
    runs = [run for run in result.runs.values() if "sent" in run]
    sent = sum(run["sent"] for run in runs)
    return sum(run["lost"] for run in runs) / sent if sent else None


def summary(outcome: Outcome, result: Result) -> dict[str, float]:
    """Medians, spread of the headline, and ratios of one result; only those that there are."""
    headline = result.load.headline
    straight = outcome.find(result.load, STRAIGHT)
    rival = outcome.find(result.load, RIVALS[result.is_tls])
    values = [run[headline] for run in result.runs.values()]
    names = dict.fromkeys(name for run in result.runs.values() for name in run)
    found: dict[str, float | None] = {name: median(result, name) for name in names}
    found |= {
        "least": min(values),
        "most": max(values),
        "headline_of_direct": ratio(result, straight, headline),
        "headline_of_haproxy": ratio(result, rival, headline),
        "cost_of_haproxy": ratio(result, rival, "cost"),
        "mean_of_haproxy": ratio(result, rival, "mean"),
        "loss": loss(result),
        "errors": sum(run["errors"] for run in result.runs.values()),
    }
    return {name: value for name, value in found.items() if value is not None}
