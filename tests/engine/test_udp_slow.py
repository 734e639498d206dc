"""Full links, full sockets, full buffers: what waits, what is lost, and who is not hurt by it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import socket
import sys

import pytest
from tests.kit.engine_rig import Kind
from tests.kit.tls_rig import End
from tests.kit.udp_rig import Mouth, UdpRig
from tests.kit.udp_words import (
    HEADER,
    closed_target,
    frame,
    frames,
    hear_frame,
    udp_pair,
    udp_socket,
    unframe,
    unix_datagrams,
)

from nodepass.engine.twin import udp_port

every_kind = pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
tls_or_not = pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel counts there")

QUEUE_BYTES = 131072
"""What may wait for one slow link, frame headers included."""

NARROW = {"sndbuf": 4096, "rcvbuf": 4096}
WINDOW = 20
MARK = b"did this come through?"


def is_subsequence(part: list[bytes], whole: list[bytes]) -> bool:
    """Tell whether a list is another one with some items left out."""
    rest = iter(whole)
    return all(item in rest for item in part)


@every_kind
@tls_or_not
async def test_f9_slow_link_is_bounded_and_hurts_nobody(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        slow, brisk = gate.visitor(), gate.visitor()
        stuck = rig.bind(await gate.welcome(slow, b"first"), is_tls=is_tls, buffers=NARROW)
        other = rig.bind(await gate.welcome(brisk, b"hello"), is_tls=is_tls)
        assert await hear_frame(other.far) == b"hello"
        said = [b"%06d" % step * 200 for step in range(600)]
        for start in range(0, len(said), WINDOW):
            slow.say(*said[start : start + WINDOW])
            # The other visitor's question and answer pass, whatever waits here.
            brisk.say(b"ping %d" % start)
            assert await hear_frame(other.far) == b"ping %d" % start
            await other.far.say(frame(b"pong %d" % start))
            assert await brisk.hear() == b"pong %d" % start
        await rig.counted(stuck.token, slow_link=1)
        await rig.until(
            lambda: rig.engine.statistics().datagrams_dropped == rig.counts(stuck.token).slow_link,
            "nothing else was dropped",
        )
        assert rig.engine.statistics().datagram_bytes_held <= QUEUE_BYTES + 32768, "one record"
        # Now the link is read: what waited comes, whole and in order; and what comes from now on.
        heard, marks = await read_to_mark(rig, stuck.far, slow)
        assert is_subsequence(heard, [b"first", *said])
        assert len(heard) >= QUEUE_BYTES // (HEADER + 1200) - 1
        await rig.until(lambda: sum_of(rig, stuck.token) == 601 + marks, "each is counted once")
        assert not rig.is_over(stuck.token)
        for start in range(0, 200, WINDOW):
            slow.say(*said[start : start + WINDOW])
            again: list[bytes] = []
            while len(again) < WINDOW:
                if (data := await hear_frame(stuck.far)) != MARK:
                    again.append(data)
            assert again == said[start : start + WINDOW]


def sum_of(rig: UdpRig, token: int) -> int:
    """Return how many datagrams of a visitor a relay has decided on."""
    counts = rig.counts(token)
    return counts.datagrams_up + counts.slow_link


async def read_to_mark(rig: UdpRig, far: End, visitor: Mouth) -> tuple[list[bytes], int]:
    """Read a link until one of the visitor's marks has come through.

    Returns:
        (what came before it, how many marks were sent).
    """
    heard: list[bytes] = []

    async def read() -> None:
        while (data := await hear_frame(far)) != MARK:
            heard.append(data)

    reading, marks = asyncio.create_task(read()), 0
    while not reading.done():
        visitor.say(MARK)
        marks += 1
        await rig.let_pass(0.01)
    await reading
    return heard, marks


@every_kind
async def test_f9_what_passes_a_slow_link_is_in_order(kind: Kind) -> None:
    """A reader that is slow, not stuck: frames are lost in the middle, never inside."""
    dice = random.Random(9)
    said = [b"%06d" % step + dice.randbytes(dice.randrange(1400)) for step in range(800)]
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b"first"), buffers=NARROW)
        heard = []

        async def read_slowly() -> None:
            while (data := await hear_frame(bound.far)) != MARK:
                heard.append(data)
                if len(heard) % 8 == 0:
                    await rig.let_pass()

        reading = asyncio.create_task(read_slowly())
        for start in range(0, len(said), WINDOW):
            visitor.say(*said[start : start + WINDOW])
            await rig.let_pass()
        marks = 0
        while not reading.done():
            visitor.say(MARK)
            marks += 1
            await rig.let_pass(0.01)
        await reading
        assert is_subsequence(heard, [b"first", *said])
        await rig.until(lambda: sum_of(rig, bound.token) == 801 + marks, "each is counted once")
        assert rig.counts(bound.token).datagrams_up >= len(heard) + 1
        assert rig.counts(gate.token).overrun == 0


@every_kind
async def test_frames_lost_with_their_link_are_counted(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor, other = gate.visitor(), gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b"first"), buffers=NARROW)
        for _ in range(5):
            visitor.say(*[bytes(1200)] * WINDOW)
            await rig.let_pass()
        await gate.welcome(other, b"behind all of them")
        rig.engine.abort(bound.token)
        over = await rig.over(bound.token)
        assert over.counts.datagrams_up + over.counts.slow_link == 101
        assert over.counts.slow_link > 0
        assert rig.engine.statistics().datagrams_dropped == over.counts.slow_link


# --- towards the target --------------------------------------------------------------------------


@every_kind
@tls_or_not
async def test_target_is_not_read_while_the_link_is_full(kind: Kind, is_tls: bool) -> None:
    """The kernel drops what is too much, and says how many."""
    async with UdpRig(kind) as rig:
        outer, target = udp_pair()
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        dialled = rig.dial(is_tls=is_tls, buffers=NARROW, target=target)
        mouth = rig.mouth(outer)
        said = [b"%06d" % step * 200 for step in range(400)]
        for start in range(0, len(said), WINDOW):
            mouth.say(*said[start : start + WINDOW])
            await rig.let_pass()
        assert rig.counts(dialled.token).datagrams_down < 100
        heard, marks = await read_to_mark(rig, dialled.near, mouth)
        assert is_subsequence(heard, said)
        await rig.until(
            lambda: rig.counts(dialled.token).datagrams_down >= len(heard) + 1, "counted"
        )
        counts = rig.counts(dialled.token)
        assert counts.slow_link == 0
        if sys.platform == "linux":
            assert counts.overrun > 0
            assert counts.datagrams_down + counts.overrun <= 400 + marks


@every_kind
@tls_or_not
async def test_full_target_makes_the_link_wait(kind: Kind, is_tls: bool) -> None:
    """Sockets of AF_UNIX stand in for a UDP socket that is full: nothing is lost, and no order."""
    async with UdpRig(kind) as rig:
        outer, target = unix_datagrams()
        dialled = rig.dial(is_tls=is_tls, target=target)
        mouth = rig.mouth(outer)
        said = [b"%06d" % step * (step % 300) for step in range(3000)]
        sending = asyncio.create_task(dialled.near.say(frames(*said)))
        await rig.until(lambda: rig.counts(dialled.token).datagrams_up > 2, "the target is full")
        await rig.let_pass(0.05)
        assert rig.counts(dialled.token).datagrams_up < 500
        mouth.say(b"the other way is open")
        assert await hear_frame(dialled.near) == b"the other way is open"
        want, found = hashlib.sha256(), hashlib.sha256()
        for data in said:
            want.update(frame(data))
            found.update(frame(await mouth.hear()))
        assert want.digest() == found.digest()
        await sending
        counts = await rig.counted(dialled.token, datagrams_up=3000)
        assert sum(counts[4:]) == 0


async def test_full_gate_makes_the_links_wait(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """UDP on loopback is never full, so that the twin is told it is, two times of three."""
    if kind.is_native:
        pytest.skip("there is no way to fill the gate's socket on loopback")
    tries = itertools.count()
    send = udp_port.UdpPort.send

    def send_sometimes(port: udp_port.UdpPort, *datagram: object) -> None:
        if next(tries) % 3:
            raise BlockingIOError
        send(port, *datagram)  # type: ignore[arg-type]

    monkeypatch.setattr(udp_port.UdpPort, "send", send_sometimes)
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitors = [gate.visitor() for _ in range(3)]
        bounds = [rig.bind(await gate.welcome(visitor, b"")) for visitor in visitors]
        said = [b"%d" % step for step in range(100)]
        for bound in bounds:
            await bound.far.say(frames(*said))
            await bound.far.end()
        for bound, visitor in zip(bounds, visitors, strict=True):
            assert await visitor.hear_many(100) == said
            over = await rig.over(bound.token)
            assert (over.reason, over.counts.datagrams_down) == (kind.module.REASON_FINISHED, 100)


# --- what the kernel does not send ---------------------------------------------------------------


@every_kind
async def test_datagrams_that_the_kernel_refuses_are_counted(kind: Kind) -> None:
    """A socket shut for writing answers EPIPE, as a firewall would EPERM."""
    async with UdpRig(kind) as rig:
        outer, target = udp_pair()
        target.shutdown(socket.SHUT_WR)
        dialled = rig.dial(target=target)
        mouth = rig.mouth(outer)
        await dialled.near.say(frames(b"lost", b"lost, too"))
        counts = await rig.counted(dialled.token, unsent=2)
        assert (counts.unsent, counts.datagrams_up) == (2, 0)
        mouth.say(b"the other way is open")
        assert await hear_frame(dialled.near) == b"the other way is open"
        sock = udp_socket()
        visitor = rig.mouth(udp_socket())
        visitor.sock.connect(sock.getsockname())
        with contextlib.suppress(OSError):  # it is not connected, and shut all the same
            sock.shutdown(socket.SHUT_WR)
        rig.serve(sock)
        visitor.say(b"hello")
        bound = rig.bind((await rig.newcomer()).token)
        await bound.far.say(frame(b"lost"))
        assert (await rig.counted(bound.token, unsent=1)).datagrams_down == 0


@every_kind
async def test_refusals_are_counted_and_nothing_is_lost_for_them(kind: Kind) -> None:
    """An error belongs to an earlier datagram than the one on which it is told."""
    async with UdpRig(kind) as rig:
        dialled = rig.dial(target=closed_target())
        for step in range(10):
            await dialled.near.say(frame(b"%d" % step))
            await rig.counted(dialled.token, datagrams_up=step + 1)
        counts = await rig.counted(dialled.token, refused=9)
        assert (counts.datagrams_up, counts.bytes_up, counts.unsent) == (10, 10, 0)
        assert counts.refused <= 10
        assert not rig.is_over(dialled.token)
        assert rig.engine.statistics().datagrams_dropped == 0


@every_kind
@on_linux
async def test_overruns_of_a_gate_are_counted(kind: Kind) -> None:
    """Each datagram is either taken or said to be dropped, once another one has come."""
    async with UdpRig(kind) as rig:
        sock = udp_socket(rcvbuf=16384)
        visitor = rig.mouth(udp_socket())
        visitor.sock.connect(sock.getsockname())
        gate = rig.serve(sock)
        visitor.say(b"hello")
        bound = rig.bind((await rig.newcomer()).token)
        reading = asyncio.create_task(read_all(bound.far))
        visitor.say(*[bytes(1000)] * 1000)

        def all_accounted() -> bool:
            visitor.say(b"is that all?")
            marks[0] += 1
            return sum_of(rig, bound.token) + rig.counts(gate).overrun >= 1001

        marks = [0]
        await rig.until(all_accounted, "taken or dropped")
        await rig.until(
            lambda: sum_of(rig, bound.token) + rig.counts(gate).overrun >= 1001 + marks[0],
            "all",
        )
        assert sum_of(rig, bound.token) + rig.counts(gate).overrun == 1001 + marks[0]
        if not kind.is_native:
            assert rig.counts(gate).overrun > 0
        rig.engine.abort(bound.token)
        await rig.over(bound.token)
        with contextlib.suppress(ConnectionResetError):
            await reading


async def read_all(far: End) -> list[bytes]:
    """Read a link to its end."""
    return unframe(await far.hear_all())


@every_kind
async def test_target_that_is_gone_for_good(kind: Kind) -> None:
    """A socket of AF_UNIX loses its peer: refused once, then it is connected no more."""
    async with UdpRig(kind) as rig:
        outer, target = unix_datagrams()
        dialled = rig.dial(target=target)
        outer.close()
        await dialled.near.say(frames(b"1", b"2", b"3"))
        counts = await rig.counted(dialled.token, unsent=3)
        assert (counts.unsent, counts.datagrams_up) == (3, 0)
