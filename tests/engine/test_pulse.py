"""Far ends that have gone without a word, and such that merely pause."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator

import pytest
from tests.kit.engine_rig import Joined, Kind, Rig, owned
from tests.kit.silent_path import Street, Unavailable, street

from nodepass.engine.types import UdpCompletion

Open = Callable[..., Rig]

PAUSED = 1 << 20
"""Bytes for a reader that pauses: more than the small buffers of both connections take."""


@pytest.fixture
def road() -> Iterator[Street]:
    """Where paths can be cut."""
    try:
        with street() as place:
            yield place
    except Unavailable as exc:
        pytest.skip(f"no paths to cut here: {exc}")


def join(rig: Rig, road: Street, **buffers: int) -> Joined:
    """A flow whose both sides can be cut off."""
    (visitor, a), (target, b) = road.pair(**buffers), road.pair(**buffers)
    rig.socks += [visitor, target]
    return Joined(visitor, target, rig.hand_over(a, b))


def small(rig: Rig, road: Street) -> Joined:
    return join(rig, road, sndbuf=8192, rcvbuf=8192)


async def test_c25_unanswered_bytes_end_a_relay(engine: Open, road: Street) -> None:
    """Uploads, downloads and ends in flight, whichever side has gone; readers may pause."""
    async with engine(patience=1) as rig:
        up, down, ended, quiet, paused = (
            *(join(rig, road) for _ in range(4)),
            small(rig, road),
        )
        for flow in (up, down, ended, quiet, paused):
            await rig.chat(flow.visitor, flow.target)
        road.cut(up.target, down.visitor, ended.target, quiet.target)
        await rig.send(up.visitor, b"x")
        await rig.send(down.target, b"x")
        ended.visitor.shutdown(socket.SHUT_WR)
        sending = asyncio.ensure_future(rig.send(paused.visitor, bytes(PAUSED)))
        for flow, side in ((up, 2), (down, 1), (ended, 2)):
            completion = await rig.ended(flow.token)
            assert completion.reason == rig.kind.module.REASON_RESET
            assert (completion.side, completion.code) == (side, errno.ETIMEDOUT)
        assert await rig.is_reset(up.visitor)
        assert await rig.is_reset(down.target)
        assert await rig.is_reset(ended.visitor)
        # That took several times the patience; nobody is waiting for the quiet one to answer.
        assert not rig.has_ended(paused.token)
        assert not rig.has_ended(quiet.token)
        assert not sending.done(), "the reader does not pause"
        assert len(await rig.receive(paused.target, PAUSED)) == PAUSED
        await sending
        await rig.chat(paused.visitor, paused.target)


async def test_c04_doubted_ends_that_do_not_answer_end_a_relay(engine: Open, road: Street) -> None:
    """Who has bytes in flight; who is quiet only if it was asked; who lives and pauses never."""
    async with engine(patience=10) as rig:
        talking, silent, asked, alive, later = (join(rig, road) for _ in range(5))
        paused = small(rig, road)
        flows = (talking, silent, asked, alive, later, paused)
        for flow in flows:
            await rig.chat(flow.visitor, flow.target)
        road.cut(talking.target, silent.target, asked.target, later.target)
        await rig.send(talking.visitor, b"x")
        sending = asyncio.ensure_future(rig.send(paused.visitor, bytes(PAUSED)))
        for flow in flows:
            rig.engine.doubt(flow.token, 2, quiet=flow in (asked, alive))
        for flow in (talking, asked):
            completion = await rig.ended(flow.token)
            assert completion.reason == rig.kind.module.REASON_RESET
            assert (completion.side, completion.code) == (2, errno.ETIMEDOUT)
            assert await rig.is_reset(flow.visitor)
        assert not any(rig.has_ended(flow.token) for flow in (silent, alive, later, paused))
        await rig.send(later.visitor, b"x")  # a doubt stays until there is an answer
        assert (await rig.ended(later.token)).code == errno.ETIMEDOUT
        await rig.chat(alive.visitor, alive.target)
        assert not sending.done(), "the reader does not pause"
        assert len(await rig.receive(paused.target, PAUSED)) == PAUSED
        await sending


async def test_c04_an_answer_ends_the_doubt(engine: Open, road: Street) -> None:
    """And keepalive is what it was before."""
    async with engine(patience=10) as rig:
        visitor, a = rig.ends()
        target, b = road.pair()
        rig.socks.append(target)
        with owned(socket.socket(fileno=os.dup(b.fileno()))) as (seen,):
            token = rig.hand_over(a, b)
            await rig.chat(visitor, target)
            rig.engine.doubt(token, 2, quiet=True)
            await rig.until(lambda: keepalive(seen) == 1, "it is asked")
            await rig.until(lambda: keepalive(seen) == 30, "it has answered")
            await rig.chat(visitor, target)


def keepalive(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)


async def test_c04_a_path_that_comes_back_in_time_loses_nothing(
    engine: Open, road: Street
) -> None:
    async with engine(patience=20) as rig:
        flow = join(rig, road)
        await rig.chat(flow.visitor, flow.target)
        road.cut(flow.target)
        await rig.send(flow.visitor, b"late")
        rig.engine.doubt(flow.token, 2, quiet=True)
        road.mend()
        assert await rig.receive(flow.target, 4) == b"late"
        await rig.chat(flow.visitor, flow.target)


async def test_c04_doubted_udp_link(kind: Kind, road: Street) -> None:
    engine = kind.module.Engine(kind.threads, patience=10)
    link, a = road.pair()
    with socket.socket(type=socket.SOCK_DGRAM) as far, owned(link):
        far.bind(("127.0.0.1", 0))
        near = socket.socket(type=socket.SOCK_DGRAM)
        near.connect(far.getsockname())
        near.setblocking(False)
        own = near.getsockname()
        token = engine.udp_dial(a.fileno(), near.fileno())
        a.detach()
        near.detach()
        road.cut(link)
        far.sendto(b"nobody hears this", own)
        engine.doubt(token, 1)
        engine.doubt(token, 2)  # not the link: there is nothing to ask
        ended: list[UdpCompletion] = []
        async with asyncio.timeout(20):
            while not ended:
                await asyncio.sleep(0.05)
                ended = engine.poll()
        assert ended[0].token == token
        assert ended[0].reason == kind.module.REASON_RESET
        assert (ended[0].side, ended[0].code) == (1, errno.ETIMEDOUT)
    engine.close()


async def test_doubting_what_cannot_be_asked(engine: Open) -> None:
    async with engine(pair="unix", patience=1) as rig:
        flow = rig.join()
        for side in (1, 2):
            rig.engine.doubt(flow.token, side, quiet=True)
        rig.engine.doubt(flow.token + 1, 1)
        for side in (0, 3):
            with pytest.raises(ValueError, match="side"):
                rig.engine.doubt(flow.token, side)
        await rig.chat(flow.visitor, flow.target)
        assert not rig.has_ended(flow.token)


@pytest.mark.parametrize("patience", [0.5, 4e6 + 1, float("nan")])
async def test_patience_within_its_range(kind: Kind, patience: float) -> None:
    with pytest.raises(ValueError, match="patience"):
        kind.module.Engine(patience=patience)
