"""An engine that is dropped with flows open sends its threads home and frees everything."""

import asyncio
import contextlib
import gc
import warnings
from pathlib import Path

from tests.isolated.scripts.stage import KIND, descriptors, play, pour
from tests.kit.engine_rig import Joined, tcp_pair


def engine_threads() -> int:
    found = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += "nodepass" in (task / "comm").read_text()
    return found


async def script() -> None:
    before = descriptors()
    for _ in range(10):
        engine = KIND.module.Engine(2)
        (visitor, a), (target, b) = tcp_pair(), tcp_pair()
        flow = Joined(visitor, target, engine.relay(a.detach(), b.detach()))
        threads = pour(flow)
        await asyncio.sleep(0.02)
        assert engine_threads() == 2
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del engine
            gc.collect()
        assert any(issubclass(warning.category, ResourceWarning) for warning in caught)
        for thread in threads:
            thread.join()
        visitor.close()
        target.close()
    for _ in range(500):
        if not engine_threads() and descriptors() == before:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("threads or descriptors stayed")


play(script())
