"""Bytes of every line between server and client, both dialects, and of the UDP frame.

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

from .messages import (
    KEY_SIZE,
    MAX_NAME,
    MAX_NUMBER,
    NONCE_SIZE,
    SEED_ID_SIZE,
    SESSION_SIZE,
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

MAX_GREETING: Final = 256
"""Bytes, LF included. The longest greeting is 53; the rest is room for later fields."""
MAX_LINE: Final = 1024
"""Bytes, LF included, of every other line: what a stranger may make us keep."""

_KINDS: Final = {str(kind): kind for kind in Kind}
_HEX: Final = frozenset("0123456789abcdef")
_ADDRESS: Final = frozenset("0123456789abcdef.:")

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
    _require(0 <= port <= 65535, "greeting: data port outside 0..65535")
    _require(tls in (0, 1, 2), "greeting: tls is not 0, 1 or 2")
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
    text = _ascii(line)
    if not text.startswith("//"):
        raise PeerWireError(f"not a greeting: the other side looks like {identify(line)}")
    head, hash_mark, fragment = text[2:].partition("#")
    port_text, mark, query = head.partition("?")
    is_port = port_text.isdecimal() and len(port_text) <= 5 and int(port_text) < 65536
    if not hash_mark or fragment not in ("0", "1", "2") or not is_port:
        raise PeerWireError(f"not a greeting: the other side looks like {identify(line)}")
    port = int(port_text)
    fields = _fields(query) if mark else {}
    version = _number(fields["v"], "version", MAX_NUMBER) if "v" in fields else 0
    if version < VERSION:
        if port == 0:
            raise PeerWireError("a seed greeting with data port 0")
        return Greeting(port, int(fragment))
    nonce = _hex(fields.get("n", ""), "nonce", NONCE_SIZE)
    flag = fields.get("a", "0")
    if flag not in ("0", "1"):
        raise PeerWireError("greeting: a is not 0 or 1")
    return Greeting(port, int(fragment), nonce, flag == "1", version)


def pack_hello(hello: Hello) -> bytes:
    """Encode a client's opening of a control connection.

    Args:
        hello: name of 1 byte or more, at most MAX_NAME once percent-encoded.
    """
    _require(hello.name.isprintable(), "hello: name is not printable")
    name = quote(hello.name, safe="")
    _require(0 < len(name) <= MAX_NAME, f"hello: name is not 1..{MAX_NAME} bytes")
    _require(len(hello.nonce) == NONCE_SIZE, f"hello: nonce is not {NONCE_SIZE} bytes")
    line = f"hello://{name}?v={hello.version}&n={hello.nonce.hex()}"
    if hello.proof is not None:
        line += f"&p={_proof_hex(hello.proof)}"
    return _line(line)


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
    _check_session(claim.session)
    _check_number(claim.number, "link number")
    proof = _proof_hex(claim.proof)
    return _line(f"link://{claim.session}?i={claim.number}&p={proof}")


def parse_opening(line: bytes) -> Hello | LinkClaim:
    """Decode the client's first line (without LF).

    Raises:
        PeerWireError: neither a hello nor a link claim.
    """
    ours = _CLAIM.fullmatch(line)
    if ours is not None:
        return LinkClaim(ours[1].decode(), int(ours[2]), bytes.fromhex(ours[3].decode()))
    scheme, host, fields = _split(line)
    if scheme == "hello":
        name = unquote(host, errors="replace")
        if not 0 < len(host) <= MAX_NAME or not name.isprintable():
            raise PeerWireError(f"hello: name is not 1..{MAX_NAME} printable bytes")
        version = _number(fields.get("v", ""), "version", MAX_NUMBER)
        nonce = _hex(fields.get("n", ""), "nonce", NONCE_SIZE)
        proof = _hex(fields["p"], "proof", KEY_SIZE) if "p" in fields else None
        return Hello(name, nonce, proof, version)
    if scheme == "link":
        number = _number(fields.get("i", ""), "link number", MAX_NUMBER)
        proof = _hex(fields.get("p", ""), "proof", KEY_SIZE)
        return LinkClaim(_session(host), number, proof)
    raise PeerWireError(f"not an opening: the other side looks like {identify(line)}")


def pack_answer(answer: Welcome | Refuse) -> bytes:
    """Encode the server's answer to a hello."""
    if isinstance(answer, Refuse):
        _check_word(answer.reason, "refusal")
        return _line(f"refuse://{answer.reason}")
    _check_session(answer.session)
    _check_number(answer.idle, "idle count")
    fields = []
    if answer.proof is not None:
        fields.append(f"p={_proof_hex(answer.proof)}")
    if answer.key is not None:
        fields.append(f"k={_proof_hex(answer.key)}")
    fields.append(f"idle={answer.idle}")
    if answer.at is not None:
        _require(_place(f"{answer.at[0]}:{answer.at[1]}") == answer.at, "welcome: no such place")
        fields.append(f"at={answer.at[0]}:{answer.at[1]}")
    return _line(f"welcome://{answer.session}?{'&'.join(fields)}")


