"""The contenders: rows of contenders.toml, checked, and their processes while they are measured.

Owns: the processes of one contender for the length of one block; their configs and logs lie in
the caller's folder. Must never start a row whose programs are missing.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from benchmarks import catalog
from benchmarks.load import Load
from benchmarks.machine import HERE, BenchmarkError
from benchmarks.process import Child, is_listening, run_tool, running

FILE: Final = HERE / "contenders.toml"
PROTOCOLS: Final = ("tcp", "udp", "tls")
PORTS: Final = ("visitors", "target", "tunnel")
MAKERS: Final = {"certificate": "openssl", "key": "ssh-keygen"}
"""Placeholders for files that we make when a row wants them, and the program that it takes."""
PLACEHOLDERS: Final = (*PORTS, "network", "config", *MAKERS, "user", "python")
ROW_KEYS: Final = (
    *("name", "protocols", "programs", "environment", "loads", "help"),
    *("server", "client"),
)
SIDE_KEYS: Final = ("command", "config", "ready")
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")
PLACEHOLDER: Final = re.compile(r"\{([a-z_]+)\}")
KEY_LIMIT: Final = 30.0
"""Seconds for a new key; it takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Side:
    """How to start one process of a contender."""

    command: tuple[str, ...]
    config: str | None = None
    ready: str | None = None

    def texts(self) -> tuple[str, ...]:
        """All that may hold placeholders."""
        return (*self.command, self.config or "")


@dataclass(frozen=True, slots=True)
class Contender:
    """One row; without sides the straight way."""

    name: str
    protocols: tuple[str, ...]
    programs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    loads: tuple[str, ...] = ()
    """As for --only: under these alone; empty: under all."""
    help: tuple[str, ...] = ()
    """A command that ends by itself, for the load of that name."""
    server: Side | None = None
    client: Side | None = None

    def suits(self, load: Load) -> bool:
        """Whether there is anything to measure under this load."""
        if load.network is None:
            return bool(self.help)
        return load.network in self.protocols and bool(self.sides or not load.needs_sides)

    def prefers(self, load: Load) -> bool:
        """Whether it is to be measured under this load if nobody has named it."""
        return not self.loads or any(map(load.belongs_to, self.loads))

    @property
    def sides(self) -> tuple[tuple[str, Side], ...]:
        """The sides that there are, by name, in the order of their start."""
        both = (("server", self.server), ("client", self.client))
        return tuple((name, side) for name, side in both if side is not None)

    def wants(self, placeholder: str) -> bool:
        """Whether a side mentions this placeholder."""
        texts = [text for _, side in self.sides for text in side.texts()]
        return any(placeholder in PLACEHOLDER.findall(text) for text in texts)


# --- reading the file ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Table:
    """One table of the file; each complaint names the row and the key."""

    where: str
    values: Mapping[str, object]

    def check_keys(self, known: Sequence[str]) -> None:
        for key in self.values:
            if key not in known:
                raise self.error(key, f"there is no such key; choose from {', '.join(known)}")

    def error(self, key: str, why: str) -> BenchmarkError:
        return BenchmarkError(f"{self.where}: {key}: {why}")

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if key in self.values and (not isinstance(value, str) or not value):
            raise self.error(key, "must be a text, not empty")
        return cast("str | None", value)

    def words(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise self.error(key, "must be a list of texts")
        return tuple(value)

    def table(self, key: str) -> Mapping[str, object]:
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, "must be a table")
        return value


def read(path: Path = FILE) -> list[Contender]:
    """Read and check all rows.

    Raises:
        BenchmarkError: one line that names the file, the row and the key.
    """
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise BenchmarkError(f"{path.name}: {error}") from None
    try:
        return parse(rows)
    except BenchmarkError as error:
        raise BenchmarkError(f"{path.name}: {error}") from None


