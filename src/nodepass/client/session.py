"""One session as the client holds it: control channel, idle links, launches.

Owns: the links to one server process. Ends with its control channel; relays go on without it.
Made by `client`, one after another, run by `reconnect`.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

from nodepass.errors import PoolTimeout
from nodepass.net import tcp
from nodepass.net.readiness import Watch
from nodepass.protocol.messages import (
    Dialect,
    Drain,
    Fail,
    Failure,
    Idle,
    Kind,
    Launch,
    SeedLaunch,
)
from nodepass.protocol.session import Drained, Event, Lost, Role, Session
from nodepass.tunnel.context import Context
from nodepass.tunnel.control import Control
from nodepass.tunnel.demand import Demand
from nodepass.tunnel.idle_links import IdleLinks, Link

from .link_dialer import LinkDialer
from .refill import Refill
from .seed_links import SeedLinkDialer
from .server_dialer import Agreement, ServerDialer
from .visitors import Visitors

LINK: Final = 1
"""Side of a relay that is the link; the other one is the target."""
LAUNCH_DELAY: Final = 1.0
"""Seconds that the launch of a link may come behind the link's end: a round trip of any path."""
OVERTAKERS: Final = 64
"""Launches that may come before we know of their link: of each one that is being dialled."""


class ClientSession:
    """One session with a server: its control channel, idle links and launches.

    Args:
        dialer: reaches the server, for links.
        watch: tells what becomes of links, those under way and the idle ones.
        most_idle: links that may lie idle.
        visitors: take over what is launched.
    """

    def __init__(
        self,
        context: Context,
        agreement: Agreement,
        dialer: ServerDialer,
        watch: Watch,
        most_idle: int,
        visitors: Visitors,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._log = context.log
        self._counters = context.counters
        self._visitors = visitors
        self._settings = settings = context.settings
        self.is_seed = agreement.dialect is Dialect.SEED
        """Whether the server speaks the seed dialect."""
        self.tls = agreement.tls
        """TLS mode of the control channel and of every link."""
        self._is_closed = False
        self._is_draining = False
        self._is_server_stopping = False
        self._launches = 0
        self.session = Session(
            Role.CLIENT,
            agreement.dialect,
            now=self._loop.time(),
            interval=settings.report_interval,
        )
        self.control = Control(self.session, self._on_event)
        self.lost: asyncio.Future[Lost] = self._loop.create_future()
        """Resolves when the control channel has ended."""
        self.is_drained = asyncio.Event()
        """Set once no launch can come any more."""
        self.idle_links = IdleLinks(watch, self._on_link_lost, settings.handshake_timeout)
        self._links: LinkDialer | SeedLinkDialer
        if self.is_seed:
            self._links = SeedLinkDialer(context, dialer, agreement)
        else:
            self._links = LinkDialer(context, dialer, agreement, watch)
        self.refill = Refill(
            self.idle_links,
            self._links.begin,
            random.random,
            settings.service_cooldown,
            context.log,
        )
        self._most_idle = most_idle
        self._least_idle = min(settings.min_pool_capacity, most_idle)
        self._demand = Demand(self._least_idle, most_idle, self._loop.time())
        self._want(agreement.idle)

    def drain(self) -> None:
        """Ask for no more launches."""
        self._is_draining = True
        self.refill.close()
        self._links.close()  # a link that is claimed behind the drain could get a visitor
        self.session.drain()
        if self.is_seed:
            self.is_drained.set()  # the seed dialect has no word for it
        else:
            self.session.await_drained()
        self._check_drained()

    def close(self, reason: str) -> None:
        """End the session; idempotent. Relays go on."""
        if self._is_closed:
            return
        self._is_closed = True
        self.refill.close()
        self._links.close()
        self.control.close(reason)
        self.idle_links.clear()
        self.is_drained.set()
        if not self.lost.done():
            self.lost.set_result(Lost(reason))

    # ------------------------------------------------------------- used by `visitors`

    def claim_nowait(self, name: int | str) -> Link | None:
        """Hand over the idle link of this name."""
        link = self.idle_links.claim(name)
        if link is not None:
            self.refill.note_success()
            if self.is_seed:
                self._demand.count_launch(self._loop.time())
                self._want(self._demand.wanted)
            self.refill.fill()
            self._check_drained()
        return link

    async def claim(self, name: int | str) -> Link:
        """Hand over the link of this name, waiting for one whose launch came first.

        Raises:
            PoolTimeout: it has not come in time, or will never.
        """
        if isinstance(name, int):  # it died in the turn that its launch took
            raise PoolTimeout(f"link {name} is not here any more")
        return await self.refill.claim(name, self._settings.handshake_timeout)

    def fail(self, name: int | str, why: Failure) -> None:
        """Tell the server that a launch has failed; the link, if it still lies idle, is reset."""
        if isinstance(name, int):
            self.session.send(Fail(name, why))
        link = self.idle_links.claim(name)
        if link is not None:
            tcp.reset(link.sock)
            self.refill.fill()

    # -------------------------------------------------------------------------- links

    def _want(self, idle: int) -> None:
        # The server knows the rate of visitors; what the user set here still bounds its wish.
        self.refill.wanted = min(self._most_idle, max(self._least_idle, idle))

    def _on_link_lost(self, link: Link) -> None:
        self._counters.links_lost += 1
        self.refill.lose(link)
        self._check_drained()

    def _check_drained(self) -> None:
        # Without a link there is none to launch; else the server's answer tells (`Drained`).
        if self._is_draining and not len(self.idle_links):
            if self.idle_links.has_any:  # ended by the server: their launches may be on their way
                self._loop.call_later(LAUNCH_DELAY, self.is_drained.set)
            else:
                self.is_drained.set()

    # ------------------------------------------------------------------------- events

    def _on_event(self, event: Event) -> None:
        match event:
            case Launch(kind, number, visitor):
                self._launch(kind, number, visitor)
            case SeedLaunch(link_id, kind):
                self._launch(kind, link_id, "")
            case Idle(count):
                self._want(count)
                self.refill.fill()
            case Drain():
                if not self._is_server_stopping:
                    self._is_server_stopping = True
                    self._log.info("the server is stopping")
                    self.refill.close()
            case Drained():
                self.is_drained.set()
            case Lost():
                if not self.lost.done():
                    self.lost.set_result(event)

    def _launch(self, kind: Kind, name: int | str, visitor: str) -> None:
        self._launches += 1
        if self._launches > self.refill.made + OVERTAKERS:
            self.session.waste(self._loop.time())
        if name not in self.idle_links and isinstance(name, int):
            # A native server launches only what has introduced itself: it was here and died.
            self._visitors.refuse(self, kind, name, visitor)
        else:
            self._visitors.serve(self, kind, name, visitor)
