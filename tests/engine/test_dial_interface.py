"""dial() as its caller sees it: arguments, ownership, places, balances."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import socket
import struct
from collections.abc import Callable
from typing import cast

import pytest
from tests.kit.engine_rig import Kind, Rig, is_called, is_open, owned, reset_on_close, stream_for
from tests.kit.timing import has_ipv6

from nodepass.engine.types import FlowOptions
from nodepass.errors import EngineClosed, EngineError
from nodepass.net.resolver import SocketAddress

Engine = Callable[..., Rig]
every_kind = pytest.mark.parametrize(
    "kind", ["native", "native-copy", "native-2", "twin"], indirect=True
)


def is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


async def test_balance_while_it_dials(engine: Engine) -> None:
    async with engine() as rig:
        full = rig.listen_to_nobody()
        flows = [rig.connect(full.name) for _ in range(3)]
        await rig.until(lambda: rig.engine.statistics().fds_open == 6, "all admitted")
        statistics = rig.engine.statistics()
        assert (statistics.flows_open, statistics.flows_total) == (3, 3)
        assert (statistics.bytes_up, statistics.bytes_down, statistics.tls_in_use) == (0, 0, 0)
        for flow in flows:
            rig.engine.abort(flow.token)
            await rig.ended(flow.token)
        statistics = rig.engine.statistics()
        assert (statistics.flows_open, statistics.flows_total, statistics.fds_open) == (0, 3, 0)


@every_kind
async def test_a_process_that_dies_resets_both(engine: Engine, kind: Kind) -> None:
    """So the kernel is told beforehand, as soon as the engine has the sockets."""
    async with engine() as rig:
        for listener in (rig.listen_to_nobody().sock, rig.listen()):
            _, a = rig.ends()
            b = stream_for(listener.getsockname())
            twins = (a.dup(), b.dup())
            with owned(*twins):
                token = rig.hand_over_to(a, listener.getsockname(), b)
                for sock in twins:
                    await rig.until(functools.partial(resets_at_close, sock), "the option")
                rig.engine.abort(token)
                await rig.ended(token)


def resets_at_close(sock: socket.socket) -> bool:
    return struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == (1, 0)


async def test_refused_descriptors_stay_the_callers(engine: Engine) -> None:
    async with engine() as rig:
        listener = rig.listen()
        address = listener.getsockname()
        visitor, a = rig.ends()
        b = stream_for(address)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.setblocking(False)
        reader, writer = os.pipe()
        with owned(a, b, udp):
            for fds, code in (
                ((a.fileno(), -1), errno.EBADF),
                ((-1, b.fileno()), errno.EBADF),
                ((999_999, b.fileno()), errno.EBADF),
                ((a.fileno(), 999_999), errno.EBADF),
                ((a.fileno(), reader), errno.ENOTSOCK),
                ((reader, b.fileno()), errno.ENOTSOCK),
                ((a.fileno(), udp.fileno()), errno.EPROTOTYPE),
                ((udp.fileno(), b.fileno()), errno.EPROTOTYPE),
                ((a.fileno(), a.fileno()), errno.EINVAL),
                ((b.fileno(), b.fileno()), errno.EINVAL),
            ):
                with pytest.raises(EngineError) as caught:
                    rig.engine.dial(*fds, address)
                assert caught.value.errno == code
            for sock in (a, b):
                sock.setblocking(True)
                with pytest.raises(EngineError) as caught:
                    rig.engine.dial(a.fileno(), b.fileno(), address)
                assert caught.value.errno == errno.EINVAL
                sock.setblocking(False)
            with pytest.raises(EngineError) as caught:
                rig.engine.dial(a.fileno(), b.fileno(), address, tls=object())
            assert caught.value.errno == errno.EOPNOTSUPP
            with pytest.raises(TypeError):
                rig.engine.dial(a.fileno(), b.fileno(), address, head="text")
            assert is_open(a.fileno())
            assert is_open(b.fileno())
            assert not is_connected(b)
            assert not is_called(listener)
            # Refused often, dialled at last: nothing was half taken.
            rig.hand_over_to(a, address, b)
            await rig.chat(visitor, await rig.accept(listener))
        os.close(reader)
        os.close(writer)
        statistics = rig.engine.statistics()
        assert (statistics.flows_refused, statistics.flows_total) == (0, 1)


@pytest.mark.parametrize("timeout", [-1.0, -1e-9, 1e12, float("inf"), float("nan")])
async def test_bad_timeout(engine: Engine, timeout: float) -> None:
    async with engine() as rig:
        listener = rig.listen()
        _, a = rig.ends()
        b = stream_for(listener.getsockname())
        with owned(a, b):
            with pytest.raises(ValueError, match="4000000"):
                rig.engine.dial(
                    a.fileno(),
                    b.fileno(),
                    listener.getsockname(),
                    options=FlowOptions(timeout=timeout),
                )
            assert is_open(a.fileno())
            assert is_open(b.fileno())
            assert not is_called(listener)
        assert rig.engine.statistics().flows_total == 0


@pytest.mark.parametrize(
    "host",
    ["localhost", "", "127.1", "127.0.0.256", "::1%lo", "[::1]", "::g", "\udcff", "é", "::1\0"],
)
async def test_a_name_is_no_address(engine: Engine, host: str) -> None:
    async with engine() as rig:
        _, a = rig.ends()
        b = stream_for((host, 9))
        with owned(a, b):
            with pytest.raises(ValueError):
                rig.engine.dial(a.fileno(), b.fileno(), (host, 9))
            assert is_open(a.fileno())
            assert is_open(b.fileno())
        statistics = rig.engine.statistics()
        assert (statistics.flows_total, statistics.flows_open) == (0, 0)


@pytest.mark.parametrize("port", [-1, 65536, 1 << 40])
async def test_no_such_port(engine: Engine, port: int) -> None:
    async with engine() as rig:
        _, a = rig.ends()
        b = stream_for(("127.0.0.1", 0))
        with owned(a, b):
            with pytest.raises(ValueError):
                rig.engine.dial(a.fileno(), b.fileno(), ("127.0.0.1", port))
            assert is_open(a.fileno())
            assert is_open(b.fileno())
        statistics = rig.engine.statistics()
        assert (statistics.flows_total, statistics.flows_open) == (0, 0)


@pytest.mark.parametrize(
    "address",
    [
        (), ("127.0.0.1",), ("127.0.0.1", 9, 0), ("::1", 9, 0, 0, 0), ("::1", 9, -1, 0),
        ("::1", 9, 1 << 20, 0), ("::1", 9, 0, -1), ("::1", 9, 0, 1 << 32),
    ],
)  # fmt: skip
async def test_address_of_another_shape(engine: Engine, address: tuple[object, ...]) -> None:
    """Nothing beyond its end is looked at, and everything stays the caller's as it was."""
    async with engine() as rig:
        _, a = rig.ends()
        b = stream_for(("127.0.0.1", 0))
        with owned(a, b):
            with pytest.raises(ValueError):
                rig.engine.dial(a.fileno(), b.fileno(), address)
            assert is_open(a.fileno())
            assert not resets_at_close(a)
            assert not resets_at_close(b)
        statistics = rig.engine.statistics()
        assert (statistics.flows_total, statistics.flows_open) == (0, 0)


