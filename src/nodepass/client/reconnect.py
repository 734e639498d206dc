"""One session with the server after another: connect, serve, lose, wait.

Owns: the live session, the name that the server knows us by, and the pauses between tries. Made
by `client`; runs until it is cancelled.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
from collections.abc import Callable
from typing import Final

from nodepass.config.address import Address, join_address
from nodepass.errors import AuthError, NodePassError, TlsError
from nodepass.net import hosts, tcp
from nodepass.protocol.backoff import Backoff
from nodepass.protocol.handshake import ClientHandshake
from nodepass.protocol.messages import Dialect
from nodepass.protocol.session import Lost
from nodepass.tls.codec import Records
from nodepass.tunnel.context import Context

from .circle import Circle
from .server_dialer import Agreement, ServerDialer
from .session import LINK, ClientSession

SUFFIX_SIZE: Final = 2
"""Random bytes that tell two clients of one name apart, once the server said there are two."""


class Reconnect:
    """Keep a session with the server.

    Args:
        dialer: reaches the server.
        circle: is told where the server's visitors arrive.
        begin: makes a session of what was agreed on.
    """

    def __init__(
        self,
        context: Context,
        dialer: ServerDialer,
        circle: Circle,
        begin: Callable[[Agreement], ClientSession],
    ) -> None:
        self._config = context.config
        self._settings = context.settings
        self._log = context.log
        self._counters = context.counters
        self._open_relays = context.open_relays
        self._dialer = dialer
        self._circle = circle
        self._begin = begin
        self._is_closed = False
        self.name = self._config.name
        """What the server calls us; gets a suffix if another client has the same."""
        self.session: ClientSession | None = None
        """The live one, or None."""

    async def run(self) -> None:
        """Connect again and again, until `close`."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(self._settings.service_cooldown)
        while not self._is_closed:
            began = loop.time()
            try:
                lost = await self._connect_and_serve()
                backoff.reset_after(loop.time() - began)
                if not self._is_closed:
                    self._tell_lost(lost)
            except TlsError as exc:
                self._log.repeated("error", "tls", "no secure tunnel; trying again", why=str(exc))
            except AuthError as exc:
                seen = {} if exc.fingerprint is None else {"fingerprint": exc.fingerprint}
                self._log.repeated(
                    "error", "auth", "the server and we do not agree", why=str(exc), **seen
                )
            except (NodePassError, OSError) as exc:
                self._log.repeated(
                    "warn",
                    "dial",
                    "no tunnel; trying again",
                    server=self._config.tunnel,
                    why=str(exc),
                )
            except Exception as exc:  # noqa: BLE001 - a task's outer edge: the tunnel goes on
                self._log.error("an internal error in the client; please report it", error=exc)
            await asyncio.sleep(backoff.next_pause(random.random()))  # noqa: S311 - only jitter

    def drain(self) -> None:
        """Connect no more, and ask for no more launches."""
        self._is_closed = True
        if self.session is not None:
            self.session.drain()

    def close(self) -> None:
        """End the live session; idempotent. Relays go on."""
        self._is_closed = True
        if self.session is not None:
            self.session.close("stopped")
            self.session = None

    async def _connect_and_serve(self) -> Lost:
        """Make one connection to the server and serve until it is lost."""
        sock = await self._dialer.dial()
        try:
            agreement, handshake, records = await self._agree(sock)
            session = self._begin(agreement)
        except BaseException:
            tcp.finish(sock)  # not reset: an alert that says why may be on its way
            raise
        if self._is_closed:  # it was asked for before the handshake was done
            tcp.finish(sock)
            return Lost("stopped")
        self.session = session
        self._counters.sessions += 1
        try:
            interval = self._settings.report_interval
            await session.control.open(sock, interval, handshake.rest(), records)
            self._tell_up(agreement, records)
            self._open_relays.doubt_links(LINK, is_back=True)  # all are of earlier sessions
            session.refill.fill()
            return await session.lost
        finally:
            session.close("stopped")
            self.session = None
            self._open_relays.doubt_links(LINK)

    async def _agree(
        self, sock: socket.socket
    ) -> tuple[Agreement, ClientHandshake, Records | None]:
        """Do all of the handshake on a fresh connection to the tunnel port."""
        host = tcp.peer_host(sock)
        handshake, greeting = await self._dialer.greet(sock)
        tls, records = greeting.tls, None
        if not greeting.is_native:
            self._circle.learn(None, is_one_machine=False)
            return Agreement(Dialect.SEED, host, greeting.data_port, tls), handshake, None
        if tls:
            records = await self._dialer.secure(sock, tls, is_native=True)
        welcome, key = await self._dialer.introduce(sock, handshake, records, self.name)
        self._learn_arrival(
            welcome.at, is_one_machine=hosts.plain_host(sock.getsockname()[0]) == host
        )
        port = self._config.tunnel.port
        agreement = Agreement(Dialect.NATIVE, host, port, tls, welcome.session, key, welcome.idle)
        return agreement, handshake, records

    def _learn_arrival(self, at: tuple[str, int] | None, *, is_one_machine: bool) -> None:
        self._circle.learn(None if at is None else Address(*at), is_one_machine=is_one_machine)
        if self._circle.is_near:
            self._log.repeated(
                "warn",
                "near circle",
                "the target may be where the server's visitors arrive; those who come back are "
                "turned away",
                target=self._config.target,
            )

    def _tell_up(self, agreement: Agreement, records: Records | None) -> None:
        dialect, tls = agreement.dialect, agreement.tls
        fields: dict[str, object] = {"dialect": dialect, "tls": tls}
        if records is not None:
            from nodepass.tls.contexts import fingerprint_of

            fields["fingerprint"] = fingerprint_of(records.connection)
        self._log.forget("dial", "tls", "auth")
        server = join_address(agreement.host, self._config.tunnel.port)
        self._log.info("tunnel up", server=server, **fields)
        if dialect is Dialect.SEED and self._config.tls:
            self._log.warn(
                "the server speaks the seed dialect: its links have TLS, its control channel is "
                "plain; compat=0 refuses such servers"
            )
        if dialect is Dialect.NATIVE and tls == 1 and not self._dialer.has_password:
            self._log.warn(
                "tls=1 without a password: nobody has verified the server's certificate; compare "
                "its fingerprint with the server's log, or use a password"
            )

    def _tell_lost(self, lost: Lost) -> None:
        tell = self._log.info if lost.is_orderly else self._log.warn
        tell("tunnel lost", reason=lost.reason, relays_open=len(self._open_relays))
        if lost.is_replaced:
            self.name = f"{self._config.name}-{secrets.token_hex(SUFFIX_SIZE)}"
            self._log.warn(
                "another client of our name has taken our place; going on under another name "
                "(choose one with name=)",
                name=self.name,
            )
