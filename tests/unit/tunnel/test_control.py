"""control: a Session over a real connection; what leaves when, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import socket
from unittest.mock import Mock

import pytest
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both
from tests.kit.timing import until, within

from nodepass.errors import TunnelError
from nodepass.net import tcp
from nodepass.protocol.messages import Dialect, Fail, Failure, Heartbeat, Idle, Kind, Launch, Pong
from nodepass.protocol.session import MAX_UNSENT, Event, Lost, Role, Session, State
from nodepass.tunnel import control as controlling
from nodepass.tunnel.control import LINES_A_TURN, Control

QUIET = 30.0
"""Report period, seconds, of a session that shall not beat again during its test."""


class Wire:
    """A control channel and the bare far end of its connection."""

    def __init__(
        self,
        role: Role = Role.SERVER,
        dialect: Dialect = Dialect.NATIVE,
        interval: float = QUIET,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.near, self.far = tcp_pair()
        self.interval = interval
        self.session = Session(role, dialect, now=self.loop.time(), interval=interval)
        self.events: list[Event] = []
        self.control = Control(self.session, self.events.append)

    async def open(self, head: bytes = b"") -> None:
        await self.control.open(self.near, self.interval, head)

    async def read(self, size: int = 65536) -> bytes:
        async with within(5):
            return await self.loop.sock_recv(self.far, size)

    async def read_lines(self, count: int) -> list[bytes]:
        data = b""
        while data.count(b"\n") < count:
            data += await self.read()
        return data.splitlines()

    async def read_all(self) -> bytes:
        data = b""
        while more := await self.read():
            data += more
        return data

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
async def test_events_come_out_as_the_bytes_come_in() -> None:
    async with Wire() as wire:
        await wire.open()
        wire.far.send(b"fail://7?why=ref")
        await asyncio.sleep(0.02)
        assert wire.events == []
        wire.far.send(b"used\nping://3\nnonsense://1\nfail://8?why=limit\n")
        await until(lambda: len(wire.events) == 2, 5, "both events")
        assert wire.events == [Fail(7, "refused"), Fail(8, "limit")]
        assert await wire.read_lines(2) == [b"ping://1", b"pong://3"]


@both
async def test_what_is_said_in_one_turn_leaves_in_one_write() -> None:
    async with Wire() as wire:
        await wire.open()
        assert await wire.read() == b"ping://1\n"
        for number in range(100):
            wire.session.launch(Kind.TCP, number, "10.0.0.1:1")
        wire.session.send(Idle(5))
        data = await wire.read()
        assert data.startswith(b"tcp://0?from=10.0.0.1:1\n")
        assert data.endswith(b"tcp://99?from=10.0.0.1:1\nidle://5\n")
        wire.session.send(Idle(6))
        assert await wire.read() == b"idle://6\n"


@both
async def test_what_was_said_before_the_opening_is_not_lost() -> None:
    async with Wire() as wire:
        wire.session.send(Idle(5))
        await asyncio.sleep(0)
        await wire.open()
        assert await wire.read() == b"idle://5\nping://1\n"


@both
@pytest.mark.parametrize(
    ("head", "rest"),
    [
        (b"idle://7\n", b""),
        (b"idle://7\n", b"ping://5\n"),
        (b"id", b"le://7\nping://5\n"),
        (b"", b"idle://7\nping://5\n"),
    ],
)
async def test_bytes_behind_the_handshake_come_first(head: bytes, rest: bytes) -> None:
    """Whatever waits in the socket already, the head stands before it."""
    async with Wire(Role.CLIENT) as wire:
        wire.far.send(rest)
        await asyncio.sleep(0.01)
        await wire.open(head)
        await until(lambda: wire.events, 5, "the event")
        assert wire.events == [Idle(7)]
        if b"ping" in rest:
            assert sorted(await wire.read_lines(2)) == [b"ping://1", b"pong://5"]


@both
async def test_beats_and_measures_the_way() -> None:
    async with Wire(interval=0.05) as wire:
        await wire.open()
        for number in range(1, 4):
            assert await wire.read() == b"ping://%d\n" % number
            wire.far.send(b"pong://%d\n" % number)
        await until(lambda: wire.session.rtt is not None, 5, "a round trip")
        assert 0 <= (wire.session.rtt or 0.0) < 1
        assert not wire.losses()


@both
async def test_beats_for_a_seed_client_that_never_answers() -> None:
    async with Wire(dialect=Dialect.SEED, interval=0.02) as wire:
        await wire.open()
        data = b""
        while len(data) < 6:
            data += await wire.read()
        assert set(data) == set(b"\n")
        assert not wire.losses()
        wire.session.launch(Kind.TCP, "aaaa0001", "")
        while b"#1" not in data:
            data += await wire.read()
        assert b"//aaaa0001#1\n" in data


# --- ending ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("how", ["end", "reset", "bye", "garbage", "silence"])
async def test_loss_is_told_once_with_its_reason(how: str) -> None:
    reasons = {
        "end": "closed the connection",
        "reset": "reset",
        "bye": "said bye: replaced",
        "garbage": "broke the protocol",
        "silence": "nothing heard",
    }
    async with Wire(interval=0.05 if how == "silence" else QUIET) as wire:
        await wire.open()
        if how == "end":
            wire.far.shutdown(socket.SHUT_WR)
        elif how == "reset":
            tcp.reset(wire.far)
        elif how == "bye":
            wire.far.send(b"bye://replaced\nfail://1?why=limit\n")
        elif how == "garbage":
            wire.far.send(b"x" * 3000)
        await until(wire.losses, 5, "the loss")
        assert reasons[how] in wire.losses()[0]
        wire.control.close("stopped")
        await asyncio.sleep(0.02)
        assert len(wire.losses()) == 1
        last = wire.events[-1]
        assert isinstance(last, Lost)
        assert (last.is_orderly, last.is_replaced) == (how == "bye", how == "bye")
        assert (last.silent_since is not None) is (how == "silence")
        assert wire.session.state is State.CLOSED
        if how != "reset":
            await wire.read_all()  # has an end
        assert wire.near.fileno() < 0 or tcp.has_ended(wire.near) or how == "silence"


@both
async def test_close_says_bye_behind_what_is_queued_and_tells_nobody() -> None:
    async with Wire() as wire:
        await wire.open()
        wire.session.send(Idle(5))
        wire.control.close("stopped")
        wire.control.close("again")
        assert await wire.read_all() == b"ping://1\nidle://5\nbye://stopped\n"
        assert wire.events == []
        wire.session.send(Idle(6))  # after the end it goes nowhere


@both
async def test_c21_last_lines_of_a_socket_that_was_born_armed_arrive() -> None:
    async with Wire() as wire:
        tcp.arm(wire.near)
        await wire.open()
        for number in range(2000):
            wire.session.send(Idle(number))
        wire.control.close("stopped")
        assert (await wire.read_all()).endswith(b"idle://1999\nbye://stopped\n")


@both
async def test_c21_a_close_leaves_the_number_of_a_closing_connection_alone() -> None:
    """Its transport may have closed the socket by itself: somebody else may have the number."""
    async with Wire() as wire:
        await wire.open()
        transport = wire.control._transport
        assert transport is not None
        wire.control._transport = closing = Mock(spec=asyncio.Transport)
        closing.is_closing.return_value = True
        wire.control.close("stopped")
        assert closing.get_extra_info.return_value.setsockopt.call_count == 0
        transport.abort()


@both
async def test_close_of_a_seed_session_is_an_end_without_a_word() -> None:
    async with Wire(dialect=Dialect.SEED) as wire:
        await wire.open()
        wire.control.close("stopped")
        assert await wire.read_all() == b"\n"
        wire.session.send(Heartbeat())  # after the end it goes nowhere


@both
async def test_close_before_the_opening_is_done() -> None:
    """Two clients of one name in one turn: the first is replaced before it is connected."""
    async with Wire() as wire:
        opening = asyncio.create_task(wire.open(b"fail://1?why=limit\n"))
        wire.control.close("replaced")
        await opening
        assert (await wire.read_all()).endswith(b"bye://replaced\n")
        assert wire.events == []


@both
async def test_stalls_only_where_bytes_stay_unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Wire() as wire:
        assert not wire.control.is_stalled, "nothing is open yet"
        await wire.open()
        assert not wire.control.is_stalled
        monkeypatch.setattr("nodepass.tunnel.control.is_stalled", lambda sock: True)
        assert wire.control.is_stalled
        wire.control.close("stopped")
        assert not wire.control.is_stalled


@both
async def test_close_while_nothing_was_opened() -> None:
    async with Wire() as wire:
        wire.control.close("stopped")
        assert wire.session.state is State.CLOSED


@both
async def test_opening_of_a_dead_socket_leaves_nothing() -> None:
    async with Wire() as wire:
        wire.near.close()
        with pytest.raises((OSError, ValueError)):
            await wire.open()
        assert wire.events == []


class Kernel:
    """Stands for one that has no room to watch one connection more, once it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        loop = asyncio.get_running_loop()
        if isinstance(loop, asyncio.SelectorEventLoop):
            selector = loop._selector  # type: ignore[attr-defined]
            self._register = selector.register
            monkeypatch.setattr(selector, "register", self.register)
        else:
            self._register = Mock()
            monkeypatch.setattr(controlling, "check_room", self.register)

    def register(self, *args: object) -> object:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._register(*args)


