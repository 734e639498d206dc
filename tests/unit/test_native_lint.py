"""House rules of the native files that no compiler checks: a text lint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nodepass

SOURCE = Path(nodepass.__path__[0])
FILES = sorted([*SOURCE.glob("*.pyx"), *SOURCE.glob("*.pxd"), *SOURCE.glob("fastcopy/*.pxi")])
WORKER_FILES = sorted(SOURCE.glob("fastcopy/*.pxi"))
MAX_COLUMNS = 99
MAX_PXI_LINES = 450
MAX_NOGIL_LINES = 80

# Calls whose result nobody can use: the thing is being thrown away, or the clock cannot fail.
RESULT_MAY_BE_DROPPED = {"sys_close", "sys_unmap", "sys_forget", "sys_now_ms", "sys_unring"}
# In the few places where a bell is rung for a thread that is going away anyway.
BELLS = {"sys_ring", "sys_wait_readable"}

if not FILES:
    pytest.skip("the native sources are not installed here", allow_module_level=True)


def code(path: Path) -> list[tuple[int, str]]:
    """Return (number, line) of a file without comments and texts."""
    found = []
    inside = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        quotes = line.count('"""')
        if not inside and not quotes:
            found.append((number, re.sub(r'"[^"]*"', '""', line).split("#", 1)[0].rstrip()))
        inside ^= quotes % 2 == 1
    return found


def definitions(path: Path) -> list[tuple[int, str]]:
    """Return (number, whole header) of every cdef function, its lines joined."""
    lines = code(path)
    found = []
    for place, (number, line) in enumerate(lines):
        if re.match(r"\s*cdef (inline )?[\w* ]+\(", line) or re.match(
            r"\s*cdef (inline )?[\w*]+ [\w*]+\($", line
        ):
            header = line
            for _, following in lines[place + 1 :]:
                if header.rstrip().endswith(":"):
                    break
                header += " " + following.strip()
            found.append((number, header))
    return found


def ids(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_columns_and_tabs(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= MAX_COLUMNS, f"{path.name}:{number} is {len(line)} columns wide"
        assert "\t" not in line, f"{path.name}:{number} has a tab"
        assert line == line.rstrip(), f"{path.name}:{number} ends in blanks"


@pytest.mark.parametrize("path", WORKER_FILES, ids=ids)
def test_worker_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_PXI_LINES


@pytest.mark.parametrize("path", WORKER_FILES, ids=ids)
def test_every_worker_function_is_noexcept_nogil(path: Path) -> None:
    """Otherwise a result of -1 makes the caller take the GIL to look for an exception."""
    found = definitions(path)
    for number, header in found:
        assert header.endswith("noexcept nogil:"), f"{path.name}:{number}: {header}"
    assert found or path.name == "atomic.pxi"


@pytest.mark.parametrize("path", WORKER_FILES, ids=ids)
def test_no_python_in_worker_files(path: Path) -> None:
    """No GIL, nothing that raises, no object: foreign threads never meet the interpreter."""
    banned = (
        r"\b(with gil|with nogil|raise|assert|try:|except|object|list|dict|tuple|print|lambda)\b"
    )
    for number, line in code(path):
        assert not re.search(banned, line), f"{path.name}:{number}: {line.strip()}"
        assert not re.match(r"\s*(def|cpdef|class) ", line), f"{path.name}:{number}"
        assert "%" not in line or "&" in line, f"{path.name}:{number}: modulo"


def test_no_gil_is_taken_anywhere() -> None:
    for path in FILES:
        for number, line in code(path):
            assert "with gil" not in line, f"{path.name}:{number}"


STEMS = {path.stem for path in WORKER_FILES}
NO_PREFIX = {"atomic"}
"""Its names say the memory order; they are used like operators."""


@pytest.mark.parametrize("path", WORKER_FILES, ids=ids)
def test_a_file_is_named_after_its_functions(path: Path) -> None:
    """So that a call says where to look: `udp_link_read` is in udp_link.pxi."""
    if path.stem in NO_PREFIX:
        return
    for number, header in definitions(path):
        named = re.search(r"(\w+)\(", header)
        assert named is not None, header
        fits = {stem for stem in STEMS if named[1] == stem or named[1].startswith(f"{stem}_")}
        assert max(fits, key=len, default="none") == path.stem, f"{path.name}:{number}: {named[1]}"


def test_memory_comes_from_tables() -> None:
    """Elsewhere an allocation could land on the hot path."""
    for path in FILES:
        if path.name in {"core.pxi", "gate.pxi", "head.pxi"}:
            continue
        for number, line in code(path):
            if "cimport" in line:
                continue
            assert not re.search(r"\b(malloc|calloc|realloc|free|sys_map)\(", line) or (
                path.name == "sys.pxi"
            ), f"{path.name}:{number}: {line.strip()}"


def test_errno_is_read_in_sys_only() -> None:
    """On the next line after the call, or something else has changed it."""
    for path in WORKER_FILES:
        if path.name == "sys.pxi":
            continue
        for number, line in code(path):
            assert not re.search(r"\berrno\b", line), f"{path.name}:{number}: {line}"


def test_raw_calls_stand_in_sys_only() -> None:
    raw = (
        r"(?<![\w.])(recv|send|splice|shutdown|close|epoll_\w+|eventfd|pipe2|fcntl|mmap|munmap)\("
    )
    for path in FILES:
        if path.name in {"sys.pxi", "_linux.pxd"}:
            continue
        for number, line in code(path):
            assert not re.search(raw, line) or "def close(" in line, (
                f"{path.name}:{number}: {line.strip()}"
            )


def test_results_of_system_calls_are_used() -> None:
    for path in FILES:
        for number, line in code(path):
            called = re.match(r"\s*(sys_\w+)\(", line)
            if called:
                assert called[1] in RESULT_MAY_BE_DROPPED | BELLS, f"{path.name}:{number}"


def test_nogil_functions_are_short() -> None:
    for path in WORKER_FILES:
        starts = [number for number, _ in definitions(path)]
        ends = [*starts[1:], len(path.read_text().splitlines()) + 1]
        for start, end in zip(starts, ends, strict=True):
            assert end - start <= MAX_NOGIL_LINES, f"{path.name}:{start}"
