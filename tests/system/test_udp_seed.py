"""UDP in the seed dialect: one link, one datagram, one answer, no frames.

Against peers that do what the Go program does, in both roles; the UDP rows of
tests/data/seed-*.json are replayed, without TLS as they were recorded and with it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pytest
from tests.kit.authority import Issued, self_signed
from tests.kit.datagram import Address, UdpArena, UdpTarget, listen_only
from tests.kit.peer import SeedClient, SeedServer
from tests.kit.process import Nodepass
from tests.kit.recording import Row, recording
from tests.kit.secure import TlsStream, Truncated
from tests.kit.stream import Stream
from tests.kit.target import body_of
from tests.kit.timing import free_port, limit, settled, until, within

BODY: Final = body_of(61, 8193)

few = pytest.mark.parametrize(
    ("engine", "tls"), [("native", 1), ("python", 0)], ids=["native-tls", "python-plain"]
)

LAUNCH: Final = "//{}#2"

IN_A_ROW: Final = 200
STOCK: Final = 8


@pytest.fixture(params=[0, 1], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest) -> int:
    """TLS mode of the server."""
    return int(request.param)


@pytest.fixture
def files(tmp_path: Path) -> Issued:
    return self_signed(tmp_path, "127.0.0.1")


def go_closes(link: Stream) -> None:
    """Close as Go does: close_notify and FIN in TLS."""
    if isinstance(link, TlsStream):
        link.finish(fin=False)
    link.close()


async def has_closed(link: Stream) -> bool:
    """Read on to the end, with or without a close_notify; tell whether it was one, and bare."""
    try:
        return await link.read_all() == b""
    except Truncated:
        return True


def only(rows: Iterable[Row], channel: str, direction: str) -> bytes:
    """Return the one UDP payload that went over a channel in one direction."""
    found = [
        row.data
        for row in rows
        if (row.channel, row.direction) == (channel, direction)
        and row.data
        and not re.fullmatch(rb"[0-9a-z]{8}", row.data)
    ]
    assert len(found) == 1, found
    return found[0]


async def settled_fds(process: Nodepass) -> int:
    await settled(process.fds, 10, "a steady number of descriptors", looks=50)
    return process.fds()


# --- our server, their client -----------------------------------------------------------


async def launched(client: SeedClient) -> Stream:
    """Wait for a UDP launch; return its link."""
    found = re.fullmatch(r"//([0-9a-f]{8})#2", text := await client.signal())
    assert found, text
    return client.links.pop(found[1])


async def test_server_talks_as_recorded(tmp_path: Path, engine: str, tls: int) -> None:
    """An answer counts as whole when the link ends, at the latest when the time is over.

    The recorded client keeps its link open, the real one closes it at once: both must do.
    """
    rows = recording("seed-server")
    said, answer = only(rows, "data1", "s>c"), only(rows, "data1", "c>s")
    async with UdpArena(tmp_path, engine, UDP_READ_TIMEOUT="400ms") as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port(), f"?tls={tls}")
        async with SeedClient(tunnel_port) as client:
            for _ in range(2):
                await client.dial()
            visitor = arena.visitor(port)
            for is_recorded in (False, True):
                visitor.send(said)
                link = await launched(client)
                assert await link.read() == said
                await link.write(answer)
                if not is_recorded:
                    go_closes(link)
                assert await visitor.read() == answer
                if is_recorded:
                    assert await has_closed(link), "and then the server closes it"


@few
async def test_server_takes_a_link_for_each_datagram(
    tmp_path: Path, engine: str, tls: int
) -> None:
    """Two at once use two links, of one visitor or of two; each has its answer."""
    async with UdpArena(tmp_path, engine) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port(), f"?tls={tls}")
        async with SeedClient(tunnel_port) as client:
            for _ in range(4):
                await client.dial()
            first, second = arena.visitor(port), arena.visitor(port)
            first.send(b"one")
            first.send(b"two")
            second.send(b"three")
            links = {}
            for _ in range(3):
                link = await launched(client)
                links[await link.read()] = link
            assert set(links) == {b"one", b"two", b"three"}
            for word in (b"three", b"two", b"one"):
                await links[word].write(b"re: " + word)
                go_closes(links[word])
            assert {await first.read(), await first.read()} == {b"re: one", b"re: two"}
            assert await second.read() == b"re: three"


@pytest.mark.parametrize("size", [1, 1400, 8192])
async def test_server_joins_the_pieces_of_an_answer(tmp_path: Path, size: int) -> None:
    """A stream knows no boundaries: all up to the end is one datagram."""
    async with UdpArena(tmp_path) as arena, within(20):
        await arena.server(port := free_port(), tunnel_port := free_port())
        async with SeedClient(tunnel_port) as client:
            await client.dial()
            visitor = arena.visitor(port)
            visitor.send(BODY[:size])
            link = await launched(client)
            assert await link.read_exactly(size) == BODY[:size]
            for start in range(0, size, 1000):
                await link.write(BODY[start : min(size, start + 1000)])
                await asyncio.sleep(0.02)
            go_closes(link)
            assert await visitor.read() == BODY[:size]


@few
async def test_server_lets_go_of_a_link_without_an_answer(
    tmp_path: Path, engine: str, tls: int
) -> None:
    """After UDP_READ_TIMEOUT, politely; a client that closes without one is no fault either."""
    async with UdpArena(tmp_path, engine, UDP_READ_TIMEOUT="500ms") as arena, within(20):
        server = await arena.server(port := free_port(), tunnel_port := free_port(), f"?tls={tls}")
        async with SeedClient(tunnel_port) as client:
            for _ in range(3):
                await client.dial()
            visitor = arena.visitor(port)
            visitor.send(b"anybody?")
            link = await launched(client)
            assert await link.read() == b"anybody?"
            start = time.monotonic()
            assert await has_closed(link)
            assert 0.3 < time.monotonic() - start < limit(4)
            visitor.send(b"nobody?")
            link = await launched(client)
            assert await link.read() == b"nobody?"
            go_closes(link)
            await asyncio.sleep(1.1)  # a client that fails at once is left alone for a second
            visitor.send(b"now?")
            link = await launched(client)
            assert await link.read() == b"now?"
            await link.write(b"yes")
            go_closes(link)
            assert await visitor.read() == b"yes"
            assert not visitor.heard
        assert "ERROR" not in server.log


@few
async def test_f07_server_keeps_no_descriptor_of_200_datagrams(
    tmp_path: Path, engine: str, tls: int
) -> None:
    """Where the Go program leaks one for each."""
    async with UdpArena(tmp_path, engine) as arena, within(30):
        server = await arena.server(port := free_port(), tunnel_port := free_port(), f"?tls={tls}")
        async with SeedClient(tunnel_port) as client:
            for _ in range(STOCK):  # a fresh link has to ripen
                await client.dial()
            visitor = arena.visitor(port)
            before = await settled_fds(server)
            for number in range(IN_A_ROW):
                word = b"%d" % number
                visitor.send(word)
                link = await launched(client)
                assert await link.read() == word
                await link.write(word[::-1])
                go_closes(link)
                assert await visitor.read() == word[::-1]
                await client.dial()
            await until(lambda: server.fds() == before, 5, f"{before} descriptors again")


# --- our client, their server -----------------------------------------------------------


async def _start(
    arena: UdpArena, server: SeedServer, port: int, tls: int = 0, query: str = ""
) -> Nodepass:
    """Start a client of a seed server, and greet it."""
    client = arena.dialling(server.listener.port, port, query)
    await server.greet(tls)
    await client.logged("tunnel up .*dialect=seed")
    return client


async def test_client_talks_as_recorded(
    tmp_path: Path, engine: str, tls: int, files: Issued
) -> None:
    """The target hears the datagram; its first answer goes back, and the link is closed."""
    rows = [row for row in recording("seed-client") if b"GET" != row.data != b"OK"]
    said, answer = only(rows, "data1", "s>c"), only(rows, "data1", "c>s")
    assert (said, answer) == (only(rows, "target", "c>t"), only(rows, "target", "t>c"))

    def answer_twice(target: UdpTarget, data: bytes, address: Address) -> None:
        target.send(answer, address)
        target.send(b"one too many", address)

    async with (
        UdpArena(tmp_path, engine) as arena,
        SeedServer(files=files) as server,
        within(20),
    ):
        target = arena.udp_target(answer_twice)
        await _start(arena, server, target.port, tls)
        link = await server.launch(await server.take(), LAUNCH)
        await link.write(said)
        assert await link.read_all() == answer
        assert target.last is not None
        assert target.last[0] == said


@few
async def test_client_serves_several_at_once(
    tmp_path: Path, engine: str, tls: int, files: Issued
) -> None:
    """Each link has a socket of its own at the target; the answers come in any order."""
    waiting: list[tuple[bytes, Address]] = []

    def remember(target: UdpTarget, data: bytes, address: Address) -> None:
        waiting.append((data, address))

    async with (
        UdpArena(tmp_path, engine) as arena,
        SeedServer(files=files) as server,
        within(20),
    ):
        target = arena.udp_target(remember)
        await _start(arena, server, target.port, tls)
        links = [await server.launch(await server.take(), LAUNCH) for _ in range(4)]
        for number, link in enumerate(links):
            await link.write(b"question %d" % number)
        await until(lambda: len(waiting) == len(links), 5, "all questions")
        for data, address in reversed(waiting):
            target.send(data.replace(b"question", b"answer"), address)
        for number, link in enumerate(links):
            assert await link.read_all() == b"answer %d" % number
        assert len(target.sources) == len(links)


@pytest.mark.parametrize("pieces", [(1000, 2000), (1448, 1448, 104), (8192,)], ids=str)
async def test_client_waits_for_the_rest_of_a_large_datagram(
    tmp_path: Path, tls: int, files: Issued, pieces: tuple[int, ...]
) -> None:
    """3000 bytes come in segments as TCP likes it, and must leave as one datagram."""
    async with (
        UdpArena(tmp_path) as arena,
        SeedServer(files=files) as server,
        within(20),
    ):
        target = arena.udp_target()
        await _start(arena, server, target.port, tls)
        link = await server.launch(await server.take(), LAUNCH)
        start = 0
        for size in pieces:
            await link.write(BODY[start : start + size])
            start += size
            await asyncio.sleep(0.01)
        assert await link.read_all() == BODY[:start]
        assert target.received == 1


async def test_client_lets_go_of_a_target_without_an_answer(
    tmp_path: Path, engine: str, tls: int, files: Issued
) -> None:
    async with (
        UdpArena(tmp_path, engine, UDP_READ_TIMEOUT="500ms") as arena,
        SeedServer(files=files) as server,
        within(20),
    ):
        target = arena.udp_target(listen_only)
        client = await _start(arena, server, target.port, tls)
        link = await server.launch(await server.take(), LAUNCH)
        await link.write(b"anybody?")
        start = time.monotonic()
        assert await link.read_all() == b"", "closed, and not reset"
        assert 0.3 < time.monotonic() - start < limit(4)
        assert target.received == 1
        assert "nobody listens" not in client.log


async def test_client_tells_of_a_dead_target(tmp_path: Path) -> None:
    async with (
        UdpArena(tmp_path, UDP_READ_TIMEOUT="500ms", REPORT_INTERVAL="200ms") as arena,
        SeedServer() as server,
        within(20),
    ):
        client = await _start(arena, server, free_port())
        for _ in range(2):
            link = await server.launch(await server.take(), LAUNCH)
            await link.write(b"anybody?")
            async with within(4):
                await link.is_reset()  # an end of some kind
        await client.logged("WARN  nobody listens at the target")


async def test_f06_client_without_udp_resets_every_link(tmp_path: Path) -> None:
    """Also one whose id comes behind its launch: a visitor waits at its other end."""
    async with UdpArena(tmp_path) as arena, SeedServer() as server, within(20):
        target = arena.udp_target()
        client = await _start(arena, server, target.port, query="?udp=0")
        links = [await server.launch(await server.take(), LAUNCH)]
        await client.logged("a visitor cannot be served.*udp=0 is set here")
        links.append(server.keep(await server.data.accept()))
        await server.say("//0123abcd#2")
        await asyncio.sleep(0.1)
        await links[1].write(b"0123abcd")
        for link in links:
            async with within(4):
                assert await link.is_reset()
        assert target.received == 0


@few
async def test_f07_client_keeps_no_descriptor_of_200_datagrams(
    tmp_path: Path, engine: str, tls: int, files: Issued
) -> None:
    steady = {"MIN_POOL_CAPACITY": "4", "MAX_POOL_CAPACITY": "4"}
    async with (
        UdpArena(tmp_path, engine, **steady) as arena,
        SeedServer(files=files) as server,
        within(30),
    ):
        client = await _start(arena, server, arena.udp_target().port, tls)
        names = [await server.take() for _ in range(4)]
        before = await settled_fds(client)
        for number in range(IN_A_ROW):
            link = await server.launch(names.pop(0), LAUNCH)
            await link.write(b"%d" % number)
            assert await link.read_all() == b"%d" % number
            link.close()
            names.append(await server.take())
        await until(lambda: client.fds() == before, 5, f"{before} descriptors again")
