"""dial(): a first side that ends early, targets that hang up at once, idle limits."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import threading
from collections.abc import Iterator

import pytest
from tests.kit.dial_rig import Engine, both_loops, every_kind
from tests.kit.engine_rig import (
    PATIENCE,
    Kind,
    Rig,
    is_open,
    owned,
    reset_on_close,
    stream_for,
    tcp_pair,
)
from tests.kit.tls_rig import ends_for, is_cut

from nodepass.engine.types import FlowOptions
from nodepass.net.resolver import SocketAddress

SAID = b"413 go away\r\n"


CIRCLE = 16
"""Flows that keep the engine busy ..."""


HANDFUL = 262144
"""... and bytes that each of them begins with: a round takes a millisecond."""


# --- the first side, while it dials --------------------------------------------------------------


@every_kind
@both_loops
@pytest.mark.parametrize("said", [b"", b"last words"])
async def test_reset_of_the_first_side_ends_the_dial(
    engine: Engine, kind: Kind, said: bytes
) -> None:
    async with engine() as rig:
        full = rig.listen_to_nobody()
        visitor, a = rig.ends()
        b = stream_for(full.name)
        fds = (a.fileno(), b.fileno())
        token = rig.hand_over_to(a, full.name, b, timeout=60.0)
        await asyncio.sleep(0.05)
        await rig.send(visitor, said)
        reset_on_close(visitor)
        visitor.close()
        ended = await rig.ended(token)
        assert ended == (token, 0, 0, kind.module.REASON_UNMET, 1, errno.ECONNRESET, 0)
        assert not any(map(is_open, fds))


async def test_first_side_that_was_reset_before(engine: Engine, kind: Kind) -> None:
    """The dial may have been made by then: whoever is there sees no clean end."""
    async with engine() as rig:
        full, listener = rig.listen_to_nobody(), rig.listen()
        for address in (full.name, listener.getsockname()):
            visitor, a = rig.ends()
            reset_on_close(visitor)
            visitor.close()
            await asyncio.sleep(0.01)
            token = rig.hand_over_to(a, address, head=b"head", timeout=60.0)
            ended = await rig.ended(token)
            assert (ended.down, ended.side, ended.code) == (0, 1, errno.ECONNRESET)
            reasons = {kind.module.REASON_UNMET}
            if address != full.name:
                reasons.add(kind.module.REASON_RESET)
            assert ended.reason in reasons
        await asyncio.sleep(0.05)
        with contextlib.suppress(BlockingIOError):
            target, _ = listener.accept()
            rig.socks.append(target)
            assert await rig.heard_before_reset(target) in {b"", b"head"}


async def test_abort_while_it_dials(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        full = rig.listen_to_nobody()
        flow = rig.connect(full.name, head=b"never heard", timeout=60.0)
        await rig.send(flow.visitor, b"nor this")
        await asyncio.sleep(0.05)
        rig.engine.abort(flow.token)
        rig.engine.abort(flow.token)
        ended = await rig.ended(flow.token)
        assert ended == (flow.token, 0, 0, kind.module.REASON_ABORTED, 0, 0, 0)
        assert await rig.heard_before_reset(flow.visitor) == b""
        rig.engine.abort(flow.token)


@every_kind
async def test_abort_at_any_moment(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        listener = rig.listen()
        for step in range(60):
            flow = rig.connect(listener.getsockname(), head=b"!" * step, timeout=float(step % 2))
            for _ in range(step % 5):
                await asyncio.sleep(0)
            if step % 4 == 0:
                await asyncio.sleep(step / 20_000)
            rig.engine.abort(flow.token)
            ended = await rig.ended(flow.token)
            assert (ended.reason, ended.side) == (kind.module.REASON_ABORTED, 0)
            assert await rig.heard_before_reset(flow.visitor) == b""
        met = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                target, _ = listener.accept()
                with owned(target):
                    target.setblocking(False)
                    heard = await rig.heard_before_reset(target)
                    assert heard == b"!" * len(heard)
                met += 1
        assert met, "some had been connected"


async def test_close_while_it_dials(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        full = rig.listen_to_nobody()
        flows = [
            rig.connect(full.name, head=b"x" * step, timeout=5.0 * (step % 2))
            for step in range(50)
        ]
        await rig.send(flows[0].visitor, b"y" * 100_000)
        assert await rig.close() is True
        for flow in flows:
            ended = await rig.ended(flow.token)
            assert ended == (flow.token, 0, 0, kind.module.REASON_ABORTED, 0, 0, 0)
            assert await rig.heard_before_reset(flow.visitor) == b""


# --- a target that accepts, and hangs up ---------------------------------------------------------


@contextlib.contextmanager
def rude_target(
    rig: Rig, calls: int, said: bytes, *, ends: bool = False
) -> Iterator[SocketAddress]:
    """Say something to each caller and reset at once, without waiting for any event loop."""
    listener = rig.listen()
    listener.settimeout(PATIENCE)

    def serve() -> None:
        for _ in range(calls):
            sock, _ = listener.accept()
            sock.sendall(said)
            if ends:
                sock.shutdown(socket.SHUT_WR)
            reset_on_close(sock)
            sock.close()

    thread = threading.Thread(target=serve, name="rude target")
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        thread.join()


def keep_busy(rig: Rig) -> None:
    """Let bytes go round in a circle of flows: the engine hears of others when all is over."""
    pairs = [tcp_pair() for _ in range(CIRCLE)]
    for (_, a), (b, _) in zip(pairs, pairs[1:] + pairs[:1], strict=True):
        rig.hand_over(a, b, head_a=bytes(HANDFUL))


def is_busy_at(step: int, rig: Rig) -> bool:
    """Tell whether this is the round from which on the engine has other things to do."""
    # The twin has no thread that might be quick: it looks when all have been dialled.
    return step == 2 and rig.kind.is_native


@every_kind
@both_loops
async def test_what_a_target_says_before_its_reset_arrives(engine: Engine, kind: Kind) -> None:
    """Many at once: of some the engine first hears when all is over, of others before that."""
    calls = 60
    async with engine() as rig:
        for step in range(4):
            if is_busy_at(step, rig):
                keep_busy(rig)
            with rude_target(rig, calls, SAID) as address:
                flows = [rig.connect(address, timeout=30.0) for _ in range(calls)]
                for flow in flows:
                    assert await rig.heard_before_reset(flow.visitor) == SAID
                    ended = await rig.ended(flow.token)
                    reset = (kind.module.REASON_RESET, 2, errno.ECONNRESET, 0)
                    assert ended == (flow.token, 0, len(SAID), *reset)


@every_kind
async def test_what_a_target_says_before_its_end_and_its_reset_arrives(
    engine: Engine, kind: Kind
) -> None:
    """Its end has been said, so the visitor may see it; that the flow was cut stays true."""
    calls = 60
    async with engine() as rig:
        for step in range(4):
            if is_busy_at(step, rig):
                keep_busy(rig)
            with rude_target(rig, calls, SAID, ends=True) as address:
                flows = [rig.connect(address, timeout=30.0) for _ in range(calls)]
                for flow in flows:
                    assert await rig.receive(flow.visitor, len(SAID)) == SAID
                    ended = await rig.ended(flow.token)
                    assert ended[1:5] == (0, len(SAID), kind.module.REASON_RESET, 2)
                    assert ended.code in {errno.ECONNRESET, errno.EPIPE}
                    await rig.until(
                        lambda sock=flow.visitor: sock.getsockopt(
                            socket.SOL_SOCKET, socket.SO_ERROR
                        ),
                        "the reset",
                    )


@pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
async def test_what_a_target_says_before_its_reset_arrives_within_tls(
    engine: Engine, kind: Kind
) -> None:
    calls = 30
    async with engine() as rig:
        for step in range(4):
            if is_busy_at(step, rig):
                keep_busy(rig)
            with rude_target(rig, calls, SAID) as address:
                flows = []
                for _ in range(calls):
                    end, a, connection = ends_for(rig, "a", "a")
                    flows.append((end, rig.hand_over_to(a, address, tls=connection)))
                for end, token in flows:
                    assert await end.hear(len(SAID)) == SAID
                    assert await is_cut(end)
                    ended = await rig.ended(token)
                    assert ended[1:5] == (0, len(SAID), kind.module.REASON_RESET, 2)


# --- idle limits ---------------------------------------------------------------------------------


@every_kind
async def test_c24_a_dialled_relay_has_an_idle_limit(engine: Engine, kind: Kind) -> None:
    """It begins with the connection, bytes either way put it off, and its end is a reset."""
    async with engine() as rig:
        listener = rig.listen()
        told = rig.connect(listener.getsockname(), timeout=30.0, idle=0.4)
        target = await rig.accept(listener)
        silent = rig.connect(listener.getsockname(), idle=0.4)
        await rig.accept(listener)
        forever = rig.connect(listener.getsockname(), timeout=0.2)
        await rig.accept(listener)
        for _ in range(8):
            await asyncio.sleep(0.1)
            await rig.send(target, b"one way")
        assert not rig.has_ended(told.token)
        ended = await rig.ended(silent.token)
        assert (ended.reason, ended.side) == (kind.module.REASON_IDLE, 0)
        ended = await rig.ended(told.token)
        assert (ended.reason, ended.down) == (kind.module.REASON_IDLE, 56)
        assert await rig.receive(told.visitor, 56) == b"one way" * 8
        assert await rig.is_reset(told.visitor)
        assert await rig.is_reset(target)
        assert not rig.has_ended(forever.token)


@every_kind
async def test_c24_a_half_closed_relay_ends_at_its_idle_limit_only(
    engine: Engine, kind: Kind
) -> None:
    async with engine() as rig:
        listener = rig.listen()
        flow = rig.connect(listener.getsockname(), idle=0.4)
        target = await rig.accept(listener)
        await rig.send(flow.visitor, b"question")
        flow.visitor.shutdown(socket.SHUT_WR)
        assert await rig.receive(target, 8) == b"question"
        await asyncio.sleep(0.1)
        assert not rig.has_ended(flow.token)
        await rig.send(target, b"answer")
        assert await rig.receive(flow.visitor, 6) == b"answer"
        assert (await rig.ended(flow.token)).reason == kind.module.REASON_IDLE
        assert await rig.is_reset(flow.visitor)


@every_kind
async def test_c24_a_slow_dial_is_not_idle(engine: Engine, kind: Kind) -> None:
    """What it waits for its answer does not count."""
    async with engine() as rig:
        full = rig.listen_to_nobody()
        flow = rig.connect(full.name, timeout=1.0, idle=0.1)
        ended = await rig.ended(flow.token)
        assert (ended.reason, ended.code) == (kind.module.REASON_UNMET, errno.ETIMEDOUT)


@every_kind
@pytest.mark.parametrize("idle", [-1.0, float("nan"), float("inf"), 1e12])
async def test_c24_bad_idle_limits_of_a_dial(engine: Engine, kind: Kind, idle: float) -> None:
    async with engine() as rig:
        listener = rig.listen()
        sock = stream_for(listener.getsockname())
        visitor, a = rig.ends()
        with owned(visitor, a, sock), pytest.raises(ValueError, match="idle"):
            rig.engine.dial(
                a.fileno(), sock.fileno(), listener.getsockname(), options=FlowOptions(idle=idle)
            )
