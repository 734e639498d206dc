"""net: listening, dialling, and accept back-off, on real loopback sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import resource
import select
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tests.kit.engine_rig import tcp_pair
from tests.kit.timing import free_port, until, within

import nodepass
from nodepass.errors import DialError, ListenError
from nodepass.net import tcp
from nodepass.net.listener import ACCEPT_BATCH, BACKLOG, Listener, listen

both = pytest.mark.loops("asyncio", "uvloop")

NO_IPV6 = not socket.has_ipv6
needs_ipv6 = pytest.mark.skipif(NO_IPV6, reason="this machine has no IPv6")


# --- helpers -----------------------------------------------------------------------------------


def teach(monkeypatch: pytest.MonkeyPatch, **names: Sequence[str]) -> None:
    """Make the system resolve these names, and no others; addresses stay what they are."""

    def getaddrinfo(host: str, port: int, *_: object, **__: object) -> list[object]:
        if host not in names and not re.fullmatch(r"[0-9.]+|[0-9a-f:]*:[0-9a-f:]*", host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found: list[object] = []
        for address in names.get(host, [host]):
            if ":" in address:
                found.append((socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0)))
            else:
                found.append((socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)))
        return found

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


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


@contextlib.contextmanager
def listening(host: str = "127.0.0.1", port: int = 0) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port or free_port("0.0.0.0" if ":" not in host else host)))
        sock.listen(100)
        yield sock


@contextlib.contextmanager
def closing(socks: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


@contextlib.contextmanager
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = tcp_pair()
    with near, far:
        yield near, far


class Hearer:
    """Keeps what a Listener hands over, and what it complains of."""

    def __init__(self) -> None:
        self.socks: list[socket.socket] = []
        self.peers: list[tuple[str, int]] = []
        self.complaints: list[OSError] = []

    def accept(self, sock: socket.socket, host: str, port: int) -> None:
        self.socks.append(sock)
        self.peers.append((host, port))

    def complain(self, exc: OSError) -> None:
        self.complaints.append(exc)

    def __enter__(self) -> Hearer:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.socks:
            sock.close()


class Faulty(socket.socket):
    """A listening socket whose next accepts fail."""

    faults: list[int]

    def accept(self) -> tuple[socket.socket, object]:
        if self.faults:
            code = self.faults.pop(0)
            raise OSError(code, os.strerror(code))
        return super().accept()


def faulty(*faults: int) -> Faulty:
    sock = Faulty()
    sock.faults = list(faults)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", 0))
    sock.listen(100)
    return sock


# --- small things ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1:80"),
        ("::1", "[::1]:80"),
        ("example.org", "example.org:80"),
        ("xn--strae-oqa.example", "straße.example:80"),
    ],
)
def test_join_address(host: str, shown: str) -> None:
    assert tcp.join_address(host, 80) == shown


@pytest.mark.parametrize(
    ("host", "plain"),
    [("::ffff:10.0.0.1", "10.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("::ffff:1", "::ffff:1")],
)
def test_plain_host(host: str, plain: str) -> None:
    assert tcp.plain_host(host) == plain


def test_tune_sets_what_every_leg_has() -> None:
    with ends() as (near, _):
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        tcp.tune(near)
        assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            idle = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            assert idle == tcp.KEEPALIVE_IDLE


def test_tune_where_keepalive_has_no_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"):
        monkeypatch.delattr(socket, name, raising=False)
    monkeypatch.setattr(tcp, "_TUNING", tcp._tuning())
    with ends() as (near, _):
        tcp.tune(near)
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
@pytest.mark.parametrize(("seconds", "milliseconds"), [(1.5, 1500), (0.0, 1)])
def test_limit_silence(seconds: float, milliseconds: int) -> None:
    with ends() as (near, _):
        tcp.limit_silence(near, seconds)
        set_to = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert set_to == milliseconds


def test_limit_silence_elsewhere_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
    with ends() as (near, _):
        tcp.limit_silence(near, 1.0)


def test_reset_is_no_clean_end() -> None:
    with ends() as (near, far):
        tcp.reset(near)
        far.setblocking(True)
        with pytest.raises(ConnectionResetError):
            far.recv(100)
    tcp.reset(near)  # a closed one is harmless


def is_armed(sock: socket.socket) -> bool:
    """Tell whether closing a socket resets it, whoever does it."""
    value = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
    return struct.unpack("ii", value) == (1, 0)


def test_c21_finish_lets_the_last_words_arrive() -> None:
    with ends() as (near, far):
        tcp.arm(near)
        near.send(b"refuse://auth\n")
        tcp.finish(near)
        far.settimeout(5)
        assert far.recv(100) == b"refuse://auth\n"
        assert far.recv(100) == b""
    tcp.finish(near)  # a closed one is harmless


def test_has_ended() -> None:
    with ends() as (near, far):
        assert not tcp.has_ended(near)
        far.send(b"x")
        assert select.select([near], [], [], 5)[0]
        assert not tcp.has_ended(near)
        assert near.recv(10) == b"x", "the byte is still there"
        far.close()
        assert select.select([near], [], [], 5)[0]
        assert tcp.has_ended(near)


def test_has_ended_by_reset() -> None:
    with ends() as (near, far):
        tcp.reset(far)
        assert select.select([near], [], [], 5)[0]
        assert tcp.has_ended(near)


@pytest.mark.parametrize("how", ["quiet", "bytes", "end", "reset", "reset behind bytes"])
def test_is_alive_unless_reset(how: str) -> None:
    """A half-closed peer may still want an answer; bytes hide a reset until they are read."""
    with ends() as (near, far):
        if "bytes" in how:
            far.send(b"x")
            assert select.select([near], [], [], 5)[0]
        if how == "end":
            far.shutdown(socket.SHUT_WR)
        if "reset" in how:
            tcp.reset(far)
        if how != "quiet":
            assert select.select([near], [], [], 5)[0]
        assert tcp.is_alive(near) is (how != "reset")


def test_peer_host() -> None:
    with ends() as (near, far):
        assert tcp.peer_host(near) == "127.0.0.1"
        tcp.reset(far)
        assert select.select([near], [], [], 5)[0]
        with pytest.raises(OSError, match="not connected"):
            tcp.peer_host(near)


@needs_ipv6
def test_peer_host_undoes_the_dual_stack() -> None:
    with listening("::") as target:
        with socket.create_connection(("127.0.0.1", target.getsockname()[1])):
            accepted, _ = target.accept()
        with accepted:
            assert accepted.getpeername()[0] == "::ffff:127.0.0.1"
            assert tcp.peer_host(accepted) == "127.0.0.1"


def test_peer_host_keeps_the_zone_of_a_link_local_address() -> None:
    class Scoped(socket.socket):
        def getpeername(self) -> tuple[str, int, int, int]:
            return ("fe80::1", 80, 0, socket.if_nametoindex("lo"))

    with Scoped() as sock:
        assert tcp.peer_host(sock) == "fe80::1%lo"


def test_descriptor_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert tcp.descriptor_limit() == soft
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert tcp.descriptor_limit() == tcp.UNLIMITED_DESCRIPTORS
    monkeypatch.setitem(sys.modules, "resource", None)
    assert tcp.descriptor_limit() == tcp.UNLIMITED_DESCRIPTORS


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(20_000, (1000, 500, 4976)), (1024, (348, 116, 232)), (10, (1, 1, 1))],
)
def test_share_descriptors(
    limit: int, expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "descriptor_limit", lambda: limit)
    shares = tcp.share_descriptors(1000, 500)
    assert shares == expected
    spent = shares.visitors * tcp.DESCRIPTORS_PER_VISITOR + shares.stock
    assert limit < 100 or spent < limit


def test_is_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(socket.socket):
        resends = 0

        def getsockopt(self, *_: int) -> bytes:  # type: ignore[override]
            return bytes((1, 0, self.resends, 0, 0, 0, 0, 0))

    with ends() as (near, _), Deaf() as deaf:
        assert not tcp.is_stalled(near)
        assert not tcp.is_stalled(deaf)
        deaf.resends = tcp.STALLED_RESENDS
        assert tcp.is_stalled(deaf)
        monkeypatch.delattr(socket, "TCP_INFO", raising=False)
        assert not tcp.is_stalled(deaf)


# --- listen ------------------------------------------------------------------------------------


@both
@needs_ipv6
async def test_listen_on_every_address_is_one_dual_stack_socket() -> None:
    with closing(await listen("", 0)) as socks, Hearer() as hearer:
        assert [sock.family for sock in socks] == [socket.AF_INET6]
        listener = Listener(socks, hearer.accept, hearer.complain)
        listener.resume()
        for host in ("127.0.0.1", "::1"):
            (await tcp.dial(host, listener.address[1], 5)).close()
        await until(lambda: len(hearer.peers) == 2, 5, "both connections")
        assert [host for host, _ in hearer.peers] == ["127.0.0.1", "::1"]
        listener.close()


async def test_listen_on_every_address_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with closing(await listen("", 0)) as socks:
        assert [sock.family for sock in socks] == [socket.AF_INET]
        assert socks[0].getsockname()[0] == "0.0.0.0"


@needs_ipv6
async def test_listen_on_one_ipv6_wildcard_leaves_ipv4_alone() -> None:
    port = free_port("0.0.0.0")
    with closing(await listen("::", port)), closing(await listen("0.0.0.0", port)):
        pass


@both
@needs_ipv6
async def test_listen_on_a_name_takes_each_address_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch, twice=["127.0.0.1", "::1", "127.0.0.1"])
    with closing(await listen("twice", 0)) as socks:
        assert [sock.family for sock in socks] == [socket.AF_INET, socket.AF_INET6]
        assert len({sock.getsockname()[1] for sock in socks}) == 1, "one port for all"


async def test_listen_on_port_0_twice_gives_two_ports() -> None:
    with closing(await listen("127.0.0.1", 0) + await listen("127.0.0.1", 0)) as socks:
        assert len({sock.getsockname()[1] for sock in socks}) == 2


async def test_listen_names_an_address_in_use() -> None:
    with listening() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match="in use") as caught:
            await listen("127.0.0.1", port)
    assert caught.value.errno == errno.EADDRINUSE
    assert caught.value.address == f"127.0.0.1:{port}"


async def test_listen_gives_back_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch, twice=["127.0.0.2", "127.0.0.1"])
    with listening() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError):
            await listen("twice", port)
        with closing(await listen("127.0.0.2", port)):
            pass


async def test_listen_on_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch)
    with pytest.raises(ListenError, match="nowhere:80: the name does not resolve") as caught:
        await listen("nowhere", 80)
    assert caught.value.errno == errno.EADDRNOTAVAIL


@both
async def test_c21_every_socket_is_born_armed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a connection is for by then: a process that dies never looks like an end."""
    teach(monkeypatch, name=["127.0.0.1"])
    with closing(await listen("127.0.0.1", 0)) as socks, Hearer() as hearer:
        listener = Listener(socks, hearer.accept, hearer.complain)
        listener.resume()
        for host in ("127.0.0.1", "name"):
            with await tcp.dial(host, listener.address[1], 5) as dialled:
                assert is_armed(dialled)
        for host in ("127.0.0.1", "192.0.2.1"):
            with tcp.open_stream(socket.AF_INET, host) as fresh:
                assert is_armed(fresh)
        await until(lambda: len(hearer.socks) == 2, 5, "both connections")
        assert all(is_armed(sock) for sock in hearer.socks)
        listener.close()


