"""linkdial: links under way on callbacks, from connect to claim, each with one end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
import weakref
from collections.abc import Iterator
from typing import cast

import pytest
from tests.kit.context import make_context
from tests.kit.engines import both
from tests.kit.timing import free_port, until

from nodepass.client.link_dialer import LinkDialer
from nodepass.client.server_dialer import Agreement, ServerDialer
from nodepass.config.environment import Settings
from nodepass.engine.relays import Relays
from nodepass.errors import DialError, NodePassError, PeerWireError, TunnelError
from nodepass.net import tcp
from nodepass.net.readiness import Watch
from nodepass.protocol import lines
from nodepass.protocol.handshake import ServerHandshake
from nodepass.protocol.messages import KEY_SIZE, NONCE_SIZE, VERSION, Dialect, Greeting, LinkClaim
from nodepass.protocol.proof import LinkKey
from nodepass.tunnel.idle_links import IdleLinks, Link

SESSION = "0123456789abcdef"
KEY = bytes(KEY_SIZE)


class Post:
    """Link dials of one session, and what became of them."""

    def __init__(self, name: tuple[str, int], dial: float = 30.0, shake: float = 30.0) -> None:
        self.watch = Watch()
        settings = Settings(dial_timeout=dial, handshake_timeout=shake)
        url = "client://127.0.0.1:1/127.0.0.1:2"
        context = make_context(cast(Relays, None), url, settings=settings)  # nobody wants TLS here
        self.counters = context.counters
        agreement = Agreement(Dialect.NATIVE, *name, 0, SESSION, KEY)
        self.dials = LinkDialer(context, ServerDialer(context, None), agreement, self.watch)
        self.ends: list[Link | Exception] = []

    def begin(self) -> None:
        self.dials.begin(self.ends.append)

    async def end(self) -> Link | Exception:
        await until(lambda: self.ends, 5, "an end")
        (end,) = self.ends
        assert not self.dials._open
        assert len(self.dials._dialling) == len(self.dials._waiting) == 0
        return end

    async def link(self) -> Link:
        end = await self.end()
        assert isinstance(end, Link), end
        return end

    async def failure(self) -> Exception:
        end = await self.end()
        assert isinstance(end, NodePassError)
        assert len(self.watch) == self.counters.links == 0
        return end

    async def dial_error(self) -> DialError:
        failure = await self.failure()
        assert isinstance(failure, DialError)
        return failure


@contextlib.contextmanager
def post(name: tuple[str, int], dial: float = 30.0, shake: float = 30.0) -> Iterator[Post]:
    here = Post(name, dial, shake)
    try:
        yield here
    finally:
        here.dials.close()
        here.watch.close()
        for end in here.ends:
            if isinstance(end, Link):
                end.sock.close()


@contextlib.contextmanager
def full() -> Iterator[socket.socket]:
    """A listener whose backlog is full, so that it leaves the first SYN unanswered."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            early = stack.enter_context(tcp.open_stream(socket.AF_INET))
            early.connect_ex(listening.getsockname())
        yield listening


@contextlib.contextmanager
def server(host: str = "127.0.0.1") -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:
        yield listening


def name_of(listening: socket.socket) -> tuple[str, int]:
    host, port = listening.getsockname()[:2]
    return str(host), int(port)


def greeting(**fields: object) -> ServerHandshake:
    words = {"data_port": 0, "tls": 0, "nonce": bytes(NONCE_SIZE), "needs_password": False}
    return ServerHandshake(Greeting(**{**words, "version": VERSION, **fields}))  # type: ignore[arg-type]


def accept(listening: socket.socket) -> socket.socket:
    sock, _ = listening.accept()
    sock.settimeout(5)
    return sock


