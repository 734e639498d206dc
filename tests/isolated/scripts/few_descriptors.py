"""With no descriptor left for pipes, bulk goes on by copying."""

import asyncio
import os
import resource
import time

from tests.isolated.scripts.stage import KIND, descriptors, play, pour
from tests.kit.engine_rig import Rig


async def script() -> None:
    async with Rig(KIND) as rig:
        flow = rig.join()
        limit = max(map(int, descriptors())) + 1
        # Every number below the limit is taken, so that pipe2() gets EMFILE.
        kept = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        try:
            while True:
                kept.append(os.dup(0))
        except OSError:
            pass
        pour(flow)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if rig.engine.statistics().splice_promotions:
                break
            await asyncio.sleep(0.01)
        before = rig.engine.statistics()
        assert before.splice_promotions >= 1
        await asyncio.sleep(0.2)
        after = rig.engine.statistics()
        assert after.bytes_up > before.bytes_up
        assert (after.pipes_in_use, after.pipes_pooled, after.fds_open) == (0, 0, 2)
        for fd in kept:
            os.close(fd)
        rig.engine.abort(flow.token)
        await rig.ended(flow.token)


play(script())
