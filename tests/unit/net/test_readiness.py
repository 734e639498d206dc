"""watch: hang-ups, bytes and answers of connections that are not joined yet."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import select
import socket
from collections.abc import Iterator
from unittest import mock

import pytest
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both
from tests.kit.timing import until

from nodepass.net import tcp, tcp_dial
from nodepass.net.readiness import Watch


@contextlib.contextmanager
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = tcp_pair()
    with near, far:
        yield near, far


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    watch = Watch()
    try:
        yield watch
    finally:
        watch.close()


@pytest.fixture(params=["epoll", "readers"])
def watch_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The watch as it is on Linux, and as it is elsewhere."""
    if request.param == "readers":
        monkeypatch.delattr(select, "epoll", raising=False)
    return str(request.param)


@both
@pytest.mark.parametrize("how", ["end", "reset"])
async def test_watch_tells_of_a_hangup(watch_kind: str, how: str) -> None:
    with ends() as (near, far), ends() as (other, _), watching() as watch:
        heard: list[str] = []
        watch.hangup(near, lambda: heard.append("near"))
        watch.hangup(other, lambda: heard.append("other"))
        await asyncio.sleep(0.02)
        assert not heard
        if how == "reset":
            tcp.reset(far)
        else:
            far.close()
        await until(lambda: heard, 5, "the hang-up")
        assert set(heard) == {"near"}
        watch.remove(near)


@both
async def test_watch_tells_of_what_had_ended_before(watch_kind: str) -> None:
    with ends() as (near, far), watching() as watch:
        far.close()
        heard: list[str] = []
        watch.hangup(near, lambda: heard.append("near"))
        await until(lambda: heard, 5, "the hang-up")


@both
async def test_watch_leaves_early_bytes_alone(watch_kind: str) -> None:
    with ends() as (near, far), watching() as watch:
        heard: list[str] = []
        watch.hangup(near, lambda: heard.append("near"))
        far.send(b"early")
        await asyncio.sleep(0.02)
        assert len(heard) <= 1, "no spin"
        if watch_kind == "epoll":
            assert not heard
            far.close()
            await until(lambda: heard, 5, "the end behind the bytes")
        assert near.recv(10) == b"early"
        watch.remove(near)


@both
async def test_watch_forgets_what_is_removed(watch_kind: str) -> None:
    with ends() as (near, far), watching() as watch:
        heard: list[str] = []
        watch.hangup(near, lambda: heard.append("near"))
        watch.remove(near)
        watch.remove(near)
        far.close()
        await asyncio.sleep(0.02)
        assert not heard


@both
async def test_watch_is_not_fooled_by_a_number_used_again(watch_kind: str) -> None:
    with watching() as watch:
        heard: list[str] = []
        near, far = tcp_pair()
        number = near.fileno()
        watch.hangup(near, lambda: heard.append("old"))
        watch.remove(near)
        near.close()
        far.close()
        near, far = tcp_pair()
        if near.fileno() != number:
            near, far = far, near
        assert near.fileno() == number, "the kernel gives the lowest free number"
        with near, far:
            watch.hangup(near, lambda: heard.append("new"))
            far.close()
            await until(lambda: heard, 5, "the hang-up")
            assert set(heard) == {"new"}
            watch.remove(near)


@both
async def test_watch_callbacks_may_remove_each_other(watch_kind: str) -> None:
    with ends() as (one, far_one), ends() as (two, far_two), watching() as watch:
        heard: list[str] = []

        def lose(name: str) -> None:
            heard.append(name)
            watch.remove(one)
            watch.remove(two)

        watch.hangup(one, lambda: lose("one"))
        watch.hangup(two, lambda: lose("two"))
        far_one.close()
        far_two.close()
        await until(lambda: heard, 5, "a hang-up")
        await asyncio.sleep(0.02)
        assert len(heard) == 1


@both
async def test_watch_hears_a_crowd_that_leaves_at_once() -> None:
    with contextlib.ExitStack() as stack, watching() as watch:
        pairs = [socket.socketpair() for _ in range(300)]
        heard = set()
        for number, (near, far) in enumerate(pairs):
            stack.enter_context(near)
            stack.enter_context(far)
            watch.hangup(near, lambda number=number: heard.add(number))  # type: ignore[misc]
        for _, far in pairs:
            far.close()
        await until(lambda: len(heard) == len(pairs), 5, "all of them")


@both
async def test_watch_close_forgets_all(watch_kind: str) -> None:
    with ends() as (near, far):
        watch = Watch()
        heard: list[str] = []
        watch.hangup(near, lambda: heard.append("near"))
        watch.close()
        watch.close()
        far.close()
        await asyncio.sleep(0.02)
        watch.remove(near)
        assert not heard


@both
async def test_watch_tells_the_others_although_one_raises(
    watch_kind: str,
) -> None:
    """Edges are told once: whoever is passed over would never hear of them."""
    told: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
    with contextlib.ExitStack() as stack, watching() as watch:
        heard: list[int] = []

        def hear(number: int) -> None:
            heard.append(number)
            if number == 0:
                raise RuntimeError("on purpose")

        for number in range(20):
            near, far = stack.enter_context(ends())
            watch.hangup(near, functools.partial(hear, number))
            far.close()
        await until(lambda: set(heard) == set(range(20)), 5, "all of them")
    assert "on purpose" in str(told)


