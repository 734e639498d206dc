"""Both sides of the first lines: with and without a password, and with somebody in between."""

from __future__ import annotations

import dataclasses

import pytest

from nodepass.errors import AuthError, PeerWireError, TunnelError
from nodepass.protocol import lines, proof
from nodepass.protocol.handshake import ClientHandshake, ServerHandshake
from nodepass.protocol.messages import Greeting, Hello, LinkClaim, Refusal, Refuse, Welcome
from nodepass.protocol.proof import LinkKey

PASSWORD = b"k" * 32
"""A stretched password; how it was stretched makes no difference here."""
SERVER_NONCE = b"s" * 16
CLIENT_NONCE = b"c" * 16
FRESH = bytes(range(32))
BINDING = b"b" * 32
SESSION = "0123456789abcdef"

OPEN = Greeting(0, 0, SERVER_NONCE, False, 2)
CLOSED = Greeting(0, 0, SERVER_NONCE, True, 2)
SEED = Greeting(4323, 0)


def server_of(key: bytes | None = None, binding: bytes = b"") -> ServerHandshake:
    return bound(ServerHandshake(OPEN if key is None else CLOSED, key), binding)


def bound(server: ServerHandshake, binding: bytes) -> ServerHandshake:
    """Do what follows a TLS handshake."""
    server.binding = binding
    return server


def hello_at(server: ServerHandshake, data: bytes) -> Hello:
    opening = server.receive(data)
    assert isinstance(opening, Hello)
    return opening


def claim_at(server: ServerHandshake, data: bytes) -> LinkClaim:
    opening = server.receive(data)
    assert isinstance(opening, LinkClaim)
    return opening


def accepted(server: ServerHandshake, hello: Hello) -> tuple[bytes, bytes]:
    return server.accept(hello, session=SESSION, idle=16, fresh_key=FRESH)


def opened(
    key: bytes | None, *, binding: bytes = b"", server_binding: bytes | None = None
) -> tuple[ServerHandshake, ClientHandshake, bytes]:
    """Return both sides and the client's hello."""
    server = server_of(key, binding if server_binding is None else server_binding)
    client = ClientHandshake(key)
    assert client.receive_greeting(server.greeting_line) == (OPEN if key is None else CLOSED)
    return server, client, client.hello("web", CLIENT_NONCE, binding)


@pytest.mark.parametrize("binding", [b"", BINDING])
@pytest.mark.parametrize("key", [None, PASSWORD])
def test_they_meet(key: bytes | None, binding: bytes) -> None:
    server, client, line = opened(key, binding=binding)
    hello = hello_at(server, line + b"early")
    assert (hello.name, hello.nonce) == ("web", CLIENT_NONCE)
    welcome, server_session_key = accepted(server, hello)
    answer = client.receive_answer(welcome + b"ping://1\n")
    assert answer is not None
    assert (answer[0].session, answer[0].idle) == (SESSION, 16)
    assert answer[1] == server_session_key
    assert (server_session_key == FRESH) is (key is None)
    assert server.rest() == b"early"
    assert client.rest() == b"ping://1\n"


@pytest.mark.parametrize("key", [None, PASSWORD])
def test_byte_by_byte(key: bytes | None) -> None:
    server = server_of(key)
    client = ClientHandshake(key)
    *first, last = (bytes([byte]) for byte in server.greeting_line)
    assert [client.receive_greeting(byte) for byte in first] == [None] * len(first)
    assert client.receive_greeting(last) is not None
    *first, last = (bytes([byte]) for byte in client.hello("web", CLIENT_NONCE))
    assert [server.receive(byte) for byte in first] == [None] * len(first)
    hello = server.receive(last)
    assert isinstance(hello, Hello)
    *first, last = (bytes([byte]) for byte in accepted(server, hello)[0])
    assert [client.receive_answer(byte) for byte in first] == [None] * len(first)
    assert client.receive_answer(last) is not None


@pytest.mark.parametrize("name", ["x" * 255, "x", "/" * 85, "ä" * 42, "a b&c=d?e#f"])
def test_names_of_every_length(name: str) -> None:
    server, client, _ = opened(PASSWORD)
    hello = hello_at(server, client.hello(name, CLIENT_NONCE))
    assert hello.name == name
    assert client.receive_answer(accepted(server, hello)[0]) is not None


