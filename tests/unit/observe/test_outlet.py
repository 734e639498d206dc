"""outlet: lines leave in order, and nobody waits for a reader who stands still."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nodepass.observe import outlet as module
from nodepass.observe.outlet import ENTRY, PIECE, ROOM, Face, Outlet, descriptor, tell

FAR = 1_000_000
"""No descriptor of anybody's."""

PATIENCE = 20.0
"""Seconds for any step on a busy machine; nothing here needs one."""

unix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and terminals of Unix")
pytestmark = unix_only


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait for a second attempt."""
    monkeypatch.setattr(module, "RETRY", 0.01)


class Reader:
    """Reads one end to the end of the stream, once it is asked to."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.data = b""
        self._thread = threading.Thread(target=self._work)
        self.is_begun = False

    @property
    def is_done(self) -> bool:
        return self.is_begun and not self._thread.is_alive()

    def begin(self) -> None:
        self.is_begun = True
        self._thread.start()

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # a terminal whose other side is closed
            while piece := os.read(self._fd, 1 << 16):
                self.data += piece

    def lines(self) -> list[str]:
        """Return all, once the other end is closed."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.data.decode(errors="replace").splitlines()


class Street:
    """A pipe with an outlet at one end and, later, a reader at the other."""

    def __init__(self) -> None:
        read, self.fd = os.pipe()
        self.reader = Reader(read)
        self.outlet = Outlet(self.fd)
        self.outlet.notice = "{} lost\n".format
        self._read = read

    def __enter__(self) -> Street:
        return self

    def __exit__(self, *error: object) -> None:
        if self.reader.is_begun:
            self.finish()
        os.close(self._read)  # and whoever still writes hears of it
        self.outlet.close(PATIENCE)
        if not self.reader.is_begun:
            os.close(self.fd)

    def finish(self) -> list[str]:
        """Say no more, and return all that has arrived."""
        if not self.reader.is_done:
            assert self.outlet.close(PATIENCE)
            os.close(self.fd)
        return self.reader.lines()


def numbered(count: int, start: int = 0) -> list[str]:
    return [f"line {number}" for number in range(start, start + count)]


def put(outlet: Outlet, lines: list[str]) -> None:
    for line in lines:
        outlet.put(line + "\n")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_lines_arrive_in_order() -> None:
    with Street() as street:
        street.reader.begin()
        put(street.outlet, numbered(5000))
        assert street.finish() == numbered(5000)
        assert repr(street.outlet) == f"<Outlet fd={street.fd} bytes=0 lost=0>"


def test_each_line_arrives_by_itself() -> None:
    with Street() as street:
        street.reader.begin()
        for count in range(1, 4):
            street.outlet.put("x\n")
            until(lambda whole=b"x\n" * count: street.reader.data == whole)  # type: ignore[misc]
        assert street.outlet.wait(PATIENCE)


def test_who_says_nothing_needs_no_thread() -> None:
    before = threading.active_count()
    outlet = Outlet(2)
    assert outlet.wait(0)
    assert outlet.close(0)
    outlet.put("too late\n")
    assert threading.active_count() == before


def test_c3_a_reader_that_stands_still_and_comes_back() -> None:
    """Nobody waits, memory is bounded, order is kept, losses are told where they happened."""
    said = numbered(2 * ROOM // ENTRY)
    with Street() as street:
        put(street.outlet, said)  # comes back although nobody reads
        assert street.outlet._size <= ROOM
        assert not street.outlet.wait(0)
        street.reader.begin()
        until(lambda: street.outlet._size < ROOM // 2)
        later = numbered(10, len(said))
        put(street.outlet, later)
        got = street.finish()
    (place,) = (i for i, line in enumerate(got) if line.endswith(" lost"))
    assert got[:place] == said[:place]
    assert got[place] == f"{len(said) - place} lost"
    assert got[place + 1 :] == later
    assert 0 < place < len(said)


def test_c3_losses_are_told_though_nothing_more_is_said() -> None:
    said = numbered(2 * ROOM // ENTRY)
    with Street() as street:
        put(street.outlet, said)
        street.reader.begin()
        until(lambda: street.reader.data.endswith(b" lost\n"))
        *got, notice = street.finish()
    assert got == said[: len(got)]
    assert notice == f"{len(said) - len(got)} lost"


def test_c3_losses_are_told_by_the_last_line() -> None:
    with Street() as street:
        put(street.outlet, numbered(2 * ROOM // ENTRY))
        street.reader.begin()
        assert street.finish()[-1].endswith(" lost")


def test_one_gap_rather_than_many() -> None:
    """After a loss even a short line waits until half of the room is free again."""
    with Street() as street:
        put(street.outlet, ["x" * 1000] * (2 * ROOM // 1000))
        lost = street.outlet._lost
        assert lost > 0
        street.outlet.put("y\n")
        assert street.outlet._lost == lost + 1


def test_a_line_longer_than_the_room() -> None:
    with Street() as street:
        street.reader.begin()
        street.outlet.put("x" * (2 * ROOM) + "\n")
        assert street.finish() == ["x" * (2 * ROOM)]


def test_whole_lines_leave_in_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that programs which share a pipe do not tear each other's lines apart."""
    pieces: list[bytes] = []

    def write(fd: int, data: bytes) -> int:
        pieces.append(bytes(data))
        return len(data)

    outlet = Outlet(2)
    with outlet._changed:  # the thread finds all of it at once
        put(outlet, numbered(2000))
        monkeypatch.setattr(os, "write", write)
    assert outlet.close(PATIENCE)
    monkeypatch.undo()
    assert b"".join(pieces).decode().splitlines() == numbered(2000)
    assert all(piece.endswith(b"\n") and len(piece) <= PIECE for piece in pieces)
    assert len(pieces) <= 2 + 2000 * 10 // (PIECE - 10)


