"""verdict: what is said of a handshake that failed, and that it is said of the right one."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from OpenSSL import SSL
from tests.kit.authority import Authority, Issued, self_signed
from tests.kit.pump import NAME, OLD, server_tls, shake, step, verified

from nodepass.tls import _openssl
from nodepass.tls import explain as words
from nodepass.tls.certificate import load, read_certificates
from nodepass.tls.contexts import ClientTls, ServerTls, explain


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Issued:
    return authority.issue(NAME, "*.wild.example.org", "192.0.2.1", "2001:db8::1")


def test_wrong_name(authority: Authority, issued: Issued) -> None:
    outcome = verified(issued, authority.ca, "b.example.org")
    assert outcome.client_fault == (
        "the server's certificate is for a.example.org, *.wild.example.org, 192.0.2.1,"
        " 2001:db8::1, not for b.example.org; dial one of its names, or give it as sni=NAME"
    )
    assert outcome.server_fault == (
        "the client refuses our certificate: it does not trust it, or the name is wrong"
    )


@pytest.mark.parametrize("host", ["192.0.2.2", "2001:db8::2", "x.y.wild.example.org"])
def test_wrong_names(host: str, authority: Authority, issued: Issued) -> None:
    assert f"not for {host};" in (verified(issued, authority.ca, host).client_fault or "")


def test_c09_wrong_name_of_another_script(authority: Authority) -> None:
    files = authority.issue("strasse.example", "bücher.example", label="ss")
    outcome = verified(files, authority.ca, "straße.example")
    assert (outcome.client_fault or "").startswith(
        "the server's certificate is for strasse.example, xn--bcher-kva.example, not for"
        " straße.example;"
    )


def test_wrong_name_of_many(authority: Authority) -> None:
    files = authority.issue(*(f"{n}.{'x' * 60}.{'y' * 60}" for n in range(7)), label="many")
    says = verified(files, authority.ca).client_fault or ""
    assert says.count("…") == words.SHOWN_NAMES
    assert " and 2 more, not for a.example.org;" in says
    assert len(says) < 700


def test_certificate_without_names(tmp_path: Path) -> None:
    files = self_signed(tmp_path)
    assert verified(files, files.crt).client_fault == (
        "the server's certificate is not for a.example.org; it names nobody that can be checked"
    )


def late(server: ServerTls, files: Issued) -> ServerTls:
    """Let a server show what its files hold, dates unchecked."""
    crt, key = files.crt, files.key
    start = read_certificates("crt", crt)[0].not_valid_before_utc
    server._contexts = server._build(load(crt, key, start))
    return server


def test_expired(authority: Authority, issued: Issued) -> None:
    files = authority.issue_expired(NAME)
    server = late(server_tls(issued), files).accept(is_native=True)
    client = ClientTls(NAME, authority.ca, None).connect(2, is_native=True)
    outcome = shake(server, client)
    end = read_certificates("crt", files.crt)[0].not_valid_after_utc
    assert (outcome.client_fault or "").startswith(
        f"the server's certificate expired {end:%Y-%m-%d %H:%M} UTC, 1 day ago; renew it, or set"
        " this machine's clock (now "
    )
    assert outcome.server_fault == (
        "the client says that our certificate has expired, or its clock is wrong"
    )


def test_not_yet_valid(authority: Authority, issued: Issued) -> None:
    files = authority.issue_early(NAME)
    server = late(server_tls(issued), files).accept(is_native=True)
    client = ClientTls(NAME, authority.ca, None).connect(2, is_native=True)
    start = read_certificates("crt", files.crt)[0].not_valid_before_utc
    assert (shake(server, client).client_fault or "").startswith(
        f"the server's certificate is valid from {start:%Y-%m-%d %H:%M} UTC on; is this machine's"
        " clock right (now "
    )


def test_untrusted(authority: Authority, stranger: Authority, issued: Issued) -> None:
    outcome = verified(issued, stranger.ca)
    says = outcome.client_fault or ""
    assert says.startswith("the server's certificate comes from an authority (")
    assert "O=authority of ours" in says
    assert f" that is not among what ca={stranger.ca!r} trusts; give that authority" in says
    assert outcome.server_fault == (
        "the client does not trust our certificate: it knows no authority that has signed it"
    )


def test_untrusted_by_the_system(
    issued: Issued, stranger: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", stranger.ca)
    monkeypatch.setenv("SSL_CERT_DIR", "/nonexistent")
    assert "not among what this machine trusts" in (verified(issued, None).client_fault or "")


def test_missing_intermediate(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue(NAME, label="indirect", is_indirect=True)
    short = tmp_path / "short.crt"
    end = "-----END CERTIFICATE-----\n"
    short.write_text(Path(files.crt).read_text().partition(end)[0] + end)
    says = verified(Issued(str(short), files.key), authority.ca).client_fault or ""
    assert "or if only a link is missing, the whole chain as the server's crt=FILE" in says


def test_self_signed(authority: Authority, tmp_path: Path) -> None:
    says = verified(self_signed(tmp_path, NAME), authority.ca).client_fault or ""
    assert says == (
        f"the server's certificate is self-signed and not among what ca={authority.ca!r} trusts;"
        " if it is the right one, give it as ca=FILE"
    )


def test_middle_man_with_a_certificate_of_his_own(authority: Authority) -> None:
    """A client that wants mode 2 is not content with a certificate made in memory."""
    server = server_tls().accept(is_native=True)
    client = ClientTls(NAME, authority.ca, None).connect(2, is_native=True)
    assert "is self-signed" in (shake(server, client).client_fault or "")


def test_old_client() -> None:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    client = SSL.Connection(context, None)
    client.set_connect_state()
    outcome = shake(server_tls().accept(is_native=True), client)
    assert outcome.server_fault == f"the client {OLD}"


def test_old_server(issued: Issued) -> None:
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    context.use_certificate_chain_file(issued.crt)
    context.use_privatekey_file(issued.key)
    server = SSL.Connection(context, None)
    server.set_accept_state()
    outcome = shake(server, ClientTls(NAME, None, None).connect(1, is_native=True))
    assert outcome.client_fault == f"the server {OLD}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "does not speak TLS but HTTP"),
        (b"CONNECT x:1 HTTP/1.1\r\n\r\n", "does not speak TLS but HTTP, as to a proxy"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak TLS"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak TLS"),
        (b"hello://name?v=2&n=0\n", "does not speak TLS"),
        (b"\0" * 64, "does not speak TLS"),
    ],
)
@pytest.mark.parametrize("is_server", [True, False])
def test_no_tls(is_server: bool, words: bytes, says: str) -> None:
    side = (
        server_tls().accept(is_native=True)
        if is_server
        else ClientTls(NAME, None, None).connect(1, is_native=True)
    )
    side.bio_write(words)
    peer = "client" if is_server else "server"
    # OpenSSL before 4.0 takes some of these for the length of a record, and knows no more.
    expected = {f"the {peer} {says}", f"the {peer} does not speak TLS"}
    assert explain(side, step(side) or 0, is_server) in expected


def test_garbage_in_a_record() -> None:
    side = server_tls().accept(is_native=True)
    side.bio_write(b"\x16\x03\x01\x00\x05abcdefffff")
    assert explain(side, step(side) or 0, is_server=True) == (
        "TLS with the client failed: unexpected message"
    )


def test_every_alert_has_words() -> None:
    for number in (*words.ALERTS, 10, 20, 22, 47, 50, 51, 86, 110, 111, 200):
        side = ClientTls(NAME, None, None).connect(1, is_native=True)
        side.bio_write(b"\x15\x03\x03\x00\x02\x02" + bytes([number]))
        says = explain(side, step(side) or 0, is_server=False)
        if number in words.ALERTS:
            assert says == words.ALERTS[number].format(peer="server")
        else:
            assert says.startswith("the server broke off: "), says
            assert not says.endswith(": ")


def test_reasons_are_those_of_this_openssl() -> None:
    """The numbers are fixed; what OpenSSL itself says of each must fit what we say."""
    expected = {
        101: "no suitable key share",
        118: "no suitable signature algorithm",
        155: "https proxy request",
        156: "http request",
        193: "no shared cipher",
        198: "packet length too long",
        235: "no application protocol",
        258: "unsupported protocol",
        266: "wrong ssl version",
        267: "wrong version number",
        295: "no suitable groups",
        376: "no shared signature algorithms",
        396: "version too low",
        410: "no shared groups",
        words.VERIFY_FAILED: "certificate verify failed",
    }
    server_tls()  # OpenSSL loads its texts with the first context
    for reason, text in expected.items():
        code = words.SSL_LIBRARY << words.LIBRARY_SHIFT | reason
        assert _openssl.describe(code) == text
    assert words.REASONS.keys() == expected.keys() - {words.VERIFY_FAILED}


def test_verdicts_are_those_of_this_openssl() -> None:
    codes = SSL.X509VerificationCodes
    assert words.EXPIRED == codes.ERR_CERT_HAS_EXPIRED
    assert words.NOT_YET_VALID == codes.ERR_CERT_NOT_YET_VALID
    assert words.SELF_SIGNED == codes.ERR_DEPTH_ZERO_SELF_SIGNED_CERT
    assert set(words.UNTRUSTED) == {
        codes.ERR_UNABLE_TO_GET_ISSUER_CERT,
        codes.ERR_DEPTH_ZERO_SELF_SIGNED_CERT,
        codes.ERR_SELF_SIGNED_CERT_IN_CHAIN,
        codes.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY,
        codes.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE,
        codes.ERR_CERT_UNTRUSTED,
    }
    assert words.WRONG_PURPOSE == codes.ERR_INVALID_PURPOSE
    assert words.WRONG_NAME == (codes.ERR_HOSTNAME_MISMATCH, codes.ERR_IP_ADDRESS_MISMATCH)


def refused_client(authority: Authority, issued: Issued, host: str = NAME) -> SSL.Connection:
    """Return a client's connection that has refused its server."""
    return verified(issued, authority.ca, host).client


