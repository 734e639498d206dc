"""A server and a client joined by a fake wire, and somebody who sits on it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from hypothesis import assume, example, given
from hypothesis import strategies as st
from tests.property.strategies import (
    bindings,
    cuts,
    edited,
    garbage,
    keys,
    names,
    nonces,
    numbers,
    sessions,
)

from nodepass.errors import AuthError, PeerWireError, TunnelError
from nodepass.protocol import lines
from nodepass.protocol.handshake import ClientHandshake, ServerHandshake
from nodepass.protocol.messages import Greeting, Hello, LinkClaim, Welcome
from nodepass.protocol.proof import LinkKey

FRESH = bytes(range(32))
TLS = st.integers(0, 2)


@dataclass
class Meeting:
    """One handshake: what each side holds."""

    server: ServerHandshake
    client: ClientHandshake
    session: str
    idle: int
    name: str
    nonce: bytes
    binding: bytes

    def greeting(self) -> bytes:
        return self.server.greeting_line

    def hello(self, greeting: bytes) -> bytes | None:
        """What the client answers; None = it waits for more."""
        if self.client.receive_greeting(greeting) is None:
            return None
        return self.client.hello(self.name, self.nonce, self.binding)

    def welcome(self, hello: bytes) -> tuple[bytes, bytes] | None:
        """What the server answers, and its session key."""
        opening = self.server.receive(hello)
        if not isinstance(opening, Hello):
            return None
        return self.server.accept(opening, session=self.session, idle=self.idle, fresh_key=FRESH)


@st.composite
def meetings(draw: st.DrawFn, password: st.SearchStrategy[bytes | None]) -> Meeting:
    key, binding = draw(password), draw(bindings)
    greeting = Greeting(draw(st.integers(0, 65535)), draw(TLS), draw(nonces), key is not None, 2)
    server = ServerHandshake(greeting, key)
    server.binding = binding
    return Meeting(
        server,
        ClientHandshake(key, tls_floor=draw(st.integers(0, greeting.tls))),
        draw(sessions),
        draw(numbers),
        draw(names),
        draw(nonces),
        binding,
    )


@given(st.data(), meetings(st.none() | keys), st.binary(max_size=40), st.binary(max_size=40))
def test_they_meet_over_any_cut(
    data: st.DataObject, meeting: Meeting, early: bytes, late: bytes
) -> None:
    """Both come to one key, and what follows the handshake stays untouched."""
    server, client = meeting.server, meeting.client
    greeting = None
    for piece in data.draw(cuts(meeting.greeting())):
        assert greeting is None
        greeting = client.receive_greeting(piece)
    assert greeting is not None
    opening: Hello | LinkClaim | None = None
    rest = b""
    line = client.hello(meeting.name, meeting.nonce, meeting.binding)
    for piece in data.draw(cuts(line + early)):
        if opening is None:
            opening = server.receive(piece)
        else:
            rest += piece
    assert server.rest() + rest == early
    assert isinstance(opening, Hello)
    assert (opening.name, opening.nonce) == (meeting.name, meeting.nonce)
    welcome, server_key = server.accept(
        opening, session=meeting.session, idle=meeting.idle, fresh_key=FRESH
    )
    answer: tuple[Welcome, bytes] | None = None
    rest = b""
    for piece in data.draw(cuts(welcome + late)):
        if answer is None:
            answer = client.receive_answer(piece)
        else:
            rest += piece
    assert client.rest() + rest == late
    assert answer is not None
    assert (answer[0].session, answer[0].idle) == (meeting.session, meeting.idle)
    assert answer[1] == server_key


@given(meetings(keys), st.none() | keys)
def test_another_password_never_meets(meeting: Meeting, other: bytes | None) -> None:
    assume(other != meeting.client._key)
    client = ClientHandshake(other)
    try:
        client.receive_greeting(meeting.greeting())
        line = client.hello(meeting.name, meeting.nonce, meeting.binding)
        meeting.welcome(line)
    except AuthError:
        return
    raise AssertionError("the server took a proof without its password")


# ------------------------------------------------------------------------ a middle man


@given(st.data(), meetings(keys), st.integers(1, 3))
def test_an_edited_greeting_is_noticed(data: st.DataObject, meeting: Meeting, times: int) -> None:
    """F3: tls, a or the nonce changed on the way; the proof holds what the client saw."""
    changed = data.draw(edited(meeting.greeting(), times))
    assume(changed.partition(b"\n")[0] != meeting.greeting()[:-1])
    with contextlib.suppress(PeerWireError, TunnelError):
        hello = meeting.hello(changed)
        assert hello is None or meeting.welcome(hello) is None, "nobody noticed"


@given(st.data(), meetings(keys), st.integers(1, 3))
def test_an_edited_hello_is_noticed(data: st.DataObject, meeting: Meeting, times: int) -> None:
    hello = meeting.hello(meeting.greeting())
    assert hello is not None
    changed = data.draw(edited(hello, times))
    assume(changed.partition(b"\n")[0] != hello[:-1])
    with contextlib.suppress(PeerWireError, TunnelError):
        assert meeting.welcome(changed) is None, "nobody noticed"


@given(st.data(), meetings(keys), st.integers(1, 3))
def test_an_edited_welcome_gives_nothing_away(
    data: st.DataObject, meeting: Meeting, times: int
) -> None:
    """No proof covers the idle count, as none covers the signals after it: TLS does."""
    hello = meeting.hello(meeting.greeting())
    assert hello is not None
    answered = meeting.welcome(hello)
    assert answered is not None
    welcome, key = answered
    try:
        answer = meeting.client.receive_answer(data.draw(edited(welcome, times)))
    except (PeerWireError, TunnelError):
        return
    if answer is not None:
        assert (answer[0].session, answer[1]) == (meeting.session, key)


@given(meetings(keys), meetings(keys))
def test_replayed_lines_are_noticed(first: Meeting, second: Meeting) -> None:
    """Same password on both; only the greeting's nonce is another."""
    second.server._key = first.client._key
    assume(first.greeting() != second.greeting())
    hello = first.hello(first.greeting())
    assert hello is not None
    try:
        second.welcome(hello)
    except AuthError:
        return
    raise AssertionError("a proof was good for another connection")


