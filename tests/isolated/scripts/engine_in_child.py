"""A forked child may have an engine of its own, and drop it, whatever its parent had loaded."""

import asyncio
import os
import warnings

from tests.isolated.scripts.stage import KIND, play
from tests.kit.engine_rig import Rig

# CPython 3.12+ warns that the process has threads; that is what this script is about.
warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)


async def carry() -> None:
    asyncio.get_running_loop().slow_callback_duration = 60
    async with Rig(KIND) as rig:
        flow = rig.join()
        await rig.send(flow.visitor, b"hello")
        assert await rig.receive(flow.target, 5) == b"hello"
        rig.engine.abort(flow.token)
        await rig.ended(flow.token)


def in_child() -> int:
    pid = os.fork()
    if pid == 0:
        status = 2  # stays so if the child raises
        try:
            asyncio.run(carry())
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


asyncio.run(carry())
assert in_child() == 0


async def script() -> None:
    await asyncio.sleep(0)


play(script())