def parse_answer(line: bytes) -> Welcome | Refuse:
    """Decode the server's answer to a hello (without LF).

    Raises:
        PeerWireError: neither a welcome nor a refusal.
    """
    scheme, host, fields = _split(line)
    if scheme == "refuse":
        return Refuse(_word(host, "refusal"))
    if scheme == "welcome":
        proof = _hex(fields["p"], "proof", KEY_SIZE) if "p" in fields else None
        key = _hex(fields["k"], "key", KEY_SIZE) if "k" in fields else None
        idle = _number(fields.get("idle", ""), "idle count", MAX_NUMBER)
        return Welcome(_session(host), idle, proof, key, _place(fields.get("at", "")))
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
            _check_number(number, "link number")
            _require("&" not in visitor, "launch: a visitor's address holds no &")
            return _line(f"{kind}://{number}?from={visitor}" if visitor else f"{kind}://{number}")
        case Fail(number, why):
            _check_number(number, "link number")
            _check_word(why, "failure")
            return _line(f"fail://{number}?why={why}")
        case Idle(count):
            _check_number(count, "idle count")
            return _line(f"idle://{count}")
        case Ping(number):
            _check_number(number, "ping number")
            return _line(f"ping://{number}")
        case Pong(number):
            _check_number(number, "pong number")
            return _line(f"pong://{number}")
        case Drain():
            return b"drain://\n"
        case Bye(reason):
            _check_word(reason, "bye reason")
            return _line(f"bye://{reason}")
        case Heartbeat():
            return b"\n"
        case SeedLaunch(link_id, kind):
            _require(is_seed_id(link_id), "seed launch: id is not 8 hex characters")
            return _line(f"//{link_id}#{1 if kind is Kind.TCP else 2}")
        case Remote(port):
            _require(0 < port < 65536, "remote: port outside 1..65535")
            return _line(f"remote://{port}")
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
        number = _number(host, "link number", MAX_NUMBER)
        return Launch(kind, number, _fields(query).get("from", ""))
    if scheme == "fail":
        number = _number(host, "link number", MAX_NUMBER)
        return Fail(number, _word(_fields(query).get("why", "unknown"), "failure"))
    if scheme == "idle":
        return Idle(_number(host, "idle count", MAX_NUMBER))
    if scheme == "ping":
        return Ping(_number(host, "ping number", MAX_NUMBER))
    if scheme == "pong":
        return Pong(_number(host, "pong number", MAX_NUMBER))
    if scheme == "drain":
        return Drain()
    if scheme == "bye":
        return Bye(_word(host, "bye reason"))
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
    return len(text) == SEED_ID_SIZE and _HEX.issuperset(text)


def identify(start: bytes) -> str:
    """Name what wrote these first bytes, for a log line a user can act on."""
    if not start:
        return (
            "a program that says nothing (is this the tunnel port? NodePass 1.0.0-1.0.2 and 1.4 "
            "or later wait for us to speak)"
        )
    if start[:1] == b"\x16" or start[:2] == b"\x15\x03":
        return "a TLS program (NodePass 1.0.0-1.0.2 speaks TLS from the first byte)"
    if start.startswith(b"HTTP/"):
        return "an HTTP server (NodePass 1.13 and later handshakes over HTTP)"
    if start.split(b" ", 1)[0] in (b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"CONNECT"):
        if b"authorization: bearer" in start.lower():
            return "NodePass 1.13 or later (handshake over HTTP)"
        return "an HTTP client (NodePass 1.13 and later handshakes over HTTP)"
    if start.startswith(b"SSH-"):
        return "an SSH server"
    if start.startswith(b"np://"):
        return "NodePass 1.6 to 1.12"
    if start.startswith((b"//+", b"//-")):
        return "NodePass 1.2.2 to 1.5"
    if start.startswith(b"//#"):
        return "NodePass 1.1.1 to 1.2.1"
    if start.startswith((b"[PASSPORT]", b"[]")):
        return "NodePass 1.0.0"
    shown = start[:32].decode("ascii", errors="replace")
    printable = "".join(c if c.isprintable() and c != "\ufffd" else "." for c in shown)
    return f"no release we know (it wrote {printable!r})"


