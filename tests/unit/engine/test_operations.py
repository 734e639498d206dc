"""work: what the engine was given ends once, and whoever looks at it later comes to no harm."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, Any, cast

import pytest

from nodepass.engine.operations import (
    Engine,
    Gate,
    Handshake,
    HandshakeResult,
    Reason,
    Relay,
    RelayResult,
    UdpRelay,
    UdpResult,
)
from nodepass.observe.stats import NOTHING, Datagrams

if TYPE_CHECKING:
    from nodepass.engine.types import Completion, Newcomer, UdpCompletion, UdpCounts
else:  # the twin's, which are always there
    from nodepass.engine.twin.engine import Completion, Newcomer, UdpCompletion, UdpCounts

TOKEN = 7
COUNTS = UdpCounts(*range(1, 11))
VISITOR = Newcomer(9, TOKEN, "10.0.0.1", 999)


class Recorder:
    """An engine that writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.counts: UdpCounts | None = COUNTS
        self.moved: tuple[int, int] | None = (3, 4)

    def abort(self, token: int) -> None:
        self.asked.append(("abort", token))

    def udp_shut(self, gate: int) -> None:
        self.asked.append(("shut", gate))

    def udp_relieve(self, gate: int) -> None:
        self.asked.append(("relieve", gate))

    def udp_limit(self, token: int, idle: float) -> None:
        self.asked.append(("limit", token, idle))

    def udp_counts(self, token: int) -> UdpCounts | None:
        assert token == TOKEN
        return self.counts

    def live(self, token: int) -> tuple[int, int] | None:
        assert token == TOKEN
        return self.moved


