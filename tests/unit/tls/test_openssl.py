"""_openssl: every name that is not public API, what happens when one moves, and what they do.

A failure of `test_the_name_is_there` on a new release of cryptography or pyOpenSSL names the
thing to look for there; until then TLS runs on the slow twin.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cryptography
import OpenSSL
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL
from OpenSSL.crypto import X509
from tests.kit.tls_rig import HOST, authority, leaf, our_context, our_end

import nodepass
from nodepass.tls import _openssl

BINDING = "cryptography.hazmat.bindings._rust"
FUNCTIONS = _openssl.FUNCTIONS
"""What is called from Python, besides the engine's table."""
HTTP_REQUEST = 20 << 23 | 156
"""SSL_R_HTTP_REQUEST of ERR_LIB_SSL, packed."""


@pytest.fixture
def fresh_binding() -> Iterator[None]:
    """Look the binding up anew, before and after."""
    _openssl._binding.cache_clear()
    yield
    _openssl._binding.cache_clear()


class Poor:
    """A module or object from which names have gone."""

    def __init__(self, rich: object, *gone: str) -> None:
        self._rich = rich
        self._gone = gone

    def __getattr__(self, name: str) -> Any:
        if name in self._gone:
            raise AttributeError(name)
        return getattr(self._rich, name)