async def test_what_is_accepted_is_tuned() -> None:
    with closing(await listen("127.0.0.1", 0)) as socks, Hearer() as hearer:
        assert not socks[0].getblocking()
        listener = Listener(socks, hearer.accept, hearer.complain)
        listener.resume()
        with await tcp.dial(*listener.address, 5) as dialled:
            await until(lambda: hearer.socks, 5, "the connection")
            assert hearer.peers == [dialled.getsockname()]
            for sock in (dialled, hearer.socks[0]):
                assert not sock.getblocking()
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert hearer.socks[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        listener.close()


# --- Listener ----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how long the queue may be")
async def test_c23_the_queue_of_the_kernel_has_an_end() -> None:
    (sock,) = await listen("127.0.0.1", 0)
    with sock:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    (most,) = struct.unpack_from("I", told, 28)  # tcpi_sacked, which a listener lends to this
    limit = int(Path("/proc/sys/net/core/somaxconn").read_text())
    assert most == min(BACKLOG, limit)


@both
async def test_listener_leaves_callers_in_the_queue_while_paused() -> None:
    with Hearer() as hearer, contextlib.ExitStack() as stack:
        listener = Listener(await listen("127.0.0.1", 0), hearer.accept, hearer.complain)
        stack.callback(listener.close)
        assert listener.is_paused
        stack.enter_context(await tcp.dial(*listener.address, 5))
        await asyncio.sleep(0.02)
        assert not hearer.socks
        listener.resume()
        assert not listener.is_paused
        await until(lambda: len(hearer.socks) == 1, 5, "the first")
        listener.pause()
        listener.pause()
        stack.enter_context(await tcp.dial(*listener.address, 5))
        await asyncio.sleep(0.02)
        assert len(hearer.socks) == 1
        listener.resume()
        await until(lambda: len(hearer.socks) == 2, 5, "the second")


@both
@pytest.mark.parametrize("word", ["pause", "close"])
async def test_listener_stops_in_mid_batch(word: str) -> None:
    with Hearer() as hearer, contextlib.ExitStack() as stack:

        def accept_one(sock: socket.socket, host: str, port: int) -> None:
            hearer.accept(sock, host, port)
            getattr(listener, word)()

        listener = Listener(await listen("127.0.0.1", 0), accept_one, hearer.complain)
        stack.callback(listener.close)
        for _ in range(3):
            stack.enter_context(await tcp.dial(*listener.address, 5))
        listener.resume()
        await until(lambda: hearer.socks, 5, "the first")
        await asyncio.sleep(0.02)
        assert len(hearer.socks) == 1


@both
async def test_listener_leaves_the_loop_to_others_in_a_flood() -> None:
    count = ACCEPT_BATCH + 20
    accepted_before_others = []
    with Hearer() as hearer, contextlib.ExitStack() as stack:

        def accept(sock: socket.socket, host: str, port: int) -> None:
            if not hearer.socks:
                asyncio.get_running_loop().call_soon(
                    lambda: accepted_before_others.append(len(hearer.socks))
                )
            hearer.accept(sock, host, port)

        listener = Listener(await listen("127.0.0.1", 0), accept, hearer.complain)
        stack.callback(listener.close)
        for _ in range(count):
            stack.enter_context(socket.create_connection(listener.address))
        listener.resume()
        await until(lambda: len(hearer.socks) == count, 5, "all of them")
    assert accepted_before_others[0] <= ACCEPT_BATCH


@both
async def test_listener_goes_on_behind_a_connection_that_died_in_the_queue() -> None:
    with Hearer() as hearer:
        sock = faulty(errno.ECONNABORTED, errno.EPROTO, errno.EINTR)
        listener = Listener([sock], hearer.accept, hearer.complain)
        listener.resume()
        with await tcp.dial(*listener.address, 5):
            await until(lambda: hearer.socks, 5, "the connection behind it")
        listener.close()
        assert not hearer.complaints


@both
@pytest.mark.parametrize(
    "code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL]
)
async def test_listener_backs_off_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("nodepass.net.listener.ACCEPT_PAUSE", 0.05)
    with Hearer() as hearer:
        listener = Listener([faulty(code, code)], hearer.accept, hearer.complain)
        listener.resume()
        with await tcp.dial(*listener.address, 5):
            await until(lambda: hearer.complaints, 5, "the complaint")
            assert not hearer.socks
            await until(lambda: hearer.socks, 5, "the connection")
        listener.close()
        assert [exc.errno for exc in hearer.complaints] == [code, code]


async def test_listener_stays_paused_when_the_back_off_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nodepass.net.listener.ACCEPT_PAUSE", 0.01)
    with Hearer() as hearer:
        listener = Listener([faulty(errno.EMFILE)], hearer.accept, hearer.complain)
        listener.resume()
        with await tcp.dial(*listener.address, 5):
            await until(lambda: hearer.complaints, 5, "the complaint")
            listener.pause()
            await asyncio.sleep(0.05)
            assert not hearer.socks
            listener.resume()
            await until(lambda: hearer.socks, 5, "the connection")
        listener.close()


async def test_listener_closed_while_backing_off_never_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nodepass.net.listener.ACCEPT_PAUSE", 0.01)
    with Hearer() as hearer:
        listener = Listener([faulty(errno.EMFILE)], hearer.accept, hearer.complain)
        address = listener.address
        listener.resume()
        with await tcp.dial(*address, 5):
            await until(lambda: hearer.complaints, 5, "the complaint")
            listener.close()
            listener.close()
            await asyncio.sleep(0.05)
            assert not hearer.socks
        with pytest.raises(DialError):
            await tcp.dial(*address, 5)


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_listener_out_of_descriptors_neither_ends_nor_spins() -> None:
    """A child with a low limit: EMFILE for real, then room again."""
    script = """
        import asyncio, os, resource, socket
        from nodepass.net.listener import ACCEPT_PAUSE, Listener, listen

        async def main() -> None:
            asyncio.get_running_loop().slow_callback_duration = 20  # a busy machine is no fault
            accepted, complaints = [], []
            hear = lambda sock, host, port: accepted.append(sock)
            listener = Listener(await listen("127.0.0.1", 0), hear, complaints.append)
            callers = [socket.socket() for _ in range(8)]
            used = len(os.listdir("/proc/self/fd")) - 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 3, used + 3))
            for caller in callers:
                caller.connect(listener.address)
            listener.resume()
            await asyncio.sleep(5 * ACCEPT_PAUSE)
            assert len(accepted) == 3, accepted
            assert 1 <= len(complaints) <= 6, complaints
            while len(accepted) < len(callers):
                for sock in accepted:
                    sock.close()
                await asyncio.sleep(0.01)
            listener.close()
            for sock in callers + accepted:
                sock.close()

        asyncio.run(asyncio.wait_for(main(), 20))
    """
    source = Path(next(iter(nodepass.__path__))).parent
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- dial --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
async def test_dial_an_address(host: str) -> None:
    with listening(host) as target, await tcp.dial(host, target.getsockname()[1], 5) as sock:
        assert sock.getpeername() == target.getsockname()


@both
async def test_dial_no_host_is_this_machine() -> None:
    with listening() as target, await tcp.dial("", target.getsockname()[1], 5) as sock:
        assert sock.getpeername() == target.getsockname()


@both
async def test_dial_resolves_afresh_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening("127.0.0.1") as one:
        port = one.getsockname()[1]
        with listening("127.0.0.2", port):
            for host in ("127.0.0.1", "127.0.0.2"):
                teach(monkeypatch, moving=[host])
                with await tcp.dial("moving", port, 5) as sock:
                    assert sock.getpeername() == (host, port)


@both
async def test_dial_does_not_wait_for_an_address_that_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teach(monkeypatch, split=["127.0.0.2", "127.0.0.3", "127.0.0.1"])
    with black_hole("127.0.0.2") as port, black_hole("127.0.0.3", port), listening(port=port):
        async with within(10):
            with await tcp.dial("split", port, 30) as sock:
                assert sock.getpeername() == ("127.0.0.1", port)


@both
async def test_dial_goes_on_at_once_behind_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "HAPPY_DELAY", 60.0)
    teach(monkeypatch, split=["127.0.0.2", "127.0.0.1"])
    with listening() as target:
        port = target.getsockname()[1]
        async with within(10):
            with await tcp.dial("split", port, 30) as sock:
                assert sock.getpeername() == ("127.0.0.1", port)


