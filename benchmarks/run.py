"""Compare tunnels on this machine: every contender under every load; README.md has the method.

    .venv/bin/python -m benchmarks.run --quick

Owns: for each run a target, a contender's processes and a load's tool, all of them children, and
a temporary folder for their configs and logs. Must never leave any of them behind.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from benchmarks import contender as contenders
from benchmarks import load as loads
from benchmarks import report
from benchmarks.bench_udp import (
    BenchmarkError,
    busy,
    environment_for,
    free_ports,
    progress,
    surroundings,
)
from benchmarks.contender import Contender, Place
from benchmarks.load import Load
from benchmarks.process import (
    PAUSE,
    START_LIMIT,
    Child,
    cpu_of,
    is_listening,
    memory_of,
    running,
)
from benchmarks.report import Figures, Outcome, Result

RESULTS: Final = Path(__file__).resolve().parent / "results"
SYSTEM_PATHS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where haproxy lies on Debian, although a user's PATH does not lead there."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What all runs have in common."""

    folder: Path
    environment: Mapping[str, str]
    certificate: Path | None
    seconds: int

    def run(self, contender: Contender, load: Load) -> Figures:
        """Measure once, with processes of its own, so that nothing of another run is left.

        Raises:
            BenchmarkError: something did not start, or nothing came through.
        """
        target, tunnel, visitors = free_ports(3)
        if not contender.sides:
            visitors = target
        place = Place(self.folder, self.environment, self.certificate, visitors, target, tunnel)
        command = load.target(target, self.folder)
        with running("target", command, self.folder, self.environment) as service:
            service.wait_until(lambda: is_listening(target), "a listener")
            with contenders.started(contender, place) as children:
                self._wait_for_answer(load, visitors, [service, *children])
                load.warm_up(visitors, target, self.environment)
                return self._measure(load, visitors, service, children)

    def _wait_for_answer(self, load: Load, port: int, children: Sequence[Child]) -> None:
        end = time.monotonic() + START_LIMIT
        while not load.answers(port, self.environment):
            for child in children:
                child.check()
            if time.monotonic() > end:
                raise BenchmarkError(f"no answer from the target in {START_LIMIT:.0f} s")
            time.sleep(PAUSE)

    def _measure(
        self, load: Load, port: int, service: Child, children: Sequence[Child]
    ) -> Figures:
        pids = [child.pid for child in children]
        before = (time.monotonic(), cpu_of(pids), busy(), cpu_of([service.pid]) + _tools())
        sample = load.measure(port, self.seconds, self.environment)
        after = (time.monotonic(), cpu_of(pids), busy(), cpu_of([service.pid]) + _tools())
        for child in children:
            child.check()
        passed, spent, everybody, load_and_target = (
            new - old for new, old in zip(after, before, strict=True)
        )
        figures = {
            "rate": sample.rate,
            **sample.latency,
            "errors": float(sample.errors),
            "strangers": max(0.0, everybody - spent - load_and_target) / passed,
        }
        if pids:
            figures["cost"] = spent / sample.amount * load.cost_scale
            figures["cores"] = spent / passed
            figures["memory"] = memory_of(pids)
        return figures


