"""contexts: certificates that change while they are in use, and other copies of OpenSSL."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from OpenSSL import SSL
from tests.kit.authority import Authority, Issued, self_signed
from tests.kit.pump import (
    NAME,
    OLD,
    ROUNDS,
    Clock,
    server_tls,
    shake,
    step,
)
from tests.kit.tls_contexts import OPENSSL, exchange, program

from nodepass.observe.log import Log
from nodepass.tls.certificate import fingerprint, load, read_certificates
from nodepass.tls.codec import Records
from nodepass.tls.contexts import ALPN, ClientTls, ServerTls, check_alpn, explain, fingerprint_of

DAY = timedelta(days=1)


PATIENCE: Final = 20.0
"""Seconds that another program has for a handshake."""


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
