"""What can only be seen from outside: exit, fork, signals, limits, leaks.

Each script runs in a process of its own, prints "ok" as its last word, and must leave
standard error empty: no warning, no traceback, no "Exception ignored".
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.engine.conftest import HAS_NATIVE, WHY_NOT

import nodepass

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).parents[2]
SOURCE = Path(nodepass.__path__[0]).parent
DEADLINE = 50
"""Seconds; a script that hangs at exit is the very thing looked for."""

BOTH = [
    "close_twice", "engine_in_child", "exit_without_close", "fork", "killed", "leak",
    "openssl_at_first_use", "signals", "stop_in_traffic", "tls_exit", "tls_leak",
]  # fmt: skip
NATIVE = [
    "drop_while_open", "few_descriptors", "idle_is_quiet", "memory", "second_interpreter",
    "tls_drop",
]  # fmt: skip
NEEDS_FORK = {"engine_in_child", "fork", "killed"}


def run(name: str, *words: str) -> None:
    environ = dict(os.environ, PYTHONPATH=os.pathsep.join([str(SOURCE), str(ROOT)]))
    done = subprocess.run(
        [sys.executable, "-X", "dev", str(SCRIPTS / f"{name}.py"), *words],
        env=environ,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    said = f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, said
    assert done.stdout.splitlines()[-1:] == ["ok"], said
    assert done.stderr == "", said


@pytest.mark.parametrize("module", ["_fastcopy", "engine.twin.engine"])
@pytest.mark.parametrize("name", BOTH)
def test_on_both(name: str, module: str) -> None:
    if module == "_fastcopy" and not HAS_NATIVE:
        pytest.skip(WHY_NOT)
    if name in NEEDS_FORK and not hasattr(os, "fork"):
        pytest.skip("this platform cannot fork")
    run(name, module)


@pytest.mark.parametrize("name", NATIVE)
def test_on_native(name: str) -> None:
    if not HAS_NATIVE:
        pytest.skip(WHY_NOT)
    run(name, "_fastcopy")


WAYS = [
    "exit_here", "pause_and_exit", "raise_here", "stop_here", "exit_hard", "exec_another",
    "run_a_loop_of_its_own", "fork_once_more", "be_signalled", "preexec",
]  # fmt: skip
"""How a forked child goes on and leaves."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("module", "loop"), [("_fastcopy", "uvloop"), ("engine.twin.engine", "asyncio")]
)
def test_c26_a_program_with_a_tunnel_forks(module: str, loop: str, way: str) -> None:
    if module == "_fastcopy" and not HAS_NATIVE:
        pytest.skip(WHY_NOT)
    if loop == "uvloop" and importlib.util.find_spec("uvloop") is None:
        loop = "asyncio"
    run("fork_embedding", module, loop, way)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an option of Linux")
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="namespaces take root")
@pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed")
def test_c15_more_visits_in_a_minute_than_there_are_local_ports() -> None:
    name = f"np-trial-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this machine allows no network namespaces")
    subprocess.run(["ip", "netns", "del", name], check=True)
    run("many_visits")
