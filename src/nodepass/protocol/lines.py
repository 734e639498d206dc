"""Bytes of every line between server and client, both dialects.

Owns: the shape of each line on the wire. Must never touch a socket, a clock, randomness or
a log. Called by `session`, `server` and `client`.

Reading is strict where a mistake could let somebody in (greeting, opening, answer) and
tolerant where the protocol promises to grow: unknown query fields and unknown signals are
passed over. What breaks the rules raises `PeerWireError`, whatever the bytes were.
"""

from __future__ import annotations

import functools
import re
from typing import Final
from urllib.parse import quote, unquote

from nodepass.errors import LocalWireError, PeerWireError

from .fields import (
    check_number,
    check_session,
    check_word,
    decode_ascii,
    is_hex,
    parse_fields,
    parse_hex,
    parse_number,
    parse_place,
    parse_session,
    parse_word,
    proof_hex,
    require,
    split_line,
)
from .messages import (
    KEY_SIZE,
    MAX_NAME,
    MAX_NUMBER,
    NONCE_SIZE,
    SEED_ID_SIZE,
    VERSION,
    Bye,
    Dialect,
    Drain,
    Fail,
    Greeting,
    Heartbeat,
    Hello,
    Idle,
    Kind,
    Launch,
    LinkClaim,
    NativeSignal,
    Ping,
    Pong,
    Refuse,
    Remote,
    SeedLaunch,
    SeedSignal,
    Signal,
    Unknown,
    Welcome,
)
from .strangers import identify

MAX_GREETING: Final = 256
"""Bytes, LF included. The longest greeting is 53; the rest is room for later fields."""
MAX_LINE: Final = 1024
"""Bytes, LF included, of every other line: what a stranger may make us keep."""

_KINDS: Final = {str(kind): kind for kind in Kind}

# What our own side writes, read at a glance: three of these lines come with each short visitor.
# Whatever looks different, and be it right, is taken apart field by field.
_GREETING: Final = re.compile(rb"//(\d{1,5})\?v=%d&n=([0-9a-f]{32})&a=([01])#([012])" % VERSION)
_LAUNCH: Final = re.compile(rb"(tcp|udp)://(\d{1,15})\?from=([!-%'-~]*)")
_CLAIM: Final = re.compile(rb"link://([0-9a-f]{16})\?i=(\d{1,15})&p=([0-9a-f]{64})")


class LineBuffer:
    """Cut a byte stream into lines, holding at most one unfinished line between feeds."""

    __slots__ = ("_data", "_is_dead", "_limit", "_start")

    def __init__(self, limit: int = MAX_LINE) -> None:
        self._data = bytearray()
        self._start = 0
        self._limit = limit
        self._is_dead = False

    def feed(self, data: bytes) -> None:
        """Append bytes as they came. Discarded once a line was too long."""
        if self._is_dead:
            return
        if self._start:
            del self._data[: self._start]
            self._start = 0
        self._data += data

    def next_line(self) -> bytes | None:
        """Return the next line without its LF, or None when it is not whole yet.

        Raises:
            PeerWireError: the line is longer than the limit; all that follows is discarded.
        """
        end = self._data.find(b"\n", self._start, self._start + self._limit)
        if end < 0:
            if len(self._data) - self._start < self._limit:
                return None
            self._is_dead = True
            self._data.clear()
            self._start = 0
            raise PeerWireError(f"a line longer than {self._limit} bytes")
        line = bytes(self._data[self._start : end])
        self._start = end + 1
        return line

    def rest(self) -> bytes:
        """Hand over what was fed but not read as a line, and forget it."""
        rest = bytes(self._data[self._start :])
        self._data.clear()
        self._start = 0
        return rest


# ---------------------------------------------------------------- lines, first to last


