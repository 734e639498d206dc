"""certificate: what is made, what is read, what is refused and in which words."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from tests.kit.authority import LIFE, Authority, Issued, self_signed

from nodepass.errors import ConfigError
from nodepass.tls import certificate as module
from nodepass.tls.certificate import (
    Files,
    ago,
    date,
    fingerprint,
    load,
    make_self_signed,
    names_of,
    read_certificates,
)

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
SEC1 = serialization.PrivateFormat.TraditionalOpenSSL


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Issued:
    return authority.issue("a.example.org", "192.0.2.1", "2001:db8::1")


def refused(option: str, crt: str, key: str, now: datetime = NOW) -> str:
    """Load what must not be loaded; return the complaint without its option."""
    with pytest.raises(ConfigError) as caught:
        load(crt, key, now)
    assert caught.value.option == option
    assert "\n" not in caught.value.message
    return caught.value.message


# --- made in memory ------------------------------------------------------------------------------


def test_self_signed() -> None:
    made = make_self_signed(NOW)
    (leaf,) = made.chain
    assert leaf.subject.rfc4514_string() == leaf.issuer.rfc4514_string() == "CN=nodepass"
    assert names_of(leaf) == ["nodepass"]
    leaf.verify_directly_issued_by(leaf)
    assert leaf.public_key() == made.key.public_key()
    assert isinstance(made.key, ec.EllipticCurvePrivateKey)
    assert isinstance(made.key.curve, ec.SECP256R1)
    assert leaf.not_valid_before_utc < NOW - DAY + timedelta(seconds=1)
    assert NOW + 3649 * DAY < made.expires == leaf.not_valid_after_utc < NOW + 3651 * DAY


def test_every_self_signed_is_another() -> None:
    one, two = make_self_signed(NOW), make_self_signed(NOW)
    assert one.fingerprint != two.fingerprint
    assert one.chain[0].serial_number != two.chain[0].serial_number


def test_fingerprint_is_what_openssl_prints() -> None:
    made = make_self_signed(NOW)
    digest = made.chain[0].fingerprint(hashes.SHA256())
    assert made.fingerprint == "SHA256:" + ":".join(f"{byte:02X}" for byte in digest)
    assert made.fingerprint == fingerprint(made.chain[0])


def test_the_key_shows_nowhere() -> None:
    assert "key" not in repr(make_self_signed(NOW)).lower()


# --- read from files -----------------------------------------------------------------------------


def test_load(issued: Issued) -> None:
    loaded = load(issued.crt, issued.key, NOW)
    assert names_of(loaded.chain[0]) == ["a.example.org", "192.0.2.1", "2001:db8::1"]
    assert loaded.chain[0].public_key() == loaded.key.public_key()
    assert loaded.expires == loaded.chain[0].not_valid_after_utc
    assert abs(loaded.expires - NOW - LIFE) < timedelta(hours=1)


def test_the_chain_keeps_its_order(authority: Authority) -> None:
    files = authority.issue("b", label="indirect", is_indirect=True)
    leaf, intermediate = load(files.crt, files.key, NOW).chain
    leaf.verify_directly_issued_by(intermediate)


def test_one_file_for_both(issued: Issued, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(Path(issued.crt).read_bytes() + Path(issued.key).read_bytes())
    assert load(str(both), str(both), NOW).fingerprint == load(*paths(issued), NOW).fingerprint


def paths(files: Issued) -> tuple[str, str]:
    return files.crt, files.key


def test_text_around_the_pem_is_passed_over(issued: Issued, tmp_path: Path) -> None:
    chatty = tmp_path / "chatty.crt"
    chatty.write_bytes(b"subject=/CN=x\n\xff\n" + Path(issued.crt).read_bytes() + b"\nbye\n")
    assert load(str(chatty), issued.key, NOW).chain == load(*paths(issued), NOW).chain


@pytest.mark.parametrize("form", [PKCS8, SEC1])
def test_forms_of_a_key(form: serialization.PrivateFormat, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    files = self_signed(tmp_path, "x", key=key)
    Path(files.key).write_bytes(key.private_bytes(PEM, form, serialization.NoEncryption()))
    assert load(files.crt, files.key, NOW).key.public_key() == key.public_key()


def test_ed25519(tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    files = self_signed(tmp_path, "x", key=key)
    assert load(files.crt, files.key, NOW).key.public_key() == key.public_key()


@pytest.mark.parametrize("option", ["crt", "key"])
def test_unreadable(option: str, issued: Issued, tmp_path: Path) -> None:
    def says(path: str) -> str:
        given = {"crt": issued.crt, "key": issued.key, option: path}
        return refused(option, given["crt"], given["key"])

    missing = str(tmp_path / "missing")
    assert says(missing) == f"cannot read {missing!r}: no such file or directory"
    assert says(str(tmp_path)) == f"{str(tmp_path)!r} is not a regular file"
    assert says("a\0b").startswith("cannot read 'a\\x00b': ")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert says(str(tmp_path / "pipe")).endswith("is not a regular file")
    large = tmp_path / "large"
    large.write_bytes(Path(issued.crt).read_bytes() + b"\n" * module.FILE_LIMIT)
    assert says(str(large)) == f"{str(large)!r} is larger than 1 MiB"
    garbage = tmp_path / "garbage"
    what = "certificate" if option == "crt" else "key"
    for data in (b"", b"\0" * 100, b"hello"):
        garbage.write_bytes(data)
        assert says(str(garbage)) == f"{str(garbage)!r} holds no PEM {what}"


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="root and Windows may read every file"
)
def test_no_permission(issued: Issued, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.touch(mode=0)
    assert refused("key", issued.crt, str(closed)).endswith(": permission denied")


def test_swapped(issued: Issued) -> None:
    assert refused("crt", issued.key, issued.crt).endswith("holds a key and no certificate")
    assert refused("key", issued.crt, issued.crt).endswith("holds a certificate and no key")


def test_broken(issued: Issued, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    block = "-----BEGIN {0}-----\nAAAA\n-----END {0}-----\n"
    bad.write_text(block.format("CERTIFICATE"))
    assert refused("crt", str(bad), issued.key).endswith("holds a broken certificate")
    bad.write_text(block.format("PRIVATE KEY"))
    assert refused("key", issued.crt, str(bad)).endswith("holds a broken key")


def test_every_cut_is_noticed(authority: Authority, tmp_path: Path) -> None:
    """A chain that is half written must not pass for a shorter one."""
    files = authority.issue("b", label="cut", is_indirect=True)
    whole = Path(files.crt).read_bytes()
    first_end = whole.index(b"-----END")
    cut = tmp_path / "cut.crt"
    for length in range(0, len(whole.rstrip()), 3):
        cut.write_bytes(whole[:length])
        try:
            chain = load(str(cut), files.key, NOW).chain
        except ConfigError as exc:
            assert exc.option == "crt", length
        else:
            # Between two blocks a file shows no sign that more is to come.
            assert len(chain) == 1, length
            assert not whole[first_end:length].partition(b"\n")[2], length


@pytest.mark.parametrize("label", ["X9.42 DH PARAMETERS", "PKCS #7 SIGNED DATA", "EC PARAMETERS"])
@pytest.mark.parametrize("is_first", [True, False])
def test_c12_other_blocks_are_passed_over(
    label: str, is_first: bool, issued: Issued, tmp_path: Path
) -> None:
    block = f"-----BEGIN {label}-----\nMIIBCAKCAQEA\n-----END {label}-----\n".encode()
    paths = []
    for source in (issued.crt, issued.key):
        paths.append(tmp_path / Path(source).name)
        whole = Path(source).read_bytes()
        paths[-1].write_bytes(block + whole if is_first else whole + block)
    assert load(str(paths[0]), str(paths[1]), NOW).chain == load(issued.crt, issued.key, NOW).chain


def test_cut_says_so(issued: Issued, tmp_path: Path) -> None:
    cut = tmp_path / "cut.crt"
    cut.write_bytes(Path(issued.crt).read_bytes()[:200])
    assert refused("crt", str(cut), issued.key).endswith(
        "is cut off: a PEM block in it has no end"
    )


def test_cut_key(issued: Issued, tmp_path: Path) -> None:
    cut = tmp_path / "cut.key"
    whole = Path(issued.key).read_bytes().rstrip()
    for length in range(0, len(whole), 3):
        cut.write_bytes(whole[:length])
        assert refused("key", issued.crt, str(cut)), length


@pytest.mark.parametrize("form", [PKCS8, SEC1])
def test_encrypted_key(form: serialization.PrivateFormat, issued: Issued, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "encrypted"
    lock = serialization.BestAvailableEncryption(b"secret")
    path.write_bytes(key.private_bytes(PEM, form, lock))
    assert "is encrypted, and nobody is there" in refused("key", issued.crt, str(path))


def test_key_that_cannot_sign(issued: Issued, tmp_path: Path) -> None:
    path = tmp_path / "x25519"
    key = x25519.X25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    assert refused("key", issued.crt, str(path)).endswith(
        "a kind of key that TLS cannot sign with"
    )


def test_key_of_another(authority: Authority, issued: Issued) -> None:
    other = authority.issue("other", label="other")
    assert refused("key", issued.crt, other.key) == (
        f"{other.key!r} does not belong to the certificate in {issued.crt!r}"
    )


def test_own_certificate_last(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("b", label="turned", is_indirect=True)
    blocks = Path(files.crt).read_text().split("-----END CERTIFICATE-----\n")
    turned = tmp_path / "turned.crt"
    turned.write_text("".join(f"{b}-----END CERTIFICATE-----\n" for b in reversed(blocks) if b))
    assert refused("crt", str(turned), files.key).endswith(
        "has the server's own certificate in place 2; put it first"
    )


def test_trust_store_as_chain(issued: Issued, tmp_path: Path) -> None:
    store = tmp_path / "store.crt"
    store.write_bytes(Path(issued.crt).read_bytes() * 11)
    assert "holds 11 certificates; it may hold 10" in refused("crt", str(store), issued.key)
    store.write_bytes(Path(issued.crt).read_bytes() * 10)
    assert len(load(str(store), issued.key, NOW).chain) == 10


def test_expired(authority: Authority) -> None:
    files = authority.issue_expired("x")
    says = refused("crt", *paths(files))
    end = read_certificates("crt", files.crt)[0].not_valid_after_utc
    assert says == f"{files.crt!r} expired {date(end)}, 1 day ago; renew it"


def test_not_yet_valid(authority: Authority) -> None:
    files = authority.issue_early("x")
    says = refused("crt", *paths(files))
    start = read_certificates("crt", files.crt)[0].not_valid_before_utc
    assert f"is valid from {date(start)} on, and it is {date(NOW)} by this machine's" in says


def test_dates_are_inclusive(issued: Issued) -> None:
    (leaf,) = read_certificates("crt", issued.crt)
    start, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    load(*paths(issued), start)
    load(*paths(issued), end)
    refused("crt", *paths(issued), start - timedelta(seconds=1))
    refused("crt", *paths(issued), end + timedelta(seconds=1))


def test_no_complaint_shows_a_key(authority: Authority, tmp_path: Path) -> None:
    """Not in the message and not in what a traceback would print along with it."""
    files = authority.issue("x", label="secret")
    lines = Path(files.key).read_text().splitlines()
    broken = tmp_path / "broken.key"
    broken.write_text("\n".join([lines[0], lines[1][:-4], *lines[2:]]))
    for crt, key in ((files.crt, str(broken)), (files.key, files.key), (files.crt, files.crt)):
        with pytest.raises(ConfigError) as caught:
            load(crt, key, NOW)
        error: BaseException | None = caught.value
        assert error is not None
        assert error.__suppress_context__ or error.__context__ is None
        assert not any(line[:20] in f"{error!r}{error.__cause__!r}" for line in lines[1:-1])


def test_certificate_that_cryptography_cannot_read(
    issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: bytes) -> list[x509.Certificate]:
        raise x509.InvalidVersion("7 is not a valid X509 version", 7)

    monkeypatch.setattr(x509, "load_pem_x509_certificates", refuse)
    assert refused("crt", *paths(issued)).endswith("holds a broken certificate")


def test_key_of_a_strange_kind_in_the_chain(
    issued: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Strange:
        def public_key(self) -> object:
            raise ValueError("unknown OID")

    monkeypatch.setattr(x509, "load_pem_x509_certificates", lambda _: [Strange()])
    assert "does not belong to" in refused("key", *paths(issued))


# --- small words ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-5, "less than a minute"),
        (59, "less than a minute"),
        (60, "1 minute"),
        (3599, "59 minutes"),
        (3600, "1 hour"),
        (86399, "23 hours"),
        (86400, "1 day"),
        (400 * 86400, "400 days"),
    ],
)
def test_ago(seconds: int, words: str) -> None:
    assert ago(timedelta(seconds=seconds)) == words


def test_names_of_nobody(tmp_path: Path) -> None:
    assert names_of(read_certificates("crt", self_signed(tmp_path).crt)[0]) == []


# --- files ---------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    files = Files([str(one), str(two)])
    assert not files.has_changed()

    one.write_text("12")
    assert files.has_changed(), "size"
    assert files.has_changed(), "until it is noted"
    files.note()
    assert not files.has_changed()

    two.write_text("2")
    assert files.has_changed(), "appeared"
    files.note()
    two.unlink()
    assert files.has_changed(), "vanished"
    files.note()

    status = one.stat()
    with one.open("a") as file:
        file.write("3")
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files.has_changed(), "size alone"
    files.note()
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert files.has_changed(), "time"
    files.note()
    fresh = tmp_path / "fresh"
    fresh.write_text("456")
    status = one.stat()
    os.utime(fresh, ns=(status.st_atime_ns, status.st_mtime_ns))
    fresh.replace(one)
    assert files.has_changed(), "replaced by one of the same size and time"


def test_files_behind_a_link(tmp_path: Path) -> None:
    """How Kubernetes and certbot renew: the link is turned to another file."""
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.write_text("x")
    new.write_text("x")
    link.symlink_to(old)
    files = Files([str(link)])
    link.unlink()
    link.symlink_to(new)
    assert files.has_changed()


def test_files_with_a_null_byte() -> None:
    assert not Files(["a\0b"]).has_changed()
