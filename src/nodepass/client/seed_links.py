"""New links of a seed session, each from its dial to the id that the server gives it.

Owns: nothing beyond the task of each. Same calls as `link_dialer`. Called by `session`.

    connect ──> [TLS ──>] id ──> on_end(link)
       └──────────┴────────┴───> on_end(what was wrong)
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from nodepass.errors import NodePassError, PeerWireError, PoolError
from nodepass.net import tcp, tcp_dial
from nodepass.protocol import lines
from nodepass.protocol.messages import SEED_ID_SIZE
from nodepass.tls.codec import Records
from nodepass.tunnel.context import Context
from nodepass.tunnel.idle_links import Link

from .refill import OnEnd
from .server_dialer import Agreement, ServerDialer

TLS_READ_SIZE: Final = 16384
"""Bytes per read of a TLS link's first bytes: a handshake's end and an id are well below it."""


class SeedLinkDialer:
    """Every link that one seed session is making."""

    def __init__(self, context: Context, dialer: ServerDialer, agreement: Agreement) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = context.settings
        self._counters = context.counters
        self._spawn = context.spawn
        self._dialer = dialer
        self._agreement = agreement

    def begin(self, on_end: OnEnd) -> None:
        """Make a link.

        Args:
            on_end: called once with the link, or with the NodePassError or OSError that was in
                its way.
        """
        self._spawn(self._make(on_end), "dialling a link")

    def close(self) -> None:
        """Nothing: a seed link that comes too late is reset by who has asked for it."""

    async def _make(self, on_end: OnEnd) -> None:
        try:
            link = await self._dial()
        except (NodePassError, OSError) as exc:
            on_end(exc)
            return
        except BaseException:
            on_end(PoolError("its making was cut short"))
            raise
        on_end(link)

    async def _dial(self) -> Link:
        server = self._agreement
        sock = await tcp_dial.dial(server.host, server.port, self._settings.dial_timeout)
        said = b""
        records: Records | None = None
        try:
            if server.tls:
                records = await self._dialer.secure(sock, server.tls, is_native=False)
        except BaseException:
            tcp.finish(sock)  # not reset: an alert that says why may be on its way
            raise
        try:
            async with asyncio.timeout(self._settings.handshake_timeout):
                if records is not None:
                    said = records.open(b"")
                while len(said) < SEED_ID_SIZE:
                    said += await self._read(sock, SEED_ID_SIZE - len(said), records)
            head = said[SEED_ID_SIZE:]
            name = said[:SEED_ID_SIZE].decode("ascii", errors="replace")
            if not lines.is_seed_id(name):
                raise PeerWireError("the data port gave no id of 8 hex characters")
        except BaseException as exc:
            # With its name given it may be a link there, and a visitor on it already.
            end = tcp.reset if said else tcp.finish
            end(sock)
            if isinstance(exc, TimeoutError):
                raise PeerWireError("the data port gave no id in time") from exc
            raise
        self._counters.links += 1
        return Link(sock, name, head, None if records is None else records.connection)

    async def _read(self, sock: socket.socket, missing: int, records: Records | None) -> bytes:
        # Without TLS not a byte more than the id: what follows may be a visitor's already.
        data = await self._loop.sock_recv(sock, missing if records is None else TLS_READ_SIZE)
        if not data or (records is not None and records.has_ended):
            raise PeerWireError("the data port closed before giving an id")
        return data if records is None else records.open(data)
