"""Both halves in a row, as server and client have them: much traffic, many visitors, no traces.

visitors == gate [engine] link [engine] target socket == echo
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.engine.conftest import IS_SANITIZED
from tests.kit.engine_rig import Kind, resident_bytes
from tests.kit.udp_rig import Gate, Mouth, UdpRig
from tests.kit.udp_words import ANY, frame, udp_socket

every_kind = pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
tls_or_not = pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])

WINDOW = 4
"""Datagrams of one visitor under way: all of them fit into any receive buffer at once."""


@contextlib.asynccontextmanager
async def echo(rig: UdpRig) -> AsyncIterator[tuple[str, int]]:
    """Run a target that sends everything back; yield its address."""
    with udp_socket() as sock:
        task = asyncio.create_task(rig.echo(sock))
        try:
            yield sock.getsockname()
        finally:
            task.cancel()
            await asyncio.wait({task})


def connected_to(address: tuple[str, int]) -> socket.socket:
    sock = udp_socket()
    sock.connect(address)
    return sock


def sealed(visitor: int, number: int, dice: random.Random) -> bytes:
    """Return a datagram that tells of every change: sequence number, any bytes, digest."""
    body = b"%d/%d/" % (visitor, number) + dice.randbytes(dice.choice([0, 10, 500, 1300]))
    return body + hashlib.sha256(body).digest()[:8]


async def exchange(visitor: Mouth, said: list[bytes]) -> None:
    """Have a visitor say things and hear each of them again, in order."""
    for start in range(0, len(said), WINDOW):
        part = said[start : start + WINDOW]
        visitor.say(*part)
        assert await visitor.hear_many(len(part)) == part


@every_kind
@tls_or_not
async def test_f25_f21_fifty_visitors_and_an_echo(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig, echo(rig) as address:
        gate = rig.gate()
        dice = random.Random(25)
        visitors, tokens, scripts = [], [], []
        for step in range(50):
            script = [sealed(step, number, dice) for number in range(200)]
            visitor = gate.visitor()
            peer = await gate.welcome(visitor, script[0])
            tokens.append(rig.tunnel(peer, connected_to(address), is_tls=is_tls))
            visitors.append(visitor)
            scripts.append(script)
        for visitor, script in zip(visitors, scripts, strict=True):
            assert await visitor.hear() == script[0]
        await asyncio.gather(
            *(exchange(one, script[1:]) for one, script in zip(visitors, scripts, strict=True))
        )
        for pair, script in zip(tokens, scripts, strict=True):
            size = sum(map(len, script))
            for token in pair:
                counts = await rig.counted(token, datagrams_up=200, datagrams_down=200)
                assert counts == (200, 200, size, size, 0, 0, 0, 0, 0, 0)
        assert rig.engine.statistics().datagrams_up == 20_000
        assert rig.engine.statistics().datagrams_dropped == 0
        # The visitors go; the server's idle limit ends its half, and with it the other one.
        for bound, _ in tokens:
            rig.engine.udp_limit(bound, 0.1)
        for bound, dialled in tokens:
            assert (await rig.over(bound)).reason == kind.module.REASON_IDLE
            assert (await rig.over(dialled)).reason == kind.module.REASON_FINISHED


@every_kind
async def test_f21_big_datagrams_through_both_halves(kind: Kind) -> None:
    async with UdpRig(kind) as rig, echo(rig) as address:
        gate = rig.gate(datagram=65535)
        visitor = gate.visitor()
        dice = random.Random(21)
        said = [dice.randbytes(size) for size in (65507, 0, 65507, 1, 40_000, 9000)]
        peer = await gate.welcome(visitor, said[0])
        rig.tunnel(peer, connected_to(address), dial={"datagram": 65535})
        assert await visitor.hear() == said[0]
        for data in said[1:]:
            visitor.say(data)
            assert await visitor.hear() == data


def open_descriptors() -> int:
    """Return how many this process has; 0 where nobody tells."""
    listing = Path("/proc/self/fd")
    return len(list(listing.iterdir())) if listing.is_dir() else 0


@every_kind
async def test_f7_ten_thousand_datagrams_leave_no_descriptor(kind: Kind) -> None:
    async with UdpRig(kind) as rig, echo(rig) as address:
        gate = rig.gate()
        visitor = gate.visitor()
        before = open_descriptors()
        peer = await gate.welcome(visitor, b"first")
        bound, dialled = rig.tunnel(peer, connected_to(address))
        assert await visitor.hear() == b"first"
        for start in range(0, 10_000, 20):
            said = [b"%d" % number for number in range(start, start + 20)]
            visitor.say(*said)
            assert await visitor.hear_many(20) == said
        counts = await rig.counted(bound, datagrams_down=10_001)
        assert counts[:2] == (10_001, 10_001)
        assert rig.engine.statistics().fds_open == 4
        rig.engine.abort(bound)
        await rig.over(bound)
        await rig.over(dialled)
        assert open_descriptors() == before


@every_kind
async def test_visitors_come_and_go_at_random(kind: Kind) -> None:
    """Ends of all sorts at any moment; whoever is left is served."""
    dice = random.Random(7)
    async with UdpRig(kind) as rig, echo(rig) as address:
        gate = rig.gate()
        steady = gate.visitor()
        rig.tunnel(await gate.welcome(steady, b"steady"), connected_to(address))
        assert await steady.hear() == b"steady"
        for step in range(120):
            visitor = gate.visitor()
            peer = await gate.welcome(visitor, b"x" * dice.randrange(100))
            if dice.random() < 0.2:
                rig.engine.abort(peer)
                await rig.over(peer)
                continue
            pair = rig.tunnel(peer, connected_to(address), is_tls=dice.random() < 0.3)
            for _ in range(dice.randrange(3)):
                await rig.let_pass()
            match dice.randrange(4):
                case 0:
                    rig.engine.abort(pair[0])
                case 1:
                    rig.engine.abort(pair[1])
                case 2:
                    rig.engine.udp_limit(pair[dice.randrange(2)], 0.05)
                case _:
                    continue  # left open, for close() to end
            for token in pair:
                assert (await rig.over(token)).token == token
            steady.say(b"%d" % step)
            assert await steady.hear() == b"%d" % step


# --- many sources --------------------------------------------------------------------------------

SOURCES = 100_000
BATCH = 1000
"""Links at once; each takes two descriptors."""


def sources(count: int) -> list[str]:
    """Return so many addresses of loopback, none of them twice."""
    return [f"127.{1 + n // 65025}.{1 + n // 255 % 255}.{1 + n % 255}" for n in range(count)]


async def visit_once(rig: UdpRig, gate: Gate, addresses: list[str]) -> None:
    """Let each address send one datagram, bind it, and wait until all relays are over."""
    for start in range(0, len(addresses), 100):
        for address in addresses[start : start + 100]:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((address, 0))
                sock.sendto(address.encode(), ("127.0.0.1", gate.port))
        await rig.told(
            lambda want=start + 100: len(rig.newcomers) >= min(want, len(addresses)),  # type: ignore[misc]
            "newcomers",
        )
    assert {newcomer.host for newcomer in rig.newcomers} == set(addresses)
    with contextlib.ExitStack() as stack:
        links = []
        while rig.newcomers:
            newcomer = rig.newcomers.popleft()
            far, near = socket.socketpair()
            stack.enter_context(far)
            near.setblocking(False)
            links.append((far, newcomer.host, rig.hand_bind(newcomer.token, near, idle=0.1)))
        for far, host, token in links:
            assert (await rig.over(token)).reason == rig.kind.module.REASON_IDLE
            assert far.recv(100) == frame(host.encode())


@pytest.mark.parametrize("kind", ["native", "twin"], indirect=True)
@pytest.mark.slow
@pytest.mark.deadline(150)
async def test_a_hundred_thousand_sources_come_and_go(kind: Kind, many_fds: None) -> None:
    """A tenth of them on the twin, which takes as long for it."""
    count = SOURCES if kind.is_native else SOURCES // 10
    async with UdpRig(kind, flows=8192) as rig:
        gate = rig.gate(ANY, waiting=4096)
        addresses = sources(count)
        await visit_once(rig, gate, addresses[:BATCH])
        rig.forget()
        gc.collect()
        before = resident_bytes()
        for start in range(BATCH, count, BATCH):
            await visit_once(rig, gate, addresses[start : start + BATCH])
            rig.forget()
            statistics = rig.engine.statistics()
            assert (statistics.peers_waiting, statistics.datagram_bytes_held) == (0, 0)
            assert (statistics.flows_open, statistics.fds_open) == (1, 1)
        gc.collect()
        if not IS_SANITIZED:
            assert resident_bytes() - before < 16 << 20
        assert rig.engine.statistics().datagrams_up == count


@every_kind
async def test_flood_of_sources_is_bounded(kind: Kind) -> None:
    """Nobody gives them links: so many wait, and the others leave no trace."""
    async with UdpRig(kind) as rig:
        gate = rig.gate(ANY, waiting=64)
        for start, address in enumerate(sources(2000)):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((address, 0))
                sock.sendto(bytes(1000), ("127.0.0.1", gate.port))
            if start % 20 == 0:
                await rig.let_pass()
        counts = await rig.counted(gate.token, no_link=2000 - 64)
        assert counts.no_link + counts.overrun == 2000 - 64
        assert len(rig.newcomers) == 64
        statistics = rig.engine.statistics()
        assert statistics.peers_waiting == 64
        assert statistics.datagram_bytes_held <= 64 * 1002
