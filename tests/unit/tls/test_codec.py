"""record: TLS of one connection without a socket, from the first byte to the last."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from OpenSSL import SSL
from tests.kit.tls_rig import our_end

from nodepass.errors import TlsError, TunnelError
from nodepass.tls.codec import BINDING_SIZE, Records

BLOB = bytes(range(256)) * 400
RECORD_OVERHEAD = 5 + 1 + 16
"""Bytes of header, type and authentication in each record of TLS 1.3."""


def linked() -> tuple[Records, Records]:
    """Return the two ends of a connection: client, server."""
    client, server = our_end(False), our_end(True)
    for _ in range(3):
        for here, there in ((client, server), (server, client)):
            with contextlib.suppress(SSL.WantReadError):
                here.do_handshake()
            with contextlib.suppress(SSL.WantReadError):
                there.bio_write(here.bio_read(1 << 16))
    return Records(client), Records(server)


def test_both_directions() -> None:
    client, server = linked()
    assert server.open(client.seal(b"question")) == b"question"
    assert client.open(server.seal(b"answer")) == b"answer"
    assert (client.has_ended, server.has_ended) == (False, False)


@pytest.mark.parametrize("size", [0, 1, 16_384, 16_385, 65_536, 65_537, len(BLOB)])
def test_sizes(size: int) -> None:
    client, server = linked()
    sealed = client.seal(BLOB[:size])
    records = -(-size // 16_384)
    assert len(sealed) == size + records * RECORD_OVERHEAD
    assert server.open(sealed) == BLOB[:size]


def test_byte_by_byte_and_all_at_once() -> None:
    client, server = linked()
    sealed = client.seal(b"one") + client.seal(b"two")
    assert b"".join(server.open(sealed[i : i + 1]) for i in range(len(sealed))) == b"onetwo"
    assert server.open(client.seal(b"three") + client.seal(b"four")) == b"threefour"


def test_an_unfinished_record_is_nothing_yet() -> None:
    client, server = linked()
    sealed = client.seal(b"words")
    assert server.open(sealed[:-1]) == b""
    assert server.open(b"") == b""
    assert server.open(sealed[-1:]) == b"words"


def test_what_came_along_with_the_handshake() -> None:
    """Bytes that lie in the connection already are returned without new ones."""
    client, server = linked()
    server.connection.bio_write(client.seal(b"early"))
    assert server.open(b"") == b"early"


def test_each_direction_ends_by_itself() -> None:
    client, server = linked()
    assert server.open(client.seal(b"last") + client.end()) == b"last"
    assert server.has_ended
    assert not client.has_ended
    assert client.open(server.seal(b"reply") + server.end()) == b"reply"
    assert client.has_ended


def test_what_stands_behind_the_end_is_nothing() -> None:
    client, server = linked()
    assert server.open(client.end() + b"not a record at all") == b""
    assert server.has_ended
    assert server.open(b"more of it") == b""


def test_no_end_without_close_notify() -> None:
    client, server = linked()
    assert server.open(client.seal(b"all")) == b"all"
    assert not server.has_ended


@pytest.mark.parametrize("index", [0, 3, 4, 5, 12, -1])
def test_a_bad_record_is_an_error_and_an_alert(index: int) -> None:
    client, server = linked()
    sealed = bytearray(client.seal(b"words"))
    sealed[index] ^= 1
    with pytest.raises(TlsError, match=r"a TLS record is bad: .+") as caught:
        assert server.open(bytes(sealed) + bytes(2 << 14)) == b""
    assert isinstance(caught.value, TunnelError)
    alert = server.flush()
    assert alert
    with pytest.raises(TlsError, match="alert"):
        client.open(alert)
    assert not server.has_ended


def test_dead_after_a_bad_record() -> None:
    client, server = linked()
    sealed = bytearray(client.seal(b"words"))
    sealed[-1] ^= 1
    for data in (bytes(sealed), client.seal(b"good again")):
        with pytest.raises(TlsError):
            server.open(data)
    server.flush()
    assert server.end() == b""  # the alert was the last word


def test_records_out_of_order_are_bad() -> None:
    for order in itertools.permutations(range(3)):
        client, server = linked()
        sealed = [client.seal(word) for word in (b"a", b"b", b"c")]
        data = b"".join(sealed[index] for index in order)
        if order == (0, 1, 2):
            assert server.open(data) == b"abc"
        else:
            with pytest.raises(TlsError, match="bad record mac"):
                server.open(data)


def test_session_tickets_are_no_data() -> None:
    """What a server sends of itself after the handshake."""
    client, server = our_end(False), our_end(True)
    while True:
        with contextlib.suppress(SSL.WantReadError):
            client.do_handshake()
        server.bio_write(client.bio_read(1 << 16))
        try:
            server.do_handshake()
            break
        except SSL.WantReadError:
            client.bio_write(server.bio_read(1 << 16))
    at_server, at_client = Records(server), Records(client)
    tickets = at_server.flush()
    assert tickets
    assert at_client.open(tickets) == b""
    assert at_client.open(at_server.seal(b"data")) == b"data"


def test_flush_is_empty_when_there_is_nothing_to_say() -> None:
    client, server = linked()
    assert client.flush() == server.flush() == b""


def test_end_is_said_once() -> None:
    client, _ = linked()
    assert client.end()
    assert client.end() == b""


def test_the_binding_is_that_of_the_connection() -> None:
    client, server = linked()
    assert client.binding() == server.binding() == client.binding()
    assert len(client.binding()) == BINDING_SIZE
    assert linked()[0].binding() != client.binding()
