"""The stage: where one contender meets one load, once.

Owns: for each run a target, the contender's processes and the load's tool, all of them children.
Must never leave any of them behind.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import contender as contenders
from benchmarks.contender import Contender, Place, command_of
from benchmarks.load import Load, Scene
from benchmarks.machine import BenchmarkError, busy, free_ports
from benchmarks.process import (
    PAUSE,
    START_LIMIT,
    Child,
    cpu_of,
    is_listening,
    memory_of,
    running,
)
from benchmarks.result import Figures


@dataclass(frozen=True, slots=True)
class Stage:
    """What all runs have in common."""

    folder: Path
    environment: Mapping[str, str]
    files: Mapping[str, Path]
    """What rows want besides: certificate, key."""
    seconds: int

    def run(self, contender: Contender, load: Load) -> Figures:
        """Measure once, with processes of its own, so that nothing of another run is left.

        Raises:
            BenchmarkError: something did not start, or nothing came through.
        """
        target, tunnel, visitors = free_ports(3)
        if not contender.sides:
            visitors = target
        network = load.network or "tcp"
        place = Place(self.folder, self.environment, self.files, network, visitors, target, tunnel)
        if load.network is None:
            values = place.values(self.folder / "none")
            words = command_of(contender.help, values, self.environment)
            return self._measure(
                load, Scene(0, 0, self.environment, self.seconds, command=words), []
            )
        command = load.target(target, self.folder)
        with running("target", command, self.folder, self.environment) as service:
            service.wait_until(lambda: is_listening(target, network), "a listener")
            with contenders.started(contender, place) as children:
                self._wait_for_answer(load, visitors, [service, *children])
                scene = Scene(visitors, target, self.environment, self.seconds, children)
                return self._measure(load, scene, [service])

    def _wait_for_answer(self, load: Load, port: int, children: Sequence[Child]) -> None:
        end = time.monotonic() + START_LIMIT
        while not load.answers(port, self.environment):
            for child in children:
                child.check()
            if time.monotonic() > end:
                raise BenchmarkError(f"no answer from the target in {START_LIMIT:.0f} s")
            time.sleep(PAUSE)

    def _measure(self, load: Load, scene: Scene, services: Sequence[Child]) -> Figures:
        load.warm_up(scene)
        pids = [child.pid for child in scene.children]
        ours = [service.pid for service in services]
        before = (time.monotonic(), cpu_of(pids), busy(), cpu_of(ours) + _tools())
        sample = load.measure(scene)
        after = (time.monotonic(), cpu_of(pids), busy(), cpu_of(ours) + _tools())
        for child in scene.children:
            child.check()
        passed, spent, everybody, load_and_target = (
            new - old for new, old in zip(after, before, strict=True)
        )
        figures = {
            "errors": 0.0,
            **sample.figures,
            "strangers": max(0.0, everybody - spent - load_and_target) / passed,
        }
        if pids:
            if load.cost_unit is not None:
                figures["cost"] = spent / sample.amount * load.cost_scale
            figures["cores"] = spent / passed
            figures["memory"] = memory_of(pids)
        return figures


def _tools() -> float:
    """CPU seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
