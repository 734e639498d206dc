"""One session as the client holds it: control channel, idle links, launches.

Owns: the links to one server process and the visitors it launches on them. Ends with its
control channel; relays go on without it. Made by `client`, one after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import random
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nodepass.engine.relays import Relay, RelayResult, UdpRelay, UdpResult
from nodepass.errors import (
    DialError,
    EngineError,
    NodePassError,
    PeerWireError,
    PoolError,
    PoolTimeout,
)
from nodepass.net import tcp, udp
from nodepass.net.local_ports import LOCAL_PORTS
from nodepass.net.resolver import Candidate, SocketAddress
from nodepass.protocol import lines
from nodepass.protocol.messages import (
    SEED_ID_SIZE,
    Dialect,
    Drain,
    Fail,
    Failure,
    Idle,
    Kind,
    Launch,
    SeedLaunch,
)
from nodepass.protocol.session import SILENT_PERIODS, Drained, Event, Lost, Role, Session
from nodepass.tls.codec import Records
from nodepass.tunnel.control import Control
from nodepass.tunnel.pool import Demand, IdleLinks, Link

from .link_dialer import LinkDialer
from .refill import Refill

if TYPE_CHECKING:
    from .client import Client

LINK: Final = 1
TARGET: Final = 2
"""Sides of a relay."""
LAUNCH_DELAY: Final = 1.0
"""Seconds that the launch of a link may come behind the link's end: a round trip of any path."""
TLS_READ_SIZE: Final = 16384
"""Bytes per read of a TLS link's first bytes: a handshake's end and an id are well below it."""

OVERTAKERS: Final = 64
"""Launches that may come before we know of their link: of each one that is being dialled."""
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


