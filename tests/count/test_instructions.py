"""Instructions that the native engine executes for each message and each relay.

Callgrind runs the same traffic once and twice; what the second run has more is what the traffic
costs, free of start and end. Only what `_fastcopy` executes itself is counted, neither Python nor
libc nor the kernel, so the figures are the compiler's and ours. A failure names the functions.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.count.callgrind import count, instructions
from tests.engine.conftest import HAS_NATIVE, IS_SANITIZED, WHY_NOT

import nodepass

SCRIPT: Final = Path(__file__).parent / "scripts" / "rounds.py"
SOURCE: Final = Path(nodepass.__path__[0]).parent

DEADLINE: Final = 25.0
"""Seconds for one run, of which a test makes two; each takes two or three."""

ROUNDS: Final = 300
"""Rounds of the shorter run: a hundred thousand of our own instructions and more, beside which
a wake-up more or less is nothing."""

MOST: Final = 1.15
"""Share of its entry that a count may reach. One build was seen to vary by 0.1 % (tcp), 7 % (udp)
and 11 % (relays, where a message may come before the engine has the sockets or behind that); gcc
12 with -O1 and -O3 stay within 4 % of -O2."""

LEAST: Final = 0.25
"""Share of its entry below which something has not been counted."""

SHOWN: Final = 10
"""Functions that a failure names, the dearest first."""

UNWANTED: Final = {
    b"broken invariant": "a debug build counts and checks more (NODEPASS_DEBUG)",
    b"__asan_init": "instrumented by the address sanitizer",
    b"__tsan_init": "instrumented by the thread sanitizer",
}
"""Words in a shared object that is not what users run."""


@dataclass(frozen=True)
class Entry:
    """One line of the table; x86-64, gcc 12, -O2."""

    kind: str
    """Traffic of the script."""
    per: str
    each: int
    """How many of those are in a round."""
    count: int
    """Instructions per one of those."""


TABLE: Final = (
    Entry("tcp", "message of 200 bytes through a TCP relay", 2, 456),
    Entry("udp", "datagram of 200 bytes through a gate, a link and a dialled target", 2, 1480),
    Entry("relays", "relay with a request, an answer and an end", 1, 4420),
)


def why_not() -> str:
    """Return why instructions cannot be counted here; empty if they can."""
    spec = importlib.util.find_spec("nodepass._fastcopy")
    if not HAS_NATIVE or spec is None or spec.origin is None:
        return WHY_NOT
    if os.environ.get("NODEPASS_ENGINE") == "python":
        return "the twin is asked for (NODEPASS_ENGINE=python)"
    if platform.machine() != "x86_64":
        return f"counted on x86-64; {platform.machine()} has other instructions"
    if shutil.which("valgrind") is None:
        return "not installed: valgrind"
    if IS_SANITIZED:
        return "runs under a sanitizer"
    built = Path(spec.origin).read_bytes()
    return next((why for word, why in UNWANTED.items() if word in built), "")


def run(kind: str, rounds: int, folder: Path) -> Counter[str]:
    """Return the engine's instructions for so many rounds, by function."""
    out = folder / f"{kind}.{rounds}"
    # No site-packages, which load slowly; the engine needs none.
    command = [sys.executable, "-S", "-s", str(SCRIPT), kind, str(rounds)]
    count(command, {**os.environ, "PYTHONPATH": str(SOURCE)}, out, DEADLINE)
    found: Counter[str] = Counter()
    for (path, function), spent in instructions(out.read_text()).items():
        if "_fastcopy" in path:
            found[function] += spent
    return found


def check(entry: Entry, more: Counter[str], rounds: int) -> None:
    """Fail if so many rounds have not cost what the table says, give or take."""
    pieces = rounds * entry.each
    counted = more.total() / pieces
    what = (
        f"{counted:.0f} instructions per {entry.per}, the table says {entry.count}. "
        f"If that is meant to be, it is the table of {__file__} that has to change.\n"
    ) + "\n".join(f"{spent / pieces:9.1f}  {name}" for name, spent in more.most_common(SHOWN))
    print(what)
    assert counted <= MOST * entry.count, what
    assert counted > LEAST * entry.count, what


@pytest.mark.slow
@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.kind)
def test_the_engine_works_no_more_than_it_did(entry: Entry, tmp_path: Path) -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    once = run(entry.kind, ROUNDS, tmp_path)
    more = run(entry.kind, 2 * ROUNDS, tmp_path)
    more.subtract(once)
    check(entry, more, ROUNDS)


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.kind)
@pytest.mark.parametrize("share", [0.0, 0.2, 1.2, 2.0])
def test_other_counts_than_those_of_the_table_fail(entry: Entry, share: float) -> None:
    spent = Counter(worker_main=int(share * entry.count * entry.each * ROUNDS))
    with pytest.raises(AssertionError, match="the table says"):
        check(entry, spent, ROUNDS)


PROFILE: Final = """\
version: 1
positions: line
events: Ir
summary: 1111

ob=(1) /lib/nodepass/_fastcopy.so
fl=(1) fastcopy.c
fn=(1) worker_main
16 100
+3 10
fi=(2) other.h
* 1
cob=(2) /lib/libc.so
cfi=(3) recv.c
cfn=(2) recv
calls=7 10
-4 5000

ob=(2)
fl=(3)
fn=(2)
10 600
cfn=(3) errno
calls=1 20
11 300

fn=(3)
20 300
cob=(1)
cfn=(1)
calls=1 16
21 111
ob=(1)
fl=(1)
fn=(4) flow_end
30 100
"""


def test_a_profile_is_read_right() -> None:
    found = instructions(PROFILE)
    assert found == {
        ("/lib/nodepass/_fastcopy.so", "worker_main"): 111,
        ("/lib/libc.so", "recv"): 600,
        ("/lib/libc.so", "errno"): 300,
        ("/lib/nodepass/_fastcopy.so", "flow_end"): 100,
    }


@pytest.mark.parametrize("broken", [PROFILE.replace("+3 10", "+3 11"), "", "summary: 0"])
def test_a_profile_that_does_not_add_up_fails(broken: str) -> None:
    with pytest.raises(AssertionError, match="instructions read"):
        instructions(broken)
