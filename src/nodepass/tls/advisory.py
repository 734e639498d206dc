"""Which installed libraries are older than the least release without a known hole.

The floors are those of our own metadata (pyproject.toml, "dependencies"), so they are declared
once. pip keeps to them; distributions, frozen images and `--no-deps` do not. Called by `relays`
when TLS is loaded; a plain tunnel uses none of these libraries for anything secret.

Ground floor: imports nothing of ours and nothing heavy.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Final

_FLOOR: Final = re.compile(r"\s*([A-Za-z0-9._-]+)\s*>=\s*(\d+(?:\.\d+)*)")
"""Name and least release of one requirement: PEP 508 as we write it."""
_RELEASE: Final = re.compile(r"\d+(?:\.\d+)*")


def outdated(package: str = "nodepass") -> list[str]:
    """Name what is installed below its floor.

    Args:
        package: whose requirements count.

    Returns:
        One clause each, "cryptography 45.0.7 (48.0.1 or newer)"; empty if all is well, or if
        nobody knows since the package is not installed.
    """
    found: list[str] = []
    for name, floor in _floors(package):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if _release(installed) < _release(floor):
            found.append(f"{name} {installed} ({floor} or newer)")
    return found


def _floors(package: str) -> list[tuple[str, str]]:
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return []
    matches = (_FLOOR.match(line) for line in lines if "extra ==" not in line)
    return [(match[1], match[2]) for match in matches if match is not None]


def _release(text: str) -> tuple[int, ...]:
    match = _RELEASE.match(text)
    numbers = [int(part) for part in match[0].split(".")] if match is not None else []
    while numbers and numbers[-1] == 0:
        numbers.pop()  # 26.2 and 26.2.0 are one release
    return tuple(numbers)
