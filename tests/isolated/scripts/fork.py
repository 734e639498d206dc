"""A forked child can do no harm: every method refuses, and the parent's flows go on."""

import asyncio
import os
import warnings

from tests.isolated.scripts.stage import KIND, play
from tests.kit.engine_rig import Rig

from nodepass.errors import EngineClosed

# CPython 3.12+ warns that the process has threads; that is what this script is about.
warnings.filterwarnings("ignore", ".*multi-threaded.*", DeprecationWarning)


def child(rig: Rig, token: int) -> int:
    engine, refused = rig.engine, 0
    calls = [
        (engine.relay, (0, 1)),
        (engine.abort, (token,)),
        (engine.poll, ()),
        (engine.statistics, ()),
        (engine.fileno, ()),
    ]
    for call, arguments in calls:
        try:
            call(*arguments)
        except EngineClosed:
            refused += 1
    assert engine.close() is True
    del engine
    return 0 if refused == len(calls) else 1


async def script() -> None:
    async with Rig(KIND) as rig:
        flow = rig.join()
        await rig.send(flow.visitor, b"before")
        assert await rig.receive(flow.target, 6) == b"before"
        pid = os.fork()
        if pid == 0:
            status = 2  # stays so if the child raises
            try:
                status = child(rig, flow.token)
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        await rig.send(flow.visitor, b"after")
        assert await rig.receive(flow.target, 5) == b"after"
        other = rig.join()
        await rig.send(other.visitor, b"new")
        assert await rig.receive(other.target, 3) == b"new"
        rig.engine.abort(flow.token)
        await rig.ended(flow.token)
        await asyncio.sleep(0)


play(script())
