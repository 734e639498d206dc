"""dial: connects under way on callbacks, each with one end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import pytest
from tests.system.rig.timing import free_port, until

from nodepass import net
from nodepass.dial import Dials
from nodepass.errors import DialError
from nodepass.watch import Watch

both = pytest.mark.loops("asyncio", "uvloop")


class Post:
    """Dials of one client, and what became of them."""

    def __init__(self, timeout: float = 30.0) -> None:
        self.watch = Watch()
        self.dials = Dials(self.watch, timeout)
        self.ends: list[socket.socket | DialError] = []

    def begin(self, name: tuple[str, int]) -> None:
        candidate = net.literal(*name)
        assert candidate is not None
        self.dials.begin(candidate, self.ends.append)

    async def end(self) -> socket.socket | DialError:
        await until(lambda: self.ends, 5, "an end")
        (end,) = self.ends
        assert len(self.dials) == len(self.watch) == 0
        return end

    async def failure(self) -> DialError:
        end = await self.end()
        assert isinstance(end, DialError)
        return end


@contextlib.contextmanager
def post(timeout: float = 30.0) -> Iterator[Post]:
    here = Post(timeout)
    try:
        yield here
    finally:
        here.dials.close()
        here.watch.close()
        for end in here.ends:
            if isinstance(end, socket.socket):
                end.close()


@contextlib.contextmanager
def full() -> Iterator[socket.socket]:
    """A listener whose backlog is full, so that it leaves the first SYN unanswered."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            early = stack.enter_context(net.open_stream(socket.AF_INET))
            early.connect_ex(listening.getsockname())
        yield listening


@both
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_connects_within_the_call_where_it_can(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening, post() as here:
        listening.bind((host, 0))
        listening.listen()
        name = listening.getsockname()[:2]
        here.begin(name)
        end = await here.end()
        assert isinstance(end, socket.socket)
        assert end.getpeername()[:2] == name
        assert not end.getblocking()
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("host", "is_far"),
    [("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("192.0.2.1", True), ("", True)],
)
def test_keepalive_where_a_peer_may_vanish(host: str, is_far: bool) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with net.open_stream(family, host) as sock:
        assert not sock.getblocking()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is is_far
        if is_far:
            idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            assert idle == net.KEEPALIVE_IDLE


@both
async def test_refused() -> None:
    with post() as here:
        port = free_port()
        here.begin(("127.0.0.1", port))
        failure = await here.failure()
        assert (failure.errno, failure.attempts) == (errno.ECONNREFUSED, 1)
        assert failure.address == f"127.0.0.1:{port}"


@both
@pytest.mark.parametrize("is_refused", [False, True])
async def test_answer_that_takes_a_while(is_refused: bool) -> None:
    with full() as listening, post() as here:
        here.begin(listening.getsockname())
        await asyncio.sleep(0.05)
        assert (len(here.dials), here.ends) == (1, [])
        if is_refused:
            listening.close()
            assert (await here.failure()).errno == errno.ECONNREFUSED
        else:
            listening.listen(100)
            assert isinstance(await here.end(), socket.socket)


@both
async def test_no_answer_in_time() -> None:
    with full() as listening, post(0.1) as here:
        here.begin(listening.getsockname())
        assert (await here.failure()).errno == errno.ETIMEDOUT


@both
async def test_given_up() -> None:
    with full() as listening, post() as here:
        here.begin(listening.getsockname())
        here.dials.close()
        assert (await here.failure()).errno == errno.ECANCELED
        here.dials.close()
        assert len(here.ends) == 1


async def test_no_socket_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(net, "open_stream", fail)
    with post() as here:
        here.begin(("127.0.0.1", 1))
        assert (await here.failure()).errno == errno.EMFILE


async def test_no_room_to_watch_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    with full() as listening, post() as here:
        monkeypatch.setattr(here.watch, "writable", fail)
        here.begin(listening.getsockname())
        assert (await here.failure()).errno == errno.ENOSPC


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_never_talks_to_itself(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    port = free_port()

    def open_there(family: int, _: str) -> socket.socket:
        # What the kernel does once in a while: it picks the wanted port as our own.
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.bind(("127.0.0.1", port))
        return sock

    monkeypatch.setattr(net, "open_stream", open_there)
    with post() as here:
        here.begin((host, port))
        assert (await here.failure()).errno == errno.ECONNREFUSED


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        ("192.0.2.1", (socket.AF_INET, ("192.0.2.1", 9))),
        ("2001:db8::1", (socket.AF_INET6, ("2001:db8::1", 9))),
        ("localhost", None),
        ("fe80::1%no-such-zone", None),
        ("192.0.2.1%lo", None),
        ("", None),
    ],
)
def test_literal(host: str, wanted: object) -> None:
    assert net.literal(host, 9) == wanted


def test_literal_with_a_zone() -> None:
    zone = socket.if_nametoindex("lo")
    assert net.literal("fe80::1%lo", 9) == (socket.AF_INET6, ("fe80::1", 9, 0, zone))
