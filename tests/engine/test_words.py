"""Last words: what a side has said before its reset still reaches the other one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.engine.rig import Rig, reset_on_close

ROUNDS = 60
"""The reset comes on the heels of the bytes; once in some rounds both meet in one event."""


@pytest.mark.parametrize("size", [1, 1000, 60_000])
async def test_bytes_before_a_reset_arrive(engine: Callable[..., Rig], size: int) -> None:
    words = bytes(range(256)) * (size // 256 + 1)
    words = words[:size]
    async with engine() as rig:
        for _ in range(ROUNDS):
            flow = rig.join()
            await rig.send(flow.visitor, b"request")
            assert await rig.receive(flow.target, 7) == b"request"
            await rig.send(flow.target, words)
            reset_on_close(flow.target)
            flow.target.close()
            assert await rig.receive(flow.visitor, size) == words
            ended = await rig.ended(flow.token)
            assert (ended.down, ended.side) == (size, 2)
