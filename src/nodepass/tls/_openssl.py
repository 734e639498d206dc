"""Everything we use of pyOpenSSL and cryptography that is not their public API.

The engine drives TLS without the GIL by calling OpenSSL's C functions. They must come from
the very copy of OpenSSL that pyOpenSSL uses, which lives inside `cryptography`; its cffi
module gives their addresses. What a new release moves is named by `Moved`, and TLS then runs
on the slow twin. `tests/unit/tls/test_openssl.py` holds each name.

Ground floor. Importing this module imports nothing heavy.
"""

from __future__ import annotations

import functools
import ipaddress
from typing import TYPE_CHECKING, Any, Final

from nodepass.config.hostname import tls_name

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection, Context

ENTRY_POINTS: Final = (
    "SSL_do_handshake",
    "SSL_read",
    "SSL_write",
    "SSL_shutdown",
    "SSL_get_error",
    "SSL_set_bio",
    "BIO_new_mem_buf",
    "BIO_set_mem_eof_return",
    "BIO_read",
    "BIO_write",
    "BIO_free",
    "ERR_clear_error",
    "ERR_peek_error",
    "BIO_new",
    "BIO_s_mem",
)
"""C functions that the engine calls, in the order of the table in _libssl.pxd."""
HANDLES: Final = {"_ssl": "SSL *", "_into_ssl": "BIO *", "_from_ssl": "BIO *"}
"""Attributes of a Connection, and the C types of what they hold."""
NAME_FLAGS: Final = 0x4 | 0x20
"""X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS: no `w*.example.org` (RFC 9525, section 6.3), and
X509_CHECK_FLAG_NEVER_CHECK_SUBJECT: a common name is no host name (section 2)."""


FUNCTIONS: Final = (
    "SSL_get0_param",
    "X509_VERIFY_PARAM_set_hostflags",
    "X509_VERIFY_PARAM_set1_host",
    "X509_VERIFY_PARAM_set1_ip",
    "SSL_get_verify_result",
    "X509_verify_cert_error_string",
    "ERR_reason_error_string",
    "SSL_CTX_set_alpn_select_cb",
)
"""C functions that are called from Python, on either engine."""
LIBRARY: Final = "OpenSSL "
"""How the version of the one library begins whose rules of ownership the engine knows: AWS-LC,
BoringSSL and LibreSSL have the same names, and may free other things at other times."""


class Moved(ImportError):
    """A name that is not public API has gone from the installed release."""


def _moved(what: str) -> Moved:
    import cryptography
    import OpenSSL

    return Moved(
        f"{what} is not where it was (cryptography {cryptography.__version__}, "
        f"pyOpenSSL {OpenSSL.__version__})"
    )


def rehearse() -> None:
    """Use every name of this module once, on a Context and a Connection made for it.

    Raises:
        Moved: one of them is not to be had, or the library is another one.
    """
    try:
        from OpenSSL import SSL

        library = SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode("ascii", "replace")
        if not library.startswith(LIBRARY):
            raise Moved(f"the TLS library is {library}, not OpenSSL")
        table()
        for name in FUNCTIONS:
            _function(name)
        context = SSL.Context(SSL.TLS_METHOD)
        set_alpn_selector(context, 0)
        connection = SSL.Connection(context, None)
        connection.set_connect_state()
        handles(connection)
        require_name(connection, "localhost")
        require_name(connection, "127.0.0.1")
        verify_failure(connection)
        describe(1)
    except Moved:
        raise
    except Exception as exc:  # whatever a release that does not fit brings up
        raise Moved(f"pyOpenSSL and cryptography do not fit together ({exc!r})") from exc


@functools.cache
def _binding() -> tuple[Any, Any]:
    """Return cffi's `lib` and `ffi` of the OpenSSL copy that pyOpenSSL uses."""
    try:
        from cryptography.hazmat.bindings._rust import _openssl
    except ImportError as exc:
        raise _moved("cryptography.hazmat.bindings._rust._openssl") from exc
    return _openssl.lib, _openssl.ffi


def _function(name: str) -> Any:
    lib, _ = _binding()
    function = getattr(lib, name, None)
    if function is None:
        raise _moved(name)
    return function


