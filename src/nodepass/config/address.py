"""Addresses: host and port, as they are written and compared.

Pure text; nothing here resolves a name. `config` reads URLs with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from nodepass.errors import ConfigError

from .hostname import HOST_LIMIT, encode, readable

__all__ = ["PORTS", "Address", "is_number", "overlap", "parse_address"]

PORTS = range(1, 65536)

DIGITS = 9
"""Longest number that is read as one; Python itself balks at a few thousand digits."""

ANY_IPV4 = str(IPv4Address(0))
ANY_IPV6 = str(IPv6Address(0))

_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen or to dial."""

    host: str
    """IPv4, IPv6 without brackets, or a name in ASCII; "" = every address (listening only)."""

    port: int
    """1..65535."""

    def __str__(self) -> str:
        """As people read it; `host` is what machines read."""
        return join_address(self.host, self.port)


def join_address(host: str, port: int) -> str:
    """Write an address as people do: "host:port", IPv6 in brackets, names in their own letters."""
    return f"[{host}]:{port}" if ":" in host else f"{readable(host)}:{port}"


def parse_address(option: str, text: str) -> Address:
    """Read host:port, [IPv6]:port or :port.

    Args:
        option: what the address is for; named in the error.
        text: as it stands in the URL.

    Raises:
        ConfigError: it is none of these, or the port is missing or out of range.
    """
    shape = f"write {option}_host:{option}_port, the port 1..65535"
    if not text:
        raise ConfigError(option, f"is missing; {shape}")
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ConfigError(option, "has an unfinished bracket; write [IPv6]:port")
        host, port = _ipv6(option, host), port.removeprefix(":")
    elif text.count(":") > 1:
        raise ConfigError(option, f"{text!r} is not host:port; an IPv6 address needs brackets")
    else:
        host, _, port = text.partition(":")
        host = _host(option, host)
    if not port:
        raise ConfigError(option, f"port is missing; {shape}")
    if not is_number(port) or int(port) not in PORTS:
        raise ConfigError(option, f"port {port!r} is not a number 1..65535")
    return Address(host, int(port))


def _ipv6(option: str, text: str) -> str:
    try:
        # RFC 6874 writes the zone's '%' as %25; people type it bare.
        return str(IPv6Address(text.replace("%25", "%", 1)))
    except ValueError:
        raise ConfigError(option, f"[{text}] is not an IPv6 address") from None


def _host(option: str, text: str) -> str:
    if not text:
        return ""
    try:
        name = encode(text)
    except ValueError as exc:
        raise ConfigError(option, f"{text!r} is not a host name: {_clause(exc)}") from None
    labels = name.removesuffix(".").split(".")
    if labels[-1].isdigit():  # no top-level domain is a number, so an address was meant
        try:
            return str(IPv4Address(name))
        except ValueError:
            hint = f"; a port alone is written :{text}" if text.isdigit() else ""
            raise ConfigError(option, f"{text!r} is not an IPv4 address{hint}") from None
    if not (0 < len(name) <= HOST_LIMIT and all(_LABEL.fullmatch(label) for label in labels)):
        raise ConfigError(option, f"{text!r} is not a host name")
    return name


def _clause(exc: ValueError) -> str:
    text = str(exc)
    return text[:1].lower() + text[1:]


def is_number(text: str) -> bool:
    """Tell whether this is a short decimal number, as ports and counts are."""
    return text.isascii() and text.isdigit() and len(text) <= DIGITS


def overlap(one: Address, other: Address) -> bool:
    """Tell whether listening on both is bound to fail; names are compared, not resolved."""
    if one.port != other.port:
        return False
    hosts = {one.host, other.host}
    if len(hosts) == 1 or "" in hosts:
        return True
    # A wildcard of one family covers that family's addresses; names may be of either.
    v6 = [h for h in hosts if ":" in h]
    return (ANY_IPV4 in hosts and not v6) or (ANY_IPV6 in hosts and len(v6) == len(hosts))


def leads_to(dialled: Address, listened: Address) -> bool:
    """Tell whether dialling one address on this machine is sure to reach what listens on another.

    Names are compared, not resolved; "localhost" and an empty host are this machine.
    """
    if dialled.port != listened.port:
        return False
    here, there = dialled.host or "localhost", listened.host
    if here == there:
        return True
    is_loopback = here in ("localhost", "::1") or here.startswith("127.")
    if not is_loopback:
        return False
    if there in ("", "localhost"):
        return True
    is_v6 = here == "::1"
    if there == ANY_IPV4:
        return not is_v6
    if there == ANY_IPV6:
        return is_v6 or here == "localhost"
    return here == "localhost" and there in ("::1", "127.0.0.1")
