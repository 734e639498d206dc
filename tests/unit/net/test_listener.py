"""listener: listening, accepting, back-off when the machine has run out of something."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests.kit.engines import both
from tests.kit.tcp_ends import Hearer, closing, listening, needs_ipv6, teach
from tests.kit.timing import free_port, until

import nodepass
from nodepass.errors import DialError, ListenError
from nodepass.net import tcp, tcp_dial
from nodepass.net.listener import ACCEPT_BATCH, BACKLOG, Listener, listen

# --- helpers -------------------------------------------------------------------------------------


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


# --- small things --------------------------------------------------------------------------------


def is_armed(sock: socket.socket) -> bool:
    """Tell whether closing a socket resets it, whoever does it."""
    value = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
    return struct.unpack("ii", value) == (1, 0)


# --- listen --------------------------------------------------------------------------------------


@both
@needs_ipv6
async def test_listen_on_every_address_is_one_dual_stack_socket() -> None:
    with closing(await listen("", 0)) as socks, Hearer() as hearer:
        assert [sock.family for sock in socks] == [socket.AF_INET6]
        listener = Listener(socks, hearer.accept, hearer.complain)
        listener.resume()
        for host in ("127.0.0.1", "::1"):
            (await tcp_dial.dial(host, listener.address[1], 5)).close()
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
            with await tcp_dial.dial(host, listener.address[1], 5) as dialled:
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
        with await tcp_dial.dial(*listener.address, 5) as dialled:
            await until(lambda: hearer.socks, 5, "the connection")
            assert hearer.peers == [dialled.getsockname()]
            for sock in (dialled, hearer.socks[0]):
                assert not sock.getblocking()
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert hearer.socks[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        listener.close()


# --- Listener ------------------------------------------------------------------------------------


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
        stack.enter_context(await tcp_dial.dial(*listener.address, 5))
        await asyncio.sleep(0.02)
        assert not hearer.socks
        listener.resume()
        assert not listener.is_paused
        await until(lambda: len(hearer.socks) == 1, 5, "the first")
        listener.pause()
        listener.pause()
        stack.enter_context(await tcp_dial.dial(*listener.address, 5))
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
            stack.enter_context(await tcp_dial.dial(*listener.address, 5))
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
        with await tcp_dial.dial(*listener.address, 5):
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
        with await tcp_dial.dial(*listener.address, 5):
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
        with await tcp_dial.dial(*listener.address, 5):
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
        with await tcp_dial.dial(*address, 5):
            await until(lambda: hearer.complaints, 5, "the complaint")
            listener.close()
            listener.close()
            await asyncio.sleep(0.05)
            assert not hearer.socks
        with pytest.raises(DialError):
            await tcp_dial.dial(*address, 5)


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