def pack_greeting(greeting: Greeting) -> bytes:
    """Encode the greeting line.

    Raises:
        LocalWireError: a field is outside its range.

    Source: docs/protocol.md, "Greeting".
    """
    if not greeting.is_native:
        return _greeting_ends(greeting.data_port, greeting.tls, False, 0)[0]
    if len(greeting.nonce) != NONCE_SIZE:
        raise LocalWireError(f"greeting: nonce is not {NONCE_SIZE} bytes")
    head, tail = _greeting_ends(
        greeting.data_port, greeting.tls, greeting.needs_password, greeting.version
    )
    return head + greeting.nonce.hex().encode() + tail


@functools.lru_cache(maxsize=64)
def _greeting_ends(port: int, tls: int, needs_password: bool, version: int) -> tuple[bytes, bytes]:
    """Return what stands before and behind the nonce: the same on every connection of a server."""
    require(0 <= port <= 65535, "greeting: data port outside 0..65535")
    require(tls in (0, 1, 2), "greeting: tls is not 0, 1 or 2")
    if not version:
        return b"//%d#%d\n" % (port, tls), b""
    return b"//%d?v=%d&n=" % (port, version), b"&a=%d#%d\n" % (needs_password, tls)


def parse_greeting(line: bytes) -> Greeting:
    """Decode a greeting line (without LF).

    Raises:
        PeerWireError: this is no greeting; the text says what the peer looks like instead.
    """
    ours = _GREETING.fullmatch(line)
    if ours is not None and int(ours[1]) < 65536:
        nonce = bytes.fromhex(ours[2].decode())
        return Greeting(int(ours[1]), int(ours[4]), nonce, ours[3] == b"1", VERSION)
    text = decode_ascii(line)
    if not text.startswith("//"):
        raise PeerWireError(f"not a greeting: the other side looks like {identify(line)}")
    head, hash_mark, fragment = text[2:].partition("#")
    port_text, mark, query = head.partition("?")
    is_port = port_text.isdecimal() and len(port_text) <= 5 and int(port_text) < 65536
    if not hash_mark or fragment not in ("0", "1", "2") or not is_port:
        raise PeerWireError(f"not a greeting: the other side looks like {identify(line)}")
    port = int(port_text)
    fields = parse_fields(query) if mark else {}
    version = parse_number(fields["v"], "version", MAX_NUMBER) if "v" in fields else 0
    if version < VERSION:
        if port == 0:
            raise PeerWireError("a seed greeting with data port 0")
        return Greeting(port, int(fragment))
    nonce = parse_hex(fields.get("n", ""), "nonce", NONCE_SIZE)
    flag = fields.get("a", "0")
    if flag not in ("0", "1"):
        raise PeerWireError("greeting: a is not 0 or 1")
    return Greeting(port, int(fragment), nonce, flag == "1", version)


def pack_hello(hello: Hello) -> bytes:
    """Encode a client's opening of a control connection.

    Args:
        hello: name of 1 byte or more, at most MAX_NAME once percent-encoded.
    """
    require(hello.name.isprintable(), "hello: name is not printable")
    name = quote(hello.name, safe="")
    require(0 < len(name) <= MAX_NAME, f"hello: name is not 1..{MAX_NAME} bytes")
    require(len(hello.nonce) == NONCE_SIZE, f"hello: nonce is not {NONCE_SIZE} bytes")
    line = f"hello://{name}?v={hello.version}&n={hello.nonce.hex()}"
    if hello.proof is not None:
        line += f"&p={proof_hex(hello.proof)}"
    return pack_line(line)


def without_proof(hello_line: bytes) -> bytes:
    """Return a hello line (without LF) as it was when its proof was made.

    The bytes themselves and not what they mean: a later release may add fields, and a name
    can be encoded in more than one way.
    """
    head, mark, query = hello_line.partition(b"?")
    kept = [part for part in query.split(b"&") if not part.startswith(b"p=")]
    return head + mark + b"&".join(kept)


