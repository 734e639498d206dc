"""contexts: options that cannot be used, and what is said of them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from OpenSSL import crypto
from tests.kit.authority import Authority, Issued, self_signed
from tests.kit.pump import (
    NAME,
    Outcome,
    server_tls,
    shake,
)
from tests.kit.tls_contexts import exchange

from nodepass.errors import ConfigError, TlsError
from nodepass.observe.log import Log
from nodepass.tls import _openssl
from nodepass.tls.contexts import ClientTls, ServerTls


def test_bad_files(issued: Issued, authority: Authority) -> None:
    with pytest.raises(ConfigError, match=r"^key: .* does not belong to"):
        server_tls(Issued(issued.crt, authority.issue("x", label="other").key))


def test_weak_key(tmp_path: Path) -> None:
    """What OpenSSL finds too weak is an error of the option, at start as on reload."""
    files = self_signed(tmp_path, NAME, key=rsa.generate_private_key(65537, 1024))
    with pytest.raises(ConfigError, match=r"^crt: OpenSSL refuses it: ee key too small$"):
        server_tls(files)


def test_curve_that_tls_does_not_know(tmp_path: Path) -> None:
    files = self_signed(tmp_path, NAME, key=ec.generate_private_key(ec.SECP256K1()))
    with pytest.raises(ConfigError, match=r"^key: .* a kind of key that TLS cannot sign with$"):
        server_tls(files)


def by_openssl(folder: Path, *words: str, ext: str = "subjectAltName=DNS:x.test") -> Issued:
    """Return a self-signed certificate as the openssl command makes it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command here")
    files = Issued(str(folder / "c.pem"), str(folder / "k.pem"))
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=x", "-addext", ext, *words]
    subprocess.run(
        [*command, "-keyout", files.key, "-out", files.crt], check=True, capture_output=True
    )
    return files


def server_today(files: Issued) -> ServerTls:
    return ServerTls(2, files.crt, files.key, Log("server"), None)


def shake_in_mode_1(server: ServerTls) -> Outcome:
    client = ClientTls(NAME, None, None)
    return shake(server.accept(is_native=True), client.connect(1, is_native=True))


def test_c08_key_that_tls_13_cannot_use_as_it_is_loaded(
    tmp_path: Path, lines: Callable[[], list[str]]
) -> None:
    """At the start it is refused by name; at a reload the old one stays."""
    files = by_openssl(tmp_path, "-newkey", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048")
    with pytest.raises(ConfigError, match=r"^key: '.*k\.pem' is of no use .* RSA-PSS") as caught:
        server_today(files)
    assert "\n" not in str(caught.value)
    (tmp_path / "good").mkdir()
    good = by_openssl(tmp_path / "good", "-newkey", "ed25519")
    server = server_today(good)
    shown = server.fingerprint
    shutil.copy(files.crt, good.crt)
    shutil.copy(files.key, good.key)
    server.reload(force=True)
    assert server.fingerprint == shown
    assert any("RSA-PSS" in line for line in lines())
    exchange(shake_in_mode_1(server))


@pytest.mark.parametrize("curve", ["secp224r1", "secp256k1", "brainpoolP256r1"])
def test_c08_curve_that_tls_13_has_not(curve: str, tmp_path: Path) -> None:
    files = by_openssl(tmp_path, "-newkey", "ec", "-pkeyopt", f"ec_paramgen_curve:{curve}")
    with pytest.raises(ConfigError, match=r"^key: '.*k\.pem' "):
        server_today(files)


@pytest.mark.parametrize("kind", ["ed25519", "ed448", "rsa:2048"])
def test_c08_kinds_that_are_fine(
    kind: str, tmp_path: Path, lines: Callable[[], list[str]]
) -> None:
    exchange(shake_in_mode_1(server_today(by_openssl(tmp_path, "-newkey", kind))))
    assert not any("refuse" in line for line in lines())


def test_c08_certificate_for_clients_only(tmp_path: Path, lines: Callable[[], list[str]]) -> None:
    words = ("-newkey", "rsa:2048", "-addext", "extendedKeyUsage=clientAuth")
    server_today(by_openssl(tmp_path, *words))
    assert any("may refuse the certificate" in line and "purpose" in line for line in lines())


@pytest.mark.parametrize("text", ["", "no PEM here", None])
def test_bad_ca(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"^ca: "):
        ClientTls(NAME, str(path), None)


def test_ca_that_openssl_refuses(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise crypto.Error([("asn1", "", "wrong tag")])

    monkeypatch.setattr(crypto.X509, "from_cryptography", refuse)
    with pytest.raises(ConfigError, match=r"^ca: OpenSSL refuses it: wrong tag$"):
        ClientTls(NAME, authority.ca, None)


@pytest.mark.parametrize("name", ["a..b", "x" * 64, "a\0b", "ab." * 90 + "c"])
def test_bad_name(name: str) -> None:
    says = "cannot be a name in a certificate"
    with pytest.raises(ConfigError, match=rf"^sni: .* {says}$"):
        ClientTls(NAME, None, name)
    says += "; give the server's as sni=NAME"
    client = ClientTls(name, None, None)
    client.connect(1, is_native=True)
    with pytest.raises(TlsError, match=rf"^'.*' {says}$"):
        client.connect(2, is_native=True)


def test_names_that_cannot_be_checked(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without OpenSSL's check there is no connection, rather than one that checks less."""

    def moved(*_: object) -> None:
        raise _openssl.Moved("SSL_get0_param is not where it was")

    monkeypatch.setattr(_openssl, "require_name", moved)
    client = ClientTls(NAME, authority.ca, None)
    with pytest.raises(TlsError, match="cannot check the server's name: SSL_get0_param is not"):
        client.connect(2, is_native=True)
    client.connect(1, is_native=True)
    ClientTls(NAME, authority.ca, NAME).connect(1, is_native=True)
