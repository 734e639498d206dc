"""Instructions of one shared object, as callgrind has counted them."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

NAME: Final = re.compile(r"(?P<what>c?(?:ob|fn))=\((?P<number>\d+)\)(?: (?P<name>.*))?")
"""Where a cost belongs to; what has been named once is a number from then on."""

COST: Final = tuple("0123456789+-*")
"""How lines of costs begin: with a line of the source, whole, relative or the last one again."""


def count(command: Sequence[str], env: Mapping[str, str], out: Path, seconds: float) -> None:
    """Run a command under callgrind.

    Args:
        command: program and arguments; it has to end with code 0.
        env: its environment.
        out: where callgrind writes.
        seconds: after which it is killed.
    """
    valgrind = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"]
    done = subprocess.run(
        [*valgrind, *command],
        env=dict(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"


def instructions(profile: str) -> Counter[tuple[str, str]]:
    """Add up what each function has executed itself, callees left out.

    Args:
        profile: what callgrind has written.

    Returns:
        Instructions by path of the shared object and name of the function.

    Source: valgrind's manual, "Callgrind Format Specification".
    """
    names: dict[tuple[str, str], str] = {}
    here = {"ob": "", "fn": ""}
    spent: Counter[tuple[str, str]] = Counter()
    total = 0
    is_callee = False
    for line in profile.splitlines():
        if named := NAME.match(line):
            kind = named["what"][-2:]
            name = names.setdefault((kind, named["number"]), named["name"] or "")
            if not named["what"].startswith("c"):
                here[kind] = name
        elif line.startswith("calls="):
            is_callee = True  # the line below is what the callee has spent
        elif line.startswith(COST):
            if not is_callee:
                spent[here["ob"], here["fn"]] += int(line.split()[1])
            is_callee = False
        elif line.startswith("summary: "):
            total = int(line.split()[1])
    assert spent.total() == total > 0, f"{spent.total()} instructions read of {total}"
    return spent
