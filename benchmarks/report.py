"""The report: the figures of all runs as tables and as JSON.

Owns: nothing but the file it is told to write. Must never measure.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from benchmarks import aim
from benchmarks.load import Load
from benchmarks.machine import DISTURBED
from benchmarks.result import RIVALS, Figures, Outcome, median, ratio, summary

NONE: Final = "–"


# --- cells -----------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def microseconds(value: float) -> str:
    """Seconds as microseconds."""
    return f"{value * 1e6:.0f} µs"


def megabytes(value: float) -> str:
    """Bytes as MB."""
    return f"{value / 1e6:.0f} MB"


def kibibytes(value: float) -> str:
    """Bytes as KiB."""
    return f"{number(value / 1024)} KiB"


def percent(value: float) -> str:
    """A share as per cent, with enough digits for a loss or an idle CPU."""
    return f"{value:.3%}"


def count(value: float) -> str:
    """A whole number."""
    return f"{value:.0f}"


COLUMNS: Final[tuple[tuple[str, str, Callable[[float], str]], ...]] = (
    ("latency, mean", "mean", microseconds),
    ("of haproxy", "mean_of_haproxy", number),
    ("p50", "p50", microseconds),
    ("p99", "p99", microseconds),
    ("loss", "loss", percent),
    ("server", "relay_server", kibibytes),
    ("client", "relay_client", kibibytes),
    ("idle CPU", "idle_cpu", percent),
    ("memory", "memory", megabytes),
    ("errors", "errors", count),
    ("drops", "drops", count),
)
"""Title, figure and how to show it, for those figures that every load may have."""
OURS: Final = {"haproxy": "nodepass", "haproxy-tls": "nodepass-tls"}
"""Which row of ours is compared with a rival's in the overview."""
HIDDEN: Final = {"mean": ("mean_of_haproxy",), "p50": ("mean", "mean_of_haproxy")}
"""What needs no column of its own when this is the headline."""
SHOWN_AT_ZERO: Final = ("loss", "idle_cpu")
"""Figures that say something when they are 0; a column that is 0 otherwise is left out."""


def brief(load: Load, figures: Figures) -> str:
    """One run in a few words."""
    text = f"{number(figures[load.headline] * load.scale)} {load.unit}"
    if "cost" in figures:
        text += f", {number(figures['cost'])} {load.cost_unit}"
    if "mean" in figures and load.headline == "rate":
        text += f", {microseconds(figures['mean'])} mean"
    if figures.get("sent"):
        text += f", loss {percent(figures['lost'] / figures['sent'])}"
    if "idle_cpu" in figures:
        text += f", idle CPU {percent(figures['idle_cpu'])}"
    for name in ("errors", "drops"):
        if figures.get(name):
            text += f", {figures[name]:.0f} {name}"
    if figures["strangers"] > DISTURBED:
        text += f", while others used {figures['strangers']:.1f} cores"
    return text


# --- tables ----------------------------------------------------------------------------------


def markdown(outcome: Outcome) -> str:
    """All that was found: a table for each load, the aims, and what was not measured."""
    parts = [_overview(outcome)] if len(outcome.loads()) > 1 else []
    parts += [_table(outcome, load) for load in outcome.loads()]
    reached = aim.reached(outcome)
    if reached:
        parts.append(_aims(reached))
    parts += [f"Skipped: {name}: {why}" for name, why in outcome.skipped.items()]
    parts += [f"Failed: {name}: {why}" for name, why in outcome.failed.items()]
    strangers = [run["strangers"] for result in outcome.results for run in result.runs.values()]
    if strangers and max(strangers) > DISTURBED:
        middle, most = statistics.median(strangers), max(strangers)
        parts.append(f"Disturbed: others used {middle:.1f} cores (median), {most:.1f} at most.")
    return "\n\n".join(parts)


def _overview(outcome: Outcome) -> str:
    """The first figure of each contender under each load, and ours as parts of the rivals'."""
    names = list(dict.fromkeys(result.contender for result in outcome.results))
    titles = ["load"]
    for name in names:
        titles.append(name)
        if name in RIVALS.values():
            titles.append(f"{OURS[name]} of it")
    rows = []
    for load in outcome.loads():
        row = [f"{load.name}, {load.unit}"]
        for name in names:
            result = outcome.find(load, name)
            value = None if result is None else median(result, load.headline)
            row.append(NONE if value is None else number(value * load.scale))
            if name in RIVALS.values():
                ours = outcome.find(load, OURS[name])
                part = None if ours is None else ratio(ours, result, load.headline)
                row.append(NONE if part is None else number(part))
        rows.append(row)
    return "\n".join(["### Overview", "", *_lines(titles, rows)])


def _table(outcome: Outcome, load: Load) -> str:
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("of direct", "headline_of_direct", number),
        ("of haproxy", "headline_of_haproxy", number),
    ]
    if load.cost_unit is not None:
        columns += [(load.cost_unit, "cost", number), ("of haproxy", "cost_of_haproxy", number)]
    hidden = (load.headline, *HIDDEN.get(load.headline, ()))
    columns += [column for column in COLUMNS if column[1] not in hidden]
    found = {
        result.contender: summary(outcome, result)
        for result in outcome.results
        if result.load == load
    }
    columns = [
        (title, key, show)
        for title, key, show in columns
        if any(row.get(key) or (key in row and key in SHOWN_AT_ZERO) for row in found.values())
    ]
    titles = ["contender", f"{load.unit} (least – most)", *(title for title, *_ in columns)]
    rows = []
    for contender, row in found.items():
        middle, least, most = (
            number(row[key] * load.scale) for key in (load.headline, "least", "most")
        )
        cells = [show(row[key]) if key in row else NONE for _, key, show in columns]
        rows.append([contender, f"{middle} ({least} – {most})", *cells])
    return "\n".join([f"### {load.name}: {load.title}", "", *_lines(titles, rows)])


def _aims(reached: list[aim.Reached]) -> str:
    rows = [[one.aim.text, one.text, "yes" if one.is_met else "no"] for one in reached]
    return "\n".join(["### Aims", "", *_lines(["aim", "reached (least – most)", "met"], rows)])


def _lines(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Lay a table out, numbers to the right."""
    rule = ["---", *["--:"] * (len(titles) - 1)]
    return [f"| {' | '.join(row)} |" for row in (titles, rule, *rows)]


# --- the file --------------------------------------------------------------------------------


def write_json(path: Path, around: Mapping[str, object], outcome: Outcome) -> None:
    """Write everything that was measured, run by run, in seconds and bytes."""
    rows = [
        {
            "load": result.load.name,
            "title": result.load.title,
            "headline": result.load.headline,
            "unit": result.load.unit,
            "scale": result.load.scale,
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
        "aims": [one.fields() for one in aim.reached(outcome)],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