def test_c3_a_paused_terminal() -> None:
    master, slave = os.openpty()
    outlet = Outlet(slave)
    reader = Reader(master)
    try:
        termios.tcflow(slave, termios.TCOOFF)  # as after Ctrl-S
        put(outlet, numbered(100))
        assert not outlet.wait(0.05)
        termios.tcflow(slave, termios.TCOON)
        reader.begin()
        assert outlet.wait(PATIENCE)
    finally:
        termios.tcflow(slave, termios.TCOON)
        assert outlet.close(PATIENCE)
        os.close(slave)
    assert reader.lines() == numbered(100)
    os.close(master)


def test_c3_the_end_does_not_wait_for_ever() -> None:
    with Street() as street:
        put(street.outlet, numbered(10000))
        began = time.monotonic()
        assert not street.outlet.close(0.05)
        assert time.monotonic() - began < PATIENCE


def test_c3_a_reader_that_has_gone() -> None:
    """Lines wait for another; the end does not."""
    with Street() as street:
        os.close(street._read)
        put(street.outlet, numbered(10))
        assert not street.outlet.wait(0.05)
        assert not street.outlet.close(PATIENCE)
        street._read = os.open(os.devnull, os.O_RDONLY)


def test_c3_another_reader_of_a_named_pipe(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    first = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fd = os.open(path, os.O_WRONLY)
    os.close(first)
    outlet = Outlet(fd)
    put(outlet, numbered(10))
    assert not outlet.wait(0.05)
    second = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert outlet.close(PATIENCE)
    assert os.read(second, PIECE).decode().splitlines() == numbered(10)
    os.close(second)
    os.close(fd)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_c3_a_full_disk_that_has_room_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open("/dev/full", os.O_WRONLY)
    outlet = Outlet(fd)
    put(outlet, numbered(10))
    assert not outlet.wait(0.05)
    room = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(room, fd)
    assert outlet.wait(PATIENCE)
    put(outlet, numbered(10, 10))
    assert outlet.close(PATIENCE)
    assert path.read_text().splitlines() == numbered(20)
    os.close(room)
    os.close(fd)


def test_c3_a_full_disk_takes_half_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half follows once there is room."""
    got = b""
    real = os.write

    def write(fd: int, data: bytes) -> int:
        nonlocal got
        if fd != FAR:
            return real(fd, data)
        if len(got) == 3 and not is_roomy.is_set():
            raise OSError(errno.ENOSPC, "no space left on device")
        taken = bytes(data) if is_roomy.is_set() else bytes(data)[:3]
        got += taken
        return len(taken)

    is_roomy = threading.Event()
    monkeypatch.setattr(os, "write", write)
    outlet = Outlet(FAR)
    outlet.put("a whole line\n")
    assert not outlet.wait(0.05)
    assert got == b"a w"
    is_roomy.set()
    assert outlet.wait(PATIENCE)
    assert outlet.close(PATIENCE)
    assert got == b"a whole line\n"


def test_c3_somebody_made_it_non_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag belongs to the open file, which other programs have, too."""
    monkeypatch.setattr(module, "SHORT_RETRY", 0.001)
    said = numbered(10000)
    with Street() as street:
        os.set_blocking(street.fd, False)
        put(street.outlet, said)
        assert not street.outlet.wait(0.02)
        assert not os.get_blocking(street.fd)
        street.reader.begin()
        assert street.finish() == said


def test_c3_the_end_where_it_is_non_blocking() -> None:
    with Street() as street:
        os.set_blocking(street.fd, False)
        put(street.outlet, numbered(10000))
        assert not street.outlet.close(0.05)


def test_as_many_threads_as_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that says so gets out all the same."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Street() as street:
        put(street.outlet, numbered(3))
        assert os.read(street._read, PIECE).decode().splitlines() == numbered(3)
        assert street.outlet.wait(0)
        os.close(street._read)
        street.outlet.put("nobody reads\n")
        street._read = os.open(os.devnull, os.O_RDONLY)


def test_a_fault_in_the_thread_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as no memory: the next line begins anew, with those that still wait."""
    faults: list[object] = []
    monkeypatch.setattr(threading, "excepthook", faults.append)
    with Street() as street:
        with street.outlet._changed:
            street.outlet.put("lost\n")
            monkeypatch.setattr(street.outlet, "_take", lambda: 1 / 0)
        until(lambda: bool(faults) and street.outlet._thread is None)
        monkeypatch.undo()
        street.outlet.put("x\n")
        street.reader.begin()
        assert street.finish() == ["lost", "x"]


def test_signals_are_for_the_main_thread() -> None:
    with Street() as street:
        street.reader.begin()
        street.outlet.put("x\n")
        until(lambda: bool(street.reader.data))
        thread = street.outlet._thread
        assert thread is not None
        status = Path(f"/proc/self/task/{thread.native_id}/status")
        if status.exists():
            blocked = int(status.read_text().partition("SigBlk:")[2].split()[0], 16)
            assert blocked >> (signal.SIGTERM - 1) & 1
            assert not blocked >> (signal.SIGSEGV - 1) & 1


def test_a_fork_begins_anew() -> None:
    """What waits is the parent's to write; the child has a thread once it needs one."""
    with Street() as street:
        street.reader.begin()
        street.outlet._append(b"parent\n")
        module._begin_again()
        street.outlet.put("child\n")
        assert street.finish() == ["child"]


# --- the stream before it ------------------------------------------------------------------------


def test_a_face_passes_whole_lines_on() -> None:
    with Street() as street:
        street.reader.begin()
        face = Face(street.outlet)
        print("a", "b", file=face)
        face.write("c")
        face.flush()
        face.write("d\ne\nf")
        assert face.writable()
        assert face.fileno() == street.fd
        assert not face.isatty()
        assert street.finish() == ["a b", "cd", "e"]


def test_a_face_gives_lines_another_shape() -> None:
    with Street() as street:
        street.reader.begin()
        face = Face(street.outlet, str.upper)
        face.write("a\nb\nc")
        assert street.finish() == ["A", "B"]


def test_a_face_does_not_keep_a_line_that_never_ends() -> None:
    with Street() as street:
        street.reader.begin()
        face = Face(street.outlet)
        for _ in range(3):
            face.write("x" * module.UNFINISHED)
        assert street.finish() == ["x" * (2 * module.UNFINISHED)]


def test_text_that_is_no_text() -> None:
    with Street() as street:
        street.reader.begin()
        Face(street.outlet).write("名字 \udc80\n")
        assert street.finish() == ["名字 \\udc80"]


def test_a_terminal_of_another_encoding() -> None:
    with Street() as street:
        street.reader.begin()
        street.outlet.encoding = "latin-1"
        face = Face(street.outlet)
        face.write("größer €\n")
        assert face.encoding == "latin-1"
        street.finish()
        assert street.reader.data == b"gr\xf6\xdfer \\u20ac\n"


# --- one text at the end -------------------------------------------------------------------------


def test_tell(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with os.fdopen(os.dup(2), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        tell("nodepass: error: x\n")
    assert capfd.readouterr() == ("", "nodepass: error: x\n")


def test_tell_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    tell("x\n")
    assert capsys.readouterr() == ("", "x\n")


def test_c3_tell_a_reader_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_WORDS", 0.05)
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * PIECE)
    os.set_blocking(write, True)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        tell("nobody reads this\n")
        os.close(read)
        monkeypatch.undo()


def test_streams_without_a_descriptor() -> None:
    assert descriptor(None) is None
    assert descriptor(io.StringIO()) is None
