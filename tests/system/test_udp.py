"""UDP through a tunnel: datagrams arrive whole, in order, and answers find their way back."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Final

import pytest
from tests.kit.datagram import Address, UdpArena, UdpTarget, echo
from tests.kit.stream import exchange
from tests.kit.target import body_of
from tests.kit.target import echo as tcp_echo
from tests.kit.timing import free_port, has_ipv6, until, within

BODY: Final = body_of(51, 65_507)

SIZES: Final = (0, 1, 2, 1400, 8191, 8192)
"""Bytes of a datagram: nothing, next to nothing, a usual one, the default limit."""

TOO_LARGE: Final = "WARN  datagrams dropped: longer than UDP_DATA_BUF_SIZE"

few = pytest.mark.parametrize(
    ("engine", "tls"),
    [("native", ""), ("native", "?tls=1"), ("python", "?tls=1")],
    ids=["native-plain", "native-tls", "python-tls"],
)
"""Not every engine with and without TLS: the engines' own tests have all of that."""

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")


# --- F25: boundaries --------------------------------------------------------------------


@few
async def test_f25_every_size_arrives_as_it_was_sent(
    tmp_path: Path, engine: str, tls: str
) -> None:
    """One at a time, then all at once: as many, as long, in the same order."""
    async with UdpArena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel(arena.udp_target().port, server=tls)
        visitor = arena.visitor(tunnel.port)
        for size in SIZES:
            assert await visitor.ask(BODY[:size]) == BODY[:size]
        bodies = [BODY[size : 2 * size] for size in SIZES for _ in range(2)]
        for body in bodies:
            visitor.send(body)
        assert [await visitor.read() for _ in bodies] == bodies


async def test_f25_first_datagram_of_a_visitor_may_have_any_size(tmp_path: Path) -> None:
    """It waits for its link, and others behind it: none is merged, cut or overtaken."""
    async with UdpArena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel(arena.udp_target().port)
        for size in SIZES:
            visitor = arena.visitor(tunnel.port)
            sent = [BODY[:size], b"second", b"", BODY[size : 2 * size]]
            for body in sent:
                visitor.send(body)
            assert [await visitor.read() for _ in sent] == sent


@pytest.mark.parametrize(
    ("engine", "side"), [("native", "server"), ("native", "client"), ("python", "server")]
)
async def test_f25_too_long_is_dropped_and_told_once(
    tmp_path: Path, engine: str, side: str
) -> None:
    """Never cut, never an end; one line a minute, and what is untold is told at the end."""

    def answer(target: UdpTarget, data: bytes, address: Address) -> None:
        target.send(BODY[: int(data)], address)

    async with UdpArena(tmp_path, engine, REPORT_INTERVAL="100ms") as arena, within(20):
        target = arena.udp_target(echo if side == "server" else answer)
        tunnel = await arena.tunnel(target.port)
        visitor = arena.visitor(tunnel.port)
        process = getattr(tunnel, side)

        def send(size: int) -> None:
            visitor.send(BODY[:size] if side == "server" else str(size).encode())

        send(8193)  # a server must not even take note of who sends such a thing
        await process.logged(f"{TOO_LARGE}.*count=1 .*limit=8192 .*hint=.*UDP_DATA_BUF_SIZE")
        for size in (9000, 8192, 65_507, 100, 8193):
            send(size)
        assert await visitor.read() == BODY[:8192]
        assert await visitor.read() == BODY[:100]
        await asyncio.sleep(0.5)  # several reports
        assert process.count(TOO_LARGE) == 1
        assert not visitor.heard
        await process.stop()
        counts = re.findall(rf"{TOO_LARGE}.*?count=(\d+)", process.log)
        assert counts == ["1", "3"]


@pytest.mark.parametrize(
    ("engine", "tls"), [("native", "?tls=1"), ("python", "")], ids=["native-tls", "python-plain"]
)
async def test_f25_limit_can_be_lifted_to_the_longest_there_is(
    tmp_path: Path, engine: str, tls: str
) -> None:
    async with UdpArena(tmp_path, engine, UDP_DATA_BUF_SIZE="65507") as arena, within(20):
        tunnel = await arena.tunnel(arena.udp_target().port, server=tls)
        visitor = arena.visitor(tunnel.port)
        for size in (65_507, 3, 65_506, 0, 40_000):
            assert await visitor.ask(BODY[:size]) == BODY[:size]


