"""tls: who is believed, what is agreed on, and how certificates are renewed.

Handshakes run in memory, byte strings carried from one Connection to the other; the other side is
also played by Python's own ssl module and by OpenSSL's command line, which are other copies.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from OpenSSL import SSL, crypto
from tests.kit.authority import Authority, Issued, self_signed
from tests.kit.pump import (
    FFI,
    NAME,
    OLD,
    ROUNDS,
    Clock,
    Outcome,
    carry,
    server_tls,
    shake,
    step,
    verified,
)

from nodepass.errors import ConfigError, TlsError
from nodepass.observe.log import Log, setup
from nodepass.tls import _openssl, contexts
from nodepass.tls.certificate import fingerprint, load, read_certificates
from nodepass.tls.codec import Records
from nodepass.tls.contexts import ALPN, ClientTls, ServerTls, check_alpn, explain, fingerprint_of

DAY = timedelta(days=1)
PATIENCE: Final = 20.0
"""Seconds that another program has for a handshake."""


# --- the rig -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Issued:
    return authority.issue(NAME, "*.wild.example.org", "192.0.2.1", "2001:db8::1")


@pytest.fixture
def lines() -> Iterator[Callable[[], list[str]]]:
    """Return a function that gives the log lines since it was last called."""
    stream = io.StringIO()
    root = Log("x")._logger.parent
    assert root is not None
    before = root.handlers[:], root.level, root.propagate
    setup("text", stream)

    def take() -> list[str]:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return [line.split("  ", 1)[1] for line in text.splitlines()]

    yield take
    root.handlers, root.level, root.propagate = before
    root.manager._clear_cache()  # type: ignore[attr-defined]


# --- who is believed -----------------------------------------------------------------------------


def exchange(outcome: Outcome) -> None:
    """Make sure that words pass in both directions, and that both ends close."""
    assert outcome.is_good, outcome
    server, client = Records(outcome.server), Records(outcome.client)
    assert server.open(client.seal(b"hello")) == b"hello"
    assert client.open(server.seal(b"x" * 100_000)) == b"x" * 100_000
    assert client.binding() == server.binding()
    assert (server.open(client.end()), server.has_ended) == (b"", True)
    assert (client.open(server.end()), client.has_ended) == (b"", True)


@pytest.mark.parametrize("is_native", [True, False])
def test_mode_1(is_native: bool) -> None:
    server = server_tls()
    client = ClientTls("192.0.2.9", None, None)
    outcome = shake(server.accept(is_native=is_native), client.connect(1, is_native=is_native))
    exchange(outcome)
    assert fingerprint_of(outcome.client) == server.fingerprint
    if is_native:
        check_alpn(outcome.client)
        check_alpn(outcome.server)
    else:
        assert outcome.client.get_alpn_proto_negotiated() == b""


@pytest.mark.parametrize(("is_native", "alpn"), [(True, ALPN), (False, b"")])
def test_seed_connections_know_no_alpn(is_native: bool, alpn: bytes) -> None:
    """Neither side says a word of it that the other could stumble over."""
    client = ClientTls(NAME, None, None)
    outcome = shake(server_tls().accept(is_native=is_native), client.connect(1, is_native=True))
    assert outcome.client.get_alpn_proto_negotiated() == alpn
    outcome = shake(server_tls().accept(is_native=True), client.connect(1, is_native=is_native))
    assert outcome.client.get_alpn_proto_negotiated() == alpn


def test_mode_1_takes_any_certificate(authority: Authority) -> None:
    files = authority.issue("else.where", label="any")
    server = server_tls(files).accept(is_native=True)
    exchange(shake(server, ClientTls(NAME, None, None).connect(1, is_native=True)))


@pytest.mark.parametrize(
    "host",
    [NAME, NAME.upper(), NAME + ".", "b.wild.example.org", "192.0.2.1", "2001:db8::1",
     "2001:DB8:0::1"],
)  # fmt: skip
def test_mode_2(host: str, authority: Authority, issued: Issued) -> None:
    outcome = verified(issued, authority.ca, host)
    exchange(outcome)
    assert fingerprint_of(outcome.client) == load(issued.crt, issued.key, Clock()()).fingerprint


@pytest.mark.parametrize("is_native", [True, False])
def test_mode_2_of_both_dialects(is_native: bool, authority: Authority, issued: Issued) -> None:
    server = server_tls(issued).accept(is_native=is_native)
    client = ClientTls(NAME, authority.ca, None).connect(2, is_native=is_native)
    exchange(shake(server, client))


def test_sni_stands_for_the_host(authority: Authority, issued: Issued) -> None:
    outcome = verified(issued, authority.ca, "10.0.0.1", NAME)
    exchange(outcome)
    assert outcome.server.get_servername() == NAME.encode()
    wrong = verified(issued, authority.ca, NAME, "b.example.org")
    assert wrong.client_fault is not None
    assert "not for b.example.org;" in wrong.client_fault


def test_sni_may_be_an_address(authority: Authority, issued: Issued) -> None:
    outcome = verified(issued, authority.ca, NAME, "192.0.2.1")
    exchange(outcome)
    assert outcome.server.get_servername() is None, "RFC 6066: no addresses"


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_no_sni_for_an_address(host: str, authority: Authority, issued: Issued) -> None:
    assert verified(issued, authority.ca, host).server.get_servername() is None


def test_no_sni_where_nothing_is_verified() -> None:
    client = ClientTls(NAME, None, None).connect(1, is_native=True)
    assert shake(server_tls().accept(is_native=True), client).server.get_servername() is None


def test_zone_of_an_address_is_not_part_of_the_name(authority: Authority) -> None:
    files = authority.issue("fe80::1", label="zone")
    exchange(verified(files, authority.ca, "fe80::1%eth0"))


@pytest.mark.parametrize(
    ("name", "sent"),
    [("bücher.example", b"xn--bcher-kva.example"), ("straße.example", b"xn--strae-oqa.example")],
)
def test_c09_international_name(name: str, sent: bytes, authority: Authority) -> None:
    files = authority.issue(name, label="idn")
    outcome = verified(files, authority.ca, name)
    exchange(outcome)
    assert outcome.server.get_servername() == sent


def test_intermediate_is_sent(authority: Authority) -> None:
    files = authority.issue(NAME, label="indirect", is_indirect=True)
    outcome = verified(files, authority.ca)
    exchange(outcome)
    chain = outcome.client.get_peer_cert_chain(as_cryptography=True)
    assert chain == list(read_certificates("crt", files.crt))
    assert len(chain) == 2


def test_intermediate_as_anchor(authority: Authority, tmp_path: Path) -> None:
    """Whoever is named in ca= is trusted, a root or not."""
    files = authority.issue(NAME, label="indirect", is_indirect=True)
    anchor = tmp_path / "anchor.pem"
    blocks = Path(files.crt).read_text().partition("-----END CERTIFICATE-----\n")
    anchor.write_text(blocks[2])
    exchange(verified(files, str(anchor)))


def test_server_itself_as_anchor(issued: Issued, tmp_path: Path) -> None:
    exchange(verified(issued, issued.crt))
    files = self_signed(tmp_path, NAME)
    exchange(verified(files, files.crt))


def test_several_anchors(
    authority: Authority, stranger: Authority, issued: Issued, tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(Path(stranger.ca).read_bytes() + Path(authority.ca).read_bytes())
    exchange(verified(issued, str(both)))


def test_system_store(
    authority: Authority, issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", authority.ca)
    exchange(verified(issued, None))


def test_kinds_of_keys(tmp_path: Path) -> None:
    for key in (
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
    ):
        files = self_signed(tmp_path, NAME, key=key)
        exchange(verified(files, files.crt))


def test_connections_are_independent(authority: Authority, issued: Issued) -> None:
    """One that fails leaves no trace on its neighbours of the same context."""
    server, client = server_tls(issued), ClientTls(NAME, authority.ca, None)
    for _ in range(3):
        other = ClientTls("b.example.org", authority.ca, None)
        bad = shake(server.accept(is_native=True), other.connect(2, is_native=True))
        assert not bad.is_good
        good = shake(server.accept(is_native=True), client.connect(2, is_native=True))
        exchange(good)


# --- what is agreed on ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server_is_fast", "client_is_fast", "cipher"),
    [
        (True, True, "TLS_AES_128_GCM_SHA256"),
        (True, False, "TLS_CHACHA20_POLY1305_SHA256"),
        (False, True, "TLS_CHACHA20_POLY1305_SHA256"),
        (False, False, "TLS_CHACHA20_POLY1305_SHA256"),
    ],
)
def test_cipher_follows_the_weaker_machine(
    server_is_fast: bool, client_is_fast: bool, cipher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "is_aes_fast", lambda: server_is_fast)
    server = server_tls()
    monkeypatch.setattr(contexts, "is_aes_fast", lambda: client_is_fast)
    client = ClientTls(NAME, None, None)
    outcome = shake(server.accept(is_native=True), client.connect(1, is_native=True))
    assert outcome.is_good
    assert outcome.client.get_cipher_name() == cipher
    assert outcome.client.get_protocol_version_name() == "TLSv1.3"


def test_all_suites_stay_allowed() -> None:
    """A peer that can do just one of them is served."""
    for suite in contexts.FAST_AES.split(b":"):
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_tls13_ciphersuites(suite)
        client = SSL.Connection(context, None)
        client.set_connect_state()
        outcome = shake(server_tls().accept(is_native=False), client)
        assert outcome.is_good
        assert (outcome.client.get_cipher_name() or "").encode() == suite


@pytest.mark.parametrize(
    ("text", "is_fast"),
    [
        ("processor : 0\nflags\t\t: fpu aes avx\n", True),
        ("processor : 0\nflags\t\t: fpu avx\nother: aes\n", False),
        ("processor : 0\nFeatures\t: fp asimd aes pmull\n", True),
        ("processor : 0\nFeatures\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_is_aes_fast(text: str, is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert contexts.is_aes_fast.__wrapped__() is is_fast


@pytest.mark.parametrize(("machine", "is_fast"), [("arm64", True), ("mips", False)])
def test_is_aes_fast_without_proc(
    machine: str, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert contexts.is_aes_fast.__wrapped__() is is_fast


def test_hybrid_key_exchange() -> None:
    """The library's own choice is left alone: it resists quantum computers since OpenSSL 3.5."""
    client = ClientTls(NAME, None, None).connect(1, is_native=True)
    outcome = shake(server_tls().accept(is_native=True), client)
    assert outcome.is_good
    if SSL.OPENSSL_VERSION_NUMBER >= 0x30500000 and hasattr(SSL.Connection, "get_group_name"):
        assert (outcome.client.get_group_name() or "").upper() == "X25519MLKEM768"


