"""Why a TLS handshake failed, in words: who broke it, and what to do about it.

OpenSSL names its reasons by numbers that have been the same since its release 1.1 and by
texts that change; here is what each means for the two ends of a tunnel. Called by `contexts`.

What can be had: of a certificate that was refused, the whole chain as the peer sent it (from
the Connection, though not its `get_peer_certificate`, which holds accepted ones only). Of a
peer that refuses ours no more than its alert: many stand for several faults at once, and Go
programs send "bad certificate" for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from OpenSSL import SSL

from nodepass.config.hostname import readable

from . import _openssl
from .certificate import UNREADABLE, ago, date, names_of

LIBRARY_SHIFT: Final = 23
"""A packed error code is library << 23 | reason (OpenSSL's err.h)."""
SSL_LIBRARY: Final = 20
ALERT_BASE: Final = 1000
"""The reason of an alert that came in is 1000 + its number (OpenSSL's ssl.h)."""
VERIFY_FAILED: Final = 134
"""SSL_R_CERTIFICATE_VERIFY_FAILED: `_openssl.verify_failure` knows more."""

REASONS: Final = {
    101: "the {peer} has no key exchange in common with us",
    118: "the {peer} accepts no kind of signature that our certificate can give",
    155: "the {peer} does not speak TLS but HTTP, as to a proxy",
    156: "the {peer} does not speak TLS but HTTP",
    193: "the {peer} has no cipher in common with us",
    198: "the {peer} does not speak TLS",
    235: "the {peer} is another program: it does not offer nodepass/2 inside TLS",
    258: "the {peer} does not speak TLS 1.3, only something older",
    266: "the {peer} does not speak TLS 1.3, only something older",
    267: "the {peer} does not speak TLS",
    295: "the {peer} has no key exchange in common with us",
    376: "the {peer} accepts no kind of signature that our certificate can give",
    396: "the {peer} does not speak TLS 1.3, only something older",
    410: "the {peer} has no key exchange in common with us",
}
"""SSL_R_* (OpenSSL's sslerr.h) of faults that this side has noticed."""

ALERTS: Final = {
    0: "the {peer} gave up in the middle",
    40: "the {peer} found no cipher or key exchange in common with us",
    42: "the {peer} refuses our certificate: it does not trust it, or the name is wrong",
    43: "the {peer} cannot use the kind of certificate that we have",
    44: "the {peer} says that our certificate has been revoked",
    45: "the {peer} says that our certificate has expired, or its clock is wrong",
    46: "the {peer} refuses our certificate and does not say why",
    48: "the {peer} does not trust our certificate: it knows no authority that has signed it",
    49: "the {peer} does not admit us",
    70: "the {peer} does not speak TLS 1.3, only something older",
    71: "the {peer} finds our ciphers too weak",
    80: "the {peer} has an internal error",
    90: "the {peer} gave up in the middle",
    109: "the {peer} is another program: it misses something in our TLS",
    112: "the {peer} has no certificate for the name that we asked for",
    116: "the {peer} wants a certificate from us, which no nodepass has",
    120: "the {peer} is another program: it does not speak nodepass/2 inside TLS",
}
"""Alerts (RFC 8446, section 6.2) that the other side has sent."""

EXPIRED: Final = 10
NOT_YET_VALID: Final = 9
SELF_SIGNED: Final = 18
UNTRUSTED: Final = (2, 18, 19, 20, 21, 27)
"""No issuer, self-signed, unknown root, no local issuer, no signature, not trusted."""
WRONG_PURPOSE: Final = 26
WRONG_NAME: Final = (62, 64)
"""Host name, IP address."""

SHOWN_NAMES: Final = 5
SHOWN_LETTERS: Final = 80
"""Of one name: a stranger's certificate must not fill the log."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client wants of the server's certificate; its connection's app data."""

    name: str
    """Host name, or address without brackets."""
    ca: str | None
    """Path of the trust anchors, None = those of the system."""


def explain(connection: SSL.Connection, detail: int, is_server: bool) -> str:
    """Say in one clause why a handshake failed.

    Args:
        connection: whose handshake it was; one of `contexts`.
        detail: OpenSSL's packed error code, 0 = unknown.
        is_server: whether this side is the server.
    """
    peer = "client" if is_server else "server"
    is_ssl = detail >> LIBRARY_SHIFT == SSL_LIBRARY
    reason = detail - (SSL_LIBRARY << LIBRARY_SHIFT) if is_ssl else 0
    if connection.get_verify_mode() & SSL.VERIFY_PEER and (reason == VERIFY_FAILED or not detail):
        failure = _verify_failure(connection)
        if failure is not None:
            try:
                return _refusal(connection, *failure)
            except UNREADABLE:  # OpenSSL could read the certificate, cryptography cannot
                return f"the server's certificate is refused: {failure[1]}"
    known = REASONS.get(reason) or ALERTS.get(reason - ALERT_BASE)
    if known is not None:
        return known.format(peer=peer)
    if reason >= ALERT_BASE:
        words = _describe(detail).rpartition("alert ")[2]
        return f"the {peer} broke off: {words or f'alert {reason - ALERT_BASE}'}"
    return f"TLS with the {peer} failed: {_describe(detail) or 'no reason is known'}"


def _refusal(connection: SSL.Connection, code: int, text: str) -> str:
    """Say why this side has refused the server's certificate."""
    chain = connection.get_peer_cert_chain(as_cryptography=True) or ()
    asked = connection.get_app_data()
    if not isinstance(asked, Asked):
        asked = Asked("the name that was asked for", None)
    if code in WRONG_NAME:
        return _wrong_name(chain, asked.name)
    if code == EXPIRED:
        return _expired(chain)
    if code == NOT_YET_VALID:
        return _not_yet_valid(chain)
    if code in UNTRUSTED:
        return _untrusted(chain, asked.ca, is_self_signed=code == SELF_SIGNED)
    if code == WRONG_PURPOSE:
        return "the server's certificate is not made for servers (its extendedKeyUsage)"
    return f"the server's certificate is refused: {text}"


def _wrong_name(chain: Sequence[x509.Certificate], name: str) -> str:
    name = readable(name)  # the user's own; a stranger's could look like it, so those stay ASCII
    names = names_of(chain[0]) if chain else []
    if not names:
        return f"the server's certificate is not for {name}; it names nobody that can be checked"
    more = len(names) - SHOWN_NAMES
    shown = ", ".join(_cut(one) for one in names[:SHOWN_NAMES])
    shown += f" and {more} more" if more > 0 else ""
    return (
        f"the server's certificate is for {shown}, not for {name}; dial one of its names, or"
        " give it as sni=NAME"
    )


def _expired(chain: Sequence[x509.Certificate]) -> str:
    now = datetime.now(UTC)
    clock = f"renew it, or set this machine's clock (now {date(now)})"
    for place, certificate in enumerate(chain):
        end = certificate.not_valid_after_utc
        if end < now:
            whose = _owner(place)
            return f"{whose} expired {date(end)}, {ago(now - end)} ago; {clock}"
    return f"the authority of the server's certificate has expired; {clock}"


def _not_yet_valid(chain: Sequence[x509.Certificate]) -> str:
    now = datetime.now(UTC)
    clock = f"is this machine's clock right (now {date(now)})?"
    for place, certificate in enumerate(chain):
        start = certificate.not_valid_before_utc
        if start > now:
            return f"{_owner(place)} is valid from {date(start)} on; {clock}"
    return f"the authority of the server's certificate is not valid yet; {clock}"


def _owner(place: int) -> str:
    """Name a certificate by its place in the chain that the server sent."""
    if place == 0:
        return "the server's certificate"
    return "a certificate between the server's and its authority"


def _untrusted(chain: Sequence[x509.Certificate], ca: str | None, *, is_self_signed: bool) -> str:
    anchors = f"what ca={ca!r} trusts" if ca else "what this machine trusts"
    if is_self_signed:
        return (
            f"the server's certificate is self-signed and not among {anchors}; if it is the"
            " right one, give it as ca=FILE"
        )
    signer = f" ({_cut(chain[-1].issuer.rfc4514_string())})" if chain else ""
    return (
        f"the server's certificate comes from an authority{signer} that is not among {anchors};"
        " give that authority as ca=FILE, or if only a link is missing, the whole chain as the"
        " server's crt=FILE"
    )


def _cut(name: str) -> str:
    return name if len(name) <= SHOWN_LETTERS else name[:SHOWN_LETTERS] + "…"


def _verify_failure(connection: SSL.Connection) -> tuple[int, str] | None:
    try:
        return _openssl.verify_failure(connection)
    except _openssl.Moved:
        return None  # said at the first use of TLS


def _describe(detail: int) -> str:
    try:
        return _openssl.describe(detail)
    except _openssl.Moved:
        return ""
