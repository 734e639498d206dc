"""The words of this process as `ps` and /proc/PID/cmdline show them: passwords become ***.

Everybody on the machine may read the words of a process, and they are read out of its own
memory. So what stands there is overwritten: in each URL the password becomes ***, the rest
moves up, and NULs fill the end, so that no word changes its place. What the shell keeps in
its history, and the moment before we run, are out of reach.

Linux only. `main` calls it once, before any thread runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["hide_passwords", "masked"]

SELF = Path("/proc/self")

ARG_START, ARG_END = 48, 49
"""Fields of /proc/PID/stat, counted from 1 (proc_pid_stat(5)): where the words lie."""

AFTER_NAME = 3
"""The first field after the program's name, which may itself hold blanks and ')'."""

# As `config` splits a URL: the password ends at the last '@' before the first '/' or '?'.
_SECRET = re.compile(rb"(?i)\A((?:server|client)://)([^/?]+)(?=@)")


def hide_passwords(urls: Sequence[str]) -> str | None:
    """Overwrite the passwords among the words of this process.

    Args:
        urls: what the command line was given; without a password among them nothing is done.

    Returns:
        None = none is visible; else one clause saying why one still is. Never raises.
    """
    # Bytes that are no text are surrogates in a word.
    if not any(_SECRET.match(url.encode(errors="surrogatepass")) for url in urls):
        return None
    if not sys.platform.startswith("linux"):
        return "only Linux lets a process change its words"
    try:
        return _overwrite()
    except (ImportError, IndexError, OSError, ValueError) as exc:
        return f"the words of this process cannot be changed: {exc}"


def _overwrite() -> str | None:
    import ctypes

    after_name = (SELF / "stat").read_text(errors="replace").rpartition(")")[2].split()
    start, end = (int(after_name[field - AFTER_NAME]) for field in (ARG_START, ARG_END))
    shown = (SELF / "cmdline").read_bytes()
    # Zeros where the kernel hides the place; other bytes where somebody was here before us.
    if not 0 < start < end or end - start != len(shown):
        return "the system does not tell where they lie"
    if ctypes.string_at(start, end - start) != shown:
        return "the system does not tell where they lie"
    hidden = masked(shown)
    ctypes.memmove(start, hidden, len(hidden))
    if (SELF / "cmdline").read_bytes() != hidden:
        return "the system shows a copy of them"
    return None


def masked(words: bytes) -> bytes:
    """Put *** in the place of every URL's password.

    Args:
        words: each ending in a NUL.

    Returns:
        As many bytes, each word at its place; a password of one or two bytes becomes
        as many stars, since there is no room for three.
    """
    return b"\0".join(map(_masked_word, words.split(b"\0")))


def _masked_word(word: bytes) -> bytes:
    found = _SECRET.match(word)
    if found is None:
        return word
    stars = b"***"[: len(found[2])]
    return (found[1] + stars + word[found.end() :]).ljust(len(word), b"\0")
