"""contexts: who is believed, and what is agreed on."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from OpenSSL import SSL
from tests.kit.authority import Authority, Issued, self_signed
from tests.kit.pump import (
    FFI,
    NAME,
    Clock,
    carry,
    server_tls,
    shake,
    step,
    verified,
)
from tests.kit.tls_contexts import exchange

from nodepass.errors import TlsError
from nodepass.observe.log import Log
from nodepass.tls import contexts
from nodepass.tls.certificate import load, read_certificates
from nodepass.tls.contexts import ALPN, ClientTls, ServerTls, check_alpn, fingerprint_of

# --- who is believed -----------------------------------------------------------------------------


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
