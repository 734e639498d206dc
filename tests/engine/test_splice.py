"""Bulk mode of the native engine: when it begins, what it holds, what it gives back."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import threading
from collections.abc import Callable

import pytest
from tests.kit.engine_rig import Joined, Kind, Rig

Engine = Callable[..., Rig]
only_splice = pytest.mark.parametrize("kind", ["native"], indirect=True)
BULK = 48 << 20
BLOCK = os.urandom(1 << 20)


def stream(flow: Joined, size: int, digest: list[bytes]) -> list[threading.Thread]:
    """Start two threads that push `size` bytes through a flow as fast as they can."""
    flow.visitor.setblocking(True)
    flow.target.setblocking(True)

    def push() -> None:
        for _ in range(size // len(BLOCK)):
            flow.visitor.sendall(BLOCK)

    def pull() -> None:
        left, seen, room = size, hashlib.sha256(), bytearray(1 << 20)
        while left:
            got = flow.target.recv_into(room, min(left, len(room)))
            if not got:
                break
            seen.update(memoryview(room)[:got])
            left -= got
        digest.append(seen.digest())

    threads = [threading.Thread(target=push), threading.Thread(target=pull)]
    for thread in threads:
        thread.start()
    return threads


async def bulk(flow: Joined, size: int = BULK) -> None:
    """Stream and compare what arrived."""
    digest: list[bytes] = []
    for thread in stream(flow, size, digest):
        while thread.is_alive():
            await asyncio.sleep(0.002)
        thread.join()
    wanted = hashlib.sha256()
    for _ in range(size // len(BLOCK)):
        wanted.update(BLOCK)
    assert digest == [wanted.digest()]
    flow.visitor.setblocking(False)
    flow.target.setblocking(False)


@only_splice
async def test_bulk_is_promoted_and_returns_its_pipe(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        flow = rig.join()
        total = 0
        while not rig.engine.statistics().splice_promotions:
            assert total < 20 * BULK, "never promoted"
            await bulk(flow)
            total += BULK
        # Quiet now, though still open: the pipe is back in the pool.
        await rig.until(lambda: not rig.engine.statistics().pipes_in_use, "pipe given back")
        statistics = rig.engine.statistics()
        assert statistics.pipes_pooled >= 1
        assert statistics.fds_open == 2 + 2 * statistics.pipes_pooled
        # And a chat on the same flow works in either mode.
        for word in (b"still", b"here"):
            await rig.send(flow.visitor, word)
            assert await rig.receive(flow.target, len(word)) == word
        flow.visitor.shutdown(socket.SHUT_WR)
        flow.target.shutdown(socket.SHUT_WR)
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.up) == (kind.module.REASON_FINISHED, total + 9)


@only_splice
async def test_pipes_are_shared_by_turns(engine: Engine) -> None:
    async with engine() as rig:
        for _ in range(4):
            await bulk(rig.join(), 24 << 20)
        assert rig.engine.statistics().pipes_pooled <= 2


@pytest.mark.parametrize("kind", ["native-copy", "twin"], indirect=True)
async def test_no_promotion_when_switched_off(engine: Engine) -> None:
    async with engine() as rig:
        await bulk(rig.join())
        statistics = rig.engine.statistics()
        assert (statistics.splice_promotions, statistics.pipes_pooled) == (0, 0)


@only_splice
async def test_dirty_pipes_reach_nobody(engine: Engine) -> None:
    """A flow dies with bytes in its pipe; the next ones see none of them."""
    async with engine() as rig:
        dirty = 0
        # A flow whose reads have been small for a while copies, and is stuck without a pipe.
        for _ in range(20):
            flow = rig.join()
            await bulk(flow)
            pushing = threading.Thread(target=push_until_cut, args=(flow.visitor,))
            flow.visitor.setblocking(True)
            pushing.start()
            await stuck(rig)
            dirty += rig.engine.statistics().pipes_in_use
            rig.engine.abort(flow.token)
            await rig.ended(flow.token)
            while pushing.is_alive():
                await asyncio.sleep(0.002)
            pushing.join()
            assert rig.engine.statistics().pipes_in_use == 0
            await bulk(rig.join(), 24 << 20)
            if dirty == 3:
                return
        pytest.fail("pipes were not used often enough")


async def stuck(rig: Rig) -> None:
    """Wait until bytes are parked and stay where they are."""
    seen: list[int] = []

    def is_stuck() -> bool:
        seen.append(rig.engine.statistics().parked_bytes)
        return len(seen) >= 20 and seen[-1] > 0 and len(set(seen[-20:])) == 1

    await rig.until(is_stuck, "bytes parked for good")


def push_until_cut(sock: socket.socket) -> None:
    try:
        while True:
            sock.sendall(BLOCK)
    except OSError:
        return


@only_splice
async def test_end_right_behind_bulk(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        flow = rig.join()
        digest: list[bytes] = []
        threads = stream(flow, BULK, digest)
        while threads[0].is_alive():
            await asyncio.sleep(0.002)
        flow.visitor.shutdown(socket.SHUT_WR)
        while threads[1].is_alive():
            await asyncio.sleep(0.002)
        for thread in threads:
            thread.join()
        flow.target.setblocking(False)
        assert await rig.drain(flow.target) == b""
        flow.target.close()
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.up) == (kind.module.REASON_FINISHED, BULK)
        wanted = hashlib.sha256()
        for _ in range(BULK // len(BLOCK)):
            wanted.update(BLOCK)
        assert digest == [wanted.digest()]
