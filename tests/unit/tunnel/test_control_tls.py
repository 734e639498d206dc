"""control: a Session inside TLS; what the records do to it, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from OpenSSL import SSL
from tests.kit.acceptor_desk import outside
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both
from tests.kit.hand_seal import ALERT, HandSealer
from tests.kit.secure import LibrarySide, TlsFault, TlsStream, library_client
from tests.kit.stream import Stream
from tests.kit.timing import until, within

from nodepass.observe.log import Log
from nodepass.protocol.messages import Dialect, Fail, Idle, Kind, Launch
from nodepass.protocol.session import Event, Lost, Role, Session, State
from nodepass.tls.codec import Records
from nodepass.tls.contexts import ServerTls
from nodepass.tunnel import control as control_module
from nodepass.tunnel.control import Control

QUIET = 30.0
"""Report period, seconds, of a session that shall not beat again during its test."""


def shake_in_memory(side: LibrarySide, near: SSL.Connection) -> Records:
    """Do a handshake by hand; return our end of it, everything said."""
    records = Records(near)
    for _ in range(4):
        side.shake()
        data = side.give()
        if data:
            near.bio_write(data)
        with contextlib.suppress(SSL.WantReadError):
            near.do_handshake()
        side.take(records.flush())
    assert records.open(b"") == b""
    return records


class Wire:
    """A control channel inside TLS and the far end of its connection, driven by hand."""

    def __init__(self, interval: float = QUIET, side: LibrarySide | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.near, far = tcp_pair()
        self.interval = interval
        side = LibrarySide(library_client()) if side is None else side
        accepted = ServerTls(1, None, None, Log("wire", "none"), None).accept(is_native=True)
        self.records = shake_in_memory(side, accepted)
        self.far = TlsStream(Stream(far), side)
        self.session = Session(
            Role.SERVER, Dialect.NATIVE, now=self.loop.time(), interval=interval
        )
        self.events: list[Event] = []
        self.control = Control(self.session, self.events.append)

    async def open(self, head: bytes = b"") -> None:
        await self.control.open(self.near, self.interval, head, self.records)

    async def read_lines(self, count: int) -> list[bytes]:
        async with within(5):
            return [await self.far.read_line() for _ in range(count)]

    async def read_all(self) -> bytes:
        async with within(5):
            return await self.far.read_all()

    async def raw(self, data: bytes) -> None:
        await outside(self.far).write(data)

    def losses(self) -> list[str]:
        return [event.reason for event in self.events if isinstance(event, Lost)]

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            self.control.close("stopped")
        finally:
            self.far.close()
            await asyncio.sleep(0.01)  # the transport closes its socket in a later turn
            self.near.close()


# --- talking -----------------------------------------------------------------------------------


@both
async def test_signals_travel_both_ways() -> None:
    async with Wire() as wire:
        await wire.open()
        assert await wire.read_lines(1) == [b"ping://1\n"]
        await wire.far.write(b"fail://7?why=refused\nping://3\n")
        assert await wire.read_lines(1) == [b"pong://3\n"]
        assert wire.events == [Fail(7, "refused")]
        wire.session.launch(Kind.TCP, 5, "10.0.0.1:1")
        wire.session.send(Idle(9))
        assert await wire.read_lines(2) == [b"tcp://5?from=10.0.0.1:1\n", b"idle://9\n"]


@both
async def test_head_comes_before_what_tls_brings() -> None:
    async with Wire() as wire:
        await wire.far.write(b"used\nfail://8?why=limit\n")
        await wire.open(b"fail://7?why=ref")
        await until(lambda: len(wire.events) == 2, 5, "both events")
        assert wire.events == [Fail(7, "refused"), Fail(8, "limit")]


@both
@pytest.mark.parametrize("size", [1, 7, 100])
async def test_records_may_come_in_pieces(size: int) -> None:
    async with Wire() as wire:
        await wire.open()
        wire.far.side.write(b"fail://7?why=ref")
        wire.far.side.write(b"used\n")
        data = wire.far.side.give()
        for place in range(0, len(data), size):
            assert not wire.events
            await wire.raw(data[place : place + size])
            await asyncio.sleep(0.002)
        await until(lambda: wire.events, 5, "the event")
        assert wire.events == [Fail(7, "refused")]


@both
async def test_many_records_in_one_segment() -> None:
    async with Wire() as wire:
        await wire.open()
        for number in range(50):
            wire.far.side.write(b"fail://%d?why=limit\n" % number)
        await wire.raw(wire.far.side.give())
        await until(lambda: len(wire.events) == 50, 5, "all of them")
        assert wire.events == [Fail(number, "limit") for number in range(50)]


@both
async def test_beats_go_on() -> None:
    async with Wire(interval=0.05) as wire:
        await wire.open()
        for number in range(1, 4):
            assert await wire.read_lines(1) == [b"ping://%d\n" % number]
            await wire.far.write(b"pong://%d\n" % number)
        await until(lambda: wire.session.rtt is not None, 5, "a round trip")


@both
async def test_signals_wait_while_the_peer_does_not_read() -> None:
    async with Wire() as wire:
        wire.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        wire.far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await wire.open()
        line = Launch(Kind.TCP, 1, "x" * 900)
        held = b""
        for _ in range(4000):
            wire.session.send(line)
            await asyncio.sleep(0)
            held = wire.session.data_to_send()
            if held:
                break
        assert held, "the connection takes everything"
        wire.session.send(Idle(77))
        async with within(10):
            while (said := await wire.far.read_line()) != b"idle://77\n":
                assert said.endswith(b"\n"), "sealed in order, nothing lost"
        assert not wire.losses()


# --- new keys ----------------------------------------------------------------------------------


@both
async def test_new_keys_are_taken() -> None:
    hand = HandSealer()
    async with Wire(side=hand.side) as wire:
        await wire.open()
        await wire.raw(hand.seal(b"fail://1?why=limit\n") + hand.update_keys(is_asked=False))
        await wire.raw(hand.seal(b"fail://2?why=limit\n"))
        await until(lambda: len(wire.events) == 2, 5, "both events")
        assert not wire.losses()


@both
async def test_asked_for_new_keys_changes_them_before_the_next_signal() -> None:
    """RFC 8446, section 4.6.3; OpenSSL answers with its next record, and so the far side reads."""
    hand = HandSealer()
    async with Wire(side=hand.side) as wire:
        await wire.open()
        assert await wire.read_lines(1) == [b"ping://1\n"]
        for number in range(3):
            asked = hand.update_keys(is_asked=True) + hand.update_keys(is_asked=True)
            await wire.raw(asked + hand.seal(b"ping://%d\n" % number))
            assert await wire.read_lines(1) == [b"pong://%d\n" % number]
        assert not wire.losses()


@both
async def test_flood_of_asked_for_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs us an answer, whether the other side reads it or not."""
    hand = HandSealer()
    async with Wire(side=hand.side) as wire:
        wire.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        wire.far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await wire.open()
        monkeypatch.setattr(control_module, "MAX_UNSENT", 20_000)
        for _ in range(20):
            if not wire.losses():
                many = b"".join(hand.update_keys(is_asked=True) for _ in range(1000))
                wire.control.data_received(many + hand.seal(b"later://1\n"))
        assert wire.losses() == ["the other side asks for new keys and reads nothing"]


