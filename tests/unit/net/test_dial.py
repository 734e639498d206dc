"""tcp_dial.dial: names, several addresses with several fates, time limits."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from tests.kit.engines import both
from tests.kit.tcp_ends import Hearer, closing, listening, needs_ipv6, teach
from tests.kit.timing import free_port, until, within

from nodepass.errors import DialError, ListenError
from nodepass.net import resolver, tcp, tcp_dial
from nodepass.net.listener import Listener, listen

# --- helpers -------------------------------------------------------------------------------------


@contextlib.contextmanager
def black_hole(host: str, port: int = 0) -> Iterator[int]:
    """Open a port that neither accepts nor refuses: its backlog is full. Yields the number."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind((host, port or free_port(host)))
        full.listen(0)
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(full.getsockname())
        yield full.getsockname()[1]


# --- dial ----------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
async def test_dial_an_address(host: str) -> None:
    with listening(host) as target, await tcp_dial.dial(host, target.getsockname()[1], 5) as sock:
        assert sock.getpeername() == target.getsockname()


@both
async def test_dial_no_host_is_this_machine() -> None:
    with listening() as target, await tcp_dial.dial("", target.getsockname()[1], 5) as sock:
        assert sock.getpeername() == target.getsockname()


@both
async def test_dial_resolves_afresh_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening("127.0.0.1") as one:
        port = one.getsockname()[1]
        with listening("127.0.0.2", port):
            for host in ("127.0.0.1", "127.0.0.2"):
                teach(monkeypatch, moving=[host])
                with await tcp_dial.dial("moving", port, 5) as sock:
                    assert sock.getpeername() == (host, port)


@both
async def test_dial_does_not_wait_for_an_address_that_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teach(monkeypatch, split=["127.0.0.2", "127.0.0.3", "127.0.0.1"])
    with black_hole("127.0.0.2") as port, black_hole("127.0.0.3", port), listening(port=port):
        async with within(10):
            with await tcp_dial.dial("split", port, 30) as sock:
                assert sock.getpeername() == ("127.0.0.1", port)


@both
async def test_dial_goes_on_at_once_behind_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_dial, "HAPPY_DELAY", 60.0)
    teach(monkeypatch, split=["127.0.0.2", "127.0.0.1"])
    with listening() as target:
        port = target.getsockname()[1]
        async with within(10):
            with await tcp_dial.dial("split", port, 30) as sock:
                assert sock.getpeername() == ("127.0.0.1", port)


@both
async def test_dial_takes_turns_between_the_families(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    async def refuse(_: socket.socket, address: tuple[str, int]) -> None:
        tried.append(address[0])
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"attempt {len(tried)}")

    teach(monkeypatch, many=["::1", "::2", "::3", "127.0.0.1"])
    monkeypatch.setattr(tcp_dial, "connect", refuse)
    with pytest.raises(DialError) as caught:
        await tcp_dial.dial("many", 80, 5)
    assert tried == ["::1", "127.0.0.1", "::2", "::3"]
    assert caught.value.errno == errno.ECONNREFUSED
    assert caught.value.attempts == 4
    assert caught.value.address == "many:80"