def test_contexts() -> None:
    for method in (SSL.TLS_SERVER_METHOD, SSL.TLS_CLIENT_METHOD):
        context = contexts._context(method)
        assert context.set_mode(0) & SSL.MODE_RELEASE_BUFFERS
        assert context.get_session_cache_mode() == SSL.SESS_CACHE_OFF
        assert context.set_options(0) & SSL.OP_NO_TICKET
        assert context.get_verify_mode() == SSL.VERIFY_NONE


def test_tickets_stay_small() -> None:
    """OpenSSL sends two that nobody asked for; at least they hold no state and little room."""
    server, client = server_tls().accept(is_native=True), ClientTls(NAME, None, None)
    ours = client.connect(1, is_native=True)
    step(ours)
    carry(ours, server)
    step(server)
    carry(server, ours)
    step(ours)
    carry(ours, server)
    assert step(server) is None
    assert len(server.bio_read(1 << 16)) < 256


def test_alpn_of_a_stranger(issued: Issued) -> None:
    """Who offers other protocols, or none, is let through the handshake and no further."""
    for offered in ([b"http/1.1", b"h2"], []):
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        if offered:
            context.set_alpn_protos(offered)
        client = SSL.Connection(context, None)
        client.set_connect_state()
        outcome = shake(server_tls(issued).accept(is_native=True), client)
        assert outcome.is_good
        for side in (outcome.server, outcome.client):
            with pytest.raises(TlsError, match="another program: it does not speak nodepass/2"):
                check_alpn(side)


