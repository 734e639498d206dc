"""The client's visitors, each from its launch to the end of its relay.

Owns: who is served, and by what. The links are the session's; relays outlive it. Called by
`session`.

    launch ──> link claimed ──> slot ──> target dialled ──> relay ──> end
                    └──────────────┴────────────┴──> link reset, `fail` to the server, counted
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
from typing import Final, Protocol

from nodepass.config.address import join_address
from nodepass.engine.relays import Relay, RelayResult, UdpRelay
from nodepass.errors import DialError, EngineError, PoolTimeout
from nodepass.net import resolver, tcp, tcp_dial, udp
from nodepass.net.local_ports import LOCAL_PORTS
from nodepass.net.resolver import Candidate, SocketAddress
from nodepass.protocol.messages import Failure, Kind
from nodepass.protocol.session import SILENT_PERIODS
from nodepass.tunnel.context import Context
from nodepass.tunnel.idle_links import Link
from nodepass.tunnel.open_relays import Result

from .circle import Circle
from .places import Place, Places
from .udp_target import UdpTarget

TARGET: Final = 2
"""Side of a relay that is the target; the other one is the link."""
LEADS_BACK: Final = (
    "the target leads back to the visitors of this tunnel, this one came from our own connection "
    "to it; give the address of the service itself"
)
IDLE_MARGIN: Final = 5.0
"""Seconds that a UDP session lives longer here than on the server, where the visitor is: one side
alone should close it, or a datagram could meet a link that is just being closed."""

_FAILURES: Final = {
    errno.ECONNREFUSED: Failure.REFUSED,
    errno.ETIMEDOUT: Failure.TIMEOUT,
    errno.EMFILE: Failure.LIMIT,
    errno.ENFILE: Failure.LIMIT,
    errno.ENOBUFS: Failure.LIMIT,
    errno.ENOMEM: Failure.LIMIT,
}


class LinkHolder(Protocol):
    """The session that has launched a visitor."""

    @property
    def is_seed(self) -> bool:
        """Whether it speaks the seed dialect."""

    def claim_nowait(self, name: int | str) -> Link | None:
        """Hand over the idle link of this name."""

    async def claim(self, name: int | str) -> Link:
        """Hand over the link of this name, waiting for one whose launch came first.

        Raises:
            PoolTimeout: it has not come in time, or will never.
        """

    def fail(self, name: int | str, why: Failure) -> None:
        """Tell the server that a launch has failed; the link, if it still lies idle, is reset."""


class Visitor:
    """One launch, and what has become of it."""

    __slots__ = ("address", "is_watched", "kind", "link", "links", "place")

    def __init__(
        self, links: LinkHolder, kind: Kind, link: int | str, address: str, *, is_watched: bool
    ) -> None:
        self.links = links
        self.kind = kind
        self.link = link
        """Name of its link."""
        self.address = address
        """Where it came from, as the server says; empty if it does not."""
        self.is_watched = is_watched
        """Whether its target connection may come back to us as another visitor."""
        self.place: Place | None = None

    def enter(self, places: Places) -> Place:
        """Count it from here on."""
        self.place = Place(places)
        return self.place

    def leave(self) -> None:
        """Count it no more; idempotent."""
        if self.place is not None:
            self.place.release()


class Visitors:
    """Every visitor of one client.

    Args:
        places: how many there may be.
        udp_target: where datagrams go.
        circle: whether the target leads back to our own visitors.
    """

    def __init__(
        self, context: Context, places: Places, udp_target: UdpTarget, circle: Circle
    ) -> None:
        self._config = context.config
        self._settings = context.settings
        self._log = context.log
        self._counters = context.counters
        self._relays = context.relays
        self._open_relays = context.open_relays
        self._spawn = context.spawn
        self._places = places
        self._udp_target = udp_target
        self._circle = circle
        target = context.config.target
        self._target = resolver.literal(target.host, target.port)
        """Where TCP visitors go, None if that is a name."""
        self._carries = frozenset(context.config.carries.split(","))

    def serve(self, links: LinkHolder, kind: Kind, link: int | str, address: str) -> None:
        """Serve a visitor: in a task only if something but a connect is to be waited for.

        Args:
            links: the session that has launched it.
            link: name of its link.
            address: of the visitor; empty if it is not known.
        """
        self._counters.visitors += 1
        is_watched = self._circle.is_near and bool(address)
        visitor = Visitor(links, kind, link, address, is_watched=is_watched)
        if is_watched and self._circle.leads_back(kind, address):
            self._give_up(visitor, Failure.CIRCLE, LEADS_BACK)
            return
        if kind is Kind.TCP and self._config.tcp and self._target and self._places.has_room:
            claimed = links.claim_nowait(link)
            if claimed is not None:
                visitor.enter(self._places).take_slot()
                self._connect_guarded(visitor, claimed, self._target)
                return
        self._spawn(self._serve_later(visitor), "serving a visitor")

    def refuse(self, links: LinkHolder, kind: Kind, link: int | str, address: str) -> None:
        """Turn a visitor away whose link is not here."""
        self._counters.visitors += 1
        visitor = Visitor(links, kind, link, address, is_watched=False)
        self._give_up(visitor, Failure.UNKNOWN, f"link {link} is not here any more")

    # ------------------------------------------------------- a target with an address

    def _connect_guarded(self, visitor: Visitor, link: Link, target: Candidate) -> None:
        is_joined = False
        try:
            is_joined = self._connect(visitor, link, target)
        except Exception as exc:  # noqa: BLE001 - it must not end the session
            tcp.reset(link.sock)
            self._log.error("an internal error in serving a visitor; please report it", error=exc)
            self._give_up(visitor, Failure.UNKNOWN, "an internal error")
        if not is_joined:
            visitor.leave()

    def _connect(self, visitor: Visitor, link: Link, target: Candidate) -> bool:
        """Have the engine dial the target; return whether it took both."""
        family, address = target
        try:
            if visitor.is_watched:  # only a connect of our own tells us its local address
                sock, has_begun = tcp_dial.begin_dial(family, address, is_armed=False), True
            else:
                sock, has_begun = tcp_dial.open_dial(family, address, False)
        except OSError as exc:
            tcp.reset(link.sock)
            self._miss(visitor, self._dial_error(exc.errno))
            return False
        try:
            local = _local_address(sock) if visitor.is_watched else ""
            relay = self._relays.connect(
                link.sock,
                sock,
                None if has_begun else address,
                tls=link.tls,
                head=link.head,
                timeout=self._settings.dial_timeout,
            )
        except EngineError as exc:
            tcp.reset(sock)
            tcp.reset(link.sock)
            self._give_up(visitor, Failure.LIMIT, str(exc))
            return False
        except BaseException:
            tcp.reset(sock)
            raise
        self._hold(visitor, relay, local)
        return True

    # ------------------------------------------------- whoever has to wait for something

    async def _serve_later(self, visitor: Visitor) -> None:
        """Claim the link, dial the target, and hand both to the engine."""
        place = visitor.enter(self._places)
        is_joined = False
        try:
            try:
                link = visitor.links.claim_nowait(visitor.link)
                if link is None:
                    link = await visitor.links.claim(visitor.link)
            except PoolTimeout as exc:
                self._give_up(visitor, Failure.UNKNOWN, str(exc))
                return
            if visitor.kind not in self._carries:
                tcp.reset(link.sock)
                why = f"{visitor.kind}=0 is set here, but not on the server"
                self._give_up(visitor, Failure.REFUSED, why)
                return
            is_joined = await self._dial_and_join(visitor, link, place)
        finally:
            if not is_joined:
                visitor.leave()

    async def _dial_and_join(self, visitor: Visitor, link: Link, place: Place) -> bool:
        """Return whether the engine took link and target; the link is reset otherwise."""
        target = self._config.target
        try:
            await place.wait_slot()
            if visitor.kind is Kind.UDP:
                sock, address = await self._udp_target.dial()
                return self._join(visitor, link, sock, address)
            sock = await tcp_dial.dial(target.host, target.port, self._settings.dial_timeout)
            return self._join(visitor, link, sock, None)
        except PoolTimeout as exc:
            tcp.reset(link.sock)
            self._give_up(visitor, Failure.LIMIT, str(exc))
        except DialError as exc:
            tcp.reset(link.sock)
            self._miss(visitor, exc)
        except BaseException:
            tcp.reset(link.sock)
            raise
        return False

    def _join(
        self, visitor: Visitor, link: Link, sock: socket.socket, address: SocketAddress | None
    ) -> bool:
        """Hand link and target to the engine; return whether it took them.

        Args:
            address: what a UDP socket is connected to.
        """
        relay: Relay | UdpRelay
        try:
            local = _local_address(sock) if visitor.is_watched else ""
            if address is None:
                relay = self._relays.join(link.sock, sock, tls_a=link.tls, head_a=link.head)
            else:
                host = sock.getsockname()[0]
                relay = self._join_udp(visitor, link, sock)
                self._udp_target.watch(relay, address, host)
        except EngineError as exc:
            tcp.reset(link.sock)
            tcp.reset(sock)
            self._give_up(visitor, Failure.LIMIT, str(exc))
            return False
        except BaseException:
            tcp.reset(sock)
            raise
        self._hold(visitor, relay, local)
        return True

    def _join_udp(self, visitor: Visitor, link: Link, sock: socket.socket) -> UdpRelay:
        settings, is_raw = self._settings, visitor.links.is_seed
        with contextlib.suppress(OSError):  # the link has died, as the engine will find
            udp.tune_link(link.sock, SILENT_PERIODS * settings.report_interval)
        idle = settings.udp_idle_timeout
        return self._relays.dial(
            link.sock,
            sock,
            tls=link.tls,
            head=link.head,
            idle=settings.udp_read_timeout if is_raw else idle + min(idle, IDLE_MARGIN),
            is_raw=is_raw,
        )

    # ------------------------------------------------------------------ relay and end

    def _hold(self, visitor: Visitor, relay: Relay | UdpRelay, local: str) -> None:
        self._open_relays.hold(relay)
        if local:
            circle, address = self._circle, visitor.address
            source = circle.begin(visitor.kind, local, address)
            relay.result.add_done_callback(lambda _: circle.end(source, address))
        relay.result.add_done_callback(functools.partial(self._end, visitor, relay))

    def _end(self, visitor: Visitor, relay: Relay | UdpRelay, result: Result) -> None:
        visitor.leave()
        outcome = self._open_relays.end(relay, result, visitor=visitor.address, link=visitor.link)
        if isinstance(outcome, RelayResult) and not outcome.is_met:
            if outcome.code == errno.EADDRNOTAVAIL and self._target is not None:
                LOCAL_PORTS.miss(*self._target[1][:2])
            if outcome.side == TARGET:  # or the visitor has gone, which the server knows
                self._miss(visitor, self._dial_error(outcome.code))

    def _miss(self, visitor: Visitor, exc: DialError) -> None:
        """Take it that the target cannot be reached: there is no relay."""
        self._give_up(visitor, _FAILURES.get(exc.errno or 0, Failure.UNREACHABLE), str(exc))

    def _dial_error(self, code: int | None) -> DialError:
        target = self._config.target
        return DialError(join_address(target.host, target.port), code or errno.EIO, 1)

    def _give_up(self, visitor: Visitor, why: Failure, text: str) -> None:
        self._counters.launches_failed += 1
        self._counters.visitors_refused += 1
        self._log.repeated(
            "warn",
            f"serve {why}",
            "a visitor cannot be served",
            target=self._config.target,
            why=text,
        )
        visitor.links.fail(visitor.link, why)


def _local_address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return join_address(host, port)