async def test_address_as_a_list_or_with_more_than_ipv4_has(engine: Engine) -> None:
    async with engine() as rig:
        listener = rig.listen()
        host, port = listener.getsockname()
        for address in ([host, port], (host, port, 0, 0)):
            visitor, a = rig.ends()
            goal = cast(SocketAddress, address)
            token = rig.hand_over_to(a, goal, stream_for((host, port)))
            await rig.chat(visitor, await rig.accept(listener))
            rig.engine.abort(token)
            await rig.ended(token)


async def test_socket_that_has_no_such_addresses(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        listener = rig.listen()
        _, a = rig.ends()
        b = socket.socket(socket.AF_UNIX)
        b.setblocking(False)
        token = rig.hand_over_to(a, listener.getsockname(), b)
        ended = await rig.ended(token)
        assert (ended.reason, ended.side) == (kind.module.REASON_UNMET, 2)
        assert ended.code in {errno.EAFNOSUPPORT, errno.EINVAL}


async def test_head_counts_as_parked_while_it_dials(engine: Engine) -> None:
    async with engine() as rig:
        full = rig.listen_to_nobody()
        flow = rig.connect(full.name, head=bytes(1000))
        await rig.until(lambda: rig.engine.statistics().parked_bytes == 1000, "the head")
        assert rig.engine.statistics().buffers_in_use == 1
        rig.engine.abort(flow.token)
        await rig.ended(flow.token)
        statistics = rig.engine.statistics()
        assert (statistics.parked_bytes, statistics.buffers_in_use) == (0, 0)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
async def test_socket_of_another_family(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        four, six = rig.listen(), rig.listen("::1")
        for own, goal in ((six, four), (four, six)):
            visitor, a = rig.ends()
            token = rig.hand_over_to(a, goal.getsockname(), stream_for(own.getsockname()))
            ended = await rig.ended(token)
            assert ended[1:5] == (0, 0, kind.module.REASON_UNMET, 2)
            assert ended.code in {errno.EAFNOSUPPORT, errno.EINVAL}
            assert await rig.heard_before_reset(visitor) == b""


async def test_capacity_is_a_counted_refusal(engine: Engine) -> None:
    async with engine(flows=2) as rig:
        full, listener = rig.listen_to_nobody(), rig.listen()
        flows = [rig.connect(full.name) for _ in range(2)]
        visitor, a = rig.ends()
        b = stream_for(listener.getsockname())
        with owned(a, b):
            with pytest.raises(EngineError) as caught:
                rig.engine.dial(a.fileno(), b.fileno(), listener.getsockname())
            assert caught.value.errno == errno.ENOBUFS
            assert is_open(a.fileno())
            assert is_open(b.fileno())
            assert not is_called(listener)
            rig.engine.abort(flows[0].token)
            await rig.ended(flows[0].token)
            rig.hand_over_to(a, listener.getsockname(), b)
            await rig.chat(visitor, await rig.accept(listener))
        statistics = rig.engine.statistics()
        assert (statistics.flows_refused, statistics.flows_open) == (1, 2)
        assert statistics.flows_total == 3


async def test_a_failed_dial_keeps_its_place_until_polled(kind: Kind) -> None:
    engine = kind.module.Engine(flows=1)
    rig = Rig(kind)
    async with rig:
        address = rig.where_nobody_listens()
        _, a = rig.ends()
        token = engine.dial(a.detach(), stream_for(address).detach(), address)
        await asyncio.sleep(0.1)
        assert engine.live(token) == (0, 0)
        _, a = rig.ends()
        b = stream_for(address)
        with owned(a, b):
            with pytest.raises(EngineError) as caught:
                engine.dial(a.fileno(), b.fileno(), address)
            assert caught.value.errno == errno.ENOBUFS
            assert [ended.token for ended in engine.poll()] == [token]
            assert engine.live(token) is None
            assert engine.dial(a.detach(), b.detach(), address) not in {0, token}
        assert engine.close()
        assert len(engine.poll()) == 1


@every_kind
async def test_a_dial_leaves_nothing_behind_in_its_place(engine: Engine, kind: Kind) -> None:
    """One place, used by turns: what was dialled, or in vain, is no matter for the next."""
    async with engine(flows=1) as rig:
        listener, full, nobody = rig.listen(), rig.listen_to_nobody(), rig.where_nobody_listens()
        for limit in (0.0, 30.0):
            missed = rig.connect(nobody, head=b"never heard", timeout=limit)
            assert (await rig.ended(missed.token)).code == errno.ECONNREFUSED
            joined = rig.join(idle=0.1)
            await rig.chat(joined.visitor, joined.target)
            assert (await rig.ended(joined.token)).reason == kind.module.REASON_IDLE
            late = rig.connect(full.name, timeout=0.1)
            assert (await rig.ended(late.token)).code == errno.ETIMEDOUT
            joined = rig.join(idle=0.1)
            await rig.chat(joined.visitor, joined.target)
            assert (await rig.ended(joined.token)).reason == kind.module.REASON_IDLE
            dialled = rig.connect(listener.getsockname(), timeout=limit)
            target = await rig.accept(listener)
            await rig.chat(dialled.visitor, target)
            reset_on_close(target)
            target.close()
            ended = await rig.ended(dialled.token)
            assert ended[1:5] == (4, 4, kind.module.REASON_RESET, 2)
            joined = rig.join(head_a=b"head, ")
            assert await rig.receive(joined.target, 6) == b"head, "
            await rig.chat(joined.visitor, joined.target)
            rig.engine.abort(joined.token)
            assert (await rig.ended(joined.token)).reason == kind.module.REASON_ABORTED


async def test_after_close(kind: Kind) -> None:
    engine = kind.module.Engine()
    assert engine.close() is True
    rig = Rig(kind)
    async with rig:
        listener = rig.listen()
        _, a = rig.ends()
        b = stream_for(listener.getsockname())
        with owned(a, b):
            with pytest.raises(EngineClosed):
                engine.dial(a.fileno(), b.fileno(), listener.getsockname())
            assert is_open(a.fileno())
            assert is_open(b.fileno())
            assert not is_called(listener)


async def test_failed_dials_leave_no_descriptor(engine: Engine) -> None:
    async with engine() as rig:
        nobody, full = rig.where_nobody_listens(), rig.listen_to_nobody()
        visitors = [rig.ends() for _ in range(60)]
        before = sum(map(is_open, range(4096)))
        flows = [
            rig.hand_over_to(a, nobody if step % 2 else full.name, timeout=0.1)
            for step, (_, a) in enumerate(visitors)
        ]
        for token in flows:
            assert (await rig.ended(token)).side == 2
        assert sum(map(is_open, range(4096))) == before - len(flows)
