"""Reaching the server: dial, greeting, TLS, proof.

Owns: the password's key and the TLS context, loaded once TLS is wanted. Shared by `reconnect`,
which makes control channels, and the dialers of links.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from nodepass.errors import AuthError, TlsError, TunnelError
from nodepass.net import tcp_dial
from nodepass.protocol import lines, strangers
from nodepass.protocol.handshake import ClientHandshake
from nodepass.protocol.messages import NONCE_SIZE, Dialect, Greeting, Welcome
from nodepass.runtime import threads
from nodepass.tls.codec import Records
from nodepass.tunnel.context import Context

if TYPE_CHECKING:
    from nodepass.tls.contexts import ClientTls

READ_SIZE: Final = lines.MAX_GREETING
"""Bytes per read of a greeting: what follows it belongs to others."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the two ends of a new session have agreed on."""

    dialect: Dialect
    host: str
    """Address of the server, no name."""
    port: int
    """Where links are dialled."""
    tls: int
    """TLS mode that the server greeted us with, and every link is to have."""
    session: str = ""
    """Id of 16 hex characters; empty in the seed dialect."""
    key: bytes = field(default=b"", repr=False)
    """What links prove themselves with; empty in the seed dialect."""
    idle: int = 0
    """Idle links that the server wants."""


class ServerDialer:
    """Connections to the tunnel port, from the dial to the proof.

    Args:
        key: the stretched password, None where there is none.
    """

    def __init__(self, context: Context, key: bytes | None) -> None:
        self._config = context.config
        self._settings = context.settings
        self._log = context.log
        self._relays = context.relays
        self._key = key
        self._tls: ClientTls | None = None
        self._loading = asyncio.Lock()

    @property
    def has_password(self) -> bool:
        """Whether the two ends prove to each other that they know a password."""
        return self._key is not None

    async def load_tls(self) -> ClientTls:
        """Return the TLS context; made by the first who asks.

        Raises:
            ConfigError: its files are of no use.
            TlsError: OpenSSL is of no use.
        """
        async with self._loading:  # many links may ask at once
            if self._tls is None:
                self._tls = await threads.run(self._make_tls)
        return self._tls

    def reload(self, *, force: bool) -> bool:
        """Read certificate files that have changed, or all; return whether there are any."""
        if self._tls is None:
            return False
        self._tls.reload(force=force)
        return self._config.ca is not None

    def new_handshake(self) -> ClientHandshake:
        """Return the rules for one fresh connection to the tunnel port."""
        return ClientHandshake(
            self._key, tls_floor=self._config.tls, allows_seed=self._config.compat
        )

    async def dial(self) -> socket.socket:
        """Connect to the tunnel port.

        Raises:
            DialError: none of its addresses answers.
        """
        tunnel = self._config.tunnel
        return await tcp_dial.dial(tunnel.host, tunnel.port, self._settings.dial_timeout)

    async def greet(self, sock: socket.socket) -> tuple[ClientHandshake, Greeting]:
        """Read the greeting of a fresh connection to the tunnel port.

        Raises:
            PeerWireError: what came is no greeting.
            TunnelError: none came in time, or it offers what we do not take.
        """
        handshake = self.new_handshake()
        timeout = self._settings.handshake_timeout
        said, greeting = b"", None
        try:
            async with asyncio.timeout(timeout):
                while greeting is None:
                    data = await _read_some(sock)
                    said += data
                    greeting = handshake.receive_greeting(data)
        except TimeoutError as exc:
            text = (
                f"no greeting within {timeout:g} s: the other side is {strangers.identify(said)}"
            )
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
        tls = await self.load_tls()
        from nodepass.tls import contexts

        connection = tls.connect(mode, is_native=is_native)
        timeout = self._settings.handshake_timeout
        try:
            async with asyncio.timeout(timeout):
                result = await self._relays.secure(sock, connection)
        except TimeoutError as exc:
            text = f"the server has not finished the TLS handshake in {timeout:g} s"
            raise TunnelError(text) from exc
        if not result.is_done:
            raise TlsError(result.describe_failure(connection, is_server=False))
        if is_native:
            contexts.check_alpn(connection)
        return Records(connection)

    async def introduce(
        self, sock: socket.socket, handshake: ClientHandshake, records: Records | None, name: str
    ) -> tuple[Welcome, bytes]:
        """Say hello and hear the answer.

        Args:
            sock: connected; greeting and TLS handshake are done.
            name: what the server is to call us.

        Returns:
            The answer, and the key of the session's links.

        Raises:
            AuthError: the two do not agree on the password; carries the certificate's fingerprint.
            TunnelError: no answer came in time, or we are not wanted.
        """
        loop = asyncio.get_running_loop()
        timeout = self._settings.handshake_timeout
        binding = b"" if records is None else records.binding()
        line = handshake.hello(name, secrets.token_bytes(NONCE_SIZE), binding)
        answer = None
        try:
            async with asyncio.timeout(timeout):
                await loop.sock_sendall(sock, line if records is None else records.seal(line))
                while answer is None:
                    data = await _read_some(sock)
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
        return answer

    def _make_tls(self) -> ClientTls:
        self._relays.load_tls()
        from nodepass.tls.contexts import ClientTls

        config = self._config
        return ClientTls(config.tunnel.host, config.ca, config.sni, self._log)


async def _read_some(sock: socket.socket) -> bytes:
    data = await asyncio.get_running_loop().sock_recv(sock, READ_SIZE)
    if not data:
        raise TunnelError("the other side closed the connection during the handshake")
    return data
