"""The server: listens for clients and for visitors, and joins the two.

Owns: the three listeners, the sessions of its clients, the visitors that wait, and which
link each gets. Never dials. What a connection is, `acceptor` finds out; which link is next,
`pool` says; the bytes are the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nodepass.config.url import Config, Mode
from nodepass.engine.relays import Relay, RelayResult, Relays, UdpRelay, UdpResult
from nodepass.errors import EngineError, PoolClosed, PoolTimeout
from nodepass.net import tcp
from nodepass.net.listener import Listener, OnAccept, listen
from nodepass.net.readiness import Watch
from nodepass.observe.stats import Datagrams, TunnelStatistics, least_rtt
from nodepass.protocol.messages import Kind
from nodepass.runtime import threads
from nodepass.tunnel.base import ABORT_GRACE, Tunnel
from nodepass.tunnel.pool import Link, Member, Pool, announce
from nodepass.tunnel.slots import Slots

from .acceptor import Acceptor
from .eviction import Eviction
from .seed_port import SeedPort
from .sessions import ConnectedClient, Sessions
from .throttle import Throttle
from .udp_visitors import UdpVisitors
from .unanswered import UnansweredLaunches

if TYPE_CHECKING:
    from nodepass.tls.contexts import ServerTls

NATIVE_PATIENCE: Final = 1.0
"""Seconds that a pending must have been silent to pass for a seed client where its address has
native clients too: their links are silent for a round trip, a second at the very worst."""


class Server(Tunnel):
    """The side that listens; see `Tunnel` for its arguments and life."""

    mode = Mode.SERVER

    def __init__(self, url: str | Config, *, relays: Relays | None = None) -> None:
        super().__init__(url, relays=relays)
        self._gates = UdpVisitors(self)

    async def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        key = await self.stretch_password()
        self._tls = await threads.run(self._load_tls)
        throttle = Throttle()
        shares = self.share_descriptors()
        self.slots = Slots(
            shares.visitors,
            keeps_for_tcp=self.config.tcp,
            on_full=self._on_full,
            resume_tcp=self._resume_tcp,
            admit_udp=self._gates.admit_one,
        )
        self._eviction = Eviction(
            shares.visitors,
            lambda: not self.slots.has_room,
            lambda source: self._sessions.count_from(source) > 0,
            self.log,
        )
        self.resources.callback(self._eviction.close)
        self._waiting = Watch()
        self.resources.callback(self._waiting.close)
        idle = Watch()
        self.resources.callback(idle.close)
        self.pool = Pool()
        self._sessions = Sessions(
            self.settings,
            self.log,
            self.counters,
            self.pool,
            idle,
            self.spawn,
            shares,
            throttle,
        )
        self._sessions.on_client_full = self._gates.make_room
        self.resources.callback(self._sessions.close, "stopped")
        self.resources.callback(self.pool.close)
        self._unanswered = UnansweredLaunches(self.log, self.counters)
        self.resources.callback(self._unanswered.close)
        self._acceptor = Acceptor(
            self.log,
            self.settings.handshake_timeout,
            self._sessions.take_opening,
            self._sessions.count_from,
            self.counters,
            self.relays,
            idle,
            key,
            self._tls,
            throttle,
        )
        self.resources.callback(self._acceptor.close)
        tunnel = self.config.tunnel
        self._tunnel = await self._listen(
            tunnel.host, tunnel.port, self._acceptor.admit, self._acceptor.make_room
        )
        await self._open_target()
        self._data: Listener | None = None
        self._seed_links: SeedPort | None = None
        if self.config.compat:
            self._seed_links = SeedPort(
                self.log,
                self.counters,
                self.settings.handshake_timeout,
                self._sessions,
                self.pool,
                self.relays,
                self._tls,
            )
            self.resources.callback(self._seed_links.close)
            self._data = await self._listen(tunnel.host, self.config.data, self._admit_seed_link)
            self._acceptor.data_port = self._data.address[1]

    async def _open_target(self) -> None:
        """Listen for visitors, TCP and UDP on one port."""
        host, port = self.config.target.host, self.config.target.port
        self._target: Listener | None = None
        if self.config.tcp:
            self._target = await self._listen(host, port, self._admit_visitor)
            port = self._target.address[1]
        self.resources.callback(self._gates.close)
        if self.config.udp:
            await self._gates.open(host, port)
        is_address = tcp.literal(host, port) is not None and "%" not in host
        self._sessions.arrival = (host if is_address else "", port)

    async def _listen(
        self,
        host: str,
        port: int,
        on_accept: OnAccept,
        relieve: Callable[[], None] = lambda: None,
    ) -> Listener:
        """Listen; `relieve` is called when there is trouble, to give something back."""

        def on_trouble(exc: OSError) -> None:
            relieve()
            self._tell_trouble(exc)

        socks = await listen(host, port, self.tell_absent)
        listener = Listener(socks, on_accept, on_trouble)
        self.resources.callback(listener.close)
        return listener

    def _begin(self) -> None:
        for listener in (self._tunnel, self._target, self._data):
            if listener is not None:
                listener.resume()
        self._gates.begin(has_tls=self._tls is not None)
        self._rest_timer = self._loop.call_later(self.settings.report_interval, self._rest)
        self.resources.callback(self._stop_resting)
        data = {} if self._data is None else {"data": self._data.address[1]}
        # Among several tunnels it is the label of each line.
        tunnel = {"tunnel": tcp.join_address(*self._tunnel.address)}
        self.log.info(
            "server listening",
            **({} if self.config.label else tunnel),
            target=tcp.join_address(*self._target_address),
            carries=self.config.carries,
            **data,
            tls=self.config.tls,
            engine=self.relays.kind,
        )
        if self._tls is not None:
            self.log.info("certificate", fingerprint=self._tls.fingerprint)
        self._warn_of_risks()

    def _load_tls(self) -> ServerTls | None:
        if not self.config.tls:
            return None
        selector = self.relays.alpn_selector  # first: it says what is wrong with OpenSSL
        from nodepass.tls.contexts import ServerTls

        return ServerTls(self.config.tls, self.config.crt, self.config.key, self.log, selector)

    def _reload(self, *, force: bool) -> bool:
        if self._tls is None or self._tls.mode == 1:
            return False
        self._tls.reload(force=force)
        return True

    def _warn_of_risks(self) -> None:
        has_password = self.config.password is not None
        if not has_password and self._tls is None:
            self.log.warn(
                "no password and no TLS: whoever reaches the tunnel port can become a client, "
                "and whoever sees the wire can read it"
            )
        elif not has_password:
            self.log.warn("no password: whoever reaches the tunnel port can become a client")
        elif self._tls is None:
            self.log.warn("no TLS: whoever sees the wire can read it; add tls=1 or tls=2")

    async def _drain(self) -> None:
        if self._target is not None:
            self._target.close()
        self._gates.shut()
        self.hurry()
        self._tunnel.close()
        self._sessions.drain()
        await asyncio.sleep(0)  # the drain lines leave before the idle links go
        self._acceptor.close()
        self.pool.close()
        if self._open_relays:
            self.log.info("waiting for open relays", relays=len(self._open_relays))
        await self.wait_relays(self.settings.shutdown_timeout)

    async def _let_go(self) -> None:
        await self._gates.wait_closed(ABORT_GRACE)

    def datagrams(self) -> Datagrams:
        return Datagrams.total([super().datagrams(), self._gates.datagrams()])

    def _look(self) -> TunnelStatistics:
        up, down = self.live_bytes()
        members = list(self.pool)
        counters = self.counters
        return TunnelStatistics(
            mode=str(self.mode),
            sessions_open=len(self._sessions),
            sessions=counters.sessions,
            visitors_open=self.slots.taken + self._gates.waiting,
            visitors_waiting=self.pool.waiting + self._gates.waiting,
            visitors=counters.visitors,
            visitors_refused=counters.visitors_refused,
            relays_open=len(self._open_relays),
            relays_reset=counters.relays_reset,
            launches_failed=counters.launches_failed,
            links_idle=sum(len(member.idle_links) for member in members),
            links_wanted=sum(member.demand.wanted for member in members),
            links=counters.links,
            links_lost=counters.links_lost,
            strangers=counters.strangers,
            bytes_up=up,
            bytes_down=down,
            datagrams=self.datagrams(),
            rtt=least_rtt(client.session.rtt for client in self._sessions),
        )

    @property
    def tunnel_address(self) -> tuple[str, int]:
        """Host and port that clients dial."""
        self.require_running()
        return self._tunnel.address

    @property
    def target_address(self) -> tuple[str, int]:
        """Host and port that visitors dial."""
        self.require_running()
        return self._target_address

    @property
    def _target_address(self) -> tuple[str, int]:
        address = self._gates.address if self._target is None else self._target.address
        assert address is not None, "nothing is listened on"
        return address

    # ------------------------------------------------------------------------- slots

    def _on_full(self) -> None:
        if not self.slots.has_room:
            if self._target is not None:
                self._target.pause()
            self.log.repeated(
                "warn",
                "limit",
                "as many visitors as SEMAPHORE_LIMIT allows; more wait",
                limit=self.slots.limit,
            )
            self._eviction.press()
        self._gates.make_room()

    def _resume_tcp(self) -> bool:
        if self._target is None or not self._target.is_paused or self.is_stopping:
            return False
        self._target.resume()
        return True

    # --------------------------------------------------------------------- visitors

    def _admit_visitor(self, sock: socket.socket, host: str, port: int) -> None:
        self.counters.visitors += 1
        self.slots.take()
        found = self.pool.take_nowait()
        if found is not None:
            self._join(sock, tcp.join_address(host, port), *found)
        else:
            self.spawn(self._join_later(sock, tcp.join_address(host, port)), "waiting for a link")

    async def _join_later(self, sock: socket.socket, visitor: str) -> None:
        waiting = asyncio.current_task()
        is_gone = False

        def leave() -> None:
            nonlocal is_gone
            if not tcp.is_alive(sock):  # a clean end is no reason: an answer may be wanted
                is_gone = True
                assert waiting is not None
                waiting.cancel()

        with contextlib.suppress(OSError):  # no room in the kernel: then it waits unwatched
            self._waiting.hangup(sock, leave)
        try:
            member, link = await self.pool.take(self.settings.dial_timeout)
        except (PoolTimeout, PoolClosed) as exc:
            self._waiting.remove(sock)
            self._turn_away(sock, "warn", "no link", self.why_no_link(exc))
            return
        except BaseException:
            self._waiting.remove(sock)
            tcp.reset(sock)
            self.slots.give()
            if is_gone and waiting is not None and not waiting.uncancel():
                return  # the visitor has gone; that is all
            raise
        self._waiting.remove(sock)
        self._join(sock, visitor, member, link)

    def _turn_away(self, sock: socket.socket, level: str, key: str, why: object) -> None:
        tcp.reset(sock)
        self.counters.visitors_refused += 1
        self.slots.give()
        self.log.repeated(level, key, "a visitor was turned away", why=why)

    def why_no_link(self, exc: PoolTimeout | PoolClosed) -> str:
        """Say in a clause why a visitor got no link."""
        return str(exc) if len(self._sessions) else "no client is connected"

    def _join(self, sock: socket.socket, visitor: str, member: Member, link: Link) -> None:
        assert isinstance(member, ConnectedClient)
        try:
            relay = self.relays.join(sock, link.sock, tls_b=link.tls, head_b=link.head)
        except EngineError as exc:
            tcp.reset(link.sock)
            self._turn_away(sock, "error", "engine", exc)
            return
        except BaseException:
            tcp.reset(link.sock)
            tcp.reset(sock)
            self.slots.give()
            raise
        self._eviction.join(relay, visitor)
        self.launch(relay, member, link.name, visitor)

    def launch(
        self, relay: Relay | UdpRelay, client: ConnectedClient, name: int | str, visitor: str
    ) -> None:
        """Tell a client of the visitor that has been joined with a link of it.

        Args:
            name: of the link.
            visitor: address, for the client's log.
        """
        kind = Kind.UDP if isinstance(relay, UdpRelay) else Kind.TCP
        client.session.launch(kind, name, visitor)
        if isinstance(name, str):
            self._unanswered.begin(relay, client, kind, name)
        now = self._loop.time()
        client.join(name, relay, now)
        if client.demand.take(now):
            announce(client)
        self.hold(relay)
        relay.result.add_done_callback(functools.partial(self._part, relay, client, name, visitor))

    def _part(
        self,
        relay: Relay | UdpRelay,
        client: ConnectedClient,
        name: int | str,
        visitor: str,
        result: asyncio.Future[RelayResult] | asyncio.Future[UdpResult],
    ) -> None:
        if isinstance(relay, Relay):
            self._eviction.part(relay)
        self.slots.give(is_udp=isinstance(relay, UdpRelay))
        client.part(name)
        self._unanswered.end(relay)
        if result.cancelled():
            self.forget(relay)
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

    # ------------------------------------------------------------------------ small

    def _admit_seed_link(self, sock: socket.socket, host: str, _port: int) -> None:
        patience = NATIVE_PATIENCE if self._sessions.has_native(host) else 0.0
        assert self._seed_links is not None
        self._seed_links.take(sock, host, self._acceptor.promote(host, patience))

    def _stop_resting(self) -> None:
        self._rest_timer.cancel()

    def _rest(self) -> None:
        self._sessions.rest()
        self._rest_timer = self._loop.call_later(self.settings.report_interval, self._rest)

    def tell_absent(self, address: str) -> None:
        """Say that an address is not listened on, since this machine has not got it."""
        # Once, although tunnel, target and data port, TCP and UDP, may all have met it.
        self.log.repeated(
            "warn",
            f"absent {address}",
            "an address is not listened on: this machine has not got it",
            address=address,
        )

    def _tell_trouble(self, exc: OSError) -> None:
        hint = "raise the limit of open files (ulimit -n)" if exc.errno == errno.EMFILE else ""
        self.log.repeated(
            "error", "accept", "cannot accept for the moment", why=exc.strerror, hint=hint or None
        )
