"""Frames on the wire, against native peers by hand: docs/protocol.md, "UDP frames"."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Final

import pytest
from tests.kit.authority import self_signed
from tests.kit.datagram import UdpArena, Visitor
from tests.kit.peer import NativeClient, NativeServer
from tests.kit.stream import Stream
from tests.kit.target import body_of
from tests.kit.timing import free_port, until, within

BODY: Final = body_of(71, 65_535)

TOO_LARGE: Final = "WARN  datagrams dropped: longer than UDP_DATA_BUF_SIZE.*count=1 "
UNSENT: Final = "WARN  datagrams dropped: the kernel would not send them.*count=1 "


def frame(data: bytes) -> bytes:
    """Length as two bytes, big-endian, then the datagram."""
    return len(data).to_bytes(2, "big") + data


async def read_frame(link: Stream) -> bytes:
    size = int.from_bytes(await link.read_exactly(2), "big")
    return await link.read_exactly(size)


async def launched(client: NativeClient, number: int, visitor: Visitor) -> None:
    assert await client.signal() == f"udp://{number}?from=127.0.0.1:{visitor.port}"


# --- our server -------------------------------------------------------------------------


async def test_server_frames_as_the_protocol_says(tmp_path: Path, engine: str, tls: str) -> None:
    """The example of docs/protocol.md, byte for byte; answers in crumbs, and all in one."""
    words = [b"hi", b"", b"0123456789"]
    async with UdpArena(tmp_path, engine) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port(), tls)
        async with NativeClient(tunnel_port) as client:
            link = await client.link(1)
            visitor = arena.visitor(port)
            for word in words:
                visitor.send(word)
            await launched(client, 1, visitor)
            wire = await link.read_exactly(18)
            assert wire.hex() == "000268690000000a30313233343536373839"
            for crumb in wire:
                await link.write(bytes([crumb]))
            assert [await visitor.read() for _ in words] == words
            await link.write(wire * 3)
            assert [await visitor.read() for _ in words * 3] == words * 3


async def test_f10_server_delivers_what_came_before_the_launch(
    tmp_path: Path, engine: str, tls: str
) -> None:
    async with UdpArena(tmp_path, engine) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port(), tls)
        async with NativeClient(tunnel_port) as client:
            link = await client.link(1, more=frame(b"early") + frame(b"")[:1])
            visitor = arena.visitor(port)
            visitor.send(b"hello")
            await launched(client, 1, visitor)
            assert await visitor.read() == b"early"
            await link.write(frame(b"")[1:] + frame(b"bird"))
            assert [await visitor.read(), await visitor.read()] == [b"", b"bird"]
            assert await read_frame(link) == b"hello"


async def test_server_drops_what_no_datagram_can_hold(tmp_path: Path, engine: str) -> None:
    """A frame may be longer than IPv4 carries: it is counted, and the next one is in step."""
    async with UdpArena(tmp_path, engine, REPORT_INTERVAL="1s") as arena, within(20):
        server = await arena.server(port := free_port(), tunnel_port := free_port())
        async with NativeClient(tunnel_port) as client:
            link = await client.link(1)
            visitor = arena.visitor(port)
            visitor.send(b"hello")
            await launched(client, 1, visitor)
            await link.write(frame(BODY) + frame(BODY[:65_507]) + frame(b"next"))
            assert await visitor.read() == BODY[:65_507]
            assert await visitor.read() == b"next"
            await server.logged(UNSENT)


@pytest.mark.parametrize(
    ("engine", "reset"), [("native", False), ("python", True)], ids=["native-fin", "python-rst"]
)
async def test_server_link_that_ends_within_a_frame(
    tmp_path: Path, engine: str, reset: bool
) -> None:
    """Half a datagram is none. The visitor has a new link a second later, and not at once."""
    async with UdpArena(tmp_path, engine) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port())
        async with NativeClient(tunnel_port) as client:
            link, spare = await client.link(1), await client.link(2)
            visitor = arena.visitor(port)
            visitor.send(b"hello")
            found = re.match(r"udp://(\d)", await client.signal())
            assert found is not None
            if found[1] == "2":
                link, spare = spare, link
            assert await read_frame(link) == b"hello"
            await link.write(frame(b"whole") + frame(b"half of it")[:6])
            assert await visitor.read() == b"whole"
            if reset:
                link.reset()
            else:
                link.close()
            loop = asyncio.get_running_loop()
            start = loop.time()
            asking = asyncio.create_task(visitor.insist(b"again"))
            try:
                assert (await client.signal()).startswith("udp://")
                assert loop.time() - start > 0.5
                assert await read_frame(spare) == b"again"
                await spare.write(frame(b"again"))
            finally:
                await asyncio.gather(asking, return_exceptions=True)
            await asking
            assert not visitor.heard


# --- our client -------------------------------------------------------------------------


async def launch(server: NativeServer) -> Stream:
    number, link = await server.link()
    await server.say(f"udp://{number}?from=192.0.2.1:4711")
    return link


@pytest.mark.parametrize("mode", [0, 1], ids=["plain", "tls"])
async def test_client_frames_as_the_protocol_says(tmp_path: Path, engine: str, mode: int) -> None:
    """Frames may be there before the launch; the last ones are delivered although a FIN came."""
    files = self_signed(tmp_path, "127.0.0.1")
    async with (
        UdpArena(tmp_path, engine) as arena,
        NativeServer(tls=mode, files=files if mode else None) as server,
        within(20),
    ):
        target = arena.udp_target()
        arena.dialling(server.listener.port, target.port)
        await server.welcome()
        number, link = await server.link()
        await link.write(frame(b"early"))
        await server.say(f"udp://{number}?from=192.0.2.1:4711")
        assert await read_frame(link) == b"early"
        for crumb in frame(b"hi") + frame(b"") + frame(b"0123456789"):
            await link.write(bytes([crumb]))
        for word in (b"hi", b"", b"0123456789"):
            assert await read_frame(link) == word
        assert len(target.sources) == 1
        await link.write(frame(b"last words") + frame(b"half of it")[:6])
        link.close()
        await until(lambda: target.received == 5, 5, "the last whole frame")
        assert target.last is not None
        assert target.last[0] == b"last words"


async def test_client_drops_what_no_datagram_can_hold(tmp_path: Path) -> None:
    async with (
        UdpArena(tmp_path, REPORT_INTERVAL="1s", UDP_DATA_BUF_SIZE="65507") as arena,
        NativeServer() as server,
        within(20),
    ):
        target = arena.udp_target()
        client = arena.dialling(server.listener.port, target.port)
        await server.welcome()
        link = await launch(server)
        await link.write(frame(BODY) + frame(BODY[:65_507]) + frame(b"next"))
        assert await read_frame(link) == BODY[:65_507]
        assert await read_frame(link) == b"next"
        await client.logged(UNSENT)
        assert target.received == 2


async def test_f24_client_says_why_it_cannot_serve(tmp_path: Path) -> None:
    """The link is reset, and the control channel names the reason; the next launch is no worse."""
    async with UdpArena(tmp_path) as arena, NativeServer() as server, within(20):
        url = f"client://127.0.0.1:{server.listener.port}/no-such-host.invalid:53"
        arena.nodepass(url).spawn()
        await server.welcome()
        for _ in range(2):
            number, link = await server.link()
            await link.write(frame(b"hello"))
            await server.say(f"udp://{number}?from=192.0.2.1:4711")
            assert await server.signal() == f"fail://{number}?why=unreachable"
            assert await link.is_reset()


async def test_limits_of_the_two_sides_may_differ(tmp_path: Path) -> None:
    """Each looks at what it receives from outside: the client's limit is about answers."""
    async with UdpArena(tmp_path, REPORT_INTERVAL="100ms") as arena, within(20):
        target = arena.udp_target()
        port, tunnel_port = free_port(), free_port()
        await arena.server(port, tunnel_port, UDP_DATA_BUF_SIZE="20000")
        client = await arena.client(tunnel_port, target.port, UDP_DATA_BUF_SIZE="1000")
        visitor = arena.visitor(port)
        visitor.send(BODY[:20_000])
        await client.logged(f"{TOO_LARGE}.*limit=1000")
        assert target.last is not None
        assert target.last[0] == BODY[:20_000]
        assert await visitor.ask(BODY[:1000]) == BODY[:1000]
        assert not visitor.heard


async def test_with_password_and_tls(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, within(20):
        far = arena.udp_target()
        tunnel = await arena.tunnel(far.port, server="?tls=1", password="correct-horse")
        visitor = arena.visitor(tunnel.port)
        for size in (0, 1400, 8192):
            assert await visitor.ask(BODY[:size]) == BODY[:size]
