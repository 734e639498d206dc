"""Strangers and bad paths: floods, tiny datagrams, errors in between. Nobody else is hurt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from tests.kit.engine_rig import PATIENCE, Kind
from tests.kit.udp_rig import UdpRig
from tests.kit.udp_words import frame, hear_frame, udp_pair, udp_socket

from nodepass.errors import EngineError

both_kinds = pytest.mark.parametrize("kind", ["native", "twin"], indirect=True)
only_native = pytest.mark.parametrize("kind", ["native"], indirect=True)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may send ICMP by hand")

NARROW = {"sndbuf": 4096, "rcvbuf": 4096}
PARKED = 65536
"""Bytes that one source may have waiting."""
HALF_POOL = 32 << 20
"""Bytes of waiting datagrams that strangers may fill on one worker."""
EMPTY = 200_000
"""Datagrams; one read of a link brings up to 131 072 of them."""
FILTERED = 13
"""Code of an ICMP error, destination unreachable: administratively prohibited."""


def strangers(count: int, port: int) -> Iterator[socket.socket]:
    for number in range(count):
        sock = udp_socket(f"127.77.{number // 250}.{number % 250 + 1}")
        sock.connect(("127.0.0.1", port))
        yield sock


@only_native
@pytest.mark.slow
async def test_flood_of_parked_datagrams_leaves_room_to_others(kind: Kind, many_fds: None) -> None:
    async with UdpRig(kind, flows=4096) as rig:
        gate, other = rig.gate(waiting=1024), rig.gate()
        old = gate.visitor()
        bound = rig.bind(await gate.welcome(old, b"hello"))
        assert await hear_frame(bound.far) == b"hello"
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(sock) for sock in strangers(700, gate.port)]
            for step in range(16 * len(crowd)):
                crowd[step % len(crowd)].send(b"z" * 8190)
                if step % 20 == 0:
                    await asyncio.sleep(0.001)  # or the kernel's buffer is all that is flooded
            held = rig.engine.statistics().datagram_bytes_held
            assert HALF_POOL // 2 < held <= HALF_POOL
        # Who was there goes on, also with half a frame, which has to wait for its rest.
        whole = frame(b"y" * 1000)
        await bound.far.say(whole[:500])
        await asyncio.sleep(0.05)
        await bound.far.say(whole[500:])
        assert await old.hear() == b"y" * 1000
        # Every place comes free again, on that gate and on the other.
        rig.engine.abort(gate.token)
        await rig.over(gate.token)
        rig.newcomers.clear()
        late = other.visitor()
        fresh = rig.bind(await other.welcome(late, b"late"))
        assert await hear_frame(fresh.far) == b"late"


@only_native
async def test_turn_of_empty_datagrams_is_short(kind: Kind) -> None:
    """A neighbour must not wait for all that came with one read."""
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b"hello"))
        flow = rig.join()
        visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        flood = asyncio.create_task(bound.far.say(b"\0\0" * EMPTY))
        turns = 0
        while rig.counts(bound.token).datagrams_down < EMPTY:
            await rig.send(flow.visitor, b"?")
            assert await rig.receive(flow.target, 1) == b"?"
            turns += 1
        await flood
        # A question and an answer for every 500 datagrams or so; a turn of all that one read
        # brings would let a handful through.
        assert turns > 50


@both_kinds
async def test_head_that_is_too_long_is_refused(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        outer, inner = rig.ends()
        ours, target = udp_pair()
        with inner, ours, target:
            if kind.is_native:
                with pytest.raises(EngineError):
                    rig.engine.udp_dial(inner.fileno(), target.fileno(), head=b"x" * 262145)
            whole = frame(b"a" * 8000) * 32
            token = rig.engine.udp_dial(inner.fileno(), target.fileno(), head=whole)
            inner.detach()
            target.detach()
            mouth = rig.mouth(ours.dup())
            for _ in range(32):
                assert await mouth.hear() == b"a" * 8000
            rig.engine.abort(token)
            await rig.over(token)
        outer.close()


@both_kinds
async def test_batch_of_a_target_is_not_lost_to_a_slow_link(kind: Kind) -> None:
    """The target is read as far as the link takes it; the kernel keeps the rest."""
    async with UdpRig(kind) as rig:
        ours, target = udp_pair()
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        dialled = rig.dial(target=target, buffers=NARROW)
        said = [b"%06d" % number * 1000 for number in range(40)]
        with ours:
            for datagram in said:
                ours.send(datagram)
            await asyncio.sleep(0.05)
            assert [await hear_frame(dialled.near) for _ in said] == said
        assert rig.counts(dialled.token).slow_link == 0


def icmp_error(code: int, source: tuple[str, int], target: tuple[str, int]) -> None:
    """Tell a source that a datagram of it to that target did not arrive."""
    udp = struct.pack("!HHHH", source[1], target[1], 12, 0) + b"abcd"
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + addresses
    blank = struct.pack("!BBHI", 3, code, 0, 0) + ip + udp
    words = sum(struct.unpack(f"!{len(blank) // 2}H", blank))
    words = (words & 0xFFFF) + (words >> 16)
    check = ~(words + (words >> 16)) & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.sendto(struct.pack("!BBHI", 3, code, check, 0) + ip + udp, (source[0], 0))


@as_root
@both_kinds
async def test_icmp_error_before_datagrams_hides_none_of_them(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        ours, target = udp_pair()
        near, far = target.getsockname(), ours.getsockname()
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        dialled = rig.dial(target=target, buffers=NARROW)
        with ours:
            for number in range(200):  # so many that the link is full and the socket unread
                ours.send(b"%04d" % number * 300)
                await asyncio.sleep(0.001)
            icmp_error(FILTERED, near, far)
            heard = [await hear_frame(dialled.near) for _ in range(200)]
        assert heard == [b"%04d" % number * 300 for number in range(200)]


@both_kinds
async def test_new_limit_does_not_hold_up_a_question_in_pieces(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        dialled = rig.dial(raw=True, idle=5.0)
        await dialled.near.say(b"x" * 3000)
        rig.engine.udp_limit(dialled.token, 30.0)
        start = time.monotonic()
        assert await dialled.target.hear() == b"x" * 3000
        assert time.monotonic() - start < 5
        rig.engine.udp_limit(dialled.token, 0.2)
        over = await rig.over(dialled.token)
        assert over.reason == kind.module.REASON_IDLE


@both_kinds
@pytest.mark.slow
async def test_stream_that_was_asked_for_once_is_not_relieved(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        stream, lookup = gate.visitor(), gate.visitor()
        bound = rig.bind(await gate.welcome(stream, b"subscribe"))
        await hear_frame(bound.far)
        end = time.monotonic() + 2.3
        while time.monotonic() < end:
            await bound.far.say(frame(b"tick"))
            assert await stream.hear() == b"tick"
            await asyncio.sleep(0.1)
        short = rig.bind(await gate.welcome(lookup, b"?"))
        await hear_frame(short.far)
        await short.far.say(frame(b"!"))
        assert await lookup.hear() == b"!"
        await asyncio.sleep(1.3)
        rig.engine.udp_relieve(gate.token)
        assert (await rig.over(short.token)).reason == kind.module.REASON_IDLE
        assert not rig.is_over(bound.token)


@both_kinds
@pytest.mark.slow
async def test_two_answers_at_once_are_no_stream(kind: Kind) -> None:
    """Seconds later they are an exchange that is over, not one that has lasted."""
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b"A?"))
        await hear_frame(bound.far)
        await bound.far.say(frame(b"A!") + frame(b"AAAA!"))
        assert [await visitor.hear() for _ in range(2)] == [b"A!", b"AAAA!"]
        await asyncio.sleep(2.3)
        rig.engine.udp_relieve(gate.token)
        assert (await rig.over(bound.token)).reason == kind.module.REASON_IDLE


@both_kinds
async def test_gate_after_gate_on_one_slot(kind: Kind) -> None:
    """What comes late of a closed gate is not charged to the next one."""
    async with UdpRig(kind, flows=64) as rig:
        for _ in range(30):
            gate = rig.gate(waiting=16)
            visitors = [gate.visitor(f"127.0.0.{1 + n % 8}") for n in range(16)]
            peers = [await gate.welcome(visitor, b"x") for visitor in visitors]
            gate.visitor().say(b"one too many")
            await rig.until(lambda: rig.counts(gate.token).no_link == 1, "the one too many")  # noqa: B023
            rig.engine.abort(gate.token)
            for token in (*peers, gate.token):
                assert (await rig.over(token)).reason == kind.module.REASON_ABORTED


@both_kinds
async def test_c24_one_address_leaves_places_to_others(kind: Kind) -> None:
    """An address has at most four times as many of the waiting places as are left."""
    async with UdpRig(kind) as rig:
        gate = rig.gate(waiting=16)
        crowd = [gate.visitor("127.0.0.9") for _ in range(30)]
        for visitor in crowd:
            visitor.say(b"me first")
        await rig.counted(gate.token, no_link=17)
        await rig.told(lambda: len(rig.newcomers) == 13, "all but the last three")
        first = rig.newcomers.popleft()
        rig.newcomers.clear()
        for host in ("127.0.0.10", "127.0.0.11", "127.0.0.12"):
            await gate.welcome(gate.visitor(host), b"and me")
        gate.visitor("127.0.0.13").say(b"too late")
        await rig.counted(gate.token, no_link=18)
        # Whose link is there counts no more, and whoever is given up does until he has cooled.
        bound = rig.bind(first.token)
        assert await hear_frame(bound.far) == b"me first"
        await rig.over(first.token)
        late = gate.visitor("127.0.0.13")
        async with asyncio.timeout(PATIENCE):
            while not rig.newcomers:  # the place is given back in a turn of its own
                late.say(b"there is one")
                await asyncio.sleep(0.01)
        assert rig.engine.statistics().peers_waiting == 16


@both_kinds
async def test_c24_several_addresses_leave_places_to_others(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate(waiting=64)
        for _ in range(40):
            for host in ("127.0.0.9", "127.0.0.10", "127.0.0.11"):
                gate.visitor(host).say(b"us first")
        await rig.counted(gate.token, no_link=3 * 40 - 60)
        await rig.told(lambda: len(rig.newcomers) == 60, "twenty of each")
        rig.newcomers.clear()
        for step in range(4):
            await gate.welcome(gate.visitor(f"127.0.0.{20 + step}"), b"and me")


@both_kinds
async def test_c24_who_has_waited_counts_no_more(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate(waiting=8)
        for step in range(40):
            visitor = gate.visitor("127.0.0.9")
            peer = await gate.welcome(visitor, b"%d" % step)
            if step % 2:
                bound = rig.bind(peer)
                assert await hear_frame(bound.far) == b"%d" % step
                rig.engine.abort(bound.token)
                await rig.over(bound.token)
            else:
                rig.engine.abort(peer)
                await rig.over(peer)
            await rig.until(
                lambda: rig.engine.statistics().peers_waiting < 7, "places that have cooled"
            )
        await rig.until(lambda: rig.engine.statistics().peers_waiting == 0, "nobody waits")
        crowd = [gate.visitor("127.0.0.9") for _ in range(7)]
        for visitor in crowd:
            visitor.say(b"again")
        await rig.told(lambda: len(rig.newcomers) == 7, "as many as in the beginning")


@both_kinds
async def test_c23_sources_without_a_link_are_few(kind: Kind, many_fds: None) -> None:
    """Where nothing else is asked for, 512, however many addresses they come from."""
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        for number in range(600):
            gate.visitor(f"127.0.{1 + number % 4}.{1 + number // 4}").say(b"?")
        await rig.told(lambda: len(rig.newcomers) == 512, "as many as may wait")
        await rig.counted(gate.token, no_link=88)
        assert rig.engine.statistics().peers_waiting == 512
        assert rig.counts(gate.token).no_link == 88
