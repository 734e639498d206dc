"""Proofs that a peer holds the password, or belongs to a session: pure functions.

Every proof is an HMAC over a length-prefixed list of what both sides saw, so that a middle
man who changes, swaps or replays any of it fails. Entropy comes in as arguments.

Source: docs/protocol.md, "Proofs".
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from typing import Final

from nodepass.errors import LocalWireError

from .lines import without_proof
from .messages import KEY_SIZE

SCRYPT_SALT: Final = b"nodepass/2"
SCRYPT_COST: Final = 2**15
"""With r=8 this takes 32 MiB and about 0.1 s: once per process, costly per guess."""
SCRYPT_BLOCK: Final = 8
SCRYPT_MEMORY: Final = 64 * 1024 * 1024
"""Bytes OpenSSL may use; the parameters above need a little over half."""


def length_prefixed(*parts: bytes) -> bytes:
    """Join parts so that no two different lists give the same bytes.

    Raises:
        LocalWireError: a part is longer than 65535 bytes.
    """
    try:
        return b"".join([len(part).to_bytes(2, "big") + part for part in parts])
    except OverflowError:
        raise LocalWireError("proof: a part is longer than 65535 bytes") from None


@functools.lru_cache(maxsize=16)
def stretch_password(password: str) -> bytes:
    """Turn a password into the key `K`; slow on purpose, so each is done once per process."""
    return hashlib.scrypt(
        password.encode("utf-8", "surrogateescape"),  # argv may hold bytes that are no UTF-8
        salt=SCRYPT_SALT,
        n=SCRYPT_COST,
        r=SCRYPT_BLOCK,
        p=1,
        maxmem=SCRYPT_MEMORY,
        dklen=KEY_SIZE,
    )


def transcript(greeting_line: bytes, binding: bytes, hello_line: bytes) -> bytes:
    """Bind a handshake together: `T` of docs/protocol.md.

    Args:
        greeting_line: as it came, without LF.
        binding: TLS exporter bytes, empty without TLS.
        hello_line: as it came, without LF; its proof is left out.
    """
    return length_prefixed(greeting_line, binding, without_proof(hello_line))


def client_proof(key: bytes, script: bytes) -> bytes:
    """Prove to the server that the client holds the password."""
    return _mac(key, b"nodepass/2 client", script)


def server_proof(key: bytes, script: bytes, session: str) -> bytes:
    """Prove to the client that the server holds the password."""
    return _mac(key, b"nodepass/2 server", script, session.encode())


def session_key(key: bytes, script: bytes, session: str) -> bytes:
    """Derive the key that links of this session prove themselves with."""
    return _mac(key, b"nodepass/2 session", script, session.encode())


class LinkKey:
    """What the links of one session prove themselves with, made ready for many proofs.

    Args:
        key: of the session, KEY_SIZE bytes.
        session: its id, which every proof is bound to.
    """

    __slots__ = ("_mac", "_session", "session")

    def __init__(self, key: bytes, session: str) -> None:
        self.session = session
        self._session = session.encode()
        self._mac = hmac.new(key, length_prefixed(b"nodepass/2 link"), digestmod="sha256")

    def proof(self, greeting_line: bytes, binding: bytes, number: int) -> bytes:
        """Prove that a link belongs to the session; bound to its own connection's greeting."""
        mac = self._mac.copy()
        mac.update(length_prefixed(greeting_line, binding, self._session, b"%d" % number))
        return mac.digest()


def is_same_proof(left: bytes, right: bytes) -> bool:
    """Compare two proofs in constant time."""
    return hmac.compare_digest(left, right)


def _mac(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, length_prefixed(*parts), "sha256")
