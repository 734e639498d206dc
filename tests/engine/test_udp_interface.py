"""Arguments, ownership, tokens, counts, closing: UDP in the engine as its caller sees it."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType

import pytest
from tests.kit.engine_rig import Kind, owned, tcp_pair
from tests.kit.udp_rig import UdpRig
from tests.kit.udp_words import (
    DROPS,
    closed_target,
    frame,
    frames,
    hear_frame,
    hear_frames,
    udp_pair,
    udp_socket,
)

from nodepass.engine.types import FlowOptions
from nodepass.errors import EngineClosed, EngineError

every_kind = pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
tls_or_not = pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
STRANGERS = (0, -1, 12345, 1 << 62, 1 << 80)
UNBOUND_LIMITS = (-1.0, 1e12, float("nan"))


async def test_shapes(engine_module: ModuleType) -> None:
    assert engine_module.ABI == 10
    assert engine_module.UdpCounts._fields == (
        "datagrams_up", "datagrams_down", "bytes_up", "bytes_down", "too_large", "slow_link",
        "no_link", "overrun", "unsent", "refused",
    )  # fmt: skip
    assert engine_module.UdpCompletion._fields == (
        "token", "counts", "reason", "side", "code", "detail"
    )  # fmt: skip
    assert engine_module.Newcomer._fields == ("token", "gate", "host", "port")
    engine = engine_module.Engine()
    statistics = asdict(engine.statistics())
    for name in ("gates_open", "peers_waiting", "datagrams_up", "datagrams_down",
                 "datagrams_dropped", "datagram_bytes_held"):  # fmt: skip
        assert statistics[name] == 0
    assert engine.close() is True


def refused(call: Callable[[], object]) -> int:
    """Return the errno with which a call is refused."""
    with pytest.raises(EngineError) as caught:
        call()
    return caught.value.errno or 0


@every_kind
async def test_refused_gate_stays_the_callers(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        serve = rig.engine.udp_serve
        sock, tcp = udp_socket(), socket.socket()
        tcp.setblocking(False)
        reader, writer = os.pipe()
        with owned(sock, tcp):
            assert refused(lambda: serve(-1)) == errno.EBADF
            assert refused(lambda: serve(999_999)) == errno.EBADF
            assert refused(lambda: serve(reader)) == errno.ENOTSOCK
            assert refused(lambda: serve(tcp.fileno())) == errno.EPROTOTYPE
            sock.setblocking(True)
            assert refused(lambda: serve(sock.fileno())) == errno.EINVAL
            sock.setblocking(False)
            for limit in (0, -1, 65536):
                with pytest.raises(ValueError, match="datagram"):
                    serve(sock.fileno(), options=FlowOptions(datagram=limit))
            for limit in (0, -1, 4097):
                with pytest.raises(ValueError, match="waiting"):
                    serve(sock.fileno(), waiting=limit)
            os.fstat(sock.fileno())
            assert rig.engine.statistics().gates_open == 0
            # Refused often, opened at last: nothing was half taken.
            rig.serve(sock, datagram=65535, waiting=4096, gso=True)
        os.close(reader)
        os.close(writer)


@every_kind
async def test_refused_link_stays_the_callers(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        bind = rig.engine.udp_bind
        gate = rig.gate()
        visitor = gate.visitor()
        peer = await gate.welcome(visitor, b"hello")
        far, near = rig.ends()
        udp = udp_socket()
        with owned(near, udp):
            fd = near.fileno()
            for stranger in (*STRANGERS, gate.token):
                assert refused(lambda token=stranger: bind(token, fd)) == errno.ENOENT  # type: ignore[misc]
            assert refused(lambda: bind(peer, -1)) == errno.EBADF
            assert refused(lambda: bind(peer, udp.fileno())) == errno.EPROTOTYPE
            assert refused(lambda: bind(peer, fd, tls=object())) == errno.EOPNOTSUPP
            near.setblocking(True)
            assert refused(lambda: bind(peer, fd)) == errno.EINVAL
            near.setblocking(False)
            for idle in UNBOUND_LIMITS:
                with pytest.raises(ValueError, match="idle"):
                    bind(peer, fd, options=FlowOptions(idle=idle))
            with pytest.raises(TypeError):
                bind(peer, fd, head="text")
            os.fstat(fd)
            token = rig.hand_bind(peer, near)
        await rig.send(far, frame(b"welcome"))
        assert await visitor.hear() == b"welcome"
        await rig.over(peer)
        spare, other = tcp_pair()
        with owned(spare, other):
            assert refused(lambda: bind(peer, other.fileno())) == errno.ENOENT
            os.fstat(other.fileno())
        assert not rig.is_over(token)


@every_kind
async def test_refused_target_stays_the_callers(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        dial = rig.engine.udp_dial
        near, inner = rig.ends()
        outer, target = udp_pair()
        mouth = rig.mouth(outer)
        with owned(inner, target):
            link, fd = inner.fileno(), target.fileno()
            assert refused(lambda: dial(-1, fd)) == errno.EBADF
            assert refused(lambda: dial(link, -1)) == errno.EBADF
            assert refused(lambda: dial(fd, fd)) == errno.EPROTOTYPE
            assert refused(lambda: dial(link, link)) in {errno.EPROTOTYPE, errno.EINVAL}
            assert refused(lambda: dial(link, fd, tls=object())) == errno.EOPNOTSUPP
            for sock in (inner, target):
                sock.setblocking(True)
                assert refused(lambda: dial(link, fd)) == errno.EINVAL
                sock.setblocking(False)
            for idle in UNBOUND_LIMITS:
                with pytest.raises(ValueError, match="idle"):
                    dial(link, fd, options=FlowOptions(idle=idle))
            for limit in (0, 65536):
                with pytest.raises(ValueError, match="datagram"):
                    dial(link, fd, options=FlowOptions(datagram=limit))
            with pytest.raises(TypeError):
                dial(link, fd, head="text")
            os.fstat(link)
            os.fstat(fd)
            rig.hand_dial(inner, target, gso=True)
        await rig.send(near, frame(b"hello"))
        assert await mouth.hear() == b"hello"
        assert rig.engine.statistics().fds_open == 2


@every_kind
async def test_capacity_is_a_refusal(kind: Kind) -> None:
    async with UdpRig(kind, flows=1) as rig:
        dialled = rig.dial()
        _, inner = rig.ends()
        outer, target = udp_pair()
        with owned(outer, inner, target):
            code = refused(lambda: rig.engine.udp_dial(inner.fileno(), target.fileno()))
            assert code == errno.ENOBUFS
            assert refused(lambda: rig.engine.udp_serve(outer.fileno())) == errno.ENOBUFS
            rig.engine.abort(dialled.token)
            await rig.over(dialled.token)
            rig.hand_dial(inner, target)


# --- tokens --------------------------------------------------------------------------------------


@every_kind
async def test_tokens_of_every_sort(kind: Kind) -> None:
    """Any call with any token, and nobody is hurt who was not meant."""
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        bound_visitor, waiting_visitor = gate.visitor(), gate.visitor()
        bound = rig.bind(await gate.welcome(bound_visitor, b"hello"))
        peer = await gate.welcome(waiting_visitor, b"hello")
        dialled, flow = rig.dial(), rig.join()
        tokens = (gate.token, bound.token, peer, dialled.token, flow.token)
        assert len(set(tokens)) == 5
        assert min(tokens) > 0
        for token in (*tokens, *STRANGERS):
            rig.engine.live(token)
            rig.engine.udp_counts(token)
            rig.engine.udp_limit(token, 60.0)
            rig.engine.udp_relieve(token)
            if token != gate.token:
                rig.engine.udp_shut(token)
        for token in STRANGERS:
            assert rig.engine.live(token) is None
            assert rig.engine.udp_counts(token) is None
            rig.engine.abort(token)
        for idle in UNBOUND_LIMITS:
            with pytest.raises(ValueError, match="idle"):
                rig.engine.udp_limit(dialled.token, idle)
        assert await hear_frame(bound.far) == b"hello"
        await dialled.near.say(frame(b"unharmed"))
        assert await dialled.target.hear() == b"unharmed"
        await rig.send(flow.visitor, b"unharmed")
        assert await rig.receive(flow.target, 8) == b"unharmed"
        for token in tokens[1:4]:
            rig.engine.abort(token)
            over = await rig.over(token)
            assert (over.reason, over.side, over.code) == (kind.module.REASON_ABORTED, 0, 0)
            rig.engine.abort(token)
            assert rig.engine.udp_counts(token) is None
            assert rig.engine.live(token) is None
        rig.engine.abort(flow.token)
        assert (await rig.ended(flow.token)).reason == kind.module.REASON_ABORTED
        assert not rig.is_over(gate.token)


@every_kind
@tls_or_not
async def test_abort_of_relays_resets_their_links(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        bound = rig.bind(await gate.welcome(gate.visitor(), b"hello"), is_tls=is_tls)
        dialled = rig.dial(is_tls=is_tls)
        await hear_frame(bound.far)
        await dialled.near.say(frame(b"hello"))
        await dialled.target.hear()
        for end, token in ((bound.far, bound.token), (dialled.near, dialled.token)):
            rig.engine.abort(token)
            over = await rig.over(token)
            assert over[2:] == (kind.module.REASON_ABORTED, 0, 0, 0)
            assert await rig.is_reset(end.sock)
            assert (over.counts.datagrams_up, over.counts.bytes_up) == (1, 5)


@every_kind
async def test_abort_of_a_gate_ends_all_that_belongs_to_it(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate, other = rig.gate(), rig.gate()
        visitors = [gate.visitor() for _ in range(6)]
        peers = [await gate.welcome(visitor, b"hello") for visitor in visitors]
        bounds = [rig.bind(peer) for peer in peers[:3]]
        for bound in bounds:
            await hear_frame(bound.far)
        kept = other.visitor()
        far = rig.bind(await other.welcome(kept, b"other"))
        rig.engine.abort(gate.token)
        for token in (gate.token, *peers[3:], *(bound.token for bound in bounds)):
            over = await rig.over(token)
            assert (over.reason, over.side, over.code) == (kind.module.REASON_ABORTED, 0, 0)
        assert rig.counts(gate.token).no_link == 3
        for bound in bounds:
            assert await rig.is_reset(bound.far.sock)
        await rig.until(lambda: rig.engine.statistics().gates_open == 1, "one gate left")
        # Its port is free again.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((gate.host, gate.port))
        assert await hear_frame(far.far) == b"other"


# --- books ---------------------------------------------------------------------------------------


@every_kind
async def test_counts_stay_until_polled(kind: Kind) -> None:
    engine = kind.module.Engine(kind.threads)
    try:
        outer, target = udp_pair()
        (near, inner), waiter = tcp_pair(), udp_socket()
        with owned(outer, near, waiter):
            token = engine.udp_dial(inner.detach(), target.detach())
            gate = engine.udp_serve(waiter.fileno())
            waiter.detach()
            assert engine.udp_counts(token) == engine.udp_counts(gate) == (0,) * 10
            engine.close()
            assert engine.udp_counts(token) == (0,) * 10
            tokens = {news.token for news in engine.poll()}
            assert tokens == {token, gate}
            assert engine.udp_counts(token) is None
            assert engine.udp_counts(gate) is None
            assert engine.poll() == []
    finally:
        engine.close()


@every_kind
@tls_or_not
async def test_statistics(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate(datagram=100)
        visitor, waits = gate.visitor(), gate.visitor()
        bound = rig.bind(await gate.welcome(visitor, b"12345"), is_tls=is_tls)
        dialled = rig.dial(is_tls=is_tls)
        peer = await gate.welcome(waits, b"abc")
        visitor.say(bytes(101), b"678")
        assert await hear_frames(bound.far, 2) == [b"12345", b"678"]
        await bound.far.say(frames(b"a", b"b", b"c"))
        assert await visitor.hear_many(3) == [b"a", b"b", b"c"]
        await dialled.near.say(frames(b"x", b"y"))
        assert await dialled.target.hear_many(2) == [b"x", b"y"]
        await rig.counted(bound.token, datagrams_down=3)
        await rig.counted(dialled.token, datagrams_up=2)
        statistics = rig.engine.statistics()
        assert statistics.gates_open == 1
        assert statistics.peers_waiting == 1
        assert (statistics.datagrams_up, statistics.datagrams_down) == (4, 3)
        assert statistics.datagrams_dropped == 1
        assert statistics.fds_open == 4
        assert statistics.tls_in_use == 2 * is_tls
        assert statistics.datagram_bytes_held >= 3
        assert (statistics.bytes_up, statistics.bytes_down) == (0, 0)
        assert statistics.flows_open == 4
        for token in (bound.token, dialled.token, peer, gate.token):
            rig.engine.abort(token)
            await rig.over(token)
        after = rig.engine.statistics()
        assert (after.datagrams_up, after.datagrams_down) == (4, 3)
        assert after.datagrams_dropped == 2, "what was parked is lost"
        assert (after.flows_open, after.fds_open, after.tls_in_use) == (0, 0, 0)


@every_kind
@tls_or_not
async def test_close_with_everything_open(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        gates = [rig.gate() for _ in range(3)]
        tokens = {gate.token for gate in gates}
        links = []
        for gate in gates:
            for step in range(4):
                visitor = gate.visitor()
                peer = await gate.welcome(visitor, b"hello")
                if step % 2:
                    bound = rig.bind(peer, is_tls=is_tls, idle=5.0 * (step % 3))
                    links.append(bound.far)
                    tokens.add(bound.token)
                    visitor.say(b"more")
                else:
                    tokens.add(peer)
        for _ in range(3):
            dialled = rig.dial(is_tls=is_tls)
            await dialled.near.say(frame(b"hello")[:4])
            links.append(dialled.near)
            tokens.add(dialled.token)
        refusing = rig.dial(target=closed_target())
        tokens.add(refusing.token)
        flow = rig.join()
        assert await rig.close() is True
        for token in tokens:
            over = await rig.over(token)
            assert (over.reason, over.side) == (kind.module.REASON_ABORTED, 0)
        assert (await rig.ended(flow.token)).reason == kind.module.REASON_ABORTED
        for end in links:
            assert await rig.is_reset(end.sock)
        assert await rig.close() is True


async def test_after_close(kind: Kind) -> None:
    engine = kind.module.Engine()
    assert engine.close() is True
    near, inner = tcp_pair()
    outer, target = udp_pair()
    with owned(near, inner, outer, target):
        with pytest.raises(EngineClosed):
            engine.udp_serve(outer.fileno())
        with pytest.raises(EngineClosed):
            engine.udp_bind(1, inner.fileno())
        with pytest.raises(EngineClosed):
            engine.udp_dial(inner.fileno(), target.fileno())
        assert engine.udp_counts(1) is None
        os.fstat(inner.fileno())


async def test_dropped_totals_are_the_sum_of_their_causes(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate(datagram=10, waiting=1)
        first, second = gate.visitor(), gate.visitor()
        await gate.welcome(first, b"1")
        second.say(b"no room", bytes(11), b"no room")
        counts = await rig.counted(gate.token, too_large=1, no_link=2)
        assert sum(getattr(counts, name) for name in DROPS) == 3
        assert rig.engine.statistics().datagrams_dropped == 3