# ----------------------------------------------------------------- the server's judgement


def test_server_without_a_password_passes_over_a_proof() -> None:
    server, _, line = opened(None)
    hello = dataclasses.replace(hello_at(server, line), proof=b"p" * 32)
    assert accepted(server, hello)[1] == FRESH


@pytest.mark.parametrize(
    ("proof_of", "why"),
    [(None, "no password"), (b"p" * 32, "wrong password")],
)
def test_server_refuses_without_the_password(proof_of: bytes | None, why: str) -> None:
    server = server_of(PASSWORD)
    hello = hello_at(server, lines.pack_hello(Hello("web", CLIENT_NONCE, proof_of)))
    with pytest.raises(AuthError, match=why) as caught:
        accepted(server, hello)
    assert lines.pack_answer(Refuse(caught.value.reason)) == b"refuse://auth\n"


def test_server_refuses_the_proof_of_another_connection() -> None:
    _, _, line = opened(PASSWORD)
    other = ServerHandshake(dataclasses.replace(CLOSED, nonce=b"o" * 16), PASSWORD)
    with pytest.raises(AuthError):
        accepted(other, hello_at(other, line))


def test_server_refuses_a_proof_through_another_tls_connection() -> None:
    server, _, line = opened(PASSWORD, binding=BINDING, server_binding=b"o" * 32)
    with pytest.raises(AuthError):
        accepted(server, hello_at(server, line))


@pytest.mark.parametrize("key", [None, PASSWORD])
@pytest.mark.parametrize("version", [0, 1])
def test_server_refuses_an_old_version(key: bytes | None, version: int) -> None:
    server = server_of(key)
    hello = hello_at(server, lines.pack_hello(Hello("web", CLIENT_NONCE, version=version)))
    with pytest.raises(TunnelError, match=f"dialect {version}") as caught:
        accepted(server, hello)
    assert caught.value.reason == Refusal.VERSION


def proven_hello(server: ServerHandshake, bare: bytes) -> bytes:
    """Do what a client of any make does: prove the line that it sends, whatever is in it."""
    script = proof.length_prefixed(server.greeting_line[:-1], b"", bare)
    return bare + b"&p=" + proof.client_proof(PASSWORD, script).hex().encode() + b"\n"


@pytest.mark.parametrize(
    "bare",
    [
        b"hello://web?v=2&n=%s",
        b"hello://web?v=2&n=%s&later=1",
        b"hello://web?later&n=%s&v=3",
        b"hello://%%77%%65b?v=2&n=%s",
        b"hello://a%%2fb?v=2&n=%s",
        b"hello://a/b?v=2&n=%s",
        b"hello://%%ff?v=2&n=%s",
        b"hello://" + b"/" * 255 + b"?v=2&n=%s",
        b"hello://" + b"%%ff" * 85 + b"?v=002&n=%s",
    ],
)
def test_server_takes_a_proof_over_the_line_as_it_was_sent(bare: bytes) -> None:
    """T of docs/protocol.md is made of lines, not of what we understood of them."""
    server = server_of(PASSWORD)
    line = proven_hello(server, bare % CLIENT_NONCE.hex().encode())
    assert accepted(server, hello_at(server, line))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"web", b"wed"),
        (b"web", b"%77eb"),
        (b"v=2", b"v=3"),
        (b"v=2", b"v=02"),
        (b"v=2", b"v=2&later=1"),
        (CLIENT_NONCE.hex().encode(), b"00" * 16),
        (b"&later=1", b""),
    ],
)
def test_server_sees_that_the_hello_was_changed(old: bytes, new: bytes) -> None:
    server = server_of(PASSWORD)
    bare = b"hello://web?v=2&n=%s&later=1" % CLIENT_NONCE.hex().encode()
    line = proven_hello(server, bare)
    assert line.count(old) >= 1
    with pytest.raises((AuthError, PeerWireError)):
        accepted(server, hello_at(server, line.replace(old, new)))