def test_native_selector_is_installed(issued: Issued, monkeypatch: pytest.MonkeyPatch) -> None:
    """A C function as the engine has one: the context must not call Python in its place."""
    kind = (
        "int(SSL *, unsigned char **, unsigned char *, const unsigned char *, unsigned int, void*)"
    )
    seen: list[bytes] = []
    word = FFI.new("unsigned char[]", ALPN)

    @FFI.callback(kind)  # type: ignore[untyped-decorator]
    def select(
        _: object, out: list[object], size: list[int], offer: object, n: int, __: object
    ) -> int:
        seen.append(FFI.buffer(offer, n)[:])
        if ALPN not in seen[-1]:
            return 2
        out[0], size[0] = word, len(ALPN)
        return 0

    address = int(FFI.cast("uintptr_t", select))
    monkeypatch.setattr(
        SSL.Context, "set_alpn_select_callback", lambda *_: pytest.fail("Python would be called")
    )
    server = ServerTls(2, issued.crt, issued.key, Log("server"), address)
    client = ClientTls(NAME, issued.crt, None)
    outcome = shake(server.accept(is_native=True), client.connect(2, is_native=True))
    exchange(outcome)
    check_alpn(outcome.server)
    assert seen == [bytes([len(ALPN)]) + ALPN]

    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_alpn_protos([b"http/1.1"])
    stranger = SSL.Connection(context, None)
    stranger.set_connect_state()
    outcome = shake(server.accept(is_native=True), stranger)
    says = "is another program: it does not offer nodepass/2 inside TLS"
    assert outcome.server_fault == f"the client {says}"
    says = "is another program: it does not speak nodepass/2 inside TLS"
    assert outcome.client_fault == f"the server {says}"
    # Seed data links know no ALPN, and the selector has nothing to say there.
    exchange(shake(server.accept(is_native=False), client.connect(2, is_native=False)))


