"""F21: many random transfers at once, both directions, and every byte accounted for."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import Callable

import pytest
from tests.kit.engine_rig import Kind, Rig

Engine = Callable[..., Rig]
TRANSFERS = 200


@pytest.mark.deadline(120)
@pytest.mark.parametrize("kind", ["native", "native-copy", "native-2", "twin"], indirect=True)
async def test_random_transfers(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        dice = random.Random(20)
        await asyncio.gather(*(transfer(rig, kind, dice.random()) for _ in range(TRANSFERS)))
        statistics = rig.engine.statistics()
        assert statistics.flows_total == TRANSFERS


async def transfer(rig: Rig, kind: Kind, seed: float) -> None:
    """Run one flow with its own sizes, chunks, pauses and order of ends."""
    dice = random.Random(seed)
    sndbuf = dice.choice([0, 0, 4096, 20_000])
    heads = dice.randbytes(dice.choice([0, 0, 5, 3000])), dice.randbytes(dice.choice([0, 0, 9]))
    flow = rig.join(
        buffers={"sndbuf": sndbuf, "rcvbuf": dice.choice([0, 4096])},
        head_a=heads[0],
        head_b=heads[1],
        idle=dice.choice([0.0, 60.0]),
    )
    ends = (flow.visitor, flow.target)
    sizes = [dice.choice([0, 1, 1000, 50_000, 300_000, 1_500_000]) for _ in ends]
    waits_for_end = dice.choice([-1, -1, 0, 1])  # this end speaks only when the other is done
    heard = [asyncio.Event(), asyncio.Event()]
    digests = [hashlib.sha256(heads[0]), hashlib.sha256(heads[1])]

    async def speak(index: int) -> None:
        own = random.Random(seed + index)
        if waits_for_end == index:
            await heard[index].wait()
        left = sizes[index]
        while left:
            chunk = own.randbytes(min(left, own.randint(1, 40_000)))
            digests[index].update(chunk)
            await rig.send(ends[index], chunk)
            left -= len(chunk)
            if own.random() < 0.2:
                await asyncio.sleep(own.random() / 200)
        ends[index].shutdown(socket.SHUT_WR)

    async def listen(index: int) -> bytes:
        own = random.Random(seed - index)
        seen = hashlib.sha256()
        async with asyncio.timeout(100):
            while part := await rig.loop.sock_recv(ends[index], own.randint(1, 60_000)):
                seen.update(part)
                if own.random() < 0.1:
                    await asyncio.sleep(own.random() / 200)
        heard[index].set()
        return seen.digest()

    _, _, at_visitor, at_target = await asyncio.gather(speak(0), speak(1), listen(0), listen(1))
    assert at_target == digests[0].digest()
    assert at_visitor == digests[1].digest()
    ended = await rig.ended(flow.token)
    up, down = sizes[0] + len(heads[0]), sizes[1] + len(heads[1])
    assert ended == (flow.token, up, down, kind.module.REASON_FINISHED, 0, 0, 0)
    for end in ends:
        end.close()
