"""localport: how often an address is dialled, and which local ports are used again."""

from __future__ import annotations

import errno
import itertools
import logging
import socket
import sys
from pathlib import Path

import pytest
from tests.kit.engine_rig import tcp_pair
from tests.kit.timing import free_port

from nodepass.net import local_ports, tcp, tcp_dial
from nodepass.net.local_ports import PERIOD, LocalPorts, Need

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux")

FIRST, LAST = 20000, 20399
"""400 ports: beyond 25 dials they are marked, beyond 100 they are bound."""
SERVER = ("192.0.2.1", 10101)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(local_ports, "time", clock)
    return clock


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> LocalPorts:
    (tmp_path / "ip_local_port_range").write_text(f"{FIRST}\t{LAST}\n")
    (tmp_path / "ip_local_reserved_ports").write_text(f"{LAST - 9}-{LAST - 5},{LAST}\n")
    monkeypatch.setattr(local_ports, "_SYSCTL", tmp_path)
    return LocalPorts()


def test_c15_few_dials_need_nothing(ports: LocalPorts) -> None:
    assert {ports.note(*SERVER) for _ in range(25)} == {Need.FRESH}


def test_c15_many_dials_are_marked_and_more_are_bound(
    ports: LocalPorts, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        needs = [ports.note(*SERVER) for _ in range(101)]
        assert needs == [Need.FRESH] * 25 + [Need.MARKED] * 75 + [Need.BOUND]
    assert caplog.text.count("local ports are used again") == 1, "long before any is missing"
    assert "192.0.2.1:10101" in caplog.text
    assert ports.note("192.0.2.2", 10101) is Need.FRESH, "each address has ports of its own"


def test_c15_a_quiet_minute_makes_ports_plenty(ports: LocalPorts, clock: Clock) -> None:
    for _ in range(150):
        ports.note(*SERVER)
    clock.now += PERIOD
    assert ports.note(*SERVER) is Need.BOUND, "those of the last period count"
    clock.now += 2 * PERIOD
    assert ports.note(*SERVER) is Need.FRESH


def test_c15_this_machine_needs_no_help(ports: LocalPorts) -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1"):
        assert {ports.note(host, 80) for _ in range(200)} == {Need.FRESH}


def test_c15_where_a_port_could_not_be_had_old_ones_are_used_at_once(
    ports: LocalPorts, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        assert ports.note(*SERVER) is Need.FRESH
        assert ports.miss(*SERVER) is True
        assert ports.miss(*SERVER) is False
        assert ports.note(*SERVER) is Need.BOUND
    assert "local ports run short" in caplog.text


def test_c15_ports_come_in_turn_and_reserved_ones_never(ports: LocalPorts) -> None:
    ports.note(*SERVER)
    given = [next(iter(ports.choose())) for _ in range(188)]
    allowed = set(range(LAST - 99, LAST)) - set(range(LAST - 9, LAST - 4))
    assert set(given) == allowed
    assert given[:94] == given[94:], "the one that was used longest ago is next"
    tried = list(itertools.islice(ports.choose(), 100))
    assert len(tried) == local_ports.TRIES
    assert set(tried) <= allowed


def test_c15_a_range_that_cannot_be_read_is_the_kernels_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_ports, "_SYSCTL", tmp_path / "nowhere")
    ports = LocalPorts()
    ports.note(*SERVER)
    assert 32768 < next(iter(ports.choose())) <= 60999


def test_c15_the_number_of_addresses_is_bounded(ports: LocalPorts) -> None:
    for number in range(3 * local_ports.MAX_ADDRESSES):
        ports.note(f"192.0.2.{number % 250}", number)
    assert len(ports._addresses) <= local_ports.MAX_ADDRESSES


# --- how net uses them ---------------------------------------------------------------------------


class Short:
    """Every address is dialled much."""

    def __init__(self, *given: int) -> None:
        self.given = given
        self.missed = 0

    def note(self, *_: object) -> Need:
        return Need.BOUND

    def choose(self) -> list[int]:
        return list(self.given)

    def miss(self, *_: object) -> bool:
        self.missed += 1
        return self.missed == 1


def free(count: int) -> list[int]:
    """Return ports that no kernel chooses by itself."""
    return [free_port() for _ in range(count)]


async def test_c15_a_dial_takes_a_port_of_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, wanted, other = free(3)
    short = Short(taken, wanted, other)
    monkeypatch.setattr(tcp_dial, "LOCAL_PORTS", short)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as holder:
        holder.bind(("0.0.0.0", taken))
        holder.listen(1)
        with await tcp_dial.dial("127.0.0.1", server.getsockname()[1], 5) as sock:
            assert sock.getsockname()[1] == wanted
            far, _ = server.accept()
            with far:
                far.send(b"x")
                assert sock.recv(1) == b"x"
        assert short.missed == 0


async def test_c15_a_port_in_time_wait_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the same pair of addresses within a moment, this side ending first each time."""
    (port,) = free(1)
    monkeypatch.setattr(tcp_dial, "LOCAL_PORTS", Short(port))
    with socket.create_server(("127.0.0.2", 0)) as server:
        for _ in range(10):
            sock = await tcp_dial.dial("127.0.0.2", server.getsockname()[1], 5)
            with sock:
                assert sock.getsockname()[1] == port
                far, _ = server.accept()
                with far:
                    tcp.disarm(sock)
                    sock.shutdown(socket.SHUT_WR)
                    assert far.recv(1) == b""
                    far.close()
                    sock.setblocking(True)
                    assert sock.recv(1) == b""


async def test_c15_without_any_port_of_its_turn_the_kernel_chooses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (taken,) = free(1)
    short = Short(taken)
    monkeypatch.setattr(tcp_dial, "LOCAL_PORTS", short)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as holder:
        holder.bind(("0.0.0.0", taken))
        holder.listen(1)
        with await tcp_dial.dial("127.0.0.1", server.getsockname()[1], 5) as sock:
            assert sock.getsockname()[1] != taken
        server.accept()[0].close()
    assert short.missed == 1


def test_c15_a_dial_does_not_meet_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound to the very port that it dials, where nobody listens, it would be connected."""
    (port,) = free(1)
    monkeypatch.setattr(tcp_dial, "LOCAL_PORTS", Short(port))
    sock, has_begun = tcp_dial.open_dial(socket.AF_INET, ("127.0.0.1", port))
    sock.close()
    assert not has_begun


def test_c15_when_none_is_left_it_is_tried_once_more_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    near, far = tcp_pair()
    near.close()
    far.close()
    (port,) = free(1)
    faults = [errno.EADDRNOTAVAIL]
    real = tcp_dial.begin_connect

    def begin(sock: socket.socket, address: tuple[str, int]) -> None:
        if faults:
            raise OSError(faults.pop(), "Cannot assign requested address")
        real(sock, address)

    class Learning(Short):
        def note(self, *_: object) -> Need:
            return Need.BOUND if self.missed else Need.FRESH

    monkeypatch.setattr(tcp_dial, "begin_connect", begin)
    monkeypatch.setattr(tcp_dial, "LOCAL_PORTS", Learning(port))
    with socket.create_server(("127.0.0.1", 0)) as server:
        with tcp_dial.begin_dial(socket.AF_INET, server.getsockname()) as sock:
            assert sock.getsockname()[1] == port
        server.accept()[0].close()
