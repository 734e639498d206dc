"""dial(): a connection comes about, or none does; TLS on the first side; many at once."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket
import time
from pathlib import Path

import pytest
from tests.kit.dial_rig import Engine, answer, both_loops, digest, every_kind, serve, words
from tests.kit.engine_rig import (
    Begun,
    Kind,
    Rig,
    is_called,
    is_open,
    owned,
    reset_on_close,
    stream_for,
)
from tests.kit.timing import has_ipv6
from tests.kit.tls_rig import TlsEnd, ends_for, is_cut

from nodepass.engine.types import FlowOptions

BLOB = os.urandom(3_000_000)


DIALS = 500


EARLY = 0.02
"""Seconds that a timeout may seem too short: the engine's clock has steps of 4 or 10 ms."""


LATE = 5.0
"""Seconds that it may be too long; the wheel's step is a tenth, the rest is for sanitizers."""


A_WHILE = 0.3
"""Seconds in which anything that should not happen would have happened."""


every_pair = pytest.mark.parametrize("pair", ["tcp", "unix"])


every_host = pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
    ],
)


# --- a connection comes about --------------------------------------------------------------------


@every_kind
@every_host
async def test_c15_a_connect_that_has_begun_is_gone_on_with(
    engine: Engine, kind: Kind, host: str
) -> None:
    """Whoever binds the socket to a port of his own has to connect it to know that he has it."""
    async with engine() as rig:
        listener = rig.listen(host)
        sock = stream_for(listener.getsockname())
        assert sock.connect_ex(listener.getsockname()) in (0, errno.EINPROGRESS)
        visitor, a = rig.ends()
        token = int(
            rig.engine.dial(a.fileno(), sock.fileno(), None, options=FlowOptions(timeout=30.0))
        )
        a.detach()
        sock.detach()
        target = await rig.accept(listener)
        await rig.send(visitor, b"question")
        assert await rig.receive(target, 8) == b"question"
        target.close()
        visitor.close()
        await rig.ended(token)


@every_kind
async def test_c15_a_connect_that_has_begun_in_vain_is_unmet(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            name = nobody.getsockname()
            sock = stream_for(name)
            sock.connect_ex(name)
            visitor, a = rig.ends()
            token = int(
                rig.engine.dial(a.fileno(), sock.fileno(), None, options=FlowOptions(timeout=30.0))
            )
            a.detach()
            sock.detach()
            ended = await rig.ended(token)
        assert ended.reason == kind.module.REASON_UNMET
        assert (ended.side, ended.code) == (2, errno.ECONNREFUSED)
        assert await rig.is_reset(visitor)


@every_kind
@every_pair
@every_host
@both_loops
async def test_bytes_travel_both_ways_and_ends_are_passed_on(
    engine: Engine, kind: Kind, pair: str, host: str
) -> None:
    async with engine(pair=pair) as rig:
        listener = rig.listen(host)
        flow = rig.connect(listener.getsockname(), timeout=30.0)
        assert flow.token > 0
        target = await rig.accept(listener)
        await rig.send(flow.visitor, b"question")
        assert await rig.receive(target, 8) == b"question"
        await rig.send(target, b"answer")
        assert await rig.receive(flow.visitor, 6) == b"answer"
        await rig.carried(flow.token, 8, 6)
        flow.visitor.shutdown(socket.SHUT_WR)
        assert await rig.drain(target) == b""
        sending = asyncio.create_task(rig.send(target, BLOB))
        assert await rig.receive(flow.visitor, len(BLOB)) == BLOB
        await sending
        assert not rig.has_ended(flow.token)
        target.shutdown(socket.SHUT_WR)
        assert await rig.drain(flow.visitor) == b""
        ended = await rig.ended(flow.token)
        counts = (8, 6 + len(BLOB))
        assert ended == (flow.token, *counts, kind.module.REASON_FINISHED, 0, 0, 0)
        assert rig.engine.live(flow.token) is None
        statistics = rig.engine.statistics()
        assert (statistics.flows_total, statistics.bytes_up, statistics.bytes_down) == (1, *counts)


@every_host
async def test_the_target_is_where_it_was_told(engine: Engine, host: str) -> None:
    async with engine() as rig:
        right, wrong = rig.listen(host), rig.listen(host)
        rig.connect(right.getsockname()[:2])
        await rig.accept(right)
        assert not is_called(wrong)


async def test_an_address_with_a_scope(engine: Engine) -> None:
    """Without its scope a link-local address leads nowhere."""
    address = link_local()
    if address is None:
        pytest.skip("no interface has a link-local address")
    async with engine() as rig:
        listener = socket.socket(socket.AF_INET6)
        rig.socks.append(listener)
        listener.bind(address)
        listener.listen()
        listener.setblocking(False)
        flow = rig.connect(listener.getsockname())
        target = await rig.accept(listener)
        await rig.chat(flow.visitor, target)


def link_local() -> tuple[str, int, int, int] | None:
    """Return an address of this machine that needs a scope, with port 0."""
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, index, *_ = line.split()
        if digits.startswith("fe80"):
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), 0, 0, int(index, 16)
    return None


