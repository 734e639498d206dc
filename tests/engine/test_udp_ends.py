"""How UDP relays end: by silence, by the far side, by a broken link, by a target that refuses."""

from __future__ import annotations

import asyncio
import errno
import socket
import time

import pytest
from tests.kit.engine_rig import Kind, reset_on_close, tcp_pair
from tests.kit.tls_rig import End, cut
from tests.kit.udp_rig import Mouth, UdpRig
from tests.kit.udp_words import (
    closed_target,
    frame,
    frames,
    hear_frame,
    hear_to_fin,
    tls_end,
    udp_pair,
    udp_socket,
)

every_kind = pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
tls_or_not = pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
every_pair = pytest.mark.parametrize("pair", ["tcp", "unix"])
both_sides = pytest.mark.parametrize("side", ["bind", "dial"])

REFUSAL = 2.0
"""Seconds of refusals alone that end a relay."""


async def open_one(rig: UdpRig, side: str, **options: object) -> tuple[End, Mouth, int]:
    """Return (outer end of the link, UDP end of the test, token) of a relay of either side."""
    if side == "dial":
        return rig.dial(**options)  # type: ignore[arg-type]
    gate = rig.gate()
    visitor = gate.visitor()
    bound = rig.bind(await gate.welcome(visitor, b"hello"), **options)  # type: ignore[arg-type]
    assert await hear_frame(bound.far) == b"hello"
    return bound.far, visitor, bound.token


def link_side(side: str) -> int:
    """Return the engine's number of the link."""
    return 2 if side == "bind" else 1


# --- silence -------------------------------------------------------------------------------------


