"""The contenders: rows of contenders.toml, checked, and their processes while they are measured.

Owns: the processes of one contender for the length of one block; their configs and logs lie in
the caller's folder. Must never start a row whose programs are missing.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from benchmarks.bench_udp import BenchmarkError
from benchmarks.process import Child, is_listening, run_tool, running

FILE: Final = Path(__file__).resolve().parent / "contenders.toml"
PROTOCOLS: Final = ("tcp", "tls")
PLACEHOLDERS: Final = ("visitors", "target", "tunnel", "config", "certificate", "python")
ROW_KEYS: Final = ("name", "protocols", "programs", "environment", "server", "client")
SIDE_KEYS: Final = ("command", "config", "ready")
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")
PLACEHOLDER: Final = re.compile(r"\{([a-z_]+)\}")
OPENSSL_LIMIT: Final = 30.0
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
    server: Side | None = None
    client: Side | None = None

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
    if "tcp" not in protocols:
        raise table.error("protocols", 'must hold "tcp"')
    environment = table.table("environment")
    if not all(isinstance(value, str) for value in environment.values()):
        raise table.error("environment", "must be a table of texts")
    contender = Contender(
        name,
        protocols,
        table.words("programs"),
        cast("Mapping[str, str]", environment),
        *(_side(table, key) for key in ("server", "client")),
    )
    if contender.wants("certificate") and "openssl" not in contender.programs:
        raise table.error("programs", 'must hold "openssl", which makes the {certificate}')
    return contender


def _side(row: _Table, key: str) -> Side | None:
    if key not in row.values:
        return None
    table = _Table(f"{row.where}: {key}", row.table(key))
    table.check_keys(SIDE_KEYS)
    side = Side(table.words("command"), table.text("config"), table.text("ready"))
    if not side.command:
        raise table.error("command", "is missing")
    for name, texts in (("command", side.command), ("config", (side.config or "",))):
        for used in (word for text in texts for word in PLACEHOLDER.findall(text)):
            if used not in PLACEHOLDERS:
                known = ", ".join(f"{{{word}}}" for word in PLACEHOLDERS)
                raise table.error(name, f"{{{used}}} is none of {known}")
            if used == "config" and (name == "config" or side.config is None):
                raise table.error(name, "{config} without a config to write")
    return side


def fill(text: str, values: Mapping[str, str]) -> str:
    """Put values in the place of placeholders; other braces stay."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], text)


# --- what a row needs ------------------------------------------------------------------------


def missing(programs: Sequence[str], path: str) -> str | None:
    """Return why these programs cannot be used, or None when all are on this PATH."""
    absent = [program for program in programs if shutil.which(program, path=path) is None]
    if not absent:
        return None
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not on the PATH"


def make_certificate(folder: Path, environment: Mapping[str, str]) -> Path:
    """Make a self-signed certificate and its key, both in one file that only we can read."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 7"
    command = [*words.split(), "-subj", "/CN=localhost", "-keyout", str(key)]
    run_tool([*command, "-out", str(certificate)], OPENSSL_LIMIT, environment)
    both = folder / "both.pem"
    both.touch(mode=0o600)
    both.write_text(certificate.read_text() + key.read_text())
    return both


# --- running it ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """What a contender is started with."""

    folder: Path
    """For configs and logs."""
    environment: Mapping[str, str]
    certificate: Path | None
    visitors: int
    target: int
    tunnel: int

    def values(self, config: Path) -> dict[str, str]:
        """What the placeholders stand for."""
        return {
            "visitors": str(self.visitors),
            "target": str(self.target),
            "tunnel": str(self.tunnel),
            "config": str(config),
            "certificate": str(self.certificate or ""),
            "python": sys.executable,
        }


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
            command = [fill(word, values) for word in side.command]
            child = stack.enter_context(running(name, command, place.folder, environment))
            children.append(child)
            ports = [place.visitors, *([place.tunnel] if contender.wants("tunnel") else [])]
            _wait_for(child, side.ready, ports)
        yield children


def _wait_for(child: Child, ready: str | None, ports: Sequence[int]) -> None:
    """Wait for the text, or for a listener: the server has one of the ports, both sides all."""
    if ready is not None:
        child.wait_until(lambda: child.says(ready), repr(ready))
        return
    enough = any if child.name == "server" else all
    child.wait_until(lambda: enough(map(is_listening, ports)), "a listener")
