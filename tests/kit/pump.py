"""TLS handshakes in memory: byte strings carried from one Connection to the other."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from OpenSSL import SSL
from tests.kit.authority import Issued

from nodepass.observe.log import Log
from nodepass.tls import _openssl
from nodepass.tls.contexts import ClientTls, ServerTls, explain

NAME: Final = "a.example.org"
ROUNDS: Final = 8
"""Turns of the pump; TLS 1.3 needs three, and one more for a retry of the key exchange."""
LIB, FFI = _openssl._binding()
OLD: Final = "does not speak TLS 1.3, only something older"


class Clock:
    """Stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


def server_tls(files: Issued | None = None, clock: Clock | None = None) -> ServerTls:
    log = Log("server")
    if files is None:
        return ServerTls(1, None, None, log, None, clock or Clock())
    return ServerTls(2, files.crt, files.key, log, None, clock or Clock())


def step(connection: SSL.Connection) -> int | None:
    """Go on with a handshake; None = it waits or is done, else OpenSSL's packed error code."""
    LIB.ERR_clear_error()
    result = LIB.SSL_do_handshake(connection._ssl)  # pyOpenSSL would keep the words only
    if LIB.SSL_get_error(connection._ssl, result) == LIB.SSL_ERROR_SSL:
        code: int = LIB.ERR_peek_error()
        LIB.ERR_clear_error()
        return code
    return None


def carry(source: SSL.Connection, sink: SSL.Connection) -> None:
    with contextlib.suppress(SSL.WantReadError):
        while True:
            sink.bio_write(source.bio_read(1 << 16))


@dataclass
class Outcome:
    """How a handshake in memory went, seen from both ends."""

    server: SSL.Connection
    client: SSL.Connection
    server_fault: str | None = None
    """In the words of `explain`; None = no complaint."""
    client_fault: str | None = None

    @property
    def is_good(self) -> bool:
        return self.server_fault is None and self.client_fault is None


def shake(server: SSL.Connection, client: SSL.Connection) -> Outcome:
    """Carry bytes until both ends have said all they have to say."""
    outcome = Outcome(server, client)
    for _ in range(ROUNDS):
        if outcome.client_fault is None and (detail := step(client)):
            outcome.client_fault = explain(client, detail, is_server=False)
        carry(client, server)
        if outcome.server_fault is None and (detail := step(server)):
            outcome.server_fault = explain(server, detail, is_server=True)
        carry(server, client)
    return outcome


def verified(files: Issued, ca: str | None, host: str = NAME, sni: str | None = None) -> Outcome:
    server = server_tls(files).accept(is_native=True)
    return shake(server, ClientTls(host, ca, sni).connect(2, is_native=True))