@given(meetings(keys), bindings)
def test_two_tls_connections_never_meet(meeting: Meeting, other: bytes) -> None:
    """F3: a middle man has one with each side, and their bindings differ."""
    assume(other != meeting.binding)
    meeting.server.binding = other
    hello = meeting.hello(meeting.greeting())
    assert hello is not None
    try:
        meeting.welcome(hello)
    except AuthError:
        return
    raise AssertionError("a proof was good for another TLS connection")


@given(meetings(st.none() | keys), numbers, keys, bindings)
def test_a_link_holds_for_its_own_tls_connection(
    meeting: Meeting, number: int, key: bytes, other: bytes
) -> None:
    server, client = meeting.server, meeting.client
    assert client.receive_greeting(meeting.greeting()) is not None
    claim = server.receive(
        client.claim_link(LinkKey(key, meeting.session), number, meeting.binding)
    )
    assert isinstance(claim, LinkClaim)
    assert server.is_link_proven(claim, LinkKey(key, meeting.session))
    server.binding = other
    assert server.is_link_proven(claim, LinkKey(key, meeting.session)) is (
        other == meeting.binding
    )


@given(st.data(), meetings(st.none()), numbers, keys, st.integers(1, 3), st.booleans())
def test_an_edited_link_is_noticed(
    data: st.DataObject,
    meeting: Meeting,
    number: int,
    key: bytes,
    times: int,
    edits_greeting: bool,
) -> None:
    """F2: a link's proof holds for its own connection, session and number only."""
    server, client = meeting.server, meeting.client
    greeting = meeting.greeting()
    if edits_greeting:
        greeting = data.draw(edited(greeting, times))
        assume(greeting.partition(b"\n")[0] != meeting.greeting()[:-1])
    try:
        if client.receive_greeting(greeting) is None:
            return
    except (PeerWireError, TunnelError):
        return
    line = client.claim_link(LinkKey(key, meeting.session), number, meeting.binding)
    good = lines.parse_opening(line[:-1])
    changed = line if edits_greeting else data.draw(edited(line, times))
    try:
        claim = server.receive(changed)
    except PeerWireError:
        return
    if isinstance(claim, LinkClaim):
        means_the_same = claim == good and not edits_greeting
        assert server.is_link_proven(claim, LinkKey(key, meeting.session)) is means_the_same


# ----------------------------------------------------------------------------- garbage


@given(st.data(), garbage, st.none() | keys)
@example(data=None, noise=b"hello://" + b"/" * 255 + b"?v=2&n=" + b"0" * 32, key=b"k" * 32)
def test_garbage_at_the_server(
    data: st.DataObject | None, noise: bytes, key: bytes | None
) -> None:
    server = ServerHandshake(Greeting(0, 0, b"n" * 16, key is not None, 2), key)
    pieces = [noise + b"\n"] if data is None else data.draw(cuts(noise + b"\n"))
    reason = ""
    try:
        for piece in pieces:
            opening = server.receive(piece)
            if isinstance(opening, LinkClaim):
                assert not server.is_link_proven(opening, LinkKey(FRESH, opening.session))
            elif opening is not None:
                server.accept(opening, session="0" * 16, idle=1, fresh_key=FRESH)
                assert key is None, "garbage held the password"
                break
    except PeerWireError:
        return
    except TunnelError as exc:
        reason = exc.reason
    assert reason in ("", "auth", "version")


@given(st.data(), garbage, st.none() | keys, TLS)
def test_garbage_at_the_client(
    data: st.DataObject, noise: bytes, key: bytes | None, floor: int
) -> None:
    client = ClientHandshake(key, tls_floor=floor)
    told = ""
    try:
        for piece in data.draw(cuts(noise + b"\n")):
            if client.receive_greeting(piece) is not None:
                break
    except (PeerWireError, TunnelError) as exc:
        told = str(exc)
    assert told.isprintable(), "it goes into a log line"


@given(st.data(), garbage, meetings(st.none() | keys))
def test_garbage_instead_of_a_welcome(data: st.DataObject, noise: bytes, meeting: Meeting) -> None:
    meeting.hello(meeting.greeting())
    told = ""
    try:
        for piece in data.draw(cuts(noise + b"\n")):
            if meeting.client.receive_answer(piece) is not None:
                assert meeting.client._key is None, "garbage held the password"
                break
    except (PeerWireError, TunnelError) as exc:
        told = str(exc)
    assert told.isprintable(), "it goes into a log line"
