"""Processes that a benchmark starts: run them, wait for them, see what they cost.

Owns: each child, in a session of its own, for the length of one block. Must never leave a child
or a child's child behind. Reads /proc, so it needs Linux.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.machine import PROC, BenchmarkError

START_LIMIT: Final = 10.0
"""Seconds until a child works; interpreters start in 0.3 s."""
STOP_LIMIT: Final = 5.0
"""Seconds that a child may take to end at SIGTERM; then it is killed."""
PAUSE: Final = 0.01
"""Seconds between two looks."""
WAITING: Final = {"tcp": "0A", "udp": "07"}
"""State of a socket that listens, in /proc/net/tcp; of one that is not connected, in udp."""


@dataclass(frozen=True, slots=True)
class Child:
    """A running process, and the file that takes its stdout and stderr."""

    name: str
    pid: int
    log: Path

    def has_ended(self) -> bool:
        """Tell without reaping it, so that its number stays its own."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def says(self, text: str) -> bool:
        """Whether its output so far contains this."""
        return text in self.log.read_text(errors="replace")

    def check(self) -> None:
        """Raise a BenchmarkError if it has ended, with what it said last."""
        if self.has_ended():
            raise BenchmarkError(f"the {self.name} ended: {last_line(self.log)}")

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until something holds; BenchmarkError if the child ends or START_LIMIT passes."""
        end = time.monotonic() + START_LIMIT
        while not holds():
            self.check()
            if time.monotonic() > end:
                raise BenchmarkError(
                    f"the {self.name}: {what} did not come in {START_LIMIT:.0f} s; "
                    f"it said: {last_line(self.log)}"
                )
            time.sleep(PAUSE)


@contextlib.contextmanager
def running(
    name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[Child]:
    """Run a child for the length of a block; it and its children are gone afterwards."""
    log = folder / f"{name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    child = Child(name, process.pid, log)
    try:
        yield child
    finally:
        _end(child, process)


def _end(child: Child, process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, wait with a bound, and kill what is left of its group and its family."""
    with contextlib.ExitStack() as stack:
        emigrants = _emigrants(child.pid, stack)
        try:
            os.killpg(child.pid, signal.SIGTERM)
            end = time.monotonic() + STOP_LIMIT
            while not child.has_ended() and time.monotonic() < end:
                time.sleep(PAUSE)
        finally:
            # Not reaped yet, so the group's number cannot be somebody else's.
            os.killpg(child.pid, signal.SIGKILL)
            for handle in emigrants:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            process.wait()


def _emigrants(pid: int, stack: contextlib.ExitStack) -> list[int]:
    """Return handles of descendants that left the group, as sshd's do; the stack closes them."""
    handles: list[int] = []
    for descendant in family([pid]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(descendant) != pid:
                handles.append(os.pidfd_open(descendant))
                stack.callback(os.close, handles[-1])
    return handles


def run_tool(command: Sequence[str], limit: float, environment: Mapping[str, str]) -> str:
    """Run a program to its end and return what it printed; not more than limit seconds.

    Raises:
        BenchmarkError: it failed or did not end.
    """
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=limit,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{command[0]} did not end within {limit:.0f} s") from None
    if done.returncode != 0 and not done.stdout.startswith("{"):  # iperf3 tells why in its JSON
        said = (done.stderr + done.stdout).strip().splitlines() or ["it said nothing"]
        raise BenchmarkError(f"{command[0]} ended with code {done.returncode}: {said[-1]}")
    return done.stdout


def last_line(log: Path) -> str:
    """What a child said last."""
    return (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def is_listening(port: int, network: str = "tcp") -> bool:
    """Whether somebody listens on this port ("tcp" or "udp"); the question disturbs nobody."""
    for table in (network, f"{network}6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == WAITING[network] and int(words[1].rpartition(":")[2], 16) == port:
                    return True
    return False


def family(pids: Iterable[int]) -> list[int]:
    """These processes and all that descend from them."""
    found: list[int] = []
    left = list(pids)
    while left:
        pid = left.pop()
        found.append(pid)
        try:
            threads = list((PROC / str(pid) / "task").iterdir())
        except OSError:  # ended since
            continue
        for thread in threads:
            with contextlib.suppress(OSError):
                left += map(int, (thread / "children").read_text().split())
    return found


def cpu_of(pids: Iterable[int]) -> float:
    """CPU seconds so far, user and system, of these processes and of all their children.

    Children that ended count once their parent has waited for them.
    """
    ticks = 0
    for pid in family(pids):
        with contextlib.suppress(OSError):
            text = (PROC / str(pid) / "stat").read_text()
            ticks += sum(map(int, text.rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_of(pids: Iterable[int]) -> float:
    """Bytes of memory at most resident so far, of those of the family that live."""
    total = 0
    for pid in family(pids):
        with contextlib.suppress(OSError):
            for line in (PROC / str(pid) / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1]) * 1024
    return float(total)


def pss_of(pids: Iterable[int]) -> float:
    """Bytes of memory of these families now; of pages shared by n processes, one n-th (PSS)."""
    total = 0
    for pid in family(pids):
        with contextlib.suppress(OSError):
            for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return float(total)