@both
async def test_dial_takes_turns_between_the_families(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    async def refuse(_: socket.socket, address: tuple[str, int]) -> None:
        tried.append(address[0])
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"attempt {len(tried)}")

    teach(monkeypatch, many=["::1", "::2", "::3", "127.0.0.1"])
    monkeypatch.setattr(tcp, "connect", refuse)
    with pytest.raises(DialError) as caught:
        await tcp.dial("many", 80, 5)
    assert tried == ["::1", "127.0.0.1", "::2", "::3"]
    assert caught.value.errno == errno.ECONNREFUSED
    assert caught.value.attempts == 4
    assert caught.value.address == "many:80"


@both
async def test_dial_keeps_one_of_two_that_answer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leak guard sees to it that the other one is closed."""
    connect, gate, arrived = tcp.connect, asyncio.Event(), 0

    async def hold(sock: socket.socket, address: tuple[str, int]) -> None:
        nonlocal arrived
        await connect(sock, address)
        arrived += 1
        if arrived == 2:
            gate.set()
        await gate.wait()

    monkeypatch.setattr(tcp, "HAPPY_DELAY", 0.01)
    monkeypatch.setattr(tcp, "connect", hold)
    teach(monkeypatch, two=["127.0.0.1", "127.0.0.2"])
    with listening("0.0.0.0") as target, await tcp.dial("two", target.getsockname()[1], 5) as sock:
        assert sock.getpeername()[0] in ("127.0.0.1", "127.0.0.2")
        assert arrived == 2


@both
async def test_dial_that_gets_one_refused_and_one_connected_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connect, gate, arrived = tcp.connect, asyncio.Event(), 0

    async def hold(sock: socket.socket, address: tuple[str, int]) -> None:
        nonlocal arrived
        arrived += 1
        if arrived == 2:
            gate.set()
        await gate.wait()
        await connect(sock, address)

    monkeypatch.setattr(tcp, "HAPPY_DELAY", 0.01)
    monkeypatch.setattr(tcp, "connect", hold)
    teach(monkeypatch, two=["127.0.0.2", "127.0.0.1"])
    with listening() as target, await tcp.dial("two", target.getsockname()[1], 5) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"


@both
async def test_dial_waits_for_a_slow_address_when_the_last_one_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connect, refused = tcp.connect, asyncio.Event()

    async def hold(sock: socket.socket, address: tuple[str, int]) -> None:
        if address[0] == "127.0.0.1":
            await refused.wait()
            await asyncio.sleep(0.02)
        try:
            await connect(sock, address)
        finally:
            refused.set()

    monkeypatch.setattr(tcp, "HAPPY_DELAY", 0.01)
    monkeypatch.setattr(tcp, "connect", hold)
    teach(monkeypatch, two=["127.0.0.1", "127.0.0.2"])
    with listening() as target, await tcp.dial("two", target.getsockname()[1], 5) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"


@both
async def test_dial_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    teach(monkeypatch, empty=[])
    with pytest.raises(DialError, match="does not resolve") as caught:
        await tcp.dial("nowhere", 80, 5)
    assert (caught.value.errno, caught.value.attempts) == (errno.EHOSTUNREACH, 0)
    with pytest.raises(DialError) as caught:
        await tcp.dial("empty", 80, 5)
    assert (caught.value.errno, caught.value.attempts) == (errno.EHOSTUNREACH, 0)


@both
async def test_dial_refused() -> None:
    with pytest.raises(DialError) as caught:
        await tcp.dial("127.0.0.1", free_port(), 5)
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
        dialling = asyncio.create_task(tcp.dial("127.0.0.1", name[1], 10))
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
    monkeypatch.setattr(tcp, "HAPPY_DELAY", 0.01)
    teach(monkeypatch, holes=["127.0.0.2", "127.0.0.3"])
    with black_hole("127.0.0.2") as port, black_hole("127.0.0.3", port):
        async with within(10):
            with pytest.raises(DialError, match="timed out") as caught:
                await tcp.dial(host, port, 0.1)
    assert caught.value.errno == errno.ETIMEDOUT


async def test_dial_ends_in_time_while_resolving(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = threading.Event(), threading.Event()

    def getaddrinfo(*_: object, **__: object) -> list[object]:
        asked.set()
        answers.wait(10)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(DialError) as caught:
        await tcp.dial("slow", 80, 0.02)
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

    monkeypatch.setattr(tcp, "connect", fail)
    with pytest.raises(DialError) as caught:
        await tcp.dial("127.0.0.1", 80, 5)
    assert caught.value.errno == code


@both
async def test_dial_never_talks_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = tcp.connect

    async def connect_from_there(sock: socket.socket, address: tuple[str, int]) -> None:
        # What the kernel does once in a while: it picks the wanted port as our own.
        sock.bind(address)
        await connect(sock, address)

    monkeypatch.setattr(tcp, "connect", connect_from_there)
    with pytest.raises(DialError) as caught:
        await tcp.dial("127.0.0.1", free_port(), 5)
    assert caught.value.errno == errno.ECONNREFUSED


@both
@pytest.mark.parametrize("host", ["127.0.0.2", "holes"])
async def test_dial_cancelled_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(tcp, "HAPPY_DELAY", 0.01)
    teach(monkeypatch, holes=["127.0.0.2", "127.0.0.3"])
    with black_hole("127.0.0.2") as port, black_hole("127.0.0.3", port):
        dialling = asyncio.create_task(tcp.dial(host, port, 30))
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
    connect, gate, connected = tcp.connect, asyncio.Event(), asyncio.Event()

    async def hold(sock: socket.socket, address: tuple[str, int]) -> None:
        await connect(sock, address)
        connected.set()
        await gate.wait()

    monkeypatch.setattr(tcp, "connect", hold)
    teach(monkeypatch, two=["127.0.0.1", "127.0.0.2"])
    with listening("0.0.0.0") as target:
        dialling = asyncio.create_task(tcp.dial("two", target.getsockname()[1], 5))
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
    assert tcp.literal(host, 9) == wanted


def test_literal_with_a_zone() -> None:
    zone = socket.if_nametoindex("lo")
    assert tcp.literal("fe80::1%lo", 9) == (socket.AF_INET6, ("fe80::1", 9, 0, zone))


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

    monkeypatch.setattr(tcp, "_connect", connect)


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
        await tcp.dial("some", 80, 5)
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
        await tcp.dial("some", 80, 0.3)
    assert caught.value.errno == errno.ECONNREFUSED


async def test_c7_one_failure_of_all_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fates(monkeypatch, a=errno.ECONNREFUSED, b=errno.ECONNREFUSED)
    with pytest.raises(DialError) as caught:
        await tcp.dial("some", 80, 5)
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
        with await tcp.dial(*listener.address, 5):
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