@both
async def test_dial_keeps_one_of_two_that_answer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leak guard sees to it that the other one is closed."""
    connect, gate, arrived = tcp_dial.connect, asyncio.Event(), 0

    async def hold(sock: socket.socket, address: tuple[str, int]) -> None:
        nonlocal arrived
        await connect(sock, address)
        arrived += 1
        if arrived == 2:
            gate.set()
        await gate.wait()

    monkeypatch.setattr(tcp_dial, "HAPPY_DELAY", 0.01)
    monkeypatch.setattr(tcp_dial, "connect", hold)
    teach(monkeypatch, two=["127.0.0.1", "127.0.0.2"])
    with (
        listening("0.0.0.0") as target,
        await tcp_dial.dial("two", target.getsockname()[1], 5) as sock,
    ):
        assert sock.getpeername()[0] in ("127.0.0.1", "127.0.0.2")
        assert arrived == 2


@both
async def test_dial_that_gets_one_refused_and_one_connected_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connect, gate, arrived = tcp_dial.connect, asyncio.Event(), 0

    async def hold(sock: socket.socket, address: tuple[str, int]) -> None:
        nonlocal arrived
        arrived += 1
        if arrived == 2:
            gate.set()
        await gate.wait()
        await connect(sock, address)

    monkeypatch.setattr(tcp_dial, "HAPPY_DELAY", 0.01)
    monkeypatch.setattr(tcp_dial, "connect", hold)
    teach(monkeypatch, two=["127.0.0.2", "127.0.0.1"])
    with listening() as target, await tcp_dial.dial("two", target.getsockname()[1], 5) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"


@both
async def test_dial_waits_for_a_slow_address_when_the_last_one_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connect, refused = tcp_dial.connect, asyncio.Event()

    async def hold(sock: socket.socket, address: tuple[str, int]) -> None:
        if address[0] == "127.0.0.1":
            await refused.wait()
            await asyncio.sleep(0.02)
        try:
            await connect(sock, address)
        finally:
            refused.set()

    monkeypatch.setattr(tcp_dial, "HAPPY_DELAY", 0.01)
    monkeypatch.setattr(tcp_dial, "connect", hold)
    teach(monkeypatch, two=["127.0.0.1", "127.0.0.2"])
    with listening() as target, await tcp_dial.dial("two", target.getsockname()[1], 5) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"


@both
async def test_dial_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch, empty=[])
    with pytest.raises(DialError, match="does not resolve") as caught:
        await tcp_dial.dial("nowhere", 80, 5)
    assert (caught.value.errno, caught.value.attempts) == (errno.EHOSTUNREACH, 0)
    with pytest.raises(DialError) as caught:
        await tcp_dial.dial("empty", 80, 5)
    assert (caught.value.errno, caught.value.attempts) == (errno.EHOSTUNREACH, 0)


@both
async def test_dial_refused() -> None:
    with pytest.raises(DialError) as caught:
        await tcp_dial.dial("127.0.0.1", free_port(), 5)
    assert (caught.value.errno, caught.value.attempts) == (errno.ECONNREFUSED, 1)


@both
@pytest.mark.parametrize("is_refused", [False, True])
async def test_dial_whose_answer_takes_a_while(is_refused: bool) -> None:
    """Nothing is said to the first SYN; the second, a second later, has its answer."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(listening())
        full.listen(0)
        name = full.getsockname()
        early = [stack.enter_context(socket.socket()) for _ in range(4)]
        for caller in early:
            caller.setblocking(False)
            caller.connect_ex(name)
        dialling = asyncio.create_task(tcp_dial.dial("127.0.0.1", name[1], 10))
        await asyncio.sleep(0.1)
        assert not dialling.done()
        if is_refused:
            full.close()
            with pytest.raises(DialError) as caught:
                await dialling
            assert caught.value.errno == errno.ECONNREFUSED
        else:
            full.listen(100)
            with await dialling as sock:
                assert sock.getpeername() == name