def test_fingerprint_of_nobody() -> None:
    server = server_tls().accept(is_native=True)
    outcome = shake(server, ClientTls(NAME, None, None).connect(1, is_native=True))
    with pytest.raises(TlsError, match="has shown no certificate"):
        fingerprint_of(outcome.server)


def test_fingerprint_that_cryptography_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise x509.InvalidVersion("7 is not a valid X509 version", 7)

    client = ClientTls(NAME, None, None).connect(1, is_native=True)
    monkeypatch.setattr(client, "get_peer_certificate", refuse)
    with pytest.raises(TlsError, match="the other side's certificate is broken"):
        fingerprint_of(client)


# --- options that cannot be used -----------------------------------------------------------------


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


# --- renewal -------------------------------------------------------------------------------------


def shown_by(server: ServerTls) -> str:
    """Return the fingerprint that a new connection gets to see."""
    client = ClientTls(NAME, None, None).connect(1, is_native=True)
    return fingerprint_of(shake(server.accept(is_native=True), client).client)


def test_reload(authority: Authority, lines: Callable[[], list[str]]) -> None:
    files = authority.issue(NAME, label="renewed")
    server = server_tls(files)
    old = server.fingerprint
    before = server.accept(is_native=True)
    server.reload()
    assert (lines(), server.fingerprint) == ([], old)

    authority.issue(NAME, label="renewed")
    server.reload()
    fresh = load(files.crt, files.key, Clock()())
    assert old != server.fingerprint == fresh.fingerprint == shown_by(server)
    (line,) = lines()
    assert line.startswith("INFO  certificate reloaded  fingerprint=SHA256:")
    assert fresh.fingerprint in line
    assert f'expires="{fresh.expires:%Y-%m-%d %H:%M} UTC"' in line
    # A handshake that had begun goes on with what it had.
    client = ClientTls(NAME, authority.ca, None).connect(2, is_native=True)
    outcome = shake(before, client)
    exchange(outcome)
    assert fingerprint_of(outcome.client) == old
    server.reload()
    assert lines() == []