@every_pair
async def test_head_comes_first(engine: Engine, pair: str) -> None:
    async with engine(pair=pair) as rig:
        listener = rig.listen()
        visitor, a = rig.ends()
        await rig.send(visitor, b"body, ")
        token = rig.hand_over_to(a, listener.getsockname(), head=b"head, ")
        target = await rig.accept(listener)
        await rig.send(visitor, b"tail")
        assert await rig.receive(target, 16) == b"head, body, tail"
        await rig.carried(token, 16, 0)


async def test_head_larger_than_every_buffer(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        listener = rig.listen(rcvbuf=8192)
        visitor, a = rig.ends()
        b = stream_for(listener.getsockname())
        b.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        token = rig.hand_over_to(a, listener.getsockname(), b, head=BLOB, timeout=10.0)
        await rig.send(visitor, b"tail")
        visitor.shutdown(socket.SHUT_WR)
        target = await rig.accept(listener)
        assert await rig.drain(target) == BLOB + b"tail"
        target.close()
        ended = await rig.ended(token)
        assert (ended.reason, ended.up) == (kind.module.REASON_FINISHED, len(BLOB) + 4)


@every_kind
async def test_a_target_that_does_not_read_is_heard(engine: Engine, kind: Kind) -> None:
    """One direction is stopped by back-pressure, the other goes on."""
    async with engine() as rig:
        listener = rig.listen(rcvbuf=8192)
        flow = rig.connect(listener.getsockname(), timeout=30.0)
        target = await rig.accept(listener)
        # More than all buffers on the way may grow to: 15 MB by Linux' defaults.
        stuck = asyncio.create_task(rig.send(flow.visitor, BLOB * 20))
        await rig.until(lambda: rig.engine.statistics().parked_bytes, "bytes parked")
        for _ in range(20):
            await rig.send(target, b"stop")
            assert await rig.receive(flow.visitor, 4) == b"stop"
        assert not stuck.done()
        reset_on_close(target)
        target.close()
        ended = await rig.ended(flow.token)
        assert ended[2:5] == (80, kind.module.REASON_RESET, 2)
        assert isinstance(
            (await asyncio.gather(stuck, return_exceptions=True))[0],
            ConnectionResetError | BrokenPipeError,
        )


async def test_everything_said_and_ended_before_the_call(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        listener = rig.listen()
        visitor, a = rig.ends()
        await rig.send(visitor, b"early")
        visitor.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.01)
        token = rig.hand_over_to(a, listener.getsockname())
        target = await rig.accept(listener)
        assert await rig.drain(target) == b"early"
        await rig.send(target, b"bird")
        target.close()
        assert await rig.drain(visitor) == b"bird"
        assert (await rig.ended(token))[1:] == (5, 4, kind.module.REASON_FINISHED, 0, 0, 0)


@every_kind
@every_pair
@pytest.mark.parametrize("early", [b"", b"early", BLOB], ids=["nothing", "little", "much"])
async def test_what_is_said_while_it_dials_arrives_whole(
    engine: Engine, kind: Kind, pair: str, early: bytes
) -> None:
    """Nor does the first side's half-close, with or without a word before it, end the dial."""
    async with engine(pair=pair) as rig:
        full = rig.listen_to_nobody()
        flow = rig.connect(full.name, head=b"head, ", timeout=30.0)

        async def speak() -> None:
            await rig.send(flow.visitor, early)
            flow.visitor.shutdown(socket.SHUT_WR)

        speaking = asyncio.create_task(speak())
        await asyncio.sleep(A_WHILE)
        assert not rig.has_ended(flow.token)
        assert rig.engine.live(flow.token) == (0, 0)
        full.relent()
        target = await full.accept(rig)
        got = await rig.drain(target)
        await speaking
        assert hashlib.sha256(got).digest() == hashlib.sha256(b"head, " + early).digest()
        await rig.send(target, b"answer")
        target.close()
        assert await rig.drain(flow.visitor) == b"answer"
        ended = await rig.ended(flow.token)
        assert ended[1:] == (6 + len(early), 6, kind.module.REASON_FINISHED, 0, 0, 0)


# --- none does -----------------------------------------------------------------------------------


@every_kind
@every_host
@both_loops
async def test_refused(engine: Engine, kind: Kind, host: str) -> None:
    async with engine() as rig:
        address = rig.where_nobody_listens(host)
        visitor, a = rig.ends()
        b = stream_for(address)
        fds = (a.fileno(), b.fileno())
        await rig.send(visitor, b"nor this")
        token = rig.hand_over_to(a, address, b, head=b"never heard", timeout=30.0)
        ended = await rig.ended(token)
        assert ended == (token, 0, 0, kind.module.REASON_UNMET, 2, errno.ECONNREFUSED, 0)
        assert not any(map(is_open, fds))
        assert await rig.heard_before_reset(visitor) == b""
        assert rig.engine.live(token) is None
        assert rig.engine.statistics().flows_total == 1


async def test_refused_late(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        full = rig.listen_to_nobody()
        flow = rig.connect(full.name, head=b"never heard", timeout=30.0)
        await rig.send(flow.visitor, b"nor this")
        await asyncio.sleep(A_WHILE)
        assert not rig.has_ended(flow.token)
        full.close()
        ended = await rig.ended(flow.token)
        assert ended[1:] == (0, 0, kind.module.REASON_UNMET, 2, errno.ECONNREFUSED, 0)
        assert await rig.heard_before_reset(flow.visitor) == b""


async def test_no_way_there(engine: Engine, kind: Kind) -> None:
    """The kernel says so within the call: no stream goes to a group."""
    async with engine() as rig:
        flow = rig.connect(("224.0.0.1", 9), head=b"never heard", timeout=30.0)
        ended = await rig.ended(flow.token)
        assert ended[1:5] == (0, 0, kind.module.REASON_UNMET, 2)
        assert ended.code in {errno.ENETUNREACH, errno.EHOSTUNREACH}
        assert await rig.heard_before_reset(flow.visitor) == b""


@every_kind
@both_loops
async def test_time_over(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        full = rig.listen_to_nobody()
        visitor, a = rig.ends()
        b = stream_for(full.name)
        fds = (a.fileno(), b.fileno())
        await rig.send(visitor, b"nor this")
        began = time.monotonic()
        token = rig.hand_over_to(a, full.name, b, head=b"never heard", timeout=0.3)
        ended = await rig.ended(token)
        assert 0.3 - EARLY <= time.monotonic() - began < 0.3 + LATE
        assert ended == (token, 0, 0, kind.module.REASON_UNMET, 2, errno.ETIMEDOUT, 0)
        assert not any(map(is_open, fds))
        assert await rig.heard_before_reset(visitor) == b""


async def test_times_of_many_and_far(engine: Engine, kind: Kind) -> None:
    """Short ones are over in time among others far beyond the wheel's reach."""
    async with engine() as rig:
        full = rig.listen_to_nobody()
        far = [rig.connect(full.name, timeout=limit).token for limit in (0.0, 60.0, 600.0, 4e6)]
        began = time.monotonic()
        near = {0.04 * step: rig.connect(full.name, timeout=0.04 * step) for step in range(1, 21)}
        for limit, flow in near.items():
            ended = await rig.ended(flow.token)
            assert time.monotonic() - began >= limit - EARLY
            assert (ended.reason, ended.code) == (kind.module.REASON_UNMET, errno.ETIMEDOUT)
        assert time.monotonic() - began < max(near) + LATE
        assert not any(map(rig.has_ended, far))


@every_kind
async def test_time_does_not_count_once_there_is_a_connection(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        full, listener = rig.listen_to_nobody(), rig.listen()
        lost = [rig.connect(full.name, timeout=0.3) for _ in range(4)]
        flows = []
        for _ in range(4):
            flow = rig.connect(listener.getsockname(), timeout=0.3)
            flows.append((flow, await rig.accept(listener)))
        for miss in lost:
            assert (await rig.ended(miss.token)).code == errno.ETIMEDOUT
        await asyncio.sleep(2 * A_WHILE)
        for flow, target in flows:
            assert not rig.has_ended(flow.token)
            await rig.chat(flow.visitor, target)
        await asyncio.sleep(2 * A_WHILE)
        for flow, target in flows:
            assert not rig.has_ended(flow.token)
            await rig.chat(flow.visitor, target)
            await rig.carried(flow.token, 8, 8)


async def test_no_time_limit(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        full = rig.listen_to_nobody()
        flows = [rig.connect(full.name, timeout=0.0), rig.connect(full.name)]
        await asyncio.sleep(2 * A_WHILE)
        for flow in flows:
            assert not rig.has_ended(flow.token)
            assert rig.engine.live(flow.token) == (0, 0)
            rig.engine.abort(flow.token)
            assert (await rig.ended(flow.token)).reason == kind.module.REASON_ABORTED


@every_kind
@pytest.mark.parametrize(
    ("host", "goal"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "0.0.0.0"),
        pytest.param(
            "::1", "::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
        ),
    ],
)
async def test_never_talks_to_itself(engine: Engine, kind: Kind, host: str, goal: str) -> None:
    """What the kernel does once in a while: it picks the wanted port as our own."""
    async with engine() as rig:
        visitor, a = rig.ends()
        b = stream_for((host, 0))
        b.bind((host, 0))
        await rig.send(visitor, b"nor this")
        goal_port = b.getsockname()[1]
        token = rig.hand_over_to(a, (goal, goal_port), b, head=b"never heard", timeout=30.0)
        ended = await rig.ended(token)
        assert ended == (token, 0, 0, kind.module.REASON_UNMET, 2, errno.ECONNREFUSED, 0)
        assert await rig.heard_before_reset(visitor) == b""


async def test_target_that_is_taken(engine: Engine, kind: Kind) -> None:
    """Connected, listening, or on its way somewhere else: the kernel's answer is passed on."""
    async with engine() as rig:
        listener, full = rig.listen(), rig.listen_to_nobody()
        peer, connected = rig.ends()
        listening = stream_for(("127.0.0.1", 0))
        listening.listen()
        connecting = stream_for(full.name)
        connecting.connect_ex(full.name)
        with owned(connected, listening, connecting):
            for b, code in (
                (connected, errno.EISCONN),
                (listening, errno.EISCONN),
                (connecting, errno.EALREADY),
            ):
                visitor, a = rig.ends()
                token = rig.hand_over_to(a, listener.getsockname(), b, head=b"never heard")
                ended = await rig.ended(token)
                assert ended == (token, 0, 0, kind.module.REASON_UNMET, 2, code, 0)
                assert await rig.heard_before_reset(visitor) == b""
        assert await rig.heard_before_reset(peer) == b""
        assert not is_called(listener)


# --- TLS on the first side -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
@pytest.mark.parametrize("is_late", [False, True])
async def test_tls_on_the_first_side(engine: Engine, kind: Kind, is_late: bool) -> None:
    """What was read, what lies inside the Connection, what lies in the socket; in this order."""
    async with engine() as rig:
        full, listener = rig.listen_to_nobody(), rig.listen()
        end, a, connection = ends_for(rig, "a", "a")
        assert isinstance(end, TlsEnd)
        assert connection is not None
        connection.bio_write(end.seal(b"inside, "))
        await end.say(b"early, ")
        address = full.name if is_late else listener.getsockname()
        token = rig.hand_over_to(a, address, tls=connection, head=b"head, ", timeout=30.0)
        assert rig.engine.statistics().tls_in_use == 1
        if is_late:
            await asyncio.sleep(A_WHILE)
            assert not rig.has_ended(token)
            full.relent()
        await end.say(b"late")
        await end.end()
        target = await (full.accept(rig) if is_late else rig.accept(listener))
        assert await rig.drain(target) == b"head, inside, early, late"
        sending = asyncio.create_task(rig.send(target, BLOB))
        assert await end.hear(len(BLOB)) == BLOB
        await sending
        target.close()
        assert await end.hear_all() == b""
        ended = await rig.ended(token)
        assert ended == (token, 25, len(BLOB), kind.module.REASON_FINISHED, 0, 0, 0)


@pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
@pytest.mark.parametrize("way", ["refused", "late", "aborted"])
async def test_tls_without_a_connection_is_cut(engine: Engine, kind: Kind, way: str) -> None:
    async with engine() as rig:
        full = rig.listen_to_nobody()
        end, a, connection = ends_for(rig, "a", "a")
        await end.say(b"nor this")
        address = rig.where_nobody_listens() if way == "refused" else full.name
        limit = 0.1 if way == "late" else 30.0
        token = rig.hand_over_to(a, address, tls=connection, head=b"never heard", timeout=limit)
        if way == "aborted":
            rig.engine.abort(token)
        why = {
            "refused": (kind.module.REASON_UNMET, 2, errno.ECONNREFUSED),
            "late": (kind.module.REASON_UNMET, 2, errno.ETIMEDOUT),
            "aborted": (kind.module.REASON_ABORTED, 0, 0),
        }
        assert await rig.ended(token) == (token, 0, 0, *why[way], 0)
        assert await is_cut(end)
        assert rig.engine.statistics().tls_in_use == 0


async def test_reset_of_a_first_side_with_tls_ends_the_dial(engine: Engine, kind: Kind) -> None:
    async with engine() as rig:
        full = rig.listen_to_nobody()
        end, a, connection = ends_for(rig, "a", "a")
        token = rig.hand_over_to(a, full.name, tls=connection, timeout=60.0)
        await end.say(b"last words")
        reset_on_close(end.sock)
        end.sock.close()
        ended = await rig.ended(token)
        assert ended[1:6] == (0, 0, kind.module.REASON_UNMET, 1, errno.ECONNRESET)


# --- all of it at once ---------------------------------------------------------------------------


@pytest.mark.deadline(120)
@every_kind
async def test_many_at_once(engine: Engine, kind: Kind, many_fds: None) -> None:
    """Of a third nobody listens; what the others carry is compared, both ways."""
    async with engine() as rig:
        listener, nobody = rig.listen(), rig.where_nobody_listens()
        met = [index for index in range(DIALS) if index % 3 < 2]
        heard: dict[int, bytes] = {}
        serving = asyncio.create_task(serve(rig, listener, len(met), heard))
        flows = []
        for index in range(DIALS):
            options = {"timeout": 30.0 * (index % 2)}
            address = listener.getsockname() if index in met else nobody
            flows.append(rig.connect(address, head=index.to_bytes(4, "big"), **options))
        async with asyncio.TaskGroup() as group:
            for index, flow in enumerate(flows):
                ask = visit if index in met else be_refused
                group.create_task(ask(rig, kind, index, flow))
        await serving
        assert heard == {index: digest(question(index)) for index in met}
        statistics = rig.engine.statistics()
        assert (statistics.flows_total, statistics.flows_open) == (DIALS, 0)
        assert statistics.bytes_up == sum(4 + len(question(index)) for index in met)
        assert statistics.bytes_down == sum(len(answer(index)) for index in met)


def question(index: int) -> bytes:
    """Return what the visitor of this number says."""
    return words(f"question {index}")


async def visit(rig: Rig, kind: Kind, index: int, flow: Begun) -> None:
    said, told = question(index), answer(index)
    await rig.send(flow.visitor, said)
    flow.visitor.shutdown(socket.SHUT_WR)
    assert digest(await rig.drain(flow.visitor)) == digest(told)
    ended = await rig.ended(flow.token)
    counts = (4 + len(said), len(told))
    assert ended == (flow.token, *counts, kind.module.REASON_FINISHED, 0, 0, 0)


async def be_refused(rig: Rig, kind: Kind, index: int, flow: Begun) -> None:
    assert await rig.heard_before_reset(flow.visitor) == b"", index
    ended = await rig.ended(flow.token)
    assert ended[1:] == (0, 0, kind.module.REASON_UNMET, 2, errno.ECONNREFUSED, 0), index