async def test_watch_without_room_for_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with ends() as (near, far), watching() as watch:
        whole, watch._epoll = watch._epoll, mock.Mock()
        watch._epoll.register.side_effect = OSError(errno.ENOSPC, "no room")
        with pytest.raises(OSError, match="no room"):
            watch.readable(near, lambda: None)
        watch._epoll = whole
        assert len(watch) == 0
        watch.remove(near)
        heard: list[str] = []
        watch.hangup(near, lambda: heard.append("near"))
        far.close()
        await until(lambda: heard, 5, "the hang-up")
        watch.remove(near)


@both
async def test_watch_meets_a_number_again_before_it_is_released(watch_kind: str) -> None:
    with watching() as watch:
        heard: list[str] = []

        def old() -> None:
            heard.append("old")

        near, far = tcp_pair()
        number = near.fileno()
        watch.readable(near, old)
        near.close()
        far.close()
        near, far = tcp_pair()
        if near.fileno() != number:
            near, far = far, near
        assert near.fileno() == number, "the kernel gives the lowest free number"
        with near, far:
            watch.readable(near, lambda: heard.append("new"))
            watch.release(number, old)
            assert len(watch) == 1
            far.close()
            await until(lambda: heard, 5, "the hang-up")
            assert set(heard) == {"new"}
            watch.remove(near)


# --- what has arrived, and answers -------------------------------------------------------------


@both
async def test_watch_tells_of_bytes_and_of_the_end(watch_kind: str) -> None:
    with ends() as (near, far), watching() as watch:
        heard: list[bytes] = []

        def read() -> None:
            with contextlib.suppress(BlockingIOError):
                while not heard or heard[-1]:
                    heard.append(near.recv(2))

        watch.readable(near, read)
        await asyncio.sleep(0.02)
        assert not heard
        far.send(b"word")
        await until(lambda: heard, 5, "the bytes")
        assert heard == [b"wo", b"rd"]
        far.close()
        await until(lambda: len(heard) == 3, 5, "the end")
        assert heard[2] == b""
        watch.remove(near)


@both
async def test_watch_tells_of_what_had_arrived_before(watch_kind: str) -> None:
    with ends() as (near, far), watching() as watch:
        far.send(b"early")
        heard: list[bytes] = []
        watch.readable(near, lambda: heard.append(near.recv(10)))
        await until(lambda: heard, 5, "the bytes")
        assert heard[0] == b"early"
        watch.remove(near)


@both
@pytest.mark.parametrize("is_refused", [False, True])
async def test_watch_tells_how_a_connect_ends(watch_kind: str, is_refused: bool) -> None:
    """The first SYN finds the backlog full; the second comes a second later."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        name = full.getsockname()
        for _ in range(4):
            stack.enter_context(tcp.open_stream(socket.AF_INET)).connect_ex(name)
        sock = stack.enter_context(tcp.open_stream(socket.AF_INET))
        watch = stack.enter_context(watching())
        tcp_dial.begin_connect(sock, name)
        heard: list[str] = []
        watch.readable(sock, lambda: heard.append("answer"))
        await asyncio.sleep(0.02)
        assert not heard
        if is_refused:
            full.close()
            await until(lambda: heard, 5, "the answer")
            with pytest.raises(ConnectionRefusedError):
                sock.recv(1)
        else:
            full.listen(100)
            full.setblocking(False)

            def greet() -> bool:
                with contextlib.suppress(BlockingIOError):
                    stack.enter_context(full.accept()[0]).send(b"hello")
                return bool(heard)

            await until(greet, 5, "the first bytes of the one that waited")
            assert sock.recv(10) == b"hello"
        watch.remove(sock)


@both
@pytest.mark.parametrize("said", [b"", b"word"])
async def test_watch_tells_the_heir_of_an_end_that_came_first(
    watch_kind: str, said: bytes
) -> None:
    """Whoever reads the last bytes passes the connection on: its end has been told already."""
    with ends() as (near, far), watching() as watch:
        heard: list[str] = []

        def read() -> None:
            heard.append("read")
            assert near.recv(10) == said
            watch.hangup(near, lambda: heard.append("hangup"))

        watch.readable(near, read)
        far.send(said)
        far.close()
        await until(lambda: "hangup" in heard, 5, "the hang-up")
        assert heard[0] == "read"
        watch.remove(near)


@both
@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("is_closed", [False, True])
async def test_watch_is_released_unless_it_has_an_heir(
    watch_kind: str, is_kept: bool, is_closed: bool
) -> None:
    with ends() as (near, far), watching() as watch:
        heard: list[str] = []

        def read() -> None:
            heard.append("old")

        watch.readable(near, read)
        number = near.fileno()
        if is_kept:
            watch.hangup(near, lambda: heard.append("new"))
        elif is_closed:
            near.close()
        watch.release(number, read)
        watch.release(number, read)
        assert len(watch) == is_kept
        far.close()
        await asyncio.sleep(0.02)
        assert set(heard) == ({"new"} if is_kept else set())
        watch.remove(near)


@both
async def test_watch_for_one_thing_replaces_that_for_another(watch_kind: str) -> None:
    with ends() as (near, far), watching() as watch:
        heard: list[str] = []
        watch.hangup(near, lambda: heard.append("early"))
        watch.readable(near, lambda: heard.append("readable"))
        watch.hangup(near, lambda: heard.append("hangup"))
        assert len(watch) == 1
        await asyncio.sleep(0.02)
        assert not heard
        far.close()
        await until(lambda: heard, 5, "the hang-up")
        assert set(heard) == {"hangup"}
        watch.remove(near)
        assert len(watch) == 0
