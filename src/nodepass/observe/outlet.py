"""Text for standard error without waiting: a bounded queue, and a thread that writes it.

    put ──▶ queue (ROOM bytes) ──▶ writer thread ──▶ write(2), as slow as the reader is
     │ no room
     └──▶ counted; the count is told where the lines would have stood

Whoever reads standard error may stand still for as long as he likes: a terminal after
Ctrl-S, a pager, a log driver that hangs, a full disk. Non-blocking writes would not do: the
flag belongs to the open file, which we share with the shell and with other programs, and
a terminal may block although it was ready. So a thread waits in everybody's place.

Ground floor: imports nothing of ours. `console` holds the one of the process.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Final, TextIO

__all__ = ["LAST_WORDS", "Face", "Outlet", "descriptor", "tell"]

ROOM: Final = 1 << 20
"""Bytes that wait at most: some 5,000 lines, what 1,000 visitors a second say at `debug` in
the seconds that a log driver takes to start anew. What they cost at most is known: 1 MiB."""

ENTRY: Final = 64
"""Bytes that a waiting line takes beside its text: the object, its place in the queue."""

PIECE: Final = 4096
"""Bytes of one write, whole lines: a pipe takes so many in one (PIPE_BUF), so the lines of
several programs that share it are not torn apart."""

PAUSE: Final = 0.01
"""Seconds from the last of the queue to the next look at it: a first line leaves at once, what
follows goes in lots. Otherwise each line of a busy process would wake the thread."""

RETRY: Final = 1.0
"""Seconds from an error to the next attempt: no reader, or no space on the disk."""

SHORT_RETRY: Final = 0.05
"""Seconds between attempts where a full descriptor does not wait but says so."""

LAST_WORDS: Final = 1.0
"""Seconds that the end of the program waits for a reader of its last lines."""

UNFINISHED: Final = 8192
"""Characters without a line end that a `Face` keeps back."""


class Outlet:
    """Where text leaves for a descriptor that may not take it.

    Args:
        fd: where to; borrowed.
        encoding: of the text; what it has no character for is written with a backslash.
    """

    def __init__(self, fd: int, encoding: str = "utf-8") -> None:
        self.fd = fd
        self.encoding = encoding
        self.notice: Callable[[int], str] = "{} lines lost\n".format
        """Makes the line that says how many were lost."""
        self._begin()
        _outlets.add(self)

    def _begin(self) -> None:
        # Reentrant, as a collection of garbage in the midst of `put` may have something to say.
        self._changed = threading.Condition(threading.RLock())
        self._lines: deque[bytes] = deque()
        self._size = 0
        """Bytes charged for what is not written yet."""
        self._lost = 0
        self._thread: threading.Thread | None = None
        self._is_asleep = False
        self._end: float | None = None
        """Once closed: until when to try."""

    def __repr__(self) -> str:
        return f"<Outlet fd={self.fd} bytes={self._size} lost={self._lost}>"

    def put(self, text: str) -> None:
        """Queue one or more whole lines; never waits. Without room they are lost, and counted."""
        data = self._encoded(text)
        with self._changed:
            if self._end is not None:
                return
            # After a loss half of the room has to be free again: one gap rather than many.
            room = ROOM // 2 if self._lost else ROOM
            if self._size > 0 and self._size + len(data) + ENTRY > room:
                self._lost += data.count(b"\n")
                return
            if self._lost:
                self._append_notice()
            self._append(data)
            if self._is_asleep:
                self._is_asleep = False
                self._changed.notify_all()
            elif self._thread is None:
                self._start()

    def _encoded(self, text: str) -> bytes:
        return text.encode(self.encoding, "backslashreplace")

    def _append(self, data: bytes) -> None:
        self._lines.append(data)
        self._size += len(data) + ENTRY

    def _append_notice(self) -> None:
        lost, self._lost = self._lost, 0
        self._append(self._encoded(self.notice(lost)))

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="nodepass-log", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # as many threads as are allowed: rather wait than say nothing
            while self._lines:
                self._write(self._take()[0])
            self._size = 0
        else:
            self._thread = thread

    def wait(self, timeout: float) -> bool:
        """Wait until all is written, at most so many seconds; tell whether it is."""
        end = monotonic() + timeout
        with self._changed:
            self._changed.notify_all()
            while self._size or self._lost:
                left = end - monotonic()
                if self._thread is None or left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def close(self, timeout: float) -> bool:
        """Wait as `wait` does, and end the thread. What is put later is lost.

        A thread that the reader still holds stays behind; no exit waits for it.
        """
        with self._changed:
            self._end = monotonic() + timeout
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        return not (self._size or self._lost)

    # ---------------------------------------------------------------- the writer thread

    def _work(self) -> None:
        _block_signals()
        try:
            while True:
                with self._changed:
                    if not self._wait_for_lines():
                        return
                    piece, charge = self._take()
                if not self._write(piece):
                    return
                with self._changed:
                    self._size -= charge
        finally:
            with self._changed:
                if self._end is None:  # a fault, such as no memory: the next line begins anew
                    self._thread = None
                    self._size = sum(len(line) + ENTRY for line in self._lines)

    def _wait_for_lines(self) -> bool:
        """Return whether there are any; if not, it is the end."""
        if not self._lines:
            self._changed.notify_all()  # for `wait`
            if self._end is None:
                self._changed.wait(PAUSE)
        while not self._lines:
            if self._lost:
                self._append_notice()
            elif self._end is not None:
                return False
            else:
                self._is_asleep = True
                self._changed.wait()
                self._is_asleep = False
        return True

    def _take(self) -> tuple[bytes, int]:
        """Take whole lines for one write off the queue; return what was charged for them, too."""
        taken = [self._lines.popleft()]
        size = len(taken[0])
        while self._lines and size + len(self._lines[0]) <= PIECE:
            taken.append(self._lines.popleft())
            size += len(taken[-1])
        return b"".join(taken), size + ENTRY * len(taken)

    def _write(self, piece: bytes) -> bool:
        """Write all of it, however long that takes; False = given up after `close`."""
        left = memoryview(piece)
        while left:
            try:
                left = left[os.write(self.fd, left) :]
            except OSError as exc:
                if not self._rest(exc):
                    return False
        return True

    def _rest(self, exc: OSError) -> bool:
        """Wait before another attempt; tell whether there is one."""
        with self._changed:
            if isinstance(exc, BlockingIOError):
                # Who shares the open file has made it non-blocking; ssh and node.js do. `poll`
                # may call a terminal ready that takes nothing, so look now and then.
                if self._end is not None and monotonic() >= self._end:
                    return False
                self._changed.wait(SHORT_RETRY)
                return True
            if self._end is not None or self._thread is None:
                return False
            self._changed.wait(RETRY)
            return True


def _block_signals() -> None:
    """Leave signals to the main thread, which is not held up by a write."""
    if hasattr(signal, "pthread_sigmask"):
        synchronous = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - synchronous)


_outlets: weakref.WeakSet[Outlet] = weakref.WeakSet()


def _begin_again() -> None:
    """Start anew in a forked child: the thread is not there, and its lines are the parent's."""
    for outlet in list(_outlets):
        outlet._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_again)


