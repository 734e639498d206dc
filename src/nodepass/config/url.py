"""Options: a URL and the environment become one frozen `Config`.

Defaults stand in two tables and nowhere else: `PARAMETERS` here for the query,
`Settings` (environment.py) for the variables. Nothing is guessed and nothing silently
replaced: what cannot be used is a `ConfigError` that names the option and says what it
may be. What might be a password, or a part of one, is never repeated in an error.

Touches no network. The one file it reads is the password's (password.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nodepass.errors import ConfigError

from .address import PORTS, Address, is_number, leads_to, overlap, parse_address
from .environment import Settings
from .hostname import readable
from .parameters import PARAMETERS, Mode
from .password import CommonPassword, Secret, checked, utf8
from .spelling import distance, suggest

__all__ = [
    "Address",
    "Config",
    "Secret",
    "Settings",
    "check_together",
    "label_together",
    "parse_host",
]

NAME_LIMIT = 64
"""Characters of a client's name; Linux allows as many in a host name (HOST_NAME_MAX)."""

_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{NAME_LIMIT}}}")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")
_SCHEME = re.compile(r"[A-Za-z]{1,16}")


SLIPS = 2
"""Letters that may be wrong in a mode for it to be known again."""

QUOTES = {
    "\ufeff": "a byte order mark, which some editors put before a text",
    **dict.fromkeys("'\"`\u201c\u201d\u201e\u2018\u2019\u00ab", "a quotation mark"),
}
"""What a URL may stand in where no shell takes it off, and what it is called."""

LINE_ENDS = {
    "\r": "a carriage return, as a file with the line ends of Windows has it",
    "\n": "a line end",
}

NO_URL = "is an address, not a URL: write host:port, without the scheme before it"

FILES = ("crt", "key", "ca")


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
    label: str | None = None
    """What tells this tunnel from the others of its process; None = there are none."""

    @property
    def url(self) -> str:
        """The URL for display: password as ***, parameters at their defaults left out."""
        secret = "***@" if self.password is not None else ""
        pairs = []
        for parameter in PARAMETERS:
            value = getattr(self, parameter.name)
            text = str(int(value)) if isinstance(value, bool) else str(value or "0")
            text = readable(text) if parameter.name == "sni" else text
            shown = value is not None and self.mode in parameter.modes
            if shown and parameter.name != "name" and text != parameter.default:
                pairs.append(f"{parameter.name}={_encode(text)}")
        query = "?" + "&".join(pairs) if pairs else ""
        return f"{self.mode}://{secret}{self.tunnel}/{self.target}{query}"

    @property
    def carries(self) -> str:
        """The protocols that are on, for the log: "tcp", "udp" or "tcp,udp"."""
        return ",".join(name for name, is_on in (("tcp", self.tcp), ("udp", self.udp)) if is_on)

    @property
    def listeners(self) -> tuple[tuple[str, str, Address], ...]:
        """What this tunnel listens on: the name of the option, the protocol, the address."""
        if self.mode is Mode.CLIENT:
            return ()
        fixed = [("tunnel", "tcp", self.tunnel)]
        fixed += [("target", protocol, self.target) for protocol in self.carries.split(",")]
        if self.data:
            fixed.append(("data", "tcp", Address(self.tunnel.host, self.data)))
        return tuple(fixed)

    @classmethod
    def parse(
        cls,
        url: str,
        environ: Mapping[str, str] | None = None,
        settings: Settings | None = None,
        common: CommonPassword | None = None,
    ) -> Config:
        """Read one URL, and from the environment what it leaves open.

        Args:
            url: as on the command line; its own password goes before the environment's.
            environ: None = this process's.
            settings: None = read from `environ`.
            common: the password of URLs that have none; None = read from `environ`.

        Raises:
            ConfigError: any part is missing, unknown or contradictory.
        """
        environ = os.environ if environ is None else environ
        settings = Settings.from_environment(environ) if settings is None else settings
        mode, authority, target, query = _split(url)
        written, at, tunnel = authority.rpartition("@")
        password: Secret | None
        if at:
            password, source = checked("password", _decode("password", written)), ""
        else:
            password, source = (common or CommonPassword(environ)).read()
        given = _parse_query(mode, query)
        config = cls(
            mode=mode,
            tunnel=_address("tunnel", tunnel, mode),
            target=_address("target", target, mode),
            password=password,
            log=given.get("log", "info"),
            tls=_tls(given),
            crt=given.get("crt"),
            key=given.get("key"),
            ca=given.get("ca"),
            sni=parse_host("sni", given["sni"]) if "sni" in given else None,
            compat=given.get("compat", "1") == "1" and password is None,
            data=_data_port(given),
            tcp=given.get("tcp", "1") == "1",
            udp=given.get("udp", "1") == "1",
            name=_client_name(given) if mode is Mode.CLIENT else "",
            settings=settings,
        )
        _refuse_contradictions(config, given, source)
        return config


