"""UDP visitors of a server, and what they say."""

from __future__ import annotations

from tests.kit.datagram import Visitor
from tests.kit.peer import NativeClient
from tests.kit.server_desk import Desk
from tests.kit.stream import Stream
from tests.kit.timing import until, within


def come(desk: Desk, *said: bytes, host: str = "127.0.0.1") -> Visitor:
    """Let somebody come and say something; he leaves with the desk."""
    visitor = Visitor(desk.target, host)
    desk._stack.callback(visitor.close)
    for data in said:
        visitor.send(data)
    return visitor


async def launched(client: NativeClient) -> tuple[int, str]:
    """Wait for a UDP launch; return the number of its link and who comes."""
    async with within(5):
        text = await client.signal()
    assert text.startswith("udp://"), text
    number, _, visitor = text.removeprefix("udp://").partition("?from=")
    return int(number), visitor


async def read(link: Stream) -> bytes:
    """Return the next datagram of a link."""
    async with within(5):
        return await link.read_exactly(int.from_bytes(await link.read_exactly(2), "big"))


async def served(desk: Desk, client: NativeClient, number: int) -> tuple[Visitor, Stream]:
    """Let somebody come who is given this link at once."""
    (link,) = await desk.links(client, number)
    visitor = come(desk, b"hello")
    assert await launched(client) == (number, f"127.0.0.1:{visitor.port}")
    assert await read(link) == b"hello"
    return visitor, link


async def waiting(desk: Desk, count: int) -> None:
    await until(lambda: desk.figures.visitors_waiting == count, 5, f"{count} that wait")


async def gone(desk: Desk) -> None:
    await until(lambda: not desk.figures.visitors_open, 5, "the end")
