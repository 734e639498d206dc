"""What server and client can say to each other: one frozen value for each line.

Owns: the vocabulary and its limits. The bytes are the business of `lines`, the rules of who
may say what and when that of `session`. Imports nothing that could touch the world.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

VERSION: Final = 2
"""Number of the native dialect, in greeting and hello."""
MAX_NAME: Final = 255
"""Bytes of a client's name once percent-encoded: the longest host name of RFC 1035."""
SEED_ID_SIZE: Final = 8
"""Bytes of a seed link id: lower-case hex, no LF (the Go client reads it in one call)."""
NONCE_SIZE: Final = 16
"""Bytes: 128 bits never repeat by chance, so no transcript can be replayed."""
KEY_SIZE: Final = 32
"""Bytes of every key and proof: the output of HMAC-SHA256."""
SESSION_SIZE: Final = 8
"""Bytes of a session id (16 hex characters)."""
MAX_NUMBER: Final = 2**53
"""Exclusive bound of link numbers and counts: exact in every language's number type."""


class Dialect(StrEnum):
    """Which generation of bytes a peer speaks."""

    SEED = "seed"
    NATIVE = "native"


class Kind(StrEnum):
    """What a launch carries; the value is the native signal's scheme."""

    TCP = "tcp"
    UDP = "udp"


class Refusal(StrEnum):
    """Why a server turns a hello away."""

    AUTH = "auth"
    VERSION = "version"
    BUSY = "busy"
    LIMIT = "limit"
    TLS = "tls"


class Failure(StrEnum):
    """Why a client could not do a launch."""

    REFUSED = "refused"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    LIMIT = "limit"
    CIRCLE = "circle"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Greeting:
    """The server's first line on every connection to the tunnel port."""

    data_port: int
    """0..65535; 0 = seed peers are not admitted."""
    tls: int
    """0, 1 or 2."""
    nonce: bytes = b""
    """NONCE_SIZE bytes; empty = a seed server wrote this."""
    needs_password: bool = False
    version: int = 0
    """0 = seed; VERSION = ours; more = a later release that still speaks our lines."""

    @property
    def is_native(self) -> bool:
        return self.version >= VERSION


@dataclass(frozen=True, slots=True)
class Hello:
    """A client's first line on a control connection."""

    name: str
    nonce: bytes
    proof: bytes | None = field(default=None, repr=False)
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class LinkClaim:
    """A client's first line on a data link."""

    session: str
    number: int
    proof: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The server's answer to a hello that it accepts."""

    session: str
    idle: int
    proof: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    """Session key, only where no password exists to derive one from."""
    at: tuple[str, int] | None = None
    """Where its visitors arrive: address or "" for any, and port. None = it does not say."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The server's answer to a hello that it turns away."""

    reason: str


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Seed: an empty line."""


@dataclass(frozen=True, slots=True)
class SeedLaunch:
    """Seed: join the link of this id; UDP means one datagram."""

    link_id: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Remote:
    """Seed, as its documents name it: the data port has this number."""

    port: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Native: join this link with a target connection of this kind."""

    kind: Kind
    number: int
    visitor: str = ""
    """Address as "ip:port", for the far side's log."""


@dataclass(frozen=True, slots=True)
class Fail:
    """Native: that launch could not be done; the link is being reset."""

    number: int
    why: str


@dataclass(frozen=True, slots=True)
class Idle:
    """Native: how many idle links the server wants now."""

    count: int


@dataclass(frozen=True, slots=True)
class Ping:
    number: int


@dataclass(frozen=True, slots=True)
class Pong:
    number: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Native: no new launches; open relays continue."""


@dataclass(frozen=True, slots=True)
class Bye:
    """Native: clean end of the session."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """A line from a later release; passed over."""

    line: bytes


NativeSignal = Launch | Fail | Idle | Ping | Pong | Drain | Bye
SeedSignal = Heartbeat | SeedLaunch | Remote
Signal = NativeSignal | SeedSignal | Unknown
