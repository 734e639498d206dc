"""Room for 65536 flows costs little before it is used."""

import resource
from pathlib import Path

from tests.isolated.scripts.stage import KIND, play
from tests.kit.engine_rig import Rig


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def script() -> None:
    before = resident()
    async with Rig(KIND, flows=65536) as rig:
        flow = rig.join()
        await rig.send(flow.visitor, bytes(100_000))
        await rig.receive(flow.target, 100_000)
        assert resident() - before < 4 << 20


play(script())
