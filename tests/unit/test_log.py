"""log: the shape of a line, levels, masking, repeats, JSON, and life inside another program."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from nodepass import log as module
from nodepass.log import LEVELS, Log, mask, setup

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  (?P<rest>.*)\n")


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Take away again what `setup` adds to the process."""
    loggers = [module.ROOT, logging.getLogger("asyncio")]
    before = [(g, list(g.handlers), g.level, g.propagate) for g in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate
        logger.manager._clear_cache()  # type: ignore[attr-defined]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def rest(text: str) -> str:
    """Return one line without its time."""
    match = LINE.fullmatch(text)
    assert match is not None, text
    return match["rest"]


def say(message: str = "hello", /, level: str = "info", **fields: object) -> str:
    stream = io.StringIO()
    setup("text", stream)
    getattr(Log("test", "debug"), level)(message, **fields)
    return stream.getvalue()


def test_a_line() -> None:
    assert rest(say("tunnel up", a=1)) == "INFO  tunnel up  a=1"
    assert rest(say("tunnel up")) == "INFO  tunnel up"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1, "1"),
        (2.5, "2.5"),
        (1 / 3, "0.333333"),
        (True, "True"),
        (None, "None"),
        ("plain", "plain"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("", '""'),
        ("two words", '"two words"'),
        ('a"b', r'"a\"b"'),
        ("a=b", '"a=b"'),
        ("a\nb", r'"a\nb"'),
        ("\x1b[31m", r'"\u001b[31m"'),
        ("a\x9bb", r'"a\x9bb"'),
        ("名字", "名字"),
        (ValueError("bad"), '"ValueError: bad"'),
        (ValueError(), "ValueError"),
        ("client://secret@h:1/t", "client://***@h:1/t"),
    ],
)
def test_fields(value: object, shown: str) -> None:
    assert rest(say(x=value)) == f"INFO  hello  x={shown}"


def test_a_message_stays_one_line() -> None:
    assert rest(say("a\nb\x1b[0m")) == r"INFO  a\nb\x1b[0m"


@pytest.mark.parametrize("level", ["debug", "info", "warn", "error", "fatal"])
def test_level_names(level: str) -> None:
    assert rest(say(level=level)) == f"{level.upper()}  hello"


@pytest.mark.parametrize("level", list(LEVELS))
def test_levels_hold_back_what_is_below(level: str) -> None:
    stream = io.StringIO()
    setup("text", stream)
    log = Log("test", level)
    for name in ("debug", "info", "warn", "error", "fatal"):
        getattr(log, name)(name)
    said = [rest(line).split()[1] for line in stream.getvalue().splitlines(keepends=True)]
    assert said == [name for name in LEVELS if LEVELS[name] >= LEVELS[level] and name != "none"]
    assert log.is_debug is (level == "debug")


def test_an_unknown_level() -> None:
    with pytest.raises(KeyError):
        Log("test", "loud")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("server://pw@h:1/t:2", "server://***@h:1/t:2"),
        ("server://p@w@h:1", "server://***@h:1"),
        ("x //a@b //c@d", "x //***@b //***@d"),
        ("https://h/a@b", "https://h/a@b"),
        ("mail a@b", "mail a@b"),
        ('{"a": "//b", "c": "d@e"}', '{"a": "//b", "c": "d@e"}'),
    ],
)
def test_mask(text: str, masked: str) -> None:
    assert mask(text) == masked


def test_masks_what_others_log() -> None:
    stream = io.StringIO()
    setup("text", stream)
    logging.getLogger("nodepass.other").warning("dial %s", "client://secret@h:1/t:2")
    logging.getLogger("asyncio").warning("task server://secret@h:1 died")
    assert "secret" not in stream.getvalue()
    assert stream.getvalue().count("***@") == 2


def raised(text: str) -> Exception:
    try:
        raise ValueError(text)
    except ValueError as exc:
        return exc


def test_an_error_brings_its_traceback() -> None:
    text = say("bug", level="error", error=raised("//secret@h"))
    assert "Traceback (most recent call last)" in text
    assert "ValueError: //***@h" in text
    assert "secret" not in text.replace('raised("//secret@h")', "")


