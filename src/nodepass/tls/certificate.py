"""Certificates and their keys: made in memory for tls=1, read from files for tls=2.

A file is taken as it should be or not at all: what cannot be used is a `ConfigError` that
names the option and says what is wrong with the file. Never tells a byte of a key. Called
by `contexts`.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from nodepass.errors import ConfigError

FILE_LIMIT: Final = 1 << 20
"""Bytes of a PEM file: the trust store of a whole system has a quarter of that."""
CHAIN_LIMIT: Final = 10
"""Certificates a server sends at most: each link would carry them; real chains have 2 to 4."""
OWN_NAME: Final = "nodepass"
OWN_LIFE: Final = timedelta(days=3650)
"""Nobody checks the dates of the certificate made here, and it lives in memory only."""
CLOCK_SKEW: Final = timedelta(days=1)
"""How far the certificate made here reaches into the past."""

PEM_BEGIN: Final = b"-----BEGIN "
PEM_BLOCK: Final = re.compile(rb"-----BEGIN ([ -~]+?)-----.*?-----END \1-----", re.DOTALL)
"""Labels are printable ASCII (RFC 7468, section 3): X9.42 DH PARAMETERS, PKCS #7 SIGNED DATA."""

UNREADABLE: Final = (
    ValueError,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What cryptography raises, sooner or later, for certificates that OpenSSL may well accept."""

CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
"""Curves that TLS 1.3 signs with (RFC 8446, section 4.2.3)."""
Key = (
    ec.EllipticCurvePrivateKey
    | rsa.RSAPrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
)
"""What can sign a TLS 1.3 handshake."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a server shows, and the key that proves it."""

    chain: tuple[x509.Certificate, ...]
    """The server's own first, then as the file has them."""
    key: Key = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the server's own certificate."""
        return fingerprint(self.chain[0])

    @property
    def expires(self) -> datetime:
        """End of the server's own certificate, UTC."""
        return self.chain[0].not_valid_after_utc


def fingerprint(certificate: x509.Certificate) -> str:
    """Return a fingerprint as people compare it: SHA256:AB:CD:…"""
    return "SHA256:" + certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def make_self_signed(now: datetime) -> Certificate:
    """Make a certificate that nobody can verify, and its key.

    Args:
        now: with a time zone.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, OWN_NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + OWN_LIFE)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(OWN_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Certificate((certificate,), key)


def load(crt: str, key: str, now: datetime) -> Certificate:
    """Read what a server shows from its files.

    Args:
        crt: path of a PEM file, the server's own certificate first.
        key: path of a PEM file; may be the same.
        now: with a time zone.

    Raises:
        ConfigError: "crt" or "key" cannot be used.
    """
    chain = read_certificates("crt", crt)
    if len(chain) > CHAIN_LIMIT:
        raise ConfigError(
            "crt",
            f"{crt!r} holds {len(chain)} certificates; it may hold {CHAIN_LIMIT}, the server's"
            " own and those between it and its authority",
        )
    private = _read_key(key)
    _check_match(crt, key, chain, private)
    _check_dates(crt, chain[0], now)
    return Certificate(chain, private)


def read_certificates(option: str, path: str) -> tuple[x509.Certificate, ...]:
    """Return all certificates of a PEM file, at least one.

    Raises:
        ConfigError: for `option`; unreadable, cut off, or without a certificate.
    """
    data = _read(option, path)
    if _is_cut(data):
        raise ConfigError(option, f"{path!r} is cut off: a PEM block in it has no end")
    if b"CERTIFICATE-----" not in data:
        held = "a key and no certificate" if b"PRIVATE KEY-----" in data else "no PEM certificate"
        raise ConfigError(option, f"{path!r} holds {held}")
    try:
        return tuple(x509.load_pem_x509_certificates(data))
    except UNREADABLE as exc:
        raise ConfigError(option, f"{path!r} holds a broken certificate") from exc


def _is_cut(data: bytes) -> bool:
    """Tell whether a last block is half written; the parser would pass over it."""
    end = 0
    for block in PEM_BLOCK.finditer(data):
        end = block.end()
    rest = data[end:].strip()
    return PEM_BEGIN in rest or (rest != b"" and PEM_BEGIN.startswith(rest))


def _read(option: str, path: str) -> bytes:
    try:
        is_regular = stat.S_ISREG(Path(path).stat().st_mode)
        # A pipe would hold up the whole program until somebody writes into it.
        data = _head(path) if is_regular else b""
    except (OSError, ValueError) as exc:  # ValueError: a null byte in the path
        why = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise ConfigError(option, f"cannot read {path!r}: {why.lower()}") from exc
    if not is_regular:
        raise ConfigError(option, f"{path!r} is not a regular file")
    if len(data) > FILE_LIMIT:
        raise ConfigError(option, f"{path!r} is larger than {FILE_LIMIT >> 20} MiB")
    return data


def _head(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(FILE_LIMIT + 1)


def _read_key(path: str) -> Key:
    data = _read("key", path)
    if b"PRIVATE KEY-----" not in data:
        held = "a certificate and no key" if b"CERTIFICATE-----" in data else "no PEM key"
        raise ConfigError("key", f"{path!r} holds {held}")
    try:
        private = serialization.load_pem_private_key(data, None)
    except TypeError:
        raise ConfigError(
            "key",
            f"{path!r} is encrypted, and nobody is there to type its password; decrypt it with"
            " `openssl pkey -in FILE -out NEW`",
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        # The cause stays out: it is made from the bytes of the key.
        raise ConfigError("key", f"{path!r} holds a broken key") from None
    is_curve_known = not isinstance(private, ec.EllipticCurvePrivateKey) or isinstance(
        private.curve, CURVES
    )
    if not isinstance(private, Key) or not is_curve_known:
        raise ConfigError("key", f"{path!r} holds a kind of key that TLS cannot sign with")
    return private


def _check_match(crt: str, key: str, chain: tuple[x509.Certificate, ...], private: Key) -> None:
    """Refuse a key that is not that of the first certificate."""
    public = _plain(private.public_key())
    places = [place for place, one in enumerate(chain, 1) if _public_key(one) == public]
    if not places:
        raise ConfigError("key", f"{key!r} does not belong to the certificate in {crt!r}")
    if 1 not in places:
        raise ConfigError(
            "crt", f"{crt!r} has the server's own certificate in place {places[0]}; put it first"
        )


def _public_key(certificate: x509.Certificate) -> bytes:
    try:
        return _plain(certificate.public_key())
    except (ValueError, UnsupportedAlgorithm):
        return b""  # of a kind that no key of ours can match


def _plain(key: PublicKeyTypes) -> bytes:
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.DER, spki)


def _check_dates(crt: str, leaf: x509.Certificate, now: datetime) -> None:
    start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if now > end:
        raise ConfigError("crt", f"{crt!r} expired {date(end)}, {ago(now - end)} ago; renew it")
    if now < start:
        raise ConfigError(
            "crt",
            f"{crt!r} is valid from {date(start)} on, and it is {date(now)} by this machine's"
            " clock; is the clock right?",
        )


def date(moment: datetime) -> str:
    """Return a point in time for people, to the minute."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def ago(span: timedelta) -> str:
    """Return a length of time for people, in its largest whole unit."""
    seconds = max(int(span.total_seconds()), 0)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"


def names_of(certificate: x509.Certificate) -> list[str]:
    """Return the DNS names and addresses that a certificate is for; may be empty."""
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, *UNREADABLE):
        return []
    names = alternative.value.get_values_for_type(x509.DNSName)
    return names + [str(a) for a in alternative.value.get_values_for_type(x509.IPAddress)]


class Files:
    """Notices that files have been written, replaced or removed."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = tuple(paths)
        self._noted = self._look()

    def has_changed(self) -> bool:
        """Tell whether any file is not what it was at the last `note`."""
        return self._look() != self._noted

    def note(self) -> None:
        """Remember the files; call it before reading, so that no later write goes unseen."""
        self._noted = self._look()

    def _look(self) -> list[tuple[int, int, int] | None]:
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = Path(path).stat()
            except (OSError, ValueError):
                found.append(None)
            else:
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return found
