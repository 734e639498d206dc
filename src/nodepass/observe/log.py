"""Log lines: one call, one line, on stderr.

    2026-11-22 10:21:27.248  INFO  tunnel up  server=10.0.0.1:10101  dialect=native

Built on the standard `logging`, under the logger `nodepass`, so a program that embeds
us takes the lines wherever it likes; only `console` calls `setup`. A line is
complete (fields included, secrets masked) before it reaches any handler.

Ground floor: imports nothing of ours. Everyone but `lines` and `session` may import it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from time import monotonic
from typing import TextIO

__all__ = ["COMPLAINT", "LEVELS", "Log", "Shape", "clear", "mask", "setup"]

COMPLAINT = "nodepass: error: "
"""How the one line begins that says why the program does not run."""

LEVELS: dict[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "none": logging.CRITICAL + 10,
}
"""Level names of the command line, with the numbers of `logging`; "none" is above all."""

REPEAT_PAUSE = 60.0
"""Seconds between two lines about one repeated fault."""

LINES_A_MINUTE = 60
"""Of one kind: enough to see what goes on, too few to fill a disk with (15 MB a day)."""

REPEAT_KEYS = 1024
"""Most faults watched at once; keys may hold peer addresses, so strangers choose how many."""

CAUSES = 8
"""Causes of one fault that are told apart at a time; the others are counted together. Strangers
choose the text of some."""

CAUSE_LENGTH = 200
"""Characters in which two causes may differ."""

SHARE = LINES_A_MINUTE // 4
"""Of one kind, for one subject: nobody takes the lines of all others."""

ROOT = logging.getLogger("nodepass")
ROOT.addHandler(logging.NullHandler())  # silent, not lastResort, where a host program sets nothing

_NAMES = {number: name.upper() for name, number in LEVELS.items()}
_COLOURS = {"DEBUG": "2", "INFO": "32", "WARN": "33", "ERROR": "31", "FATAL": "1;31"}
_PASSWORD = re.compile(r'(?<=//)[^/\s"]+(?=@)')
# What may be another each time though the cause is the same: ports, counts, ids of links. Not
# addresses, nor what has a dot or a colon at its side otherwise.
_PASSING = re.compile(
    r"(?<=[\w\]]:)\d+(?![\w:.\]])|(?<![\w.:])(?:\d+|(?=[a-f]*\d)[0-9a-f]{8,})(?![\w.:])"
)
_PLAIN = re.compile(r'[^\s"=]+')


def mask(text: str) -> str:
    """Hide what stands where a URL has its password."""
    return _PASSWORD.sub("***", text)


def setup(
    fmt: str = "text", stream: TextIO | io.TextIOBase | None = None, *, is_shared: bool = False
) -> Shape:
    """Send the lines of this process to a stream; a second call replaces the first.

    Args:
        fmt: "text", or "json" for one object a line.
        stream: where to; None = stderr.
        is_shared: whether several tunnels say something there; lines that are of none of them
            are then marked as being of all.

    Returns:
        What gives lines their shape.
    """
    target = sys.stderr if stream is None else stream
    shape = _Json() if fmt == "json" else _Text(_wants_colour(target))
    shape.is_shared = is_shared
    handler = logging.StreamHandler(target)
    handler.setFormatter(shape)
    clear()
    # What asyncio itself has to say (a task that died unseen) takes the same shape.
    for logger in (ROOT, logging.getLogger("asyncio")):
        logger.addHandler(handler)
        logger.propagate = False
    ROOT.setLevel(logging.DEBUG)  # each Log has a level of its own
    return shape


def clear() -> None:
    """Undo `setup`."""
    for logger in (ROOT, logging.getLogger("asyncio")):
        for old in [h for h in logger.handlers if isinstance(h.formatter, Shape)]:
            logger.removeHandler(old)
        logger.propagate = True
    ROOT.setLevel(logging.NOTSET)


def _wants_colour(stream: TextIO | io.TextIOBase) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


class Shape(logging.Formatter):
    """How the lines of this process look, whoever writes them."""

    is_shared = False

    def missing(self, record: logging.LogRecord) -> dict[str, object]:
        """Return the fields that a line of no tunnel gets among those of several."""
        has_tunnel = "tunnel" in getattr(record, "fields", {})
        return {"tunnel": "all"} if self.is_shared and not has_tunnel else {}

    def lost(self, count: int) -> str:
        """Return the line that stands in the place of lines that were lost."""
        event, fields = "lines lost: nobody read standard error", {"lines": count}
        message = f"{event}  {_pairs(fields)}"
        record = logging.LogRecord("nodepass.cli", logging.WARNING, "", 0, message, None, None)
        record.__dict__.update(event=event, fields=fields)
        return self.format(record) + "\n"

    def stray(self, text: str) -> str:
        """Return what becomes of lines that came past `logging`."""
        return mask(text)


class _Text(Shape):
    def __init__(self, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created).astimezone()
        level = _NAMES.get(record.levelno, record.levelname)
        if self._colour:
            level = f"\x1b[{_COLOURS.get(level, '0')}m{level}\x1b[0m"
        text = f"{stamp:%Y-%m-%d %H:%M:%S}.{stamp.microsecond // 1000:03d}  {level}  "
        text += record.getMessage()
        if missing := self.missing(record):
            text += f"  {_pairs(missing)}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return mask(text)


class _Json(Shape):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": _NAMES.get(record.levelno, record.levelname).lower(),
            "message": getattr(record, "event", None) or mask(record.getMessage()),
            "logger": record.name,
        }
        fields: dict[str, object] = getattr(record, "fields", {})
        for key, value in {**self.missing(record), **fields}.items():
            line.setdefault(key, value)
        if record.exc_info:
            line["traceback"] = mask(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)

    def stray(self, text: str) -> str:
        """Make an object of each line; that of a failed start loses its prefix."""
        return "".join(self._stray(line) for line in text.splitlines() if line.strip())

    def _stray(self, text: str) -> str:
        level = logging.CRITICAL if text.startswith(COMPLAINT) else logging.ERROR
        message = text.removeprefix(COMPLAINT)
        record = logging.LogRecord("nodepass.cli", level, "", 0, message, None, None)
        return self.format(record) + "\n"


class Log:
    """Where one object writes its lines; carries a level and the fields they all share."""

    __slots__ = (
        "_fields", "_kinds", "_level", "_logger", "_repeats", "_subjects", "is_debug", "level",
        "name", "tunnel",
    )  # fmt: skip

    def __init__(self, name: str, level: str = "info", /, **fields: object) -> None:
        self.name = name
        """Which part of the program speaks: "server", "pool", …"""
        self.level = level
        """One of `LEVELS`."""
        self.is_debug = LEVELS[level] <= logging.DEBUG
        """Whether debug lines leave; read it before building a costly one."""
        self.tunnel = "all"
        """Which tunnel the lines are about; in each record, for handlers of a host program."""
        self._level = LEVELS[level]
        self._logger = logging.getLogger(f"nodepass.{name}")
        self._fields = fields
        self._repeats: dict[str, dict[str, tuple[float, int]]] = {}
        self._kinds: dict[str, tuple[float, int, int]] = {}
        self._subjects: dict[str, tuple[float, int]] = {}

    def __repr__(self) -> str:
        return f"<Log {self.name} {self.level} {_pairs(_values(self._fields))}>"

    def child(self, **fields: object) -> Log:
        """Return a Log whose lines also carry these fields; repeats are counted together."""
        log = Log(self.name, self.level, **{**self._fields, **fields})
        log.tunnel = self.tunnel
        log._repeats = self._repeats
        log._kinds = self._kinds
        log._subjects = self._subjects
        return log

    def debug(self, message: str, /, **fields: object) -> None:
        """Say what helps to find a fault."""
        self._write(logging.DEBUG, message, fields)

    def info(self, message: str, /, **fields: object) -> None:
        """Say what an operator likes to know."""
        self._write(logging.INFO, message, fields)

    def warn(self, message: str, /, **fields: object) -> None:
        """Say what is not as it should be, though all goes on."""
        self._write(logging.WARNING, message, fields)

    def error(self, message: str, /, **fields: object) -> None:
        """Say what failed; an exception among the fields adds its traceback."""
        self._write(logging.ERROR, message, fields)

    def fatal(self, message: str, /, **fields: object) -> None:
        """Say why the program ends."""
        self._write(logging.CRITICAL, message, fields)

    def repeated(self, level: str, key: str, message: str, /, **fields: object) -> None:
        """Report a fault that may come often: at once, then at most one line a minute.

        Another cause of the fault, that is another message or another `why`, is told at once,
        too; beyond CAUSES of them they share one line a minute.

        Args:
            level: one of `LEVELS`.
            key: names the fault; the lines of one key are counted together. Its first word
                names the kind: of one kind LINES_A_MINUTE leave, however many the keys.
            message: as for the other methods; a later line adds repeats=N, the
                times it happened since the line before.
        """
        if LEVELS[level] < self._level:
            return
        now = monotonic()
        fault = self._repeats.pop(key, {})
        if len(self._repeats) >= REPEAT_KEYS:
            del self._repeats[next(iter(self._repeats))]
        self._repeats[key] = fault
        cause = _cause(message, fields)
        if cause not in fault and len(fault) >= CAUSES:
            for old in [c for c, (last, _) in fault.items() if c and now - last >= REPEAT_PAUSE]:
                del fault[old]
            cause = cause if len(fault) < CAUSES else ""
        last, count = fault.get(cause, (now - REPEAT_PAUSE, 0))
        if now - last < REPEAT_PAUSE:
            fault[cause] = (last, count + 1)
            return
        fault[cause] = (now, 0)
        if count:
            fields = {**fields, "repeats": count + 1}
        self._leave(level, key.partition(" ")[0], message, fields, now)

    def forget(self, *keys: str) -> None:
        """Take faults as mended: if they come again they are told at once."""
        for key in keys:
            self._repeats.pop(key, None)

    def bounded(self, level: str, key: str, message: str, /, **fields: object) -> None:
        """Report what strangers can cause at will: at most LINES_A_MINUTE of one kind.

        The next line that leaves says how many did not: unprinted=N.

        Args:
            level: one of `LEVELS`.
            key: its first word names the kind; the rest, if any, whom it is about: about
                one of them SHARE lines leave, so that the others are heard as well.
            message: as for the other methods.
        """
        now = monotonic()
        kind, _, subject = key.partition(" ")
        if subject:
            start, count = self._subjects.pop(key, (now, 0))
            if now - start >= REPEAT_PAUSE:
                start, count = now, 0
            if len(self._subjects) >= REPEAT_KEYS:
                del self._subjects[next(iter(self._subjects))]
            self._subjects[key] = (start, count + 1)
            if count >= SHARE:
                start, count, unprinted = self._kinds.get(kind, (now, 0, 0))
                self._kinds[kind] = (start, count, unprinted + 1)
                return
        self._leave(level, kind, message, fields, now)

    def _leave(
        self, level: str, kind: str, message: str, fields: dict[str, object], now: float
    ) -> None:
        """Write a line unless as many of its kind have left as may."""
        start, count, unprinted = self._kinds.get(kind, (now, 0, 0))
        if now - start >= REPEAT_PAUSE:
            start, count = now, 0
        if count >= LINES_A_MINUTE:
            self._kinds[kind] = (start, count, unprinted + 1)
            return
        self._kinds[kind] = (start, count + 1, 0)
        if unprinted:
            fields = {**fields, "unprinted": unprinted}
        self._write(LEVELS[level], message, fields)

    def _write(self, level: int, message: str, fields: dict[str, object]) -> None:
        if level < self._level or not self._logger.isEnabledFor(level):
            return
        values = _values({**self._fields, **fields})
        event = _one_line(mask(message))
        self._logger.log(
            level,
            f"{event}  {_pairs(values)}" if values else event,
            exc_info=_failure(fields) if level >= logging.ERROR else None,
            extra={"event": event, "fields": values, "tunnel": self.tunnel},
            stacklevel=3,
        )


def _values(fields: dict[str, object]) -> dict[str, object]:
    """Keep numbers as they are and turn all else into masked text."""
    return {
        key: value if isinstance(value, int | float | None) else mask(_text(value))
        for key, value in fields.items()
    }


def _cause(message: str, fields: dict[str, object]) -> str:
    """Return what is the same as long as a fault has the same cause."""
    return _PASSING.sub("#", f"{message} {fields.get('why', '')}"[:CAUSE_LENGTH])


def _text(value: object) -> str:
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}" if str(value) else type(value).__name__
    return str(value)


def _pairs(values: Mapping[str, object]) -> str:
    return "  ".join(f"{key}={_quoted(value)}" for key, value in values.items())


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.isprintable():
        return text
    return _one_line(json.dumps(text, ensure_ascii=False))


def _one_line(text: str) -> str:
    """Escape what could start a line of its own or talk to the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _failure(fields: dict[str, object]) -> BaseException | None:
    return next((v for v in fields.values() if isinstance(v, BaseException)), None)