class ClientSession:
    """One session with a server: its control channel, idle links and launches."""

    def __init__(
        self,
        client: Client,
        dialect: Dialect,
        host: str,
        port: int,
        session_id: str,
        key: bytes,
        idle: int,
        tls: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._settings = settings = client.settings
        self._host = host
        self._port = port
        target = client.config.target
        self._target = tcp.literal(target.host, target.port)
        """Where visitors go, None if that is a name."""
        self.tls = tls
        """TLS mode that the server greeted us with, and every link is to have."""
        self._is_closed = False
        self._is_server_stopping = False
        self._launches = 0
        self.session = Session(
            Role.CLIENT, dialect, now=self._loop.time(), interval=settings.report_interval
        )
        self.control = Control(self.session, self._on_event)
        self.lost: asyncio.Future[Lost] = self._loop.create_future()
        """Resolves when the control channel has ended."""
        self.is_drained = asyncio.Event()
        """Set once no launch can come any more."""
        self.idle_links = IdleLinks(client.watch, self._on_link_lost, settings.handshake_timeout)
        self._links: LinkDialer | None = None
        if dialect is Dialect.NATIVE:
            self._links = LinkDialer(client, host, port, session_id, key, tls)
        self.refill = Refill(
            self.idle_links,
            self._begin_seed_link if self._links is None else self._links.begin,
            random.random,
            settings.service_cooldown,
            client.log,
        )
        self._most_idle = client.most_idle
        self._least_idle = min(settings.min_pool_capacity, self._most_idle)
        self._demand = Demand(self._least_idle, self._most_idle, self._loop.time())
        self._want(idle)

    def drain(self) -> None:
        """Ask for no more launches."""
        self.refill.close()
        if self._links is not None:
            self._links.close()  # a link that is claimed behind the drain could get a visitor
        self.session.drain()
        if self.session.dialect is Dialect.SEED:
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
        if self._links is not None:
            self._links.close()
        self.control.close(reason)
        self.idle_links.clear()
        self.is_drained.set()
        if not self.lost.done():
            self.lost.set_result(Lost(reason))

    # ------------------------------------------------------------------------ links

    def _begin_seed_link(self, on_end: Callable[[Link | Exception], None]) -> None:
        self._client.spawn(self._make_seed_link(on_end), "dialling a link")

    async def _make_seed_link(self, on_end: Callable[[Link | Exception], None]) -> None:
        try:
            link = await self._dial_seed_link()
        except (NodePassError, OSError) as exc:
            on_end(exc)
            return
        except BaseException:
            on_end(PoolError("its making was cut short"))
            raise
        on_end(link)

    async def _dial_seed_link(self) -> Link:
        sock = await tcp.dial(self._host, self._port, self._settings.dial_timeout)
        said = b""
        records: Records | None = None
        try:
            if self.tls:
                records = await self._client.secure(sock, self.tls, is_native=False)
        except BaseException:
            tcp.finish(sock)  # not reset: an alert that says why may be on its way
            raise
        try:
            async with asyncio.timeout(self._settings.handshake_timeout):
                if records is not None:
                    said = records.open(b"")
                while len(said) < SEED_ID_SIZE:
                    said += await self._read_seed_id(sock, SEED_ID_SIZE - len(said), records)
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
        self._client.counters.links += 1
        return Link(sock, name, head, None if records is None else records.connection)

    async def _read_seed_id(
        self, sock: socket.socket, missing: int, records: Records | None
    ) -> bytes:
        # Without TLS not a byte more than the id: what follows may be a visitor's already.
        data = await self._loop.sock_recv(sock, missing if records is None else TLS_READ_SIZE)
        if not data or (records is not None and records.has_ended):
            raise PeerWireError("the data port closed before giving an id")
        return data if records is None else records.open(data)

    def _want(self, idle: int) -> None:
        # The server knows the rate of visitors; what the user set here still bounds its wish.
        self.refill.wanted = min(self._most_idle, max(self._least_idle, idle))

    def _on_link_lost(self, link: Link) -> None:
        self._client.counters.links_lost += 1
        self.refill.lose(link)
        self._check_drained()

    def _check_drained(self) -> None:
        # Without a link there is none to launch; else the server's answer tells (`Drained`).
        if self._client.is_stopping and not len(self.idle_links):
            if self.idle_links.has_any:  # ended by the server: their launches may be on their way
                self._loop.call_later(LAUNCH_DELAY, self.is_drained.set)
            else:
                self.is_drained.set()

    # --------------------------------------------------------------------- launches

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
                    self._client.log.info("the server is stopping")
                    self.refill.close()
            case Drained():
                self.is_drained.set()
            case Lost():
                if not self.lost.done():
                    self.lost.set_result(event)

    def _launch(self, kind: Kind, name: int | str, visitor: str) -> None:
        """Serve a visitor: in a task only if something but a connect is to be waited for."""
        client = self._client
        self._launches += 1
        if self._launches > self.refill.made + OVERTAKERS:
            self.session.waste(self._loop.time())
        if name not in self.idle_links and isinstance(name, int):
            # A native server launches only what has introduced itself: it was here and died.
            client.counters.visitors += 1
            self._give_up(name, Failure.UNKNOWN, f"link {name} is not here any more")
            return
        is_watched = client.circle.is_near and bool(visitor)
        if is_watched and client.circle.leads_back(kind, visitor):
            client.counters.visitors += 1
            self._give_up(name, Failure.CIRCLE, LEADS_BACK)
            return
        if kind is Kind.TCP and client.config.tcp and self._target and client.take_slot():
            link = self._claim_nowait(name)
            if link is not None:
                client.counters.visitors += 1
                client.enter()
                try:
                    is_joined = self._connect(link, visitor, self._target, is_watched)
                except Exception as exc:  # noqa: BLE001 - it must not end the session
                    tcp.reset(link.sock)
                    client.log.error(
                        "a fault of ours in serving a visitor; please report it", error=exc
                    )
                    self._give_up(name, Failure.UNKNOWN, "a fault of ours")
                    is_joined = False
                if not is_joined:
                    client.free_slot()
                    client.leave()
                return
            client.free_slot()
        client.spawn(self._serve(kind, name, visitor, is_watched), "serving a visitor")

    def _connect(self, link: Link, visitor: str, target: Candidate, is_watched: bool) -> bool:
        """Have the engine dial the target; return whether it took both."""
        client = self._client
        family, address = target
        try:
            if is_watched:  # only a connect that we begin ourselves tells us its local address
                sock, has_begun = tcp.begin_dial(family, address, is_armed=False), True
            else:
                sock, has_begun = tcp.open_dial(family, address, False)
        except OSError as exc:
            tcp.reset(link.sock)
            self._miss(link.name, self._dial_error(exc.errno))
            return False
        try:
            local = _local_address(sock) if is_watched else ""
            relay = client.relays.connect(
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
            self._give_up(link.name, Failure.LIMIT, str(exc))
            return False
        except BaseException:
            tcp.reset(sock)
            raise
        self._hold(relay, link.name, visitor, local)
        return True

    async def _serve(
        self, kind: Kind, name: int | str, visitor: str, is_watched: bool = False
    ) -> None:
        """Claim the link, dial the target, and hand both to the engine."""
        client = self._client
        client.counters.visitors += 1
        client.enter()
        is_joined = False
        try:
            try:
                link = self._claim_nowait(name) or await self._claim(name)
            except PoolTimeout as exc:
                self._give_up(name, Failure.UNKNOWN, str(exc))
                return
            if kind not in client.config.carries.split(","):
                tcp.reset(link.sock)
                why = f"{kind}=0 is set here, but not on the server"
                self._give_up(name, Failure.REFUSED, why)
                return
            is_joined = await self._dial_and_join(kind, link, visitor, is_watched)
        finally:
            if not is_joined:
                client.leave()

    async def _dial_and_join(self, kind: Kind, link: Link, visitor: str, is_watched: bool) -> bool:
        client, target = self._client, self._client.config.target
        address: SocketAddress | None = None
        try:
            await client.wait_slot()
        except PoolTimeout as exc:
            tcp.reset(link.sock)
            self._give_up(link.name, Failure.LIMIT, str(exc))
            return False
        except BaseException:
            tcp.reset(link.sock)
            raise
        is_joined = False
        try:
            if kind is Kind.TCP:
                sock = await tcp.dial(target.host, target.port, self._settings.dial_timeout)
            else:
                sock, address = await client.udp_target.dial()
            is_joined = self._join(kind, link, visitor, sock, address, is_watched)
        except DialError as exc:
            tcp.reset(link.sock)
            self._miss(link.name, exc)
        except BaseException:
            tcp.reset(link.sock)
            raise
        finally:
            if not is_joined:
                client.free_slot()
        return is_joined

    def _miss(self, name: int | str, exc: DialError) -> None:
        """Take it that the target cannot be reached: there is no relay."""
        self._give_up(name, _FAILURES.get(exc.errno or 0, Failure.UNREACHABLE), str(exc))

    def _dial_error(self, code: int | None) -> DialError:
        target = self._client.config.target
        return DialError(tcp.join_address(target.host, target.port), code or errno.EIO, 1)

    def _join(
        self,
        kind: Kind,
        link: Link,
        visitor: str,
        sock: socket.socket,
        address: SocketAddress | None = None,
        is_watched: bool = False,
    ) -> bool:
        """Hand link and target to the engine; return whether it took them."""
        client = self._client
        relay: Relay | UdpRelay
        try:
            local = _local_address(sock) if is_watched else ""
            if kind is Kind.TCP:
                relay = client.relays.join(link.sock, sock, tls_a=link.tls, head_a=link.head)
            else:
                host = sock.getsockname()[0]
                relay = self._join_udp(link, sock)
                if address is not None:
                    client.udp_target.watch(relay, address, host)
        except EngineError as exc:
            tcp.reset(link.sock)
            tcp.reset(sock)
            self._give_up(link.name, Failure.LIMIT, str(exc))
            return False
        except BaseException:
            tcp.reset(sock)
            raise
        self._hold(relay, link.name, visitor, local)
        return True

    def _hold(self, relay: Relay | UdpRelay, name: int | str, visitor: str, local: str) -> None:
        client = self._client
        client.hold(relay)
        if local:
            kind = Kind.TCP if isinstance(relay, Relay) else Kind.UDP
            source = client.circle.begin(kind, local, visitor)
            relay.result.add_done_callback(lambda _: client.circle.end(source, visitor))
        if client.is_stopping:
            client.hurry()  # its launch was on its way when the others were hurried
        relay.result.add_done_callback(functools.partial(self._part, relay, name, visitor))

    def _join_udp(self, link: Link, sock: socket.socket) -> UdpRelay:
        settings = self._settings
        is_raw = self.session.dialect is Dialect.SEED
        with contextlib.suppress(OSError):  # the link has died, as the engine will find
            udp.tune_link(link.sock, SILENT_PERIODS * settings.report_interval)
        idle = settings.udp_idle_timeout
        return self._client.relays.dial(
            link.sock,
            sock,
            tls=link.tls,
            head=link.head,
            idle=settings.udp_read_timeout if is_raw else idle + min(idle, IDLE_MARGIN),
            is_raw=is_raw,
        )

    def _claim_nowait(self, name: int | str) -> Link | None:
        link = self.idle_links.claim(name)
        if link is not None:
            self.refill.settle()
            if self.session.dialect is Dialect.SEED:
                self._demand.take(self._loop.time())
                self._want(self._demand.wanted)
            self.refill.fill()
            self._check_drained()
        return link

    async def _claim(self, name: int | str) -> Link:
        if isinstance(name, int):  # it died in the turn that its launch took
            raise PoolTimeout(f"link {name} is not here any more")
        return await self.refill.claim(name, self._settings.handshake_timeout)

    def _give_up(self, name: int | str, why: Failure, text: str) -> None:
        client = self._client
        client.counters.launches_failed += 1
        client.counters.visitors_refused += 1
        client.log.repeated(
            "warn",
            f"serve {why}",
            "a visitor cannot be served",
            target=client.config.target,
            why=text,
        )
        if isinstance(name, int):
            self.session.send(Fail(name, why))
        link = self.idle_links.claim(name)
        if link is not None:
            tcp.reset(link.sock)
            self.refill.fill()

    def _part(
        self,
        relay: Relay | UdpRelay,
        name: int | str,
        visitor: str,
        result: asyncio.Future[RelayResult] | asyncio.Future[UdpResult],
    ) -> None:
        self._client.free_slot()
        self._client.leave()
        if result.cancelled():
            self._client.forget(relay)
            return
        outcome = result.result()
        if isinstance(outcome, RelayResult) and not outcome.is_met:
            self._client.forget(relay)
            if outcome.code == errno.EADDRNOTAVAIL and self._target is not None:
                LOCAL_PORTS.miss(*self._target[1][:2])
            if outcome.side == TARGET:  # or the visitor has gone, which the server knows
                self._miss(name, self._dial_error(outcome.code))
            return
        self._client.release(relay, outcome)
        if self._client.log.is_debug:
            self._client.log.debug(
                "relay ended",
                visitor=visitor,
                link=name,
                up=outcome.up,
                down=outcome.down,
                reason=outcome.describe(),
            )


def _local_address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return tcp.join_address(host, port)
