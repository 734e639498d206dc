"""TLS contexts of both ends: who shows which certificate, who checks it, how it is renewed.

Owns the contexts; each connection belongs to whoever asked for it. TLS 1.3 only, and nothing
in a handshake calls back into Python where the engine is native. Contexts are never changed
once they have made a connection, only replaced: connections that exist keep what they have.

Called by `server`, `client` and what they are made of, and imported by them only when TLS is
wanted: OpenSSL costs a start 30 ms and 10 MB.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import platform
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from OpenSSL import SSL, crypto

from nodepass.config.hostname import readable, tls_name
from nodepass.config.password import is_exposed
from nodepass.errors import ConfigError, TlsError
from nodepass.observe.log import Log

from . import _openssl
from .certificate import (
    UNREADABLE,
    Certificate,
    Files,
    date,
    fingerprint,
    load,
    make_self_signed,
    names_of,
    read_certificates,
)
from .codec import reason_of
from .explain import Asked, explain
from .trial import doubt_of, failure_of

__all__ = ["ALPN", "ClientTls", "ServerTls", "check_alpn", "explain", "fingerprint_of"]

ALPN: Final = b"nodepass/2"
"""What native connections speak inside TLS."""
EXPIRY_WARNING: Final = timedelta(days=30)
"""How long before its end a certificate is complained about, or for the last third of a short
life: ACME clients renew before."""
EXPIRY_PAUSE: Final = timedelta(days=1)
"""Between two complaints about one certificate."""

FAST_AES: Final = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
SLOW_AES: Final = b"TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
"""All three suites in the order of their speed, with AES instructions and without."""
PRIORITIZE_CHACHA: Final = 1 << 21
"""SSL_OP_PRIORITIZE_CHACHA: follow a client that has no AES instructions. pyOpenSSL has no
name for it; the number is that of every OpenSSL since 1.1.1."""


@functools.cache
def is_aes_fast() -> bool:
    """Tell whether this machine has instructions for AES: without them ChaCha20 is faster."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return platform.machine().lower() in ("x86_64", "amd64", "arm64", "aarch64")
    for line in text.splitlines():
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, ARM
            return "aes" in words.split()
    return False


def _context(method: int) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(FAST_AES if is_aes_fast() else SLOW_AES)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    # OpenSSL still sends two tickets, since pyOpenSSL cannot set their number; with this they
    # are 79 bytes each instead of 255, hold nothing, and cost no encryption.
    context.set_options(SSL.OP_NO_TICKET)
    # Idle links are what there is most of: 33 KiB each instead of 61, once they have been used.
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    return context


def _utc_now() -> datetime:
    return datetime.now(UTC)


class _Contexts(NamedTuple):
    native: SSL.Context
    seed: SSL.Context


