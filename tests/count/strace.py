"""System calls of a running process, counted by strace from outside."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Final, Self

from tests.kit.timing import until

PATIENCE: Final = 4.0
"""Seconds for strace to attach or to let go; it takes some hundredths."""

POLL: Final = 0.01
"""Seconds between two looks of the trial, which runs in no event loop."""


class Tally:
    """Count every system call of one process, all its threads, while the block runs.

    Args:
        pid: the process; it goes on untraced afterwards.
        folder: for what strace writes.
    """

    def __init__(self, pid: int, folder: Path) -> None:
        self._pid = pid
        self._table = folder / f"{pid}.{time.monotonic_ns()}.calls"
        self._said = self._table.with_suffix(".said")
        self._strace: subprocess.Popen[bytes] | None = None
        self.calls: Counter[str] = Counter()
        """By name, once the block has ended."""
        self.errors: Counter[str] = Counter()
        """Those of them that failed, EAGAIN among the reasons."""

    async def __aenter__(self) -> Self:
        self.spawn()
        try:
            await until(self.is_attached, PATIENCE, "strace to attach")
        except BaseException:
            self.kill()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.ask_to_end()
            await until(self.has_ended, PATIENCE, "strace to let go")
        finally:
            self.kill()
        if error is None:
            self.calls, self.errors = parse(self._table.read_text())

    def spawn(self) -> None:
        command = ["strace", "-f", "-c", "-o", str(self._table), "-p", str(self._pid)]
        with self._said.open("wb") as said:
            self._strace = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )

    @property
    def words(self) -> str:
        """What strace has had to say."""
        return self._said.read_text(errors="replace").strip()

    def is_attached(self) -> bool:
        assert not self.has_ended(), f"strace has ended: {self.words}"
        return "attached" in self.words

    def has_ended(self) -> bool:
        return self._strace is None or self._strace.poll() is not None

    def ask_to_end(self) -> None:
        if self._strace is not None:
            self._strace.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it for certain; a tracer that dies leaves its process running."""
        if self._strace is not None:
            self._strace.kill()
            self._strace.wait()


def parse(table: str) -> tuple[Counter[str], Counter[str]]:
    """Read what `strace -c` writes; the column of errors is blank where there were none.

        % time     seconds  usecs/call     calls    errors syscall
         25.62    0.022391          21      1060        33 splice

    Returns:
        Calls by name, and those that failed.
    """
    calls: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for line in table.splitlines():
        words = line.split()
        if len(words) not in (5, 6) or not words[3].isdecimal() or words[-1] == "total":
            continue
        calls[words[-1]] += int(words[3])
        if len(words) == 6:
            errors[words[-1]] += int(words[4])
    return calls, errors


@cache
def why_not() -> str:
    """Return why no process can be traced here; empty if a trial went well."""
    if shutil.which("strace") is None:
        return "not installed: strace"
    sleeper = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
    try:
        with TemporaryDirectory() as folder:
            return _try(Tally(sleeper.pid, Path(folder)))
    finally:
        sleeper.kill()
        sleeper.wait()


def _try(tally: Tally) -> str:
    end = time.monotonic() + PATIENCE
    tally.spawn()
    try:
        while not tally.has_ended() and "attached" not in tally.words:
            if time.monotonic() > end:
                return "strace does not come to attach to a process"
            time.sleep(POLL)
        return f"strace may not trace: {tally.words}" if tally.has_ended() else ""
    finally:
        tally.kill()
