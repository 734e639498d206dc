"""The server: listens for clients and for visitors, and joins the two.

Owns: the three listeners, the sessions of its clients, the visitors that wait, and which
link each gets. Never dials. What a connection is, `entrance` finds out; which link is next,
`pool` says; the bytes are the engine's.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import secrets
import socket
from dataclasses import dataclass, field
from typing import Final

from . import net, wire
from .config import Mode
from .control import Control
from .entrance import Caller, Entrance
from .errors import EngineError, PoolClosed, PoolTimeout, TunnelError
from .message import (
    KEY_SIZE,
    SEED_ID_SIZE,
    SESSION_SIZE,
    Dialect,
    Drain,
    Fail,
    Hello,
    Kind,
    LinkClaim,
    Refuse,
)
from .pool import Demand, Link, Member, Pool, Shelf, announce
from .relay import Relay, RelayResult
from .session import Event, Lost, Role, Session
from .stats import TunnelStatistics, least_rtt
from .tunnel import Tunnel

BURST_ROOM: Final = 2
"""Idle links a session may bring per link wanted: more is a client out of bounds."""


@dataclass(slots=True, eq=False)
class Client(Member):
    """One session of ours: a pool member and how to talk to it."""

    id: str = ""
    name: str = ""
    host: str = ""
    key: bytes = b""
    control: Control | None = None
    launched: dict[int | str, Relay] = field(default_factory=dict)
    """Open relays by link, so that a `fail` finds the one it speaks of."""


class Server(Tunnel):
    """The side that listens; see `Tunnel` for its arguments and life."""

    mode = Mode.SERVER

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._listeners: list[net.Listener] = []
        self._clients: dict[str, Client] = {}
        self._rest_timer: asyncio.TimerHandle | None = None
        self._visitors = 0
        self._pool = Pool()
        self._watch = net.HangupWatch()
        self._entrance = Entrance(
            self.log, self.settings.handshake_timeout, self._take_opening, self._count_stranger
        )
        tunnel, target = self.config.tunnel, self.config.target
        self._tunnel = await self._listen(tunnel.host, tunnel.port, self._entrance.admit)
        self._target = await self._listen(target.host, target.port, self._admit_visitor)
        self._data: net.Listener | None = None
        if self.config.compat:
            self._data = await self._listen(tunnel.host, self.config.data, self._admit_seed_link)
            self._entrance.data_port = self._data.address[1]

    async def _listen(self, host: str, port: int, on_accept: net.OnAccept) -> net.Listener:
        listener = net.Listener(await net.listen(host, port), on_accept, self._tell_exhausted)
        self._listeners.append(listener)
        return listener

    def _begin(self) -> None:
        for listener in self._listeners:
            listener.resume()
        self._rest_timer = self._loop.call_later(self.settings.report_interval, self._rest)
        data = {} if self._data is None else {"data": self._data.address[1]}
        self.log.info(
            "server listening",
            tunnel=net.join_address(*self._tunnel.address),
            target=net.join_address(*self._target.address),
            **data,
            engine=self.relays.kind,
        )
        self.log.info(
            "no password and no TLS: whoever reaches the tunnel port can become a client, and "
            "whoever sees the wire can read it"
        )

    async def _drain(self) -> None:
        self._target.close()
        self._tunnel.close()
        for client in self._clients.values():
            client.session.drain()
        await asyncio.sleep(0)  # the drain lines leave before the idle links go
        self._entrance.close()
        self._pool.close()
        if self._open_relays:
            self.log.info("waiting for open relays", relays=len(self._open_relays))
        await self.wait_relays(self.settings.shutdown_timeout)

    def _shut(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
        for listener in self._listeners:
            listener.close()
        self._entrance.close()
        self._pool.close()
        for client in list(self._clients.values()):
            if client.control is not None:
                client.control.close("stopped")
        self._clients.clear()
        self._watch.close()

    def statistics(self) -> TunnelStatistics:
        up, down = self.live_bytes()
        members = list(self._pool)
        counters = self.counters
        return TunnelStatistics(
            mode=str(self.mode),
            sessions_open=len(self._clients),
            sessions=counters.sessions,
            visitors_open=self._visitors,
            visitors_waiting=self._pool.waiting,
            visitors=counters.visitors,
            visitors_refused=counters.visitors_refused,
            relays_open=len(self._open_relays),
            relays_reset=counters.relays_reset,
            launches_failed=counters.launches_failed,
            links_idle=sum(len(member.shelf) for member in members),
            links_wanted=sum(member.demand.wanted for member in members),
            links=counters.links,
            links_lost=counters.links_lost,
            strangers=counters.strangers,
            bytes_up=up,
            bytes_down=down,
            rtt=least_rtt(client.session.rtt for client in self._clients.values()),
        )

    @property
    def tunnel_address(self) -> tuple[str, int]:
        """Host and port that clients dial."""
        return self._tunnel.address

    @property
    def target_address(self) -> tuple[str, int]:
        """Host and port that visitors dial."""
        return self._target.address

    # --------------------------------------------------------------------- visitors

    def _admit_visitor(self, sock: socket.socket, host: str, port: int) -> None:
        self.counters.visitors += 1
        self._visitors += 1
        if self._visitors >= self.settings.semaphore_limit:
            self._target.pause()
            self.log.repeated(
                "warn",
                "limit",
                "as many visitors as SEMAPHORE_LIMIT allows; more wait in the kernel's queue",
                limit=self.settings.semaphore_limit,
            )
        found = self._pool.take_nowait()
        if found is not None:
            self._join(sock, net.join_address(host, port), *found)
        else:
            self.spawn(self._join_later(sock, net.join_address(host, port)), "waiting for a link")

    async def _join_later(self, sock: socket.socket, visitor: str) -> None:
        try:
            member, link = await self._pool.take(self.settings.dial_timeout)
        except (PoolTimeout, PoolClosed) as exc:
            net.reset(sock)
            self.counters.visitors_refused += 1
            self._free_slot()
            hint = "no client is connected" if not self._clients else str(exc)
            self.log.repeated("warn", "no link", "a visitor was turned away", why=hint)
            return
        except BaseException:
            net.reset(sock)
            self._free_slot()
            raise
        self._join(sock, visitor, member, link)

    def _join(self, sock: socket.socket, visitor: str, member: Member, link: Link) -> None:
        assert isinstance(member, Client)
        try:
            relay = self.relays.join(sock, link.sock, head_b=link.head)
        except EngineError as exc:
            net.reset(sock)
            net.reset(link.sock)
            self.counters.visitors_refused += 1
            self._free_slot()
            self.log.repeated("error", "engine", "a visitor was turned away", why=exc)
            return
        member.session.launch(Kind.TCP, link.name, visitor)
        member.relays += 1
        member.launched[link.name] = relay
        if member.demand.take(self._loop.time()):
            announce(member)
        self.hold(relay)
        relay.result.add_done_callback(
            functools.partial(self._part, relay, member, link.name, visitor)
        )

    def _part(
        self,
        relay: Relay,
        client: Client,
        name: int | str,
        visitor: str,
        result: asyncio.Future[RelayResult],
    ) -> None:
        client.relays -= 1
        del client.launched[name]
        self._free_slot()
        if result.cancelled():
            return
        outcome = result.result()
        self.release(relay, outcome)
        if self.log.is_debug:
            self.log.debug(
                "relay ended",
                visitor=visitor,
                client=client.name,
                link=name,
                up=outcome.up,
                down=outcome.down,
                reason=outcome.describe(),
            )

    def _free_slot(self) -> None:
        self._visitors -= 1
        if self._target.is_paused and not self.is_stopping:
            self._target.resume()

    # ---------------------------------------------------------------------- clients

    def _take_opening(self, caller: Caller, opening: Hello | LinkClaim) -> None:
        if isinstance(opening, LinkClaim):
            self._take_link(caller, opening)
        else:
            self._take_hello(caller, opening)

    def _take_link(self, caller: Caller, claim: LinkClaim) -> None:
        client = self._clients.get(claim.session)
        if client is None or not caller.handshake.is_link_proven(claim, client.key):
            # A link of a session that has just ended is no attack; it has no key to prove.
            net.reset(caller.sock)
            if client is not None:
                self._count_stranger()
                self.log.repeated(
                    "warn", f"link {caller.host}", "a link's proof was wrong", host=caller.host
                )
            return
        is_taken = claim.number in client.shelf or claim.number in client.launched
        if is_taken or len(client.shelf) >= BURST_ROOM * self.settings.max_pool_capacity:
            net.reset(caller.sock)
            self.log.repeated("warn", "surplus", "a link too many", client=client.name)
            return
        self.counters.links += 1
        self._pool.give(client, Link(caller.sock, claim.number, caller.handshake.rest()))

    def _take_hello(self, caller: Caller, hello: Hello) -> None:
        session_id = secrets.token_hex(SESSION_SIZE)
        demand = self._demand()
        try:
            welcome, key = caller.handshake.accept(
                hello,
                session=session_id,
                idle=demand.wanted,
                fresh_key=secrets.token_bytes(KEY_SIZE),
            )
            caller.sock.send(welcome)
        except TunnelError as exc:
            self._refuse(caller, exc)
            return
        except OSError as exc:
            caller.sock.close()
            self.log.debug("a client left during its handshake", host=caller.host, why=exc)
            return
        for other in list(self._clients.values()):
            if other.name == hello.name and other.session.dialect is Dialect.NATIVE:
                self._replace(other)
        self._seat(caller, Dialect.NATIVE, session_id, hello.name, key, demand)

    def _refuse(self, caller: Caller, exc: TunnelError) -> None:
        try:
            caller.sock.send(wire.pack_answer(Refuse(exc.reason)))
        except OSError as error:
            self.log.debug("a refused client left first", host=caller.host, why=error)
        caller.sock.close()
        self._count_stranger()
        self.log.repeated(
            "warn", f"refused {caller.host}", "client refused", host=caller.host, why=exc
        )

    def _replace(self, old: Client) -> None:
        self.log.info("client replaced by a newer one of its name", client=old.name, host=old.host)
        if old.control is not None:
            old.control.close("replaced")
        self._unseat(old)

    def _seat(
        self,
        caller: Caller,
        dialect: Dialect,
        session_id: str,
        name: str,
        key: bytes,
        demand: Demand,
    ) -> Client:
        session = Session(
            Role.SERVER, dialect, now=self._loop.time(), interval=self.settings.report_interval
        )
        shelf = Shelf(self._watch, self._count_lost_link)
        client = Client(
            session, shelf, demand, id=session_id, name=name, host=caller.host, key=key
        )
        client.control = Control(session, functools.partial(self._on_event, client))
        self._clients[session_id] = client
        self.counters.sessions += 1
        self._pool.add(client)
        self.spawn(self._run_control(client, caller), "a control channel")
        self.log.info("client connected", client=name, host=caller.address, dialect=dialect)
        return client

    async def _run_control(self, client: Client, caller: Caller) -> None:
        assert client.control is not None
        interval = self.settings.report_interval
        try:
            await client.control.open(caller.sock, interval, caller.handshake.rest())
        except OSError as exc:
            for event in client.session.cut(str(exc)):
                self._on_event(client, event)

    def _unseat(self, client: Client) -> None:
        if self._clients.get(client.id) is client:
            del self._clients[client.id]
        self._pool.remove(client)

    def _on_event(self, client: Client, event: Event) -> None:
        if isinstance(event, Fail):
            self._fail(client, event)
        elif isinstance(event, Drain):
            self.log.info("client is stopping", client=client.name)
            client.shelf.clear()
        elif isinstance(event, Lost):
            self._unseat(client)
            self.log.warn(
                "tunnel lost",
                client=client.name,
                host=client.host,
                reason=event.reason,
                relays_open=client.relays,
            )

    def _fail(self, client: Client, event: Fail) -> None:
        relay = client.launched.get(event.number)
        if relay is None:
            return  # the reset of the link was here first
        self.counters.launches_failed += 1
        self.counters.visitors_refused += 1
        relay.abort()
        self.log.repeated(
            "warn",
            f"fail {client.name} {event.why}",
            "the client could not reach its target",
            client=client.name,
            why=event.why,
        )

    # ------------------------------------------------------------- the seed dialect

    def _admit_seed_link(self, sock: socket.socket, host: str, port: int) -> None:
        """Take a connection to the data port: only from where the seed client is."""
        caller = self._entrance.promote(host)
        current = next(
            (c for c in self._clients.values() if c.session.dialect is Dialect.SEED), None
        )
        if caller is not None and current is not None:
            if current.host != host:
                self._turn_away_second_seed(caller, current)
                caller = None
            else:
                self._replace(current)
        if caller is not None:
            name = f"seed-{host}"
            current = self._seat(
                caller, Dialect.SEED, secrets.token_hex(SESSION_SIZE), name, b"", self._demand()
            )
        if current is None or current.host != host:
            net.reset(sock)
            self._count_stranger()
            self.log.repeated("warn", f"data {host}", "turned away at the data port", host=host)
            return
        link_id = self._fresh_seed_id(current)
        try:
            sock.send(link_id.encode())  # one segment: the Go client reads it in one call
        except OSError:
            sock.close()
            return
        self.counters.links += 1
        self._pool.give(current, Link(sock, link_id))

    def _turn_away_second_seed(self, caller: Caller, current: Client) -> None:
        net.reset(caller.sock)
        self._count_stranger()
        self.log.repeated(
            "warn",
            f"second seed {caller.host}",
            "a second NodePass 1.0.3/1.0.4 client was turned away: there can be one at a time",
            host=caller.host,
            served=current.host,
        )

    def _fresh_seed_id(self, client: Client) -> str:
        while True:
            link_id = secrets.token_hex(SEED_ID_SIZE // 2)
            if link_id not in client.shelf and link_id not in client.launched:
                return link_id

    # ------------------------------------------------------------------------ small

    def _demand(self) -> Demand:
        settings = self.settings
        return Demand(settings.min_pool_capacity, settings.max_pool_capacity, self._loop.time())

    def _rest(self) -> None:
        """Close a report period: shrink what has been quiet."""
        for member in self._pool:
            surplus = member.demand.rest()
            if surplus and member.session.dialect is Dialect.NATIVE:
                announce(member)
                member.shelf.retire(min(surplus, len(member.shelf) - member.demand.wanted))
        self._rest_timer = self._loop.call_later(self.settings.report_interval, self._rest)

    def _count_stranger(self) -> None:
        self.counters.strangers += 1

    def _count_lost_link(self) -> None:
        self.counters.links_lost += 1

    def _tell_exhausted(self, exc: OSError) -> None:
        hint = "raise the limit of open files (ulimit -n)" if exc.errno == errno.EMFILE else ""
        self.log.repeated(
            "error", "exhausted", "cannot accept for the moment", why=exc.strerror, hint=hint
        )
