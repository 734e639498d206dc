"""Thousands of flows of every kind of end leave neither memory nor descriptors behind."""

import asyncio
import random
import resource
import socket
from pathlib import Path

from tests.isolated.scripts.stage import KIND, descriptors, play
from tests.kit.engine_rig import Rig, reset_on_close

ROUND = 60
ROUNDS = 25


def resident() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * resource.getpagesize()


async def one(rig: Rig, dice: random.Random) -> None:
    flow = rig.join(head_a=bytes(dice.randint(0, 5000)), idle=dice.choice([0.0, 30.0]))
    await rig.send(flow.visitor, bytes(dice.randint(1, 30_000)))
    end = dice.randint(0, 3)
    if end == 0:
        rig.engine.abort(flow.token)
    elif end == 1:
        reset_on_close(flow.visitor)
    elif end == 2:
        flow.visitor.shutdown(socket.SHUT_WR)
        await rig.drain(flow.target)
    flow.visitor.close()
    flow.target.close()
    await rig.ended(flow.token)


async def script() -> None:
    dice = random.Random(3)
    async with Rig(KIND) as rig:
        warm = 0
        for number in range(ROUNDS):
            await asyncio.gather(*(one(rig, dice) for _ in range(ROUND)))
            if number == ROUNDS // 3:
                warm = resident()
        statistics = rig.engine.statistics()
        assert statistics.flows_total == ROUND * ROUNDS
        assert statistics.flows_open == 0
        assert statistics.fds_open == 2 * statistics.pipes_pooled
        # Parked buffers of one round may stay; a leak of 16 KiB per flow would not fit.
        assert resident() - warm < 12 << 20
    assert len(descriptors()) < 20


play(script())