@both
@pytest.mark.parametrize("host", ["127.0.0.2", "holes"])
async def test_dial_ends_in_time(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(tcp_dial, "HAPPY_DELAY", 0.01)
    teach(monkeypatch, holes=["127.0.0.2", "127.0.0.3"])
    with black_hole("127.0.0.2") as port, black_hole("127.0.0.3", port):
        async with within(10):
            with pytest.raises(DialError, match="timed out") as caught:
                await tcp_dial.dial(host, port, 0.1)
    assert caught.value.errno == errno.ETIMEDOUT


async def test_dial_ends_in_time_while_resolving(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), threading.Event()

    def getaddrinfo(*_: object, **__: object) -> list[object]:
        asked.set()
        answers.wait(10)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(DialError) as caught:
        await tcp_dial.dial("slow", 80, 0.02)
    assert asked.is_set()
    answers.set()
    assert (caught.value.errno, caught.value.attempts) == (errno.ETIMEDOUT, 0)


@pytest.mark.parametrize(
    ("fault", "code"),
    [(TimeoutError(errno.ETIMEDOUT, "kernel"), errno.ETIMEDOUT), (OSError("odd"), errno.EIO)],
)
async def test_dial_translates_what_the_kernel_says(
    monkeypatch: pytest.MonkeyPatch, fault: OSError, code: int
) -> None:
    async def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(tcp_dial, "connect", fail)
    with pytest.raises(DialError) as caught:
        await tcp_dial.dial("127.0.0.1", 80, 5)
    assert caught.value.errno == code


@both
async def test_dial_never_talks_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = tcp_dial.connect

    async def connect_from_there(sock: socket.socket, address: tuple[str, int]) -> None:
        # What the kernel does once in a while: it picks the wanted port as our own.
        sock.bind(address)
        await connect(sock, address)

    monkeypatch.setattr(tcp_dial, "connect", connect_from_there)
    with pytest.raises(DialError) as caught:
        await tcp_dial.dial("127.0.0.1", free_port(), 5)
    assert caught.value.errno == errno.ECONNREFUSED


@both
@pytest.mark.parametrize("host", ["127.0.0.2", "holes"])
async def test_dial_cancelled_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(tcp_dial, "HAPPY_DELAY", 0.01)
    teach(monkeypatch, holes=["127.0.0.2", "127.0.0.3"])
    with black_hole("127.0.0.2") as port, black_hole("127.0.0.3", port):
        dialling = asyncio.create_task(tcp_dial.dial(host, port, 30))
        await asyncio.sleep(0.05)
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling


@both
@pytest.mark.parametrize("turns", range(5))
async def test_dial_cancelled_with_a_connection_in_hand(
    monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """At whichever turn around the success the cancellation comes, nothing stays open."""
    connect, gate, connected = tcp_dial.connect, asyncio.Event(), asyncio.Event()

    async def hold(sock: socket.socket, address: tuple[str, int]) -> None:
        await connect(sock, address)
        connected.set()
        await gate.wait()

    monkeypatch.setattr(tcp_dial, "connect", hold)
    teach(monkeypatch, two=["127.0.0.1", "127.0.0.2"])
    with listening("0.0.0.0") as target:
        dialling = asyncio.create_task(tcp_dial.dial("two", target.getsockname()[1], 5))
        async with within(5):
            await connected.wait()
        gate.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        dialling.cancel()
        await asyncio.wait({dialling})
        if not dialling.cancelled():
            dialling.result().close()


@pytest.mark.parametrize(
    ("host", "is_far"),
    [("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("192.0.2.1", True), ("", True)],
)
def test_keepalive_where_a_peer_may_vanish(host: str, is_far: bool) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with tcp.open_stream(family, host) as sock:
        assert not sock.getblocking()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is is_far
        if is_far:
            idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            assert idle == tcp.KEEPALIVE_IDLE


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
    assert resolver.literal(host, 9) == wanted


def test_literal_with_a_zone() -> None:
    zone = socket.if_nametoindex("lo")
    assert resolver.literal("fe80::1%lo", 9) == (socket.AF_INET6, ("fe80::1", 9, 0, zone))


# --- several addresses, several fates ------------------------------------------------------------


ABSENT = "192.0.2.77"
"""An address that is nobody's: RFC 5737."""


async def test_c5_what_this_machine_has_is_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch, both=[ABSENT, "127.0.0.1"], mixed=["2001:db8::77", "127.0.0.2"])
    for name, here, missing in (("both", "127.0.0.1", ABSENT), ("mixed", "127.0.0.2", "2001")):
        told: list[str] = []
        with closing(await listen(name, 0, told.append)) as socks:
            assert [sock.getsockname()[0] for sock in socks] == [here]
        assert len(told) == 1
        assert told[0].startswith(missing)


async def test_c5_a_machine_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the family itself is missing."""
    teach(monkeypatch, localhost=["::1", "127.0.0.1"])
    real = socket.socket.__init__

    def refuse(self: socket.socket, family: int = -1, *args: int, **more: int) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        real(self, family, *args, **more)

    monkeypatch.setattr(socket.socket, "__init__", refuse)
    told: list[str] = []
    with closing(await listen("localhost", 0, told.append)) as socks:
        assert [sock.getsockname()[0] for sock in socks] == ["127.0.0.1"]
    assert told == ["::1"]


async def test_c5_without_any_address_the_error_names_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teach(monkeypatch, absent=[ABSENT, "192.0.2.78"])
    told: list[str] = []
    with pytest.raises(ListenError, match="this machine has no such address") as caught:
        await listen("absent", 80, told.append)
    assert f"absent:80 ({ABSENT}, 192.0.2.78)" in str(caught.value)
    assert told == []


async def test_c5_an_address_in_use_ends_the_start_and_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teach(monkeypatch, twice=["127.0.0.2", "127.0.0.1"])
    with listening() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match="in use") as caught:
            await listen("twice", port)
    assert f"twice:{port} (127.0.0.1:{port})" in str(caught.value)


def fates(monkeypatch: pytest.MonkeyPatch, **of: int) -> None:
    """Let each address of the name "some" fail at once with an errno, or never (0)."""
    hosts = {f"127.0.0.{place}": code for place, code in enumerate(of.values(), 1)}
    teach(monkeypatch, some=list(hosts))

    async def connect(candidate: tuple[int, tuple[str, int]]) -> socket.socket:
        code = hosts[candidate[1][0]]
        if not code:
            await asyncio.sleep(60)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tcp_dial, "_connect", connect)


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (errno.ECONNREFUSED, errno.ENETUNREACH, errno.ECONNREFUSED),
        (errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNREFUSED),
        (errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ETIMEDOUT),
        (errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNREFUSED),
        (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTUNREACH),
        (errno.EMFILE, errno.ECONNREFUSED, errno.EMFILE),
        (errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.ENETUNREACH),
    ],
)
async def test_c7_the_most_telling_failure_is_reported(
    monkeypatch: pytest.MonkeyPatch, first: int, second: int, winner: int
) -> None:
    fates(monkeypatch, a=first, b=second)
    with pytest.raises(DialError) as caught:
        await tcp_dial.dial("some", 80, 5)
    assert caught.value.errno == winner
    assert caught.value.attempts == 2
    for code, host in ((first, "127.0.0.1"), (second, "127.0.0.2")):
        assert f"{os.strerror(code).lower()} ({host})" in str(caught.value)
    text = str(caught.value)
    assert text.index(os.strerror(winner).lower()) == text.index(": ") + 2, "it comes first"


async def test_c7_a_refusal_is_not_forgotten_when_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fates(monkeypatch, a=errno.ECONNREFUSED, b=0)
    with pytest.raises(
        DialError, match=r"refused .127\.0\.0\.1., .*timed out .127\.0\.0\.2."
    ) as caught:
        await tcp_dial.dial("some", 80, 0.3)
    assert caught.value.errno == errno.ECONNREFUSED


async def test_c7_one_failure_of_all_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fates(monkeypatch, a=errno.ECONNREFUSED, b=errno.ECONNREFUSED)
    with pytest.raises(DialError) as caught:
        await tcp_dial.dial("some", 80, 5)
    assert str(caught.value) == "cannot reach some:80: connection refused"


async def test_c29_a_listener_without_room_in_the_kernel_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ENOSPC of epoll_ctl(2): fs.epoll.max_user_watches."""
    loop = asyncio.get_running_loop()
    real, failures = loop.add_reader, [errno.ENOSPC, errno.ENOMEM]

    def add_reader(fd: int, callback: Callable[..., object], *args: object) -> None:
        if failures:
            code = failures.pop()
            raise OSError(code, os.strerror(code))
        real(fd, callback, *args)

    monkeypatch.setattr(loop, "add_reader", add_reader)
    with closing(await listen("127.0.0.1", 0)) as socks, Hearer() as hearer:
        listener = Listener(socks, hearer.accept, hearer.complain)
        listener.resume()
        with await tcp_dial.dial(*listener.address, 5):
            await until(lambda: hearer.socks, 5, "a connection in spite of that")
        assert [exc.errno for exc in hearer.complaints] == [errno.ENOMEM, errno.ENOSPC]
        listener.close()


# --- room in the kernel --------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="there is no epoll here")
def test_c29_room_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def register(self, *_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    def no_descriptor() -> Full:
        raise OSError(errno.EMFILE, "Too many open files")

    with socket.socket() as sock:
        tcp.check_room(sock)
        monkeypatch.setattr(select, "epoll", no_descriptor)
        tcp.check_room(sock)  # to watch takes none
        monkeypatch.setattr(select, "epoll", Full)
        with pytest.raises(OSError, match="No space left"):
            tcp.check_room(sock)
