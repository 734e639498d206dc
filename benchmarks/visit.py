"""Visits: the first byte of a new visitor, and thousands of visitors that stay and say nothing.

Both are made by visitor.py and answered by echo.py, each in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import socket
import subprocess
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.load import PROBE_LIMIT, TOOL_LIMIT, Load, Sample, Scene, missing, puzzled
from benchmarks.machine import HERE, BenchmarkError
from benchmarks.process import Child, cpu_of, pss_of

PYTHON: Final = (sys.executable, "-I")
OPEN_LIMIT: Final = 120.0
"""Seconds until all idle connections are there: 24 ms for each of 5000."""
SETTLE: Final = 5.0
"""Seconds until what opening has left to do is done: after 1 s haproxy was still busy with 1 % of
a core, after 5 s with nothing."""
IDLE: Final = 5.0
"""Seconds of silence in which CPU is looked at; one tick of 10 ms is then 0.2 %."""
SPARE_FILES: Final = 1000
"""Files a process may have open besides those of its relays: idle links, listeners, pipes."""


@dataclass(frozen=True, slots=True)
class Visit(Load):
    """What all loads with visitor.py have in common."""

    programs = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """As Load's."""

    def target(self, port: int, folder: Path) -> list[str]:
        del folder
        return [*PYTHON, str(HERE / "echo.py"), str(port)]

    def answers(self, port: int, environment: Mapping[str, str]) -> bool:
        del environment
        try:
            with socket.create_connection(("127.0.0.1", port), PROBE_LIMIT) as stream:
                stream.sendall(b"?")
                return stream.recv(1) == b"?"
        except OSError:
            return False


# --- the first byte --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FirstByte(Visit):
    """One visitor after another: connect, send a byte, get it back, go."""

    name = "first-byte"
    title = "a new visitor's first byte there and back, connect included, one at a time"
    headline = "p50"
    unit = "µs"
    scale = 1e6
    cost_unit = "CPU ms/connection"
    cost_scale = 1e3

    def warm_up(self, scene: Scene) -> None:
        """Nothing: visitor.py does not count its first visits."""

    def command(self, port: int, seconds: int) -> list[str]:
        return [*PYTHON, str(HERE / "visitor.py"), "first-byte", str(port), str(seconds)]

    def parse(self, output: str) -> Sample:
        return parse_visitor(output)


def parse_visitor(output: str) -> Sample:
    """Read the JSON of visitor.py; visits that failed have no time, and count as errors."""
    try:
        found = json.loads(output)
        came = found.pop("visits") - found["errors"]
        figures = {name: float(value) for name, value in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise puzzled("visitor.py", output) from None
    return Sample(came if "p50" in figures else 0, figures)


# --- those who stay --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Idle(Visit):
    """So many relays that carry nothing: their memory, and what they keep the CPU busy with."""

    relays: int

    needs_sides = True
    rounds_at_most = 3
    headline = "relay"
    unit = "KiB/relay"
    scale = 1 / 1024
    cost_unit = None
    cost_scale = 1.0

    @property
    def name(self) -> str:
        return f"idle-{self.relays}"

    @property
    def title(self) -> str:
        return f"{self.relays} idle relays: process memory for each, the side that needs more"

    def why_not(self, path: str) -> str | None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        needed = 2 * self.relays + SPARE_FILES
        if hard < needed:
            return f"it takes {needed} open files for each process; the limit is {hard}"
        return missing(self.programs, path)

    def warm_up(self, scene: Scene) -> None:
        """Nothing: traffic would leave memory behind that then seems to be there before."""

    def command(self, port: int, seconds: int) -> list[str]:
        del seconds
        return [*PYTHON, str(HERE / "visitor.py"), "idle", str(port), str(self.relays)]

    def parse(self, output: str) -> Sample:
        raise puzzled("visitor.py", output)  # measure() talks to it line by line

    def measure(self, scene: Scene) -> Sample:
        """Look at both sides before, with all relays open, and after a silence.

        The visitors' process exists before the first look: pages that it shares with others
        would otherwise seem to become fewer.
        """
        with self._visitors(scene) as ask:
            ask("", "ready", TOOL_LIMIT)
            before = _memory(scene.children)
            ask("open", f"open {self.relays}", OPEN_LIMIT)
            time.sleep(SETTLE)
            after = _memory(scene.children)
            share = _cpu_share(scene.children)
            ask("check", f"whole {self.relays}", OPEN_LIMIT)
        sides = {f"relay_{name}": (after[name] - before[name]) / self.relays for name in before}
        return Sample(self.relays, {"relay": max(sides.values()), **sides, "idle_cpu": share})

    @contextlib.contextmanager
    def _visitors(self, scene: Scene) -> Iterator[_Ask]:
        with subprocess.Popen(
            self.command(scene.port, scene.seconds),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=scene.environment,
        ) as tool:
            try:
                yield _Ask(tool)
            finally:
                tool.kill()


@dataclass(frozen=True, slots=True)
class _Ask:
    """The way to tell visitor.py something."""

    tool: subprocess.Popen[str]

    def __call__(self, word: str, expected: str, limit: float) -> None:
        """Say a word, if any, and wait for the answer; BenchmarkError if another one comes."""
        assert self.tool.stdin is not None
        assert self.tool.stdout is not None
        if word:
            self.tool.stdin.write(f"{word}\n")
            self.tool.stdin.flush()
        if not select.select([self.tool.stdout], [], [], limit)[0]:
            raise BenchmarkError(f"visitor.py: {expected!r} did not come in {limit:.0f} s")
        said = self.tool.stdout.readline().strip()
        if said != expected:
            raise BenchmarkError(f"visitor.py: {said or 'it ended'}")


def _memory(children: Sequence[Child]) -> dict[str, float]:
    return {child.name: pss_of([child.pid]) for child in children}


def _cpu_share(children: Sequence[Child]) -> float:
    """CPU seconds a second of all of them together, during IDLE."""
    pids = [child.pid for child in children]
    start, used = time.monotonic(), cpu_of(pids)
    time.sleep(IDLE)
    return (cpu_of(pids) - used) / (time.monotonic() - start)
