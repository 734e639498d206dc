"""The door: who waits, for how long, with what; who is let in again, and who has to wait."""

from __future__ import annotations

import contextlib
import errno
import socket
import time

import pytest
from tests.kit.engine_rig import Kind
from tests.kit.silent_path import Unavailable, street
from tests.kit.tls_rig import cut
from tests.kit.udp_rig import Gate, Mouth, UdpRig
from tests.kit.udp_words import (
    ANY,
    HEADER,
    frame,
    has_ipv6,
    hear_frame,
    hear_frames,
    udp_socket,
)

from nodepass.errors import EngineError

every_kind = pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)

PARKED_BYTES = 65536
"""What one source may have waiting, frame headers included."""

WINDOW = 60
"""Datagrams sent at once, so that none is lost to a full receive buffer."""

COOLING = 1.0
"""Seconds after its link came that a source may have to wait if the link goes at once."""


async def seen(rig: UdpRig, gate: Gate, no_link: int) -> None:
    """Wait until a gate has dropped so many datagrams."""
    await rig.counted(gate.token, no_link=no_link)
    assert rig.counts(gate.token).no_link == no_link


# --- waiting -------------------------------------------------------------------------------------


@every_kind
async def test_parked_datagrams_go_first_and_in_order(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        early = [b"%d" % step for step in range(40)]
        peer = await gate.welcome(visitor, *early)
        await rig.until(
            lambda: rig.engine.statistics().datagram_bytes_held >= len(b"".join(early)), "parked"
        )
        assert rig.engine.statistics().peers_waiting == 1
        bound = rig.bind(peer)
        late = [b"late %d" % step for step in range(40)]
        visitor.say(*late)
        assert await hear_frames(bound.far, 80) == early + late
        await rig.over(peer)
        statistics = rig.engine.statistics()
        assert (statistics.peers_waiting, statistics.datagram_bytes_held) == (0, 0)
        assert (await rig.counted(bound.token, datagrams_up=80)).datagrams_up == 80
        assert len(rig.newcomers) == 0


@every_kind
@pytest.mark.parametrize("size", [0, 900, 8192])
async def test_oldest_parked_datagrams_are_dropped(kind: Kind, size: int) -> None:
    room, surplus = PARKED_BYTES // (HEADER + size), 20
    said = [b"%08d" % step * (size // 8) + b"." * (size % 8) for step in range(room + surplus)]
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        peer = await gate.welcome(visitor, said[0])
        for start in range(1, len(said), WINDOW):
            visitor.say(*said[start : start + WINDOW])
            await rig.let_pass()
        await seen(rig, gate, surplus)
        assert rig.counts(gate.token).overrun == 0
        assert rig.engine.statistics().datagram_bytes_held <= PARKED_BYTES
        bound = rig.bind(peer)
        assert await hear_frames(bound.far, room) == said[surplus:]


@every_kind
async def test_so_many_wait_and_no_more(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate(waiting=3)
        visitors = [gate.visitor() for _ in range(5)]
        peers = [await gate.welcome(visitor, b"hello") for visitor in visitors[:3]]
        visitors[3].say(b"full")
        visitors[4].say(b"full", b"full")
        await seen(rig, gate, 3)
        assert not rig.newcomers
        bound = rig.bind(peers[0])
        assert await hear_frame(bound.far) == b"hello"
        await rig.over(peers[0])
        assert await gate.welcome(visitors[4], b"now")
        visitors[3].say(b"full again")
        await seen(rig, gate, 4)
        # A peer that has its link counts no more, but goes on.
        visitors[0].say(b"still here")
        assert await hear_frame(bound.far) == b"still here"


@every_kind
async def test_nobody_new_after_udp_shut(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        known, waits, late = (gate.visitor() for _ in range(3))
        bound = rig.bind(await gate.welcome(known, b"known"))
        peer = await gate.welcome(waits, b"waits")
        rig.engine.udp_shut(gate.token)
        rig.engine.udp_shut(gate.token)
        # The native engine hears of it by and by.
        tries = 0
        while rig.counts(gate.token).no_link == 0:
            late.sock.close()
            late = gate.visitor()
            late.say(b"late")
            tries += 1
            await rig.until(
                lambda: rig.newcomers or rig.counts(gate.token).no_link, "admitted or dropped"
            )
            rig.newcomers.clear()
            assert tries < 1000
        late.say(b"late", b"late")
        await rig.counted(gate.token, no_link=3)
        assert not rig.newcomers
        known.say(b"goes on")
        assert await hear_frames(bound.far, 2) == [b"known", b"goes on"]
        waiter = rig.bind(peer)
        assert await hear_frame(waiter.far) == b"waits"
        for stranger in (0, -1, 12345, 1 << 70, bound.token):
            rig.engine.udp_shut(stranger)


# --- again ---------------------------------------------------------------------------------------


@every_kind
async def test_cooling_after_a_link_that_ends_at_once(kind: Kind) -> None:
    """A target that always refuses must not cost a link for each datagram."""
    async with UdpRig(kind) as rig:
        gates = [rig.gate() for _ in range(3)]
        visitors = [gate.visitor() for gate in gates]
        born = time.monotonic()
        bounds = []
        for gate, visitor in zip(gates, visitors, strict=True):
            bounds.append(rig.bind(await gate.welcome(visitor, b"hello")))
            assert await hear_frame(bounds[-1].far) == b"hello"
        await bounds[0].far.end()
        cut(bounds[1].far)
        rig.engine.abort(bounds[2].token)
        for bound in bounds:
            await rig.over(bound.token)
        for visitor in visitors:
            visitor.say(b"again", b"and again")
        await rig.until(
            lambda: all(rig.counts(gate.token).no_link == 2 for gate in gates) or rig.newcomers,
            "dropped or let in",
        )
        assert not rig.newcomers or time.monotonic() - born > COOLING / 2
        for gate, visitor in zip(gates, visitors, strict=True):
            # Nobody else is hurt.
            other = gate.visitor()
            await rig.until(lambda one=other: talk(one, rig), "another one is let in")
            rig.newcomers.clear()
            await rig.until(lambda one=visitor: talk(one, rig), "the source is welcome again")
            assert time.monotonic() - born >= COOLING * 0.95
            newcomer = rig.newcomers.popleft()
            assert (newcomer.gate, newcomer.port) == (gate.token, visitor.name[1])


def talk(visitor: Mouth, rig: UdpRig) -> bool:
    """Say something; tell whether anybody was announced."""
    visitor.say(b"once again")
    return bool(rig.newcomers)


@every_kind
async def test_no_cooling_after_a_second(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        born = time.monotonic()
        bound = rig.bind(await gate.welcome(visitor, b"hello"))
        await rig.until(lambda: time.monotonic() - born > COOLING + 0.3, "a second has passed")
        await bound.far.end()
        await rig.over(bound.token)
        assert await gate.welcome(visitor, b"again")
        assert rig.counts(gate.token).no_link == 0


@every_kind
async def test_no_cooling_after_an_idle_limit(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        for _ in range(2):
            bound = rig.bind(await gate.welcome(visitor, b"hello"), idle=0.1)
            over = await rig.over(bound.token)
            assert (over.reason, over.side) == (kind.module.REASON_IDLE, 0)
        assert rig.counts(gate.token).no_link == 0


@every_kind
async def test_abort_of_a_waiting_peer(kind: Kind) -> None:
    """Its completion may take the second that its source has to wait."""
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        visitor = gate.visitor()
        peer = await gate.welcome(visitor, b"one", b"two")
        await rig.until(lambda: rig.engine.statistics().datagram_bytes_held >= 6, "both parked")
        start = time.monotonic()
        rig.engine.abort(peer)
        rig.engine.abort(peer)
        await rig.counted(gate.token, no_link=2)
        visitor.say(b"three")
        await rig.until(
            lambda: rig.counts(gate.token).no_link == 3 or rig.newcomers, "dropped, too"
        )
        assert rig.counts(gate.token).no_link == 3 or time.monotonic() - start > COOLING / 2
        over = await rig.over(peer)
        assert over == (peer, (0,) * 10, kind.module.REASON_ABORTED, 0, 0, 0)
        await rig.until(lambda: talk(visitor, rig), "the source is welcome again")
        assert (await rig.newcomer()).token != peer
        with pytest.raises(EngineError) as caught:
            rig.bind(peer)
        assert caught.value.errno == errno.ENOENT


# --- room ----------------------------------------------------------------------------------------


@every_kind
async def test_relieve_ends_what_has_been_answered_once(kind: Kind) -> None:
    """Look-ups of names: one question, one answer, and silence."""
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        asked, busy, waits = (gate.visitor() for _ in range(3))
        bounds = [rig.bind(await gate.welcome(one, b"?")) for one in (asked, busy, waits)]
        for bound, ear in zip(bounds[:2], (asked, busy), strict=True):
            await bound.far.say(frame(b"!"))
            assert await ear.hear() == b"!"
        rig.engine.udp_relieve(gate.token)  # too early for everybody
        start = time.monotonic()
        while time.monotonic() - start < 1.3:
            busy.say(b"more")
            await rig.let_pass(0.05)
        await rig.counted(bounds[1].token, datagrams_up=2)
        assert not any(rig.is_over(bound.token) for bound in bounds)
        rig.engine.udp_relieve(gate.token)
        over = await rig.over(bounds[0].token)
        assert (over.reason, over.side) == (kind.module.REASON_IDLE, 0)
        assert await bounds[0].far.hear_all() == frame(b"?"), "the link ends politely"
        # The one waits for an answer and may do so for longer; the other is in use.
        for bound, one in zip(bounds[1:], (busy, waits), strict=True):
            await bound.far.say(frame(b"here"))
            assert await one.hear() == b"here"
        assert await gate.welcome(asked, b"another question")
        for stranger in (0, -1, 1 << 70, bounds[1].token):
            rig.engine.udp_relieve(stranger)


@every_kind
async def test_relieve_ends_at_most_64_the_oldest_first(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        gate = rig.gate()
        tokens = []
        for _ in range(70):
            visitor = gate.visitor()
            bound = rig.bind(await gate.welcome(visitor, b"?"))
            await bound.far.say(frame(b"!"))
            assert await visitor.hear() == b"!"
            tokens.append(bound.token)
        await rig.let_pass(1.2)
        rig.engine.udp_relieve(gate.token)
        await rig.told(lambda: sum(map(rig.is_over, tokens)) >= 64, "64 ends")
        for token in tokens[:64]:
            assert (await rig.over(token)).reason == kind.module.REASON_IDLE
        await rig.let_pass(0.1)
        assert not any(map(rig.is_over, tokens[64:]))


# --- addresses of ours ---------------------------------------------------------------------------

OURS = "192.0.2.1"


@pytest.mark.parametrize("kind", ["native", "twin"], indirect=True)
async def test_c1_answers_leave_from_the_address_written_to_once_it_is_back(kind: Kind) -> None:
    """An address that has gone for a while costs the datagrams of that while, no more."""
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(street())
            place.own(OURS)
        except Unavailable as exc:
            pytest.skip(f"this machine cannot lose an address: {exc}")
        async with UdpRig(kind) as rig:
            sock = place.make(lambda: udp_socket(ANY))
            port = sock.getsockname()[1]
            gate = rig.serve(sock)
            visitor = rig.mouth(place.make(lambda: udp_socket("127.0.0.1")))
            visitor.sock.connect((OURS, port))
            visitor.say(b"hello")
            peer = (await rig.newcomer()).token
            bound = rig.bind(peer)
            assert await hear_frame(bound.far) == b"hello"
            await bound.far.say(frame(b"before"))
            assert await visitor.hear() == b"before"
            place.lose(OURS)
            for _ in range(3):
                await bound.far.say(frame(b"into the void") * 2)
            assert (await rig.counted(bound.token, unsent=6)).unsent == 6
            place.own(OURS)
            await bound.far.say(frame(b"after"))
            assert await visitor.hear() == b"after", "it comes from elsewhere"
            assert rig.counts(gate).unsent == 0


@pytest.mark.parametrize("kind", ["native", "twin"], indirect=True)
async def test_who_writes_to_everybody_is_answered_all_the_same(kind: Kind) -> None:
    """Nothing can leave from a broadcast address, which a dual-stack socket names as it is."""
    if not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    with contextlib.ExitStack() as stack:
        try:
            place = stack.enter_context(street())
            place.route("255.255.255.255")
        except Unavailable as exc:
            pytest.skip(f"this machine makes no namespaces: {exc}")
        async with UdpRig(kind) as rig:
            sock = place.make(lambda: udp_socket("::", is_dual=True))
            port = sock.getsockname()[1]
            rig.serve(sock)
            visitor = rig.mouth(place.make(lambda: udp_socket("127.0.0.1")))
            visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            visitor.sock.sendto(b"anybody?", ("255.255.255.255", port))
            bound = rig.bind((await rig.newcomer()).token)
            assert await hear_frame(bound.far) == b"anybody?"
            for _ in range(2):
                await bound.far.say(frame(b"here"))
                assert (await visitor.hear_from())[0] == b"here"
            assert rig.counts(bound.token).unsent == 0
