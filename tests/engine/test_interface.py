"""Arguments, ownership, tokens, closing: the engine as its caller sees it."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from types import ModuleType

import pytest
from tests.kit.engine_rig import Kind, Rig, owned, tcp_pair

from nodepass.engine.types import FlowOptions
from nodepass.errors import EngineClosed, EngineError

Engine = Callable[..., Rig]


async def test_constants_and_shapes(engine_module: ModuleType) -> None:
    assert engine_module.ABI == 10
    assert [
        engine_module.REASON_FINISHED,
        engine_module.REASON_RESET,
        engine_module.REASON_ABORTED,
        engine_module.REASON_IDLE,
        engine_module.REASON_UNMET,
    ] == [0, 1, 2, 3, 4]
    assert engine_module.Completion._fields == (
        "token", "up", "down", "reason", "side", "code", "detail"
    )  # fmt: skip
    ended = engine_module.Completion(1, 2, 3, 0, 0, 0, 0)
    token, up, down, *_ = ended
    assert (token, up, down) == (1, 2, 3)
    engine = engine_module.Engine()
    statistics = engine.statistics()
    with pytest.raises(AttributeError):
        statistics.turns = 1
    assert statistics.flows_open == 0
    assert "flows=0" in repr(engine)
    assert engine.close() is True
    assert repr(engine) == "<Engine closed>"


@pytest.mark.parametrize("threads", [0, -1, 257])
async def test_bad_thread_count(engine_module: ModuleType, threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        engine_module.Engine(threads)


@pytest.mark.parametrize("flows", [0, -1, (1 << 24) + 1])
async def test_bad_capacity(engine_module: ModuleType, flows: int) -> None:
    with pytest.raises(ValueError, match="flows"):
        engine_module.Engine(flows=flows)


async def test_refused_descriptors_stay_the_callers(engine: Engine) -> None:
    async with engine() as rig:
        _, a = rig.ends()
        _, b = rig.ends()
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.setblocking(False)
        reader, writer = os.pipe()
        with owned(a, b, udp):
            for fds, code in (
                ((a.fileno(), -1), errno.EBADF),
                ((999_999, b.fileno()), errno.EBADF),
                ((a.fileno(), reader), errno.ENOTSOCK),
                ((udp.fileno(), b.fileno()), errno.EPROTOTYPE),
                ((a.fileno(), a.fileno()), errno.EINVAL),
            ):
                with pytest.raises(EngineError) as caught:
                    rig.engine.relay(*fds)
                assert caught.value.errno == code
            b.setblocking(True)
            with pytest.raises(EngineError) as caught:
                rig.engine.relay(a.fileno(), b.fileno())
            assert caught.value.errno == errno.EINVAL
            b.setblocking(False)
            with pytest.raises(EngineError) as caught:
                rig.engine.relay(a.fileno(), b.fileno(), tls_a=object())
            assert caught.value.errno == errno.EOPNOTSUPP
            with pytest.raises(EngineError) as caught:
                rig.engine.handshake(a.fileno(), object())
            assert caught.value.errno == errno.EOPNOTSUPP
            for idle in (-1.0, 1e12, float("nan")):
                with pytest.raises(ValueError, match="idle"):
                    rig.engine.relay(a.fileno(), b.fileno(), options=FlowOptions(idle=idle))
            with pytest.raises(TypeError):
                rig.engine.relay(a.fileno(), b.fileno(), head_a="text")
            os.fstat(a.fileno())
            os.fstat(b.fileno())
            # Refused often, joined at last: nothing was half taken.
            token = rig.hand_over(a, b)
            assert rig.engine.live(token) == (0, 0)
        os.close(reader)
        os.close(writer)
        assert rig.engine.statistics().flows_refused == 0


async def test_capacity_is_a_counted_refusal(engine: Engine) -> None:
    async with engine(flows=4) as rig:
        flows = [rig.join() for _ in range(4)]
        _, a = rig.ends()
        _, b = rig.ends()
        with owned(a, b):
            with pytest.raises(EngineError) as caught:
                rig.engine.relay(a.fileno(), b.fileno())
            assert caught.value.errno == errno.ENOBUFS
            rig.engine.abort(flows[0].token)
            await rig.ended(flows[0].token)
            rig.hand_over(a, b)
        statistics = rig.engine.statistics()
        assert (statistics.flows_refused, statistics.flows_open) == (1, 4)
        assert statistics.flows_total == 5


async def test_a_completed_flow_keeps_its_place_until_polled(kind: Kind) -> None:
    engine = kind.module.Engine(flows=1)
    ends = [tcp_pair() for _ in range(4)]
    with owned(*(end for pair in ends for end in pair)):
        token = engine.relay(ends[0][1].detach(), ends[1][1].detach())
        engine.abort(token)
        await asyncio.sleep(0.1)
        assert engine.live(token) == (0, 0)
        with pytest.raises(EngineError):
            engine.relay(ends[2][1].fileno(), ends[3][1].fileno())
        assert [ended.token for ended in engine.poll()] == [token]
        assert engine.live(token) is None
        assert engine.relay(ends[2][1].detach(), ends[3][1].detach()) not in {0, token}
        engine.close()
        assert len(engine.poll()) == 1


async def test_stale_and_foreign_tokens(engine: Engine) -> None:
    async with engine(flows=2) as rig:
        seen = set()
        for _ in range(20):
            flow = rig.join()
            assert flow.token > 0
            assert flow.token not in seen
            seen.add(flow.token)
            for stranger in (0, -1, 12345, 1 << 62, 1 << 80, *seen - {flow.token}):
                assert rig.engine.live(stranger) is None
                rig.engine.abort(stranger)
            await rig.send(flow.visitor, b"unharmed")
            assert await rig.receive(flow.target, 8) == b"unharmed"
            rig.engine.abort(flow.token)
            await rig.ended(flow.token)


async def test_poll_without_news(engine: Engine) -> None:
    async with engine() as rig:
        assert rig.engine.poll() == []
        assert rig.engine.poll() == []


async def test_fileno_is_readable_only_while_completions_wait(kind: Kind) -> None:
    engine = kind.module.Engine()
    loop = asyncio.get_running_loop()
    rings: list[int] = []
    loop.add_reader(engine.fileno(), rings.append, 1)
    outer = []
    for _ in range(3):
        (visitor, a), (target, b) = tcp_pair(), tcp_pair()
        outer += [visitor, target]
        engine.abort(engine.relay(a.detach(), b.detach()))
    with owned(*outer):
        await asyncio.sleep(0.1)
        assert rings
        ended = 0
        while ended < 3:
            ended += len(engine.poll())
            await asyncio.sleep(0.01)
        rings.clear()
        await asyncio.sleep(0.05)
        assert not rings
        loop.remove_reader(engine.fileno())
        engine.close()


async def test_close_with_open_flows(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        flows = [rig.join(head_a=b"x" * step, idle=5.0 * (step % 2)) for step in range(50)]
        await rig.send(flows[0].visitor, b"y" * 100_000)
        assert await rig.close() is True
        for flow in flows:
            ended = await rig.ended(flow.token)
            assert (ended.reason, ended.side) == (kind.module.REASON_ABORTED, 0)
            assert await rig.is_reset(flow.visitor)
        assert await rig.close() is True


async def test_after_close(kind: Kind) -> None:
    engine = kind.module.Engine()
    assert engine.close() is True
    assert engine.close(0.0) is True
    assert engine.poll() == []
    assert engine.statistics().fds_open == 0
    assert engine.live(1) is None
    _, a = pair_a = tcp_pair()
    _, b = pair_b = tcp_pair()
    with owned(*pair_a, *pair_b):
        for call in (
            lambda: engine.relay(a.fileno(), b.fileno()),
            lambda: engine.handshake(a.fileno(), object()),
            lambda: engine.abort(1),
            engine.fileno,
        ):
            with pytest.raises(EngineClosed):
                call()


async def test_dropped_without_close_warns_and_frees(kind: Kind) -> None:
    engines = [kind.module.Engine(2)]
    with pytest.warns(ResourceWarning, match="close"):
        engines.clear()


async def test_engine_is_made_once(kind: Kind) -> None:
    engine = kind.module.Engine()
    with pytest.raises(EngineError):
        engine.__init__()
    engine.close()
    with pytest.raises(EngineError):
        engine.__init__()
    if kind.is_native:
        with pytest.raises(EngineClosed):
            kind.module.Engine.__new__(kind.module.Engine).poll()


async def test_load_is_spread_over_the_threads(engine_module: ModuleType) -> None:
    kind = Kind(engine_module, True, 2)
    async with Rig(kind) as rig:
        flows = [rig.join() for _ in range(8)]
        for flow in flows:
            await rig.send(flow.visitor, b"ping")
            assert await rig.receive(flow.target, 4) == b"ping"
        assert rig.engine.statistics().threads == (2 if kind.is_native else 0)
        await rig.until(lambda: rig.engine.statistics().bytes_up == 32, "all counted")
