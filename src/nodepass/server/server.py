"""The server: listens for clients and for visitors, and joins the two.

Owns: the listeners, and the parts that do the work. Never dials. What a connection at the tunnel
port is, `acceptor` finds out; which link is next, `pool` says; the bytes are the engine's.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nodepass.config.address import join_address
from nodepass.config.parameters import Mode
from nodepass.config.url import Config
from nodepass.engine.relays import Relays
from nodepass.net import resolver
from nodepass.net.listener import Listener, OnAccept, listen
from nodepass.net.readiness import Watch
from nodepass.observe.stats import Gauges, least_rtt
from nodepass.runtime import threads
from nodepass.tunnel.base import Tunnel
from nodepass.tunnel.context import Context
from nodepass.tunnel.pool import Pool
from nodepass.tunnel.slots import Slots

from .acceptor import Acceptor
from .eviction import Eviction
from .launches import Launches
from .seed_port import SeedPort
from .sessions import Sessions
from .throttle import Throttle
from .udp_visitors import UdpVisitors
from .visitors import Visitors

if TYPE_CHECKING:
    from nodepass.tls.contexts import ServerTls

NATIVE_PATIENCE: Final = 1.0
"""Seconds that a connection must have been silent to pass for a seed client where its address has
native clients too: their links are silent for a round trip, a second at the very worst."""


class Server(Tunnel):
    """The side that listens; see `Tunnel` for its arguments and life."""

    mode = Mode.SERVER

    def __init__(self, url: str | Config, *, relays: Relays | None = None) -> None:
        super().__init__(url, relays=relays)
        self._tls: ServerTls | None = None

    @property
    def tunnel_address(self) -> tuple[str, int]:
        """Host and port that clients dial.

        Raises:
            TunnelError: it has never run.
        """
        self._require_running()
        return self._tunnel.address

    @property
    def target_address(self) -> tuple[str, int]:
        """Host and port that visitors dial.

        Raises:
            TunnelError: it has never run.
        """
        self._require_running()
        return self._target_address

    # ------------------------------------------------------------------------ start

    async def _open(self, context: Context) -> None:
        self._loop = asyncio.get_running_loop()
        undo = self._resources.callback
        key = await self._stretch_password()
        self._tls = await threads.run(lambda: self._load_tls(context.relays))
        shares, throttle = self._share_descriptors(), Throttle()
        self._slots = Slots(
            shares.visitors,
            keeps_for_tcp=self.config.tcp,
            on_full=self._on_full,
            resume_tcp=self._resume_tcp,
            admit_udp=self._admit_udp,
        )
        self._eviction = Eviction(
            shares.visitors,
            lambda: not self._slots.has_room,
            lambda source: self._sessions.count_from(source) > 0,
            self._log,
        )
        undo(self._eviction.close)
        idle = Watch()
        undo(idle.close)
        self._pool = Pool()
        self._sessions = Sessions(context, self._pool, idle, shares, throttle)
        undo(self._sessions.close, "stopped")
        undo(self._pool.close)
        launches = Launches(context, self._eviction)
        undo(launches.close)
        parts = (context, self._pool, self._slots, self._sessions, launches)
        self._visitors = Visitors(*parts)
        undo(self._visitors.close)
        self._udp_visitors = UdpVisitors(*parts)
        self._counts.append(self._udp_visitors.datagrams)
        self._waits.append(self._udp_visitors.wait_closed)
        self._sessions.on_client_full = self._udp_visitors.make_room
        self._acceptor = Acceptor(context, self._sessions, idle, throttle, key, self._tls)
        undo(self._acceptor.close)
        tunnel = self.config.tunnel
        self._tunnel = await self._listen(
            tunnel.host, tunnel.port, self._acceptor.admit, self._acceptor.make_room
        )
        await self._open_target()
        self._data: Listener | None = None
        if self.config.compat:
            await self._open_data_port(context)

    async def _open_target(self) -> None:
        """Listen for visitors, TCP and UDP on one port."""
        host, port = self.config.target.host, self.config.target.port
        if self.config.tcp:
            self._visitors.listener = await self._listen(host, port, self._visitors.admit)
            port = self._visitors.listener.address[1]
        self._resources.callback(self._udp_visitors.close)
        if self.config.udp:
            await self._udp_visitors.open(host, port, self._tell_absent)
        is_address = resolver.literal(host, port) is not None and "%" not in host
        self._sessions.arrival = (host if is_address else "", port)

    async def _open_data_port(self, context: Context) -> None:
        """Listen for the links of seed clients."""
        seed_port = SeedPort(context, self._sessions, self._pool, self._tls)
        self._resources.callback(seed_port.close)

        def admit(sock: socket.socket, host: str, _port: int) -> None:
            silence = NATIVE_PATIENCE if self._sessions.has_native(host) else 0.0
            seed_port.take(sock, host, self._acceptor.promote(host, silence))

        self._data = await self._listen(self.config.tunnel.host, self.config.data, admit)
        self._acceptor.data_port = self._data.address[1]

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

        socks = await listen(host, port, self._tell_absent)
        listener = Listener(socks, on_accept, on_trouble)
        self._resources.callback(listener.close)
        return listener

    def _load_tls(self, relays: Relays) -> ServerTls | None:
        if not self.config.tls:
            return None
        selector = relays.alpn_selector  # first: it says what is wrong with OpenSSL
        from nodepass.tls.contexts import ServerTls

        return ServerTls(self.config.tls, self.config.crt, self.config.key, self._log, selector)

    def _begin(self, context: Context) -> None:
        for listener in (self._tunnel, self._visitors.listener, self._data):
            if listener is not None:
                listener.resume()
        self._udp_visitors.begin(has_tls=self._tls is not None)
        self._arm_period()
        self._resources.callback(self._stop_periods)
        data = {} if self._data is None else {"data": self._data.address[1]}
        # Among several tunnels it is the label of each line.
        tunnel = {"tunnel": join_address(*self._tunnel.address)}
        self._log.info(
            "server listening",
            **({} if self.config.label else tunnel),
            target=join_address(*self._target_address),
            carries=self.config.carries,
            **data,
            tls=self.config.tls,
            engine=context.relays.kind,
        )
        if self._tls is not None:
            self._log.info("certificate", fingerprint=self._tls.fingerprint)
        self._warn_of_risks()

    def _warn_of_risks(self) -> None:
        has_password = self.config.password is not None
        if not has_password and self._tls is None:
            self._log.warn(
                "no password and no TLS: whoever reaches the tunnel port can become a client, "
                "and whoever sees the wire can read it"
            )
        elif not has_password:
            self._log.warn("no password: whoever reaches the tunnel port can become a client")
        elif self._tls is None:
            self._log.warn("no TLS: whoever sees the wire can read it; add tls=1 or tls=2")

    # ------------------------------------------------------------------ while it runs

    def _reload(self, *, force: bool) -> bool:
        if self._tls is None or self._tls.mode == 1:
            return False
        self._tls.reload(force=force)
        return True

    def _on_full(self) -> None:
        if not self._slots.has_room:
            self._visitors.pause()
            self._log.repeated(
                "warn",
                "limit",
                "as many visitors as SEMAPHORE_LIMIT allows; more wait",
                limit=self._slots.limit,
            )
            self._eviction.press()
        self._udp_visitors.make_room()

    def _resume_tcp(self) -> bool:
        return not self._is_stopping and self._visitors.resume()

    def _admit_udp(self) -> bool:
        return self._udp_visitors.admit_one()

    def _arm_period(self) -> None:
        self._period_timer = self._loop.call_later(
            self._settings.report_interval, self._end_period
        )

    def _end_period(self) -> None:
        self._sessions.end_period()
        self._arm_period()

    def _stop_periods(self) -> None:
        self._period_timer.cancel()

    def _tell_absent(self, address: str) -> None:
        """Say that an address is not listened on, since this machine has not got it."""
        # Once, although tunnel, target and data port, TCP and UDP, may all have met it.
        self._log.repeated(
            "warn",
            f"absent {address}",
            "an address is not listened on: this machine has not got it",
            address=address,
        )

    def _tell_trouble(self, exc: OSError) -> None:
        hint = "raise the limit of open files (ulimit -n)" if exc.errno == errno.EMFILE else ""
        self._log.repeated(
            "error", "accept", "cannot accept for the moment", why=exc.strerror, hint=hint or None
        )

    @property
    def _target_address(self) -> tuple[str, int]:
        listener = self._visitors.listener
        address = self._udp_visitors.address if listener is None else listener.address
        assert address is not None, "nothing is listened on"
        return address

    # ------------------------------------------------------------------- statistics

    def _gauges(self) -> Gauges:
        members = list(self._pool)
        return Gauges(
            sessions_open=len(self._sessions),
            visitors_open=self._slots.taken + self._udp_visitors.waiting,
            visitors_waiting=self._pool.waiting + self._udp_visitors.waiting,
            links_idle=sum(len(member.idle_links) for member in members),
            links_wanted=sum(member.demand.wanted for member in members),
            rtt=least_rtt(client.session.rtt for client in self._sessions),
        )

    # ------------------------------------------------------------------------- stop

    async def _drain(self) -> None:
        if self._visitors.listener is not None:
            self._visitors.listener.close()
        self._udp_visitors.shut()
        self._open_relays.hurry()
        self._tunnel.close()
        self._sessions.drain()
        await asyncio.sleep(0)  # the drain lines leave before the idle links go
        self._acceptor.close()
        self._pool.close()
        if len(self._open_relays):
            self._log.info("waiting for open relays", relays=len(self._open_relays))
        await self._open_relays.wait(self._settings.shutdown_timeout)
