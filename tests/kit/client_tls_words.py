"""A client that speaks TLS, and what it has to carry."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from tests.kit.authority import Issued
from tests.kit.client_desk import (
    Desk,
    running,
    take_links,
)
from tests.kit.peer import NativeServer
from tests.kit.secure import (
    TlsStream,
)
from tests.kit.stream import Stream
from tests.kit.timing import within


@contextlib.asynccontextmanager
async def paired(
    files: Issued,
    query: str = "log=none",
    *,
    tls: int = 1,
    password: str = "",
    **settings: object,
) -> AsyncIterator[tuple[NativeServer, Desk, dict[int, Stream]]]:
    """Run a client that has two links ready at a native server with TLS."""
    async with (
        NativeServer(tls=tls, files=files, password=password) as server,
        running(server.listener.port, query, password=password, **settings) as desk,  # type: ignore[arg-type]
    ):
        async with within(10):
            await server.welcome()
        yield server, desk, await take_links(server, 2)


async def carries(link: Stream, target: Stream, size: int = 100_000) -> None:
    """Send bytes both ways between a link and the target."""
    up, down = os.urandom(size), os.urandom(size)
    async with within(20):
        writing = asyncio.gather(link.write(up), target.write(down))
        assert await target.read_exactly(size) == up
        assert await link.read_exactly(size) == down
        await writing


def as_tls(stream: Stream) -> TlsStream:
    assert isinstance(stream, TlsStream)
    return stream
