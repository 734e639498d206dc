"""The environment: variables become one frozen `Settings`, the same for every tunnel.

The defaults stand in `Settings`; `VARIABLES` says how each variable is read and what the
help prints about it.

Whose is a variable? A process shares its environment with programs of all kinds, and
Kubernetes puts names there that begin with those of its services. So
  - every variable of ours may be spelt NODEPASS_<NAME>, which nobody else means: that goes
    before the general name, and a value that cannot be used is an error;
  - a general name (LOG_FORMAT, DIAL_TIMEOUT …) whose value cannot be meant for us is left
    aside, with a `Remark`, and never ends a start;
  - an empty value is as good as none: that is what ${X:-} in a compose file or a unit gives;
  - what is not ours is passed over, and a likely misspelling is worth a `Remark`.

Reads no file and no clock. `config` calls it; everyone may hold the `Settings` it makes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nodepass.errors import ConfigError

from .address import is_number
from .spelling import distance

__all__ = ["VARIABLES", "Remark", "Settings", "Variable", "parse_duration", "show_duration"]

OWN = "NODEPASS_"
"""What makes a variable's name unmistakable."""

# Microseconds have three spellings in Go: us, the micro sign U+00B5 and the Greek mu U+03BC.
_UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "\u00b5s": 1e-6,
    "\u03bcs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}
_TERM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([a-z\u00b5\u03bc]+)", re.ASCII)

DURATION_LIMIT = 64
"""Characters of a duration; no sensible one comes near."""


def parse_duration(text: str) -> float:
    """Read a Go duration such as 300ms, 1.5s, 1m30s, 2h45m.

    Returns:
        Seconds; negative where the text is.

    Raises:
        ValueError: not Go's grammar (`time.ParseDuration`).
    """
    body = text.removeprefix("-") if text.startswith("-") else text.removeprefix("+")
    if body == "0":
        return 0.0
    if len(body) > DURATION_LIMIT:
        raise ValueError(text)
    total = 0.0
    end = 0
    for term in _TERM.finditer(body):
        unit = _UNITS.get(term[2])
        if term.start() != end or unit is None:
            raise ValueError(text)
        total += float(term[1]) * unit
        end = term.end()
    if end != len(body) or not body:
        raise ValueError(text)
    return -total if text.startswith("-") else total


def show_duration(seconds: float) -> str:
    """Write seconds the way `parse_duration` reads them."""
    if seconds >= _UNITS["h"] and seconds % _UNITS["h"] == 0:
        return f"{seconds / _UNITS['h']:.0f}h"
    if 0 < seconds < 1:
        return f"{seconds * 1000:.12g}ms"
    return f"{seconds:.12g}s"


