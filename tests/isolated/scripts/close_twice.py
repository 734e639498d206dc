"""close() is idempotent, also from atexit, and its completions can be polled once."""

import atexit

from tests.isolated.scripts.stage import KIND, play
from tests.kit.engine_rig import tcp_pair

from nodepass.engine.types import FlowOptions


async def script() -> None:
    engine = KIND.module.Engine(2)
    atexit.register(engine.close)
    ends = [tcp_pair() for _ in range(6)]
    asked = FlowOptions(idle=9.0)
    tokens = {
        engine.relay(ends[i][1].detach(), ends[i + 1][1].detach(), options=asked)
        for i in (0, 2, 4)
    }
    assert engine.close() is True
    assert engine.close(0.0) is True
    assert {ended.token for ended in engine.poll()} == tokens
    assert engine.poll() == []
    for outer, _ in ends:
        outer.close()


play(script())