def test_a_warning_does_not() -> None:
    assert rest(say("odd", level="warn", why=raised("x"))) == 'WARN  odd  why="ValueError: x"'


def test_children_share_fields_and_repeats() -> None:
    stream = io.StringIO()
    setup("text", stream)
    parent = Log("test", "info", a=1)
    child = parent.child(b=2)
    child.info("x", a=3)
    assert rest(stream.getvalue()) == "INFO  x  a=3  b=2"
    assert repr(child) == "<Log test info a=1  b=2>"
    stream.truncate(0)
    child.repeated("warn", "key", "y")
    parent.repeated("warn", "key", "y")
    assert stream.getvalue().count("WARN") == 1


def test_repeats_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    stream = io.StringIO()
    setup("text", stream)
    log = Log("test")
    said: list[str] = []
    for now in (5.0, 6.0, 7.0, 64.9, 65.0, 66.0, 125.0, 999.0):
        log.repeated("warn", "key", "again", n=int(now))
        log.repeated("debug", "hidden", "never")
        said.append(stream.getvalue())
        stream.seek(0)
        stream.truncate()
    assert [rest(line).split("  ", 2)[2] if line else "" for line in said] == [
        "n=5",
        "",
        "",
        "",
        "n=65  repeats=4",
        "",
        "n=125  repeats=2",
        "n=999",
    ]


def test_repeat_keys_are_bounded() -> None:
    setup("text", io.StringIO())
    log = Log("test")
    for number in range(module.REPEAT_KEYS * 2):
        log.repeated("warn", str(number), "x")
    assert len(log._repeats) == module.REPEAT_KEYS
    assert str(number) in log._repeats


def test_json() -> None:
    stream = io.StringIO()
    setup("json", stream)
    Log("test", "debug", a=1).warn("two words", b=True, c=None, d="//pw@h x", level="mine")
    Log("test").error("bug", error=raised("//pw@h"))
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {
        "level": "warn",
        "message": "two words",
        "logger": "nodepass.test",
        "a": 1,
        "b": True,
        "c": None,
        "d": "//***@h x",
    }
    assert second["traceback"].endswith("ValueError: //***@h")


def test_json_of_foreign_lines() -> None:
    stream = io.StringIO()
    setup("json", stream)
    logging.getLogger("asyncio").warning("died %s", "//pw@h")
    assert json.loads(stream.getvalue())["message"] == "died //***@h"


def test_colour_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    setup("text", stream)
    Log("test").warn("x")
    assert rest(stream.getvalue()) == "\x1b[33mWARN\x1b[0m  x"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    stream = Terminal()
    setup("text", stream)
    Log("test").warn("x")
    assert rest(stream.getvalue()) == "WARN  x"


def test_setup_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    first = io.StringIO()
    setup("text", first)
    setup()
    Log("test").info("x")
    assert first.getvalue() == ""
    assert rest(capsys.readouterr().err) == "INFO  x"


def test_silent_until_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("test", "debug")
    log.fatal("x")
    log.debug("y")
    assert capsys.readouterr() == ("", "")


def test_lines_reach_a_host_program(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        Log("test").info("tunnel up", a=1)
    (record,) = caplog.records
    assert record.getMessage() == "tunnel up  a=1"
    assert record.name == "nodepass.test"
    assert record.funcName == "test_lines_reach_a_host_program"


def test_lines_of_one_kind_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys or strangers there are; other kinds are not held back by them."""
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    stream = io.StringIO()
    setup("text", stream)
    log = Log("test")
    for number in range(500):
        log.repeated("warn", f"stranger {number}", "turned away", n=number)
        log.bounded("info", "connected", "client connected", n=number)
    log.repeated("error", "accept", "cannot accept")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 * module.LINES_A_MINUTE + 1
    assert lines[-1].endswith("ERROR  cannot accept")
    now += module.REPEAT_PAUSE
    log.bounded("info", "connected", "client connected", n=500)
    last = stream.getvalue().splitlines()[-1]
    assert last.endswith(f"n=500  unprinted={500 - module.LINES_A_MINUTE}")