class ServerTls:
    """The server's certificate and the connections that show it.

    Args:
        mode: 1 = a certificate of our own making, 2 = from files.
        crt: path of the PEM chain, for mode 2.
        key: path of its PEM key, for mode 2.
        log: where reloads and complaints go.
        alpn_selector: the engine's, None = choose in Python.
        now: the clock, with a time zone.

    Raises:
        ConfigError: the files cannot be used.
    """

    def __init__(
        self,
        mode: int,
        crt: str | None,
        key: str | None,
        log: Log,
        alpn_selector: int | None,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        assert mode == 1 or (mode == 2 and crt and key)
        self.mode = mode
        """As the greeting has it."""
        self._paths = (crt or "", key or "")
        self._log = log
        self._alpn_selector = alpn_selector
        self._now = now
        self._files = Files(self._paths)
        self._is_stale = False
        self._complained: set[str] = set()
        self._expiry_told: tuple[str, datetime] | None = None
        self._certificate = make_self_signed(now()) if mode == 1 else load(*self._paths, now())
        self._contexts = self._build(self._certificate)
        self._complain()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate that new connections show."""
        return self._certificate.fingerprint

    def accept(self, *, is_native: bool) -> SSL.Connection:
        """Return a connection on memory BIOs that is about to be greeted by a client.

        Args:
            is_native: False for data links of the seed dialect, which know no ALPN.
        """
        context = self._contexts.native if is_native else self._contexts.seed
        connection = SSL.Connection(context, None)
        connection.set_accept_state()
        return connection

    def reload(self, *, force: bool = False) -> None:
        """Take over files that have changed; what is wrong with them is logged.

        Never raises: files that cannot be used, half-written ones above all, leave the old
        certificate in its place until the next look.

        Args:
            force: read them even if they look untouched.
        """
        if self.mode == 1:
            return
        if force or self._is_stale or self._files.has_changed():
            self._files.note()
            try:
                certificate = load(*self._paths, self._now())
                contexts = self._build(certificate)
            except ConfigError as exc:
                self._is_stale = True
                _keep_old(self._log, "certificate", exc, is_asked=force)
            else:
                self._is_stale = False
                self._certificate, self._contexts = certificate, contexts
                self._log.info(
                    "certificate reloaded",
                    fingerprint=certificate.fingerprint,
                    expires=date(certificate.expires),
                )
        self._complain()

    def _build(self, certificate: Certificate) -> _Contexts:
        native, seed = (_context(SSL.TLS_SERVER_METHOD) for _ in range(2))
        for context in (native, seed):
            context.set_options(SSL.OP_CIPHER_SERVER_PREFERENCE | PRIORITIZE_CHACHA)
            try:
                context.use_certificate(certificate.chain[0])
                for intermediate in certificate.chain[1:]:
                    context.add_extra_chain_cert(intermediate)
                context.use_privatekey(certificate.key)
            except (SSL.Error, crypto.Error) as exc:
                raise ConfigError("crt", f"OpenSSL refuses it: {reason_of(exc)}") from exc
        if self._alpn_selector is None:
            # Nothing in common is no failure here: an exception would haunt the context's other
            # connections. `check_alpn` refuses what comes of it.
            native.set_alpn_select_callback(
                lambda _, offered: ALPN if ALPN in offered else SSL.NO_OVERLAPPING_PROTOCOLS
            )
        else:
            _openssl.set_alpn_selector(native, self._alpn_selector)
        why = failure_of(native, _context(SSL.TLS_CLIENT_METHOD), certificate.chain)
        if why is not None:
            raise ConfigError("key", f"{self._paths[1]!r} is of no use for TLS 1.3: {why}")
        return _Contexts(native, seed)

    def _complain(self) -> None:
        """Warn of what will trouble clients, each thing once, the end of life once a day."""
        if self.mode == 1:
            return
        crt, key = self._paths
        if is_exposed(key):
            self._warn_once("every user of this machine can read the key; chmod 600 it", key=key)
        leaf = self._certificate.chain[0]
        if not names_of(leaf):
            self._warn_once("the certificate has no subjectAltName; clients refuse it", crt=crt)
        now, end = self._now(), self._certificate.expires
        if now < end:
            context, fresh = self._contexts.native, _context(SSL.TLS_CLIENT_METHOD)
            why = doubt_of(context, fresh, self._certificate.chain, now)
            if why is not None:
                text = "clients that verify may refuse the certificate"
                self._warn_once(text, crt=crt, why=why)
        if end - now > min(EXPIRY_WARNING, (end - leaf.not_valid_before_utc) / 3):
            return
        level = "warn" if now < end else "error"
        if self._expiry_told is not None:
            told_level, told = self._expiry_told
            if told_level == level and now - told < EXPIRY_PAUSE:
                return
        self._expiry_told = (level, now)
        if level == "warn":
            self._log.warn("the certificate is about to expire; renew it", expires=date(end))
        else:
            self._log.error("the certificate has expired; clients refuse it", expired=date(end))

    def _warn_once(self, message: str, **fields: object) -> None:
        if message not in self._complained:
            self._complained.add(message)
            self._log.warn(message, **fields)


class ClientTls:
    """What a client asks of the server's certificate, and the connections that ask.

    Args:
        host: of the tunnel address; name, or address without brackets.
        ca: path of the PEM trust anchors; None = those of the system.
        sni: the server's name where it is not `host`.
        log: where reloads go.

    Raises:
        ConfigError: "ca" or "sni" cannot be used. A host that no certificate can name is
            fine until mode 2 is wanted.
    """

    def __init__(self, host: str, ca: str | None, sni: str | None, log: Log | None = None) -> None:
        self._asked = Asked(sni or host, ca)
        self._log = Log("tls") if log is None else log
        self._files = Files([ca] if ca else [])
        self._is_stale = False
        self._unverified = _context(SSL.TLS_CLIENT_METHOD)
        if sni:
            try:
                self._ask(SSL.Connection(self._unverified, None))
            except _openssl.Moved:
                pass  # mode 1 does without, mode 2 says so
            except ValueError as exc:
                raise ConfigError(
                    "sni", f"{readable(sni)!r} cannot be a name in a certificate"
                ) from exc
        self._verified = None if ca is None else self._build()
        """None = to be made when it is wanted: reading the system's anchors takes a while."""

    def require_verification(self) -> None:
        """Raise TlsError if the installed libraries cannot check a name at all."""
        try:
            _openssl.require_name(SSL.Connection(self._unverified, None), "localhost")
        except _openssl.Moved as exc:
            raise TlsError(f"this side cannot check the server's name: {exc}") from exc

    def connect(self, mode: int, *, is_native: bool) -> SSL.Connection:
        """Return a connection on memory BIOs that is about to greet the server.

        Args:
            mode: of the server's greeting: 1 = verify nothing, 2 = verify chain and name.
            is_native: False for data links of the seed dialect, which know no ALPN.

        Raises:
            TlsError: mode 2, and the server's name cannot be checked.
        """
        assert mode in (1, 2)
        if mode == 1:
            connection = SSL.Connection(self._unverified, None)
        else:
            if self._verified is None:
                self._verified = self._build()
            connection = SSL.Connection(self._verified, None)
            try:
                self._ask(connection)
            except _openssl.Moved as exc:
                raise TlsError(f"this side cannot check the server's name: {exc}") from exc
            except ValueError as exc:
                name = readable(self._asked.name)
                says = f"{name!r} cannot be a name in a certificate; give the server's as sni=NAME"
                raise TlsError(says) from exc
        if is_native:
            connection.set_alpn_protos([ALPN])
        connection.set_connect_state()
        return connection

    def _ask(self, connection: SSL.Connection) -> None:
        """Let OpenSSL check the server's name, and tell the server which one it is to show.

        Raises:
            Moved: that cannot be had here.
            ValueError: it is no name.
        """
        name = self._asked.name
        server_name = _server_name(name)
        _openssl.require_name(connection, name)
        connection.set_app_data(self._asked)
        if server_name:
            connection.set_tlsext_host_name(server_name)

    def reload(self, *, force: bool = False) -> None:
        """Read the trust anchors again if they have changed; never raises, see `ServerTls`."""
        if self._asked.ca is None:
            if force:
                self._verified = None
            return
        if not (force or self._is_stale or self._files.has_changed()):
            return
        self._files.note()
        try:
            self._verified = self._build()
        except ConfigError as exc:
            self._is_stale = True
            _keep_old(self._log, "ca", exc, is_asked=force)
        else:
            self._is_stale = False
            self._log.info("ca reloaded", ca=self._asked.ca)

    def _build(self) -> SSL.Context:
        context = _context(SSL.TLS_CLIENT_METHOD)
        context.set_verify(SSL.VERIFY_PEER)  # OpenSSL's own verdict, no callback
        ca = self._asked.ca
        if ca is None:
            context.set_default_verify_paths()
            return context
        store = context.get_cert_store()
        assert store is not None
        # Whoever is named is trusted, be it a root, an intermediate or the server itself.
        store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
        try:
            for anchor in read_certificates("ca", ca):
                store.add_cert(crypto.X509.from_cryptography(anchor))
        except crypto.Error as exc:
            raise ConfigError("ca", f"OpenSSL refuses it: {reason_of(exc)}") from exc
        return context


def _server_name(host: str) -> bytes:
    """Return a name as TLS sends it, nothing for an address (RFC 6066, section 3).

    Raises:
        ValueError: it is no name.
    """
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host.partition("%")[0])
        return b""
    return tls_name(host)


def _keep_old(log: Log, what: str, exc: ConfigError, *, is_asked: bool) -> None:
    message = f"{what} not reloaded, the old one stays in use"
    if is_asked:  # somebody is waiting to read what has become of it
        log.error(message, why=str(exc))
    else:
        log.repeated("error", f"{what}-reload", message, why=str(exc))


def fingerprint_of(connection: SSL.Connection) -> str:
    """Return the fingerprint of the peer's certificate.

    Raises:
        TlsError: it has shown none, or nothing that can be read.
    """
    try:
        certificate = connection.get_peer_certificate(as_cryptography=True)
    except UNREADABLE as exc:
        raise TlsError(f"the other side's certificate is broken: {exc}") from exc
    if certificate is None:
        raise TlsError("the other side has shown no certificate")
    return fingerprint(certificate)


def check_alpn(connection: SSL.Connection) -> None:
    """Make sure that the other side means this protocol.

    Raises:
        TlsError: it does not.
    """
    if connection.get_alpn_proto_negotiated() != ALPN:
        raise TlsError(
            "the other side is another program: it does not speak nodepass/2 inside TLS"
        )
