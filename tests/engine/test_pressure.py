"""Slow receivers, many of them, and the fast ones beside them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import threading
from collections.abc import Callable

import pytest
from tests.kit.engine_rig import Joined, Kind, Rig, resident_bytes, tcp_pair

Engine = Callable[..., Rig]
every_kind = pytest.mark.parametrize(
    "kind", ["native", "native-copy", "native-2", "twin"], indirect=True
)

PARKED_PER_WAY = 1 << 20
"""Bytes one direction may hold back: a 512 KiB buffer, or a 1 MiB pipe."""

SMALL = {"sndbuf": 4096, "rcvbuf": 4096}


@every_kind
@pytest.mark.parametrize("pair", ["tcp", "unix"])
async def test_slow_reader_gets_everything(engine: Engine, pair: str) -> None:
    blob = os.urandom(600_000)
    async with engine(pair=pair) as rig:
        flow = rig.join(buffers=SMALL)
        sending = asyncio.create_task(rig.send(flow.visitor, blob))
        sending.add_done_callback(lambda _: flow.visitor.shutdown(socket.SHUT_WR))
        digest = hashlib.sha256()
        dice = random.Random(1)
        async with asyncio.timeout(60):
            while part := await rig.loop.sock_recv(flow.target, dice.randint(1, 20_000)):
                digest.update(part)
                if dice.random() < 0.1:
                    await asyncio.sleep(0.001)
        await sending
        assert digest.digest() == hashlib.sha256(blob).digest()


@every_kind
async def test_hundred_visitors_that_never_read(engine: Engine, many_fds: None) -> None:
    """F27: memory stays bounded, and another visitor is served as if alone."""
    async with engine() as rig:
        lone = rig.join()
        before = resident_bytes()
        flows = [rig.join(buffers={"rcvbuf": 16_384}) for _ in range(100)]
        chunk = bytes(1 << 20)

        def is_full() -> bool:
            for flow in flows:
                fill(flow.target, chunk)
            return bool(rig.engine.statistics().buffers_in_use >= 100)

        await rig.until(is_full, "bytes parked for every visitor")
        await rig.send(lone.visitor, b"hello")
        assert await rig.receive(lone.target, 5) == b"hello"
        statistics = rig.engine.statistics()
        assert 0 < statistics.parked_bytes <= 100 * PARKED_PER_WAY
        if before:
            assert resident_bytes() - before < 100 * PARKED_PER_WAY
        for flow in flows:
            rig.engine.abort(flow.token)
        for flow in flows:
            await rig.ended(flow.token)
        assert rig.engine.statistics().parked_bytes == 0


def fill(sock: socket.socket, chunk: bytes) -> None:
    """Send until the kernel takes no more."""
    try:
        while True:
            sock.send(chunk)
    except BlockingIOError:
        return


async def test_more_slow_receivers_than_buffers(
    engine: Engine, kind: Kind, many_fds: None
) -> None:
    """With the pool dry nobody waits for anybody, and no byte goes missing."""
    count = 300
    blob = os.urandom(120_000)
    async with engine(pair="unix") as rig:
        flows = [rig.join(buffers=SMALL) for _ in range(count)]
        tasks = [asyncio.create_task(rig.send(flow.visitor, blob)) for flow in flows]
        await rig.until(
            lambda: rig.engine.statistics().buffers_in_use >= 127, "buffers handed out"
        )
        await asyncio.sleep(0.05)
        if kind.is_native:
            assert rig.engine.statistics().buffers_in_use <= 128
        quick = rig.join()
        for size in (1, 1000, len(blob)):
            sending = asyncio.create_task(rig.send(quick.visitor, blob[:size]))
            assert await rig.receive(quick.target, size) == blob[:size]
            await sending

        async def finish(flow: Joined, task: asyncio.Task[None]) -> None:
            assert await rig.receive(flow.target, len(blob)) == blob
            await task
            flow.visitor.shutdown(socket.SHUT_WR)
            flow.target.shutdown(socket.SHUT_WR)
            assert (await rig.ended(flow.token)).reason == kind.module.REASON_FINISHED

        await asyncio.gather(*map(finish, flows, tasks))


@pytest.mark.parametrize("kind", ["native", "native-copy"], indirect=True)
async def test_fast_flows_do_not_starve_slow_ones(engine: Engine, kind: Kind) -> None:
    """Two streams without end on the one worker; a chat beside them stays a chat."""
    async with engine(pair="unix") as rig:
        stop = threading.Event()
        threads = []
        for flow in [rig.join() for _ in range(2)]:
            flow.visitor.setblocking(True)
            flow.target.setblocking(True)
            threads += [
                threading.Thread(target=pour, args=(flow.visitor, stop)),
                threading.Thread(target=swallow, args=(flow.target,)),
            ]
        for thread in threads:
            thread.start()
        chats = [rig.join() for _ in range(20)]
        for turn in range(10):
            for chat in chats:
                await rig.send(chat.visitor, b"%d" % turn)
            for chat in chats:
                assert await rig.receive(chat.target, 1) == b"%d" % turn
        stop.set()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        statistics = rig.engine.statistics()
        # One direction moves at most its budget in a turn, plus the read that crossed it.
        assert statistics.bytes_up <= statistics.turns * 2 * (1 << 20)
        await rig.loop.shutdown_default_executor()


def pour(sock: socket.socket, stop: threading.Event) -> None:
    chunk = bytes(1 << 20)
    while not stop.is_set():
        sock.sendall(chunk)
    sock.shutdown(socket.SHUT_WR)


def swallow(sock: socket.socket) -> None:
    room = bytearray(1 << 20)
    while sock.recv_into(room):
        pass
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("kind", ["native", "native-copy"], indirect=True)
async def test_flow_that_feeds_itself_does_not_own_the_worker(engine: Engine, kind: Kind) -> None:
    """Both ends of one connection joined: bytes go round for ever, only the budget stops it."""
    async with engine() as rig:
        chat = rig.join()
        one, other = tcp_pair()
        token = rig.hand_over(one, other, head_a=bytes(1 << 20))
        until = rig.loop.time() + 0.5
        while rig.loop.time() < until:
            await rig.send(chat.visitor, b"?")
            assert await rig.receive(chat.target, 1) == b"?"
        lap = rig.engine.live(token)
        assert lap is not None
        assert sum(lap) > 4 << 20
        statistics = rig.engine.statistics()
        # The budget, and the read that crossed it.
        assert sum(lap) <= statistics.turns * 2 * (1 << 20)
        rig.engine.abort(token)
        assert (await rig.ended(token)).reason == kind.module.REASON_ABORTED
