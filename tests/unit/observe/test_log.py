"""log: the shape of a line, levels, masking, repeats, JSON, and life inside another program."""

from __future__ import annotations

import io
import json
import logging
import re
import string
from collections.abc import Callable, Iterator

import pytest

from nodepass.observe import log as module
from nodepass.observe.log import LEVELS, Log, mask, setup

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


Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let a test say what time it is; it begins at 1000 s."""
    now = 1000.0

    def set_to(time: float) -> None:
        nonlocal now
        now = time

    monkeypatch.setattr(module, "monotonic", lambda: now)
    return set_to


class Said(io.StringIO):
    """A stream whose lines can be asked for, each once."""

    def lines(self) -> list[str]:
        said = [rest(line).split("  ", 1)[1] for line in self.getvalue().splitlines(True)]
        self.seek(0)
        self.truncate()
        return said


@pytest.fixture
def said() -> Said:
    stream = Said()
    setup("text", stream)
    return stream


NO_NAME = "cannot reach a.example:10101: name does not resolve"
DEAD = "cannot reach a.example:10101: timed out"


def test_c18_another_cause_is_told_at_once(clock: Clock, said: Said) -> None:
    """And each is counted by itself, so that two that take turns do not fill the log."""
    log = Log("client")
    for second in range(30):
        clock(1000 + second)
        log.repeated("warn", "dial", "no tunnel", why=DEAD if second % 2 else NO_NAME)
    assert said.lines() == [f'no tunnel  why="{why}"' for why in (NO_NAME, DEAD)]
    clock(1060)
    log.repeated("warn", "dial", "no tunnel", why=NO_NAME)
    assert said.lines() == [f'no tunnel  why="{NO_NAME}"  repeats=15']


def test_c18_two_messages_of_one_key_are_two_faults(clock: Clock, said: Said) -> None:
    log = Log("server")
    log.repeated("warn", "data 10.0.0.1", "turned away", host="10.0.0.1")
    log.repeated("warn", "data 10.0.0.1", "TLS failed", host="10.0.0.1")
    assert said.lines() == ["turned away  host=10.0.0.1", "TLS failed  host=10.0.0.1"]


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("127.0.0.1:50312 left", "127.0.0.1:4 left", True),
        ("[2001:db8::1]:50312", "[2001:db8::1]:4", True),
        ("a.example:50312 left", "a.example:4 left", True),
        ("link 5f3dd280 is gone", "link 0b42ccaa is gone", True),
        ("link 17 is gone", "link 4 is gone", True),
        ("no idle link within 5 s", "no idle link within 6 s", True),
        ("10.0.0.1:80", "10.0.0.2:80", False),
        ("10.0.0.1", "10.0.0.2", False),
        ("[2001:db8::1]:80", "[2001:db8::2]:80", False),
        ("[2001:db8::1:1]:80", "[2001:db8::1:2]:80", False),
        ("a1.example:80", "a2.example:80", False),
        ("refused", "timed out", False),
        ("x" * 300 + "a", "x" * 300 + "b", True),
    ],
)
def test_c18_what_is_another_cause(
    one: str, other: str, is_same: bool, clock: Clock, said: Said
) -> None:
    log = Log("test")
    log.repeated("warn", "key", "fault", why=one)
    log.repeated("warn", "key", "fault", why=other)
    assert len(said.lines()) == (1 if is_same else 2)


def test_c18_strangers_choose_causes_in_vain(clock: Clock, said: Said) -> None:
    """So many are told apart, the rest shares a line a minute, and nothing grows."""
    log = Log("server")
    for turn in range(2):
        clock(1000 + 60 * turn)
        for letter in string.ascii_letters:
            log.repeated("warn", "stranger 10.0.0.1", "turned away", why=letter)
        lines = said.lines()
        assert len(lines) == module.CAUSES + 1
        assert lines[-1].endswith(f"repeats={52 - module.CAUSES}") == bool(turn)
        assert len(log._repeats["stranger 10.0.0.1"]) == module.CAUSES + 1
    log.repeated("warn", "stranger 10.0.0.2", "turned away", why="a")
    assert said.lines() == ["turned away  why=a"]


def test_c12_a_noisy_health_checker_does_not_silence_its_neighbour(
    clock: Clock, said: Said
) -> None:
    """Behind one address there may be both a load balancer that looks and a client that fails."""
    log = Log("server")
    for second in range(50):
        clock(1000 + second)
        log.repeated("warn", "stranger 10.0.0.1", "turned away", why="it left at once")
    log.repeated("warn", "stranger 10.0.0.1", "turned away", why="it does not speak TLS")
    assert said.lines() == [
        'turned away  why="it left at once"',
        'turned away  why="it does not speak TLS"',
    ]


def test_c18_a_mended_fault_is_told_at_once_again(clock: Clock, said: Said) -> None:
    log = Log("client")
    log.repeated("warn", "dial", "no tunnel", why=DEAD)
    log.forget("dial", "tls")
    log.repeated("warn", "dial", "no tunnel", why=DEAD)
    assert len(said.lines()) == 2


def test_c18_one_client_does_not_take_the_lines_of_all(clock: Clock, said: Said) -> None:
    log = Log("server")
    for _ in range(500):
        log.bounded("info", "lost a", "tunnel lost", client="a")
    log.bounded("warn", "lost b", "tunnel lost", client="b")
    lines = said.lines()
    assert len(lines) == module.SHARE + 1
    assert lines[-1] == f"tunnel lost  client=b  unprinted={500 - module.SHARE}"
    clock(1060)
    log.bounded("info", "lost a", "tunnel lost", client="a")
    assert said.lines() == ["tunnel lost  client=a"]


def test_subjects_are_bounded(clock: Clock, said: Said) -> None:
    log = Log("server")
    for number in range(2 * module.REPEAT_KEYS):
        log.bounded("info", f"lost {number}", "tunnel lost")
    assert len(log._subjects) == module.REPEAT_KEYS
    assert len(said.lines()) == module.LINES_A_MINUTE


def test_below_the_level_nothing_is_kept(said: Said) -> None:
    log = Log("server", "error")
    log.repeated("warn", "key", "x")
    assert log._repeats == {}


# --- several tunnels -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True])
def test_c18_lines_of_no_tunnel_are_of_all(is_shared: bool) -> None:
    stream = io.StringIO()
    setup("text", stream, is_shared=is_shared)
    Log("client", tunnel="client://a:1").error("bug", error=raised("x"), a=1)
    Log("cli").info("stopping", a=1)
    logging.getLogger("asyncio").warning("died")
    lines = [line for line in stream.getvalue().splitlines() if line[:1] == "2"]
    assert lines[0].endswith('ERROR  bug  tunnel=client://a:1  error="ValueError: x"  a=1')
    end = "  tunnel=all" if is_shared else ""
    assert [line[25:] for line in lines[1:]] == [f"INFO  stopping  a=1{end}", f"WARN  died{end}"]


@pytest.mark.parametrize("is_shared", [False, True])
def test_c18_and_as_json(is_shared: bool) -> None:
    stream = io.StringIO()
    shape = setup("json", stream, is_shared=is_shared)
    Log("client", tunnel="client://a:1").info("up")
    Log("cli").info("stopping")
    stream.write(shape.stray("nodepass: error: x\n") + shape.lost(3))
    tunnels = [json.loads(line).get("tunnel") for line in stream.getvalue().splitlines()]
    other = "all" if is_shared else None
    assert tunnels == ["client://a:1", other, other, other]


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
    assert record.__dict__["tunnel"] == "all"
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
