"""A real `python -m nodepass …` process: started, read, measured, stopped."""

from __future__ import annotations

import atexit
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from weakref import WeakSet

import nodepass

from .timing import until

PACKAGE: Final = Path(next(iter(nodepass.__path__))).parent
"""Folder that the package under test was imported from; its processes import the same."""
TICK: Final = os.sysconf("SC_CLK_TCK")
"""Units of CPU time per second in /proc/<pid>/stat."""

TCP_LISTEN: Final = 10
"""State in /proc/net/tcp: include/net/tcp_states.h."""

READY: Final = {"server": "server listening", "client": "tunnel up"}
"""What each mode logs once it can serve."""

FORBIDDEN: Final = re.compile(
    r"Traceback|Exception ignored|Warning:|never (?:retrieved|awaited)|was destroyed but"
)
"""What a log must never show: an error nobody handled, a resource nobody closed."""

_numbers = itertools.count(1)
_alive: WeakSet[subprocess.Popen[bytes]] = WeakSet()


@atexit.register
def _kill_survivors() -> None:
    for child in _alive:
        if child.poll() is None:
            child.kill()


class Nodepass:
    """One process; its stderr and stdout go to files, so that no pipe can fill."""

    def __init__(self, *urls: str, env: Mapping[str, str], folder: Path) -> None:
        self.urls: Sequence[str] = urls
        self._env = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(PACKAGE), os.environ.get("PYTHONPATH")))
            ),
            "PYTHONWARNINGS": "default",
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        number = next(_numbers)
        self._stderr = folder / f"{number}.stderr"
        self._stdout = folder / f"{number}.stdout"
        self._child: subprocess.Popen[bytes] | None = None

    def spawn(self, wrapper: Sequence[str] = ()) -> None:
        """Start without waiting for anything; `wrapper` is a command that ends in exec."""
        command = [*wrapper, sys.executable, "-m", "nodepass", *self.urls]
        with self._stderr.open("ab") as stderr, self._stdout.open("ab") as stdout:
            self._child = subprocess.Popen(
                command, env=self._env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
            )
        _alive.add(self._child)

    async def start(self, wrapper: Sequence[str] = ()) -> None:
        """Start, and wait until every URL is ready."""
        self.spawn(wrapper)
        await self.ready()

    async def ready(self, seconds: float = 10) -> None:
        for mode, line in READY.items():
            wanted = sum(1 for url in self.urls if url.startswith(mode))
            if wanted:
                await self.logged(line, count=wanted, seconds=seconds)

    # --- what it says -----------------------------------------------------------------

    @property
    def log(self) -> str:
        return self._stderr.read_text(errors="replace")

    @property
    def printed(self) -> str:
        return self._stdout.read_text(errors="replace")

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.log))

    async def logged(self, pattern: str, *, count: int = 1, seconds: float = 10) -> float:
        """Wait for a pattern in the log; return the seconds that it took."""
        return await until(
            lambda: self._has(pattern, count), seconds, f"{pattern!r} × {count} in\n{self.log}"
        )

    def _has(self, pattern: str, count: int) -> bool:
        if self.count(pattern) >= count:
            return True
        if not self.is_running:
            raise AssertionError(f"ended with {self.code} before {pattern!r}:\n{self.log}")
        return False

    # --- what it costs ----------------------------------------------------------------

    @property
    def child(self) -> subprocess.Popen[bytes]:
        assert self._child is not None, "not started"
        return self._child

    @property
    def pid(self) -> int:
        return self.child.pid

    def cpu(self) -> float:
        """CPU seconds used so far, user and system, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def rss(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None, status
        return int(found[1]) * 1024

    def fds(self, kind: str = "") -> int:
        """Count open descriptors whose name starts with kind ("socket:", "pipe:")."""
        return sum(name.startswith(kind) for name in self._open_names())

    def listening(self) -> set[int]:
        """Return the TCP ports that it listens on."""
        ours = self._open_names()
        ports = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[3], 16) == TCP_LISTEN and f"socket:[{fields[9]}]" in ours:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
        return ports

    def _open_names(self) -> list[str]:
        names = []
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                names.append(str(entry.readlink()))
            except OSError:  # closed between the two calls
                continue
        return names

    # --- its end ----------------------------------------------------------------------

    @property
    def was_started(self) -> bool:
        return self._child is not None

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    @property
    def code(self) -> int | None:
        return self.child.poll()

    def send(self, number: signal.Signals) -> None:
        self.child.send_signal(number)

    def kill(self) -> None:
        """End it as the kernel would: no goodbye."""
        self.child.kill()
        self.child.wait()

    async def ended(self, seconds: float = 10) -> int:
        """Wait for the end; return the exit code."""
        await until(lambda: not self.is_running, seconds, f"the end of\n{self.log}")
        return self.child.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 10) -> float:
        """Ask it to end, and insist on a clean one; return the seconds that it took."""
        start = time.monotonic()
        self.send(number)
        code = await self.ended(seconds)
        self.check()
        assert code == 0, f"exit code {code} after {number.name}:\n{self.log}"
        return time.monotonic() - start

    def check(self) -> None:
        """Insist that the log shows no unhandled error, and stdout nothing at all."""
        found = FORBIDDEN.search(self.log)
        assert found is None, f"{found!r} in the log:\n{self.log}"
        assert self.printed == "", f"stdout should be empty:\n{self.printed}"
