"""close() in the middle of heavy traffic joins in time and leaves nothing open."""

import asyncio

from tests.isolated.scripts.stage import KIND, descriptors, play, pour, shut
from tests.kit.engine_rig import Joined, tcp_pair


async def script() -> None:
    for _ in range(5):
        before = descriptors()
        engine = KIND.module.Engine(2)
        flows = []
        for _ in range(4):
            (visitor, a), (target, b) = tcp_pair(), tcp_pair()
            flows.append(Joined(visitor, target, engine.relay(a.detach(), b.detach())))
        threads = [thread for flow in flows for thread in pour(flow)]
        await asyncio.sleep(0.1)
        assert engine.close() is True
        for thread in threads:
            thread.join()
        for flow in flows:
            shut(flow.visitor, flow.target)
        assert len(engine.poll()) == 4
        assert engine.statistics().fds_open == 0
        assert descriptors() == before


play(script())
