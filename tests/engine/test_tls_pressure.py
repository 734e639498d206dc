"""Slow receivers of TLS, many of them, and many transfers at once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Callable

import pytest
from tests.engine.conftest import IS_SANITIZED
from tests.kit.engine_rig import Kind, Rig, resident_bytes
from tests.kit.tls_rig import SHAPES, End, Secured, TlsEnd, join

Engine = Callable[..., Rig]
every_kind = pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
every_shape = pytest.mark.parametrize("shape", SHAPES)

SMALL = {"sndbuf": 4096, "rcvbuf": 4096}
PARKED_PER_WAY = (1 << 20) + (1 << 16)
"""Bytes one direction may hold back: a buffer, and what records add to it."""
TRANSFERS = 200


async def hear_slowly(end: End, dice: random.Random) -> bytes:
    """Receive up to the end, in odd bites and with pauses; return the digest."""
    digest = hashlib.sha256()
    async with asyncio.timeout(60):
        while True:
            bite = dice.randint(1, 40_000)
            part = await (end.hear_some(bite) if isinstance(end, TlsEnd) else end.hear(bite))
            if not part:
                return digest.digest()
            digest.update(part)
            if dice.random() < 0.1:
                await asyncio.sleep(0.001)


@every_kind
@every_shape
async def test_slow_readers_both_ways_get_everything(
    engine: Engine, shape: str, kind: Kind
) -> None:
    blobs = os.urandom(1_500_000), os.urandom(1_200_000)
    async with engine() as rig:
        flow = join(rig, shape, buffers=SMALL)

        async def speak(end: End, blob: bytes) -> None:
            await end.say(blob)
            await end.end()

        at_target, at_visitor, *_ = await asyncio.gather(
            hear_slowly(flow.target, random.Random(1)),
            hear_slowly(flow.visitor, random.Random(2)),
            speak(flow.visitor, blobs[0]),
            speak(flow.target, blobs[1]),
        )
        assert at_target == hashlib.sha256(blobs[0]).digest()
        assert at_visitor == hashlib.sha256(blobs[1]).digest()
        ended = await rig.ended(flow.token)
        assert ended[1:4] == (1_500_000, 1_200_000, kind.module.REASON_FINISHED)


class Flood:
    """What one end pours into a flow for ever, as one valid stream."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.rest = b""

    def pour(self) -> None:
        """Send until the kernel takes no more."""
        try:
            while True:
                if not self.rest:
                    chunk = bytes(1 << 18)
                    self.rest = self.end.seal(chunk) if isinstance(self.end, TlsEnd) else chunk
                self.rest = self.rest[self.end.sock.send(self.rest) :]
        except BlockingIOError:
            return


@every_shape
async def test_f27_tls_visitors_that_never_read(
    engine: Engine, shape: str, many_fds: None
) -> None:
    """Memory stays bounded, and another visitor is served as if alone."""
    async with engine() as rig:
        lone = join(rig, shape)
        before = 0 if IS_SANITIZED else resident_bytes()
        flows = [join(rig, shape, buffers={"rcvbuf": 16_384}) for _ in range(100)]
        floods = [Flood(flow.target) for flow in flows]

        def is_full() -> bool:
            for flood in floods:
                flood.pour()
            return bool(rig.engine.statistics().buffers_in_use >= 100)

        await rig.until(is_full, "bytes parked for every visitor")
        await lone.visitor.say(b"hello")
        assert await lone.target.hear(5) == b"hello"
        assert 0 < rig.engine.statistics().parked_bytes <= 100 * PARKED_PER_WAY
        if before:
            ours = 100 * (1 << 18)  # what the floods hold themselves
            assert resident_bytes() - before < 100 * PARKED_PER_WAY + ours
        for flow in flows:
            rig.engine.abort(flow.token)
        for flow in flows:
            await rig.ended(flow.token)
        assert rig.engine.statistics().parked_bytes == 0