def available_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """Count the engine threads that pay: half the cores.

    The kernel's network work, the event loop and the programs at either end want the others, and
    flows that share a thread also share its wake-ups.
    """
    return max(1, available_cores() // 2)


@dataclass(frozen=True, slots=True)
class Remark:
    """A variable that was not read, though somebody may think that it was."""

    name: str
    """As it stands in the environment."""
    meant: str
    """The name under which it certainly is one of ours."""
    why: str = ""
    """What is wrong with its value; empty = its name is misspelt."""
    default: str = ""
    """What stays where the value cannot be used."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment decides: the same for every tunnel of the process."""

    semaphore_limit: int = 1024
    min_pool_capacity: int = 16
    max_pool_capacity: int = 1024
    udp_data_buf_size: int = 8192
    udp_read_timeout: float = 5.0
    udp_idle_timeout: float = 120.0
    tcp_idle_timeout: float = 0.0
    report_interval: float = 5.0
    service_cooldown: float = 5.0
    shutdown_timeout: float = 5.0
    reload_interval: float = 3600.0
    handshake_timeout: float = 5.0
    dial_timeout: float = 5.0
    threads: int = field(default_factory=default_threads)
    engine: Literal["native", "python"] = "native"
    splice: bool = True
    udp_gso: bool = False
    log_format: Literal["text", "json"] = "text"
    remarks: tuple[Remark, ...] = field(default=(), compare=False, repr=False)
    """What is to be said in the log, once; no setting."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Read every variable of `VARIABLES`; the rest keep their defaults.

        Raises:
            ConfigError: a NODEPASS_ variable of ours has a value that cannot be used.
        """
        given: dict[str, object] = {}
        remarks: list[Remark] = []
        for variable in VARIABLES:
            found = _find(variable, environ)
            if isinstance(found, Remark):
                remarks.append(found)
            elif found is not None:
                given[variable.field] = found
        _agree(given, environ, remarks)
        remarks += _misspelt(environ)
        # The table gives each field its type.
        return cls(**given, remarks=tuple(remarks))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: where it goes, how it is read, what the help says."""

    name: str
    field: str
    kind: Callable[[str], object]
    expects: str
    meaning: str

    def read(self, text: str) -> object:
        """Return the value, or raise ConfigError saying what it may be."""
        try:
            return self.kind(text)
        except ValueError:
            raise ConfigError(self.own_name, f"{text!r} is not {self.expects}") from None

    @property
    def own_name(self) -> str:
        """The name that nobody else means: NODEPASS_<NAME>."""
        return OWN + self.name.removeprefix(OWN)

    @property
    def default(self) -> str:
        """The default as the help shows it."""
        if self.field == "threads":
            return "half the cores"
        value = getattr(Settings(), self.field)
        if isinstance(value, float):
            return show_duration(value)
        return str(int(value)) if isinstance(value, bool) else str(value)


def _count(name: str, low: int, high: int, meaning: str) -> Variable:
    def read(text: str) -> int:
        if not is_number(text) or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    short = name.removeprefix("NODEPASS_").lower()
    return Variable(name, short, read, f"a whole number, {low}..{high}", meaning)


SHORTEST = 0.001
"""Seconds; less would be a busy loop where the duration is a period."""

SHORTEST_REPORT = 0.01
"""Seconds: a hundred pings a second. From 250 on the other side takes them for a flood, see
`session.TALK_RATE`."""

LONGEST = 8760 * 3600.0
"""Seconds, a year; well inside what every clock and timer here can hold."""


LONGEST_IDLE = 1000 * 3600.0
"""Seconds: below what the engine counts in 32 bits of milliseconds, with the client's margin."""


def _duration(name: str, meaning: str, low: float = SHORTEST, high: float = LONGEST) -> Variable:
    def read(text: str) -> float:
        seconds = parse_duration(text)
        if not low <= seconds <= high:
            raise ValueError(text)
        return seconds

    least = show_duration(low)
    expects = f"a duration such as 300ms, 5s or 1m30s, {least}..{show_duration(high)}"
    return Variable(name, name.lower(), read, expects, meaning)


def _choice(name: str, values: tuple[str, ...], meaning: str) -> Variable:
    def read(text: str) -> object:
        if text.lower() not in values:
            raise ValueError(text)
        return text == "1" if values == ("0", "1") else text.lower()

    short = name.removeprefix("NODEPASS_").lower()
    return Variable(name, short, read, " or ".join(values), meaning)


FLOWS_LIMIT = 65536
"""Most relays one engine holds; limits above it could never be reached."""

VARIABLES: tuple[Variable, ...] = (
    _count("SEMAPHORE_LIMIT", 1, FLOWS_LIMIT, "most visitors served at once; more wait"),
    _count("MIN_POOL_CAPACITY", 1, FLOWS_LIMIT, "fewest idle links kept ready"),
    _count("MAX_POOL_CAPACITY", 1, FLOWS_LIMIT, "most idle links"),
    _count("UDP_DATA_BUF_SIZE", 1, 65535, "largest datagram carried, bytes"),
    _duration(
        "UDP_READ_TIMEOUT",
        "seed dialect: how long a datagram waits for its answer",
        high=LONGEST_IDLE,
    ),
    _duration(
        "UDP_IDLE_TIMEOUT", "native dialect: end of a silent UDP session", high=LONGEST_IDLE
    ),
    _duration("TCP_IDLE_TIMEOUT", "end of a silent TCP connection; 0 = never", 0.0, LONGEST_IDLE),
    _duration("REPORT_INTERVAL", "heartbeat and report period; lost after three", SHORTEST_REPORT),
    _duration("SERVICE_COOLDOWN", "longest pause before dialling a lost tunnel again"),
    _duration("SHUTDOWN_TIMEOUT", "how long open relays may finish after SIGTERM", 0.0),
    _duration("RELOAD_INTERVAL", "how often certificate files are looked at"),
    _duration("HANDSHAKE_TIMEOUT", "from accept to a finished handshake"),
    _duration("DIAL_TIMEOUT", "target and tunnel dials"),
    _count("NODEPASS_THREADS", 1, 256, "engine threads"),
    _choice("NODEPASS_ENGINE", ("native", "python"), "python = the slow twin"),
    _choice("NODEPASS_SPLICE", ("0", "1"), "0 = never splice, always copy"),
    _choice("NODEPASS_UDP_GSO", ("0", "1"), "1 = let the kernel cut runs of datagrams"),
    _choice("LOG_FORMAT", ("text", "json"), "json = one JSON object a line"),
)

_ELSEWHERE = ("NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE")
# Ours as well, though nothing that a user could mean: read while building, or by tests.
_WORKSHOP = re.compile(r"NODEPASS_(DEBUG|PURE|SANITIZE|WERROR|TEST_.*)")
# What Kubernetes and Docker set for a service or a container that is called nodepass-something.
_LINK = re.compile(
    r".*_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?"
    r"|NAME|ENV_.*)"
)
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://.*", re.DOTALL)

LIMITS = ("min_pool_capacity", "max_pool_capacity")
"""The first may not be more than the second."""

SHOWN = 40
"""Characters of a foreign value in the log: enough to know it again."""

SHORT = 7
"""Letters behind NODEPASS_; in so short a name one slip is likely, two make another word."""


def _find(variable: Variable, environ: Mapping[str, str]) -> object:
    """Return a variable's value, a Remark where it is none for us, None where there is none."""
    text = environ.get(variable.own_name)
    if text:
        # A service may be called as one of our variables; no value of ours looks like its link.
        if _LINK_VALUE.fullmatch(text):
            return _left(variable, variable.own_name, text)
        return variable.read(text)
    text = environ.get(variable.name)
    if not text:
        return None
    try:
        return variable.kind(text)
    except ValueError:
        return _left(variable, variable.name, text)


def _left(variable: Variable, name: str, text: str) -> Remark:
    shown = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    why = f"{shown!r} is not {variable.expects}"
    return Remark(name, variable.own_name, why, variable.default)


def log_format(environ: Mapping[str, str]) -> str:
    """Return how to write even that all the rest cannot be used."""
    (variable,) = (v for v in VARIABLES if v.field == "log_format")
    try:
        found = _find(variable, environ)
    except ConfigError:
        return "text"
    return found if isinstance(found, str) else "text"


def _agree(given: dict[str, object], environ: Mapping[str, str], remarks: list[Remark]) -> None:
    """Drop the general ones of two limits that contradict each other, refuse our own."""
    settings = Settings(**given)  # type: ignore[arg-type]  # as above
    low, high = settings.min_pool_capacity, settings.max_pool_capacity
    if low <= high:
        return
    why = f"MIN_POOL_CAPACITY ({low}) is more than MAX_POOL_CAPACITY ({high})"
    pair = [v for v in VARIABLES if v.field in LIMITS and v.field in given]
    general = [v for v in pair if not environ.get(v.own_name)]
    if not general:
        hint = "set both, the first at most as large as the second"
        raise ConfigError(pair[0].own_name, f"{why}; {hint}")
    for variable in general:
        del given[variable.field]
        remarks.append(Remark(variable.name, variable.own_name, why, variable.default))
    _agree(given, environ, remarks)


def _misspelt(environ: Mapping[str, str]) -> Iterable[Remark]:
    """Find what was probably meant for us and is not read."""
    ours = [*_ELSEWHERE, *(v.own_name for v in VARIABLES)]
    known = {*ours, *(v.name for v in VARIABLES)}
    for name, text in environ.items():
        if name in known or _WORKSHOP.fullmatch(name) or _LINK.fullmatch(name):
            continue
        if name[:3].upper() == OWN[:3]:
            meant = next((own for own in ours if _is_slip(name.upper(), own)), None)
        else:
            # Others may well have such a name, but hardly with a value that suits us.
            near = (v for v in VARIABLES if _is_near(name, v.name, 1))
            meant = next((v.name for v in near if _suits(v, text)), None)
        if meant is not None:
            yield Remark(name, meant)


def _is_slip(name: str, own: str) -> bool:
    rest = own.removeprefix(OWN)
    start = name.removeprefix(OWN)
    if rest.startswith(start) and len(start) * 2 >= len(rest):
        return True  # NODEPASS_PASS
    return _is_near(name, own, 1 if len(rest) <= SHORT else 2)


def _is_near(name: str, known: str, most: int) -> bool:
    return abs(len(name) - len(known)) <= most and distance(name, known) <= most


def _suits(variable: Variable, text: str) -> bool:
    try:
        variable.kind(text)
    except ValueError:
        return False
    return True
