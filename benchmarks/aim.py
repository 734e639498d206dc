"""The aims: what nodepass is to reach, as ratios to others in the same run where there are any.

Owns: nothing. A ratio is the median over the rounds of a figure of ours divided by the other's of
the same round, since shared machines make absolute figures mean little.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Final

from benchmarks.result import Outcome, Result, loss, quotients


@dataclass(frozen=True, slots=True)
class Aim:
    """One figure of one contender under one load, and its bound."""

    load: str
    contender: str
    figure: str
    bound: float
    """In `unit`, or in parts of the other's figure."""
    is_most: bool = False
    """The figure is to stay below the bound, not above it."""
    other: str | None = None
    """The contender that is divided by; None: the figure itself counts."""
    unit: str = ""
    """Of a figure that itself counts."""
    scale: float = 1.0
    """What the figure, in seconds or bytes, is multiplied with to be in the unit."""

    @property
    def text(self) -> str:
        """The aim in words."""
        sign = "≤" if self.is_most else "≥"
        bound = f"{self.bound:g}{self.unit}"
        if self.other is not None:
            bound = f"{self.bound:.2f} × {self.other}"
        return f"{self.load}, {self.contender}: {NAMES[self.figure]} {sign} {bound}"


@dataclass(frozen=True, slots=True)
class Reached:
    """What came of an aim."""

    aim: Aim
    value: float
    """The median; of a loss the share in all runs together."""
    least: float
    most: float

    @property
    def is_met(self) -> bool:
        """Whether the median keeps the bound."""
        return self.value <= self.aim.bound if self.aim.is_most else self.value >= self.aim.bound

    @property
    def text(self) -> str:
        """The figure in words, with what single runs reached."""
        digits = ".2f" if self.aim.other is not None else ".3g" if self.value < 1000 else ".0f"
        value, least, most = (
            f"{figure:{digits}}" for figure in (self.value, self.least, self.most)
        )
        unit = f" × {self.aim.other}" if self.aim.other is not None else self.aim.unit
        return f"{value}{unit} ({least} – {most})"

    def fields(self) -> dict[str, object]:
        """All of it for a file."""
        return {
            "aim": self.aim.text,
            "load": self.aim.load,
            "contender": self.aim.contender,
            "figure": self.aim.figure,
            "of": self.aim.other,
            "unit": self.aim.unit.strip() or None,
            "at_most" if self.aim.is_most else "at_least": self.aim.bound,
            "reached": self.value,
            "least": self.least,
            "most": self.most,
            "is_met": self.is_met,
        }


NAMES: Final = {
    "rate": "rate",
    "cost": "CPU",
    "mean": "mean latency",
    "p50": "time",
    "loss": "loss",
    "relay": "memory per relay and side",
    "idle_cpu": "CPU of both sides",
}
"""What the report calls a figure."""

AIMS: Final = (
    *(
        made
        for load in ("bulk-up-1", "bulk-up-4")
        for made in (
            Aim(load, "nodepass", "rate", 1.6, other="haproxy"),
            Aim(load, "nodepass", "cost", 0.45, is_most=True, other="haproxy"),
        )
    ),
    Aim("bulk-up-1", "nodepass-tls", "rate", 1.5, other="haproxy-tls"),
    Aim("bulk-up-1", "nodepass-tls", "cost", 0.65, is_most=True, other="haproxy-tls"),
    Aim("http-16", "nodepass", "rate", 1.1, other="haproxy"),
    Aim("http-1", "nodepass", "mean", 0.8, is_most=True, other="haproxy"),
    Aim("new-16", "nodepass", "rate", 0.6, other="haproxy"),
    Aim("new-16", "nodepass-tls", "rate", 800, unit="/s"),
    Aim("udp-200-1", "nodepass", "rate", 0.3, other="direct"),
    Aim("udp-200-1", "nodepass", "loss", 0.1, is_most=True, unit=" %", scale=100),
    Aim("idle-5000", "nodepass", "relay", 8, is_most=True, unit=" KiB", scale=1 / 1024),
    Aim("idle-5000", "nodepass", "idle_cpu", 1, is_most=True, unit=" %", scale=100),
    Aim("help", "nodepass", "p50", 150, is_most=True, unit=" ms", scale=1e3),
)


def reached(outcome: Outcome) -> list[Reached]:
    """Return what came of those aims whose figures were measured, in our order."""
    results = {(result.load.name, result.contender): result for result in outcome.results}
    found = []
    for aim in AIMS:
        ours = results.get((aim.load, aim.contender))
        other = results.get((aim.load, aim.other)) if aim.other is not None else None
        if ours is not None and (values := _values(aim, ours, other)):
            value = statistics.median(values)
            if aim.figure == "loss":
                value = (loss(ours) or 0.0) * aim.scale
            found.append(Reached(aim, value, min(values), max(values)))
    return found


def _values(aim: Aim, ours: Result, other: Result | None) -> list[float]:
    """The figure of each run, in the unit of the bound."""
    if aim.other is not None:
        return quotients(ours, other, aim.figure)
    if aim.figure == "loss":
        runs = [run for run in ours.runs.values() if run.get("sent")]
        return [run["lost"] / run["sent"] * aim.scale for run in runs]
    return [run[aim.figure] * aim.scale for run in ours.runs.values() if aim.figure in run]
