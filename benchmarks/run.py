"""Compare tunnels on this machine: every contender under every load; README.md has the method.

    .venv/bin/python -m benchmarks.run --quick

Owns: a temporary folder for configs and logs, and the folder that the results go to.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from benchmarks import catalog, machine, picture, report
from benchmarks import contender as contenders
from benchmarks.contender import Contender
from benchmarks.load import Load, missing
from benchmarks.machine import HERE, BenchmarkError
from benchmarks.result import Outcome, Result
from benchmarks.stage import Stage

RESULTS: Final = HERE / "results"
QUICK: Final = ("direct", "nodepass", "nodepass-tls", "haproxy", "haproxy-tls")
"""Names of the contenders that --quick takes."""

Plan = list[tuple[Load, list[Contender]]]
"""What to measure: each load, and who is to carry it."""


# --- what to measure -------------------------------------------------------------------------


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


def plan(options: argparse.Namespace, path: str, outcome: Outcome) -> Plan:
    """Say who is to meet which load; leave out what cannot be measured here, and say why.

    Who is named on the command line meets every load that it can, whatever its row prefers.

    Raises:
        BenchmarkError: the command line names what there is not.
    """
    rows = pick(contenders.read(options.contenders), options.contender)
    if options.quick and not options.contender:
        rows = [row for row in rows if row.name in QUICK]
    loads = _chosen(options.only or (catalog.QUICK if options.quick else catalog.ALL))
    found: Plan = []
    for load in loads:
        if (why := load.why_not(path)) is not None:
            _skip(outcome, load.name, why)
        meeting = [
            row for row in rows if row.suits(load) and (options.contender or row.prefers(load))
        ]
        if meeting:
            found.append((load, meeting))
        elif options.only:
            _skip(outcome, load.name, "none of these contenders suits it")
    for row in rows:
        if (why := missing(row.programs, path)) is not None:
            _skip(outcome, row.name, why)
        elif options.contender and not any(row in meeting for _, meeting in found):
            _skip(outcome, row.name, "none of these loads suits it")
    left = [
        (load, [row for row in meeting if row.name not in outcome.skipped])
        for load, meeting in found
        if load.name not in outcome.skipped
    ]
    return [(load, meeting) for load, meeting in left if meeting]


def _chosen(words: Sequence[str]) -> list[Load]:
    try:
        return catalog.choose(words)
    except BenchmarkError as error:
        raise BenchmarkError(f"--only: {error}") from None


def _skip(outcome: Outcome, name: str, why: str) -> None:
    outcome.skipped[name] = why
    progress(f"skipped: {name}: {why}")


# --- all runs --------------------------------------------------------------------------------


def measure(stage: Stage, meetings: Plan, rounds: int, outcome: Outcome) -> None:
    """Measure everything in turn, every other round backwards.

    A contender that has failed under a load is not tried again under it; what it had is kept.
    """
    turns = {load: min(rounds, load.rounds_at_most or rounds) for load, _ in meetings}
    total = sum(turns[load] * len(rows) for load, rows in meetings)
    count = 0
    for load, rows in meetings:
        results = {row.name: Result(load, row.name, "tls" in row.protocols) for row in rows}
        for turn in range(turns[load]):
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


def progress(line: str) -> None:
    """Tell whoever waits."""
    print(line, file=sys.stderr, flush=True)


# --- the command -----------------------------------------------------------------------------


def benchmark(options: argparse.Namespace) -> int:
    """Measure, write and print; return the exit code."""
    start = time.monotonic()
    machine.raise_file_limit()
    outcome = Outcome()
    variables = machine.environment()
    meetings = plan(options, variables["PATH"], outcome)
    rows = list({row.name: row for _, meeting in meetings for row in meeting}.values())
    with tempfile.TemporaryDirectory(prefix="nodepass-bench-") as name:
        folder = Path(name)
        files = contenders.make_files(rows, folder, variables)
        measure(Stage(folder, variables, files, options.seconds), meetings, options.runs, outcome)
    if not outcome.results:
        raise BenchmarkError("nothing could be measured")
    around = machine.surroundings() | {
        "seconds": options.seconds,
        "rounds": options.runs,
        "took": round(time.monotonic() - start, 1),
    }
    text = report.markdown(outcome) + "\n\n" + footer(around)
    print(text)
    save(options.out, around, outcome, text)
    named = {*options.contender, *(load.name for load in _chosen(options.only))}
    return 1 if outcome.failed or named & outcome.skipped.keys() else 0


def footer(around: Mapping[str, object]) -> str:
    """Say what the figures depend on, in one line."""
    return (
        f"Median of {around['rounds']} runs of {around['seconds']} s; loopback, "
        f"kernel {around['kernel']}, {around['cores']} cores, Python {around['python']}, "
        f"commit {around['commit']}, {around['took']:.0f} s in all."
    )


def save(folder: Path, around: Mapping[str, object], outcome: Outcome, text: str) -> None:
    """Write table, figures and pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text + "\n")
    report.write_json(folder / "figures.json", around, outcome)
    files = "table.md, figures.json"
    if picture.can_draw():
        picture.draw_headlines(folder / "figures.png", outcome.results)
        files += ", figures.png"
        if picture.draw_costs(folder / "cpu.png", outcome.results):
            files += ", cpu.png"
        progress(f"written to {folder}: {files}")
    else:
        progress(f"written to {folder}: {files}; no pictures, since matplotlib is not installed")


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
        prog="benchmarks.run", description="Compare tunnels on this machine."
    )
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{', '.join(catalog.QUICK)} for {', '.join(QUICK)}; 2 runs of 1 s",
    )
    parser.add_argument("--runs", type=_count, metavar="N", help="default: 5")
    parser.add_argument("--seconds", type=_count, metavar="S", help="of each run; default: 2")
    parser.add_argument(
        "--only",
        type=_words,
        default=(),
        metavar="LOAD,...",
        help=f"of {', '.join(catalog.ALL)}; or the beginning of a name, as bulk; default: all",
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
    options.runs = options.runs or (2 if options.quick else 5)
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
