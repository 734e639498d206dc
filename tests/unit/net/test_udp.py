"""datagram: UDP sockets are bound and connected as the rules say, and links are tuned for them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator

import pytest
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both
from tests.kit.tcp_ends import teach
from tests.kit.timing import free_port, has_ipv6

from nodepass.errors import DialError, ListenError
from nodepass.net import udp
from nodepass.net.resolver import SocketAddress

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")

FORCED = {33: socket.SO_RCVBUF, 32: socket.SO_SNDBUF}
"""SO_RCVBUFFORCE and SO_SNDBUFFORCE, each with what it does without privileges."""

NO_ROUTE = "255.255.255.255"
"""A socket that has not asked for broadcasts must not be connected to it."""


# --- helpers -----------------------------------------------------------------------------------


class Recorded(socket.socket):
    """A socket whose options are written down; some it cannot set."""

    asked: list[tuple[int, object]]
    refused: frozenset[int] = frozenset()

    def setsockopt(self, level: int, option: int, value: object, *rest: object) -> None:
        if level == socket.SOL_SOCKET:
            self.asked.append((option, value))
            if option in self.refused:
                raise PermissionError(errno.EPERM, "Operation not permitted")
        super().setsockopt(level, option, value, *rest)  # type: ignore[call-overload]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """The class of all sockets that a test makes."""

    class Here(Recorded):
        pass

    Here.asked = []

    monkeypatch.setattr(socket, "socket", Here)
    return Here


@contextlib.contextmanager
def closing(*socks: socket.socket) -> Iterator[list[socket.socket]]:
    try:
        yield list(socks)
    finally:
        for sock in socks:
            sock.close()


def bound(host: str, port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    return sock


def hears(sock: socket.socket, host: str, port: int) -> bool:
    """Tell whether a datagram that is sent there comes out of this socket."""
    sock.settimeout(5)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as visitor:
        visitor.connect((host, port))
        visitor.send(b"x")
        data, address = sock.recvfrom(10)
        return data == b"x" and address[1] == visitor.getsockname()[1]


# --- listen ------------------------------------------------------------------------------------


@both
async def test_listen_binds_a_bare_socket_that_nobody_waits_for() -> None:
    port = free_port()
    with closing(*await udp.listen("127.0.0.1", port)) as (sock,):
        assert (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_DGRAM)
        assert sock.getsockname() == ("127.0.0.1", port)
        assert not sock.getblocking()
        assert hears(sock, "127.0.0.1", port)


@both
@needs_ipv6
async def test_listen_on_every_address_is_one_dual_stack_socket() -> None:
    with closing(*await udp.listen("", 0)) as (sock,):
        assert sock.family == socket.AF_INET6
        port = sock.getsockname()[1]
        assert hears(sock, "127.0.0.1", port)
        assert hears(sock, "::1", port)


async def test_listen_on_every_address_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with closing(*await udp.listen("", 0)) as (sock,):
        assert sock.getsockname()[0] == "0.0.0.0"
        assert hears(sock, "127.0.0.1", sock.getsockname()[1])


@needs_ipv6
async def test_listen_on_one_ipv6_wildcard_leaves_ipv4_alone() -> None:
    with (
        closing(*await udp.listen("::", 0)) as (sock,),
        closing(*await udp.listen("0.0.0.0", sock.getsockname()[1])),
    ):
        pass


@both
@needs_ipv6
async def test_listen_on_a_name_binds_each_address_to_one_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teach(monkeypatch, twice=["127.0.0.1", "::1", "127.0.0.1"])
    with closing(*await udp.listen("twice", 0)) as socks:
        assert [sock.family for sock in socks] == [socket.AF_INET, socket.AF_INET6]
        assert len({sock.getsockname()[1] for sock in socks}) == 1, "one port for all"
    port = free_port()
    with closing(*await udp.listen("twice", port)) as socks:
        assert [sock.getsockname()[1] for sock in socks] == [port, port]


async def test_listen_says_what_is_in_use_and_how_to_go_without() -> None:
    with bound("127.0.0.1") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match="in use; udp=0 goes without UDP") as caught:
            await udp.listen("127.0.0.1", port)
    assert caught.value.errno == errno.EADDRINUSE
    assert caught.value.address == f"udp 127.0.0.1:{port}"
    assert f"udp 127.0.0.1:{port}" in str(caught.value)


async def test_listen_gives_back_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch, twice=["127.0.0.2", "127.0.0.1"])
    with bound("127.0.0.1") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError):
            await udp.listen("twice", port)
        bound("127.0.0.2", port).close()


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("nowhere", "udp nowhere:80: the name does not resolve"),
        ("192.0.2.1", "udp 192.0.2.1:80: this machine has no such address"),
    ],
)
async def test_listen_on_what_is_not_here(
    host: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach(monkeypatch)
    with pytest.raises(ListenError, match=re.escape(told)) as caught:
        await udp.listen(host, 80)
    assert caught.value.errno == errno.EADDRNOTAVAIL


# --- buffers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_privileged", [True, False])
async def test_buffers_beyond_the_limit_are_asked_for_and_else_up_to_it(
    recorded: type[Recorded], is_privileged: bool
) -> None:
    recorded.refused = frozenset() if is_privileged else frozenset(FORCED)
    with closing(*await udp.listen("127.0.0.1", 0)) as (gate,):
        forced = [(option, value) for option, value in recorded.asked if option in FORCED]
        plain = [(option, value) for option, value in recorded.asked if option not in FORCED]
        assert dict(forced) == dict.fromkeys(FORCED, udp.GATE_BUFFER)
        if not is_privileged:
            assert dict(plain) == dict.fromkeys(FORCED.values(), udp.GATE_BUFFER)
        recorded.asked.clear()
        sock, _ = await udp.dial("127.0.0.1", gate.getsockname()[1], 5)
        sock.close()
        asked = FORCED if is_privileged else FORCED.values()
        assert {(option, udp.TARGET_BUFFER) for option in asked} <= set(recorded.asked)


async def test_buffers_are_larger_than_what_is_usual() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as usual:
        usual.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, udp.GATE_BUFFER)
        best = usual.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    with closing(*await udp.listen("127.0.0.1", 0)) as (gate,):
        assert gate.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= best


# --- dial --------------------------------------------------------------------------------------


@both
async def test_dial_connects_a_bare_socket() -> None:
    with bound("127.0.0.1") as target:
        port = target.getsockname()[1]
        sock, address = await udp.dial("127.0.0.1", port, 5)
        with sock:
            assert address == ("127.0.0.1", port) == sock.getpeername()
            assert sock.type == socket.SOCK_DGRAM
            assert not sock.getblocking()
            sock.send(b"question")
            assert target.recvfrom(100) == (b"question", sock.getsockname())


@both
@needs_ipv6
async def test_dial_takes_ipv4_first(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch, service=["::1", "127.0.0.1"], six=["::1"])
    sock, address = await udp.dial("service", 9, 5)
    sock.close()
    assert address == ("127.0.0.1", 9)
    sock, address = await udp.dial("six", 9, 5)
    sock.close()
    assert address == ("::1", 9, 0, 0)
    assert sock.family == socket.AF_INET6


async def test_dial_of_no_host_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch, localhost=["127.0.0.1"])
    sock, address = await udp.dial("", 9, 5)
    sock.close()
    assert address == ("127.0.0.1", 9)


async def test_dial_takes_what_is_avoided_last(monkeypatch: pytest.MonkeyPatch) -> None:
    one: SocketAddress = ("127.0.0.1", 9)
    two: SocketAddress = ("127.0.0.2", 9)
    six: SocketAddress = ("::1", 9, 0, 0)
    teach(monkeypatch, service=["127.0.0.1", "127.0.0.2"], mixed=["127.0.0.1", "::1"])
    for name, avoid, expected in (
        ("service", {one}, two),
        ("service", {two}, one),
        ("service", {one, two}, one),
        *([("mixed", {one}, six)] if has_ipv6() else []),
        ("127.0.0.1", {one}, one),
    ):
        sock, address = await udp.dial(name, 9, 5, avoid)
        sock.close()
        assert address == expected, (name, avoid)


async def test_dial_goes_on_to_an_address_that_has_a_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teach(monkeypatch, service=[NO_ROUTE, "127.0.0.1"])
    sock, address = await udp.dial("service", 9, 5)
    sock.close()
    assert address == ("127.0.0.1", 9)


@pytest.mark.parametrize(
    ("code", "expected"),
    [(errno.ENETUNREACH, errno.ENETUNREACH), (errno.EMFILE, errno.EMFILE), (-1, errno.EIO)],
)
async def test_dial_says_why_no_address_can_be_had(
    code: int, expected: int, recorded: type[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Recorded, address: object) -> None:
        raise OSError(code, "as it happens") if code > 0 else OSError("as it happens")

    teach(monkeypatch, service=["127.0.0.1", "127.0.0.2"])
    monkeypatch.setattr(recorded, "connect", fail)
    with pytest.raises(
        DialError, match=f"udp service:9: {os.strerror(expected).lower()}"
    ) as caught:
        await udp.dial("service", 9, 5)
    assert (caught.value.errno, caught.value.attempts) == (expected, 2)


async def test_dial_of_a_name_without_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    with pytest.raises(DialError) as caught:
        await udp.dial("empty", 9, 5)
    assert (caught.value.errno, caught.value.attempts) == (errno.EHOSTUNREACH, 0)


async def test_dial_of_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch)
    with pytest.raises(DialError, match="udp nowhere:9: the name does not resolve") as caught:
        await udp.dial("nowhere", 9, 5)
    assert (caught.value.errno, caught.value.attempts) == (errno.EHOSTUNREACH, 0)


@both
async def test_dial_ends_in_time_while_resolving(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), threading.Event()

    def getaddrinfo(*_: object, **__: object) -> list[object]:
        asked.set()
        answers.wait(10)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(DialError, match="lookup took longer") as caught:
        await udp.dial("slow", 9, 0.02)
    assert asked.wait(5)
    answers.set()
    assert (caught.value.errno, caught.value.attempts) == (errno.ETIMEDOUT, 0)


def test_buffers_elsewhere_are_asked_for_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS 32 is SO_BROADCAST, and a size beyond the limit is refused instead of cut."""
    monkeypatch.setattr("sys.platform", "darwin")
    with Recorded(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.asked = []
        sock.refused = frozenset({socket.SO_RCVBUF})
        udp._set_buffers(sock, udp.GATE_BUFFER)
        assert [option for option, _ in sock.asked] == [socket.SO_RCVBUF, socket.SO_SNDBUF]


# --- links -------------------------------------------------------------------------------------


def test_link_that_carries_datagrams_holds_few_and_not_for_long() -> None:
    near, far = tcp_pair()
    with closing(near, far):
        udp.tune_link(near, 7.5)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7500
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            held = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
            assert held == udp.UNSENT_LINK


def test_link_is_tuned_as_far_as_the_platform_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("TCP_NOTSENT_LOWAT", "TCP_USER_TIMEOUT"):
        monkeypatch.delattr(socket, option, raising=False)
    near, far = tcp_pair()
    with closing(near, far):
        udp.tune_link(near, 7.5)


def test_link_that_has_died_cannot_be_tuned() -> None:
    near, far = tcp_pair()
    near.close()
    with closing(far), pytest.raises(OSError, match="Bad file descriptor"):
        udp.tune_link(near, 7.5)


@pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux")
async def test_c13_routers_may_cut_what_leaves() -> None:
    """Nobody knows whether its sender has forbidden it, and a path may filter what tells."""
    ip_mtu_discover = 10
    for host in ("127.0.0.1", "::1", ""):
        if host == "::1" and not has_ipv6():
            continue
        for sock in await udp.listen(host, 0):
            with sock:
                assert sock.getsockopt(socket.IPPROTO_IP, ip_mtu_discover) == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as there:
        there.bind(("127.0.0.1", 0))
        sock, _ = await udp.dial("127.0.0.1", there.getsockname()[1], 1.0)
        with sock:
            assert sock.getsockopt(socket.IPPROTO_IP, ip_mtu_discover) == 0
