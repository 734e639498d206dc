"""The server's clients: their sessions, how they come, what they say, how they go.

Owns: the table of live sessions and their control channels. Finds nothing out about pending
connections (`acceptor` does) and knows nothing of visitors; fills the `pool` with links and takes
them away again. Called by `server`.

    hello ──proof holds──> seated ──bye, silence, EOF, replaced by name──> unseated
    silent connection + data connection of its address ──`seed_port`──> seated as the seed client
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Final

from nodepass.errors import AuthError, PoolClosed, PoolTimeout, TlsError, TunnelError
from nodepass.net import descriptors, hosts, tcp
from nodepass.net.readiness import Watch
from nodepass.protocol import lines
from nodepass.protocol.messages import (
    KEY_SIZE,
    SESSION_SIZE,
    Dialect,
    Drain,
    Fail,
    Failure,
    Hello,
    LinkClaim,
    Refusal,
    Refuse,
)
from nodepass.protocol.proof import LinkKey
from nodepass.protocol.session import Event, Lost, Role, Session
from nodepass.tunnel.context import Context
from nodepass.tunnel.control import Control
from nodepass.tunnel.demand import Demand
from nodepass.tunnel.idle_links import IdleLinks, Link
from nodepass.tunnel.pool import Pool, announce

from .connected_client import ConnectedClient
from .pending import PendingConnection
from .throttle import Throttle

MAX_CLIENTS: Final = 1024
"""Sessions at once: bounds what somebody can make us keep where no password is asked."""
CLIENT_SHARE: Final = 1
"""A source (address, or /64) may have so many times the sessions that are left, where no password
is asked: alone it gets half of all, beside another a third, so that there is room for others."""
MAX_GONE: Final = 1024
"""Lost sessions with open relays that are remembered for the return of their clients."""


class Sessions:
    """Every client of one server.

    Args:
        pool: where their links go.
        watch: tells of idle links that die.
        shares: how many idle links may be asked for and kept.
        throttle: told of failed proofs.
    """

    def __init__(
        self,
        context: Context,
        pool: Pool,
        watch: Watch,
        shares: descriptors.Shares,
        throttle: Throttle,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = context.settings
        self._log = context.log
        self._counters = context.counters
        self._spawn = context.spawn
        self._throttle = throttle
        self._pool = pool
        self._watch = watch
        self._most_idle = shares.idle
        self._stock = shares.stock
        self.on_client_full: Callable[[], None] = lambda: None
        """Called when a client has no slot for a visitor although we have."""
        self.arrival: tuple[str, int] | None = None
        """Where visitors arrive, as clients are told: address, or "" for any, and port."""
        self._clients: dict[str, ConnectedClient] = {}
        self._sources: Counter[str] = Counter()
        self._gone: deque[ConnectedClient] = deque(maxlen=MAX_GONE)
        """Clients whose sessions have ended before their relays."""

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[ConnectedClient]:
        return iter(list(self._clients.values()))

    def count_from(self, source: str) -> int:
        """Count the clients that are connected from a source, as `hosts.source_of` names it."""
        return self._sources.get(source, 0)

    def has_native(self, host: str) -> bool:
        """Tell whether a native client is connected from an address."""
        return any(
            c.host == host and c.session.dialect is Dialect.NATIVE for c in self._clients.values()
        )

    def why_no_link(self, exc: PoolTimeout | PoolClosed) -> str:
        """Say in a clause why a visitor got no link."""
        return str(exc) if self._clients else "no client is connected"

    def _refuse_crowd(self, source: str, name: str, *, is_open: bool) -> None:
        """Raise TunnelError where there are as many sessions as there may be.

        Args:
            name: of the newcomer; who replaces a session of its source makes none more.
            is_open: whether anybody may have one, so that no source may have them all.
        """
        left = MAX_CLIENTS - len(self._clients)
        held = self._sources.get(source, 0)
        if left > 0 and (not is_open or held < CLIENT_SHARE * left):
            return
        if held and any(
            client.name == name
            and client.session.dialect is Dialect.NATIVE
            and hosts.source_of(client.host) == source
            for client in self._clients.values()
        ):
            return
        if left <= 0:
            raise TunnelError(f"there are {MAX_CLIENTS} clients", reason=Refusal.LIMIT)
        text = f"there are {held} clients of this address, and room for only {left} more"
        raise TunnelError(text, reason=Refusal.LIMIT)

    def seed_client(self) -> ConnectedClient | None:
        """Return the client that speaks the seed dialect; there is one at a time."""
        return next((c for c in self._clients.values() if c.session.dialect is Dialect.SEED), None)

    def seat_seed(self, pending: PendingConnection) -> ConnectedClient:
        """Make a silent connection the seed client; its socket is ours from here on."""
        session_id, name = secrets.token_hex(SESSION_SIZE), f"seed-{pending.host}"
        return self._seat(pending, Dialect.SEED, session_id, name, None, self._demand())

    def take_opening(self, pending: PendingConnection, opening: Hello | LinkClaim) -> None:
        """Take a connection that has said what it is; its socket is ours from here on."""
        if isinstance(opening, LinkClaim):
            self._take_link(pending, opening)
        else:
            self._take_hello(pending, opening)

    def end_period(self) -> None:
        """Look back on a report period: ask for fewer links of clients that have been quiet."""
        for member in self._pool:
            surplus = member.demand.end_period()
            if surplus and member.session.dialect is Dialect.NATIVE:
                announce(member)
                member.idle_links.retire(
                    min(surplus, len(member.idle_links) - member.demand.wanted)
                )

    def drain(self) -> None:
        """Tell every client that nothing will be launched any more."""
        for client in self:
            client.session.drain()

    def close(self, reason: str) -> None:
        """End every session; idempotent."""
        for client in self:
            if client.control is not None:
                client.control.close(reason)
            self._unseat(client)

    def _take_link(self, pending: PendingConnection, claim: LinkClaim) -> None:
        client = self._clients.get(claim.session)
        key = None if client is None else client.key
        if client is None or key is None or not pending.handshake.is_link_proven(claim, key):
            # A link of a session that has just ended is no attack; it has no key to prove.
            tcp.reset(pending.sock)
            if client is not None:
                self._throttle.fail(pending.source, self._loop.time())
                self._counters.strangers += 1
                self._log.repeated(
                    "warn", f"link {pending.host}", "a link's proof was wrong", host=pending.host
                )
            return
        if client.has_link(claim.number) or not self.make_room(client):
            self.refuse_link(pending.sock, client)
            return
        self._counters.links += 1
        link = Link(pending.sock, claim.number, pending.handshake.rest(), pending.tls)
        self._pool.give(client, link)

    def make_room(self, client: ConnectedClient, coming: int = 0) -> bool:
        """Make room for one more link of a client, if need be by dropping one of another's.

        Args:
            coming: links of it that are not idle yet.

        Returns:
            Whether there is room; otherwise it has brought as many as we keep.
        """
        if len(client.idle_links) + coming >= descriptors.IDLE_ROOM * self._most_idle:
            return False
        # Pending connections are watched along with the links; only where that is too many we
        # count.
        if len(self._watch) < self._stock or self._count_idle() < self._stock:
            return True
        # Full: who has most gives way, so that one client cannot starve the others.
        fattest = max(self._pool, key=lambda member: len(member.idle_links))
        if len(fattest.idle_links) <= len(client.idle_links) + 1:
            return False
        fattest.idle_links.retire(1)
        return True

    def _count_idle(self) -> int:
        return sum(len(member.idle_links) for member in self._pool)

    def refuse_link(self, sock: socket.socket, client: ConnectedClient) -> None:
        """Reset a link that there is no room for."""
        tcp.reset(sock)
        self._log.repeated("warn", f"surplus {client.name}", "a link too many", client=client.name)

    def _take_hello(self, pending: PendingConnection, hello: Hello) -> None:
        session_id = secrets.token_hex(SESSION_SIZE)
        demand = self._demand()
        try:
            self._refuse_crowd(
                pending.source, hello.name, is_open=not pending.handshake.needs_password
            )
            welcome, key = pending.handshake.accept(
                hello,
                session=session_id,
                idle=demand.wanted,
                fresh_key=secrets.token_bytes(KEY_SIZE),
                at=self.arrival,
            )
            pending.send(welcome)
        except (OSError, TlsError) as exc:
            tcp.reset(pending.sock)
            self._log.debug("a client left during its handshake", host=pending.host, why=str(exc))
            return
        except TunnelError as exc:
            if isinstance(exc, AuthError):
                self._throttle.fail(pending.source, self._loop.time())
            self._refuse(pending, exc)
            return
        for other in list(self._clients.values()):
            if other.name == hello.name and other.session.dialect is Dialect.NATIVE:
                self.replace(other)
        link_key = LinkKey(key, session_id)
        self._seat(pending, Dialect.NATIVE, session_id, hello.name, link_key, demand)

    def _refuse(self, pending: PendingConnection, exc: TunnelError) -> None:
        try:
            pending.send(lines.pack_answer(Refuse(exc.reason)))
        except (OSError, TlsError) as error:
            self._log.debug("a refused client left first", host=pending.host, why=str(error))
        tcp.finish(pending.sock)
        self._counters.strangers += 1
        self._log.repeated(
            "warn", f"refused {pending.host}", "client refused", host=pending.host, why=str(exc)
        )

    def replace(self, old: ConnectedClient) -> None:
        """End a session because a newer one takes its place."""
        self._log.bounded(
            "info",
            f"replaced {old.name}",
            "client replaced by a newer one of its name",
            client=old.name,
            host=old.host,
        )
        if old.control is not None:
            old.control.close("replaced")
        self._unseat(old)

    def _seat(
        self,
        pending: PendingConnection,
        dialect: Dialect,
        session_id: str,
        name: str,
        key: LinkKey | None,
        demand: Demand,
    ) -> ConnectedClient:
        session = Session(
            Role.SERVER, dialect, now=self._loop.time(), interval=self._settings.report_interval
        )
        idle_links = IdleLinks(self._watch, self._count_lost_link)
        client = ConnectedClient(
            session, idle_links, demand, id=session_id, name=name, host=pending.host, key=key
        )
        client.control = Control(session, functools.partial(self._on_event, client))
        self._clients[session_id] = client
        self._sources[hosts.source_of(client.host)] += 1
        self._counters.sessions += 1
        self._pool.add(client)
        self._welcome_back(client)
        self._spawn(self._run_control(client, pending), "a control channel")
        origin = {"from": pending.address}
        self._log.bounded(
            "info", f"connected {name}", "client connected", client=name, dialect=dialect, **origin
        )
        return client

    async def _run_control(self, client: ConnectedClient, pending: PendingConnection) -> None:
        assert client.control is not None
        interval = self._settings.report_interval
        try:
            head = pending.handshake.rest()
            await client.control.open(pending.sock, interval, head, pending.records)
        except (OSError, TunnelError) as exc:
            for event in client.session.cut(str(exc), self._loop.time()):
                self._on_event(client, event)

    def _unseat(self, client: ConnectedClient) -> None:
        if self._clients.get(client.id) is client:
            del self._clients[client.id]
            self._doubt(client)
            source = hosts.source_of(client.host)
            self._sources[source] -= 1
            if not self._sources[source]:
                del self._sources[source]
        self._pool.remove(client)

    def _doubt(self, client: ConnectedClient) -> None:
        """Doubt the links of a session that has ended: its path may have gone with it."""
        if client.relays:
            client.doubt_links()
            self._gone.append(client)

    def _welcome_back(self, client: ConnectedClient) -> None:
        """Ask the links of a client's earlier sessions whether they have survived."""
        self._gone = deque((gone for gone in self._gone if gone.relays), MAX_GONE)
        for gone in self._gone:
            if gone.name == client.name:
                gone.doubt_links(is_back=True)

    def _on_event(self, client: ConnectedClient, event: Event) -> None:
        if isinstance(event, Fail):
            self._fail(client, event)
        elif isinstance(event, Drain):
            if client.has_drained:
                return
            client.has_drained = True
            self._log.bounded(
                "info", f"stopping {client.name}", "client is stopping", client=client.name
            )
            client.idle_links.clear()
        elif isinstance(event, Lost):
            self._unseat(client)
            if event.is_flood:  # it would be back at once
                self._throttle.fail(hosts.source_of(client.host), self._loop.time())
            self._log.bounded(
                "info" if event.is_orderly else "warn",
                f"lost {client.name}",
                "tunnel lost",
                client=client.name,
                host=client.host,
                reason=event.reason,
                relays_open=client.relays,
            )
            if event.silent_since is not None:
                self._abort_unheard(client, event.silent_since)

    def _abort_unheard(self, client: ConnectedClient, since: float) -> None:
        """Reset the visitors of whom a silent client may never have been told.

        Control loss does not touch relays; but a launch that went into the silence and has
        brought no byte back would keep its visitor waiting for as long as TCP tries, and
        nobody would say a word.
        """
        # What was launched within the round trip before the last byte may be unheard, too.
        since -= client.session.rtt or self._settings.report_interval
        for relay, launched_at in list(client.launched.values()):
            if launched_at >= since and relay.live()[1] == 0:
                relay.abort()

    def _fail(self, client: ConnectedClient, event: Fail) -> None:
        launch = client.launched.get(event.number)
        if not client.blame(event.number):
            return  # it was never launched, or long ago, or has been told before
        if launch is not None:
            relay, _ = launch
            relay.abort()
        if event.why == Failure.LIMIT:
            self.on_client_full()
        self._counters.launches_failed += 1
        self._counters.visitors_refused += 1
        self._log.repeated(
            "warn",
            f"fail {client.name} {event.why}",
            "the client could not reach its target",
            client=client.name,
            why=event.why,
        )

    def _demand(self) -> Demand:
        least = min(self._settings.min_pool_capacity, self._most_idle)
        return Demand(least, self._most_idle, self._loop.time())

    def _count_lost_link(self, _link: Link) -> None:
        self._counters.links_lost += 1
