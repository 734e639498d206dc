"""The seed dialect: one datagram over a link, one answer back, and no frames."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import pytest
from tests.kit.engine_rig import Kind
from tests.kit.tls_rig import End, cut
from tests.kit.udp_rig import Mouth, UdpRig
from tests.kit.udp_words import MAX_PAYLOAD, closed_target, hear_to_fin, udp_pair

every_kind = pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
tls_or_not = pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])

BLOB = random.Random(103).randbytes(200_000)
SMALL = 1000
"""Bytes from which on a datagram may come in pieces."""


# --- the side of the visitors --------------------------------------------------------------------


@every_kind
@tls_or_not
@pytest.mark.parametrize("is_fin", [True, False])
async def test_one_datagram_and_its_answer(kind: Kind, is_tls: bool, is_fin: bool) -> None:
    """The end of the stream is the end of the answer; with TLS a close_notify alone will do."""
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        peer = await gate.welcome(visitor, b"question")
        bound = rig.bind(peer, is_tls=is_tls, raw=True, idle=5.0)
        assert await bound.far.hear(8) == b"question"
        assert (await rig.over(peer)).reason == kind.module.REASON_FINISHED
        await bound.far.say(b"ans")
        await rig.let_pass(0.01)
        assert visitor.hear_now() == []
        await bound.far.say(b"wer")
        if is_fin:
            await bound.far.end()
        else:
            bound.far.sock.shutdown(socket.SHUT_WR)
        assert await visitor.hear() == b"answer"
        over = await rig.over(bound.token)
        assert over == (
            bound.token, (1, 1, 8, 6, 0, 0, 0, 0, 0, 0), kind.module.REASON_FINISHED, 0, 0, 0
        )  # fmt: skip
        assert await hear_to_fin(bound.far) == b""
        # No cooling: the next question may come at once.
        again = await gate.welcome(visitor, b"another")
        assert again != peer


@every_kind
@tls_or_not
@pytest.mark.parametrize("size", [1, 999, 1000, 20_000, MAX_PAYLOAD])
async def test_sizes_both_ways(kind: Kind, is_tls: bool, size: int) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate(datagram=65535)
        visitor = gate.visitor()
        bound = rig.bind(
            await gate.welcome(visitor, BLOB[:size]), is_tls=is_tls, raw=True, idle=20.0
        )
        assert await bound.far.hear(size) == BLOB[:size]
        await bound.far.say(BLOB[-size:])
        await bound.far.end()
        assert await visitor.hear() == BLOB[-size:]


@every_kind
async def test_answer_that_was_read_before(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b"?"), raw=True, head=b"an answer ")
        await bound.far.say(b"in two parts")
        await bound.far.end()
        assert await visitor.hear() == b"an answer in two parts"


@every_kind
async def test_answer_that_fits_no_datagram(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b"?"), raw=True)
        await bound.far.say(BLOB[: MAX_PAYLOAD + 1])
        await bound.far.end()
        over = await rig.over(bound.token)
        assert (over.counts.too_large, over.counts.datagrams_down) == (1, 0)
        await rig.let_pass(0.01)
        assert visitor.hear_now() == []


@every_kind
@tls_or_not
async def test_no_answer_at_all(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        first, second, third = (gate.visitor() for _ in range(3))
        ended = rig.bind(await gate.welcome(first, b"?"), is_tls=is_tls, raw=True)
        await ended.far.end()
        over = await rig.over(ended.token)
        assert (over.reason, over.counts.datagrams_down) == (kind.module.REASON_FINISHED, 0)
        waits = rig.bind(await gate.welcome(second, b"?"), is_tls=is_tls, raw=True, idle=0.2)
        over = await rig.over(waits.token)
        assert over[2:] == (kind.module.REASON_IDLE, 0, 0, 0)
        assert await hear_to_fin(waits.far) == b"?"
        broken = rig.bind(await gate.welcome(third, b"?"), is_tls=is_tls, raw=True)
        assert await broken.far.hear(1) == b"?"
        cut(broken.far)
        over = await rig.over(broken.token)
        assert (over.reason, over.side) == (kind.module.REASON_RESET, 2)
        for visitor in (first, second, third):
            assert visitor.hear_now() == []


@every_kind
async def test_idle_limit_ends_the_answer(kind: Kind) -> None:
    """The Go program reads once, within its time-out, and may keep the connection."""
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b"?"), raw=True, idle=0.3)
        await bound.far.say(b"an answer")
        assert await visitor.hear() == b"an answer"
        over = await rig.over(bound.token)
        assert over[2:] == (kind.module.REASON_FINISHED, 0, 0, 0)
        assert over.counts.datagrams_down == 1


@every_kind
async def test_each_waiting_datagram_has_its_link(kind: Kind) -> None:
    """The same Newcomer comes again for each that is left."""
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        peer = await gate.welcome(visitor, b"1", b"2", b"3")
        await rig.until(
            lambda: rig.engine.statistics().datagram_bytes_held >= 3, "all three are parked"
        )
        bounds = []
        for step in range(3):
            if step:
                assert (await rig.newcomer())[:3] == (peer, gate.token, visitor.name[0])
            assert not rig.is_over(peer)
            bounds.append(rig.bind(peer, raw=True))
            assert await bounds[-1].far.hear(1) == b"%d" % (step + 1)
        assert (await rig.over(peer)).reason == kind.module.REASON_FINISHED
        assert not rig.newcomers
        for bound in reversed(bounds):
            await bound.far.say(b"answer on %d" % bound.token)
            await bound.far.end()
            assert await visitor.hear() == b"answer on %d" % bound.token
            await rig.over(bound.token)


# --- the side of the target ----------------------------------------------------------------------


@every_kind
@tls_or_not
async def test_question_and_answer_of_a_target(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        dialled = rig.dial(is_tls=is_tls, raw=True, idle=5.0)
        await dialled.near.say(b"question")
        assert await dialled.target.hear() == b"question"
        dialled.target.say(b"answer")
        assert await dialled.near.hear_all() == b"answer", "an honest end behind it"
        over = await rig.over(dialled.token)
        assert over[1:] == (
            (1, 1, 8, 6, 0, 0, 0, 0, 0, 0), kind.module.REASON_FINISHED, 0, 0, 0
        )  # fmt: skip


async def in_pieces(end: End, data: bytes, size: int) -> None:
    """Send bytes one piece after the other, without long pauses."""
    for start in range(0, len(data), size):
        await end.say(data[start : start + size])
        await asyncio.sleep(0)


@every_kind
@tls_or_not
@pytest.mark.parametrize("size", [999, 1000, 1448, 9000, 40_000, MAX_PAYLOAD])
async def test_long_question_in_pieces(kind: Kind, is_tls: bool, size: int) -> None:
    """The link knows no boundaries; a pause is the only one."""
    async with UdpRig(kind) as rig:
        dialled = rig.dial(is_tls=is_tls, raw=True, idle=20.0, datagram=65535)
        start = time.monotonic()
        await in_pieces(dialled.near, BLOB[:size], 4096)
        assert await dialled.target.hear() == BLOB[:size]
        if size < SMALL:
            assert time.monotonic() - start < 5.0
        dialled.target.say(BLOB[-size:])
        assert await dialled.near.hear_all() == BLOB[-size:]
        over = await rig.over(dialled.token)
        assert over.counts[:4] == (1, 1, size, size)


@every_kind
@pytest.mark.parametrize("how", ["plain", "tls", "tls cut"])
async def test_long_question_is_whole_at_the_end_of_the_link(kind: Kind, how: str) -> None:
    async with UdpRig(kind) as rig:
        dialled = rig.dial(is_tls=how != "plain", raw=True, idle=20.0)
        await dialled.near.say(BLOB[:5000])
        if how == "tls cut":
            dialled.near.sock.shutdown(socket.SHUT_WR)
        else:
            await dialled.near.end()
        assert await dialled.target.hear() == BLOB[:5000]
        # Whether anybody still listens is not said; an answer is no error at least.
        dialled.target.say(b"answer")
        assert (await rig.over(dialled.token)).reason == kind.module.REASON_FINISHED


@every_kind
async def test_question_that_was_read_before(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        dialled = rig.dial(raw=True, head=b"question")
        assert await dialled.target.hear() == b"question"
        long = rig.dial(raw=True, head=BLOB[:3000])
        await long.near.say(BLOB[3000:6000])
        assert await long.target.hear() == BLOB[:6000]


@every_kind
async def test_question_that_fits_no_datagram(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        dialled = rig.dial(raw=True, idle=0.5)
        await dialled.near.say(BLOB[: MAX_PAYLOAD + 1])
        await dialled.near.end()
        over = await rig.over(dialled.token)
        assert (over.counts.datagrams_up, over.counts.too_large) == (0, 1)
        assert dialled.target.hear_now() == []


@every_kind
@tls_or_not
async def test_target_that_does_not_answer(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        silent = rig.dial(is_tls=is_tls, raw=True, idle=0.2)
        refusing = rig.dial(is_tls=is_tls, raw=True, idle=0.2, target=closed_target())
        unasked = rig.dial(is_tls=is_tls, raw=True, idle=0.2)
        await silent.near.say(b"?")
        await refusing.near.say(b"?")
        for dialled in (silent, refusing, unasked):
            over = await rig.over(dialled.token)
            assert over[2:] == (kind.module.REASON_IDLE, 0, 0, 0)
            assert await hear_to_fin(dialled.near) == b""
        assert rig.counts(refusing.token).refused == 1
        assert await silent.target.hear() == b"?"


@every_kind
async def test_only_the_first_answer_goes_back(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        dialled = rig.dial(raw=True, datagram=100)
        await dialled.near.say(b"?")
        assert await dialled.target.hear() == b"?"
        dialled.target.say(bytes(101), b"first", b"second")
        assert await dialled.near.hear_all() == b"first"
        over = await rig.over(dialled.token)
        assert (over.counts.datagrams_down, over.counts.too_large) == (1, 1)


# --- both ----------------------------------------------------------------------------------------


@every_kind
@tls_or_not
async def test_raw_tunnel(kind: Kind, is_tls: bool) -> None:
    """Eighteen questions of three visitors, each with a link of its own."""
    async with UdpRig(kind) as rig:
        gate = rig.gate(datagram=65535)
        visitors = [gate.visitor() for _ in range(3)]
        tokens: list[int] = []
        for step in range(6):
            asked: list[tuple[Mouth, Mouth, bytes]] = []
            for visitor in visitors:
                question = BLOB[step : step + 700 * step + 1]
                outer, target = udp_pair()
                peer = await gate.welcome(visitor, question)
                tokens += rig.tunnel(
                    peer,
                    target,
                    is_tls=is_tls,
                    bind={"raw": True, "idle": 20.0},
                    dial={"raw": True, "idle": 20.0, "datagram": 65535},
                )
                asked.append((visitor, rig.mouth(outer), question))
            for _, mouth, question in asked:
                assert await mouth.hear() == question
                mouth.say(question[::-1])
            for visitor, _, question in asked:
                assert await visitor.hear() == question[::-1]
        for token in tokens:
            over = await rig.over(token)
            assert over[2:] == (kind.module.REASON_FINISHED, 0, 0, 0)
            assert over.counts[:2] == (1, 1)
