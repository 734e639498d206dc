"""Options: a URL and the environment become one frozen `Config`.

Defaults stand in two tables and nowhere else: `PARAMETERS` here for the query,
`Settings` (environment.py) for the variables. Nothing is guessed and nothing silently
replaced: what cannot be used is a `ConfigError` that names the option and says what it
may be.

Touches no network. The one file it reads is the password's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

from .address import PORTS, Address, is_number, overlap, parse_address
from .environment import Settings, suggest
from .errors import ConfigError

__all__ = [
    "PARAMETERS",
    "Address",
    "Config",
    "Mode",
    "Parameter",
    "Secret",
    "Settings",
    "check_together",
]

NAME_LIMIT = 64
"""Characters of a client's name; Linux allows as many in a host name (HOST_NAME_MAX)."""

PASSWORD_LIMIT = 1024
"""Bytes of a password; enough for a key file, and an end to reading a device."""

_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{NAME_LIMIT}}}")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")


class Mode(StrEnum):
    """Which end of the tunnel this is."""

    SERVER = "server"
    CLIENT = "client"


class Secret:
    """Text that shows itself as *** wherever it is printed."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself; never into a line, a message or a file."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written anywhere")


BOTH = (Mode.SERVER, Mode.CLIENT)
LEVELS = ("debug", "info", "warn", "error", "fatal", "none")
SWITCH = ("0", "1")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One query parameter: who takes it, what it may be, what the help says."""

    name: str
    modes: tuple[Mode, ...]
    default: str
    values: tuple[str, ...]
    meaning: str