def test_reload_by_force(authority: Authority, lines: Callable[[], list[str]]) -> None:
    server = server_tls(authority.issue(NAME, label="forced"))
    server.reload(force=True)
    (line,) = lines()
    assert line.startswith("INFO  certificate reloaded")


def test_half_written(authority: Authority, lines: Callable[[], list[str]]) -> None:
    """The new certificate is there, its key is not yet: nothing changes, and one line says so."""
    files = authority.issue(NAME, label="half")
    server = server_tls(files)
    old = server.fingerprint
    old_key = Path(files.key).read_bytes()
    authority.issue(NAME, label="half")
    new_key = Path(files.key).read_bytes()
    Path(files.key).write_bytes(old_key)
    for _ in range(3):
        server.reload()
    assert server.fingerprint == old == shown_by(server)
    (line,) = lines()
    assert line.startswith("ERROR  certificate not reloaded, the old one stays in use  why=")
    assert "does not belong to the certificate" in line
    assert "Traceback" not in line

    Path(files.key).write_bytes(new_key)
    server.reload()
    assert server.fingerprint != old
    assert [line.split("  ")[1] for line in lines()] == ["certificate reloaded"]
    server.reload()
    assert lines() == []


def test_bad_files_are_tried_again_although_untouched(
    authority: Authority, lines: Callable[[], list[str]]
) -> None:
    """A certificate from the future becomes good without anybody writing it."""
    files = authority.issue(NAME, label="future")
    clock = Clock()
    server = server_tls(files, clock)
    old = server.fingerprint
    authority.issue(NAME, label="future", start=DAY)
    server.reload()
    assert server.fingerprint == old
    assert "is valid from" in lines()[0]
    clock.now += 2 * DAY
    server.reload()
    assert server.fingerprint != old


@pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
def test_files_that_vanish(
    damage: str, authority: Authority, lines: Callable[[], list[str]]
) -> None:
    files = authority.issue(NAME, label=damage)
    server = server_tls(files)
    old, crt = server.fingerprint, Path(files.crt)
    if damage == "gone":
        crt.unlink()
    else:
        crt.write_bytes(b"" if damage == "empty" else crt.read_bytes()[:300])
    server.reload()
    assert server.fingerprint == old == shown_by(server)
    assert "crt: " in lines()[0]


def test_weak_key_on_reload(authority: Authority, lines: Callable[[], list[str]]) -> None:
    files = authority.issue(NAME, label="weakened")
    server = server_tls(files)
    old = server.fingerprint
    key = rsa.generate_private_key(65537, 1024)
    self_signed(Path(files.crt).parent, NAME, label="weakened", key=key)
    server.reload()
    assert server.fingerprint == old
    assert "ee key too small" in lines()[0]


def test_an_asked_for_reload_is_always_answered(
    authority: Authority, lines: Callable[[], list[str]]
) -> None:
    files = authority.issue(NAME, label="asked")
    server = server_tls(files)
    Path(files.key).write_text("")
    for _ in range(3):
        server.reload(force=True)
    assert [line.split("  ")[0] for line in lines()] == ["ERROR"] * 3


def test_mode_1_has_nothing_to_reload(lines: Callable[[], list[str]]) -> None:
    server = server_tls()
    old = server.fingerprint
    server.reload(force=True)
    assert (lines(), server.fingerprint) == ([], old)