def lose(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Take functions out of the library."""
    lib, ffi = _openssl._binding()

    class PoorFfi(Poor):
        def addressof(self, _: object, name: str) -> object:
            if name in names:
                raise AttributeError(name)
            return ffi.addressof(lib, name)

    monkeypatch.setattr(_openssl, "_binding", lambda: (Poor(lib, *names), PoorFfi(ffi)))


def finish(server: SSL.Connection, client: SSL.Connection) -> list[SSL.Error]:
    """Do a handshake in memory; return what went wrong on either side."""
    errors: list[SSL.Error] = []
    for _ in range(4):
        for here, there in ((client, server), (server, client)):
            try:
                here.do_handshake()
            except SSL.WantReadError:
                pass
            except SSL.Error as exc:
                errors.append(exc)
            with contextlib.suppress(SSL.WantReadError):
                there.bio_write(here.bio_read(1 << 16))
    return errors


def client_context(trust: trustme.CA | None = None) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    (trust or authority()).configure_trust(context)
    context.set_verify(SSL.VERIFY_PEER)
    return context


def client_for(host: str | None, trust: trustme.CA | None = None) -> SSL.Connection:
    client = our_end(False, client_context(trust))
    if host is not None:
        _openssl.require_name(client, host)
    return client


# --- the names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _openssl.ENTRY_POINTS + FUNCTIONS)
def test_the_name_is_there(name: str) -> None:
    lib, ffi = _openssl._binding()
    assert int(ffi.cast("uintptr_t", ffi.addressof(lib, name))) > 0
    assert callable(getattr(lib, name))


@pytest.mark.parametrize("name", ["_ssl", "_into_ssl", "_from_ssl"])
def test_the_attribute_of_a_connection_is_there(name: str) -> None:
    _, ffi = _openssl._binding()
    assert int(ffi.cast("uintptr_t", getattr(our_end(True), name))) > 0


def test_the_attribute_of_a_context_is_there() -> None:
    _, ffi = _openssl._binding()
    assert int(ffi.cast("uintptr_t", our_context(True)._context)) > 0


def test_the_table_is_in_order_and_every_entry_its_own() -> None:
    lib, ffi = _openssl._binding()
    table = _openssl.table()
    assert len(table) == len(_openssl.ENTRY_POINTS) == len(set(_openssl.ENTRY_POINTS))
    assert len(set(table)) == len(table)
    for name, address in zip(_openssl.ENTRY_POINTS, table, strict=True):
        assert address == int(ffi.cast("uintptr_t", ffi.addressof(lib, name)))


def test_an_address_of_the_table_is_the_function_itself() -> None:
    """The same as calling it through cffi, so it is this copy of OpenSSL and no other."""
    lib, ffi = _openssl._binding()
    index = _openssl.ENTRY_POINTS.index("ERR_peek_error")
    peek = ffi.cast("unsigned long (*)(void)", _openssl.table()[index])
    assert peek() == lib.ERR_peek_error() == 0


def test_handles_are_those_of_the_connection() -> None:
    connection, other = our_end(True), our_end(True)
    handles = _openssl.handles(connection)
    assert len(set(handles)) == 3
    assert _openssl.handles(connection) == handles
    assert not set(handles) & set(_openssl.handles(other))


# --- when one has moved --------------------------------------------------------------------------


@pytest.mark.parametrize("name", _openssl.ENTRY_POINTS)
def test_moved_names_a_missing_entry_point(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    lose(monkeypatch, name)
    with pytest.raises(_openssl.Moved, match=name) as caught:
        _openssl.table()
    assert f"cryptography {cryptography.__version__}" in str(caught.value)
    assert f"pyOpenSSL {OpenSSL.__version__}" in str(caught.value)
    assert isinstance(caught.value, ImportError)


def test_moved_names_a_missing_binding(
    monkeypatch: pytest.MonkeyPatch, fresh_binding: None
) -> None:
    monkeypatch.delattr(sys.modules[BINDING], "_openssl")
    monkeypatch.delitem(sys.modules, f"{BINDING}._openssl", raising=False)
    with pytest.raises(_openssl.Moved, match=r"_rust\._openssl is not where it was"):
        _openssl.table()


@pytest.mark.parametrize("name", ["_ssl", "_into_ssl", "_from_ssl"])
def test_moved_names_a_missing_handle(name: str) -> None:
    poor: Any = Poor(our_end(True), name)
    with pytest.raises(_openssl.Moved, match=rf"OpenSSL\.SSL\.Connection\.{name}"):
        _openssl.handles(poor)


def test_handles_of_a_connection_on_a_socket_are_refused() -> None:
    """It has no memory BIOs."""
    context = SSL.Context(SSL.TLS_METHOD)
    poor: Any = Poor(SSL.Connection(context, None))
    poor._into_ssl = None
    with pytest.raises(_openssl.Moved, match="_into_ssl"):
        _openssl.handles(poor)


def test_moved_names_a_missing_ssl() -> None:
    poor: Any = Poor(our_end(False), "_ssl")
    with pytest.raises(_openssl.Moved, match=r"Connection\._ssl"):
        _openssl.require_name(poor, HOST)
    with pytest.raises(_openssl.Moved, match=r"Connection\._ssl"):
        _openssl.verify_failure(poor)


def test_moved_names_a_missing_context() -> None:
    poor: Any = Poor(our_context(True), "_context")
    with pytest.raises(_openssl.Moved, match=r"Context\._context"):
        _openssl.set_alpn_selector(poor, 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_moved_names_a_missing_function(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    server, client = our_end(True), client_for(None, trustme.CA())
    finish(server, client)  # fails, so that there is something to ask for
    lose(monkeypatch, name)
    calls: dict[str, Callable[[], object]] = {
        "SSL_get0_param": lambda: _openssl.require_name(client, HOST),
        "X509_VERIFY_PARAM_set_hostflags": lambda: _openssl.require_name(client, HOST),
        "X509_VERIFY_PARAM_set1_host": lambda: _openssl.require_name(client, HOST),
        "X509_VERIFY_PARAM_set1_ip": lambda: _openssl.require_name(client, "::1"),
        "SSL_get_verify_result": lambda: _openssl.verify_failure(client),
        "X509_verify_cert_error_string": lambda: _openssl.verify_failure(client),
        "ERR_reason_error_string": lambda: _openssl.describe(HTTP_REQUEST),
        "SSL_CTX_set_alpn_select_cb": lambda: _openssl.set_alpn_selector(our_context(True), 1),
    }
    with pytest.raises(_openssl.Moved, match=name):
        calls[name]()


def test_c27_every_private_name_is_listed() -> None:
    """Found in the text itself: a name that is used and not rehearsed has no way back."""
    text = Path(_openssl.__file__).read_text()
    assert set(re.findall(r'_function\("(\w+)"\)', text)) == set(FUNCTIONS)
    assert set(re.findall(r"(?:connection|context)\.(_\w+)", text)) == {"_ssl", "_context"}
    for path in Path(nodepass.__file__).parent.rglob("*.py"):
        if path.name != "_openssl.py":
            assert not re.search(r"\b(connection|context|tls)\._(ssl|context|into_ssl|from_ssl)\b",
                                 path.read_text()), path  # fmt: skip


@pytest.mark.parametrize("name", _openssl.ENTRY_POINTS + FUNCTIONS)
def test_c27_rehearsal_names_a_function(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _openssl.rehearse()
    lose(monkeypatch, name)
    with pytest.raises(_openssl.Moved, match=name):
        _openssl.rehearse()


@pytest.mark.parametrize("name", ["_ssl", "_into_ssl", "_from_ssl", "_context"])
def test_c27_rehearsal_names_an_attribute(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner = SSL.Context if name == "_context" else SSL.Connection

    class Gone(owner):  # type: ignore[misc, valid-type]  # one of two
        def __getattribute__(self, asked: str) -> Any:
            if asked == name and sys._getframe(1).f_code.co_filename == _openssl.__file__:
                raise AttributeError(asked)
            return super().__getattribute__(asked)

    monkeypatch.setattr(SSL, owner.__name__, Gone)
    with pytest.raises(_openssl.Moved, match=rf"SSL\.{owner.__name__}\.{name}"):
        _openssl.rehearse()


@pytest.mark.parametrize("library", ["AWS-LC 1.40.0", "BoringSSL", "LibreSSL 4.0.0"])
def test_c27_another_library_is_named(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """It has the same names, and may have other rules of ownership behind them."""
    monkeypatch.setattr(SSL, "OpenSSL_version", lambda _: library.encode())
    with pytest.raises(_openssl.Moved, match=library):
        _openssl.rehearse()


def test_c27_libraries_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AttributeError("module 'lib' has no attribute 'X509_V_FLAG_NOTIFY_POLICY'")

    monkeypatch.setattr(SSL, "Context", fail)
    with pytest.raises(_openssl.Moved, match=r"do not fit together.*NOTIFY_POLICY"):
        _openssl.rehearse()


# --- what they do --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [HOST, f"{HOST}.", HOST.upper(), "127.0.0.1"])
def test_the_right_name_is_accepted(host: str) -> None:
    server, client = our_end(True), client_for(host)
    assert finish(server, client) == []
    assert _openssl.verify_failure(client) is None


@pytest.mark.parametrize(
    ("host", "code"),
    [("other.test", 62), (f"sub.{HOST}", 62), ("test", 62), ("127.0.0.2", 64), ("::1", 64)],
)
def test_a_wrong_name_is_refused_by_openssl_itself(host: str, code: int) -> None:
    """62 is X509_V_ERR_HOSTNAME_MISMATCH, 64 X509_V_ERR_IP_ADDRESS_MISMATCH."""
    server, client = our_end(True), client_for(host)
    assert finish(server, client)
    failure = _openssl.verify_failure(client)
    assert failure is not None
    assert failure[0] == code
    assert "mismatch" in failure[1]


@pytest.mark.parametrize(
    ("pattern", "host", "is_good"),
    [
        ("*.wild.test", "x.wild.test", True),
        ("*.wild.test", "x.y.wild.test", False),
        ("w*.part.test", "wx.part.test", False),
    ],
)
def test_a_wildcard_stands_for_a_whole_label(pattern: str, host: str, is_good: bool) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "wild")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(pattern)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    certificate = builder.sign(key, hashes.SHA256())
    context, trust = SSL.Context(SSL.TLS_METHOD), SSL.Context(SSL.TLS_METHOD)
    context.use_certificate(certificate)
    context.use_privatekey(key)
    store = trust.get_cert_store()
    assert store is not None
    store.add_cert(X509.from_cryptography(certificate))
    trust.set_verify(SSL.VERIFY_PEER)
    client = our_end(False, trust)
    _openssl.require_name(client, host)
    assert (finish(our_end(True, context), client) == []) is is_good


def test_an_address_with_a_zone_is_an_address() -> None:
    context = SSL.Context(SSL.TLS_METHOD)
    authority().issue_cert("fe80::1").configure_cert(context)
    assert finish(our_end(True, context), client_for("fe80::1%eth0")) == []


@pytest.mark.parametrize("host", ["", ".", "a" * 64 + ".test", "bad\0name"])
def test_what_cannot_be_a_name_is_a_value_error(host: str) -> None:
    with pytest.raises(ValueError):
        _openssl.require_name(our_end(False), host)


def test_a_stranger_is_not_trusted() -> None:
    server, client = our_end(True), client_for(HOST, trustme.CA())
    assert finish(server, client)
    failure = _openssl.verify_failure(client)
    assert failure is not None
    assert failure[0] in {18, 19, 20, 21}  # self-signed, in the chain, no issuer, cannot verify
    assert failure[1]


@pytest.mark.parametrize(
    ("code", "text"), [(0, ""), (HTTP_REQUEST, "http request"), (20 << 23 | 0x7FFFF0, "")]
)
def test_describe(code: int, text: str) -> None:
    SSL.Context(SSL.TLS_METHOD)  # OpenSSL has its words from the first context on
    assert _openssl.describe(code) == text


@pytest.mark.parametrize("module", ["_fastcopy", "engine.twin.engine"])
@pytest.mark.parametrize(
    ("offered", "chosen"),
    [([b"nodepass/2"], True), ([b"h2", b"nodepass/2"], True), ([b"h2"], False)],
)
def test_the_alpn_selector_chooses(module: str, offered: list[bytes], chosen: bool) -> None:
    if importlib.util.find_spec(f"nodepass.{module}") is None:
        pytest.skip("the native engine is not built for this platform")
    address = importlib.import_module(f"nodepass.{module}").alpn_selector()
    if address is None:
        pytest.skip("the twin has no C function")
    context = SSL.Context(SSL.TLS_METHOD)
    leaf().configure_cert(context)
    _openssl.set_alpn_selector(context, address)
    client_side = client_context()
    client_side.set_alpn_protos(offered)
    server, client = our_end(True, context), our_end(False, client_side)
    errors = finish(server, client)
    assert (errors == []) is chosen
    assert server.get_alpn_proto_negotiated() == (b"nodepass/2" if chosen else b"")


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, nodepass.tls._openssl, nodepass.tls.codec, nodepass.engine.twin.engine\n"
        "assert not {'OpenSSL', 'cryptography'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
