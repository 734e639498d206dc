"""What the engine leans on and only the kernel can promise; each fails where a kernel differs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.kit.engine_rig import reset_on_close, tcp_pair

if not sys.platform.startswith("linux"):
    pytest.skip("these promises are Linux's", allow_module_level=True)

ALL = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
SOON = 5.0
"""Seconds that an event on loopback may take."""


@pytest.fixture
def poller() -> Iterator[select.epoll]:
    with select.epoll() as epoll:
        yield epoll


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    outer, inner = tcp_pair()
    yield outer, inner
    outer.close()
    inner.close()


Pair = tuple[socket.socket, socket.socket]


def wait(poller: select.epoll, mask: int) -> int:
    """Collect events until one of `mask` has come; return all that came."""
    seen = 0
    while not seen & mask:
        events = poller.poll(SOON)
        assert events, f"no event for {mask:#x}, only {seen:#x}"
        for _, event in events:
            seen |= event
    return seen


def test_adding_a_ready_socket_is_an_edge(poller: select.epoll, pair: Pair) -> None:
    """Hence no extra look at admission: early data and an early end come as events."""
    outer, inner = pair
    outer.send(b"early")
    outer.shutdown(socket.SHUT_WR)
    select.select([inner], [], [], SOON)
    poller.register(inner, ALL)
    seen = wait(poller, select.EPOLLRDHUP)
    assert seen & select.EPOLLIN
    assert seen & select.EPOLLOUT


def test_data_after_a_short_read_is_an_edge(poller: select.epoll, pair: Pair) -> None:
    """Hence no second recv just to hear EAGAIN."""
    outer, inner = pair
    poller.register(inner, ALL)
    for word in (b"one", b"two", b"three"):
        outer.send(word)
        wait(poller, select.EPOLLIN)
        assert inner.recv(100) == word
    outer.shutdown(socket.SHUT_WR)
    wait(poller, select.EPOLLRDHUP)
    assert inner.recv(100) == b""


def test_room_after_a_short_write_is_an_edge(poller: select.epoll, pair: Pair) -> None:
    outer, inner = pair
    poller.register(inner, ALL)
    wait(poller, select.EPOLLOUT)
    block = bytes(1 << 20)
    while inner.send(block) == len(block):
        pass
    outer.setblocking(True)
    outer.settimeout(SOON)
    outer.recv(1 << 20)
    left = 64 << 20
    while left > 0:
        if any(event & select.EPOLLOUT for _, event in poller.poll(0)):
            return
        left -= len(outer.recv(1 << 20))
    raise AssertionError("no EPOLLOUT though the peer has read everything")


def test_reset_is_an_error_event_whatever_waits_to_be_read(
    poller: select.epoll, pair: Pair
) -> None:
    outer, inner = pair
    poller.register(inner, ALL)
    outer.send(b"unread")
    reset_on_close(outer)
    outer.close()
    wait(poller, select.EPOLLERR)
    assert inner.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


def test_recv_stops_at_the_urgent_mark_and_epoll_tells(poller: select.epoll, pair: Pair) -> None:
    outer, inner = pair
    poller.register(inner, ALL)
    outer.send(b"before")
    outer.send(b"!", socket.MSG_OOB)
    outer.send(b"after")
    wait(poller, select.EPOLLPRI)
    assert inner.recv(100) == b"before"
    assert inner.recv(100) == b"after"


def test_peeked_bytes_stay(pair: Pair) -> None:
    outer, inner = pair
    outer.send(b"stay")
    select.select([inner], [], [], SOON)
    assert inner.recv(100, socket.MSG_PEEK) == b"stay"
    assert inner.recv(2) == b"st"
    assert inner.recv(100) == b"ay"


def test_every_ring_of_an_eventfd_is_an_edge(poller: select.epoll) -> None:
    """Hence the wake-up descriptor need not be read."""
    bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    poller.register(bell, select.EPOLLIN | select.EPOLLET)
    for _ in range(3):
        os.eventfd_write(bell, 1)
        assert poller.poll(SOON)
        assert not poller.poll(0)
    os.close(bell)


def test_linger_zero_resets(pair: Pair) -> None:
    outer, inner = pair
    reset_on_close(inner)
    inner.close()
    outer.settimeout(SOON)
    with pytest.raises(ConnectionResetError):
        outer.recv(1)


def test_c21_a_process_that_is_killed_resets_what_is_armed(pair: Pair) -> None:
    """Hence sockets are armed at birth: nobody is there to do it later."""
    outer, inner = pair
    reset_on_close(inner)
    heir = subprocess.Popen(["sleep", "60"], pass_fds=[inner.fileno()])
    try:
        inner.close()
        with pytest.raises(BlockingIOError):
            outer.recv(1)
    finally:
        heir.kill()
        heir.wait()
    outer.settimeout(SOON)
    with pytest.raises(ConnectionResetError):
        outer.recv(1)


def test_c21_a_listening_socket_hands_linger_on() -> None:
    """Hence what is accepted is armed without a call; also what nobody has accepted yet."""
    with socket.socket() as listener, socket.socket() as caller, socket.socket() as other:
        reset_on_close(listener)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for sock in (caller, other):
            sock.settimeout(SOON)
            sock.connect(listener.getsockname())
        listener.accept()[0].close()
        listener.close()
        for sock in (caller, other):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)


def test_c21_disarmed_the_last_words_arrive(pair: Pair) -> None:
    outer, inner = pair
    reset_on_close(inner)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += inner.send(bytes(65536))
    inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
    inner.close()
    outer.settimeout(SOON)
    got = 0
    while data := outer.recv(65536):
        got += len(data)
    assert got == sent


@pytest.mark.skipif(not hasattr(os, "splice"), reason="this Python has no os.splice")
def test_splice_tells_empty_from_end(pair: Pair) -> None:
    """Filling an empty pipe: EAGAIN is an empty socket, 0 is the end of the stream."""
    outer, inner = pair
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 18)
    try:
        with pytest.raises(BlockingIOError):
            os.splice(inner.fileno(), writer, 1 << 18, flags=os.SPLICE_F_NONBLOCK)
        outer.send(b"bytes")
        select.select([inner], [], [], SOON)
        assert os.splice(inner.fileno(), writer, 1 << 18, flags=os.SPLICE_F_NONBLOCK) == 5
        assert os.read(reader, 100) == b"bytes"
        outer.shutdown(socket.SHUT_WR)
        select.select([inner], [], [], SOON)
        assert os.splice(inner.fileno(), writer, 1 << 18, flags=os.SPLICE_F_NONBLOCK) == 0
    finally:
        os.close(reader)
        os.close(writer)