class Face(io.TextIOBase):
    """A text stream before an outlet, for whatever writes to `sys.stderr`.

    Args:
        outlet: where whole lines go.
        shape: what becomes of each text that ends with a line end.
    """

    errors = "backslashreplace"

    def __init__(self, outlet: Outlet, shape: Callable[[str], str] | None = None) -> None:
        self._outlet = outlet
        self._shape = shape
        self._lock = threading.RLock()
        self._begun = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # the base has it as a slot
        """What the text is written in."""
        return self._outlet.encoding

    def write(self, text: str, /) -> int:
        """Pass on whole lines, keep what is begun until its line end comes."""
        with self._lock:
            whole, end, begun = (self._begun + text).rpartition("\n")
            if not end and len(begun) > UNFINISHED:
                whole, end, begun = begun, "\n", ""
            self._begun = begun
        if end:
            whole += end
            self._outlet.put(whole if self._shape is None else self._shape(whole))
        return len(text)

    def writable(self) -> bool:
        """It is all that can be done here."""
        return True

    def fileno(self) -> int:
        """Return the descriptor behind, for who must write to it directly."""
        return self._outlet.fd

    def isatty(self) -> bool:
        """Tell whether a terminal is behind."""
        return os.isatty(self._outlet.fd)


def descriptor(stream: TextIO | None) -> int | None:
    """Return what a text stream writes to, None where it is no descriptor."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


def tell(text: str) -> None:
    """Write whole lines to standard error, and wait LAST_WORDS at most until they are read."""
    fd = descriptor(sys.stderr)
    if fd is None:
        sys.stderr.write(text)
        return
    outlet = Outlet(fd, sys.stderr.encoding or "utf-8")
    outlet.put(text)
    outlet.close(LAST_WORDS)
