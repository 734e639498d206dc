"""console: whatever is written to standard error takes one road, in one shape."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading

import pytest

from nodepass.observe import console as module
from nodepass.observe import outlet
from nodepass.observe.console import Console
from nodepass.observe.log import Log


class Stderr:
    """A pipe in the place of standard error, within `with`."""

    def __enter__(self) -> Stderr:
        read, write = os.pipe()
        os.set_blocking(read, False)
        self._before = sys.stderr
        self._reader = os.fdopen(read, "rb")
        self.stream = sys.stderr = os.fdopen(write, "w")
        return self

    def __exit__(self, *error: object) -> None:
        sys.stderr = self._before
        self.stream.close()
        self._reader.close()

    def lines(self) -> list[str]:
        """Return what has arrived since the last call."""
        return (self._reader.read() or b"").decode().splitlines()


def objects(lines: list[str]) -> list[dict[str, str]]:
    return [json.loads(line) for line in lines]


def raised() -> Exception:
    try:
        raise ZeroDivisionError("server://hunter2@h:1")
    except ZeroDivisionError as exc:
        return exc


def say_all() -> None:
    """Say something by every road there is."""
    Log("server").info("a line", a=1)
    print("nodepass: error: server://hunter2@h: no", file=sys.stderr)
    print("two\nlines", file=sys.stderr)
    logging.getLogger("asyncio").warning("a task died")
    # Where a library logs in a program that has set nothing up.
    assert logging.lastResort is not None
    logging.lastResort.handle(logging.makeLogRecord({"msg": "another library", "levelno": 40}))
    Log("client").error("bug", error=raised())


def test_c18_json_from_the_first_line_to_the_last() -> None:
    with Stderr() as stderr:
        with Console("json") as console:
            say_all()
            console.crash(raised())
        lines = stderr.lines()
        assert "hunter2" not in "".join(line.replace('hunter2@h:1\\")', "") for line in lines)
        said = objects(lines)
        assert all(line.keys() >= {"time", "level", "message", "logger"} for line in said)
        assert [(line["level"], line["message"]) for line in said] == [
            ("info", "a line"),
            ("fatal", "server://***@h: no"),
            ("error", "two"),
            ("error", "lines"),
            ("warn", "a task died"),
            ("error", "another library"),
            ("error", "bug"),
            ("fatal", "an internal error ends the program; please report it"),
        ]
        assert "ZeroDivisionError" in said[-1]["traceback"]


def test_text_stays_text() -> None:
    with Stderr() as stderr:
        with Console() as console:
            assert repr(console).startswith("<Console text <Outlet ")
            say_all()
        lines = stderr.lines()
        assert lines[0].endswith("INFO  a line  a=1")
        assert lines[1:4] == ["nodepass: error: server://***@h: no", "two", "lines"]


def test_all_is_given_back() -> None:
    with Stderr() as stderr:
        before = sys.stderr, threading.excepthook, sys.unraisablehook
        logger = logging.getLogger("nodepass")
        state = list(logger.handlers), logger.level, logger.propagate
        with Console():
            assert sys.stderr is not before[0]
        assert (sys.stderr, threading.excepthook, sys.unraisablehook) == before
        assert (list(logger.handlers), logger.level, logger.propagate) == state
        print("direct", file=sys.stderr, flush=True)
        assert stderr.lines() == ["direct"]


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_c3_faults_in_threads_and_finalizers(fmt: str) -> None:
    with Stderr() as stderr:

        class Dropped:
            def __del__(self) -> None:
                raise raised()

        def fail() -> None:
            raise raised()

        with Console(fmt):
            thread = threading.Thread(target=fail)
            thread.start()
            thread.join()
            Dropped()
            sys.unraisablehook(Empty())  # type: ignore[arg-type]
            threading.excepthook(Empty())  # type: ignore[arg-type]
        text = "\n".join(stderr.lines())
        assert text.count("please report it") == 2
        assert text.count("Traceback (most recent call last)") == 2
        assert "Exception ignored in" in text


class Empty:
    """What the hooks get where the exception is gone already."""

    exc_value = None


def test_c3_the_end_where_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter may still have to say must not wait for the reader either."""
    with Stderr() as stderr:
        monkeypatch.setattr(module, "LAST_WORDS", 0.05)
        codes: list[int] = []
        monkeypatch.setattr(os, "_exit", codes.append)
        fd = sys.stderr.fileno()
        with Console() as console:
            for _ in range(1000):
                print("x" * 1000, file=sys.stderr)
            monkeypatch.setattr(module, "SHORT_WORDS", 0.01)
            console.leave(7)
            face = sys.stderr
        assert codes == [7]
        assert sys.stderr is face
        print("lost", file=sys.stderr, flush=True)
        assert sys.stderr.fileno() == fd
        while stderr.lines():  # lets the thread go
            pass


def test_c3_losses_have_the_shape_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    with Stderr() as stderr:
        monkeypatch.setattr(outlet, "ROOM", 100)
        with Console("json") as console:
            assert console._outlet is not None
            with console._outlet._changed:
                for number in range(5):
                    print(number, file=sys.stderr)
        said = objects(stderr.lines())
        last = said[-1]
        assert last["message"] == "lines lost: nobody read standard error"
        assert (last["level"], last["logger"]) == ("warn", "nodepass.cli")
        assert int(last["lines"]) == 5 - (len(said) - 1) > 0


def test_a_host_without_a_descriptor(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr
    with Console("json"):
        assert sys.stderr is before
        Log("server").info("x")
    assert json.loads(capsys.readouterr().err)["message"] == "x"


def test_leave_without_a_descriptor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with Console() as console:
        console.leave(3)
    assert codes == [3]
    assert capsys.readouterr().err == ""
