"""The pictures: bars of one figure for every load; needs matplotlib.

Owns: nothing but the files it is told to write.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.load import Load
from benchmarks.result import Result

COLORS: Final = {"nodepass": "tab:blue", "direct": "tab:gray"}
"""By the beginning of a contender's name; the others have one colour together."""
OTHERS: Final = "tab:orange"
COLUMNS: Final = 2
"""Loads beside each other."""
WIDTH: Final = 14.0
BAR: Final = 0.25
AROUND: Final = 0.9
"""Inches: of all, the height of a bar, and what a load's title and axis take besides."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One load: a bar for each contender."""

    title: str
    unit: str
    bars: dict[str, list[float]]
    """The figure of every run."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_headlines(path: Path, results: Sequence[Result]) -> None:
    """Draw what each load puts first: a rate, a time, a size."""
    _draw(path, [_panel(load, mine, load.headline) for load, mine in _by_load(results).items()])


def draw_costs(path: Path, results: Sequence[Result]) -> bool:
    """Draw the CPU that each load costs; return whether there was any."""
    panels = [
        _panel(load, mine, "cost")
        for load, mine in _by_load(results).items()
        if any("cost" in run for result in mine for run in result.runs.values())
    ]
    if panels:
        _draw(path, panels)
    return bool(panels)


def _by_load(results: Sequence[Result]) -> dict[Load, list[Result]]:
    found: dict[Load, list[Result]] = {}
    for result in results:
        found.setdefault(result.load, []).append(result)
    return found


def _panel(load: Load, results: Sequence[Result], figure: str) -> _Panel:
    scale, unit = (1.0, load.cost_unit or "") if figure == "cost" else (load.scale, load.unit)
    if figure != "rate":
        unit += ", less is better"
    bars = {
        result.contender: [run[figure] * scale for run in result.runs.values() if figure in run]
        for result in results
    }
    return _Panel(load.title, unit, {name: values for name, values in bars.items() if values})


def _draw(path: Path, panels: Sequence[_Panel]) -> None:
    """Draw medians as bars, with least and most."""
    importlib.import_module("matplotlib").use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    most = [max(len(panel.bars) for panel in row) for row in rows]
    heights = [AROUND + BAR * bars for bars in most]
    figure, all_axes = pyplot.subplots(
        len(rows),
        COLUMNS,
        figsize=(WIDTH, sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    for number, (panel, axes) in enumerate(zip(panels, all_axes.flat, strict=False)):
        middles = [statistics.median(values) for values in panel.bars.values()]
        pairs = list(zip(middles, panel.bars.values(), strict=True))
        below = [middle - min(values) for middle, values in pairs]
        above = [max(values) - middle for middle, values in pairs]
        axes.barh(
            list(panel.bars),
            middles,
            xerr=[below, above],
            capsize=3,
            color=[COLORS.get(name.partition("-")[0], OTHERS) for name in panel.bars],
        )
        axes.set_ylim(most[number // COLUMNS] - 0.5, -0.5)  # from above; bars of one thickness
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.set_xlabel(panel.unit)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
