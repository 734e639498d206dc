"""_pytls: what the engine tests cannot bring about, with sockets that fail on demand."""

from __future__ import annotations

import errno
import socket
import sys
from typing import Any

import pytest
from OpenSSL import SSL
from tests.unit.tls.test_codec import linked

from nodepass.engine.twin import legs
from nodepass.engine.twin.legs import FRUITLESS_BYTES, RECORD_BYTES, Leg, TlsFault, TlsLeg
from nodepass.tls import _openssl
from nodepass.tls.codec import Records

BAD_MAC = 20 << 23 | 281
"""SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC of ERR_LIB_SSL, packed."""


class Wire:
    """A socket that takes so many bytes at each call, or raises."""

    def __init__(self, *answers: int | OSError) -> None:
        self.answers = list(answers)
        self.sent = b""

    def send(self, data: memoryview, _: int) -> int:
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        size = min(answer, len(data))
        self.sent += data[:size]
        return size

    def shutdown(self, _: int) -> None:
        raise OSError(errno.ENOTCONN, "")

    def getsockopt(self, *_: int) -> int:
        return 0


def leg_on(*answers: int | OSError) -> tuple[TlsLeg, Wire, Records]:
    """Return a TLS leg on such a socket, and the peer."""
    peer, ours = linked()
    wire: Any = Wire(*answers)
    return TlsLeg(wire, ours.connection), wire, peer


GONE = BrokenPipeError(errno.EPIPE, "")


def test_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    assert legs.trouble() is None
    monkeypatch.setitem(sys.modules, "OpenSSL.SSL", None)
    assert "pyOpenSSL cannot be loaded" in str(legs.trouble())


def test_fault() -> None:
    SSL.Context(SSL.TLS_METHOD)  # OpenSSL has its words from the first context on
    legs._codes.cache_clear()
    words = "decryption failed or bad record mac"
    assert legs.fault(SSL.Error([("SSL routines", "", words), ("", "", "more")])).detail == BAD_MAC
    for exc in (SSL.Error([]), SSL.Error(), SSL.Error([("", "", "never heard of")])):
        fault = legs.fault(exc)
        assert (fault.errno, fault.detail) == (errno.EBADMSG, 0)


def test_fault_without_openssl_s_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(_: int) -> str:
        raise _openssl.Moved("gone")

    monkeypatch.setattr(_openssl, "describe", describe)
    legs._codes.cache_clear()
    assert legs.fault(SSL.Error([("", "", "decryption failed or bad record mac")])).detail == 0
    legs._codes.cache_clear()


def test_plaintext_counts_when_its_record_is_out() -> None:
    leg, wire, peer = leg_on(1 << 20, 1, 0, 1 << 20)
    assert leg.send(memoryview(bytes(RECORD_BYTES + 5))) == RECORD_BYTES
    assert leg.backlog == 5 + 22 - 1
    assert leg.flush() == 0
    assert leg.flush() == 5
    assert leg.backlog == 0
    assert peer.open(wire.sent) == bytes(RECORD_BYTES + 5)


def test_what_was_delivered_before_an_error_counts() -> None:
    leg, _, _ = leg_on(1 << 20, GONE, GONE)
    assert leg.send(memoryview(bytes(RECORD_BYTES + 5))) == RECORD_BYTES
    with pytest.raises(BrokenPipeError):
        leg.flush()


def test_nobody_is_left_to_hear_our_end() -> None:
    leg, _, _ = leg_on(GONE)
    assert leg.say_end() == 0
    assert leg.backlog == 0
    leg.shut()


def test_an_end_behind_lost_bytes_is_an_error() -> None:
    leg, _, _ = leg_on(0, 0, GONE)
    assert leg.send(memoryview(b"lost")) == 0
    assert leg.say_end() == 0
    with pytest.raises(BrokenPipeError):
        leg.flush()


def test_no_end_can_be_said_on_a_dead_connection() -> None:
    leg, wire, peer = leg_on()
    record = bytearray(peer.seal(b"words"))
    record[-1] ^= 1
    ear, mouth = socket.socketpair()
    with ear, mouth:
        leg.sock = ear
        mouth.sendall(record)
        with pytest.raises(TlsFault) as caught:
            leg.receive(memoryview(bytearray(100)))
    assert caught.value.detail == BAD_MAC
    for act in (leg.say_end, lambda: leg.send(memoryview(b"more"))):
        with pytest.raises(TlsFault) as again:
            act()
        assert again.value is caught.value
    assert wire.sent == b""


def test_nothing_is_said_behind_the_end() -> None:
    leg, wire, peer = leg_on(*[1 << 20] * 4)
    leg.say_end()
    record = bytearray(peer.seal(b"words"))
    record[-1] ^= 1
    said = wire.sent
    ear, mouth = socket.socketpair()
    with ear, mouth:
        leg.sock = ear
        mouth.sendall(record)
        with pytest.raises(TlsFault):
            leg.receive(memoryview(bytearray(100)))
    assert leg.flush() == 0
    assert leg.backlog == 0
    assert wire.sent == said


@pytest.mark.parametrize("is_much", [True, False])
def test_who_talks_much_and_says_nothing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, is_much: bool
) -> None:
    leg, _, _ = leg_on()
    monkeypatch.setattr(TlsLeg, "_open", lambda *_: b"")  # key updates, say
    ear, mouth = socket.socketpair()
    with ear, mouth:
        leg.sock = ear
        mouth.sendall(bytes(FRUITLESS_BYTES - (not is_much)))
        with pytest.raises(OSError) as caught:
            leg.receive(memoryview(bytearray(1 << 20)))
    assert caught.value.errno == (errno.ENOBUFS if is_much else errno.EAGAIN)


def test_a_plain_leg_that_cannot_end() -> None:
    wire: Any = Wire()
    with pytest.raises(OSError) as caught:
        Leg(wire).shut()
    assert caught.value.errno == errno.ECONNRESET