# -------------------------------------------------------------------------- UDP frames

MAX_DATAGRAM: Final = 65535
"""Bytes: what the 2-byte length of a frame can say."""


def pack_frame(datagram: bytes) -> bytes:
    """Put a datagram into a frame: 2-byte big-endian length, then the bytes."""
    _require(len(datagram) <= MAX_DATAGRAM, f"frame: datagram over {MAX_DATAGRAM} bytes")
    return len(datagram).to_bytes(2, "big") + datagram


class FrameBuffer:
    """Cut a byte stream back into the datagrams that were framed into it."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Append bytes as they came; return the datagrams that are whole now, in order."""
        self._data += data
        datagrams = []
        start = 0
        while len(self._data) - start >= 2:
            end = start + 2 + int.from_bytes(self._data[start : start + 2], "big")
            if len(self._data) < end:
                break
            datagrams.append(bytes(self._data[start + 2 : end]))
            start = end
        del self._data[:start]
        return datagrams

    @property
    def has_rest(self) -> bool:
        """Whether the stream stands in the middle of a frame."""
        return bool(self._data)


# ----------------------------------------------------------------------------- helpers


def _require(is_met: bool, message: str) -> None:
    if not is_met:
        raise LocalWireError(message)


def _line(text: str) -> bytes:
    try:
        line = text.encode("ascii") + b"\n"
    except UnicodeEncodeError as exc:
        raise LocalWireError("a line may hold ASCII only") from exc
    _require(line.count(b"\n") == 1, "a line may hold one LF only, at its end")
    if len(line) > MAX_LINE:
        raise LocalWireError(f"a line may hold {MAX_LINE} bytes at most")
    return line


# Their texts are put together only where they are needed: each line comes by here.


def _check_number(number: int, what: str) -> None:
    if not 0 <= number < MAX_NUMBER:
        raise LocalWireError(f"{what} outside 0..{MAX_NUMBER - 1}")


def _check_session(session: str) -> None:
    if not _is_hex(session, SESSION_SIZE):
        raise LocalWireError(f"session is not {SESSION_SIZE * 2} hex characters")


def _check_word(word: str, what: str) -> None:
    if not _is_word(word):
        raise LocalWireError(f"{what} is not one lower-case word")


def _proof_hex(proof: bytes) -> str:
    if len(proof) != KEY_SIZE:
        raise LocalWireError(f"a proof or key is not {KEY_SIZE} bytes")
    return proof.hex()


def _is_hex(text: str, size: int) -> bool:
    return len(text) == size * 2 and _HEX.issuperset(text)


def _is_word(text: str) -> bool:
    return 0 < len(text) <= 32 and all("a" <= c <= "z" or c == "-" for c in text)


def _ascii(line: bytes) -> str:
    try:
        return line.decode("ascii")
    except UnicodeDecodeError as exc:
        raise PeerWireError(
            f"bytes that are not ASCII: the other side looks like {identify(line)}"
        ) from exc


def _split(line: bytes) -> tuple[str, str, dict[str, str]]:
    text = _ascii(line)
    scheme, mark, rest = text.partition("://")
    if not mark:
        raise PeerWireError(f"not one of our lines: the other side looks like {identify(line)}")
    host, _, query = rest.partition("?")
    return scheme, host, _fields(query)


def _fields(query: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    if not query:
        return fields
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if name in fields:
            raise PeerWireError(f"field {name[:16]!r} stands twice")
        fields[name] = value
    return fields


def _number(text: str, what: str, bound: int) -> int:
    # isdecimal alone admits other scripts' digits; int() alone admits "1_0" and "+1".
    if not (text.isascii() and text.isdecimal()) or len(text) > 16 or int(text) >= bound:
        raise PeerWireError(f"{what} is not a number below {bound}")
    return int(text)


def _hex(text: str, what: str, size: int) -> bytes:
    if not _is_hex(text, size):
        raise PeerWireError(f"{what} is not {size * 2} lower-case hex characters")
    return bytes.fromhex(text)


def _session(text: str) -> str:
    if not _is_hex(text, SESSION_SIZE):
        raise PeerWireError(f"session is not {SESSION_SIZE * 2} lower-case hex characters")
    return text


def _place(text: str) -> tuple[str, int] | None:
    """Read an address, or nothing for any, and a port; None = that is not what it is."""
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536
    return (host, int(port)) if is_port and _ADDRESS.issuperset(host) else None


def _word(text: str, what: str) -> str:
    if not _is_word(text):
        raise PeerWireError(f"{what} is not one lower-case word")
    return text
