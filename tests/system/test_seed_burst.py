"""C11: bursts of visitors for a Go client that takes its time over its own books.

It reads a link's id, stores it a moment later, dials its next link only then, and passes over a
launch whose id it does not know, without a word.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Final

from tests.kit.arena import Arena
from tests.kit.peer import SeedClient
from tests.kit.stream import Stream, connect
from tests.kit.target import body_of, digest_of
from tests.kit.timing import free_port, limit, within

BURSTS: Final = 5
VISITORS: Final = 40
"""Of one burst: more than the links that lie ready."""
STOCK: Final = 16
BOOKKEEPING: Final = 0.02
"""Seconds between the id's coming and its being known."""
BODIES: Final = [body_of(number, 3000 + 700 * number) for number in range(VISITORS)]


class SlowBooks:
    """A seed client, its links and the launches that it did not understand."""

    def __init__(self, peer: SeedClient) -> None:
        self.peer = peer
        self.unknown: list[str] = []
        self.launched = 0
        self._serving: set[asyncio.Task[None]] = set()
        self._tasks = [asyncio.create_task(self._dial()), asyncio.create_task(self._listen())]

    async def _dial(self) -> None:
        while True:
            while len(self.peer.links) >= STOCK:
                await asyncio.sleep(0.001)
            name = await self.peer.dial()
            link = self.peer.links.pop(name)
            await asyncio.sleep(BOOKKEEPING)
            self.peer.links[name] = link

    async def _listen(self) -> None:
        while True:
            found = re.fullmatch(r"//([0-9a-f]{8})#1", text := await self.peer.signal())
            assert found, text
            self.launched += 1
            link = self.peer.links.pop(found[1], None)
            if link is None:
                self.unknown.append(found[1])
                continue
            task = asyncio.create_task(_serve(link))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._serving, return_exceptions=True)


async def _serve(link: Stream) -> None:
    """A target that reads to the end and answers with a digest."""
    _, found = await link.digest()
    await link.write(found.encode())
    link.finish()


async def _visit(port: int, body: bytes) -> str:
    async with await connect(port) as visitor:
        await visitor.write(body)
        visitor.finish()
        return (await visitor.read_all()).decode()


async def test_c11_no_visitor_of_a_burst_is_lost(tmp_path: Path, engine: str, tls: str) -> None:
    env = {"MIN_POOL_CAPACITY": str(STOCK)}
    async with Arena(tmp_path, engine, **env) as arena, within(60):
        await arena.server(port := free_port(), tunnel_port := free_port(), tls)
        async with SeedClient(tunnel_port) as peer:
            await peer.dial()  # the link that makes it a client
            books = SlowBooks(peer)
            try:
                for _ in range(BURSTS):
                    visits = (_visit(port, body) for body in BODIES)
                    async with asyncio.timeout(limit(20)):
                        answers = await asyncio.gather(*visits)
                    assert answers == [digest_of(body) for body in BODIES]
            finally:
                await books.close()
        # A busy machine may stretch a few of its moments; each was launched a second time.
        assert len(books.unknown) < books.launched / 10, books.unknown
