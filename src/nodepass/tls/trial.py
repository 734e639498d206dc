"""A handshake in memory with a certificate, before anybody depends on it.

What looks sound may still be of no use: a key of a kind that TLS 1.3 does not sign with as
it is loaded, a certificate that is for clients only, a chain with a hole in it. OpenSSL says
so in the first handshake, and to the one at the other end: so the first one is held here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from OpenSSL import SSL, crypto

from . import _openssl
from .codec import reason_of

__all__ = ["doubt_of", "failure_of"]

ROUNDS: Final = 4
"""Turns of either side; TLS 1.3 needs two."""
ROOM: Final = 1 << 18
"""Bytes taken from one side at once: more than any chain that is let in."""
WEAK: Final = frozenset({"md5", "sha1"})
"""Hashes in a signature that no client takes."""
PSS: Final = x509.ObjectIdentifier("1.2.840.113549.1.1.10")
NO_ISSUER: Final = frozenset({2, 20, 21})
"""X509_V_ERR_* of a certificate whose issuer is not to be found."""


def failure_of(
    server: SSL.Context, client: SSL.Context, chain: Sequence[x509.Certificate]
) -> str | None:
    """Return why no client at all can shake hands with a server, or None."""
    failures = _shake(SSL.Connection(server, None), SSL.Connection(client, None))
    if not failures:
        return None
    if chain[0].public_key_algorithm_oid == PSS:
        return "its certificate is for RSA-PSS only; take a key of the kind RSA, EC or Ed25519"
    return failures[0]


def doubt_of(
    server: SSL.Context, client: SSL.Context, chain: Sequence[x509.Certificate], now: datetime
) -> str | None:
    """Return why a client that verifies may refuse a server, or None.

    Args:
        client: fresh; what is asked of the server is set here.
        chain: what the server shows, its own certificate first; the last one is trusted.
        now: the time to verify for.
    """
    leaf = chain[0]
    try:
        hashed = leaf.signature_hash_algorithm
    except UnsupportedAlgorithm:
        hashed = None
    if leaf.issuer != leaf.subject and hashed is not None and hashed.name in WEAK:
        return f"it is signed with {hashed.name.upper()}"
    store = client.get_cert_store()
    if store is None:
        return None
    store.add_cert(crypto.X509.from_cryptography(chain[-1]))
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    store.set_time(now)
    client.set_verify(SSL.VERIFY_PEER)
    verifier = SSL.Connection(client, None)
    if not _shake(SSL.Connection(server, None), verifier):
        return None
    try:
        failure = _openssl.verify_failure(verifier)
    except _openssl.Moved:
        return None
    if failure is None:
        return None
    if failure[0] in NO_ISSUER:
        return "a certificate between the server's own and the last one in the file is missing"
    return failure[1]


def _shake(server: SSL.Connection, client: SSL.Connection) -> list[str]:
    """Do a handshake; return what went wrong, the server's reasons first."""
    server.set_accept_state()
    client.set_connect_state()
    reasons: list[tuple[bool, str]] = []
    for _ in range(ROUNDS):
        for here, there in ((client, server), (server, client)):
            try:
                here.do_handshake()
            except SSL.WantReadError:
                pass
            except SSL.Error as exc:
                reasons.append((here is client, reason_of(exc)))
            with contextlib.suppress(SSL.WantReadError):
                there.bio_write(here.bio_read(ROOM))
        if reasons:
            break
    return [reason for _, reason in sorted(reasons)]
