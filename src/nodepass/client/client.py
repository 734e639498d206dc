"""The client: dials the server, keeps links ready, and dials its target for each visitor.

Owns: the loop of connect, serve, lose, wait; and within one connection the control channel,
the idle links and the launches. Never listens.

A `ClientSession` is one session as the client sees it: it ends with its control channel. Relays
outlive it.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
from typing import TYPE_CHECKING, Final

from nodepass.config.url import Config, Mode
from nodepass.engine.relays import Relays
from nodepass.errors import AuthError, NodePassError, PoolTimeout, TlsError, TunnelError
from nodepass.net import tcp
from nodepass.net.readiness import Watch
from nodepass.observe.stats import TunnelStatistics
from nodepass.protocol import lines
from nodepass.protocol.handshake import ClientHandshake
from nodepass.protocol.messages import NONCE_SIZE, Dialect, Greeting
from nodepass.protocol.session import Backoff, Lost
from nodepass.runtime import threads
from nodepass.tls.codec import Records
from nodepass.tunnel.base import Tunnel
from nodepass.tunnel.slots import Queue

from .circle import Circle, Place
from .session import LINK, ClientSession
from .udp_target import UdpTarget

if TYPE_CHECKING:
    from nodepass.tls.contexts import ClientTls

READ_SIZE: Final = lines.MAX_GREETING
"""Bytes per read of a greeting: what follows it belongs to others."""
LEAST_QUEUE: Final = 64
"""Launches that may wait for a slot, however few slots there are; else as many as slots."""
SUFFIX_SIZE: Final = 2
"""Random bytes that tell two clients of one name apart, once the server said there are two."""


class Client(Tunnel):
    """The side that dials; see `Tunnel` for its arguments and life."""

    mode = Mode.CLIENT

    def __init__(self, url: str | Config, *, relays: Relays | None = None) -> None:
        super().__init__(url, relays=relays)
        self.name = self.config.name
        """What the server calls us; gets a suffix if another client has the same."""
        self.pairing: ClientSession | None = None
        """The live session, or None."""
        self._key: bytes | None = None
        self._tls: ClientTls | None = None
        self._loading = asyncio.Lock()

    async def _open(self) -> None:
        self._key = await self.stretch_password()
        if self.config.tls:  # what cannot work is to be known at the start
            await threads.run(self._load_tls)
            if self._tls is not None and self.config.tls == 2:
                self._tls.require_verification()
        self.watch = Watch()
        self.resources.callback(self.watch.close)
        self.resources.callback(self._close_pairing)
        shares = self.share_descriptors()
        self._limit, self.most_idle = shares.visitors, shares.idle
        target = self.config.target
        timeout = self.settings.dial_timeout
        self.udp_target = UdpTarget(target.host, target.port, timeout, self.log, self.spawn)
        """Where the datagrams of visitors go."""
        self.resources.callback(self.udp_target.close)
        self._slots = Queue(self._limit)
        self.circle = Circle(target.host, target.port)
        """Whether the target leads back to our own visitors."""
        self.resources.callback(self.circle.close)
        self._serving = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def _begin(self) -> None:
        self.log.info(
            "client starting",
            server=self.config.tunnel,
            target=self.config.target,
            carries=self.config.carries,
            name=self.name,
            engine=self.relays.kind,
        )
        self.spawn(self._run(), "the client")

    async def _drain(self) -> None:
        self.hurry()
        pairing = self.pairing
        if pairing is not None:
            pairing.drain()
        if self._open_relays:
            self.log.info("waiting for open relays", relays=len(self._open_relays))
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout):
                if pairing is not None:
                    await pairing.is_drained.wait()
                # Not only relays: a launch that was on its way has none yet.
                while self._serving:
                    await self._is_idle.wait()
        except TimeoutError:
            self.log.warn("SHUTDOWN_TIMEOUT is over", relays_open=len(self._open_relays))

    def _close_pairing(self) -> None:
        if self.pairing is not None:
            self.pairing.close("stopped")
            self.pairing = None

    def _look(self) -> TunnelStatistics:
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
            links_idle=0 if pairing is None else len(pairing.idle_links),
            links_wanted=0 if pairing is None else pairing.refill.wanted,
            links=counters.links,
            links_lost=counters.links_lost,
            strangers=counters.strangers,
            bytes_up=up,
            bytes_down=down,
            datagrams=self.datagrams(),
            rtt=None if pairing is None else pairing.session.rtt,
        )

    # ------------------------------------------------------------- used by a ClientSession

    def enter(self) -> None:
        """Count a visitor from its launch to the end of its relay."""
        if not self._serving:
            self._is_idle.clear()
        self._serving += 1

    def leave(self) -> None:
        """Stop counting a visitor."""
        self._serving -= 1
        if not self._serving:
            self._is_idle.set()

    def take_slot(self) -> bool:
        """Take a slot if one is free."""
        return self._slots.take_nowait()

    async def wait_slot(self) -> None:
        """Wait until fewer visitors than SEMAPHORE_LIMIT are served, at most DIAL_TIMEOUT.

        Raises:
            PoolTimeout: none has left in time, or as many as are served wait already.
        """
        if self._slots.is_full:
            self.log.repeated(
                "warn",
                "limit",
                "as many visitors as SEMAPHORE_LIMIT allows; more wait",
                limit=self._limit,
            )
            if self._serving - len(self._open_relays) > max(self._limit, LEAST_QUEUE):
                raise PoolTimeout("as many visitors wait as SEMAPHORE_LIMIT allows to be served")
        try:
            async with asyncio.timeout(self.settings.dial_timeout):
                await self._slots.take()
        except TimeoutError as exc:
            raise PoolTimeout("no slot of SEMAPHORE_LIMIT came free in time") from exc

    def free_slot(self) -> None:
        """Give back what `take_slot` or `wait_slot` has taken."""
        self._slots.give()

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
            except TlsError as exc:
                self.log.repeated("error", "tls", "no secure tunnel; trying again", why=str(exc))
            except AuthError as exc:
                seen = {} if exc.fingerprint is None else {"fingerprint": exc.fingerprint}
                self.log.repeated(
                    "error", "auth", "the server and we do not agree", why=str(exc), **seen
                )
            except (NodePassError, OSError) as exc:
                self.log.repeated(
                    "warn",
                    "dial",
                    "no tunnel; trying again",
                    server=self.config.tunnel,
                    why=str(exc),
                )
            except Exception as exc:  # noqa: BLE001 - a task's outer edge: the tunnel goes on
                self.log.error("a fault of ours in the client; please report it", error=exc)
            await asyncio.sleep(backoff.next_pause(random.random()))  # noqa: S311 - only jitter

    async def _pair(self) -> Lost:
        """Make one connection to the server and serve until it is lost."""
        tunnel = self.config.tunnel
        sock = await tcp.dial(tunnel.host, tunnel.port, self.settings.dial_timeout)
        try:
            host = tcp.peer_host(sock)
            handshake, greeting = await self.greet(sock)
            mode, records = greeting.tls, None
            if greeting.is_native:
                if mode:
                    records = await self.secure(sock, mode, is_native=True)
                pairing = await self._pair_native(sock, handshake, records, host, mode)
            else:
                port = greeting.data_port
                self.circle.learn(None, is_one_machine=False)
                pairing = ClientSession(self, Dialect.SEED, host, port, "", b"", 0, mode)
        except BaseException:
            tcp.finish(sock)  # not reset: an alert that says why may be on its way
            raise
        if self.is_stopping:  # it was asked for before the handshake was done
            tcp.finish(sock)
            return Lost("stopped")
        self.pairing = pairing
        self.counters.sessions += 1
        try:
            interval = self.settings.report_interval
            await pairing.control.open(sock, interval, handshake.rest(), records)
            self._tell_up(tcp.join_address(host, tunnel.port), pairing, records)
            self.doubt_links(LINK, is_back=True)  # all of them are of earlier sessions
            pairing.refill.fill()
            return await pairing.lost
        finally:
            pairing.close("stopped")
            self.pairing = None
            self.doubt_links(LINK)

    def new_handshake(self) -> ClientHandshake:
        """Return the rules for one fresh connection to the tunnel port."""
        return ClientHandshake(
            self._key, tls_floor=self.config.tls, allows_seed=self.config.compat
        )

    async def greet(self, sock: socket.socket) -> tuple[ClientHandshake, Greeting]:
        """Read the greeting of a fresh connection to the tunnel port.

        Raises:
            PeerWireError: what came is no greeting.
            TunnelError: none came in time, or it offers what we do not take.
        """
        handshake = self.new_handshake()
        timeout = self.settings.handshake_timeout
        said, greeting = b"", None
        try:
            async with asyncio.timeout(timeout):
                while greeting is None:
                    data = await self._read_some(sock)
                    said += data
                    greeting = handshake.receive_greeting(data)
        except TimeoutError as exc:
            text = f"no greeting within {timeout:g} s: the other side is {lines.identify(said)}"
            raise TunnelError(text) from exc
        return handshake, greeting

    async def secure(self, sock: socket.socket, mode: int, *, is_native: bool) -> Records:
        """Do the TLS handshake of a connection.

        Args:
            sock: connected; its greeting, if it has one, has been read.
            mode: 1 = whatever certificate the server has, 2 = verified.
            is_native: whether ALPN has to agree on our protocol.

        Raises:
            TlsError: it failed; says which side is at fault and why.
            TunnelError: it took longer than HANDSHAKE_TIMEOUT.
        """
        async with self._loading:  # many links may ask at once
            if self._tls is None:
                await threads.run(self._load_tls)
        assert self._tls is not None
        from nodepass.tls import contexts

        connection = self._tls.connect(mode, is_native=is_native)
        timeout = self.settings.handshake_timeout
        try:
            async with asyncio.timeout(timeout):
                result = await self.relays.secure(sock, connection)
        except TimeoutError as exc:
            text = f"the server has not finished the TLS handshake in {timeout:g} s"
            raise TunnelError(text) from exc
        if not result.is_done:
            why = result.describe_break()
            raise TlsError(why or contexts.explain(connection, result.detail, is_server=False))
        if is_native:
            contexts.check_alpn(connection)
        return Records(connection)

    def _load_tls(self) -> None:
        self.relays.load_tls()
        from nodepass.tls.contexts import ClientTls

        config = self.config
        self._tls = ClientTls(config.tunnel.host, config.ca, config.sni, self.log)

    def _reload(self, *, force: bool) -> bool:
        if self._tls is None:
            return False
        self._tls.reload(force=force)
        return self.config.ca is not None

    async def _read_some(self, sock: socket.socket) -> bytes:
        data = await asyncio.get_running_loop().sock_recv(sock, READ_SIZE)
        if not data:
            raise TunnelError("the other side closed the connection during the handshake")
        return data

    async def _pair_native(
        self,
        sock: socket.socket,
        handshake: ClientHandshake,
        records: Records | None,
        host: str,
        mode: int,
    ) -> ClientSession:
        loop = asyncio.get_running_loop()
        timeout = self.settings.handshake_timeout
        binding = b"" if records is None else records.binding()
        line = handshake.hello(self.name, secrets.token_bytes(NONCE_SIZE), binding)
        answer = None
        try:
            async with asyncio.timeout(timeout):
                await loop.sock_sendall(sock, line if records is None else records.seal(line))
                while answer is None:
                    data = await self._read_some(sock)
                    if records is not None:
                        data = records.open(data)
                        if records.has_ended and not data:
                            raise TunnelError("the server closed the connection before answering")
                    answer = handshake.receive_answer(data)
        except TimeoutError as exc:
            raise TunnelError(f"the server has not answered our hello in {timeout:g} s") from exc
        except AuthError as exc:
            if records is not None:
                from nodepass.tls.contexts import fingerprint_of

                exc.fingerprint = fingerprint_of(records.connection)
            raise
        welcome, key = answer
        here = sock.getsockname()[0]
        at = None if welcome.at is None else Place(*welcome.at)
        self.circle.learn(at, is_one_machine=tcp.plain_host(here) == host)
        if self.circle.is_near:
            self.log.repeated(
                "warn",
                "near circle",
                "the target may be where the server's visitors arrive; those who come back are "
                "turned away",
                target=self.config.target,
            )
        port = self.config.tunnel.port
        return ClientSession(
            self, Dialect.NATIVE, host, port, welcome.session, key, welcome.idle, mode
        )

    def _tell_up(self, server: str, pairing: ClientSession, records: Records | None) -> None:
        fields: dict[str, object] = {"dialect": pairing.session.dialect, "tls": pairing.tls}
        if records is not None:
            from nodepass.tls.contexts import fingerprint_of

            fields["fingerprint"] = fingerprint_of(records.connection)
        self.log.forget("dial", "tls", "auth")
        self.log.info("tunnel up", server=server, **fields)
        if pairing.session.dialect is Dialect.SEED and self.config.tls:
            self.log.warn(
                "the server speaks the seed dialect: its links have TLS, its control channel is "
                "plain; compat=0 refuses such servers"
            )
        if pairing.session.dialect is Dialect.NATIVE and pairing.tls == 1 and self._key is None:
            self.log.warn(
                "tls=1 without a password: nobody has verified the server's certificate; compare "
                "its fingerprint with the server's log, or use a password"
            )

    def _tell_lost(self, lost: Lost) -> None:
        tell = self.log.info if lost.is_orderly else self.log.warn
        tell("tunnel lost", reason=lost.reason, relays_open=len(self._open_relays))
        if lost.is_replaced:
            self.name = f"{self.config.name}-{secrets.token_hex(SUFFIX_SIZE)}"
            self.log.warn(
                "another client of our name has taken our place; going on under another name "
                "(choose one with name=)",
                name=self.name,
            )