@both
async def test_flood_of_records_that_carry_nothing_ends_the_session() -> None:
    hand = HandSealer()
    async with Wire(side=hand.side) as wire:
        await wire.open()
        await wire.raw(b"".join(hand.update_keys(is_asked=False) for _ in range(5000)))
        await until(wire.losses, 5, "the loss")
        assert len(wire.losses()) == 1
        assert "carry nothing" in wire.losses()[0]


# --- half a message ----------------------------------------------------------------------------


@both
async def test_half_a_message_and_a_signal_of_ours_end_the_session() -> None:
    """OpenSSL writes nothing before the rest comes: our signals must not vanish meanwhile."""
    hand = HandSealer()
    async with Wire(side=hand.side) as wire:
        await wire.open()
        await wire.read_lines(1)
        await wire.raw(hand.half_message())
        await asyncio.sleep(0.01)
        wire.session.send(Idle(5))
        await until(wire.losses, 5, "the loss")
        assert len(wire.losses()) == 1
        assert "TLS cannot be written to" in wire.losses()[0]
        await until(lambda: wire.near.fileno() < 0, 5, "the end of the connection")


@both
@pytest.mark.parametrize("last", [b"ping://1\nbye://x\n", b"ping://1\n" + b"x" * 2000])
async def test_half_a_message_behind_the_end_leaves_no_ghost(last: bytes) -> None:
    """The loss is told, though the answer to the ping cannot leave any more."""
    hand = HandSealer()
    async with Wire(side=hand.side) as wire:
        await wire.open()
        await wire.raw(hand.seal(last) + hand.half_message())
        await until(wire.losses, 5, "the loss")
        await until(lambda: wire.near.fileno() < 0, 5, "the end of the connection")
        assert len(wire.losses()) == 1


@both
async def test_half_a_message_does_not_keep_us_from_closing() -> None:
    hand = HandSealer()
    async with Wire(side=hand.side) as wire:
        await wire.open()
        await wire.read_lines(1)
        await wire.raw(hand.half_message())
        await asyncio.sleep(0.01)
        wire.session.send(Idle(5))
        wire.control.close("replaced")
        await until(lambda: wire.near.fileno() < 0, 5, "the end of the connection")
        assert wire.events == []


@both
async def test_message_whose_halves_meet_does_no_harm() -> None:
    hand = HandSealer()
    async with Wire(side=hand.side) as wire:
        await wire.open()
        assert await wire.read_lines(1) == [b"ping://1\n"]
        await wire.raw(hand.half_message())
        await asyncio.sleep(0.01)
        await wire.raw(hand.finish_message() + hand.seal(b"ping://7\n"))
        assert await wire.read_lines(1) == [b"pong://7\n"]
        assert not wire.losses()


