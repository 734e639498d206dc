"""What a UDP relay promises: every boundary, every order, and a datagram for a datagram."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest
from tests.kit.engine_rig import Kind
from tests.kit.tls_rig import End
from tests.kit.udp_rig import Mouth, UdpRig
from tests.kit.udp_words import (
    ANY,
    HEADER,
    MAX_PAYLOAD,
    frame,
    frames,
    has_ipv6,
    hear_frame,
    hear_frames,
    udp_pair,
    udp_socket,
)

every_kind = pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
tls_or_not = pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
every_pair = pytest.mark.parametrize("pair", ["tcp", "unix"])
needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback here")

SIZES = [0, 1, 2, 0, 255, 256, 1472, 8192, 3, 0]


# --- there and back ------------------------------------------------------------------------------


@every_kind
@tls_or_not
@every_pair
@pytest.mark.loops("asyncio", "uvloop")
async def test_datagrams_travel_both_ways(kind: Kind, is_tls: bool, pair: str) -> None:
    async with UdpRig(kind, pair=pair) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        peer = await gate.welcome(visitor, b"question")
        bound = rig.bind(peer, is_tls=is_tls)
        assert await hear_frame(bound.far) == b"question"
        await bound.far.say(frame(b"answer"))
        assert await visitor.hear() == b"answer"
        over = await rig.over(peer)
        assert over == (peer, (0,) * 10, kind.module.REASON_FINISHED, 0, 0, 0)
        counts = await rig.counted(bound.token, datagrams_down=1)
        assert counts == (1, 1, 8, 6, 0, 0, 0, 0, 0, 0)
        assert rig.counts(gate.token) == (0,) * 10
        assert not rig.newcomers, "a source is announced once"


@every_kind
@tls_or_not
@every_pair
@pytest.mark.loops("asyncio", "uvloop")
async def test_frames_reach_the_target_and_come_back(kind: Kind, is_tls: bool, pair: str) -> None:
    async with UdpRig(kind, pair=pair) as rig:
        dialled = rig.dial(is_tls=is_tls)
        await dialled.near.say(frame(b"question"))
        assert await dialled.target.hear() == b"question"
        dialled.target.say(b"answer")
        assert await hear_frame(dialled.near) == b"answer"
        counts = await rig.counted(dialled.token, datagrams_up=1, datagrams_down=1)
        assert counts == (1, 1, 8, 6, 0, 0, 0, 0, 0, 0)


@every_kind
@tls_or_not
async def test_boundaries_and_order_from_the_visitor(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        said = [bytes([step]) * size for step, size in enumerate(SIZES)]
        bound = rig.bind(await gate.welcome(visitor, *said[:5]), is_tls=is_tls)
        visitor.say(*said[5:])
        assert await hear_frames(bound.far, len(said)) == said
        counts = await rig.counted(bound.token, datagrams_up=len(said))
        assert (counts.datagrams_up, counts.bytes_up) == (len(said), sum(SIZES))


@every_kind
@tls_or_not
async def test_boundaries_and_order_from_the_target(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        dialled = rig.dial(is_tls=is_tls)
        said = [bytes([step]) * size for step, size in enumerate(SIZES)]
        dialled.target.say(*said)
        assert await hear_frames(dialled.near, len(said)) == said
        counts = await rig.counted(dialled.token, datagrams_down=len(said))
        assert (counts.datagrams_down, counts.bytes_down) == (len(said), sum(SIZES))


@every_kind
async def test_one_way_streams(kind: Kind) -> None:
    """Log lines up, and nothing ever comes back; then the same downwards."""
    async with UdpRig(kind) as rig:
        gate, target = rig.gate(), udp_socket()
        mouth = rig.mouth(target)
        visitor = gate.visitor()
        peer = await gate.welcome(visitor, b"first")
        outer = udp_socket()
        outer.connect(mouth.name)
        mouth.sock.connect(outer.getsockname())
        rig.tunnel(peer, outer)
        assert await mouth.hear() == b"first"
        for start in range(0, 500, 50):
            lines = [b"%d" % number for number in range(start, start + 50)]
            visitor.say(*lines)
            assert await mouth.hear_many(50) == lines
        for start in range(0, 500, 50):
            lines = [b"%d" % number for number in range(start, start + 50)]
            mouth.say(*lines)
            assert await visitor.hear_many(50) == lines


@every_kind
async def test_many_packets_answer_one(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        outer, target = udp_pair()
        mouth = rig.mouth(outer)
        visitor = gate.visitor()
        rig.tunnel(await gate.welcome(visitor, b"list, please"), target)
        assert await mouth.hear() == b"list, please"
        answer = [b"%d" % part * 400 for part in range(20)]
        mouth.say(*answer)
        assert await visitor.hear_many(20) == answer


@every_kind
async def test_one_engine_serves_several_gates(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        for step in range(4):
            gate = rig.gate()
            visitor = gate.visitor()
            bound = rig.bind(await gate.welcome(visitor, b"%d" % step))
            assert await hear_frame(bound.far) == b"%d" % step
        assert rig.engine.statistics().gates_open == 4


# --- sizes ---------------------------------------------------------------------------------------


@every_kind
async def test_longest_and_too_long_at_a_gate(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate(datagram=1000)
        visitor, stranger = gate.visitor(), gate.visitor()
        stranger.say(bytes(1001))  # creates no peer
        visitor.say(b"1" * 1000, b"2" * 1001, b"3" * 60_000, b"4")
        newcomer = await rig.newcomer()
        assert newcomer.port == visitor.name[1]
        bound = rig.bind(newcomer.token)
        assert await hear_frames(bound.far, 2) == [b"1" * 1000, b"4"]
        visitor.say(b"5" * 1001, b"6")
        assert await hear_frame(bound.far) == b"6"
        assert not rig.newcomers
        assert rig.counts(gate.token).too_large == 4
        assert rig.counts(bound.token).too_large == 0


@every_kind
async def test_longest_and_too_long_from_a_target(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        dialled = rig.dial(datagram=1000)
        dialled.target.say(b"1" * 1000, b"2" * 1001, b"3" * 60_000, b"4")
        assert await hear_frames(dialled.near, 2) == [b"1" * 1000, b"4"]
        assert rig.counts(dialled.token).too_large == 2
        # The limit is for what comes from the target; what goes there the other end has limited.
        await dialled.near.say(frame(b"5" * 5000))
        assert await dialled.target.hear() == b"5" * 5000


@every_kind
@tls_or_not
async def test_largest_datagram_of_all(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate(datagram=65535)
        visitor = gate.visitor()
        blob = random.Random(1).randbytes(MAX_PAYLOAD)
        bound = rig.bind(await gate.welcome(visitor, blob), is_tls=is_tls)
        assert await hear_frame(bound.far) == blob
        await bound.far.say(frame(blob[::-1]))
        assert await visitor.hear() == blob[::-1]
        dialled = rig.dial(is_tls=is_tls, datagram=65535)
        await dialled.near.say(frame(blob))
        assert await dialled.target.hear() == blob
        dialled.target.say(blob[::-1])
        assert await hear_frame(dialled.near) == blob[::-1]


@every_kind
async def test_frame_longer_than_any_datagram_is_counted(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b""))
        dialled = rig.dial()
        for end, ear, token in (
            (bound.far, visitor, bound.token),
            (dialled.near, dialled.target, dialled.token),
        ):
            await end.say(frames(b"before", bytes(65535), b"after"))
            assert await ear.hear_many(2) == [b"before", b"after"]
            assert rig.counts(token).unsent == 1


# --- cuts ----------------------------------------------------------------------------------------


async def feed(end: End, stream: bytes, sizes: list[int]) -> None:
    """Send a stream in pieces of given sizes, each on its own."""
    for size in sizes:
        piece, stream = stream[:size], stream[size:]
        await end.say(piece)
        await asyncio.sleep(0)  # the engine may look at any moment
    await end.say(stream)


async def check_cuts(
    rig: UdpRig, end: End, ear: Mouth, said: list[bytes], sizes: list[int]
) -> None:
    """Assert that a stream in pieces is still those datagrams."""
    feeding = asyncio.create_task(feed(end, frames(*said), sizes))
    assert await ear.hear_many(len(said)) == said
    await feeding


@tls_or_not
async def test_stream_byte_by_byte(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        said = [b"", b"a", b"bc", b"", b"", b"d" * 300, b"e" * 40, b""]
        ones = [1] * (len(frames(*said)) - 1)
        gate = rig.gate()
        visitor = gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b""), is_tls=is_tls)
        await check_cuts(rig, bound.far, visitor, said, ones)
        dialled = rig.dial(is_tls=is_tls)
        await check_cuts(rig, dialled.near, dialled.target, said, ones)


@pytest.mark.parametrize("cut", range(1, 2 * HEADER + 4))
async def test_stream_cut_once_at_every_byte(kind: Kind, cut: int) -> None:
    async with UdpRig(kind) as rig:
        stream = frames(b"abc", b"d")
        dialled = rig.dial()
        await dialled.near.say(stream[:cut])
        if cut >= len(frame(b"abc")):
            assert await dialled.target.hear() == b"abc"
        else:
            await rig.until(
                lambda: rig.engine.statistics().datagram_bytes_held == cut, "half a frame waits"
            )
            assert not dialled.target.hear_now()
        await dialled.near.say(stream[cut:])
        if cut < len(frame(b"abc")):
            assert await dialled.target.hear() == b"abc"
        assert await dialled.target.hear() == b"d"
        assert (await rig.counted(dialled.token, datagrams_up=2))[:4] == (2, 0, 4, 0)


@tls_or_not
@pytest.mark.parametrize("seed", range(4))
async def test_stream_in_random_pieces(kind: Kind, is_tls: bool, seed: int) -> None:
    dice = random.Random(seed)
    said = [dice.randbytes(dice.choice([0, 1, 2, 50, 1400, 4000])) for _ in range(60)]
    left, sizes = len(frames(*said)) - 1, []
    while left > 0:
        sizes.append(min(left, dice.choice([1, 2, 3, 100, 1448, 9000])))
        left -= sizes[-1]
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b""), is_tls=is_tls)
        await check_cuts(rig, bound.far, visitor, said, sizes)
        dialled = rig.dial(is_tls=is_tls)
        await check_cuts(rig, dialled.near, dialled.target, said, sizes)


@tls_or_not
async def test_head_comes_first(kind: Kind, is_tls: bool) -> None:
    """What was read from the link before the hand-over, cut in the middle of a frame."""
    async with UdpRig(kind) as rig:
        stream = frames(b"one", b"two", b"three")
        gate = rig.gate()
        visitor = gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b""), is_tls=is_tls, head=stream[:8])
        dialled = rig.dial(is_tls=is_tls, head=stream[:8])
        for end, ear in ((bound.far, visitor), (dialled.near, dialled.target)):
            assert await ear.hear() == b"one"
            await end.say(stream[8:])
            assert await ear.hear_many(2) == [b"two", b"three"]


# --- addresses -----------------------------------------------------------------------------------


@every_kind
async def test_sources_are_told_apart(kind: Kind) -> None:
    """By address and by port: neither alone is a visitor."""
    async with UdpRig(kind) as rig:
        gate = rig.gate(ANY)
        first = gate.visitor("127.0.0.3")
        second = rig.mouth(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        second.sock.setblocking(False)
        second.sock.bind(("127.0.0.4", first.name[1]))
        second.sock.connect(("127.0.0.1", gate.port))
        third = gate.visitor("127.0.0.3")
        bounds = [rig.bind(await gate.welcome(one, b"hello")) for one in (first, second, third)]
        for step, (bound, one) in enumerate(zip(bounds, (first, second, third), strict=True)):
            assert await hear_frame(bound.far) == b"hello"
            await bound.far.say(frame(b"%d" % step))
            assert await one.hear() == b"%d" % step


@every_kind
async def test_wildcard_gate_answers_from_where_it_was_asked(kind: Kind) -> None:
    """The kernel would choose another address; then a connected visitor hears nothing."""
    async with UdpRig(kind) as rig:
        gate = rig.gate(ANY)
        for to in ("127.0.0.1", "127.0.0.2", "127.1.2.3"):
            visitor = gate.visitor("127.0.0.9", to=to)
            bound = rig.bind(await gate.welcome(visitor, b"who are you?"))
            await bound.far.say(frame(to.encode()))
            assert await visitor.hear() == to.encode()


@every_kind
async def test_one_socket_writing_to_two_addresses_is_two_sources(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate(ANY)
        visitor = rig.mouth(udp_socket())
        for to in ("127.0.0.1", "127.0.0.2"):
            visitor.sock.sendto(b"hello", (to, gate.port))
            newcomer = await rig.newcomer()
            assert (newcomer.host, newcomer.port) == visitor.name
            bound = rig.bind(newcomer.token)
            await bound.far.say(frame(to.encode()))
            assert await visitor.hear_from() == (to.encode(), (to, gate.port))


@every_kind
@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "::"])
async def test_ipv6(kind: Kind, host: str) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate(host)
        visitor = gate.visitor("::1", to="::1")
        bound = rig.bind(await gate.welcome(visitor, b"six"))
        assert await hear_frame(bound.far) == b"six"
        await bound.far.say(frame(b"six, too"))
        assert await visitor.hear() == b"six, too"
        dialled = rig.dial(host="::1")
        await dialled.near.say(frame(b"six"))
        assert await dialled.target.hear() == b"six"
        dialled.target.say(b"six, too")
        assert await hear_frame(dialled.near) == b"six, too"


@every_kind
@needs_ipv6
async def test_dual_stack_gate(kind: Kind) -> None:
    """IPv4 sources have plain names there, and their answers the right source, too."""
    async with UdpRig(kind) as rig:
        gate = rig.gate("::", is_dual=True)
        for source, to in (("::1", "::1"), ("127.0.0.1", "127.0.0.1"), ("127.0.0.5", "127.0.0.2")):
            visitor = gate.visitor(source, to=to)
            bound = rig.bind(await gate.welcome(visitor, b"hello"))
            assert await hear_frame(bound.far) == b"hello"
            await bound.far.say(frame(b"welcome"))
            assert await visitor.hear() == b"welcome"


async def test_visitor_that_is_gone_costs_nothing(kind: Kind) -> None:
    """Its port answers with ICMP; the gate and its other visitors do not mind."""
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        leaver, stayer = gate.visitor(), gate.visitor()
        bound = rig.bind(await gate.welcome(leaver, b"hello"))
        other = rig.bind(await gate.welcome(stayer, b"hello"))
        leaver.sock.close()
        for _ in range(5):
            await bound.far.say(frame(b"anybody there?"))
            await rig.counted(bound.token, datagrams_down=1)
        await other.far.say(frame(b"you are"))
        assert await stayer.hear() == b"you are"
        assert not rig.is_over(bound.token)
