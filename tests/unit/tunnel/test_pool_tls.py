"""pool: idle links inside TLS, where bytes need not be a visitor's and an end has two forms."""

from __future__ import annotations

import array
import asyncio
import fcntl
import select
import socket
import termios
import time
from pathlib import Path

import pytest
from tests.kit.acceptor_desk import outside
from tests.kit.authority import Issued, self_signed
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both
from tests.kit.hand_seal import HandSealer
from tests.kit.secure import LibrarySide, TlsStream, library_server, secure
from tests.kit.stream import Stream
from tests.kit.timing import until, within

from nodepass.config.environment import Settings
from nodepass.engine.relays import Relays
from nodepass.net.readiness import Watch
from nodepass.observe.log import Log
from nodepass.tls.codec import Records
from nodepass.tls.contexts import ClientTls, ServerTls
from nodepass.tunnel.idle_links import LOOKS, READ_SIZE, IdleLinks, Link


@pytest.fixture(params=["epoll", "readers"])
def watch_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How hang-ups are noticed: with epoll, and as where there is none."""
    if request.param == "readers":
        monkeypatch.delattr(select, "epoll", raising=False)
    return str(request.param)


@pytest.fixture
def files(tmp_path: Path) -> Issued:
    return self_signed(tmp_path, "links.example")


class House:
    """A client's idle_links, and the server's ends of its links."""

    def __init__(self, files: Issued, grace: float = 5.0) -> None:
        self._files = files
        self._relays = Relays(Settings(threads=1, engine="python"))
        self._watch = Watch()
        self._ends: list[TlsStream] = []
        self._links: list[Link] = []
        self.lost: list[Link] = []
        self.idle_links = IdleLinks(self._watch, self.lost.append, grace)

    async def put(self, name: int = 1) -> tuple[Link, TlsStream]:
        """Shelve a link whose handshake is done: two session tickets come behind it."""
        near, far = tcp_pair()
        connection = ClientTls("127.0.0.1", None, None).connect(1, is_native=True)
        side = LibrarySide(library_server(self._files), is_server=True)
        async with within(10):
            end, result = await asyncio.gather(
                secure(Stream(far), side), self._relays.secure(near, connection)
            )
        assert result.is_done
        link = Link(near, name, tls=connection)
        self._ends.append(end)
        self._links.append(link)
        self.idle_links.put(link)
        return link, end

    async def __aenter__(self) -> House:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.idle_links.clear()
        self._watch.close()
        await self._relays.close()
        for end in self._ends:
            end.close()
        for link in self._links:
            link.sock.close()


@both
async def test_session_tickets_are_no_news(files: Issued, watch_kind: str) -> None:
    async with House(files) as house:
        link, far = await house.put()
        await asyncio.sleep(0.02)
        await far.write(b"")
        assert (len(house.idle_links), house.lost) == (1, [])
        assert house.idle_links.claim(1) is link
        assert link.head == b""


@both
async def test_dead_link_is_noticed_behind_its_tickets(files: Issued, watch_kind: str) -> None:
    async with House(files, grace=0.0) as house:
        await asyncio.sleep(0.02)
        link, far = await house.put()
        await asyncio.sleep(0.02)
        far.reset()
        await until(lambda: house.lost, 5, "the loss")
        assert house.lost == [link]
        assert (len(house.idle_links), house.idle_links.lost) == (0, 1)
        assert link.sock.fileno() == -1


@both
async def test_link_whose_visitor_has_ended_waits_for_its_launch(
    files: Issued, watch_kind: str
) -> None:
    async with House(files) as house:
        link, far = await house.put()
        far.finish()
        await until(lambda: house.lost, 5, "the end")
        assert len(house.idle_links) == 0
        assert 1 in house.idle_links
        assert house.idle_links.take() is None
        assert house.idle_links.claim(1) is link
        assert house.idle_links.lost == 0
        assert link.tls is not None
        link.sock.send(Records(link.tls).seal(b"answer"))
        async with within(5):
            assert await far.read_exactly(6) == b"answer"


@both
async def test_grace_has_an_end(files: Issued) -> None:
    async with House(files, grace=0.03) as house:
        _, far = await house.put()
        far.finish()
        await until(lambda: house.lost, 5, "the end")
        await until(lambda: 1 not in house.idle_links, 5, "the end of the grace")
        async with within(5):
            assert await outside(far).is_reset()


@both
async def test_words_before_the_end_are_kept_for_the_target(
    files: Issued, watch_kind: str
) -> None:
    async with House(files) as house:
        link, far = await house.put()
        await far.write(b"early ")
        await far.write(b"words")
        far.finish()
        await asyncio.sleep(0.03)
        assert (len(house.idle_links), house.lost) == (1, [])
        assert house.idle_links.claim(1) is link
        assert link.tls is not None
        said = link.head
        while said != b"early words":
            assert b"early words".startswith(said)
            said += Records(link.tls).open(link.sock.recv(1000))


@both
@pytest.mark.parametrize("how", ["cut", "reset", "garbage"])
async def test_broken_link_is_dead_and_has_no_grace(
    files: Issued, how: str, watch_kind: str
) -> None:
    async with House(files) as house:
        link, far = await house.put()
        if how == "reset":
            far.reset()
        else:
            if how == "garbage":
                await outside(far).write(b"\x17\x03\x03\x00\x20" + bytes(32))
            outside(far).finish()
        await until(lambda: house.lost, 5, "the loss")
        assert 1 not in house.idle_links
        assert house.idle_links.claim(1) is None
        assert (house.idle_links.lost, link.sock.fileno()) == (1, -1)


async def test_server_takes_no_link_that_has_ended_in_this_very_turn(files: Issued) -> None:
    """Or its visitor would be answered by a clean end, without a launch."""
    async with House(files, grace=0.0) as house:
        alive, _ = await house.put(1)
        await asyncio.sleep(0.01)
        dead, far = await house.put(2)
        far.finish()
        assert select.select([dead.sock], [], [], 5)[0]
        time.sleep(0.01)  # blocks the loop: nobody has been told of the FIN behind the bytes
        assert house.idle_links.take() is alive
        assert house.idle_links.lost == 1


@pytest.mark.parametrize("is_asked", [True, False])
async def test_link_that_brings_nothing_but_new_keys_is_not_read_on(is_asked: bool) -> None:
    """Whoever sends them as fast as we can take them would keep the loop for himself."""
    near, far = tcp_pair()
    hand = HandSealer()
    relays = Relays(Settings(threads=1, engine="python"))
    watch = Watch()
    lost: list[Link] = []
    idle_links = IdleLinks(watch, lost.append)
    accepted = ServerTls(1, None, None, Log("house", "none"), None).accept(is_native=True)
    async with within(10):
        end, _ = await asyncio.gather(
            secure(Stream(far), hand.side), relays.secure(near, accepted)
        )
    link = Link(near, 1, tls=accepted)
    idle_links.put(link)
    flood = b"".join(hand.update_keys(is_asked=is_asked) for _ in range(400))
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(flood))
    assert far.send(flood) == len(flood)
    time.sleep(0.02)
    unread = queued(near)
    assert idle_links.take() is link
    assert 0 < unread - queued(near) <= LOOKS * READ_SIZE
    assert lost == []
    near.close()
    watch.close()
    await relays.close()
    end.close()


def queued(sock: socket.socket) -> int:
    """Return how many bytes wait to be received."""
    room = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, room)
    return room[0]


async def test_clear_resets_all(files: Issued) -> None:
    async with House(files) as house:
        _, idle = await house.put(1)
        _, ended = await house.put(2)
        ended.finish()
        await until(lambda: house.lost, 5, "the end")
        house.idle_links.clear()
        async with within(5):
            for far in (idle, ended):
                assert await outside(far).is_reset()