def pack_link_claim(claim: LinkClaim) -> bytes:
    """Encode a client's opening of a data link."""
    check_session(claim.session)
    check_number(claim.number, "link number")
    proof = proof_hex(claim.proof)
    return pack_line(f"link://{claim.session}?i={claim.number}&p={proof}")


def parse_opening(line: bytes) -> Hello | LinkClaim:
    """Decode the client's first line (without LF).

    Raises:
        PeerWireError: neither a hello nor a link claim.
    """
    ours = _CLAIM.fullmatch(line)
    if ours is not None:
        return LinkClaim(ours[1].decode(), int(ours[2]), bytes.fromhex(ours[3].decode()))
    scheme, host, fields = split_line(line)
    if scheme == "hello":
        name = unquote(host, errors="replace")
        if not 0 < len(host) <= MAX_NAME or not name.isprintable():
            raise PeerWireError(f"hello: name is not 1..{MAX_NAME} printable bytes")
        version = parse_number(fields.get("v", ""), "version", MAX_NUMBER)
        nonce = parse_hex(fields.get("n", ""), "nonce", NONCE_SIZE)
        proof = parse_hex(fields["p"], "proof", KEY_SIZE) if "p" in fields else None
        return Hello(name, nonce, proof, version)
    if scheme == "link":
        number = parse_number(fields.get("i", ""), "link number", MAX_NUMBER)
        proof = parse_hex(fields.get("p", ""), "proof", KEY_SIZE)
        return LinkClaim(parse_session(host), number, proof)
    raise PeerWireError(f"not an opening: the other side looks like {identify(line)}")


def pack_answer(answer: Welcome | Refuse) -> bytes:
    """Encode the server's answer to a hello."""
    if isinstance(answer, Refuse):
        check_word(answer.reason, "refusal")
        return pack_line(f"refuse://{answer.reason}")
    check_session(answer.session)
    check_number(answer.idle, "idle count")
    fields = []
    if answer.proof is not None:
        fields.append(f"p={proof_hex(answer.proof)}")
    if answer.key is not None:
        fields.append(f"k={proof_hex(answer.key)}")
    fields.append(f"idle={answer.idle}")
    if answer.at is not None:
        require(
            parse_place(f"{answer.at[0]}:{answer.at[1]}") == answer.at, "welcome: no such place"
        )
        fields.append(f"at={answer.at[0]}:{answer.at[1]}")
    return pack_line(f"welcome://{answer.session}?{'&'.join(fields)}")


def parse_answer(line: bytes) -> Welcome | Refuse:
    """Decode the server's answer to a hello (without LF).

    Raises:
        PeerWireError: neither a welcome nor a refusal.
    """
    scheme, host, fields = split_line(line)
    if scheme == "refuse":
        return Refuse(parse_word(host, "refusal"))
    if scheme == "welcome":
        proof = parse_hex(fields["p"], "proof", KEY_SIZE) if "p" in fields else None
        key = parse_hex(fields["k"], "key", KEY_SIZE) if "k" in fields else None
        idle = parse_number(fields.get("idle", ""), "idle count", MAX_NUMBER)
        return Welcome(parse_session(host), idle, proof, key, parse_place(fields.get("at", "")))
    raise PeerWireError(f"not an answer: the other side looks like {identify(line)}")


