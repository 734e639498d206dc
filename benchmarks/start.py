"""Starts: how long a command takes from nothing to its end, the whole process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.load import TOOL_LIMIT, Load, Sample, Scene, puzzled
from benchmarks.process import run_tool

STARTS: Final = 10
"""Of each run; one takes 0.1 s, and the median of ten does not care for a slow one."""


@dataclass(frozen=True, slots=True)
class Help(Load):
    """The `help` command of a contender; no tunnel runs meanwhile."""

    network = None
    name = "help"
    title = "start-up: the whole process of --help"
    programs = ()
    headline = "p50"
    unit = "ms"
    scale = 1e3
    cost_unit = None
    cost_scale = 1.0

    def target(self, port: int, folder: Path) -> list[str]:
        del port, folder
        return []

    def answers(self, port: int, environment: Mapping[str, str]) -> bool:
        del port, environment
        return True

    def warm_up(self, scene: Scene) -> None:
        """Once, so that its files are in the kernel's cache."""
        run_tool(scene.command, TOOL_LIMIT, scene.environment)

    def command(self, port: int, seconds: int) -> list[str]:
        del port, seconds
        return []

    def parse(self, output: str) -> Sample:
        raise puzzled("help", output)  # what it prints is not looked at

    def measure(self, scene: Scene) -> Sample:
        """Start it again and again, one after another."""
        times: list[float] = []
        for _ in range(STARTS):
            start = time.perf_counter()
            run_tool(scene.command, TOOL_LIMIT, scene.environment)
            times.append(time.perf_counter() - start)
        return Sample(STARTS, {"p50": statistics.median(times), "mean": statistics.fmean(times)})
