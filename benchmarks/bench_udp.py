"""How many datagrams a second go through a tunnel, and what they cost; README.md has the method.

    .venv/bin/python benchmarks/bench_udp.py --quick

Owns: an echo, and for each run a server, a client and a load (all child processes), besides
`build/udpload`. Must never leave a process behind. Imports nothing of ours: it sees the program
as a user does, as two commands.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, NoReturn

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
COMPILER_FLAGS: Final = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")
WARM_UP: Final = 1.0
"""Seconds of load before the clock runs: 100 sessions over TLS exist by then."""
START_LIMIT: Final = 10.0
"""Seconds until the first echo through a tunnel; interpreters start in 0.3 s."""
STOP_LIMIT: Final = 10.0
"""Seconds a child may take to stop."""
DISTURBED: Final = 0.1
"""Cores that others may use before a run is marked; every one of them is missing to us."""
PROBE: Final = 0.1
"""Seconds until the next probe of a tunnel that is about to come up."""
SECRETS: Final = ("NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE")
"""Variables that would change what the two commands do."""

Figures = dict[str, float]
"""One run: what udpload printed; CPU seconds a second of the tunnel (cpu_per_s) and of processes
that have nothing to do with us (strangers)."""


class BenchmarkError(Exception):
    """Something asked for cannot be measured; one line for the user."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of load."""

    size: int
    """Bytes of payload."""
    visitors: int
    window: int
    """Datagrams in flight for each visitor."""

    def __str__(self) -> str:
        each = "" if self.visitors == 1 else " each"
        plural = "" if self.visitors == 1 else "s"
        return f"{self.size} B, {self.visitors} visitor{plural}, window {self.window}{each}"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way from the load to the echo; without URLs the straight one."""

    name: str
    query: str | None = None
    """Parameters of both URLs."""


@dataclass(slots=True)
class Result:
    """All runs of one contender in one case."""

    case: Case
    contender: str
    runs: list[Figures] = field(default_factory=list)


CASES: Final = tuple(
    Case(size, visitors, window)
    for size in (200, 1400)
    for visitors, window in ((1, 64), (64, 1), (100, 1))
)
QUICK_CASES: Final = (CASES[0], CASES[2], CASES[3])
CONTENDERS: Final = (
    Contender("direct"),
    Contender("nodepass", "udp=1"),
    Contender("nodepass-tls", "udp=1&tls=1"),
)


# --- the tools -------------------------------------------------------------------------------


def build(folder: Path) -> Path:
    """Compile udpload.c into this folder, unless what is there is newer than the source."""
    source, program = HERE / "udpload.c", folder / "udpload"
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise BenchmarkError("there is no C compiler (cc, or what CC names)")
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"udpload.{os.getpid()}"
    command = [compiler, *COMPILER_FLAGS, "-o", str(fresh), str(source)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"{compiler} does not compile udpload.c:\n{done.stderr.strip()}")
    fresh.replace(program)  # at once: another run may be starting it
    return program


@contextlib.contextmanager
def running(
    command: Sequence[str], *, errors: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a child for the length of a block; it is gone afterwards, whatever happens."""
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, env=environment
        ) as child,
    ):
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(STOP_LIMIT)
            except BaseException:  # it does not stop, or a second Ctrl-C
                child.kill()
                raise