@pytest.mark.parametrize(
    ("engines", "tls"), [("native python", "?tls=1"), ("python native", "")], ids=["tls", "plain"]
)
async def test_f25_engines_understand_each_other(tmp_path: Path, engines: str, tls: str) -> None:
    """Links that come in pieces of 7 bytes: a frame is rarely whole."""
    near, far = engines.split()
    async with UdpArena(tmp_path) as arena, within(20):
        tunnel_port, port = free_port(), free_port()
        await arena.server(port, tunnel_port, tls, NODEPASS_ENGINE=near)
        proxy = arena.proxy(tunnel_port, piece=7)
        await arena.client(proxy.port, arena.udp_target().port, NODEPASS_ENGINE=far)
        visitor = arena.visitor(port)
        for body in (bodies := [BODY[:size] for size in (0, 3, 1400, 0, 2000, 1)]):
            visitor.send(body)
        assert [await visitor.read() for _ in bodies] == bodies


# --- F8: sessions -----------------------------------------------------------------------


async def test_f08_one_question_many_answers(tmp_path: Path, engine: str) -> None:
    answers = [BODY[n : n + 1000] for n in range(20)]

    def answer(target: UdpTarget, data: bytes, address: Address) -> None:
        for body in answers:
            target.send(body, address)

    async with UdpArena(tmp_path, engine) as arena, within(20):
        tunnel = await arena.tunnel((target := arena.udp_target(answer)).port)
        visitor = arena.visitor(tunnel.port)
        for _ in range(5):
            visitor.send(b"all of them, please")
            assert [await visitor.read() for _ in answers] == answers
        assert len(target.sources) == 1, "one session, and not one for each datagram"


async def test_f08_streams_in_one_direction_only(tmp_path: Path) -> None:
    """First up, nothing coming back; then down for longer than a silent session lives."""
    heard: list[bytes] = []

    def listen(target: UdpTarget, data: bytes, address: Address) -> None:
        heard.append(data)

    async with UdpArena(tmp_path, UDP_IDLE_TIMEOUT="1s") as arena, within(20):
        tunnel = await arena.tunnel((target := arena.udp_target(listen)).port)
        visitor = arena.visitor(tunnel.port)
        visitor.send(b"first")
        await until(lambda: heard, 5, "the first datagram")
        sent = [b"%d" % n + BODY[:900] for n in range(100)]
        for body in sent:
            visitor.send(body)
        await until(lambda: len(heard) > len(sent), 5, "all of them")
        assert heard[1:] == sent
        assert target.last is not None
        address = target.last[1]
        for number in range(8):
            target.send(b"%d" % number, address)
            assert await visitor.read() == b"%d" % number
            await asyncio.sleep(0.2)  # not a word from the visitor
        visitor.send(b"thank you")
        await until(lambda: heard[-1] == b"thank you", 5, "the last datagram")
        assert len(target.sources) == 1


async def test_f08_silence_shorter_than_the_idle_time_keeps_a_session(tmp_path: Path) -> None:
    """What WireGuard does: an exchange now and then, from the same address for its peer."""
    async with UdpArena(tmp_path, UDP_IDLE_TIMEOUT="2s") as arena, within(30):
        tunnel = await arena.tunnel((target := arena.udp_target()).port, server="?log=debug")
        visitor = arena.visitor(tunnel.port)
        for word in (b"handshake", b"keepalive", b"data"):
            assert await visitor.ask(word) == word
            await asyncio.sleep(0.6)  # the silence is what is tested
        (address,) = target.sources
        target.send(b"of its own accord", address)
        assert await visitor.read() == b"of its own accord"
        await tunnel.server.logged("relay ended .*reason=idle", seconds=6)
        assert await visitor.ask(b"anew") == b"anew"
        assert len(target.sources) == 2, "a session that has ended is not revived"
        target.send(b"too late", address)
        assert await visitor.ask(b"still there") == b"still there"


async def test_visitors_do_not_hear_each_other(tmp_path: Path) -> None:
    """Also where they share an address, or a port of different addresses."""
    async with UdpArena(tmp_path) as arena, within(20):
        tunnel = await arena.tunnel((target := arena.udp_target()).port)
        visitors = [arena.visitor(tunnel.port, source=f"127.0.0.{n}") for n in (1, 1, 2, 3)]
        for number, visitor in enumerate(visitors):
            visitor.send(b"%d" % number)
        for number, visitor in enumerate(visitors):
            assert await visitor.read() == b"%d" % number
        assert len(target.sources) == len(visitors)
        assert not any(visitor.heard for visitor in visitors)


# --- addresses --------------------------------------------------------------------------