NO_ROOM = "no space left on device: raise fs.epoll.max_user_watches"


@both
async def test_c29_no_room_to_watch_ends_the_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    async with Wire() as wire:
        kernel.is_full = True
        with pytest.raises(TunnelError, match=NO_ROOM):
            await wire.open()
        assert await wire.read() == b""
        kernel.is_full = False


@both
async def test_c29_no_room_to_watch_again_ends_the_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading pauses while lines wait for their turn, and has to go on."""
    kernel = Kernel(monkeypatch)
    async with Wire() as wire:
        await wire.open()
        kernel.is_full = True
        await wire.loop.sock_sendall(wire.far, b"fail://1?why=refused\n" * 3 * LINES_A_TURN)
        await until(wire.losses, 5, "the loss")
        (reason,) = wire.losses()
        assert NO_ROOM in reason
        kernel.is_full = False
        await until(lambda: wire.near.fileno() < 0, 5, "its socket to be closed")


@both
async def test_c29_with_room_reading_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds the place in the kernel for a moment does not stay, nor eat what comes."""
    Kernel(monkeypatch)
    async with Wire() as wire:
        await wire.loop.sock_sendall(wire.far, b"fail://1?why=refused\n")
        await wire.open()
        await wire.loop.sock_sendall(wire.far, b"fail://2?why=refused\n" * 3 * LINES_A_TURN)
        await until(lambda: len(wire.events) > 3 * LINES_A_TURN, 5, "all lines")
        await wire.loop.sock_sendall(wire.far, b"fail://3?why=refused\n")
        await until(lambda: wire.events[-1] == Fail(3, Failure.REFUSED), 5, "the last line")
        assert not wire.losses()


