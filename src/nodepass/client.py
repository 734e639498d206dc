"""The client: dials the server, keeps links ready, and dials its target for each visitor.

Owns: the loop of connect, serve, lose, wait; and within one connection the control channel,
the idle links and the launches. Never listens.

A `Pairing` is one session as the client sees it: it ends with its control channel. Relays
outlive it.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import random
import secrets
import socket
from typing import Final

from . import net, wire
from .config import Config, Mode
from .control import Control
from .errors import (
    AuthError,
    DialError,
    EngineError,
    NodePassError,
    PeerWireError,
    PoolTimeout,
    TunnelError,
)
from .filler import Filler
from .handshake import ClientHandshake
from .message import (
    NONCE_SIZE,
    SEED_ID_SIZE,
    Dialect,
    Drain,
    Fail,
    Failure,
    Greeting,
    Idle,
    Kind,
    Launch,
    SeedLaunch,
)
from .pool import Demand, Link, Shelf
from .relay import Relay, RelayResult, Relays
from .session import Backoff, Event, Lost, Role, Session
from .stats import TunnelStatistics
from .tunnel import Tunnel

READ_SIZE: Final = wire.MAX_GREETING
"""Bytes per read of a greeting: what follows it belongs to others."""
SUFFIX_SIZE: Final = 2
"""Random bytes that tell two clients of one name apart, once the server said there are two."""

_FAILURES: Final = {
    errno.ECONNREFUSED: Failure.REFUSED,
    errno.ETIMEDOUT: Failure.TIMEOUT,
    errno.EMFILE: Failure.LIMIT,
    errno.ENFILE: Failure.LIMIT,
    errno.ENOBUFS: Failure.LIMIT,
    errno.ENOMEM: Failure.LIMIT,
}


class Client(Tunnel):
    """The side that dials; see `Tunnel` for its arguments and life."""

    mode = Mode.CLIENT

    def __init__(self, url: str | Config, *, relays: Relays | None = None) -> None:
        super().__init__(url, relays=relays)
        self.name = self.config.name
        """What the server calls us; gets a suffix if another client has the same."""
        self.pairing: Pairing | None = None
        """The live session, or None."""

    async def _open(self) -> None:
        self.watch = net.HangupWatch()
        self._slots = asyncio.Semaphore(self.settings.semaphore_limit)
        self._serving = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def _begin(self) -> None:
        self.log.info(
            "client starting",
            server=self.config.tunnel,
            target=self.config.target,
            name=self.name,
            engine=self.relays.kind,
        )
        self.spawn(self._run(), "the client")

    async def _drain(self) -> None:
        pairing = self.pairing
        if pairing is None:
            await self.wait_relays(self.settings.shutdown_timeout)
            return
        pairing.drain()
        if self._open_relays:
            self.log.info("waiting for open relays", relays=len(self._open_relays))
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout):
                await pairing.is_drained.wait()
                # A relay may be opened by a launch that was on its way.
                while self._serving:
                    await self._is_idle.wait()
        except TimeoutError:
            self.log.warn("SHUTDOWN_TIMEOUT is over", relays_open=len(self._open_relays))

    def _shut(self) -> None:
        if self.pairing is not None:
            self.pairing.close("stopped")
            self.pairing = None
        self.watch.close()

    def statistics(self) -> TunnelStatistics:
        up, down = self.live_bytes()
        pairing, counters = self.pairing, self.counters
        return TunnelStatistics(
            mode=str(self.mode),
            sessions_open=int(pairing is not None),
            sessions=counters.sessions,
            visitors_open=self._serving,
            visitors_waiting=self._serving - len(self._open_relays),
            visitors=counters.visitors,
            visitors_refused=counters.visitors_refused,
            relays_open=len(self._open_relays),
            relays_reset=counters.relays_reset,
            launches_failed=counters.launches_failed,
            links_idle=0 if pairing is None else len(pairing.shelf),
            links_wanted=0 if pairing is None else pairing.filler.wanted,
            links=counters.links,
            links_lost=counters.links_lost,
            strangers=counters.strangers,
            bytes_up=up,
            bytes_down=down,
            rtt=None if pairing is None else pairing.session.rtt,
        )

    # ------------------------------------------------------------- used by a Pairing

    def enter(self) -> None:
        """Count a visitor from its launch to the end of its relay."""
        self._serving += 1
        self._is_idle.clear()

    def leave(self) -> None:
        """Stop counting a visitor."""
        self._serving -= 1
        if not self._serving:
            self._is_idle.set()

    async def wait_slot(self) -> None:
        """Wait until fewer visitors than SEMAPHORE_LIMIT are served."""
        if self._slots.locked():
            self.log.repeated(
                "warn",
                "limit",
                "as many visitors as SEMAPHORE_LIMIT allows; more wait",
                limit=self.settings.semaphore_limit,
            )
        await self._slots.acquire()

    def free_slot(self) -> None:
        """Give back what `wait_slot` has taken."""
        self._slots.release()

    # ------------------------------------------------------- connect, serve, lose, wait

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        backoff = Backoff(self.settings.service_cooldown)
        while not self.is_stopping:
            began = loop.time()
            try:
                lost = await self._pair()
                backoff.settle(loop.time() - began)
                if not self.is_stopping:
                    self._tell_lost(lost)
            except AuthError as exc:
                self.log.repeated("error", "auth", "the server and we do not agree", why=exc)
            except (NodePassError, OSError) as exc:
                self.log.repeated(
                    "warn", "dial", "no tunnel; trying again", server=self.config.tunnel, why=exc
                )
            except Exception as exc:
                self.log.error("a fault of ours in the client; please report it", error=exc)
            await asyncio.sleep(backoff.next_pause(random.random()))  # noqa: S311 - only jitter

    async def _pair(self) -> Lost:
        """Make one connection to the server and serve until it is lost."""
        tunnel = self.config.tunnel
        sock = await net.dial(tunnel.host, tunnel.port, self.settings.dial_timeout)
        host = str(sock.getpeername()[0])
        try:
            handshake, greeting = await self.greet(sock)
            if greeting.is_native:
                pairing = await self._pair_native(sock, handshake, greeting, host)
            else:
                pairing = Pairing(self, Dialect.SEED, host, greeting.data_port, "", b"", 0)
        except BaseException:
            sock.close()
            raise
        self.pairing = pairing
        self.counters.sessions += 1
        try:
            await pairing.control.open(sock, self.settings.report_interval, handshake.rest())
            self.log.info(
                "tunnel up",
                server=net.join_address(host, tunnel.port),
                dialect=pairing.session.dialect,
            )
            pairing.filler.fill()
            return await pairing.lost
        finally:
            pairing.close("stopped")
            self.pairing = None

    async def greet(self, sock: socket.socket) -> tuple[ClientHandshake, Greeting]:
        """Read the greeting of a fresh connection to the tunnel port.

        Raises:
            PeerWireError: what came is no greeting.
            TunnelError: none came in time, or it offers what we do not take.
        """
        handshake = ClientHandshake(tls_floor=self.config.tls, allows_seed=self.config.compat)
        data = await self._read_some(sock, b"")
        while (greeting := handshake.receive_greeting(data)) is None:
            data = await self._read_some(sock, data)
        if greeting.tls:
            raise TunnelError(
                f"the server uses tls={greeting.tls}, which is not in this build yet"
            )
        return handshake, greeting

    async def _read_some(self, sock: socket.socket, before: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        timeout = self.settings.handshake_timeout
        try:
            async with asyncio.timeout(timeout):
                data = await loop.sock_recv(sock, READ_SIZE)
        except TimeoutError as exc:
            text = f"no greeting within {timeout:g} s: the other side is {wire.identify(before)}"
            raise TunnelError(text) from exc
        if not data:
            raise TunnelError("the other side closed the connection during the handshake")
        return data

    async def _pair_native(
        self, sock: socket.socket, handshake: ClientHandshake, greeting: Greeting, host: str
    ) -> Pairing:
        loop = asyncio.get_running_loop()
        line = handshake.hello(self.name, secrets.token_bytes(NONCE_SIZE))
        await loop.sock_sendall(sock, line)
        answer = None
        while answer is None:
            answer = handshake.receive_answer(await self._read_some(sock, b""))
        welcome, key = answer
        port = self.config.tunnel.port
        return Pairing(self, Dialect.NATIVE, host, port, welcome.session, key, welcome.idle)

    def _tell_lost(self, lost: Lost) -> None:
        self.log.warn("tunnel lost", reason=lost.reason, relays_open=len(self._open_relays))
        if lost.is_replaced:
            self.name = f"{self.config.name}-{secrets.token_hex(SUFFIX_SIZE)}"
            self.log.warn(
                "another client of our name has taken our place; going on under another name "
                "(choose one with name=)",
                name=self.name,
            )


class Pairing:
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
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._settings = settings = client.settings
        self._host = host
        self._port = port
        self._id = session_id
        self._key = key
        self._number = 0
        self._is_closed = False
        self.session = Session(
            Role.CLIENT, dialect, now=self._loop.time(), interval=settings.report_interval
        )
        self.control = Control(self.session, self._on_event)
        self.lost: asyncio.Future[Lost] = self._loop.create_future()
        """Resolves when the control channel has ended."""
        self.is_drained = asyncio.Event()
        """Set once no launch can come any more."""
        self.shelf = Shelf(client.watch, self._on_link_lost, settings.handshake_timeout)
        self.filler = Filler(
            self.shelf,
            self._dial_link if dialect is Dialect.NATIVE else self._dial_seed_link,
            client.spawn,
            random.random,
            settings.service_cooldown,
            client.log,
        )
        self._demand = Demand(
            settings.min_pool_capacity, settings.max_pool_capacity, self._loop.time()
        )
        self._want(idle)

    def drain(self) -> None:
        """Ask for no more launches."""
        self.filler.close()
        self.session.drain()
        if self.session.dialect is Dialect.SEED:
            self.is_drained.set()  # the seed dialect has no word for it
        self._check_drained()

    def close(self, reason: str) -> None:
        """End the session; idempotent. Relays go on."""
        if self._is_closed:
            return
        self._is_closed = True
        self.filler.close()
        self.control.close(reason)
        self.shelf.clear()
        self.is_drained.set()
        if not self.lost.done():
            self.lost.set_result(Lost(reason))

    # ------------------------------------------------------------------------ links

    async def _dial_link(self) -> Link:
        sock = await self._connect()
        try:
            handshake, greeting = await self._client.greet(sock)
            if not greeting.is_native:
                raise PeerWireError("the server has changed its dialect")
            self._number += 1
            number = self._number
            line = handshake.claim_link(self._id, self._key, number)
            await self._loop.sock_sendall(sock, line)
        except BaseException:
            sock.close()
            raise
        self._client.counters.links += 1
        return Link(sock, number, handshake.rest())

    async def _dial_seed_link(self) -> Link:
        sock = await self._connect()
        try:
            async with asyncio.timeout(self._settings.handshake_timeout):
                link_id = b""
                # Not a byte more than the id: what follows may be a visitor's already.
                while len(link_id) < SEED_ID_SIZE:
                    data = await self._loop.sock_recv(sock, SEED_ID_SIZE - len(link_id))
                    if not data:
                        raise PeerWireError("the data port closed before giving an id")
                    link_id += data
            name = link_id.decode("ascii", errors="replace")
            if not wire.is_seed_id(name):
                raise PeerWireError("the data port gave no id of 8 hex characters")
        except TimeoutError as exc:
            sock.close()
            raise PeerWireError("the data port gave no id in time") from exc
        except BaseException:
            sock.close()
            raise
        self._client.counters.links += 1
        return Link(sock, name)

    async def _connect(self) -> socket.socket:
        async with self.filler.connecting:
            return await net.dial(self._host, self._port, self._settings.dial_timeout)

    def _want(self, idle: int) -> None:
        # The server knows the rate of visitors; what the user set here still bounds its wish.
        least, most = self._settings.min_pool_capacity, self._settings.max_pool_capacity
        self.filler.wanted = min(most, max(least, idle))

    def _on_link_lost(self) -> None:
        self._client.counters.links_lost += 1
        self.filler.fill()
        self._check_drained()

    def _check_drained(self) -> None:
        # A server that has taken note of our drain drops our idle links: none is left to launch.
        if self._client.is_stopping and not len(self.shelf):
            self.is_drained.set()

    # --------------------------------------------------------------------- launches

    def _on_event(self, event: Event) -> None:
        match event:
            case Launch(Kind.TCP, number, visitor):
                self._client.spawn(self._serve(number, visitor), "serving a visitor")
            case SeedLaunch(link_id, Kind.TCP):
                self._client.spawn(self._serve(link_id, ""), "serving a visitor")
            case Launch(Kind.UDP, number, _):
                self._give_up(number, Failure.UNKNOWN, "UDP is not in this build yet")
            case SeedLaunch(link_id, Kind.UDP):
                self._give_up(link_id, Failure.UNKNOWN, "UDP is not in this build yet")
            case Idle(count):
                self._want(count)
                self.filler.fill()
            case Drain():
                self._client.log.info("the server is stopping")
                self.filler.close()
            case Lost():
                if not self.lost.done():
                    self.lost.set_result(event)

    async def _serve(self, name: int | str, visitor: str) -> None:
        """Claim the link, dial the target, and hand both to the engine."""
        client = self._client
        client.counters.visitors += 1
        client.enter()
        relay = None
        try:
            try:
                link = self._claim_nowait(name) or await self._claim(name)
            except PoolTimeout as exc:
                self._give_up(name, Failure.UNKNOWN, str(exc))
                return
            relay = await self._join(link, visitor)
        finally:
            if relay is None:
                client.leave()

    async def _join(self, link: Link, visitor: str) -> Relay | None:
        client, target = self._client, self._client.config.target
        try:
            await client.wait_slot()
            sock = await net.dial(target.host, target.port, self._settings.dial_timeout)
        except DialError as exc:
            net.reset(link.sock)
            client.free_slot()
            failure = _FAILURES.get(exc.errno or 0, Failure.UNREACHABLE)
            self._give_up(link.name, failure, str(exc))
            return None
        except BaseException:
            net.reset(link.sock)
            raise
        try:
            relay = client.relays.join(link.sock, sock, head_a=link.head)
        except EngineError as exc:
            net.reset(link.sock)
            net.reset(sock)
            client.free_slot()
            self._give_up(link.name, Failure.LIMIT, str(exc))
            return None
        client.hold(relay)
        relay.result.add_done_callback(functools.partial(self._part, relay, link.name, visitor))
        return relay

    def _claim_nowait(self, name: int | str) -> Link | None:
        link = self.shelf.claim(name)
        if link is not None:
            if self.session.dialect is Dialect.SEED:
                self._demand.take(self._loop.time())
                self._want(self._demand.wanted)
            self.filler.fill()
        return link

    async def _claim(self, name: int | str) -> Link:
        if self.session.dialect is Dialect.NATIVE:
            # A native server launches only what has introduced itself: it was here and died.
            raise PoolTimeout(f"link {name} is not here any more")
        return await self.filler.claim(name, self._settings.handshake_timeout)

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
        link = self.shelf.claim(name)
        if link is not None:
            net.reset(link.sock)
            self.filler.fill()

    def _part(
        self, relay: Relay, name: int | str, visitor: str, result: asyncio.Future[RelayResult]
    ) -> None:
        self._client.free_slot()
        self._client.leave()
        if result.cancelled():
            return
        outcome = result.result()
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
