"""Last words: what a side has said before its reset still reaches the other one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from tests.kit.engine_rig import Rig, reset_on_close

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


async def test_bytes_before_a_reset_arrive_during_an_upload(engine: Callable[..., Rig]) -> None:
    """A server that answers 413 and closes, while the visitor goes on sending."""
    words = b"HTTP/1.1 413 Too Large\r\n\r\n" + b"z" * 5000
    async with engine() as rig:
        for _ in range(ROUNDS // 3):
            flow = rig.join()
            uploading = asyncio.ensure_future(rig.send(flow.visitor, bytes(8_000_000)))
            assert await rig.receive(flow.target, 100) == bytes(100)
            await rig.send(flow.target, words)
            reset_on_close(flow.target)
            flow.target.close()
            assert await rig.receive(flow.visitor, len(words)) == words
            ended = await rig.ended(flow.token)
            assert (ended.down, ended.reason) == (len(words), rig.kind.module.REASON_RESET)
            uploading.cancel()
            await asyncio.wait({uploading})
            with contextlib.suppress(OSError, asyncio.CancelledError):
                uploading.result()