@both
async def test_opening_cancelled_closes_the_connection() -> None:
    async with Wire() as wire:
        opening = asyncio.create_task(wire.open())
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await wire.read_all()


@both
async def test_bye_inside_the_head() -> None:
    async with Wire() as wire:
        await wire.open(b"fail://1?why=limit\nbye://stopped\n")
        assert wire.events == [Fail(1, "limit"), Lost("the other side said bye: stopped", True)]
        assert await wire.read_all() == b""


# --- a peer that does not read -----------------------------------------------------------------


def small_buffers(wire: Wire) -> None:
    wire.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    wire.far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


async def block(wire: Wire) -> None:
    """Fill both kernels' buffers and the transport's, so that nothing leaves any more."""
    small_buffers(wire)
    await wire.open()
    line = Launch(Kind.TCP, 1, "x" * 900)
    for _ in range(4000):
        wire.session.send(line)
        await asyncio.sleep(0)
        if wire.session.data_to_send():  # what a flush in between did not take away
            return
    raise AssertionError("the connection takes everything")


@both
async def test_signals_wait_while_the_peer_does_not_read() -> None:
    async with Wire() as wire:
        await block(wire)
        wire.session.send(Idle(77))
        data = b""
        async with within(10):
            while not data.endswith(b"idle://77\n"):
                data += await wire.read()
        assert not wire.losses()
        wire.session.send(Idle(78))
        assert await wire.read() == b"idle://78\n", "it flows again"


@both
async def test_peer_that_leaves_a_megabyte_unread_is_lost() -> None:
    async with Wire(interval=0.2) as wire:
        await block(wire)
        line = Launch(Kind.TCP, 1, "x" * 900)
        for _ in range(MAX_UNSENT // 900 + 100):
            wire.session.send(line)
        async with within(10):
            while not wire.losses():
                wire.far.send(b"pong://0\n")  # not silent, only deaf
                await asyncio.sleep(0.02)
        assert wire.losses() == ["the other side reads no signals"]
        # Its silence limit ends the connection although bytes are still owed.
        await until(lambda: wire.near.fileno() < 0, 10, "the end of the connection")


@both
async def test_answers_to_a_peer_that_only_asks_are_bounded() -> None:
    async with Wire() as wire:
        small_buffers(wire)
        await wire.open()
        sent, data = 0, b"ping://1\n" * 1000
        async with within(30):
            while not wire.losses():
                try:
                    sent += wire.far.send(data[sent % len(data) :])
                except BlockingIOError:
                    await asyncio.sleep(0.001)
                except OSError:
                    break
                await asyncio.sleep(0)
            await until(wire.losses, 10, "the loss")
        assert len(wire.losses()) == 1
        assert "signals a second that mean nothing" in wire.losses()[0]
        assert Pong(1).number == 1
