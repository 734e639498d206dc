"""A running server, and what a test does to it by hand."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

from tests.kit.peer import NativeClient, SeedClient
from tests.kit.stream import Stream, connect
from tests.kit.timing import free_port, until, within

from nodepass.config.environment import Settings
from nodepass.config.url import Config
from nodepass.engine.relays import Relays
from nodepass.observe.stats import TunnelStatistics
from nodepass.server.server import Server


class Desk:
    """A running server and the connections that a test has made to it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.tunnel = server.config.tunnel.port
        self.target = server.config.target.port
        self._stack = contextlib.AsyncExitStack()

    def knock(self, port: int, source: str = "") -> Stream:
        """Connect without a turn of the loop, so that the server has not answered yet."""
        sock = socket.create_connection(
            ("127.0.0.1", port), 5, source_address=(source, 0) if source else None
        )
        stream = Stream(sock)
        self._stack.callback(stream.close)
        return stream

    async def visit(self) -> Stream:
        return self.knock(self.target)

    async def call(self, source: str = "") -> Stream:
        """Connect to the tunnel port and read the greeting."""
        stream = await self._stack.enter_async_context(await connect(self.tunnel, source=source))
        assert (await stream.read_line()).startswith(b"//")
        return stream

    async def client(self, name: str = "by-hand", *, password: str = "") -> NativeClient:
        client = NativeClient(self.tunnel, name, password=password)
        return await self._stack.enter_async_context(client)

    async def guest(self, *, password: str = "") -> NativeClient:
        """Return a client that has not said hello yet."""
        client = NativeClient(self.tunnel, password=password)
        self._stack.push_async_exit(client.__aexit__)
        return client

    async def seed(self, source: str = "127.0.0.1", *, ca: str | None = None) -> SeedClient:
        return await self._stack.enter_async_context(SeedClient(self.tunnel, source, ca=ca))

    async def links(self, client: NativeClient, *numbers: int) -> list[Stream]:
        """Open links one after another, each in its place before the next."""
        opened = []
        for number in numbers:
            before = self.figures.links
            opened.append(await self.link(client, number))
            await until(lambda before=before: self.figures.links > before, 5, f"link {number}")  # type: ignore[misc]
        return opened

    async def link(self, client: NativeClient, number: int, proof: str = "") -> Stream:
        return await self._stack.enter_async_context(await client.link(number, proof))

    async def data(self, source: str = "127.0.0.1") -> Stream:
        """Connect to the data port as anybody could."""
        caller = await connect(self.tunnel)
        async with caller:
            port = int((await caller.read_line())[2:].split(b"?")[0])
        return self.knock(port, source)

    @property
    def relays(self) -> Relays:
        context = self.server._common
        assert context is not None
        return context.relays

    @property
    def figures(self) -> TunnelStatistics:
        return self.server.statistics()

    async def idle(self, count: int) -> None:
        await until(lambda: self.figures.links_idle == count, 5, f"{count} idle links")

    async def aclose(self) -> None:
        await self._stack.aclose()


def config(query: str = "", *, password: str = "", **settings: object) -> Config:
    guard = f"{password}@" if password else ""
    url = f"server://{guard}127.0.0.1:{free_port()}/127.0.0.1:{free_port()}?{query or 'log=none'}"
    return Config.parse(url, {}, Settings(threads=1, **settings))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def serving(
    query: str = "", *, password: str = "", relays: Relays | None = None, **settings: object
) -> AsyncIterator[Desk]:
    settings.setdefault("shutdown_timeout", 0.01)
    asked = config(query, password=password, **settings)
    async with Server(asked, relays=relays) as server:
        desk = Desk(server)
        try:
            async with within(30):
                yield desk
        finally:
            await desk.aclose()


async def is_reset(stream: Stream) -> bool:
    async with within(5):
        return await stream.is_reset()


async def launched(client: NativeClient) -> int:
    """Wait for a launch; return the number of its link."""
    async with within(5):
        text = await client.signal()
    assert text.startswith("tcp://"), text
    return int(text.removeprefix("tcp://").partition("?")[0])