def test_expiry_is_told_in_time(authority: Authority, lines: Callable[[], list[str]]) -> None:
    clock = Clock()
    files = authority.issue(NAME, label="ending", start=-60 * DAY, end=31 * DAY)
    server = server_tls(files, clock)
    assert lines() == []
    end = f"{load(files.crt, files.key, clock()).expires:%Y-%m-%d %H:%M} UTC"

    soon = f'WARN  the certificate is about to expire; renew it  expires="{end}"'
    clock.now += 2 * DAY
    server.reload()
    assert lines() == [soon]
    clock.now += 0.9 * DAY
    server.reload()
    assert lines() == [], "once a day is enough"
    clock.now += 27.5 * DAY
    server.reload()
    assert lines() == [soon]

    over = f'ERROR  the certificate has expired; clients refuse it  expired="{end}"'
    clock.now += 0.7 * DAY
    server.reload()
    assert lines() == [over], "at once, whenever the last warning was"
    clock.now += 0.9 * DAY
    server.reload()
    assert lines() == []

    authority.issue(NAME, label="ending")
    clock.now = datetime.now(UTC)
    server.reload()
    assert [line.split("  ")[1] for line in lines()] == ["certificate reloaded"]


def test_expiry_is_told_at_start(authority: Authority, lines: Callable[[], list[str]]) -> None:
    server_tls(authority.issue(NAME, label="short", start=-80 * DAY, end=7 * DAY))
    (line,) = lines()
    assert line.startswith("WARN  the certificate is about to expire; renew it")


def test_short_lives_are_no_worry(authority: Authority, lines: Callable[[], list[str]]) -> None:
    """Some authorities give six days; whoever renews in time is not told so all the time."""
    clock = Clock()
    files = authority.issue(NAME, label="brief", start=-0.1 * DAY, end=5.9 * DAY)
    server = server_tls(files, clock)
    clock.now += 3.7 * DAY
    server.reload()
    assert lines() == []
    clock.now += 0.4 * DAY
    server.reload()
    assert lines()[0].startswith("WARN  the certificate is about to expire")


def test_complaints_are_made_once(tmp_path: Path, lines: Callable[[], list[str]]) -> None:
    files = self_signed(tmp_path)
    Path(files.key).chmod(0o644)
    server = server_tls(files)
    assert lines() == [
        f"WARN  every user of this machine can read the key; chmod 600 it  key={files.key}",
        f"WARN  the certificate has no subjectAltName; clients refuse it  crt={files.crt}",
    ]
    server.reload(force=True)
    assert [line.split("  ")[0] for line in lines()] == ["INFO"]


def test_nothing_of_the_key_is_logged(
    authority: Authority, lines: Callable[[], list[str]]
) -> None:
    files = authority.issue(NAME, label="loud")
    server = ServerTls(2, files.crt, files.key, Log("server", "debug"), None)
    secret = Path(files.key).read_text().splitlines()[1:-1]
    for text in ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", secret[0]):
        Path(files.key).write_text(text)
        server.reload(force=True)
    shown = "".join(lines()) + repr(server) + repr(vars(server))
    assert not any(line in shown for line in secret)


