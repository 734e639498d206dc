"""A connection at the tunnel port that has been greeted and not yet understood.

A value with a socket: `acceptor` moves it on, `sessions` and `seed_port` take it over.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from nodepass.config.address import join_address
from nodepass.engine.relays import Handshake
from nodepass.protocol.handshake import ServerHandshake
from nodepass.tls.codec import Records

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection


class PendingConnection:
    """One connection that has been greeted and not yet understood."""

    __slots__ = (
        "handshake",
        "heard",
        "host",
        "is_released",
        "on_ready",
        "port",
        "records",
        "said",
        "shake",
        "since",
        "sock",
        "source",
        "wait",
    )

    def __init__(
        self,
        sock: socket.socket,
        host: str,
        port: int,
        source: str,
        handshake: ServerHandshake,
        since: float,
    ) -> None:
        self.sock = sock
        self.host = host
        self.source = source
        """Of its host, as `hosts.source_of` says."""
        self.port = port
        self.handshake = handshake
        self.on_ready: Callable[[], None] | None = None
        """What it is watched with."""
        self.since = since
        """Seconds of the loop's clock at which it was greeted."""
        self.wait: asyncio.TimerHandle | None = None
        """Runs while it has to wait for its earlier failures."""
        self.said = b""
        """What it wrote so far, at most one line; plain."""
        self.heard = 0
        """Bytes of TLS records since the handshake."""
        self.shake: Handshake | None = None
        """Its TLS handshake, while the engine is at it."""
        self.records: Records | None = None
        """Its TLS once the handshake is done; None = it speaks plain."""
        self.is_released = False
        """No longer the acceptor's; what is lent to the engine is closed when it comes back."""

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)

    @property
    def is_silent(self) -> bool:
        return not self.said and self.shake is None and self.records is None

    @property
    def tls(self) -> Connection | None:
        return None if self.records is None else self.records.connection

    def send(self, data: bytes) -> None:
        """Send a line; what a fresh connection's buffer does not take, it will never take.

        Raises:
            OSError: the far end has gone.
            TlsError: it has broken its TLS, or keeps us from writing by half a message.
        """
        self.sock.send(data if self.records is None else self.records.seal(data))
