"""Rules of the first lines on a connection to the tunnel port, either side. Sans-IO.

Bytes go in, values and bytes come out. Must never touch a socket, a clock, randomness or a
log: nonces and fresh keys are arguments.

    ServerHandshake  greeting -> opening line -> a hello's answer, or a link's check
    ClientHandshake  greeting -> hello -> welcome, or a link's claim
"""

from __future__ import annotations

from nodepass.errors import AuthError, PeerWireError, TunnelError

from . import lines, proof
from .messages import VERSION, Greeting, Hello, LinkClaim, Refusal, Refuse, Welcome


class ServerHandshake:
    """The server's side of one connection at the tunnel port, until it is known what it is.

    Args:
        greeting: what to open with; its nonce is fresh for every connection.
        key: the stretched password, or None where there is none.
    """

    def __init__(self, greeting: Greeting, key: bytes | None = None) -> None:
        self.greeting_line = lines.pack_greeting(greeting)
        """Bytes to send first, LF included."""
        self.binding = b""
        """TLS exporter bytes of this connection, empty without TLS; to be set before `accept`."""
        self._key = key
        self._lines = lines.LineBuffer()
        self._opening_line = b""

    def receive(self, data: bytes) -> Hello | LinkClaim | None:
        """Take bytes; return the opening once its line is whole.

        Raises:
            PeerWireError: the line is neither a hello nor a link claim, or too long.
        """
        self._lines.feed(data)
        line = self._lines.next_line()
        if line is None:
            return None
        self._opening_line = line
        return lines.parse_opening(line)

    def rest(self) -> bytes:
        """Hand over the bytes that came behind the opening line."""
        return self._lines.rest()

    def accept(
        self,
        hello: Hello,
        *,
        session: str,
        idle: int,
        fresh_key: bytes,
        at: tuple[str, int] | None = None,
    ) -> tuple[bytes, bytes]:
        """Check the hello that `receive` returned, and answer it.

        Args:
            session: 16 hex characters nobody has used.
            idle: how many idle links to ask for.
            at: where visitors arrive, for the client to know; None = not said.
            fresh_key: KEY_SIZE random bytes, used where no password gives a key.

        Returns:
            The welcome line, and the key that this session's links prove themselves with.

        Raises:
            AuthError: the proof is missing or wrong; answer with `refuse://auth`.
            TunnelError: the version is not ours; answer with its `reason`.
        """
        if hello.version < VERSION:
            raise TunnelError(f"dialect {hello.version} is not known", reason=Refusal.VERSION)
        if self._key is None:
            return lines.pack_answer(Welcome(session, idle, key=fresh_key, at=at)), fresh_key
        script = proof.transcript(self.greeting_line[:-1], self.binding, self._opening_line)
        wanted = proof.client_proof(self._key, script)
        if hello.proof is None or not proof.is_same_proof(hello.proof, wanted):
            if hello.proof is None:
                raise AuthError("the client came with no password", reason=Refusal.AUTH)
            raise AuthError(
                "the client came with a wrong password, or somebody in between has changed the "
                "handshake",
                reason=Refusal.AUTH,
            )
        mac = proof.server_proof(self._key, script, session)
        answer = Welcome(session, idle, proof=mac, at=at)
        return lines.pack_answer(answer), proof.session_key(self._key, script, session)

    @property
    def needs_password(self) -> bool:
        """Whether a client has to prove that it has the password."""
        return self._key is not None

    def is_link_proven(self, claim: LinkClaim, key: proof.LinkKey) -> bool:
        """Tell whether this connection belongs to the session that it names."""
        wanted = key.proof(self.greeting_line[:-1], self.binding, claim.number)
        return claim.session == key.session and proof.is_same_proof(claim.proof, wanted)


class ClientHandshake:
    """The client's side of one connection to the tunnel port.

    Args:
        key: the stretched password, or None where there is none.
        tls_floor: the least TLS mode this client accepts.
        allows_seed: whether a server of the seed dialect may be used.
    """

    def __init__(
        self, key: bytes | None = None, *, tls_floor: int = 0, allows_seed: bool = True
    ) -> None:
        self._key = key
        self._tls_floor = tls_floor
        self._allows_seed = allows_seed and key is None
        self._lines = lines.LineBuffer(lines.MAX_GREETING)
        self._greeting_line = b""
        self._script = b""

    def receive_greeting(self, data: bytes) -> Greeting | None:
        """Take bytes; return the greeting once its line is whole.

        Raises:
            PeerWireError: what came is no greeting; says what the peer looks like.
            AuthError: the server cannot prove anything although we have a password.
            TunnelError: a TLS mode below the floor, or a dialect that is not allowed.
        """
        self._lines.feed(data)
        line = self._lines.next_line()
        if line is None:
            return None
        greeting = lines.parse_greeting(line)
        self._greeting_line = line
        if greeting.tls < self._tls_floor:
            raise TunnelError(
                f"the server offers tls={greeting.tls}, less than the tls={self._tls_floor} "
                "asked for; somebody in between may have lowered it",
                reason=Refusal.TLS,
            )
        if self._key is not None and not (greeting.is_native and greeting.needs_password):
            raise AuthError("the server asks for no password, so it cannot prove that it has ours")
        if self._key is None and greeting.needs_password:
            raise AuthError("the server wants a password and none is given")
        if not greeting.is_native and not self._allows_seed:
            raise TunnelError(
                "the server speaks only the seed dialect (NodePass 1.0.3/1.0.4), and compat=0 "
                "forbids it",
                reason=Refusal.VERSION,
            )
        return greeting

    def hello(self, name: str, nonce: bytes, binding: bytes = b"") -> bytes:
        """Return the hello line to send; `nonce` is NONCE_SIZE fresh random bytes."""
        line = lines.pack_hello(Hello(name, nonce))
        self._lines = lines.LineBuffer()
        if self._key is None:
            return line
        self._script = proof.transcript(self._greeting_line, binding, line[:-1])
        return lines.pack_hello(Hello(name, nonce, proof.client_proof(self._key, self._script)))

    def receive_answer(self, data: bytes) -> tuple[Welcome, bytes] | None:
        """Take bytes; return the welcome and the session key once the line is whole.

        Raises:
            PeerWireError: what came is no answer.
            AuthError: the server refused our proof, or its own is wrong.
            TunnelError: the server refused us; `reason` is its word.
        """
        self._lines.feed(data)
        line = self._lines.next_line()
        if line is None:
            return None
        answer = lines.parse_answer(line)
        if isinstance(answer, Refuse):
            if answer.reason == Refusal.AUTH:
                raise AuthError(
                    "the server refused us: auth; it has another password, or somebody in between "
                    "has changed the handshake",
                    reason=answer.reason,
                )
            raise TunnelError(f"the server refused us: {answer.reason}", reason=answer.reason)
        if self._key is None:
            if answer.key is None:
                raise PeerWireError("welcome: no session key")
            return answer, answer.key
        wanted = proof.server_proof(self._key, self._script, answer.session)
        if answer.proof is None or not proof.is_same_proof(answer.proof, wanted):
            raise AuthError(
                "the server could not prove that it has our password; somebody in between may "
                "have changed the handshake"
            )
        return answer, proof.session_key(self._key, self._script, answer.session)

    def claim_link(self, key: proof.LinkKey, number: int, binding: bytes = b"") -> bytes:
        """Return the line that makes this connection a link of a session."""
        p = key.proof(self._greeting_line, binding, number)
        return lines.pack_link_claim(LinkClaim(key.session, number, p))

    def rest(self) -> bytes:
        """Hand over the bytes that came behind the last line."""
        return self._lines.rest()