@every_kind
@both_sides
@tls_or_not
async def test_idle_limit_ends_politely(kind: Kind, side: str, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        end, ear, token = await open_one(rig, side, is_tls=is_tls, idle=0.2)
        await end.say(frame(b"one") + frame(b"half")[:3])
        assert await ear.hear() == b"one"
        start = time.monotonic()
        over = await rig.over(token)
        assert time.monotonic() - start > 0.1
        assert over[2:] == (kind.module.REASON_IDLE, 0, 0, 0)
        assert await hear_to_fin(end) == b"", "no reset"


@every_kind
async def test_either_direction_keeps_it(kind: Kind) -> None:
    """Empty datagrams count, too."""
    async with UdpRig(kind) as rig:
        # A limit far above the pauses: this machine may be busy.
        relays = [await open_one(rig, side, idle=0.8) for side in ("bind", "bind", "dial", "dial")]
        start = time.monotonic()
        while time.monotonic() - start < 1.6:
            for end, mouth, _ in relays[::2]:
                await end.say(frame(b""))
                assert await mouth.hear() == b""
            for end, mouth, _ in relays[1::2]:
                mouth.say(b"")
                assert await hear_frame(end) == b""
            await rig.let_pass(0.05)
        for _, _, token in relays:
            assert not rig.is_over(token)
        for _, _, token in relays:
            assert (await rig.over(token)).reason == kind.module.REASON_IDLE


@every_kind
@both_sides
async def test_half_a_frame_does_not_keep_it(kind: Kind, side: str) -> None:
    async with UdpRig(kind) as rig:
        end, _, token = await open_one(rig, side, idle=0.4)

        async def dribble() -> None:
            for byte in frame(bytes(5000)):
                await end.say(bytes([byte]))
                await rig.let_pass(0.02)

        dribbling = asyncio.create_task(dribble())
        assert (await rig.over(token)).reason == kind.module.REASON_IDLE
        dribbling.cancel()
        await asyncio.wait({dribbling})


@every_kind
@both_sides
async def test_limit_can_be_changed(kind: Kind, side: str) -> None:
    async with UdpRig(kind) as rig:
        _, _, shorter = await open_one(rig, side, idle=600.0)
        end, ear, never = await open_one(rig, side, idle=0.5)
        _, _, sudden = await open_one(rig, side)
        rig.engine.udp_limit(never, 0.0)
        rig.engine.udp_limit(shorter, 0.2)
        rig.engine.udp_limit(sudden, 0.2)
        for token in (shorter, sudden):
            assert (await rig.over(token)).reason == kind.module.REASON_IDLE
        await rig.let_pass(0.6)
        await end.say(frame(b"still here"))
        assert await ear.hear() == b"still here"


@every_kind
async def test_limits_of_many_and_far(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        far = [rig.dial(idle=limit).token for limit in (60.0, 600.0, 4e6)]
        near = [rig.dial(idle=0.02 * step).token for step in range(1, 21)]
        for token in near:
            assert (await rig.over(token)).reason == kind.module.REASON_IDLE
        assert not any(map(rig.is_over, far))


# --- the far side --------------------------------------------------------------------------------


@every_kind
@both_sides
@tls_or_not
@every_pair
async def test_end_of_the_link_behind_whole_frames(
    kind: Kind, side: str, is_tls: bool, pair: str
) -> None:
    said = [b"%d" % step * 30 for step in range(200)]
    async with UdpRig(kind, pair=pair) as rig:
        end, ear, token = await open_one(rig, side, is_tls=is_tls)
        await end.say(frames(*said))
        await end.end()
        assert await ear.hear_many(200) == said
        over = await rig.over(token)
        assert over[2:] == (kind.module.REASON_FINISHED, 0, 0, 0)
        assert 200 in over.counts[:2]
        assert await hear_to_fin(end) == b"", "we end, too"
        assert sum(over.counts[4:]) == 0


@every_kind
@both_sides
@pytest.mark.parametrize("cut_at", [1, 2, 5])
async def test_end_inside_a_frame(kind: Kind, side: str, cut_at: int) -> None:
    async with UdpRig(kind) as rig:
        end, ear, token = await open_one(rig, side)
        await end.say(frame(b"whole") + frame(b"never whole")[:cut_at])
        await end.end()
        over = await rig.over(token)
        assert over.reason == kind.module.REASON_FINISHED
        assert await ear.hear() == b"whole"
        await rig.let_pass(0.02)
        assert ear.hear_now() == []
        assert sum(over.counts[4:]) == 0
        assert rig.engine.statistics().datagram_bytes_held == 0


@every_kind
@both_sides
@pytest.mark.parametrize("how", ["close_notify", "fin", "both", "gone"])
async def test_every_end_of_a_tls_link_is_one(kind: Kind, side: str, how: str) -> None:
    """Datagrams may be lost anyway: a FIN without close_notify hides nothing here."""
    async with UdpRig(kind) as rig:
        end, ear, token = await open_one(rig, side, is_tls=True)
        tls = tls_end(end)
        await tls.say(frame(b"last words"))
        assert await ear.hear() == b"last words"
        match how:
            case "close_notify":
                await tls.end_softly()
            case "fin":
                tls.sock.shutdown(socket.SHUT_WR)
            case "both":
                await tls.end()
            case "gone":
                await tls.end_softly()
                tls.sock.close()
        over = await rig.over(token)
        assert over[2:] == (kind.module.REASON_FINISHED, 0, 0, 0)


@every_kind
@both_sides
async def test_tls_link_cut_inside_a_record(kind: Kind, side: str) -> None:
    async with UdpRig(kind) as rig:
        end, ear, token = await open_one(rig, side, is_tls=True)
        tls = tls_end(end)
        await rig.send(tls.sock, tls.seal(frame(b"whole")) + tls.seal(frame(b"cut"))[:9])
        tls.sock.shutdown(socket.SHUT_WR)
        assert await ear.hear() == b"whole"
        assert (await rig.over(token)).reason == kind.module.REASON_FINISHED


@every_kind
@both_sides
async def test_bad_record_is_a_reset(kind: Kind, side: str) -> None:
    async with UdpRig(kind) as rig:
        end, ear, token = await open_one(rig, side, is_tls=True)
        tls = tls_end(end)
        bad = b"\x17\x03\x03\x00\x40" + bytes(64)
        await rig.send(tls.sock, tls.seal(frames(b"good", b"as good")) + bad)
        over = await rig.over(token)
        assert over[2:5] == (kind.module.REASON_RESET, link_side(side), errno.EBADMSG)
        assert over.detail > 0
        assert await ear.hear_many(2) == [b"good", b"as good"]


@every_kind
@both_sides
@tls_or_not
async def test_reset_of_the_link(kind: Kind, side: str, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        end, ear, token = await open_one(rig, side, is_tls=is_tls)
        await end.say(frame(b"before"))
        assert await ear.hear() == b"before"
        cut(end)
        over = await rig.over(token)
        assert over[2:] == (kind.module.REASON_RESET, link_side(side), errno.ECONNRESET, 0)


@every_kind
@both_sides
@pytest.mark.parametrize("is_reset", [False, True])
async def test_link_that_had_ended_before(kind: Kind, side: str, is_reset: bool) -> None:
    """Everything has happened before the engine sees the socket."""
    async with UdpRig(kind) as rig:
        outer, inner = tcp_pair()
        if is_reset:
            reset_on_close(outer)
        outer.close()
        await rig.let_pass(0.01)
        if side == "bind":
            gate = rig.gate()
            token = rig.hand_bind(await gate.welcome(gate.visitor(), b"hello"), inner)
        else:
            other, target = udp_pair()
            rig.mouth(other)
            token = rig.hand_dial(inner, target)
        over = await rig.over(token)
        if is_reset:
            assert (over.reason, over.side) == (kind.module.REASON_RESET, link_side(side))
        else:
            # Our first frame may meet the RST of a socket that nobody holds any more.
            assert over.reason in {kind.module.REASON_FINISHED, kind.module.REASON_RESET}


# --- a target that refuses -----------------------------------------------------------------------


@every_kind
async def test_target_that_refuses_for_two_seconds(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        refusing, other = rig.dial(target=closed_target()), rig.dial()
        start = time.monotonic()
        while not rig.is_over(refusing.token):
            assert time.monotonic() - start < 15 * REFUSAL
            await refusing.near.say(frame(b"anybody?"))
            await other.near.say(frame(b"you are?"))
            assert await other.target.hear() == b"you are?"
            await rig.let_pass(0.02)
        assert time.monotonic() - start >= REFUSAL * 0.95
        over = await rig.over(refusing.token)
        assert over[2:] == (kind.module.REASON_RESET, 2, errno.ECONNREFUSED, 0)
        assert over.counts.refused >= 2
        assert not rig.is_over(other.token)


@every_kind
async def test_silence_is_no_refusal(kind: Kind) -> None:
    """One refusal long ago, and then another: the relay ends. Without the other: it does not."""
    async with UdpRig(kind) as rig:
        silent = rig.dial(target=closed_target())
        await silent.near.say(frame(b"anybody?"))
        await rig.counted(silent.token, refused=1)
        await rig.let_pass(REFUSAL + 0.3)
        assert not rig.is_over(silent.token)
        await silent.near.say(frame(b"anybody?"))
        over = await rig.over(silent.token)
        assert (over.reason, over.code) == (kind.module.REASON_RESET, errno.ECONNREFUSED)


@every_kind
async def test_answer_ends_the_refusals(kind: Kind) -> None:
    """The target was started a little late; and later it goes away for good."""
    async with UdpRig(kind) as rig:
        late, target = udp_socket(), udp_socket()
        (_, port), engines_end = late.getsockname(), target.getsockname()
        target.connect(late.getsockname())
        late.close()
        dialled = rig.dial(target=target)
        await dialled.near.say(frame(b"early"))
        await rig.counted(dialled.token, refused=1)
        await rig.let_pass(0.5)
        with udp_socket(port=port) as late:
            late.sendto(b"here now", engines_end)
            assert await hear_frame(dialled.near) == b"here now"
        answered = time.monotonic()
        while not rig.is_over(dialled.token):
            assert time.monotonic() - answered < 15 * REFUSAL
            await dialled.near.say(frame(b"still there?"))
            await rig.let_pass(0.02)
        assert time.monotonic() - answered >= REFUSAL * 0.95, "the first refusal is forgotten"
        assert (await rig.over(dialled.token)).code == errno.ECONNREFUSED
