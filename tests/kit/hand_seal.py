"""TLS 1.3 records sealed by hand: what no library sends when asked, KeyUpdate above all."""

from __future__ import annotations

from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL
from tests.kit.secure import LibrarySide, library_client

HANDSHAKE: Final = 22
APPLICATION_DATA: Final = 23
ALERT: Final = 21
KEY_UPDATE: Final = b"\x18\0\0\x01\0"
"""The message: new keys from here on."""
KEY_UPDATE_ASKED: Final = b"\x18\0\0\x01\x01"
"""The same, and the other side is to do likewise."""
HEADER_SIZE: Final = 5


class HandSealer:
    """Seals what a client sends; made before the handshake, used after it.

    Once it has sealed anything, the library's own writing side is out of step.
    """

    def __init__(self) -> None:
        context = library_client()
        context.set_tls13_ciphersuites(b"TLS_AES_128_GCM_SHA256")
        context.set_keylog_callback(self._hear)
        self.side = LibrarySide(context)
        self._secret = b""
        self._sent = 0

    def _hear(self, _: SSL.Connection, line: bytes) -> None:
        words = line.decode().split()
        if words[0] == "CLIENT_TRAFFIC_SECRET_0":
            self._secret = bytes.fromhex(words[2])

    def seal(self, data: bytes, kind: int = APPLICATION_DATA) -> bytes:
        """Return one record (RFC 8446, section 5.2)."""
        assert self._secret, "the handshake is not done"
        inner = data + bytes([kind])
        key, fixed = _expand(self._secret, b"key", 16), _expand(self._secret, b"iv", 12)
        counter = self._sent.to_bytes(12, "big")
        self._sent += 1
        nonce = bytes(a ^ b for a, b in zip(fixed, counter, strict=True))
        header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
        return header + AESGCM(key).encrypt(nonce, inner, header)

    def half_message(self) -> bytes:
        """Return the beginning of a KeyUpdate: until the rest comes, OpenSSL writes nothing."""
        return self.seal(KEY_UPDATE[:4], HANDSHAKE)

    def finish_message(self) -> bytes:
        """Return the rest of what `half_message` has begun, and go on with the next keys."""
        record = self.seal(KEY_UPDATE[4:], HANDSHAKE)
        self._next_keys()
        return record

    def update_keys(self, *, is_asked: bool) -> bytes:
        """Return a KeyUpdate and go on with the next keys (section 7.2)."""
        record = self.seal(KEY_UPDATE_ASKED if is_asked else KEY_UPDATE, HANDSHAKE)
        self._next_keys()
        return record

    def _next_keys(self) -> None:
        self._secret = _expand(self._secret, b"traffic upd", 32)
        self._sent = 0


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label with an empty context (section 7.1)."""
    name = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0"
    return HKDFExpand(SHA256(), size, info).derive(secret)