def parse(content: Mapping[str, object]) -> list[Contender]:
    """Check the content of a file and return its rows."""
    for key in content:
        if key != "contender":
            raise BenchmarkError(
                f"{key}: there is no such key; each row starts with [[contender]]"
            )
    rows = content.get("contender", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BenchmarkError("contender: must be rows, each starting with [[contender]]")
    if not rows:
        raise BenchmarkError("contender: there is no row")
    found: list[Contender] = []
    for number, row in enumerate(rows, 1):
        contender = _contender(number, row)
        if any(contender.name == other.name for other in found):
            raise BenchmarkError(f"{contender.name}: name: two rows have it")
        found.append(contender)
    return found


def _contender(number: int, row: Mapping[str, object]) -> Contender:
    name = _Table(f"row {number}", row).text("name")
    if name is None:
        raise BenchmarkError(f"row {number}: name: is missing")
    table = _Table(name, row)
    if not NAME.fullmatch(name):
        raise table.error("name", 'only small letters, digits, "-", "_" and "."')
    table.check_keys(ROW_KEYS)
    protocols = table.words("protocols")
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise table.error("protocols", f"{protocol!r} is none of {', '.join(PROTOCOLS)}")
    if not {"tcp", "udp"} & {*protocols}:
        raise table.error("protocols", 'must hold "tcp" or "udp"')
    environment = table.table("environment")
    if not all(isinstance(value, str) for value in environment.values()):
        raise table.error("environment", "must be a table of texts")
    contender = Contender(
        name,
        protocols,
        table.words("programs"),
        cast("Mapping[str, str]", environment),
        _loads(table),
        table.words("help"),
        *(_side(table, key) for key in ("server", "client")),
    )
    _check_placeholders(table, "help", contender.help, ("python",))
    for placeholder, program in MAKERS.items():
        if contender.wants(placeholder) and program not in contender.programs:
            why = f'must hold "{program}", which makes the {{{placeholder}}}'
            raise table.error("programs", why)
    return contender


def _loads(row: _Table) -> tuple[str, ...]:
    words = row.words("loads")
    try:
        catalog.choose(words)
    except BenchmarkError as error:
        raise row.error("loads", str(error)) from None
    return words


def _side(row: _Table, key: str) -> Side | None:
    if key not in row.values:
        return None
    table = _Table(f"{row.where}: {key}", row.table(key))
    table.check_keys(SIDE_KEYS)
    side = Side(table.words("command"), table.text("config"), table.text("ready"))
    if not side.command:
        raise table.error("command", "is missing")
    _check_placeholders(table, "command", side.command, PLACEHOLDERS)
    _check_placeholders(table, "config", [side.config or ""], PLACEHOLDERS)
    if side.config is None and any("{config}" in word for word in side.command):
        raise table.error("command", "{config} without a config to write")
    return side


def _check_placeholders(
    table: _Table, key: str, texts: Sequence[str], known: Sequence[str]
) -> None:
    for used in (word for text in texts for word in PLACEHOLDER.findall(text)):
        if used not in known:
            words = ", ".join(f"{{{word}}}" for word in known)
            raise table.error(key, f"{{{used}}} is none of {words}")


def fill(text: str, values: Mapping[str, str]) -> str:
    """Put values in the place of placeholders; other braces stay."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], text)


# --- what a row needs ------------------------------------------------------------------------


def make_files(
    rows: Sequence[Contender], folder: Path, environment: Mapping[str, str]
) -> dict[str, Path]:
    """Make the files that these rows want, readable for us alone; return them by placeholder."""
    makers = {"certificate": make_certificate, "key": make_key}
    return {
        placeholder: make(folder, environment)
        for placeholder, make in makers.items()
        if any(row.wants(placeholder) for row in rows)
    }


def make_certificate(folder: Path, environment: Mapping[str, str]) -> Path:
    """Make a self-signed certificate and its key, both in one file."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 7"
    command = [*words.split(), "-subj", "/CN=localhost", "-keyout", str(key)]
    run_tool([*command, "-out", str(certificate)], KEY_LIMIT, environment)
    both = folder / "both.pem"
    both.touch(mode=0o600)
    both.write_text(certificate.read_text() + key.read_text())
    return both


def make_key(folder: Path, environment: Mapping[str, str]) -> Path:
    """Make an SSH key without a passphrase; its public half lies beside it, as NAME.pub."""
    key = folder / "ssh"
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "benchmarks", "-f", str(key)]
    run_tool(words, KEY_LIMIT, environment)
    return key


# --- running it ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """What a contender is started with."""

    folder: Path
    """For configs and logs."""
    environment: Mapping[str, str]
    files: Mapping[str, Path]
    """Made by make_files."""
    network: str
    """ "tcp" or "udp"."""
    visitors: int
    target: int
    tunnel: int

    def values(self, config: Path) -> dict[str, str]:
        """What the placeholders stand for."""
        return {
            "visitors": str(self.visitors),
            "target": str(self.target),
            "tunnel": str(self.tunnel),
            "network": self.network,
            "config": str(config),
            **{name: str(self.files.get(name, "")) for name in MAKERS},
            "user": _user(),
            "python": sys.executable,
        }


def _user() -> str:
    """Who we are, whatever LOGNAME says; a number that nobody knows stays one."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def command_of(
    words: Sequence[str], values: Mapping[str, str], environment: Mapping[str, str]
) -> list[str]:
    """Fill in what a row says; the program gets its whole path, which sshd insists on."""
    program, *rest = (fill(word, values) for word in words)
    return [shutil.which(program, path=environment.get("PATH")) or program, *rest]


@contextlib.contextmanager
def started(contender: Contender, place: Place) -> Iterator[list[Child]]:
    """Run a contender's processes for the length of a block; each is ready before the next starts.

    Raises:
        BenchmarkError: one of them ended, or was not ready in time.
    """
    environment = {**place.environment, **contender.environment}
    with contextlib.ExitStack() as stack:
        children: list[Child] = []
        for name, side in contender.sides:
            config = place.folder / f"{name}.conf"
            values = place.values(config)
            if side.config is not None:
                config.write_text(fill(side.config, values))
            command = command_of(side.command, values, environment)
            child = stack.enter_context(running(name, command, place.folder, environment))
            children.append(child)
            _wait_for(child, side.ready, place, has_tunnel=contender.wants("tunnel"))
        yield children


def _wait_for(child: Child, ready: str | None, place: Place, *, has_tunnel: bool) -> None:
    """Wait for the text, or for a listener: the server has one of the ports, both sides all."""
    if ready is not None:
        child.wait_until(lambda: child.says(ready), repr(ready))
        return
    ports = [(place.visitors, place.network), *([(place.tunnel, "tcp")] if has_tunnel else [])]
    enough = any if child.name == "server" else all
    child.wait_until(lambda: enough(is_listening(*port) for port in ports), "a listener")
