"""What a flow promises to both ends: every byte, every end, and no end that is a lie."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
from collections.abc import Callable

import pytest
from tests.kit.engine_rig import Kind, Rig, reset_on_close

Engine = Callable[..., Rig]
BLOB = os.urandom(3_000_000)
every_kind = pytest.mark.parametrize(
    "kind", ["native", "native-copy", "native-2", "twin"], indirect=True
)
every_pair = pytest.mark.parametrize("pair", ["tcp", "unix"])


@every_pair
@pytest.mark.loops("asyncio", "uvloop")
async def test_bytes_travel_both_ways(engine: Engine, pair: str) -> None:
    async with engine(pair=pair) as rig:
        flow = rig.join()
        await rig.send(flow.visitor, b"question")
        assert await rig.receive(flow.target, 8) == b"question"
        await rig.send(flow.target, b"answer")
        assert await rig.receive(flow.visitor, 6) == b"answer"
        await rig.carried(flow.token, 8, 6)


@every_kind
@every_pair
async def test_finished_when_both_directions_ended(engine: Engine, pair: str, kind: Kind) -> None:
    async with engine(pair=pair) as rig:
        flow = rig.join()
        sending = asyncio.create_task(rig.send(flow.visitor, BLOB))
        assert await rig.receive(flow.target, len(BLOB)) == BLOB
        await sending
        flow.visitor.shutdown(socket.SHUT_WR)
        assert await rig.drain(flow.target) == b""
        flow.target.shutdown(socket.SHUT_WR)
        assert await rig.drain(flow.visitor) == b""
        ended = await rig.ended(flow.token)
        assert ended == (flow.token, len(BLOB), 0, kind.module.REASON_FINISHED, 0, 0, 0)
        assert rig.engine.live(flow.token) is None


@every_pair
async def test_half_close_keeps_the_reply(engine: Engine, pair: str, kind: Kind) -> None:
    """F13: `printf request | nc -N` gets its answer."""
    async with engine(pair=pair) as rig:
        flow = rig.join()
        await rig.send(flow.visitor, b"request")
        flow.visitor.shutdown(socket.SHUT_WR)
        assert await rig.drain(flow.target) == b"request"
        sending = asyncio.create_task(rig.send(flow.target, BLOB))
        assert await rig.receive(flow.visitor, len(BLOB)) == BLOB
        await sending
        assert not rig.has_ended(flow.token)
        flow.target.close()
        assert await rig.drain(flow.visitor) == b""
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.up, ended.down) == (0, 7, len(BLOB))


@every_kind
async def test_close_behind_much_data_truncates_nothing(engine: Engine, kind: Kind) -> None:
    """F20: the sender is long gone when the slow receiver begins."""
    async with engine() as rig:
        flow = rig.join()
        await rig.send(flow.visitor, BLOB)
        flow.visitor.close()
        await asyncio.sleep(0.05)
        flow.target.shutdown(socket.SHUT_WR)
        got = await rig.drain(flow.target)
        assert hashlib.sha256(got).digest() == hashlib.sha256(BLOB).digest()
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.up) == (kind.module.REASON_FINISHED, len(BLOB))


@pytest.mark.parametrize("side", [1, 2])
async def test_reset_on_one_side_resets_the_other(engine: Engine, kind: Kind, side: int) -> None:
    """F12."""
    async with engine() as rig:
        flow = rig.join()
        ends = (flow.visitor, flow.target)
        await rig.send(ends[side - 1], b"last words")
        assert await rig.receive(ends[2 - side], 10) == b"last words"
        reset_on_close(ends[side - 1])
        ends[side - 1].close()
        assert await rig.is_reset(ends[2 - side])
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.side) == (kind.module.REASON_RESET, side)
        assert ended.code == errno.ECONNRESET


@pytest.mark.parametrize("side", [1, 2])
async def test_reset_overtakes_parked_bytes(engine: Engine, kind: Kind, side: int) -> None:
    """The source dies while its bytes wait for a receiver that does not read."""
    async with engine() as rig:
        small, own = rig.ends(sndbuf=4096, rcvbuf=4096)
        # The engine takes all of this at once: the source has nothing more under way, so
        # that the kernel accepts its RST (one behind lost segments may be ignored).
        source, inner = rig.ends()
        await rig.send(source, BLOB[:200_000])
        sides = (inner, own) if side == 1 else (own, inner)
        token = rig.hand_over(*sides)
        await rig.until(lambda: rig.engine.statistics().parked_bytes, "bytes parked")
        reset_on_close(source)
        source.close()
        ended = await rig.ended(token)
        assert (ended.reason, ended.side) == (kind.module.REASON_RESET, side)
        assert await rig.is_reset(small)


async def test_reset_of_the_receiver_resets_the_sender(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        flow = rig.join()
        stuck = asyncio.create_task(rig.send(flow.visitor, BLOB * 8))
        await rig.receive(flow.target, 100_000)
        reset_on_close(flow.target)
        flow.target.close()
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.side) == (kind.module.REASON_RESET, 2)
        assert ended.code in {errno.ECONNRESET, errno.EPIPE}
        assert isinstance(
            (await asyncio.gather(stuck, return_exceptions=True))[0],
            ConnectionResetError | BrokenPipeError,
        )


@pytest.mark.parametrize("side", [1, 2])
async def test_reset_after_one_direction_is_finished(
    engine: Engine, kind: Kind, side: int
) -> None:
    async with engine() as rig:
        flow = rig.join()
        flow.visitor.shutdown(socket.SHUT_WR)
        assert await rig.drain(flow.target) == b""
        ends = (flow.visitor, flow.target)
        reset_on_close(ends[side - 1])
        ends[side - 1].close()
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.side) == (kind.module.REASON_RESET, side)
        assert ended.code in {errno.ECONNRESET, errno.EPIPE}
        # The target has seen its EOF already: what it meets when it goes on is the reset.
        await rig.until(
            lambda: ends[2 - side].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
            "the other side is reset",
        )


@every_pair
async def test_sending_to_a_side_that_is_gone_is_a_reset(
    engine: Engine, kind: Kind, pair: str
) -> None:
    """The target closes fully; what the visitor still sends cannot arrive any more."""
    async with engine(pair=pair) as rig:
        flow = rig.join()
        flow.target.close()
        assert await rig.drain(flow.visitor) == b""
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            await talk_on(rig, flow.visitor)
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.side) == (kind.module.REASON_RESET, 2)
        assert ended.code in {errno.ECONNRESET, errno.EPIPE}


async def talk_on(rig: Rig, sock: socket.socket) -> None:
    for _ in range(2000):
        await rig.send(sock, b"anybody there?")
        await asyncio.sleep(0.001)


@every_pair
async def test_early_data_and_early_end(engine: Engine, kind: Kind, pair: str) -> None:
    """Everything happened before the engine saw the sockets."""
    async with engine(pair=pair) as rig:
        visitor, a = rig.ends()
        target, b = rig.ends()
        await rig.send(visitor, b"early")
        visitor.shutdown(socket.SHUT_WR)
        await rig.send(target, b"bird")
        target.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.01)
        token = rig.hand_over(a, b)
        assert await rig.drain(target) == b"early"
        assert await rig.drain(visitor) == b"bird"
        assert (await rig.ended(token))[1:] == (5, 4, kind.module.REASON_FINISHED, 0, 0, 0)


async def test_peer_reset_before_admission(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        visitor, a = rig.ends()
        target, b = rig.ends()
        reset_on_close(visitor)
        visitor.close()
        await asyncio.sleep(0.01)
        token = rig.hand_over(a, b)
        ended = await rig.ended(token)
        assert (ended.reason, ended.side, ended.code) == (
            kind.module.REASON_RESET,
            1,
            errno.ECONNRESET,
        )
        assert await rig.is_reset(target)


@every_pair
async def test_heads_come_first(engine: Engine, pair: str) -> None:
    async with engine(pair=pair) as rig:
        flow = rig.join(head_a=b"head of a, ", head_b=b"head of b, ")
        await rig.send(flow.visitor, b"body of a")
        await rig.send(flow.target, b"body of b")
        assert await rig.receive(flow.target, 20) == b"head of a, body of a"
        assert await rig.receive(flow.visitor, 20) == b"head of b, body of b"
        await rig.carried(flow.token, 20, 20)


async def test_head_larger_than_every_buffer(engine: Engine) -> None:
    async with engine() as rig:
        flow = rig.join(head_a=BLOB, buffers={"sndbuf": 8192, "rcvbuf": 8192})
        await rig.send(flow.visitor, b"tail")
        flow.visitor.shutdown(socket.SHUT_WR)
        assert await rig.drain(flow.target) == BLOB + b"tail"


async def test_head_of_a_peer_that_ended(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        visitor, a = rig.ends()
        target, b = rig.ends()
        visitor.shutdown(socket.SHUT_WR)
        target.shutdown(socket.SHUT_WR)
        token = rig.hand_over(a, b, head_a=b"x", head_b=b"yy")
        assert await rig.drain(target) == b"x"
        assert await rig.drain(visitor) == b"yy"
        assert (await rig.ended(token))[1:] == (1, 2, kind.module.REASON_FINISHED, 0, 0, 0)


async def test_abort_resets_both(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        flow = rig.join(head_a=b"hello")
        assert await rig.receive(flow.target, 5) == b"hello"
        rig.engine.abort(flow.token)
        rig.engine.abort(flow.token)
        assert await rig.ended(flow.token) == (
            flow.token,
            5,
            0,
            kind.module.REASON_ABORTED,
            0,
            0,
            0,
        )
        assert await rig.is_reset(flow.visitor)
        assert await rig.is_reset(flow.target)
        rig.engine.abort(flow.token)


@every_kind
async def test_abort_at_any_moment(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        for step in range(40):
            flow = rig.join(head_b=b"!" * step)
            tasks = [
                asyncio.create_task(rig.send(end, BLOB)) for end in (flow.visitor, flow.target)
            ]
            for _ in range(step % 8):
                await asyncio.sleep(0)
            if step % 3 == 0:
                flow.visitor.shutdown(socket.SHUT_WR)
            rig.engine.abort(flow.token)
            ended = await rig.ended(flow.token)
            assert ended.reason in {kind.module.REASON_ABORTED, kind.module.REASON_RESET}
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_idle_limit(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        flow = rig.join(idle=0.3)
        forever = rig.join()
        for _ in range(6):
            await asyncio.sleep(0.1)
            await rig.send(flow.visitor, b"still here")
        assert not rig.has_ended(flow.token)
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.side, ended.up) == (kind.module.REASON_IDLE, 0, 60)
        assert await rig.is_reset(flow.visitor)
        assert not rig.has_ended(forever.token)


async def test_idle_limits_of_many_and_far(engine: Engine, kind: Kind) -> None:
    """Short limits fire among limits far beyond the wheel's reach."""
    async with engine() as rig:
        far = [rig.join(idle=limit).token for limit in (60.0, 600.0, 4e6)]
        near = [rig.join(idle=0.01 * step).token for step in range(1, 21)]
        for token in near:
            assert (await rig.ended(token)).reason == kind.module.REASON_IDLE
        assert not any(rig.has_ended(token) for token in far)


async def test_urgent_byte_does_not_stop_the_stream(engine: Engine) -> None:
    """recv() stops at an urgent mark; what follows must still arrive."""
    async with engine() as rig:
        flow = rig.join()
        await rig.send(flow.visitor, b"before")
        flow.visitor.send(b"!", socket.MSG_OOB)
        await rig.send(flow.visitor, b"after")
        assert await rig.receive(flow.target, 11) == b"beforeafter"
        flow.visitor.send(b"?", socket.MSG_OOB)
        await rig.send(flow.visitor, BLOB)
        flow.visitor.shutdown(socket.SHUT_WR)
        assert await rig.drain(flow.target) == BLOB