@contextlib.contextmanager
def echoing(program: Path, folder: Path) -> Iterator[tuple[int, int]]:
    """Run an echo for the length of a block; yields its port and its pid."""
    log = folder / "echo.log"
    with running([str(program), "echo", "127.0.0.1:0"], errors=log) as echo:
        assert echo.stdout is not None
        words = echo.stdout.readline().split()
        if len(words) != 2 or words[0] != "ready":
            raise BenchmarkError(f"the echo did not start: {last_line(log)}")
        yield int(words[1]), echo.pid


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy() -> float:
    """CPU seconds that all processes and interrupts of this machine have used so far."""
    with Path("/proc/stat").open() as file:
        fields = file.readline().split()
    return sum(int(fields[i]) for i in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK")


def last_line(log: Path) -> str:
    """What a child said last."""
    return (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


# --- the contenders --------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Find ports free for TCP and UDP, all different."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            stream = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = stream.getsockname()[1]
            datagram = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            with contextlib.suppress(OSError):
                datagram.bind(("127.0.0.1", port))
                found.append(port)
        return found


def environment_for(engine: str | None) -> dict[str, str]:
    """Return the environment of the two commands: this checkout, the engine asked for."""
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    paths = [str(ROOT / "src"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["SHUTDOWN_TIMEOUT"] = "100ms"  # nobody misses the sessions of a finished run
    if engine is not None:
        environment["NODEPASS_ENGINE"] = engine
    return environment


@contextlib.contextmanager
def tunnel(
    query: str, echo: int, folder: Path, environment: Mapping[str, str]
) -> Iterator[tuple[int, list[int]]]:
    """Run server and client for the length of a block; yields visitors' port and both pids.

    Raises:
        BenchmarkError: one of them ended, or no datagram came back within START_LIMIT.
    """
    meeting, visitors = free_ports(2)
    command = [sys.executable, "-m", "nodepass"]
    urls = (
        f"server://127.0.0.1:{meeting}/127.0.0.1:{visitors}?{query}",
        f"client://127.0.0.1:{meeting}/127.0.0.1:{echo}?{query}",
    )
    logs = folder / "server.log", folder / "client.log"
    with (
        running([*command, urls[0]], errors=logs[0], environment=environment) as server,
        running([*command, urls[1]], errors=logs[1], environment=environment) as client,
    ):
        end = time.monotonic() + START_LIMIT
        while not answers(visitors):
            for child, log in zip((server, client), logs, strict=True):
                if child.poll() is not None:
                    raise BenchmarkError(last_line(log))
            if time.monotonic() > end:
                raise BenchmarkError(
                    f"no datagram came back in {START_LIMIT:.0f} s; the client said: "
                    f"{last_line(logs[1])}"
                )
        yield visitors, [server.pid, client.pid]


def answers(port: int) -> bool:
    """Whether a datagram to this port comes back before the next probe is due."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect(("127.0.0.1", port))
        try:
            probe.send(b"is anybody there?")
            return bool(select.select([probe], [], [], PROBE)[0]) and bool(probe.recv(64))
        except ConnectionRefusedError:
            time.sleep(PROBE)
            return False


@dataclass(frozen=True, slots=True)
class Stage:
    """What all runs have in common."""

    program: Path
    echo_port: int
    echo_pid: int
    folder: Path
    environment: Mapping[str, str]
    seconds: float

    def run(self, contender: Contender, case: Case) -> Figures:
        """Measure once, with processes of its own, so that no session of another run is left."""
        if contender.query is None:
            return self.load(self.echo_port, case, [])
        through = tunnel(contender.query, self.echo_port, self.folder, self.environment)
        with through as (port, pids):
            figures = self.load(port, case, pids)
        if not figures["echoed"]:
            raise BenchmarkError(f"no datagram came back in the case {case}")
        return figures

    def load(self, port: int, case: Case, pids: Sequence[int]) -> Figures:
        """Let udpload do its work; return its figures, and the CPU of the tunnel's pids.

        CPU is looked at twice while the clock of udpload runs, after 10 and 90 % of its time,
        so that neither the start of sessions nor the end of the load is in it.
        """
        options = {
            "--size": case.size,
            "--window": case.window,
            "--visitors": case.visitors,
            "--seconds": self.seconds,
            "--warmup": WARM_UP,
        }
        words = [str(word) for option in options.items() for word in option]
        command = [str(self.program), "window", f"127.0.0.1:{port}", *words]
        log = self.folder / "load.log"
        with running(command, errors=log) as child:
            ours = [*pids, self.echo_pid, child.pid]
            time.sleep(WARM_UP + 0.1 * self.seconds)
            before = [time.monotonic(), busy(), *map(cpu_of, ours)]
            time.sleep(0.8 * self.seconds)
            after = [time.monotonic(), busy(), *map(cpu_of, ours)]
            output, _ = child.communicate(timeout=self.seconds + STOP_LIMIT)
        if child.returncode != 0:
            raise BenchmarkError(last_line(log))
        printed: dict[str, float | str] = json.loads(output)
        figures = {name: value for name, value in printed.items() if not isinstance(value, str)}
        passed, everybody, *spent = [new - old for new, old in zip(after, before, strict=True)]
        figures["strangers"] = max(0.0, everybody - sum(spent)) / passed
        if pids:
            figures["cpu_per_s"] = sum(spent[: len(pids)]) / passed
        return figures


# --- the figures -----------------------------------------------------------------------------


def measure(
    stage: Stage, cases: Sequence[Case], contenders: Sequence[Contender], runs: int
) -> tuple[list[Result], dict[str, str]]:
    """Measure everything in turn; return the results, and why which contender has none.

    A contender that has failed once is not tried again; what it had is kept.
    """
    results = {(case, c.name): Result(case, c.name) for case in cases for c in contenders}
    failures: dict[str, str] = {}
    total = len(results) * runs
    count = 0
    for case in cases:
        for turn in range(runs):
            for contender in contenders if turn % 2 == 0 else contenders[::-1]:
                count += 1
                if contender.name in failures:
                    continue
                head = f"[{count}/{total}] {case}, run {turn + 1}: {contender.name}"
                try:
                    figures = stage.run(contender, case)
                except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
                    failures[contender.name] = str(error)
                    progress(f"{head} failed: {error}")
                    continue
                results[case, contender.name].runs.append(figures)
                progress(f"{head} {brief(figures)}")
    return [result for result in results.values() if result.runs], failures


def progress(line: str) -> None:
    """Tell whoever waits."""
    print(line, file=sys.stderr, flush=True)


def brief(figures: Figures) -> str:
    """One run in a few words."""
    text = f"{figures['datagrams_per_s']:.0f}/s, loss {figures['loss']:.3%}"
    if "cpu_per_s" in figures:
        text += f", {cpu_per_million(figures):.2f} CPU s per million"
    wrong = [name for name in ("corrupt", "strays", "socket_drops") if figures[name]]
    if figures["strangers"] > DISTURBED:
        text += f", while others used {figures['strangers']:.1f} cores"
    return text + "".join(f", {figures[name]:.0f} {name}" for name in wrong)


def cpu_per_million(figures: Figures) -> float:
    """CPU seconds of server and client for a million echoed datagrams, there and back."""
    return figures["cpu_per_s"] / figures["datagrams_per_s"] * 1e6


def cpu_per_gigabyte(figures: Figures) -> float:
    """CPU seconds of server and client for 1e9 bytes of echoed payload, counted once."""
    return figures["cpu_per_s"] / figures["bytes_per_s"] * 1e9


def summary(result: Result, direct: Result | None) -> dict[str, float]:
    """Medians over the runs; the ratio is the median of those of neighbouring runs."""

    def median(figure: Callable[[Figures], float]) -> float:
        return statistics.median(map(figure, result.runs))

    rates = [run["datagrams_per_s"] for run in result.runs]
    lost, sent = (sum(run[name] for run in result.runs) for name in ("lost", "sent"))
    found = {
        "rate": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "loss": lost / sent if sent else 0.0,
        "rtt_p50_us": median(lambda run: run["rtt_p50_us"]),
        "rtt_p99_us": median(lambda run: run["rtt_p99_us"]),
    }
    if direct is not None:
        beside = [run["datagrams_per_s"] for run in direct.runs]
        found["ratio"] = statistics.median(a / b for a, b in zip(rates, beside, strict=False))
    if "cpu_per_s" in result.runs[0]:
        found["cpu_per_million"] = median(cpu_per_million)
        found["cpu_per_gb"] = median(cpu_per_gigabyte)
    return found


def markdown(results: Sequence[Result]) -> str:
    """Lay the medians out as a table."""
    titles = "load|contender|datagrams/s (least – most)|of direct|loss|RTT p50|RTT p99"
    titles += "|CPU s per million|CPU s/GB"
    rows = [f"| {titles.replace('|', ' | ')} |", "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    straight = {result.case: result for result in results if result.contender == "direct"}
    for result in results:
        found = summary(result, straight.get(result.case))
        cells = [
            str(result.case),
            result.contender,
            f"{found['rate']:.0f} ({found['least']:.0f} – {found['most']:.0f})",
            f"{found['ratio']:.2f}" if "ratio" in found else "–",
            f"{found['loss']:.3%}",
            f"{found['rtt_p50_us']:.0f} µs",
            f"{found['rtt_p99_us']:.0f} µs",
            f"{found['cpu_per_million']:.2f}" if "cpu_per_million" in found else "–",
            f"{found['cpu_per_gb']:.2f}" if "cpu_per_gb" in found else "–",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def surroundings(engine: str | None) -> dict[str, object]:
    """What the figures depend on besides the code."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(describe, check=False, capture_output=True, text=True).stdout
    except OSError:
        commit = ""
    prefixes = ("NODEPASS_", "UDP_", "SEMAPHORE_", "MIN_POOL_", "MAX_POOL_")
    return {
        "commit": commit.strip() or None,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "engine": engine,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(prefixes) and name not in SECRETS
        },
        "warm_up": WARM_UP,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def report(
    path: Path, around: dict[str, object], results: Sequence[Result], failures: Mapping[str, str]
) -> None:
    """Write everything that was measured, run by run."""
    straight = {result.case: result for result in results if result.contender == "direct"}
    rows = [
        {
            "case": asdict(result.case),
            "contender": result.contender,
            "median": summary(result, straight.get(result.case)),
            "runs": result.runs,
        }
        for result in results
    ]
    text = json.dumps({**around, "failures": failures, "results": rows}, indent=1)
    path.write_text(text + "\n")


# --- the command -----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = parse(argv)
    chosen = [c for c in CONTENDERS if not options.contender or c.name in options.contender]
    try:
        with tempfile.TemporaryDirectory(prefix="nodepass-bench-") as name:
            folder = Path(name)
            program = build(HERE / "build")
            with echoing(program, folder) as (port, pid):
                environment = environment_for(options.engine)
                stage = Stage(program, port, pid, folder, environment, options.seconds)
                cases = QUICK_CASES if options.quick else CASES
                results, failures = measure(stage, cases, chosen, options.runs)
        around = surroundings(options.engine)
        if options.json is not None:
            report(options.json, around, results, failures)
    except (BenchmarkError, OSError) as error:
        print(f"bench_udp: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench_udp: interrupted", file=sys.stderr)
        return 130
    print(markdown(results))
    print(
        f"\nMedian of {options.runs} runs of {options.seconds:g} s; loopback, "
        f"kernel {around['kernel']}, {around['cores']} cores, Python {around['python']}, "
        f"commit {around['commit']}."
    )
    strangers = [run["strangers"] for result in results for run in result.runs]
    if strangers and max(strangers) > DISTURBED:
        middle, most = statistics.median(strangers), max(strangers)
        print(f"\nDisturbed: others used {middle:.1f} cores (median), {most:.1f} at most.")
    for contender, reason in failures.items():
        print(f"\nNot measured: {contender}: {reason}")
    return 1 if failures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; --quick only moves defaults."""
    parser = argparse.ArgumentParser(
        prog="bench_udp", description="Measure datagrams through a tunnel on this machine."
    )
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--quick", action="store_true", help="half the cases, 3 runs of 1 s")
    parser.add_argument("--runs", type=_count, metavar="N", help="default: 5")
    parser.add_argument("--seconds", type=_seconds, metavar="S", help="default: 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here")
    parser.add_argument("--engine", choices=("native", "python"), help="default: its own choice")
    parser.add_argument(
        "--contender", action="append", choices=names, help="may be repeated; default: all"
    )
    options = parser.parse_args(argv)
    options.runs = options.runs or (3 if options.quick else 5)
    options.seconds = options.seconds or (1.0 if options.quick else 2.0)
    return options


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= 1000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0.01 to 3600")
    return value


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
