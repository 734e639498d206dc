"""UDP by the thousand: nothing is left behind, scrambled, or held up by somebody else."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import struct
from pathlib import Path
from typing import Final

import pytest
from tests.kit.datagram import (
    STEADY,
    Address,
    UdpArena,
    UdpTarget,
    Visitor,
    at_rest,
    back_to,
)
from tests.kit.peer import NativeClient
from tests.kit.stream import Stream
from tests.kit.timing import free_port, until, within

DATAGRAMS: Final = 10_000
"""Faults.md, F7."""

VISITORS: Final = 200
"""At once: faults.md, F21."""

ROUNDS: Final = 30
"""Datagrams of each of them, one way."""

BURST: Final = 4
"""Datagrams that one of them has under way, at most."""

HEAD: Final = struct.Struct("!HI")
"""Who sends, and its how many-th datagram."""

CROWD: Final = 3000

GROWTH: Final = 8 * 1024 * 1024
"""Bytes that a process may be larger after a crowd than after the one before."""


few = pytest.mark.parametrize(
    ("engine", "tls"),
    [("native", ""), ("native", "?tls=1"), ("python", "?tls=1")],
    ids=["native-plain", "native-tls", "python-tls"],
)
"""Not every engine with and without TLS: the engines' own tests have all of that."""


# --- F7: descriptors --------------------------------------------------------------------


async def test_f07_10000_datagrams_leave_no_descriptor(tmp_path: Path, engine: str) -> None:
    async with UdpArena(tmp_path, engine, **STEADY) as arena, within(45):
        tunnel = await arena.tunnel((target := arena.udp_target()).port)
        await arena.visitor(tunnel.port).ask(b"first")
        before = await at_rest(tunnel)
        visitors = [arena.visitor(tunnel.port) for _ in range(250)]
        each = DATAGRAMS // len(visitors)

        async def talk(visitor: Visitor) -> None:
            for number in range(each):
                body = b"%d" % number + bytes(number)
                assert await visitor.ask(body, 10) == body

        async with asyncio.TaskGroup() as group:
            for visitor in visitors:
                group.create_task(talk(visitor))
        assert target.received == 1 + DATAGRAMS
        assert len(target.sources) == 1 + len(visitors)
        await back_to(tunnel, before)
        assert await visitors[0].ask(b"again") == b"again"


# --- F21: random exchanges --------------------------------------------------------------


def _body(visitor: int, number: int, *, is_up: bool) -> bytes:
    """Bytes that both ends can make for themselves; their number is part of the secret."""
    luck = random.Random((visitor << 32 | number) ^ (0 if is_up else 1 << 62))
    size = luck.choice((0, 1, 100, 1194, 1394, 4000, 8186))
    return HEAD.pack(visitor, number) + luck.randbytes(luck.randint(0, size))