@pytest.mark.parametrize(
    "data", [b"\n", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x00\n", b"x" * 1024, b"tcp://1\n"]
)
def test_server_refuses_garbage(data: bytes) -> None:
    server = server_of()
    with pytest.raises(PeerWireError):
        server.receive(data)


def test_server_waits_for_a_line_that_still_fits() -> None:
    server = server_of()
    assert server.receive(b"x" * 1023) is None
    with pytest.raises(PeerWireError, match="longer"):
        server.receive(b"x")


# ---------------------------------------------------------------------------------- links


@pytest.mark.parametrize("binding", [b"", BINDING])
def test_link_is_proven(binding: bytes) -> None:
    server, client = server_of(binding=binding), ClientHandshake()
    assert client.receive_greeting(server.greeting_line) == OPEN
    line = client.claim_link(LinkKey(FRESH, SESSION), 7, binding)
    claim = claim_at(server, line + b"visitor's bytes")
    assert (claim.session, claim.number) == (SESSION, 7)
    assert server.is_link_proven(claim, LinkKey(FRESH, SESSION))
    assert not server.is_link_proven(claim, LinkKey(FRESH[::-1], SESSION))
    assert server.rest() == b"visitor's bytes"


@pytest.mark.parametrize(
    "server",
    [
        ServerHandshake(dataclasses.replace(OPEN, nonce=b"o" * 16)),
        bound(ServerHandshake(OPEN), BINDING),
        ServerHandshake(dataclasses.replace(OPEN, tls=1)),
    ],
    ids=["another connection", "another TLS connection", "TLS taken away"],
)
def test_link_proof_holds_for_its_own_connection_only(server: ServerHandshake) -> None:
    client = ClientHandshake()
    client.receive_greeting(server_of().greeting_line)
    claim = claim_at(server, client.claim_link(LinkKey(FRESH, SESSION), 7))
    assert not server.is_link_proven(claim, LinkKey(FRESH, SESSION))


def test_link_proof_holds_for_its_own_claim_only() -> None:
    server, client = server_of(), ClientHandshake()
    client.receive_greeting(server.greeting_line)
    claim = claim_at(server, client.claim_link(LinkKey(FRESH, SESSION), 7))
    for other in (
        dataclasses.replace(claim, session="f" * 16),
        dataclasses.replace(claim, number=8),
        dataclasses.replace(claim, proof=b"p" * 32),
    ):
        assert not server.is_link_proven(other, LinkKey(FRESH, SESSION))


def greeted(binding: bytes, nonce: bytes) -> tuple[ServerHandshake, ClientHandshake]:
    """Return both sides of a further connection of the pair."""
    server = ServerHandshake(dataclasses.replace(CLOSED, nonce=nonce), PASSWORD)
    client = ClientHandshake(PASSWORD)
    client.receive_greeting(server.greeting_line)
    return bound(server, binding), client


@pytest.mark.parametrize("bindings", [(b"", b""), (BINDING, b"l" * 32)], ids=["plain", "tls"])
def test_links_of_a_session_that_was_made_with_a_password(bindings: tuple[bytes, bytes]) -> None:
    """Their key is never sent; each is bound to its own greeting and its own TLS."""
    control, own = bindings
    server, client, line = opened(PASSWORD, binding=control)
    welcome, server_key = accepted(server, hello_at(server, line))
    answer = client.receive_answer(welcome)
    assert answer is not None
    assert answer[1] == server_key
    assert server_key.hex().encode() not in welcome
    link, link_client = greeted(own, b"1" * 16)
    line = link_client.claim_link(LinkKey(answer[1], SESSION), 7, own)
    assert link.is_link_proven(claim_at(link, line), LinkKey(server_key, SESSION))
    replayed, _ = greeted(own, b"2" * 16)
    assert not replayed.is_link_proven(claim_at(replayed, line), LinkKey(server_key, SESSION)), (
        "another greeting"
    )
    other_tls, _ = greeted(b"m" * 32, b"1" * 16)
    assert not other_tls.is_link_proven(claim_at(other_tls, line), LinkKey(server_key, SESSION)), (
        "another TLS"
    )
    assert not link.is_link_proven(claim_at(link, line), LinkKey(FRESH, SESSION)), (
        "the key of no password"
    )
    assert not link.is_link_proven(claim_at(link, line), LinkKey(PASSWORD, SESSION)), (
        "the password's own key"
    )


def test_session_keys_of_two_sessions_differ() -> None:
    """Or a claim of an old session would be good for the new one."""
    server, _, line = opened(PASSWORD)
    hello = hello_at(server, line)
    keys = [
        server.accept(hello, session=session, idle=1, fresh_key=FRESH)[1]
        for session in (SESSION, SESSION[::-1])
    ]
    assert keys[0] != keys[1]
    assert FRESH not in keys


def test_binding_may_be_set_when_tls_has_come_after_the_greeting() -> None:
    server = server_of(PASSWORD)
    client = ClientHandshake(PASSWORD)
    assert client.receive_greeting(server.greeting_line) == CLOSED
    server.binding = BINDING
    hello = hello_at(server, client.hello("web", CLIENT_NONCE, BINDING))
    assert client.receive_answer(accepted(server, hello)[0]) is not None


def test_replayed_hello_is_refused_though_the_password_is_right() -> None:
    _, _, line = opened(PASSWORD)
    server, _ = greeted(b"", b"2" * 16)
    with pytest.raises(AuthError, match="somebody in between") as caught:
        accepted(server, hello_at(server, line))
    assert caught.value.reason == Refusal.AUTH


@pytest.mark.parametrize("lowered", [0, 1])
def test_f03_lowered_tls_mode_is_noticed_without_a_floor(lowered: int) -> None:
    """The middle man speaks to each side as the other would; the greeting betrays him."""
    server = ServerHandshake(dataclasses.replace(CLOSED, tls=2), PASSWORD)
    shown = dataclasses.replace(CLOSED, tls=lowered)
    client = ClientHandshake(PASSWORD)
    assert client.receive_greeting(lines.pack_greeting(shown)) == shown
    with pytest.raises(AuthError):
        accepted(server, hello_at(server, client.hello("web", CLIENT_NONCE)))


# ----------------------------------------------------------------- the client's judgement


@pytest.mark.parametrize("key", [None, PASSWORD])
def test_client_reads_no_further_than_the_greeting(key: bytes | None) -> None:
    client = ClientHandshake(key)
    assert client.receive_greeting(server_of(key).greeting_line + b"visitor's") is not None
    assert client.rest() == b"visitor's"


def test_client_takes_a_seed_server_with_its_first_heartbeat() -> None:
    client = ClientHandshake()
    assert client.receive_greeting(b"//4323#0\n\n//aaaa0001#1\n") == SEED
    assert client.rest() == b"\n//aaaa0001#1\n"


@pytest.mark.parametrize(
    ("client", "greeting", "kind", "why", "reason"),
    [
        (ClientHandshake(PASSWORD), OPEN, AuthError, "asks for no password", ""),
        (ClientHandshake(PASSWORD), SEED, AuthError, "asks for no password", ""),
        (ClientHandshake(), CLOSED, AuthError, "wants a password", ""),
        (ClientHandshake(tls_floor=1), OPEN, TunnelError, "less than the tls=1", Refusal.TLS),
        (ClientHandshake(tls_floor=2), SEED, TunnelError, "less than the tls=2", Refusal.TLS),
        (
            ClientHandshake(tls_floor=2),
            dataclasses.replace(OPEN, tls=1),
            TunnelError,
            "offers tls=1",
            Refusal.TLS,
        ),
        (ClientHandshake(allows_seed=False), SEED, TunnelError, "compat=0", Refusal.VERSION),
    ],
)
def test_client_refuses_a_greeting(
    client: ClientHandshake, greeting: Greeting, kind: type[TunnelError], why: str, reason: str
) -> None:
    with pytest.raises(TunnelError, match=why) as caught:
        client.receive_greeting(lines.pack_greeting(greeting))
    assert type(caught.value) is kind
    assert caught.value.reason == reason


@pytest.mark.parametrize("tls", [1, 2])
def test_client_takes_more_tls_than_it_asks_for(tls: int) -> None:
    greeting = dataclasses.replace(OPEN, tls=tls)
    assert ClientHandshake(tls_floor=1).receive_greeting(lines.pack_greeting(greeting)) == greeting


@pytest.mark.parametrize("data", [b"\n", b"HTTP/1.1 200 OK\r\n", b"//1#0" + b" " * 256])
def test_client_refuses_garbage_for_a_greeting(data: bytes) -> None:
    with pytest.raises(PeerWireError):
        ClientHandshake().receive_greeting(data)


def test_what_came_before_our_hello_is_no_answer_to_it() -> None:
    """Whoever sits between could else answer, in front of TLS, a question not yet asked."""
    server, client = server_of(), ClientHandshake()
    forged = lines.pack_answer(Welcome("f" * 16, 1, key=b"f" * 32))
    assert client.receive_greeting(server.greeting_line + forged) == OPEN
    welcome, _ = accepted(server, hello_at(server, client.hello("web", CLIENT_NONCE)))
    answer = client.receive_answer(welcome)
    assert answer is not None
    assert answer == (Welcome(SESSION, 16, key=FRESH), FRESH)


def test_a_later_release_may_answer_at_length() -> None:
    """MAX_GREETING bounds the greeting only."""
    server, client, line = opened(None)
    welcome, _ = accepted(server, hello_at(server, line))
    longer = welcome[:-1] + b"&later=" + b"x" * (1024 - len(welcome) - len("&later=")) + b"\n"
    assert len(longer) == 1024
    assert client.receive_answer(longer) is not None


@pytest.mark.parametrize(
    ("key", "answer", "kind", "why"),
    [
        (None, b"refuse://auth\n", AuthError, "refused us: auth"),
        (PASSWORD, b"refuse://auth\n", AuthError, "refused us: auth"),
        (None, b"refuse://limit\n", TunnelError, "refused us: limit"),
        (None, b"refuse://some-later-word\n", TunnelError, "some-later-word"),
        (None, b"\n", PeerWireError, "not one of our lines"),
        (None, b"x" * 1024, PeerWireError, "longer"),
        (None, lines.pack_answer(Welcome(SESSION, 1)), PeerWireError, "no session key"),
        (None, lines.pack_answer(Welcome(SESSION, 1, proof=FRESH)), PeerWireError, "no session"),
        (PASSWORD, lines.pack_answer(Welcome(SESSION, 1)), AuthError, "could not prove"),
        (PASSWORD, lines.pack_answer(Welcome(SESSION, 1, key=FRESH)), AuthError, "could not"),
        (PASSWORD, lines.pack_answer(Welcome(SESSION, 1, proof=FRESH)), AuthError, "could not"),
    ],
)
def test_client_refuses_an_answer(
    key: bytes | None, answer: bytes, kind: type[Exception], why: str
) -> None:
    _, client, _ = opened(key)
    with pytest.raises(kind, match=why) as caught:
        client.receive_answer(answer)
    assert type(caught.value) is kind


def test_client_notes_the_reason_of_a_refusal() -> None:
    _, client, _ = opened(None)
    with pytest.raises(TunnelError) as caught:
        client.receive_answer(b"refuse://busy\n")
    assert caught.value.reason == Refusal.BUSY


def test_client_with_a_password_takes_no_given_key() -> None:
    """Or a middle man could choose what links prove themselves with."""
    server, client, line = opened(PASSWORD)
    welcome, key = accepted(server, hello_at(server, line))
    answer = client.receive_answer(welcome[:-1] + b"&k=" + FRESH.hex().encode() + b"\n")
    assert answer is not None
    assert answer[1] == key != FRESH


def test_client_refuses_the_welcome_of_another_session() -> None:
    server, client, line = opened(PASSWORD)
    welcome, _ = accepted(server, hello_at(server, line))
    with pytest.raises(AuthError):
        client.receive_answer(welcome.replace(SESSION.encode(), b"f" * 16))


def test_a_client_proof_does_not_pass_for_a_server_proof() -> None:
    """Whoever has no password could otherwise send the client its own proof back."""
    server, client, line = opened(PASSWORD)
    mine = hello_at(server, line).proof
    with pytest.raises(AuthError):
        client.receive_answer(lines.pack_answer(Welcome(SESSION, 1, proof=mine)))