def test_ca_reload(
    authority: Authority,
    stranger: Authority,
    issued: Issued,
    tmp_path: Path,
    lines: Callable[[], list[str]],
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(Path(stranger.ca).read_bytes())
    client = ClientTls(NAME, str(ca), None, Log("client"))

    def is_good() -> bool:
        server = server_tls(issued).accept(is_native=True)
        return shake(server, client.connect(2, is_native=True)).is_good

    client.reload()
    assert (lines(), is_good()) == ([], False)
    ca.write_bytes(Path(authority.ca).read_bytes())
    client.reload()
    assert lines() == [f"INFO  ca reloaded  ca={ca}"]
    assert is_good()
    ca.write_text("half")
    for _ in range(3):
        client.reload()
    (line,) = lines()
    assert line.startswith("ERROR  ca not reloaded, the old one stays in use  why=")
    assert is_good()
    ca.write_bytes(Path(stranger.ca).read_bytes())
    client.reload(force=True)
    assert not is_good()


def test_system_store_is_read_again_when_asked(
    authority: Authority, stranger: Authority, issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", "/nonexistent")
    monkeypatch.setenv("SSL_CERT_FILE", stranger.ca)
    client = ClientTls(NAME, None, None)

    def is_good() -> bool:
        server = server_tls(issued).accept(is_native=True)
        return shake(server, client.connect(2, is_native=True)).is_good

    assert not is_good()
    monkeypatch.setenv("SSL_CERT_FILE", authority.ca)
    client.reload()
    assert not is_good()
    client.reload(force=True)
    assert is_good()


# --- other copies of OpenSSL ---------------------------------------------------------------------


def shake_with_python(ours: SSL.Connection, context: ssl.SSLContext, name: str | None) -> int:
    """Shake hands with Python's own ssl module; return our fault's packed code, 0 = none."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = context.wrap_bio(incoming, outgoing, server_side=name is None, server_hostname=name)
    fault = 0
    error: ssl.SSLError | None = None
    for _ in range(ROUNDS):
        if error is None:
            try:
                theirs.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as exc:
                error = exc
        if data := outgoing.read():
            ours.bio_write(data)
        fault = fault or step(ours) or 0
        with contextlib.suppress(SSL.WantReadError):
            while True:
                incoming.write(ours.bio_read(1 << 16))
    if not fault and error is None:
        records = Records(ours)
        theirs.write(b"hello")
        assert records.open(outgoing.read()) == b"hello"
        incoming.write(records.seal(b"world"))
        assert theirs.read(100) == b"world"
        return 0
    return fault or -1


@pytest.mark.parametrize("is_native", [True, False])
def test_python_as_client(is_native: bool, authority: Authority, issued: Issued) -> None:
    context = ssl.create_default_context(cafile=authority.ca)
    if is_native:
        context.set_alpn_protocols([ALPN.decode()])
    server = server_tls(issued).accept(is_native=is_native)
    assert shake_with_python(server, context, NAME) == 0
    if is_native:
        check_alpn(server)


@pytest.mark.parametrize("is_native", [True, False])
def test_python_as_server(is_native: bool, authority: Authority, issued: Issued) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.crt, issued.key)
    if is_native:
        context.set_alpn_protocols([ALPN.decode()])
    client = ClientTls(NAME, authority.ca, None).connect(2, is_native=is_native)
    assert shake_with_python(client, context, None) == 0
    if is_native:
        check_alpn(client)


def test_old_python_as_client(authority: Authority, issued: Issued) -> None:
    context = ssl.create_default_context(cafile=authority.ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    server = server_tls(issued).accept(is_native=False)
    detail = shake_with_python(server, context, NAME)
    assert explain(server, detail, is_server=True) == f"the client {OLD}"


def test_old_python_as_server(authority: Authority, issued: Issued) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.crt, issued.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    client = ClientTls(NAME, authority.ca, None).connect(2, is_native=True)
    detail = shake_with_python(client, context, None)
    assert explain(client, detail, is_server=False) == f"the server {OLD}"


def test_python_that_does_not_trust(stranger: Authority, issued: Issued) -> None:
    context = ssl.create_default_context(cafile=stranger.ca)
    server = server_tls(issued).accept(is_native=False)
    detail = shake_with_python(server, context, NAME)
    assert "the client does not trust our certificate" in explain(server, detail, is_server=True)


OPENSSL = shutil.which("openssl")
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="no openssl on the PATH")


def shake_over(sock: socket.socket, ours: SSL.Connection) -> int:
    """Shake hands over a socket; return our fault's packed code, 0 = none."""
    sock.settimeout(PATIENCE)
    while True:
        fault = step(ours)
        with contextlib.suppress(SSL.WantReadError):
            while True:
                sock.sendall(ours.bio_read(1 << 16))
        if fault:
            return fault
        if ours.get_state_string() == b"SSL negotiation finished successfully":
            return 0
        data = sock.recv(1 << 16)
        assert data, "the other program has hung up"
        ours.bio_write(data)


def receive(sock: socket.socket, ours: SSL.Connection, size: int) -> bytes:
    records, got = Records(ours), b""
    while len(got) < size:
        data = sock.recv(1 << 16)
        assert data, "the other program has hung up"
        got += records.open(data)
    return got


@contextlib.contextmanager
def program(*args: str) -> Iterator[subprocess.Popen[bytes]]:
    assert OPENSSL is not None
    pipe = subprocess.PIPE
    with subprocess.Popen([OPENSSL, *args], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def s_client(*args: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(PATIENCE)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        process = stack.enter_context(program("s_client", "-connect", address, "-quiet", *args))
        sock, _ = listener.accept()
        yield process, stack.enter_context(sock)


@needs_openssl
def test_s_client(authority: Authority, issued: Issued) -> None:
    server = server_tls(issued).accept(is_native=True)
    trust = ("-CAfile", authority.ca, "-verify_return_error", "-verify_hostname", NAME)
    with s_client("-alpn", ALPN.decode(), "-servername", NAME, *trust) as (process, sock):
        assert shake_over(sock, server) == 0
        check_alpn(server)
        sock.sendall(Records(server).seal(b"from us\n"))
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"from us\n"
        process.stdin.write(b"to us\n")
        process.stdin.flush()
        assert receive(sock, server, 6) == b"to us\n"


@needs_openssl
def test_old_s_client(issued: Issued) -> None:
    server = server_tls(issued).accept(is_native=True)
    with s_client("-tls1_2") as (_, sock):
        detail = shake_over(sock, server)
    assert explain(server, detail, is_server=True) == f"the client {OLD}"


@needs_openssl
def test_s_client_that_does_not_trust(stranger: Authority, issued: Issued) -> None:
    server = server_tls(issued).accept(is_native=True)
    with s_client("-CAfile", stranger.ca, "-verify_return_error") as (_, sock):
        detail = shake_over(sock, server)
    assert "the client does not trust our certificate" in explain(server, detail, is_server=True)


@contextlib.contextmanager
def s_server(files: Issued, *args: str) -> Iterator[socket.socket]:
    with program(
        "s_server", "-accept", "127.0.0.1:0", "-cert", files.crt, "-key", files.key, *args
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"ACCEPT "):
                port = int(line.rpartition(b":")[2])
                break
        else:
            pytest.fail(f"s_server did not start: {process.communicate()[1]!r}")
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
            yield sock


@needs_openssl
def test_s_server(authority: Authority, issued: Issued) -> None:
    client = ClientTls(NAME, authority.ca, None).connect(2, is_native=True)
    with s_server(issued, "-alpn", ALPN.decode(), "-rev") as sock:
        assert shake_over(sock, client) == 0
        check_alpn(client)
        sock.sendall(Records(client).seal(b"reverse\n"))
        assert receive(sock, client, 8) == b"esrever\n"


@needs_openssl
def test_old_s_server(authority: Authority, issued: Issued) -> None:
    client = ClientTls(NAME, authority.ca, None).connect(2, is_native=True)
    with s_server(issued, "-tls1_2") as sock:
        detail = shake_over(sock, client)
    assert explain(client, detail, is_server=False) == f"the server {OLD}"


@needs_openssl
def test_fingerprint_as_openssl_prints_it(issued: Issued) -> None:
    assert OPENSSL is not None
    done = subprocess.run(
        [OPENSSL, "x509", "-in", issued.crt, "-noout", "-fingerprint", "-sha256"],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    (leaf,) = read_certificates("crt", issued.crt)
    assert fingerprint(leaf) == "SHA256:" + done.stdout.strip().partition("=")[2]
