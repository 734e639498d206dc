"""Flows without traffic cost no wake-ups, whatever their idle limits."""

import asyncio

from tests.isolated.scripts.stage import KIND, play
from tests.kit.engine_rig import Rig


async def script() -> None:
    async with Rig(KIND) as rig:
        flows = [rig.join(idle=1000.0 * (step % 2)) for step in range(200)]
        for flow in flows:
            await rig.send(flow.visitor, b"x")
            await rig.receive(flow.target, 1)
        await asyncio.sleep(0.2)
        before = rig.engine.statistics()
        await asyncio.sleep(1.0)
        after = rig.engine.statistics()
        # The wheel looks at far limits once in 51 seconds: two looks may fall in here.
        assert after.wakeups - before.wakeups <= 4
        assert after.turns == before.turns


play(script())