def _split(url: str) -> tuple[Mode, str, str, str]:
    if url[:1] in QUOTES:
        raise ConfigError("url", f"begins with {QUOTES[url[0]]}; leave it out")
    scheme, colon, rest = url.partition("://")
    if not colon:
        raise ConfigError("url", "starts neither with server:// nor with client://")
    if scheme.lower() not in tuple(Mode):
        is_plain = _SCHEME.fullmatch(scheme) and "@" not in rest
        shown = f"mode {scheme!r} is unknown; it" if is_plain else "its mode"
        near = [mode for mode in Mode if is_plain and distance(scheme.lower(), mode) <= SLIPS]
        hint = f"; did you mean {near[0]}://?" if near else ""
        raise ConfigError("url", f"{shown} is server:// or client://{hint}")
    if any(c.isspace() or not c.isprintable() for c in rest):
        raise ConfigError("url", _blank_fault(rest))
    if "#" in rest:
        raise ConfigError("url", "has a '#' in it, which means nothing here; write it as %23")
    body, _, query = rest.partition("?")
    authority, _, target = body.partition("/")
    if _has_stray_at(target, query):
        raise ConfigError(
            "url",
            "has an '@' behind its first '/' or '?'; in a password write these as %2F and %3F,"
            " elsewhere write the '@' as %40",
        )
    if authority.endswith(":") and target.startswith("/"):
        raise ConfigError("tunnel", NO_URL)
    if "/" in target:
        raise ConfigError("target", _path_fault(target))
    return Mode(scheme.lower()), authority, target, query


def _blank_fault(text: str) -> str:
    """Say what the first blank or unprintable character is, and what to do about it."""
    blank = next(c for c in text if c.isspace() or not c.isprintable())
    place = "ends in" if text.endswith(blank) else "has"
    if blank in LINE_ENDS:
        return f"{place} {LINE_ENDS[blank]}; take it off"
    if not blank.isspace():
        return f"{place} an invisible or control character; leave it out"
    if place == "ends in":
        return "ends in a blank; take it off"
    return "has a blank in it; in a password or a file's name write it as %20"


def _path_fault(target: str) -> str:
    """Say why there can be no '/' behind the one that begins the target."""
    if target.startswith("/"):
        return "begins with a second '/'; one is enough"
    if "://" in target:
        return NO_URL
    if target.endswith("/") and target.count("/") == 1:
        return "ends in a '/'; leave it out"
    return "has a path; a tunnel carries all of a port: leave out the '/' and what follows"


def _has_stray_at(target: str, query: str) -> bool:
    """Tell whether a raw '/' or '?' may have ended a password early.

    Then its rest stands where addresses and parameters are read, whose errors repeat it.
    """
    pairs = [pair.partition("=") for pair in query.split("&")]
    in_query = any("@" in pair[0] or ("@" in pair[2] and pair[0] not in FILES) for pair in pairs)
    return "@" in target or in_query or ("@" in query and not target)


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
    decoded = utf8(b"".join(parts))
    if decoded is None:
        raise ConfigError(option, "does not decode to UTF-8")
    return decoded


def _encode(text: str) -> str:
    """Escape what would end a value, or could not be printed; the rest stays readable."""
    return "".join(
        c if c.isprintable() and c not in " %&#@" else "".join(f"%{b:02X}" for b in c.encode())
        for c in text
    )