@few
async def test_tcp_and_udp_on_one_port(tmp_path: Path, engine: str, tls: str) -> None:
    async with UdpArena(tmp_path, engine) as arena, within(20):
        target = arena.target(tcp_echo, port=free_port())
        arena.udp_target(port=target.port)
        tunnel = await arena.tunnel(target, server=tls)
        visitor = arena.visitor(tunnel.port)
        for _ in range(3):
            answers = await asyncio.gather(exchange(tunnel.port, BODY), visitor.ask(BODY[:1200]))
            assert list(answers) == [BODY, BODY[:1200]]
        await tunnel.server.logged("carries=tcp,udp")
        await tunnel.client.logged("carries=tcp,udp")


@needs_ipv6
async def test_ipv6_from_end_to_end(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, within(20):
        target = arena.udp_target(host="::1")
        tunnel_port, port = free_port("::1"), free_port("::1")
        await arena.nodepass(f"server://[::1]:{tunnel_port}/[::1]:{port}").start()
        await arena.nodepass(f"client://[::1]:{tunnel_port}/[::1]:{target.port}").start()
        visitor = arena.visitor(port, "::1")
        assert await visitor.ask(BODY[:8192]) == BODY[:8192]


async def test_empty_host_answers_from_the_address_that_was_asked(
    tmp_path: Path, engine: str
) -> None:
    """Visitors on connected sockets hear nothing from any other."""
    async with UdpArena(tmp_path, engine) as arena, within(20):
        target = arena.udp_target()
        tunnel_port, port = free_port(), free_port("::1" if has_ipv6() else "127.0.0.1")
        server = arena.nodepass(f"server://:{tunnel_port}/:{port}")
        client = arena.nodepass(f"client://localhost:{tunnel_port}/localhost:{target.port}")
        await server.start()
        await client.start()
        for host in ["127.0.0.1", "127.0.0.2", *(["::1"] if has_ipv6() else [])]:
            visitor = arena.visitor(port, host)
            assert await visitor.ask(host.encode()) == host.encode()
        heard: set[tuple[bytes, str]] = set()

        def listen(_: UdpTarget, data: bytes, address: Address) -> None:
            heard.add((data, address[0]))

        both = arena.udp_target(listen)  # one source, two addresses asked
        for host in ("127.0.0.2", "127.0.0.3"):
            both.send(host.encode(), (host, port))
        expected = {(b"127.0.0.2", "127.0.0.2"), (b"127.0.0.3", "127.0.0.3")}
        await until(lambda: heard == expected, 5, f"{expected}, got {heard}")


async def test_target_may_be_a_name(tmp_path: Path) -> None:
    """IPv4 comes first, where a name stands for both."""
    async with UdpArena(tmp_path) as arena, within(20):
        target = arena.udp_target()
        await arena.server(port := free_port(), tunnel_port := free_port())
        client = arena.nodepass(f"client://127.0.0.1:{tunnel_port}/localhost:{target.port}")
        await client.start()
        assert await arena.visitor(port).ask(b"hello") == b"hello"


async def test_several_urls_in_one_process(tmp_path: Path) -> None:
    """Two servers in one, two clients in another; and all four in a third."""
    async with UdpArena(tmp_path) as arena, within(20):

        def urls(names: tuple[bytes, bytes], near: list[int]) -> tuple[list[str], list[str]]:
            servers, clients = [], []
            for name, port in zip(names, near, strict=True):
                far = arena.udp_target(lambda t, _, a, name=name: t.send(name, a))  # type: ignore[misc]
                tunnel = free_port()
                servers.append(f"server://127.0.0.1:{tunnel}/127.0.0.1:{port}")
                clients.append(f"client://127.0.0.1:{tunnel}/127.0.0.1:{far.port}")
            return servers, clients

        names, near = (b"first", b"second"), [free_port() for _ in range(4)]
        servers, clients = urls(names, near[:2])
        for part in (servers, clients):
            await arena.nodepass(*part).start()
        servers, clients = urls(names, near[2:])
        await arena.nodepass(*clients, *servers).start()
        for port, name in zip(near, (*names, *names), strict=True):
            assert await arena.visitor(port).ask(b"who?") == name


async def test_two_clients_share_the_visitors(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, within(20):
        first, second = arena.udp_target(), arena.udp_target()
        tunnel = await arena.tunnel(first.port, client="?name=first")
        await arena.client(tunnel.tunnel_port, second.port, "?name=second")
        await tunnel.server.logged("client connected", count=2)
        for number in range(8):
            assert await arena.visitor(tunnel.port).ask(b"%d" % number) == b"%d" % number
        assert (len(first.sources), len(second.sources)) == (4, 4), "fewest open relays first"
