"""The interpreter ends while flows are in full swing and nobody closed the engine."""

from __future__ import annotations

import asyncio
import atexit

kept: list[Joined] = []


@atexit.register
def close_kept() -> None:
    # Registered before the engine's own net, hence run after it.
    for flow in kept:
        flow.visitor.close()
        flow.target.close()


from tests.isolated.scripts.stage import KIND, play, pour  # noqa: E402
from tests.kit.engine_rig import Joined, tcp_pair  # noqa: E402

from nodepass.engine.types import FlowOptions  # noqa: E402

engine = None


async def script() -> None:
    global engine  # noqa: PLW0603 -- it must outlive the loop
    engine = KIND.module.Engine(2)
    for _ in range(4):
        (visitor, a), (target, b) = tcp_pair(), tcp_pair()
        flow = Joined(
            visitor, target, engine.relay(a.detach(), b.detach(), options=FlowOptions(idle=30.0))
        )
        kept.append(flow)
        pour(flow)
    await asyncio.sleep(0.2)


play(script())