def test_without_a_code(authority: Authority, issued: Issued) -> None:
    """OpenSSL's queue may have been emptied: what the connection itself remembers is told."""
    client = refused_client(authority, issued, "b.example.org")
    assert "not for b.example.org" in explain(client, 0, is_server=False)
    fresh = ClientTls(NAME, authority.ca, None).connect(2, is_native=True)
    assert explain(fresh, 0, False) == "TLS with the server failed: no reason is known"
    for library in (1, 6, 57):  # no reasons of ours, whatever their numbers
        detail = library << words.LIBRARY_SHIFT | 267
        assert explain(fresh, detail, False).startswith("TLS with the server failed: ")


def test_unverified_failures_do_not_blame_the_certificate() -> None:
    """OpenSSL keeps a verdict in mode 1, too, where nobody has asked for one."""
    server, client = server_tls(), ClientTls(NAME, None, None)
    outcome = shake(server.accept(is_native=True), client.connect(1, is_native=True))
    assert _openssl.verify_failure(outcome.client) is not None
    assert "certificate" not in explain(outcome.client, 0, is_server=False)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (10, "the authority of the server's certificate has expired; renew it, or set"),
        (9, "the authority of the server's certificate is not valid yet; is this machine's"),
        (26, "the server's certificate is not made for servers (its extendedKeyUsage)"),
        (66, "the server's certificate is refused: words of OpenSSL"),
    ],
)
def test_rare_verdicts(
    code: int, says: str, authority: Authority, issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = refused_client(authority, issued, "b.example.org")
    monkeypatch.setattr(_openssl, "verify_failure", lambda _: (code, "words of OpenSSL"))
    assert explain(client, 0, is_server=False).startswith(says)


def test_verdict_on_a_chain(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate at fault need not be the server's own."""
    good = authority.issue(NAME, label="good")
    old = authority.issue_expired("ca")
    early = authority.issue_early("ca")
    client = refused_client(authority, good, "b.example.org")
    leaf = read_certificates("crt", good.crt)
    middle = "a certificate between the server's and its authority"
    for files, code, says in ((old, 10, "expired"), (early, 9, "is valid from")):
        chain = [*leaf, *read_certificates("crt", files.crt)]
        monkeypatch.setattr(client, "get_peer_cert_chain", lambda chain=chain, **_: chain)
        monkeypatch.setattr(_openssl, "verify_failure", lambda _, code=code: (code, ""))
        assert explain(client, 0, is_server=False).startswith(f"{middle} {says} ")


def test_verdict_without_a_chain(
    authority: Authority, issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = refused_client(authority, issued, "b.example.org")
    monkeypatch.setattr(client, "get_peer_cert_chain", lambda **_: None)
    assert "names nobody" in explain(client, 0, is_server=False)
    client.set_app_data(None)
    assert "for the name that was asked for" in explain(client, 0, is_server=False)
    monkeypatch.setattr(_openssl, "verify_failure", lambda _: (20, ""))
    assert "comes from an authority that is not among" in explain(client, 0, is_server=False)


def test_certificate_that_cryptography_cannot_read(
    authority: Authority, issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise x509.InvalidVersion("7 is not a valid X509 version", 7)

    client = refused_client(authority, issued, "b.example.org")
    monkeypatch.setattr(client, "get_peer_cert_chain", refuse)
    assert explain(client, 0, is_server=False) == (
        "the server's certificate is refused: hostname mismatch"
    )
