"""tcp: options, resets, liveness, shares of descriptors, on real loopback sockets."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import sys
from collections.abc import Iterator

import pytest
from tests.kit.engine_rig import tcp_pair
from tests.kit.tcp_ends import listening, needs_ipv6

from nodepass.config.address import join_address
from nodepass.net import descriptors, hosts, tcp

# --- helpers -------------------------------------------------------------------------------------


@contextlib.contextmanager
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = tcp_pair()
    with near, far:
        yield near, far


# --- small things --------------------------------------------------------------------------------


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
    assert join_address(host, 80) == shown


@pytest.mark.parametrize(
    ("host", "plain"),
    [("::ffff:10.0.0.1", "10.0.0.1"), ("10.0.0.1", "10.0.0.1"), ("::ffff:1", "::ffff:1")],
)
def test_plain_host(host: str, plain: str) -> None:
    assert hosts.plain_host(host) == plain


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
    assert descriptors.descriptor_limit() == soft
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert descriptors.descriptor_limit() == descriptors.UNLIMITED_DESCRIPTORS
    monkeypatch.setitem(sys.modules, "resource", None)
    assert descriptors.descriptor_limit() == descriptors.UNLIMITED_DESCRIPTORS


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(20_000, (1000, 500, 4976)), (1024, (348, 116, 232)), (10, (1, 1, 1))],
)
def test_share_descriptors(
    limit: int, expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "descriptor_limit", lambda: limit)
    shares = descriptors.share_descriptors(1000, 500)
    assert shares == expected
    spent = shares.visitors * descriptors.DESCRIPTORS_PER_VISITOR + shares.stock
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
