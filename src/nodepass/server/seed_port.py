"""The data port: where the links of the seed dialect come in.

Owns: a connection from its accept until it is a link in the pool, its TLS handshake included.
Here a connection says nothing of itself; its source address is all there is to go by. Called
by `server`.

    accepted ──from the seed client's address──> [TLS ──] 8-character id sent ──ripe──> a link
        └── from anywhere else ──> reset, counted, told once a minute

The signal that launches a link travels on another connection than its id, and a Go client that
meets a signal of a link that it does not know yet forgets it without a word. So a link is nobody's
before the client's kernel has its id, and has had it for a moment.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import socket
from typing import TYPE_CHECKING, Final

from nodepass.engine.relays import Handshake, HandshakeResult
from nodepass.errors import EngineError, TlsError
from nodepass.net import tcp
from nodepass.net.deadlines import Deadlines
from nodepass.protocol.messages import SEED_ID_SIZE
from nodepass.tls.codec import Records
from nodepass.tunnel.context import Context
from nodepass.tunnel.idle_links import Link
from nodepass.tunnel.pool import Pool

from .connected_client import ConnectedClient
from .pending import PendingConnection
from .sessions import Sessions

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

    from nodepass.tls.contexts import ServerTls

MAX_SHAKES: Final = 64
"""TLS handshakes at once: the Go client dials one after another."""

RIPENING: Final = 0.1
"""Seconds that a client has had a link's id before the link may be launched. The Go client waits
for the id in the very call that takes it, stores it, and only then dials its next link: what this
has to cover is that one thread gets a processor. Of 400 wake-ups on two crowded processors half
took 0.1 ms, one in a hundred 13 ms, the longest 31 ms; this is three times that. What is later
still is launched a second time by `silence`."""


class _Green:
    """A link whose id has been sent."""

    __slots__ = ("client", "is_acknowledged", "link", "since")

    def __init__(self, client: ConnectedClient, link: Link, since: float) -> None:
        self.client = client
        self.link = link
        self.since = since
        self.is_acknowledged = tcp.is_acknowledged(link.sock)
        """Whether the client's kernel had the id when we looked last."""


class SeedPort:
    """Make links of what comes in at the data port.

    Args:
        sessions: knows the seed client, and seats one.
        pool: where the links go.
        tls: the server's certificate, None = plain.
    """

    def __init__(
        self, context: Context, sessions: Sessions, pool: Pool, tls: ServerTls | None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = context.log
        self._counters = context.counters
        self._relays = context.relays
        self._timeout = context.settings.handshake_timeout
        """Seconds that a TLS handshake may take."""
        self._sessions = sessions
        self._pool = pool
        self._tls = tls
        self._shakes: set[Handshake] = set()
        self._green: dict[str, _Green] = {}
        self._ripening = Deadlines[_Green](RIPENING, self._look)

    def take(self, sock: socket.socket, host: str, pending: PendingConnection | None) -> None:
        """Take a connection: only from where the seed client is.

        Args:
            pending: the newest silent connection of that address, if there is one; ours now.
        """
        current = self._sessions.seed_client()
        if pending is not None and current is not None:
            if current.host == host and current.control is not None and current.control.is_stalled:
                self._sessions.replace(current)
            else:
                # A probe from the same address, or a second client: whoever answers keeps
                # the place, or any port check could take it.
                self._turn_away_second(pending, current)
                pending = None
        if pending is not None:
            current = self._sessions.seat_seed(pending)
        if current is None or current.host != host:
            tcp.reset(sock)
            self._counters.strangers += 1
            self._log.repeated("warn", f"data {host}", "turned away at the data port", host=host)
        elif len(self._shakes) >= MAX_SHAKES or not self._make_room(current):
            self._sessions.refuse_link(sock, current)
        elif self._tls is None:
            self._give(current, sock, None)
        else:
            self._secure(current, sock, self._tls.accept(is_native=False))

    def close(self) -> None:
        """Give up the handshakes under way; idempotent."""
        for shake in self._shakes:
            shake.abort()  # its socket is closed when the engine has given it back
        self._ripening.close()
        for green in self._green.values():
            tcp.reset(green.link.sock)
        self._green.clear()

    def _secure(
        self, client: ConnectedClient, sock: socket.socket, connection: Connection
    ) -> None:
        try:
            shake = self._relays.shake(sock, connection)
        except EngineError:
            tcp.reset(sock)
            return
        except BaseException:
            tcp.reset(sock)
            raise
        self._shakes.add(shake)
        deadline = self._loop.call_later(self._timeout, shake.abort)
        shake.result.add_done_callback(
            functools.partial(self._on_secured, client, sock, shake, deadline)
        )

    def _on_secured(
        self,
        client: ConnectedClient,
        sock: socket.socket,
        shake: Handshake,
        deadline: asyncio.TimerHandle,
        result: asyncio.Future[HandshakeResult],
    ) -> None:
        deadline.cancel()
        self._shakes.discard(shake)
        if client is not self._sessions.seed_client() or result.cancelled():
            tcp.reset(sock)
        elif not result.result().is_done:
            tcp.finish(sock)  # not reset: an alert that says why may be on its way
            self._tell_failed(client, shake.connection, result.result())
        elif not self._make_room(client):
            self._sessions.refuse_link(sock, client)
        else:
            self._give(client, sock, Records(shake.connection))

    def _tell_failed(
        self, client: ConnectedClient, connection: Connection, outcome: HandshakeResult
    ) -> None:
        why = outcome.describe_failure(connection, is_server=True)
        self._counters.strangers += 1
        self._log.repeated(
            "warn",
            f"data {client.host} tls",
            "TLS failed at the data port",
            host=client.host,
            why=why,
        )

    def _give(self, client: ConnectedClient, sock: socket.socket, records: Records | None) -> None:
        link_id = self._fresh_id(client)
        line = link_id.encode()
        try:
            # One segment, one record: the Go client reads it in one call.
            sock.send(line if records is None else records.seal(line))
        except (OSError, TlsError):
            tcp.reset(sock)
            return
        self._counters.links += 1
        client.brought += 1
        tls = None if records is None else records.connection
        green = _Green(client, Link(sock, link_id, tls=tls), self._loop.time())
        self._green[link_id] = green
        self._ripening.add(green)

    def _look(self, green: _Green) -> None:
        link = green.link
        if green.is_acknowledged:
            del self._green[str(link.name)]
            if tcp.has_ended(link.sock):
                tcp.reset(link.sock)
                self._counters.links_lost += 1
            else:
                self._pool.give(green.client, link)
        elif self._loop.time() - green.since > self._timeout:
            del self._green[str(link.name)]
            tcp.reset(link.sock)
        else:
            green.is_acknowledged = tcp.is_acknowledged(link.sock)
            self._ripening.add(green)

    def _make_room(self, client: ConnectedClient) -> bool:
        return self._sessions.make_room(client, len(self._green))

    def _fresh_id(self, client: ConnectedClient) -> str:
        while True:
            link_id = secrets.token_hex(SEED_ID_SIZE // 2)
            if link_id not in self._green and not client.has_link(link_id):
                return link_id

    def _turn_away_second(self, pending: PendingConnection, current: ConnectedClient) -> None:
        tcp.reset(pending.sock)
        self._counters.strangers += 1
        self._log.repeated(
            "warn",
            f"second seed {pending.host}",
            "a second NodePass 1.0.3/1.0.4 client was turned away: there can be one at a time",
            host=pending.host,
            served=current.host,
        )
