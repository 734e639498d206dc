"""The figures of all runs: medians and ratios, as tables, JSON and a picture.

Owns: nothing but what it writes into the folder it is given. Must never measure. The picture
needs matplotlib, and is left out where that is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.bench_udp import DISTURBED
from benchmarks.load import Load

STRAIGHT: Final = "direct"
"""The contender that all others are divided by."""
RIVALS: Final = {False: "haproxy", True: "haproxy-tls"}
"""The one that a contender is divided by besides, without and with TLS."""
NONE: Final = "–"

Figures = dict[str, float]
"""One run: rate; of a contender that has processes also cost, memory, cores (CPU a second); mean,
p50, p99 where the tool tells; errors; and the cores that others used meanwhile (strangers)."""


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


# --- figures ---------------------------------------------------------------------------------


def median(result: Result, figure: str) -> float | None:
    """The median of those runs that have this figure, or None."""
    values = [run[figure] for run in result.runs.values() if figure in run]
    return statistics.median(values) if values else None


def ratio(result: Result, other: Result | None, figure: str) -> float | None:
    """The median of the quotients of runs of the same round, or None without such runs."""
    if other is None:
        return None
    quotients = [
        run[figure] / other.runs[turn][figure]
        for turn, run in result.runs.items()
        if figure in run and other.runs.get(turn, {}).get(figure)
    ]
    return statistics.median(quotients) if quotients else None


def summary(outcome: Outcome, result: Result) -> dict[str, float]:
    """Medians, spread and ratios of one result; only those that there are."""
    straight = outcome.find(result.load, STRAIGHT)
    rival = outcome.find(result.load, RIVALS[result.is_tls])
    rates = [run["rate"] for run in result.runs.values()]
    found: dict[str, float | None] = {
        "rate": median(result, "rate"),
        "least": min(rates),
        "most": max(rates),
        "rate_of_direct": ratio(result, straight, "rate"),
        "rate_of_haproxy": ratio(result, rival, "rate"),
        "cost": median(result, "cost"),
        "cost_of_haproxy": ratio(result, rival, "cost"),
        "mean": median(result, "mean"),
        "mean_of_haproxy": ratio(result, rival, "mean"),
        "p50": median(result, "p50"),
        "p99": median(result, "p99"),
        "memory": median(result, "memory"),
        "errors": sum(run["errors"] for run in result.runs.values()),
    }
    return {name: value for name, value in found.items() if value is not None}


def brief(load: Load, figures: Figures) -> str:
    """One run in a few words."""
    text = f"{number(figures['rate'])} {load.rate_unit}"
    if "cost" in figures:
        text += f", {number(figures['cost'])} {load.cost_unit}"
    if "mean" in figures:
        text += f", {microseconds(figures['mean'])} mean"
    if figures["errors"]:
        text += f", {figures['errors']:.0f} errors"
    if figures["strangers"] > DISTURBED:
        text += f", while others used {figures['strangers']:.1f} cores"
    return text


# --- tables ----------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def microseconds(value: float) -> str:
    """Seconds as microseconds."""
    return f"{value * 1e6:.0f} µs"


def megabytes(value: float) -> str:
    """Bytes as MB."""
    return f"{value / 1e6:.0f} MB"


def markdown(outcome: Outcome) -> str:
    """All that was found, as one table for each load, and what was not measured."""
    parts = [_table(outcome, load) for load in outcome.loads()]
    parts += [f"Skipped: {name}: {why}" for name, why in outcome.skipped.items()]
    parts += [f"Failed: {name}: {why}" for name, why in outcome.failed.items()]
    strangers = [run["strangers"] for result in outcome.results for run in result.runs.values()]
    if strangers and max(strangers) > DISTURBED:
        middle, most = statistics.median(strangers), max(strangers)
        parts.append(f"Disturbed: others used {middle:.1f} cores (median), {most:.1f} at most.")
    return "\n\n".join(parts)


def _table(outcome: Outcome, load: Load) -> str:
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("of direct", "rate_of_direct", number),
        ("of haproxy", "rate_of_haproxy", number),
        (load.cost_unit, "cost", number),
        ("of haproxy", "cost_of_haproxy", number),
        ("latency, mean", "mean", microseconds),
        ("of haproxy", "mean_of_haproxy", number),
        ("p50", "p50", microseconds),
        ("p99", "p99", microseconds),
        ("memory", "memory", megabytes),
        ("errors", "errors", "{:.0f}".format),
    ]
    found = {
        result.contender: summary(outcome, result)
        for result in outcome.results
        if result.load == load
    }
    columns = [column for column in columns if any(row.get(column[1]) for row in found.values())]
    titles = ["contender", f"{load.rate_unit} (least – most)", *(title for title, *_ in columns)]
    rows = [titles, ["---", *["--:"] * (len(titles) - 1)]]
    for contender, row in found.items():
        spread = f"{number(row['least'])} – {number(row['most'])}"
        cells = [show(row[key]) if key in row else NONE for _, key, show in columns]
        rows.append([contender, f"{number(row['rate'])} ({spread})", *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"### {load.name}: {load.title}", "", *lines])


# --- files -----------------------------------------------------------------------------------


def write_json(path: Path, around: Mapping[str, object], outcome: Outcome) -> None:
    """Write everything that was measured, run by run."""
    rows = [
        {
            "load": result.load.name,
            "title": result.load.title,
            "rate_unit": result.load.rate_unit,
            "cost_unit": result.load.cost_unit,
            "contender": result.contender,
            "tls": result.is_tls,
            "median": summary(outcome, result),
            "runs": [{"round": turn, **run} for turn, run in result.runs.items()],
        }
        for result in outcome.results
    ]
    content = {
        **around,
        "skipped": outcome.skipped,
        "failed": outcome.failed,
        "results": rows,
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draw the rates of each load as bars, with least and most; needs matplotlib."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    loads = list(dict.fromkeys(result.load for result in results))
    height = 0.8 + 0.3 * max(len(results) / len(loads), 3)
    figure, all_axes = pyplot.subplots(
        len(loads), 1, figsize=(9, height * len(loads)), squeeze=False, layout="constrained"
    )
    for load, axes in zip(loads, all_axes[:, 0], strict=True):
        mine = [result for result in results if result.load == load]
        names = [result.contender for result in mine]
        rates = [[run["rate"] for run in result.runs.values()] for result in mine]
        middles = [statistics.median(values) for values in rates]
        below = [middle - min(values) for middle, values in zip(middles, rates, strict=True)]
        above = [max(values) - middle for middle, values in zip(middles, rates, strict=True)]
        axes.barh(names, middles, xerr=[below, above], capsize=3)
        axes.invert_yaxis()
        axes.set_title(load.title, loc="left", fontsize=10)
        axes.set_xlabel(load.rate_unit)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