@every_shape
async def test_more_slow_receivers_than_buffers(
    engine: Engine, shape: str, many_fds: None
) -> None:
    """With the pool dry nobody waits for anybody, and no byte goes missing."""
    count = 300
    blob = os.urandom(100_000)
    async with engine(pair="unix") as rig:
        flows = [join(rig, shape, buffers=SMALL) for _ in range(count)]
        tasks = [asyncio.create_task(flow.visitor.say(blob)) for flow in flows]
        await rig.until(
            lambda: rig.engine.statistics().buffers_in_use >= 127, "buffers handed out"
        )
        await asyncio.sleep(0.05)
        assert rig.engine.statistics().parked_bytes <= count * PARKED_PER_WAY
        quick = join(rig, shape)
        for size in (1, 1000, len(blob)):
            sending = asyncio.create_task(quick.visitor.say(blob[:size]))
            assert await quick.target.hear(size) == blob[:size]
            await sending

        async def finish(flow: Secured, task: asyncio.Task[None]) -> None:
            assert await flow.target.hear(len(blob)) == blob
            await task
            await flow.visitor.end()
            await flow.target.end()
            ended = await rig.ended(flow.token)
            assert ended.reason == rig.kind.module.REASON_FINISHED

        await asyncio.gather(*map(finish, flows, tasks))


@pytest.mark.deadline(120)
@every_kind
async def test_f21_tls_random_transfers(engine: Engine, kind: Kind) -> None:
    """Many random transfers at once, both directions, and every byte accounted for."""
    async with engine() as rig:
        dice = random.Random(21)
        await asyncio.gather(*(transfer(rig, kind, dice.random()) for _ in range(TRANSFERS)))
        assert rig.engine.statistics().flows_total == TRANSFERS


async def transfer(rig: Rig, kind: Kind, seed: float) -> None:
    """Run one flow with its own shape, sizes, chunks, pauses and order of ends."""
    dice = random.Random(seed)
    heads = dice.randbytes(dice.choice([0, 0, 5, 3000])), dice.randbytes(dice.choice([0, 0, 9]))
    flow = join(
        rig,
        dice.choice(SHAPES),
        buffers={"sndbuf": dice.choice([0, 0, 4096, 20_000]), "rcvbuf": dice.choice([0, 4096])},
        head_a=heads[0],
        head_b=heads[1],
        idle=dice.choice([0.0, 60.0]),
    )
    ends = (flow.visitor, flow.target)
    sizes = [dice.choice([0, 1, 1000, 20_000, 100_000, 400_000]) for _ in ends]
    waits_for_end = dice.choice([-1, -1, 0, 1])  # this end speaks only when the other is done
    heard = [asyncio.Event(), asyncio.Event()]
    digests = [hashlib.sha256(heads[0]), hashlib.sha256(heads[1])]

    async def speak(index: int) -> None:
        own, end = random.Random(seed + index), ends[index]
        if waits_for_end == index:
            await heard[index].wait()
        left = sizes[index]
        while left:
            chunk = own.randbytes(min(left, own.randint(1, 40_000)))
            digests[index].update(chunk)
            await end.say(chunk)
            left -= len(chunk)
            if own.random() < 0.2:
                await asyncio.sleep(own.random() / 200)
        if isinstance(end, TlsEnd) and own.random() < 0.5:
            await end.end_softly()
        else:
            await end.end()

    async def listen(index: int) -> bytes:
        digest = await hear_slowly(ends[index], random.Random(seed - index))
        heard[index].set()
        return digest

    _, _, at_visitor, at_target = await asyncio.gather(speak(0), speak(1), listen(0), listen(1))
    assert at_target == digests[0].digest()
    assert at_visitor == digests[1].digest()
    ended = await rig.ended(flow.token)
    up, down = sizes[0] + len(heads[0]), sizes[1] + len(heads[1])
    assert ended == (flow.token, up, down, kind.module.REASON_FINISHED, 0, 0, 0)
    for end in ends:
        end.sock.close()