def table() -> tuple[int, ...]:
    """Return the addresses of ENTRY_POINTS.

    Raises:
        Moved: one of them is not to be had.
    """
    lib, ffi = _binding()
    addresses = []
    for name in ENTRY_POINTS:
        try:
            addresses.append(int(ffi.cast("uintptr_t", ffi.addressof(lib, name))))
        except (AttributeError, TypeError) as exc:
            raise _moved(name) from exc
    return tuple(addresses)


def handles(connection: Connection) -> tuple[int, int, int]:
    """Return the addresses of a connection's SSL, its incoming BIO and its outgoing BIO.

    Raises:
        Moved: pyOpenSSL keeps them elsewhere now.
        TypeError: one of them is NULL.
    """
    _, ffi = _binding()
    addresses = []
    for name, kind in HANDLES.items():
        try:
            handle = getattr(connection, name)
        except (AttributeError, RecursionError) as exc:  # a Connection without __init__ recurses
            raise _moved(f"OpenSSL.SSL.Connection.{name}") from exc
        # Whatever is called as a pointer must be one: a number would be followed, too.
        if not isinstance(handle, ffi.CData) or ffi.typeof(handle).cname != kind:
            raise _moved(f"OpenSSL.SSL.Connection.{name}")
        addresses.append(int(ffi.cast("uintptr_t", handle)))
        if not addresses[-1]:
            raise TypeError("the Connection is empty")
    return addresses[0], addresses[1], addresses[2]


def _ssl(connection: Connection) -> Any:
    try:
        return connection._ssl
    except AttributeError as exc:
        raise _moved("OpenSSL.SSL.Connection._ssl") from exc


def require_name(connection: Connection, host: str) -> None:
    """Make the verification of the peer's certificate fail unless it is for this host.

    Args:
        host: name, or address without brackets.

    Raises:
        Moved: OpenSSL's check cannot be reached; the connection must not be used then.
    """
    param = _function("SSL_get0_param")(_ssl(connection))
    try:
        address = ipaddress.ip_address(host.partition("%")[0]).packed
    except ValueError:
        name = tls_name(host)  # never empty, which OpenSSL would take for "check no name"
        _function("X509_VERIFY_PARAM_set_hostflags")(param, NAME_FLAGS)
        is_set = _function("X509_VERIFY_PARAM_set1_host")(param, name, len(name))
    else:
        is_set = _function("X509_VERIFY_PARAM_set1_ip")(param, address, len(address))
    if is_set != 1:
        raise ValueError(f"{host!r} cannot be the name of a certificate")


def verify_failure(connection: Connection) -> tuple[int, str] | None:
    """Return OpenSSL's number and text for why the peer's certificate was refused, or None.

    Numbers are those of X509_V_ERR_* in OpenSSL's x509_vfy.h.
    """
    code = int(_function("SSL_get_verify_result")(_ssl(connection)))
    if code == 0:
        return None
    _, ffi = _binding()
    text = ffi.string(_function("X509_verify_cert_error_string")(code))
    return code, text.decode()


def describe(code: int) -> str:
    """Return the text of a packed OpenSSL error code, or an empty text if it has none."""
    if not code:
        return ""
    _, ffi = _binding()
    text = _function("ERR_reason_error_string")(code)
    return "" if text == ffi.NULL else str(ffi.string(text).decode())


def set_alpn_selector(context: Context, address: int) -> None:
    """Let a C function choose the server's ALPN protocol, so that no handshake needs Python.

    Args:
        address: of a function of the type that SSL_CTX_set_alpn_select_cb(3) wants.

    Raises:
        Moved: the function cannot be installed.
    """
    _, ffi = _binding()
    try:
        pointer = context._context
    except AttributeError as exc:
        raise _moved("OpenSSL.SSL.Context._context") from exc
    if not isinstance(pointer, ffi.CData) or ffi.typeof(pointer).cname != "SSL_CTX *":
        raise _moved("OpenSSL.SSL.Context._context")
    kind = (
        "int (*)(SSL *, unsigned char **, unsigned char *, const unsigned char *, unsigned int,"
        " void *)"
    )
    _function("SSL_CTX_set_alpn_select_cb")(pointer, ffi.cast(kind, address), ffi.NULL)