PARAMETERS: tuple[Parameter, ...] = (
    Parameter("log", BOTH, "info", LEVELS, "least level that is printed"),
    Parameter("tls", BOTH, "0", ("0", "1", "2"), "server: the mode; client: the least accepted"),
    Parameter("crt", (Mode.SERVER,), "", (), "PEM chain for tls=2"),
    Parameter("key", (Mode.SERVER,), "", (), "PEM key for tls=2"),
    Parameter("ca", (Mode.CLIENT,), "", (), "trust anchor for tls=2"),
    Parameter("sni", (Mode.CLIENT,), "", (), "server name for tls=2"),
    Parameter("compat", BOTH, "1", SWITCH, "0 = refuse peers of the seed dialect"),
    Parameter("data", (Mode.SERVER,), "0", (), "port of the seed dialect's data listener"),
    Parameter("tcp", BOTH, "1", SWITCH, "0 = carry no TCP"),
    Parameter("udp", BOTH, "0", SWITCH, "1 = carry UDP"),
    Parameter("name", (Mode.CLIENT,), "", (), "how the server names this client"),
)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything one tunnel has to know."""

    mode: Mode
    tunnel: Address
    target: Address
    password: Secret | None
    log: str
    tls: int
    crt: str | None
    key: str | None
    ca: str | None
    sni: str | None
    compat: bool
    data: int
    tcp: bool
    udp: bool
    name: str
    settings: Settings

    @property
    def url(self) -> str:
        """The URL for display: password as ***, parameters at their defaults left out."""
        secret = "***@" if self.password is not None else ""
        pairs = []
        for parameter in PARAMETERS:
            value = getattr(self, parameter.name)
            text = str(int(value)) if isinstance(value, bool) else str(value or "0")
            shown = value is not None and self.mode in parameter.modes
            if shown and parameter.name != "name" and text != parameter.default:
                pairs.append(f"{parameter.name}={text}")
        query = "?" + "&".join(pairs) if pairs else ""
        return f"{self.mode}://{secret}{self.tunnel}/{self.target}{query}"

    @property
    def listeners(self) -> tuple[tuple[str, Address], ...]:
        """What this tunnel listens on, each with the name of the option."""
        if self.mode is Mode.CLIENT:
            return ()
        fixed = [("tunnel", self.tunnel), ("target", self.target)]
        if self.data:
            fixed.append(("data", Address(self.tunnel.host, self.data)))
        return tuple(fixed)

    @classmethod
    def parse(
        cls,
        url: str,
        environ: Mapping[str, str] | None = None,
        settings: Settings | None = None,
    ) -> Config:
        """Read one URL, and from the environment what it leaves open.

        Args:
            url: as on the command line; its own password goes before the environment's.
            environ: None = this process's.
            settings: None = read from `environ`.

        Raises:
            ConfigError: any part is missing, unknown, contradictory, or not in this build yet.
        """
        environ = os.environ if environ is None else environ
        settings = Settings.from_environment(environ) if settings is None else settings
        mode, authority, target, query = _split(url)
        password, tunnel = _split_password(authority)
        password = password or _environment_password(environ)
        given = _parse_query(mode, query)
        config = cls(
            mode=mode,
            tunnel=_address("tunnel", tunnel, mode),
            target=_address("target", target, mode),
            password=password,
            log=given.get("log", "info"),
            tls=int(given.get("tls", "0")),
            crt=given.get("crt"),
            key=given.get("key"),
            ca=given.get("ca"),
            sni=given.get("sni"),
            compat=given.get("compat", "1") == "1" and password is None,
            data=_data_port(given),
            tcp=given.get("tcp", "1") == "1",
            udp=given.get("udp", "0") == "1",
            name=_client_name(given) if mode is Mode.CLIENT else "",
            settings=settings,
        )
        _refuse_contradictions(config, given)
        _refuse_later_features(config)
        return config


def _split(url: str) -> tuple[Mode, str, str, str]:
    scheme, colon, rest = url.partition("://")
    if not colon:
        raise ConfigError("url", "starts neither with server:// nor with client://")
    if scheme.lower() not in tuple(Mode):
        raise ConfigError("url", f"mode {scheme!r} is unknown; it is server:// or client://")
    if any(c.isspace() or not c.isprintable() for c in rest):
        raise ConfigError("url", "has a blank or a control character in it; write it as %20 …")
    if "#" in rest:
        raise ConfigError("url", "has a '#' in it, which means nothing here; write it as %23")
    body, _, query = rest.partition("?")
    authority, _, target = body.partition("/")
    # A raw '/' or '?' in a password ends it early; parts of it must not show up in an error.
    if "@" in target or ("@" in query and not target):
        raise ConfigError("password", "has '/' or '?' in it; write them as %2F and %3F")
    return Mode(scheme.lower()), authority, target, query


def _split_password(authority: str) -> tuple[Secret | None, str]:
    written, at, tunnel = authority.rpartition("@")
    if not at:
        return None, tunnel
    return _password("password", _decode("password", written)), tunnel


def _environment_password(environ: Mapping[str, str]) -> Secret | None:
    text, path = environ.get("NODEPASS_PASSWORD"), environ.get("NODEPASS_PASSWORD_FILE")
    if text is not None and path is not None:
        raise ConfigError("NODEPASS_PASSWORD", "and NODEPASS_PASSWORD_FILE are both set; keep one")
    if text is not None:
        return _password("NODEPASS_PASSWORD", text)
    if path is None:
        return None
    option = "NODEPASS_PASSWORD_FILE"
    try:
        with Path(path).open("rb") as file:
            line = file.read(PASSWORD_LIMIT + len("\r\n"))
    except (OSError, ValueError) as exc:
        why = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise ConfigError(option, f"cannot read {path!r}: {why.lower()}") from exc
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    try:
        return _password(option, line.decode())
    except UnicodeDecodeError:
        raise ConfigError(option, f"{path!r} holds bytes that are not UTF-8") from None


def _password(option: str, text: str) -> Secret:
    if not 0 < len(text.encode(errors="surrogateescape")) <= PASSWORD_LIMIT:
        raise ConfigError(
            option, f"is empty or too long; a password has 1..{PASSWORD_LIMIT} bytes"
        )
    return Secret(text)


def _decode(option: str, text: str) -> str:
    """Undo percent-encoding; "+" stays what it is."""

    def byte(escape: re.Match[str]) -> bytes:
        if escape[1] is None:
            raise ConfigError(option, "has a '%' without two hex digits; write it as %25")
        return bytes([int(escape[1], 16)])

    parts: list[bytes] = []
    end = 0
    for escape in _ESCAPE.finditer(text):
        parts += [text[end : escape.start()].encode(errors="surrogateescape"), byte(escape)]
        end = escape.end()
    parts.append(text[end:].encode(errors="surrogateescape"))
    try:
        return b"".join(parts).decode()
    except UnicodeDecodeError:
        raise ConfigError(option, "does not decode to UTF-8") from None


def _address(option: str, text: str, mode: Mode) -> Address:
    address = parse_address(option, text)
    if mode is Mode.CLIENT and not address.host:
        # What has no host is dialled on this machine, as the Go program does it.
        return Address("localhost", address.port)
    return address


def _parse_query(mode: Mode, query: str) -> dict[str, str]:
    known = {p.name: p for p in PARAMETERS if mode in p.modes}
    given: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        name, equals, text = pair.partition("=")
        name, value = _decode("url", name), _decode("url", text)
        if name not in known:
            named = name if name.isidentifier() else "url"
            raise ConfigError(named, _unknown(mode, name, known))
        if name in given:
            raise ConfigError(name, "is given twice; once is enough")
        allowed = known[name].values
        value = value.lower() if allowed else value
        if not equals or not value or (allowed and value not in allowed):
            may_be = f"it may be {' '.join(allowed)}" if allowed else "it needs a value"
            raise ConfigError(name, f"{value!r} is not a value; {may_be}")
        given[name] = value
    return given


def _unknown(mode: Mode, name: str, known: Iterable[str]) -> str:
    if not name:
        return "has an empty parameter in its query; each is name=value"
    elsewhere = [p.modes[0] for p in PARAMETERS if p.name == name]
    if elsewhere:
        return f"is a parameter of the {elsewhere[0]}, not of the {mode}"
    named = "" if name.isidentifier() else f"{name!r} "
    return f"{named}is not a parameter of the {mode}; {suggest(name, known)}"


def _client_name(given: Mapping[str, str]) -> str:
    name = given.get("name")
    if name is None:
        from socket import gethostname

        return re.sub(r"[^A-Za-z0-9._-]", "-", gethostname())[:NAME_LIMIT] or "client"
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "name", f"{name!r} is not 1..{NAME_LIMIT} of letters, digits, '.', '_', '-'"
        )
    return name


def _data_port(given: Mapping[str, str]) -> int:
    text = given.get("data", "0")
    if not is_number(text) or int(text) >= PORTS.stop:
        raise ConfigError("data", f"{text!r} is not a port; it may be 0..65535")
    return int(text)


def _refuse_contradictions(config: Config, given: Mapping[str, str]) -> None:
    if config.mode is Mode.SERVER and config.tls == 2:
        missing = [name for name in ("crt", "key") if name not in given]
        if missing:
            raise ConfigError(
                missing[0],
                "is missing, tls=2 needs crt=FILE and key=FILE; if the URL had them, the shell"
                " cut it at the first '&': put the URL in quotes",
            )
    elif "crt" in given or "key" in given:
        raise ConfigError("crt" if "crt" in given else "key", "is for tls=2 only; add tls=2")
    if config.password is not None and given.get("compat") == "1":
        raise ConfigError("compat", "is 1, but a password shuts seed peers out; leave it out")
    if not (config.tcp or config.udp):
        raise ConfigError("tcp", "is 0 and there is no udp=1, so nothing is left to carry")
    check_together([config])


def _refuse_later_features(config: Config) -> None:
    later = {
        "tls": config.tls != 0,
        "ca": config.ca is not None,
        "sni": config.sni is not None,
        "password": config.password is not None,
        "udp": config.udp,
    }
    for option, wanted in later.items():
        if wanted:
            raise ConfigError(option, "is not in this build yet; leave it out")


def check_together(configs: Iterable[Config]) -> None:
    """Refuse tunnels of one process that would listen on one address.

    Raises:
        ConfigError: two listeners overlap; names the second.
    """
    taken: list[tuple[str, Address]] = []
    for config in configs:
        for option, address in config.listeners:
            for other, earlier in taken:
                if overlap(address, earlier):
                    raise ConfigError(
                        option, f"{address} is taken by {other} {earlier}; use another port"
                    )
            taken.append((option, address))
