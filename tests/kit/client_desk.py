"""A running client, its target, and hand-driven servers that it has found."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from tests.kit.peer import Listener, NativeServer, SeedServer
from tests.kit.stream import Stream
from tests.kit.timing import within

from nodepass.client.client import Client
from nodepass.config.environment import Settings
from nodepass.config.url import Config
from nodepass.engine.relays import Relays
from nodepass.observe.stats import TunnelStatistics


class Desk:
    """A running client, and the target that it dials: connections wait until taken."""

    def __init__(self, client: Client, target: Listener) -> None:
        self.client = client
        self.target = target
        self.stack = contextlib.AsyncExitStack()

    async def at_target(self) -> Stream:
        async with within(5):
            stream = await self.target.accept()
        self.stack.callback(stream.close)
        return stream

    @property
    def relays(self) -> Relays:
        context = self.client._common
        assert context is not None
        return context.relays

    @property
    def figures(self) -> TunnelStatistics:
        return self.client.statistics()


@contextlib.asynccontextmanager
async def running(
    port: int,
    query: str = "",
    *,
    password: str = "",
    target: str = "",
    relays: Relays | None = None,
    **settings: object,
) -> AsyncIterator[Desk]:
    """Run a client of the server at this port; its pauses are short, its pool is two links."""
    options: dict[str, object] = {
        "threads": 1,
        "semaphore_limit": 100,  # fits any machine's limit of open files
        "min_pool_capacity": 2,
        "service_cooldown": 0.05,
        "shutdown_timeout": 0.01,
        **settings,
    }
    listener = Listener()
    where = target or f"127.0.0.1:{listener.port}"
    guard = f"{password}@" if password else ""
    url = f"client://{guard}127.0.0.1:{port}/{where}?name=me&{query or 'log=none'}"
    config = Config.parse(url, {}, Settings(**options))  # type: ignore[arg-type]
    try:
        async with Client(config, relays=relays) as client:
            desk = Desk(client, listener)
            async with desk.stack, within(30):
                yield desk
    finally:
        listener.close()


@contextlib.asynccontextmanager
async def paired(
    query: str = "", *, idle: int = 2, **settings: object
) -> AsyncIterator[tuple[NativeServer, Desk, dict[int, Stream]]]:
    """Run a client that has its links ready at a native server."""
    async with (
        NativeServer() as server,
        running(server.listener.port, query, **settings) as desk,  # type: ignore[arg-type]
    ):
        await server.welcome(idle)
        yield server, desk, await take_links(server, max(idle, 2))


async def take_links(server: NativeServer, count: int) -> dict[int, Stream]:
    async with within(5):
        return dict([await server.link() for _ in range(count)])


@contextlib.asynccontextmanager
async def seeded(query: str = "", **settings: object) -> AsyncIterator[tuple[SeedServer, Desk]]:
    """Run a client that is greeted by a seed server and whose first two links are named."""
    async with (
        SeedServer() as server,
        running(server.listener.port, query, **settings) as desk,  # type: ignore[arg-type]
    ):
        await server.greet(beat=0.05)
        for _ in range(2):
            await server.take()
        yield server, desk


async def hello_again(server: NativeServer) -> tuple[Stream, str]:
    """Take the next control connection, past links that were still under way; and its name."""
    async with within(5):
        while True:
            try:
                stream, _, line = await server.accept()
            except (EOFError, ConnectionError):
                continue  # a link that was given up together with its session
            if line.startswith("hello://"):
                return stream, line.removeprefix("hello://").partition("?")[0]


async def welcome_again(server: NativeServer, idle: int = 0) -> str:
    server._control, name = await hello_again(server)
    await server.say(f"welcome://{server.session}?k={server.key.hex()}&idle={idle}")
    return name


async def signal(server: NativeServer) -> str:
    async with within(5):
        return await server.signal()


async def is_reset(stream: Stream) -> bool:
    async with within(5):
        return await stream.is_reset()


async def accept(listener: Listener) -> Stream:
    async with within(5):
        return await listener.accept()