def pack_signal(signal: NativeSignal | SeedSignal) -> bytes:
    """Encode one signal of either dialect; the type says which.

    Returns:
        One line ending in a single LF, at most MAX_LINE bytes.

    Raises:
        LocalWireError: a field breaks its shape.
    """
    match signal:
        case Launch(kind, number, visitor):
            check_number(number, "link number")
            require("&" not in visitor, "launch: a visitor's address holds no &")
            return pack_line(
                f"{kind}://{number}?from={visitor}" if visitor else f"{kind}://{number}"
            )
        case Fail(number, why):
            check_number(number, "link number")
            check_word(why, "failure")
            return pack_line(f"fail://{number}?why={why}")
        case Idle(count):
            check_number(count, "idle count")
            return pack_line(f"idle://{count}")
        case Ping(number):
            check_number(number, "ping number")
            return pack_line(f"ping://{number}")
        case Pong(number):
            check_number(number, "pong number")
            return pack_line(f"pong://{number}")
        case Drain():
            return b"drain://\n"
        case Bye(reason):
            check_word(reason, "bye reason")
            return pack_line(f"bye://{reason}")
        case Heartbeat():
            return b"\n"
        case SeedLaunch(link_id, kind):
            require(is_seed_id(link_id), "seed launch: id is not 8 hex characters")
            return pack_line(f"//{link_id}#{1 if kind is Kind.TCP else 2}")
        case Remote(port):
            require(0 < port < 65536, "remote: port outside 1..65535")
            return pack_line(f"remote://{port}")
    raise LocalWireError(f"no such signal: {signal!r}")


def parse_signal(line: bytes, dialect: Dialect) -> Signal:
    """Decode one signal (without LF); what is not known comes back as `Unknown`.

    Raises:
        PeerWireError: native only, a known signal with a field that breaks its shape.
    """
    if dialect is Dialect.SEED:
        return _parse_seed_signal(line)
    ours = _LAUNCH.fullmatch(line)
    if ours is not None:
        return Launch(_KINDS[ours[1].decode()], int(ours[2]), ours[3].decode())
    try:
        text = line.decode("ascii")
    except UnicodeDecodeError:
        return Unknown(line)
    scheme, mark, rest = text.partition("://")
    if not mark:
        return Unknown(line)
    host, _, query = rest.partition("?")
    kind = _KINDS.get(scheme)
    if kind is not None:
        number = parse_number(host, "link number", MAX_NUMBER)
        return Launch(kind, number, parse_fields(query).get("from", ""))
    if scheme == "fail":
        number = parse_number(host, "link number", MAX_NUMBER)
        return Fail(number, parse_word(parse_fields(query).get("why", "unknown"), "failure"))
    if scheme == "idle":
        return Idle(parse_number(host, "idle count", MAX_NUMBER))
    if scheme == "ping":
        return Ping(parse_number(host, "ping number", MAX_NUMBER))
    if scheme == "pong":
        return Pong(parse_number(host, "pong number", MAX_NUMBER))
    if scheme == "drain":
        return Drain()
    if scheme == "bye":
        return Bye(parse_word(host, "bye reason"))
    return Unknown(line)


def _parse_seed_signal(line: bytes) -> Signal:
    text = line.decode("ascii", errors="replace").strip()
    if not text:
        return Heartbeat()
    scheme, mark, rest = text.partition("//")
    if not mark:
        return Unknown(line)
    host, _, fragment = rest.partition("#")
    host = host.partition("?")[0]
    if scheme == "remote:":
        is_port = host.isdecimal() and len(host) <= 5 and 0 < int(host) < 65536
        return Remote(int(host)) if is_port else Unknown(line)
    if not is_seed_id(host):
        return Unknown(line)
    if scheme == "tcp:" or (scheme == "" and fragment == "1"):
        return SeedLaunch(host, Kind.TCP)
    if scheme == "udp:" or (scheme == "" and fragment == "2"):
        return SeedLaunch(host, Kind.UDP)
    return Unknown(line)


def is_seed_id(text: str) -> bool:
    """Tell whether this is a link id as the Go program writes it."""
    return is_hex(text, SEED_ID_SIZE // 2)


def pack_line(text: str) -> bytes:
    try:
        line = text.encode("ascii") + b"\n"
    except UnicodeEncodeError as exc:
        raise LocalWireError("a line may hold ASCII only") from exc
    require(line.count(b"\n") == 1, "a line may hold one LF only, at its end")
    if len(line) > MAX_LINE:
        raise LocalWireError(f"a line may hold {MAX_LINE} bytes at most")
    return line
