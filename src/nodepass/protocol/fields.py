"""Fields of a line: how each is written, and what is refused in one that is read. Sans-IO.

Packing checks what our own code says (`LocalWireError`), parsing what the peer has said
(`PeerWireError`).
"""

from __future__ import annotations

from typing import Final

from nodepass.errors import LocalWireError, PeerWireError

from .messages import KEY_SIZE, MAX_NUMBER, SESSION_SIZE
from .strangers import identify

_HEX: Final = frozenset("0123456789abcdef")
_ADDRESS: Final = frozenset("0123456789abcdef.:")


def require(is_met: bool, message: str) -> None:
    """Raise LocalWireError unless our own side may say this."""
    if not is_met:
        raise LocalWireError(message)


# The texts of errors are put together only where they are needed: each line comes by here.


def check_number(number: int, what: str) -> None:
    """Raise LocalWireError for a number that no line may hold."""
    if not 0 <= number < MAX_NUMBER:
        raise LocalWireError(f"{what} outside 0..{MAX_NUMBER - 1}")


def check_session(session: str) -> None:
    """Raise LocalWireError for what is no session id."""
    if not is_hex(session, SESSION_SIZE):
        raise LocalWireError(f"session is not {SESSION_SIZE * 2} hex characters")


def check_word(word: str, what: str) -> None:
    """Raise LocalWireError for what is no word."""
    if not is_word(word):
        raise LocalWireError(f"{what} is not one lower-case word")


def proof_hex(proof: bytes) -> str:
    """Return a proof or key as a line holds it."""
    if len(proof) != KEY_SIZE:
        raise LocalWireError(f"a proof or key is not {KEY_SIZE} bytes")
    return proof.hex()


def is_hex(text: str, size: int) -> bool:
    """Tell whether a text is so many bytes in lower-case hex."""
    return len(text) == size * 2 and _HEX.issuperset(text)


def is_word(text: str) -> bool:
    """Tell whether a text is one short lower-case word."""
    return 0 < len(text) <= 32 and all("a" <= c <= "z" or c == "-" for c in text)


def decode_ascii(line: bytes) -> str:
    """Read a line as text; PeerWireError says who may have written what is none."""
    try:
        return line.decode("ascii")
    except UnicodeDecodeError as exc:
        raise PeerWireError(
            f"bytes that are not ASCII: the other side looks like {identify(line)}"
        ) from exc


def split_line(line: bytes) -> tuple[str, str, dict[str, str]]:
    """Read scheme, host and fields of a native line."""
    text = decode_ascii(line)
    scheme, mark, rest = text.partition("://")
    if not mark:
        raise PeerWireError(f"not one of our lines: the other side looks like {identify(line)}")
    host, _, query = rest.partition("?")
    return scheme, host, parse_fields(query)


def parse_fields(query: str) -> dict[str, str]:
    """Read the fields behind the question mark; none may stand twice."""
    fields: dict[str, str] = {}
    if not query:
        return fields
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if name in fields:
            raise PeerWireError(f"field {name[:16]!r} stands twice")
        fields[name] = value
    return fields


def parse_number(text: str, what: str, bound: int) -> int:
    """Read a decimal number below a bound."""
    # isdecimal alone admits other scripts' digits; int() alone admits "1_0" and "+1".
    if not (text.isascii() and text.isdecimal()) or len(text) > 16 or int(text) >= bound:
        raise PeerWireError(f"{what} is not a number below {bound}")
    return int(text)


def parse_hex(text: str, what: str, size: int) -> bytes:
    """Read so many bytes in lower-case hex."""
    if not is_hex(text, size):
        raise PeerWireError(f"{what} is not {size * 2} lower-case hex characters")
    return bytes.fromhex(text)


def parse_session(text: str) -> str:
    """Read a session id."""
    if not is_hex(text, SESSION_SIZE):
        raise PeerWireError(f"session is not {SESSION_SIZE * 2} lower-case hex characters")
    return text


def parse_place(text: str) -> tuple[str, int] | None:
    """Read an address, or nothing for any, and a port; None = that is not what it is."""
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536
    return (host, int(port)) if is_port and _ADDRESS.issuperset(host) else None


def parse_word(text: str, what: str) -> str:
    """Read one lower-case word."""
    if not is_word(text):
        raise PeerWireError(f"{what} is not one lower-case word")
    return text
