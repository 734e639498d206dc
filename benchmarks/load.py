"""What a load is: something that goes through a contender, with a tool that says how it went.

Owns: nothing that lasts; a load is a value. Must never know a contender: it sees a port that
leads to its own target. The loads themselves are in bulk, request, message, visit, datagram and
start; catalog lists them.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from benchmarks.machine import BenchmarkError
from benchmarks.process import Child, run_tool

TOOL_LIMIT: Final = 10.0
"""Seconds that a tool may take beyond the time it was given."""
PROBE_LIMIT: Final = 2.0
"""Seconds for one try to reach the target."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a tool says of one run."""

    amount: float
    """What was carried, in the unit that the cost is for, whatever the tool did before its clock
    ran included: the CPU for that is counted too."""
    figures: Mapping[str, float]
    """The load's headline, and of rate (a second), mean, p50, p99 (seconds) and the others that
    report knows those that the tool tells. Without "errors" there were none."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a load finds when its turn has come."""

    port: int
    """Of 127.0.0.1; leads to the target."""
    target: int
    """The target's own port."""
    environment: Mapping[str, str]
    seconds: int
    """How long to measure."""
    children: Sequence[Child] = ()
    """The processes in between, by side."""
    command: Sequence[str] = ()
    """The contender's `help`, for the load that starts it."""


@dataclass(frozen=True, slots=True)
class Load(ABC):
    """One kind of load. Figures are seconds and bytes; `scale` brings the headline into `unit`."""

    network: ClassVar[str | None] = "tcp"
    """The contender must carry this; None: no tunnel is needed, only a command to start."""
    needs_sides: ClassVar[bool] = False
    """Whether it looks at the contender's processes, so that the straight way has no figures."""
    headline: ClassVar[str] = "rate"
    """The figure that the report puts first."""
    scale: ClassVar[float] = 1.0
    rounds_at_most: ClassVar[int | None] = None
    """Of steady figures that take long; None: as many as asked for."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What --only calls it: a family and what tells its loads apart, joined by "-"."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What the report calls it."""

    @property
    @abstractmethod
    def programs(self) -> tuple[str, ...]:
        """What must be on the PATH: tool and target."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """Unit of the headline."""

    @property
    @abstractmethod
    def cost_unit(self) -> str | None:
        """Unit of what is computed from CPU and amount; None: nothing is."""

    @property
    @abstractmethod
    def cost_scale(self) -> float:
        """What CPU seconds for one unit of the amount are multiplied with to be in cost_unit."""

    @abstractmethod
    def target(self, port: int, folder: Path) -> list[str]:
        """Return the command of the service that this load wants to reach."""

    @abstractmethod
    def answers(self, port: int, environment: Mapping[str, str]) -> bool:
        """Try once whether the target answers; not longer than PROBE_LIMIT."""

    @abstractmethod
    def warm_up(self, scene: Scene) -> None:
        """Run for a moment without measuring."""

    @abstractmethod
    def command(self, port: int, seconds: int) -> list[str]:
        """Return the command that makes the load."""

    @abstractmethod
    def parse(self, output: str) -> Sample:
        """Read the figures in what the command printed."""

    def measure(self, scene: Scene) -> Sample:
        """Make the load and return what its tool says.

        Raises:
            BenchmarkError: nothing came through, or the tool failed.
        """
        command = self.command(scene.port, scene.seconds)
        sample = self.parse(run_tool(command, scene.seconds + TOOL_LIMIT, scene.environment))
        if not sample.amount:
            errors = sample.figures.get("errors", 0)
            raise BenchmarkError(f"nothing came through; {errors:.0f} errors")
        return sample

    def why_not(self, path: str) -> str | None:
        """Return why it cannot be made on this machine, with this PATH; None if it can."""
        return missing(self.programs, path)

    def belongs_to(self, word: str) -> bool:
        """Whether a word of --only means this load: its name or the beginning of it."""
        return self.name == word or self.name.startswith(f"{word}-")


def missing(programs: Sequence[str], path: str) -> str | None:
    """Return why these programs cannot be used, or None when all are on this PATH."""
    absent = [program for program in programs if shutil.which(program, path=path) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not on the PATH"


def puzzled(tool: str, output: str) -> BenchmarkError:
    """Return the error for output that is none of what this tool should print."""
    return BenchmarkError(f"{tool} printed what we do not understand: {output[:60]!r}")
