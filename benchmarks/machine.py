"""The machine that everything is measured on: its ports, its limits, what else it is doing.

Owns: nothing. Must never start anything that outlives a call. The ground floor: imports nothing
of ours. Reads /proc, so it needs Linux.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import resource
import socket
import subprocess
import time
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
PROC: Final = Path("/proc")
PORTS: Final = range(12000, 20000)
"""Below those that Linux gives to outgoing connections, of which a load makes thousands: one of
them may have the port by the time that a contender wants it."""
DISTURBED: Final = 0.1
"""Cores that others may use before a run is marked; every one of them is missing to us."""
SECRETS: Final = ("NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE")
"""Variables that would change what nodepass does, or must not be shown."""
SYSTEM_PATHS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where haproxy and sshd lie on Debian, although a user's PATH does not lead there."""
PREFIXES: Final = ("NODEPASS_", "UDP_", "SEMAPHORE_", "MIN_POOL_", "MAX_POOL_")
"""Of the variables that change figures of nodepass."""


class BenchmarkError(Exception):
    """Something asked for cannot be measured; one line for the user."""


def busy() -> float:
    """CPU seconds that all processes and interrupts of this machine have used so far."""
    with (PROC / "stat").open() as file:
        fields = file.readline().split()
    return sum(int(fields[i]) for i in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK")


def free_ports(count: int) -> list[int]:
    """Find ports free for TCP and UDP, all different."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            port = random.choice(PORTS)
            stream = stack.enter_context(socket.socket())
            datagram = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            with contextlib.suppress(OSError):
                stream.bind(("127.0.0.1", port))
                datagram.bind(("127.0.0.1", port))
                found.append(port)
        return found


def raise_file_limit() -> int:
    """Let us and our children open as many files as the hard limit allows; return that."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def environment() -> dict[str, str]:
    """Return the environment of all children: this checkout, and the way to the daemons."""
    found = {name: value for name, value in os.environ.items() if name not in SECRETS}
    paths = [str(ROOT / "src"), found.get("PYTHONPATH", "")]
    found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    found["PATH"] = os.pathsep.join([found.get("PATH", os.defpath), *SYSTEM_PATHS])
    found["LC_ALL"] = "C"  # tools print points, not commas
    found["SHUTDOWN_TIMEOUT"] = "100ms"  # nobody misses the sessions of a finished run
    return found


def surroundings() -> dict[str, object]:
    """What the figures depend on besides the code."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(describe, check=False, capture_output=True, text=True).stdout
    except OSError:
        commit = ""
    return {
        "commit": commit.strip() or None,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(PREFIXES) and name not in SECRETS
        },
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