def _tools() -> float:
    """CPU seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- all runs --------------------------------------------------------------------------------


def measure(
    stage: Stage,
    chosen: Sequence[Load],
    rows: Sequence[Contender],
    runs: int,
    outcome: Outcome,
) -> None:
    """Measure everything in turn, every other round backwards.

    A contender that has failed under a load is not tried again under it; what it had is kept.
    """
    total = len(chosen) * len(rows) * runs
    count = 0
    for load in chosen:
        results = {row.name: Result(load, row.name, "tls" in row.protocols) for row in rows}
        for turn in range(runs):
            for row in rows if turn % 2 == 0 else rows[::-1]:
                count += 1
                both = f"{row.name} under {load.name}"
                if both in outcome.failed:
                    continue
                head = f"[{count}/{total}] {load.name}, round {turn + 1}: {row.name}"
                try:
                    figures = stage.run(row, load)
                except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
                    outcome.failed[both] = str(error)
                    progress(f"{head} failed: {error}")
                    continue
                results[row.name].runs[turn] = figures
                progress(f"{head}: {report.brief(load, figures)}")
        outcome.results += [result for result in results.values() if result.runs]


def sort_out(
    chosen: Sequence[Load], rows: Sequence[Contender], path: str, outcome: Outcome
) -> tuple[list[Load], list[Contender]]:
    """Leave out what cannot be measured here, and say why."""
    wanted = [(load.name, load.programs) for load in chosen]
    wanted += [(row.name, row.programs) for row in rows]
    for name, programs in wanted:
        why = contenders.missing(programs, path)
        if why is not None:
            outcome.skipped[name] = why
            progress(f"skipped: {name}: {why}")
    kept = [load for load in chosen if load.name not in outcome.skipped]
    return kept, [row for row in rows if row.name not in outcome.skipped]


def environment() -> dict[str, str]:
    """Return the environment of all children: this checkout, and the way to the daemons."""
    found = environment_for(None)
    found["PATH"] = os.pathsep.join([found.get("PATH", os.defpath), *SYSTEM_PATHS])
    found["LC_ALL"] = "C"  # tools print points, not commas
    return found


def pick(rows: Sequence[Contender], names: Sequence[str]) -> list[Contender]:
    """Return the rows of these names, in the order of the file; all of them without names.

    Raises:
        BenchmarkError: there is no such row.
    """
    known = [row.name for row in rows]
    for name in names:
        if name not in known:
            raise BenchmarkError(f"--contender: {name!r} is none of {', '.join(known)}")
    return [row for row in rows if not names or row.name in names]


# --- the command -----------------------------------------------------------------------------


def benchmark(options: argparse.Namespace) -> int:
    """Measure, write and print; return the exit code."""
    rows = pick(contenders.read(options.contenders), options.contender)
    outcome = Outcome()
    variables = environment()
    chosen = loads.choose(options.only or (loads.QUICK if options.quick else loads.ALL))
    named = {*options.contender, *(load.name for load in chosen if options.only)}
    chosen, rows = sort_out(chosen, rows, variables["PATH"], outcome)
    around = surroundings(None)
    del around["warm_up"], around["engine"]  # bench_udp's; here NODEPASS_ENGINE chooses
    around |= {"seconds": options.seconds, "rounds": options.runs}
    with tempfile.TemporaryDirectory(prefix="nodepass-bench-") as name:
        folder = Path(name)
        certificate = None
        if any(row.wants("certificate") for row in rows):
            certificate = contenders.make_certificate(folder, variables)
        stage = Stage(folder, variables, certificate, options.seconds)
        measure(stage, chosen, rows, options.runs, outcome)
    if not outcome.results:
        raise BenchmarkError("nothing could be measured")
    text = report.markdown(outcome) + "\n\n" + footer(around)
    print(text)
    save(options.out, around, outcome, text)
    return 1 if outcome.failed or named & outcome.skipped.keys() else 0


def footer(around: Mapping[str, object]) -> str:
    """Say what the figures depend on, in one line."""
    return (
        f"Median of {around['rounds']} runs of {around['seconds']} s; loopback, "
        f"kernel {around['kernel']}, {around['cores']} cores, Python {around['python']}, "
        f"commit {around['commit']}."
    )


def save(folder: Path, around: Mapping[str, object], outcome: Outcome, text: str) -> None:
    """Write table, figures and picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    report.write_json(folder / "figures.json", around, outcome)
    files = "table.md, figures.json"
    if report.can_draw():
        report.draw(folder / "rates.png", outcome.results)
        progress(f"written to {folder}: {files}, rates.png")
    else:
        progress(f"written to {folder}: {files}; no picture, since matplotlib is not installed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    options = parse(argv)
    try:
        return benchmark(options)
    except (BenchmarkError, OSError) as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.run: interrupted", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; --quick only moves defaults."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description="Compare TCP tunnels on this machine."
    )
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    parser.add_argument("--quick", action="store_true", help="three loads, 3 runs of 1 s")
    parser.add_argument("--runs", type=_count, metavar="N", help="default: 5")
    parser.add_argument("--seconds", type=_count, metavar="S", help="of each run; default: 2")
    parser.add_argument(
        "--only",
        type=_words,
        default=(),
        metavar="LOAD,...",
        help=f"of {', '.join(loads.ALL)}; or the beginning of a name, as bulk; default: all",
    )
    parser.add_argument(
        "--contender", type=_words, default=(), metavar="NAME,...", help="default: all rows"
    )
    parser.add_argument(
        "--contenders", type=Path, default=contenders.FILE, metavar="FILE", help="other rows"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / stamp, metavar="DIR", help="where to write"
    )
    options = parser.parse_args(argv)
    options.runs = options.runs or (3 if options.quick else 5)
    options.seconds = options.seconds or (1 if options.quick else 2)
    return options


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
