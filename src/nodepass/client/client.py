"""The client: dials the server, keeps links ready, and dials its target for each visitor.

Owns: the parts that do the work. Never listens. `reconnect` keeps the session, `visitors` serve
what it launches.
"""

from __future__ import annotations

import asyncio

from nodepass.config.parameters import Mode
from nodepass.config.url import Config
from nodepass.engine.relays import Relays
from nodepass.net.readiness import Watch
from nodepass.observe.stats import Gauges
from nodepass.tunnel.base import Tunnel
from nodepass.tunnel.context import Context

from .circle import Circle
from .places import Places
from .reconnect import Reconnect
from .server_dialer import Agreement, ServerDialer
from .session import ClientSession
from .udp_target import UdpTarget
from .visitors import Visitors


class Client(Tunnel):
    """The side that dials; see `Tunnel` for its arguments and life."""

    mode = Mode.CLIENT

    def __init__(self, url: str | Config, *, relays: Relays | None = None) -> None:
        super().__init__(url, relays=relays)
        self._dialer: ServerDialer | None = None

    # ------------------------------------------------------------------------ start

    async def _open(self, context: Context) -> None:
        undo = self._resources.callback
        dialer = self._dialer = ServerDialer(context, await self._stretch_password())
        if self.config.tls:  # what cannot work is to be known at the start
            tls = await dialer.load_tls()
            if self.config.tls == 2:
                tls.require_verification()
        watch = Watch()
        undo(watch.close)
        shares = self._share_descriptors()
        target = self.config.target
        udp_target = UdpTarget(
            target.host, target.port, self._settings.dial_timeout, self._log, context.spawn
        )
        undo(udp_target.close)
        circle = Circle(target.host, target.port)
        undo(circle.close)
        self._places = Places(context, shares.visitors)
        visitors = Visitors(context, self._places, udp_target, circle)

        def begin(agreement: Agreement) -> ClientSession:
            return ClientSession(context, agreement, dialer, watch, shares.idle, visitors)

        self._reconnect = Reconnect(context, dialer, circle, begin)
        undo(self._reconnect.close)

    def _begin(self, context: Context) -> None:
        self._log.info(
            "client starting",
            server=self.config.tunnel,
            target=self.config.target,
            carries=self.config.carries,
            name=self.config.name,
            engine=context.relays.kind,
        )
        self._spawn(self._reconnect.run(), "the client")

    # ------------------------------------------------------------------ while it runs

    def _reload(self, *, force: bool) -> bool:
        return self._dialer is not None and self._dialer.reload(force=force)

    def _gauges(self) -> Gauges:
        session = self._reconnect.session
        return Gauges(
            sessions_open=int(session is not None),
            visitors_open=self._places.count,
            visitors_waiting=self._places.waiting,
            links_idle=0 if session is None else len(session.idle_links),
            links_wanted=0 if session is None else session.refill.wanted,
            rtt=None if session is None else session.session.rtt,
        )

    # ------------------------------------------------------------------------- stop

    async def _drain(self) -> None:
        self._open_relays.hurry()
        session = self._reconnect.session
        self._reconnect.drain()
        if len(self._open_relays):
            self._log.info("waiting for open relays", relays=len(self._open_relays))
        try:
            async with asyncio.timeout(self._settings.shutdown_timeout):
                if session is not None:
                    await session.is_drained.wait()
                # Not only relays: a launch that was on its way has none yet.
                await self._places.wait_idle()
        except TimeoutError:
            self._log.warn("SHUTDOWN_TIMEOUT is over", relays_open=len(self._open_relays))