@both
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("pieces", [1, 3])
async def test_a_link_is_made_and_proves_itself(host: str, pieces: int) -> None:
    shake = greeting()
    with server(host) as listening, post(name_of(listening)) as here:
        here.begin()
        with accept(listening) as far:
            line = shake.greeting_line
            for start in range(0, len(line), -(-len(line) // pieces)):
                assert not here.ends
                far.send(line[start : start + -(-len(line) // pieces)])
                await asyncio.sleep(0.02)
            link = await here.link()
            claim = shake.receive(far.recv(lines.MAX_LINE))
        assert isinstance(claim, LinkClaim)
        assert shake.is_link_proven(claim, LinkKey(KEY, SESSION))
        assert (link.name, link.head, link.tls) == (claim.number, b"", None)
        assert not link.sock.getblocking()
        assert link.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert here.counters.links == 1
        assert len(here.watch) == 0, "who did not have it watched finds it unwatched"


async def test_numbers_rise_and_what_follows_the_greeting_is_kept() -> None:
    shake = greeting()
    with server() as listening, post(name_of(listening)) as here, contextlib.ExitStack() as stack:
        for wanted in (1, 2, 3):
            here.begin()
            far = stack.enter_context(accept(listening))
            far.send(shake.greeting_line + b"early")
            await until(lambda: len(here.ends) == wanted, 5, "a link")  # noqa: B023
        links = [end for end in here.ends if isinstance(end, Link)]
        assert [(link.name, link.head) for link in links] == [(n, b"early") for n in (1, 2, 3)]


@both
async def test_a_shelf_goes_on_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[Link] = []
    calls: list[str] = []
    with server() as listening, post(name_of(listening)) as here:
        epoll = here.watch._epoll
        if epoll is None:
            pytest.skip("the loop itself watches here")

        class Counted:
            def __getattr__(self, name: str) -> object:
                calls.append(name)
                return getattr(epoll, name)

        idle_links = IdleLinks(here.watch, lost.append)
        monkeypatch.setattr(here.watch, "_epoll", Counted())

        def on_end(made: Link | Exception) -> None:
            here.ends.append(made)
            assert isinstance(made, Link)
            idle_links.put(made)

        here.dials.begin(on_end)
        with accept(listening) as far:
            far.send(greeting().greeting_line)
            link = await here.link()
            assert (len(here.watch), link.name in idle_links) == (1, True)
            assert [name for name in calls if name != "poll"] == ["register", "modify"]
        await until(lambda: lost == [link], 5, "the hang-up to be seen")
        assert len(here.watch) == 0


@both
async def test_a_shelf_hears_of_an_end_that_came_with_the_greeting() -> None:
    lost: list[Link] = []
    with server() as listening, post(name_of(listening)) as here:
        idle_links = IdleLinks(here.watch, lost.append)

        def on_end(made: Link | Exception) -> None:
            here.ends.append(made)
            assert isinstance(made, Link)
            idle_links.put(made)

        here.dials.begin(on_end)
        with accept(listening) as far:
            far.send(greeting().greeting_line)
            far.shutdown(socket.SHUT_WR)
            # Both are there before the loop has its next turn.
            link = await here.link()
            await until(lambda: lost == [link], 5, "the end")
        assert (len(here.watch), len(idle_links)) == (0, 0)


@pytest.mark.parametrize("is_made", [False, True])
async def test_nothing_of_a_dial_waits_for_the_garbage_collector(is_made: bool) -> None:
    """It would keep what TLS has allocated, which the collector does not see."""
    gc.collect()
    gc.disable()
    try:
        with server() as listening, post(name_of(listening)) as here:
            here.begin()
            (dial,) = (weakref.ref(dial.handshake) for dial in here.dials._open)
            with accept(listening) as far:
                far.send(greeting().greeting_line if is_made else b"nonsense\n")
                await here.end()
            made = here.ends.pop()
            if isinstance(made, Link):
                made.sock.close()
            del made
            await asyncio.sleep(0)
            assert dial() is None
    finally:
        gc.enable()


@both
async def test_refused() -> None:
    port = free_port()
    with post(("127.0.0.1", port)) as here:
        here.begin()
        failure = await here.dial_error()
        assert (failure.errno, failure.attempts) == (errno.ECONNREFUSED, 1)
        assert failure.address == f"127.0.0.1:{port}"


@both
@pytest.mark.parametrize("is_refused", [False, True])
async def test_answer_that_takes_a_while(is_refused: bool) -> None:
    with full() as listening, post(name_of(listening)) as here:
        here.begin()
        await asyncio.sleep(0.05)
        assert (len(here.dials._open), here.ends) == (1, [])
        if is_refused:
            listening.close()
            assert (await here.dial_error()).errno == errno.ECONNREFUSED
            return
        listening.listen(100)
        with contextlib.ExitStack() as stack:

            def greet() -> bool:
                with contextlib.suppress(BlockingIOError):
                    far = stack.enter_context(listening.accept()[0])
                    far.send(greeting().greeting_line)
                return bool(here.ends)

            listening.setblocking(False)
            await until(greet, 5, "the one that waited")
            await here.link()


@both
async def test_no_answer_in_time() -> None:
    with full() as listening, post(name_of(listening), dial=0.1) as here:
        here.begin()
        assert (await here.dial_error()).errno == errno.ETIMEDOUT


@both
async def test_no_greeting_in_time() -> None:
    with server() as listening, post(name_of(listening), dial=0.1, shake=0.2) as here:
        here.begin()
        with accept(listening) as far:
            far.send(b"220 mail ")
            await asyncio.sleep(0.15)
            assert not here.ends, "connected, so it has the longer time"
            failure = await here.failure()
            assert isinstance(failure, TunnelError)
            assert "no greeting within 0.3 s" in str(failure)


@pytest.mark.parametrize(
    ("said", "kind", "why"),
    [
        (b"", TunnelError, "closed the connection"),
        (b"//123", TunnelError, "closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n", PeerWireError, "not a greeting"),
        (greeting(tls=1).greeting_line, PeerWireError, "has changed its dialect or its TLS mode"),
        (b"//12345#0\n", PeerWireError, "has changed its dialect or its TLS mode"),
    ],
)
async def test_what_is_no_greeting_of_our_server(
    said: bytes, kind: type[Exception], why: str
) -> None:
    with server() as listening, post(name_of(listening)) as here:
        here.begin()
        with accept(listening) as far:
            far.send(said)
        failure = await here.failure()
        assert type(failure) is kind
        assert why in str(failure)


@both
async def test_reset_before_the_greeting() -> None:
    with server() as listening, post(name_of(listening)) as here:
        here.begin()
        tcp.reset(accept(listening))
        failure = await here.failure()
        assert isinstance(failure, TunnelError)
        assert "broke during the handshake: connection reset" in str(failure)


@both
async def test_given_up() -> None:
    with server() as listening, full() as deaf:
        for target in (listening, deaf):
            with post(name_of(target)) as here:
                here.begin()
                here.dials.close()
                here.dials.close()
                assert (here.ends, len(here.watch), len(here.dials._open)) == ([], 0, 0)
        with accept(listening) as far:
            assert far.recv(1) == b""


async def test_no_socket_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(tcp, "open_stream", fail)
    with post(("127.0.0.1", 1)) as here:
        here.begin()
        assert (await here.dial_error()).errno == errno.EMFILE


async def test_no_room_to_watch_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    with server() as listening, post(name_of(listening)) as here:
        monkeypatch.setattr(here.watch, "readable", fail)
        here.begin()
        assert (await here.dial_error()).errno == errno.ENOSPC


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_never_talks_to_itself(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    port = free_port()

    def open_there(family: int, *_: object) -> socket.socket:
        # What the kernel does once in a while: it picks the wanted port as our own.
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.bind(("127.0.0.1", port))
        return sock

    monkeypatch.setattr(tcp, "open_stream", open_there)
    with post((host, port)) as here:
        here.begin()
        assert (await here.dial_error()).errno == errno.ECONNREFUSED


async def test_a_claim_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "gone")

    with server() as listening, post(name_of(listening)) as here:
        monkeypatch.setattr(tcp, "send_line", fail)
        here.begin()
        with accept(listening) as far:
            far.send(greeting().greeting_line)
            end = await here.end()
            assert isinstance(end, BrokenPipeError)
            assert (len(here.watch), here.counters.links) == (0, 0)