def _address(option: str, text: str, mode: Mode) -> Address:
    # What no address can be may be a password whose '@' was forgotten or escaped.
    if not text.startswith("["):
        if text.count(":") > 1:
            hint = "an IPv6 address needs brackets, a password before it ends in '@'"
            raise ConfigError(option, f"is not host:port; {hint}")
        if any(c.isascii() and not c.isalnum() and c not in "-._:" for c in text):
            hint = "a password before it ends in '@'"
            raise ConfigError(option, f"has a character that no host and no port has; {hint}")
    address = parse_address(option, text)
    if mode is Mode.CLIENT and not address.host:
        # What has no host is dialled on this machine, as the Go program does it.
        return Address("localhost", address.port)
    return address


def parse_host(option: str, text: str) -> str:
    """Read a host name or an address, without a port; IPv6 with or without brackets.

    Returns:
        A name as certificates and the wire have it (xn--…, no dot at its end), or an address.

    Raises:
        ConfigError: it is neither.
    """
    is_bare = ":" in text and not text.startswith("[")
    try:
        host = parse_address(option, f"[{text}]:1" if is_bare else f"{text}:1").host
    except ConfigError as exc:
        if not text.isascii() and not set(text) & set("@/"):  # no URL with a password, either
            why = f"is no host name and no IP address: {exc.message}"
            raise ConfigError(option, why) from None
        host = ""
    if not host or "%" in host:  # the zone of an IPv6 address means nothing to others
        raise ConfigError(
            option, "is no host name and no IP address; write it without scheme and port"
        )
    return host.removesuffix(".")


def _tls(given: Mapping[str, str]) -> int:
    checking = [name for name in ("ca", "sni") if name in given]
    if not checking:
        return int(given.get("tls", "0"))
    # Whoever says what to check the server against would not be served by less.
    if given.get("tls", "2") != "2":
        raise ConfigError(
            checking[0], f"needs tls=2, but tls={given['tls']} is given; leave one of them out"
        )
    return 2


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


def _refuse_contradictions(config: Config, given: Mapping[str, str], source: str) -> None:
    """Refuse parts that do not fit; `source` is the variable that holds the password."""
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
    guard = f"the password in {source}" if source else "a password"
    if config.password is not None and given.get("compat") == "1":
        raise ConfigError("compat", f"is 1, but {guard} shuts seed peers out; leave it out")
    if "data" in given and not config.compat:
        guard = guard if config.password is not None else "compat=0"
        raise ConfigError("data", f"is for seed peers, and {guard} shuts them out; leave it out")
    if not (config.tcp or config.udp):
        raise ConfigError("tcp", "and udp are both 0, so nothing is left to carry")
    check_together([config])


def check_together(configs: Sequence[Config]) -> None:
    """Refuse tunnels of one process that would listen on one address or lead to each other.

    Raises:
        ConfigError: two listeners overlap (names the second), or a client's target is where the
            visitors of its own server arrive.
    """
    servers = [config for config in configs if config.mode is Mode.SERVER]
    for client in configs:
        if client.mode is Mode.CLIENT and any(
            leads_to(client.tunnel, server.tunnel) and leads_to(client.target, server.target)
            for server in servers
        ):
            raise ConfigError(
                "target",
                f"{client.target} of the client is where the visitors of its server arrive, so "
                "each would come back for ever; give the address of the service itself",
            )
    taken: list[tuple[str, str, Address]] = []
    for config in configs:
        for option, protocol, address in config.listeners:
            for other, other_protocol, earlier in taken:
                if protocol == other_protocol and overlap(address, earlier):
                    raise ConfigError(
                        option, f"{address} is taken by {other} {earlier}; use another port"
                    )
            taken.append((option, protocol, address))


def label_together(configs: Sequence[Config]) -> list[Config]:
    """Give the tunnels of one process names to tell them apart in the log; one needs none.

    A label is the beginning of the tunnel's URL, as short as will do, without a password.
    """
    if len(configs) < 2:
        return list(configs)
    short = [f"{config.mode}://{config.tunnel}" for config in configs]
    full = [
        text if short.count(text) == 1 else f"{text}/{config.target}"
        for text, config in zip(short, configs, strict=True)
    ]
    return [
        replace(config, label=text if full.count(text) == 1 else f"{text}#{number}")
        for number, (text, config) in enumerate(zip(full, configs, strict=True), 1)
    ]
