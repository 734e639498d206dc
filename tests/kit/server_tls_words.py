"""A server that speaks TLS, and what it has to carry."""

from __future__ import annotations

import asyncio
import os

from tests.kit.authority import Issued
from tests.kit.stream import Stream
from tests.kit.timing import within

PASSWORD = "correct-horse"


NONCE = "00" * 16


def files_query(issued: Issued, log: str = "none") -> str:
    return f"log={log}&tls=2&crt={issued.crt}&key={issued.key}"


async def carries(desk_visit: Stream, link: Stream, size: int = 100_000) -> None:
    """Send bytes both ways between a visitor and its link."""
    up, down = os.urandom(size), os.urandom(size)
    async with within(20):
        writing = asyncio.gather(desk_visit.write(up), link.write(down))
        assert await link.read_exactly(size) == up
        assert await desk_visit.read_exactly(size) == down
        await writing