# --- ending ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("has_fin", [True, False])
async def test_close_notify_ends_the_session_in_order(has_fin: bool) -> None:
    """The Go program sends no FIN behind it."""
    async with Wire() as wire:
        await wire.open()
        await wire.far.write(b"fail://7?why=limit\n")
        wire.far.finish(fin=has_fin)
        await until(wire.losses, 5, "the loss")
        assert wire.events[0] == Fail(7, "limit")
        assert wire.losses() == ["the other side closed the connection"]
        assert (await wire.read_all()).startswith(b"ping://1\n"), "to a close_notify of ours"
        assert wire.session.state is State.CLOSED
        await until(lambda: wire.near.fileno() < 0, 5, "the end of the connection")


@both
async def test_bye_ends_the_session_orderly() -> None:
    async with Wire() as wire:
        await wire.open()
        await wire.far.write(b"bye://replaced\n")
        wire.far.finish()
        await until(wire.losses, 5, "the loss")
        assert wire.events == [Lost("the other side said bye: replaced", True, is_replaced=True)]
        await wire.read_all()


@both
@pytest.mark.parametrize("how", ["end", "reset"])
async def test_connection_cut_under_tls(how: str) -> None:
    async with Wire() as wire:
        await wire.open()
        await wire.read_lines(1)
        if how == "end":
            outside(wire.far).finish()
        else:
            wire.far.reset()
        await until(wire.losses, 5, "the loss")
        assert len(wire.losses()) == 1
        last = wire.events[-1]
        assert isinstance(last, Lost)
        assert not last.is_orderly


@both
@pytest.mark.parametrize("has_queued", [False, True])
@pytest.mark.parametrize(
    ("data", "why", "alert"),
    [
        (b"\x17\x03\x03\x00\x20" + bytes(32), "decryption failed or bad record mac", "mac"),
        (b"ping://1\n", "", "alert"),
        (b"\x17\x03\x03\xff\xff" + bytes(100), "length", "overflow"),
    ],
    ids=["tampered", "plain", "too long"],
)
async def test_bad_record_ends_the_session_and_says_why(
    data: bytes, why: str, alert: str, has_queued: bool
) -> None:
    """Also where signals are about to leave: nothing can be sealed any more."""
    async with Wire() as wire:
        received = wire.control.data_received

        def hear(data: bytes) -> None:
            wire.session.send(Idle(5))
            received(data)

        if has_queued:
            wire.control.data_received = hear  # type: ignore[method-assign]
        await wire.open()
        await wire.read_lines(1)
        await wire.raw(data)
        await until(wire.losses, 5, "the loss")
        assert len(wire.losses()) == 1
        assert wire.losses()[0].startswith("a TLS record is bad")
        assert why in wire.losses()[0]
        with pytest.raises(TlsFault, match=f"(?i){alert}"):
            await wire.read_all()
        await until(lambda: wire.near.fileno() < 0, 5, "the end of the connection")


@both
async def test_alert_of_the_peer_ends_the_session() -> None:
    hand = HandSealer()
    async with Wire(side=hand.side) as wire:
        await wire.open()
        await wire.raw(hand.seal(b"fail://7?why=limit\n"))
        await until(lambda: wire.events == [Fail(7, "limit")], 5, "the signal")
        await wire.raw(hand.seal(b"\x02\x50", ALERT))  # fatal, internal error
        await until(wire.losses, 5, "the loss")
        assert "alert internal error" in wire.losses()[0]


@both
async def test_close_says_bye_and_close_notify() -> None:
    async with Wire() as wire:
        await wire.open()
        wire.session.send(Idle(5))
        wire.control.close("stopped")
        wire.control.close("again")
        assert await wire.read_all() == b"ping://1\nidle://5\nbye://stopped\n"
        assert await outside(wire.far).read() == b"", "a FIN behind it"
        assert wire.events == []
        wire.session.send(Idle(6))  # after the end it goes nowhere
        await asyncio.sleep(0.01)


@both
async def test_close_before_the_opening_is_done() -> None:
    async with Wire() as wire:
        opening = asyncio.create_task(wire.open(b"fail://1?why=limit\n"))
        wire.control.close("replaced")
        await opening
        assert (await wire.read_all()).endswith(b"bye://replaced\n")
        assert wire.events == []


@both
async def test_bye_inside_the_head() -> None:
    async with Wire() as wire:
        await wire.open(b"fail://1?why=limit\nbye://stopped\n")
        assert wire.events == [Fail(1, "limit"), Lost("the other side said bye: stopped", True)]
        assert await wire.read_all() == b""


@both
async def test_close_answers_a_close_notify_that_came_first() -> None:
    async with Wire() as wire:
        await wire.open()
        wire.far.side.end()
        await wire.raw(wire.far.side.give())
        wire.control.close("stopped")
        await wire.read_all()
        await asyncio.sleep(0.01)
        assert wire.losses() == []
