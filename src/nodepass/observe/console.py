"""Standard error of the running program: nothing that anybody writes there waits for its reader.

    Log ──▶ logging ──▶ Face ──▶ Outlet ──▶ descriptor
    print, warnings, tracebacks, libraries ──▶ sys.stderr ──▶ Face ──▶ the same Outlet

With LOG_FORMAT=json the second road gets the shape of log lines, too: the stream is JSON
from the first line to the last.

Only the command line opens one. A program that embeds us keeps its own standard error.
"""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Final, NoReturn, Self, TextIO

from .log import Log, clear, setup
from .outlet import LAST_WORDS, Face, Outlet, descriptor

__all__ = ["Console"]

SHORT_WORDS: Final = 0.2
"""Seconds that are left to the last lines where somebody wants the end on the spot."""


class Console:
    """What `sys.stderr` and `logging` write to, from `with` to the end of the block.

    Args:
        fmt: "text" or "json".
        is_shared: whether several tunnels say something.
    """

    def __init__(self, fmt: str = "text", *, is_shared: bool = False) -> None:
        self._fmt = fmt
        self._is_shared = is_shared
        self._outlet: Outlet | None = None
        self._before: TextIO | None = None

    def __repr__(self) -> str:
        return f"<Console {self._fmt} {self._outlet}>"

    def __enter__(self) -> Self:
        fd = descriptor(sys.stderr)
        if fd is None:  # a host's own stream, as in tests
            setup(self._fmt, is_shared=self._is_shared)
            return self
        is_text = self._fmt == "text"  # JSON is UTF-8 whatever the terminal is
        self._outlet = Outlet(fd, (is_text and sys.stderr.encoding) or "utf-8")
        shape = setup(self._fmt, Face(self._outlet), is_shared=self._is_shared)
        self._outlet.notice = shape.lost
        self._before, sys.stderr = sys.stderr, Face(self._outlet, shape.stray)
        self._hooks = threading.excepthook, sys.unraisablehook
        threading.excepthook, sys.unraisablehook = _tell_thread, _tell_unraisable
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        clear()
        if self._outlet is None:
            return
        threading.excepthook, sys.unraisablehook = self._hooks
        # Else whatever the interpreter has to say at its end would wait, and for ever.
        if self._outlet.close(LAST_WORDS) and self._before is not None:
            sys.stderr = self._before

    def crash(self, exc: Exception) -> None:
        """Say that the program ends by an internal error."""
        Log("cli").fatal("an internal error ends the program; please report it", error=exc)

    def leave(self, code: int) -> NoReturn:
        """End the process on the spot, with what has been said so far if that can be had."""
        if self._outlet is not None:
            self._outlet.wait(SHORT_WORDS)
        os._exit(code)


def _tell_thread(what: threading.ExceptHookArgs) -> None:
    if what.exc_value is not None:
        Log("cli").error("an internal error in a thread; please report it", error=what.exc_value)


def _tell_unraisable(what: sys.UnraisableHookArgs) -> None:
    if what.exc_value is not None:
        Log("cli").error(
            "an internal error that nobody could be told of; please report it",
            where=f"{what.err_msg or 'Exception ignored in'}: {what.object!r}",
            error=what.exc_value,
        )