class Bench:
    """One of each kind of work, all on one engine."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.engine = cast(Engine, self.recorder)
        self.met: list[tuple[Gate, Newcomer]] = []

    def relay(self) -> Relay:
        return Relay(self.engine, TOKEN, asyncio.get_running_loop().create_future())

    def handshake(self) -> Handshake:
        future = asyncio.get_running_loop().create_future()
        return Handshake(self.engine, TOKEN, future, cast("object", self))  # type: ignore[arg-type]

    def udp_relay(self) -> UdpRelay:
        return UdpRelay(self.engine, TOKEN, asyncio.get_running_loop().create_future())

    def gate(self) -> Gate:
        future = asyncio.get_running_loop().create_future()
        return Gate(self.engine, TOKEN, future, lambda *who: self.met.append(who))

    @property
    def asked(self) -> list[tuple[object, ...]]:
        asked, self.recorder.asked = self.recorder.asked, []
        return asked


def udp_end(reason: Reason = Reason.FINISHED, side: int = 0, code: int = 0) -> UdpCompletion:
    return UdpCompletion(TOKEN, COUNTS, reason, side, code, 0)


# --- gates -------------------------------------------------------------------------------------


async def test_gate_tells_its_owner_and_passes_orders_on() -> None:
    bench = Bench()
    gate = bench.gate()
    assert gate.engine is bench.engine
    gate.meet(VISITOR)
    assert bench.met == [(gate, VISITOR)]
    gate.relieve()
    gate.turn_away(VISITOR)
    gate.shut()
    gate.abort()
    assert bench.asked == [
        ("relieve", TOKEN),
        ("abort", VISITOR.token),
        ("shut", TOKEN),
        ("abort", TOKEN),
    ]


def end(work: Any, report: object) -> None:
    """Have a piece of work end as the engine says."""
    work.ending = report
    work.finish()


@pytest.mark.parametrize("how", ["completed", "cancelled"])
async def test_gate_that_has_ended_gives_no_more_orders(how: str) -> None:
    bench = Bench()
    gate = bench.gate()
    if how == "completed":
        end(gate, udp_end(Reason.ABORTED))
    else:
        gate.result.cancel()
    for _ in range(2):
        gate.meet(VISITOR)
        gate.relieve()
        gate.turn_away(VISITOR)
        gate.shut()
        gate.abort()
    assert (bench.asked, bench.met) == ([], [])


async def test_gate_counts_what_never_reached_a_relay() -> None:
    bench = Bench()
    gate = bench.gate()
    assert gate.datagrams() == Datagrams(*COUNTS)
    bench.recorder.counts = None
    assert gate.datagrams() == NOTHING, "the engine has told its end, and we have not heard it yet"
    end(gate, udp_end())
    assert gate.datagrams() == Datagrams(*COUNTS)


# --- UDP relays --------------------------------------------------------------------------------


async def test_udp_relay_counts_while_it_lives_and_afterwards() -> None:
    bench = Bench()
    relay = bench.udp_relay()
    assert relay.live() == (COUNTS.bytes_up, COUNTS.bytes_down)
    bench.recorder.counts = None
    assert relay.live() == (0, 0)
    end(relay, udp_end(Reason.IDLE))
    assert relay.live() == (COUNTS.bytes_up, COUNTS.bytes_down)
    result = relay.result.result()
    assert result == UdpResult(Datagrams(*COUNTS), Reason.IDLE, 0, 0)
    assert (result.up, result.down) == (COUNTS.bytes_up, COUNTS.bytes_down)


async def test_udp_relay_is_limited_and_aborted_until_its_end() -> None:
    bench = Bench()
    relay = bench.udp_relay()
    relay.limit(1.5)
    relay.abort()
    assert bench.asked == [("limit", TOKEN, 1.5), ("abort", TOKEN)]
    end(relay, udp_end(Reason.RESET, 2, errno.ECONNREFUSED))
    relay.limit(0.5)
    relay.abort()
    assert bench.asked == []


@pytest.mark.parametrize("kind", ["relay", "udp_relay", "gate", "handshake"])
async def test_work_whose_engine_did_not_end_knows_nothing(kind: str) -> None:
    bench = Bench()
    work = getattr(bench, kind)()
    work.result.cancel()
    work.abort()
    if isinstance(work, Relay | UdpRelay):
        assert work.live() == (0, 0), "the engine took its counts along"
    if isinstance(work, UdpRelay | Gate):
        assert work.datagrams() == NOTHING
        end(work, udp_end())
    else:
        end(work, Completion(TOKEN, 1, 2, Reason.FINISHED, 0, 0, 0))
    assert work.result.cancelled(), "what comes too late changes nothing"
    assert bench.asked == []


# --- TCP relays and handshakes -----------------------------------------------------------------


async def test_relay_counts_while_it_lives_and_afterwards() -> None:
    bench = Bench()
    relay = bench.relay()
    assert relay.live() == (3, 4)
    bench.recorder.moved = None
    assert relay.live() == (0, 0)
    relay.abort()
    assert bench.asked == [("abort", TOKEN)]
    end(relay, Completion(TOKEN, 5, 6, Reason.RESET, 2, errno.EPIPE, 0))
    assert relay.live() == (5, 6)
    assert relay.result.result() == RelayResult(5, 6, Reason.RESET, 2, errno.EPIPE)


async def test_handshake_ends_once() -> None:
    handshake = Bench().handshake()
    end(handshake, Completion(TOKEN, 0, 0, Reason.FINISHED, 0, 0, 0))
    end(handshake, Completion(TOKEN, 0, 0, Reason.RESET, 1, errno.EBADMSG, 5))
    assert handshake.result.result() == HandshakeResult(Reason.FINISHED, 0, 0)


# --- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "code", "words", "is_clean"),
    [
        (Reason.FINISHED, 0, "finished", True),
        (Reason.IDLE, 0, "idle", True),
        (Reason.ABORTED, 0, "aborted", False),
        (Reason.RESET, 0, "reset", False),
        (Reason.RESET, errno.ECONNREFUSED, "econnrefused", False),
        (Reason.RESET, errno.EBADMSG, "bad TLS record", False),
        (Reason.RESET, errno.ENODATA, "truncated", False),
        (Reason.RESET, 9999, "9999", False),
    ],
)
def test_result_says_how_it_ended(reason: Reason, code: int, words: str, is_clean: bool) -> None:
    udp = UdpResult(NOTHING, reason, 2, code)
    tcp = RelayResult(0, 0, reason, 2, code)
    assert udp.describe() == tcp.describe() == words
    assert udp.is_clean is is_clean
    assert tcp.is_clean is (reason is Reason.FINISHED), "silence is no end of a stream"


@pytest.mark.parametrize(
    ("reason", "code", "words"),
    [
        (Reason.FINISHED, errno.EBADMSG, ""),
        (Reason.RESET, errno.EBADMSG, ""),
        (Reason.ABORTED, 0, "the TLS handshake was given up"),
        (Reason.RESET, errno.ENODATA, "it was closed"),
        (Reason.RESET, errno.ECONNRESET, "connection reset by peer"),
    ],
)
def test_handshake_says_how_the_connection_broke(reason: Reason, code: int, words: str) -> None:
    result = HandshakeResult(reason, code, 0)
    assert result.is_done is (reason is Reason.FINISHED)
    assert result.describe_break().endswith(words)
    assert bool(result.describe_break()) is bool(words)