class _Ledger:
    """What the target has heard: an answer of its own for each, and a digest at the end."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.digests = [hashlib.sha256() for _ in range(VISITORS)]
        self._next = [0] * VISITORS

    def answer(self, target: UdpTarget, data: bytes, address: Address) -> None:
        visitor, number = HEAD.unpack_from(data)
        if number != self._next[visitor]:
            self.failures.append(f"{visitor}: {number} instead of {self._next[visitor]}")
        self._next[visitor] = number + 1
        self.digests[visitor].update(data)
        target.send(_body(visitor, number, is_up=False), address)


async def _exchange(
    visitor: Visitor, own: int, window: asyncio.Semaphore, ledger: _Ledger
) -> None:
    """Send some at a time, and hear as many answers."""
    luck = random.Random(own)
    sent, heard, wanted = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    number = 0
    while number < ROUNDS:
        some = range(number, min(ROUNDS, number + luck.randint(1, BURST)))
        async with window:
            for number in some:
                body = _body(own, number, is_up=True)
                sent.update(body)
                visitor.send(body)
            for number in some:
                heard.update(await visitor.read(20))
                wanted.update(_body(own, number, is_up=False))
        number = some.stop
    if heard.digest() != wanted.digest():
        ledger.failures.append(f"{own}: scrambled on the way down")
    if sent.digest() != ledger.digests[own].digest():
        ledger.failures.append(f"{own}: scrambled on the way up")


@few
async def test_f21_200_random_exchanges_at_once(tmp_path: Path, engine: str, tls: str) -> None:
    """As many under way as every socket on their way can hold: loopback loses none then."""
    async with UdpArena(tmp_path, engine, **STEADY) as arena, within(48):
        ledger = _Ledger()
        target = arena.udp_target(ledger.answer)
        tunnel = await arena.tunnel(target.port, server=tls)
        visitors = [arena.visitor(tunnel.port) for _ in range(VISITORS)]
        window = asyncio.Semaphore(max(1, target.room // BURST))
        async with asyncio.TaskGroup() as group:
            for own, visitor in enumerate(visitors):
                group.create_task(_exchange(visitor, own, window, ledger))
        assert not ledger.failures, "\n".join(ledger.failures)
        assert target.received == VISITORS * ROUNDS
        assert not any(visitor.heard for visitor in visitors), "more than was sent"
        assert "dropped" not in tunnel.server.log + tunnel.client.log


# --- F9: nobody waits for somebody else -------------------------------------------------


async def _frame(link: Stream) -> bytes:
    """Read one datagram as docs/protocol.md has it."""
    size = int.from_bytes(await link.read_exactly(2), "big")
    return await link.read_exactly(size) if size else b""


async def _launched(client: NativeClient, links: dict[int, Stream]) -> Stream:
    found = re.match(r"udp://(\d+)\?", text := await client.signal())
    assert found, text
    return links.pop(int(found[1]))


async def _answer(link: Stream, visitor: Visitor, word: bytes) -> None:
    visitor.send(word)
    assert await _frame(link) == word
    await link.write(len(word).to_bytes(2, "big") + word)
    async with within(2):
        assert await visitor.read() == word


@few
async def test_f09_visitor_without_a_link_holds_up_nobody(
    tmp_path: Path, engine: str, tls: str
) -> None:
    """What he says waits for his link, the newest 64 KiB of it; others have theirs."""
    async with UdpArena(tmp_path, engine) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port(), tls)
        async with NativeClient(tunnel_port) as client:
            links = {1: await client.link(1)}
            quick, stuck = arena.visitor(port), arena.visitor(port)
            quick.send(b"me first")
            link = await _launched(client, links)
            assert await _frame(link) == b"me first"
            for number in range(100):
                stuck.send(b"%04d" % number + bytes(996))
                if not number % 10:
                    await _answer(link, quick, b"round %d" % number)
            links[2] = await client.link(2)
            late = await _launched(client, links)
            kept = range(100 - 65_536 // 1002, 100)
            assert [int((await _frame(late))[:4]) for _ in kept] == list(kept)
            await _answer(late, stuck, b"served at last")
            await _answer(link, quick, b"still served")


@few
async def test_f09_link_that_is_not_read_holds_up_nobody(
    tmp_path: Path, engine: str, tls: str
) -> None:
    """It takes what fits into it; the rest is dropped, told, and not kept in memory."""
    async with UdpArena(tmp_path, engine) as arena, within(30):
        server = await arena.server(port := free_port(), tunnel_port := free_port(), tls)
        async with NativeClient(tunnel_port) as client:
            links = {1: await client.link(1)}
            flood, quick = arena.visitor(port), arena.visitor(port)
            flood.send(b"x")
            await _launched(client, links)  # and never look at it
            links[2] = await client.link(2)
            quick.send(b"y")
            link = await _launched(client, links)
            assert await _frame(link) == b"y"
            before = server.rss()
            for number in range(4000):  # 32 MB, several times what the kernel holds
                flood.send(bytes(8000))
                if not number % 100:
                    await _answer(link, quick, b"round %d" % number)
            assert server.rss() - before < 8_000_000
        await server.stop()
        assert server.count("WARN  datagrams dropped: they come faster than the tunnel") >= 1


# --- a crowd ----------------------------------------------------------------------------


async def test_crowd_of_3000_addresses_comes_and_goes(tmp_path: Path) -> None:
    """More than are served at once; each is answered, and then nothing of them is left."""
    env = STEADY | {"SEMAPHORE_LIMIT": "600", "DIAL_TIMEOUT": "30s"}
    async with UdpArena(tmp_path, **env) as arena, within(48):
        tunnel = await arena.tunnel((target := arena.udp_target()).port)

        async def crowd(first: int, count: int) -> tuple[int, int]:
            window = asyncio.Semaphore(400)
            async with asyncio.TaskGroup() as group:
                for number in range(first, first + count):
                    source = f"127.{1 + number % 200}.{number // 200}.{1 + number % 7}"
                    group.create_task(_come_and_go(tunnel.port, source, window))
            await until(lambda: tunnel.client.fds("socket:") < 40, 20, "sessions to end")
            return tunnel.server.rss(), tunnel.client.rss()

        assert await arena.visitor(tunnel.port).ask(b"first") == b"first"
        before = await at_rest(tunnel)
        warm = await crowd(0, CROWD // 3)
        after = await crowd(CROWD // 3, CROWD)
        await back_to(tunnel, before)
        grown = [new - old for new, old in zip(after, warm, strict=True)]
        assert max(grown) < GROWTH, f"bytes grown: {grown}"
        assert target.received == 1 + CROWD // 3 + CROWD


async def _come_and_go(port: int, source: str, window: asyncio.Semaphore) -> None:
    async with window:
        visitor = Visitor(port, source=source)
        try:
            word = source.encode()
            assert await visitor.ask(word, 20) == word
        finally:
            visitor.close()
