"""server: UDP beside TCP: slots, starts that fail, stops, statistics, and links inside TLS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Iterator
from types import ModuleType

import pytest
from OpenSSL.SSL import Connection
from tests.kit.acceptor_desk import outside
from tests.kit.datagram import Visitor
from tests.kit.engines import both, engines
from tests.kit.peer import NativeClient, mac
from tests.kit.secure import TlsStream
from tests.kit.server_desk import Desk, is_reset, launched, serving
from tests.kit.stream import Stream
from tests.kit.timing import free_port, limit, until, within
from tests.kit.udp_words import frame, udp_socket

from nodepass.config.environment import Settings
from nodepass.engine.relays import Gate, Relays, UdpRelay
from nodepass.engine.twin import engine as twin
from nodepass.errors import EngineClosed, ListenError, TunnelError
from nodepass.observe.stats import Datagrams
from nodepass.server.server import Server
from nodepass.tunnel import open_relays


def come(desk: Desk, *said: bytes) -> Visitor:
    """Let somebody come and say something; he leaves with the desk."""
    visitor = Visitor(desk.target)
    desk._stack.callback(visitor.close)
    for data in said:
        visitor.send(data)
    return visitor


async def signal(client: NativeClient) -> str:
    async with within(5):
        return await client.signal()


async def read(link: Stream) -> bytes:
    """Return the next datagram of a link."""
    async with within(5):
        return await link.read_exactly(int.from_bytes(await link.read_exactly(2), "big"))


async def served(desk: Desk, client: NativeClient, number: int) -> tuple[Visitor, Stream]:
    """Let somebody come who is given this link at once."""
    (link,) = await desk.links(client, number)
    visitor = come(desk, b"hello")
    assert await signal(client) == f"udp://{number}?from=127.0.0.1:{visitor.port}"
    assert await read(link) == b"hello"
    return visitor, link


def url(query: str, own: int = 0, target: int = 0) -> str:
    ends = f"127.0.0.1:{own or free_port()}/127.0.0.1:{target or free_port()}"
    return f"server://{ends}?{query}"


@contextlib.contextmanager
def taken(kind: socket.SocketKind) -> Iterator[int]:
    """Hold a port of one protocol."""
    port = free_port()
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", port))
        if kind is socket.SOCK_STREAM:
            sock.listen()
        yield port


def assert_free(*ports: int) -> None:
    for port in ports:
        udp_socket(port=port).close()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))


# --- what is listened on -----------------------------------------------------------------------


@both
@pytest.mark.parametrize("carries", ["tcp,udp", "tcp", "udp"])
async def test_each_protocol_can_be_left_out(
    carries: str, caplog: pytest.LogCaptureFixture
) -> None:
    off = "".join(f"&{name}=0" for name in ("tcp", "udp") if name not in carries)
    with caplog.at_level(logging.INFO, "nodepass"):
        async with serving(f"log=info{off}") as desk:
            assert desk.server.target_address == ("127.0.0.1", desk.target)
            client = await desk.client()
            if "udp" in carries:
                _, link = await served(desk, client, 1)
                link.close()
            else:
                visitor = come(desk, b"x")
                await until(lambda: visitor.refused, 5, "the kernel's word that nobody listens")
            if "tcp" in carries:
                (link,) = await desk.links(client, 2)
                caller = await desk.visit()
                await caller.write(b"x")
                assert await link.read_exactly(1) == b"x"
            else:
                with pytest.raises(ConnectionRefusedError):
                    await desk.visit()
        assert desk.server.target_address == ("127.0.0.1", desk.target)
    (line,) = [r.getMessage() for r in caplog.records if "server listening" in r.getMessage()]
    assert f"carries={carries}" in line
    assert f"target=127.0.0.1:{desk.target}" in line


# --- starts that fail --------------------------------------------------------------------------


@both
@pytest.mark.parametrize("query", ["log=none", "log=none&tcp=0"])
async def test_start_fails_where_the_port_is_taken_for_udp_alone(query: str) -> None:
    with taken(socket.SOCK_DGRAM) as port:
        own = free_port()
        server = Server(url(query, own, port))
        with pytest.raises(ListenError, match="udp=0 goes without UDP") as caught:
            await server.start()
        assert f"udp 127.0.0.1:{port}" in str(caught.value)
        async with within(1):
            await server.stop()
            await server.wait_closed()
        async with Server(url("log=none&udp=0", own, port)):
            pass
    assert_free(own, port)


@both
@pytest.mark.parametrize("which", ["tunnel", "target"])
async def test_start_that_fails_before_gates_exist(which: str) -> None:
    with taken(socket.SOCK_STREAM) as port:
        other = free_port()
        ports = (port, other) if which == "tunnel" else (other, port)
        server = Server(url("log=none", *ports))
        with pytest.raises(ListenError, match="in use"):
            await server.start()
        async with within(1):
            await server.stop()
        with pytest.raises(TunnelError):
            server.statistics()
    assert_free(port, other)


@both
async def test_start_that_fails_with_gates_that_have_not_begun() -> None:
    own, target = free_port(), free_port()
    with taken(socket.SOCK_STREAM) as data:
        server = Server(url(f"log=none&data={data}", own, target))
        with pytest.raises(ListenError, match="in use"):
            await server.start()
    assert_free(own, target)


@both
async def test_start_on_an_engine_that_has_been_closed() -> None:
    relays = Relays(Settings(threads=1))
    await relays.close()
    own, target = free_port(), free_port()
    server = Server(url("log=none", own, target), relays=relays)
    with pytest.raises(EngineClosed):
        await server.start()
    assert_free(own, target)


# --- slots -------------------------------------------------------------------------------------


@both
async def test_udp_visitors_take_slots_from_tcp_and_give_them_back() -> None:
    async with serving(semaphore_limit=1) as desk:
        client = await desk.client()
        _, link = await served(desk, client, 1)
        (next_link,) = await desk.links(client, 2)
        caller = await desk.visit()
        await caller.write(b"x")
        await asyncio.sleep(0.02)
        assert desk.figures.visitors == 1, "it waits in the kernel"
        link.close()
        assert await next_link.read_exactly(1) == b"x"
        assert (await signal(client)).startswith("tcp://2")


@both
async def test_tcp_visitors_take_slots_from_udp_and_give_them_back() -> None:
    async with serving(semaphore_limit=1) as desk:
        client = await desk.client()
        (link,) = await desk.links(client, 1)
        await desk.visit()
        assert (await signal(client)).startswith("tcp://1")
        (next_link,) = await desk.links(client, 2)
        come(desk, b"x")
        await until(lambda: desk.figures.visitors_waiting == 1, 5, "the newcomer")
        link.reset()
        assert await read(next_link) == b"x"
        assert (await signal(client)).startswith("udp://2")


@both
async def test_slots_are_given_to_udp_alone_where_there_is_no_tcp() -> None:
    async with serving("tcp=0&log=none", semaphore_limit=1) as desk:
        client = await desk.client()
        links = dict(zip((1, 2, 3), await desk.links(client, 1, 2, 3), strict=True))
        for _ in range(3):
            come(desk, b"x")
        await until(lambda: desk.figures.visitors_waiting == 2, 5, "two newcomers")
        for served_before in range(3):
            number = int((await signal(client)).removeprefix("udp://").partition("?")[0])
            assert desk.figures.visitors_waiting == 2 - served_before
            links[number].close()
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        assert desk.figures.visitors_refused == 0


# --- relays whose engine does something unexpected ---------------------------------------------


class Keeping(Relays):
    """An engine whose UDP relays a test can reach."""

    made: UdpRelay | None = None

    def bind(
        self,
        gate: Gate,
        newcomer: object,
        link: socket.socket,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        idle: float,
        is_raw: bool = False,
    ) -> UdpRelay:
        relay = super().bind(
            gate,
            newcomer,  # type: ignore[arg-type]
            link,
            tls=tls,
            head=head,
            idle=idle,
            is_raw=is_raw,
        )
        self.made = relay
        return relay


@both
async def test_relay_without_a_result_is_no_longer_counted() -> None:
    relays = Keeping(Settings(threads=1))
    async with serving(relays=relays) as desk:
        client = await desk.client()
        await served(desk, client, 1)
        assert relays.made is not None
        relays.made.result.cancel()
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        assert desk.figures.relays_open == 0
    await relays.close()


@both
@engines
async def test_engine_closed_under_a_server(kind: str) -> None:
    relays = Relays(Settings(threads=1, engine=kind))  # type: ignore[arg-type]
    async with serving("log=debug", relays=relays) as desk:
        client = await desk.client()
        _, link = await served(desk, client, 1)
        come(desk, b"waits")
        await until(lambda: desk.figures.visitors_waiting == 1, 5, "who waits for a link")
        await relays.close()
        assert await is_reset(link)
        await until(lambda: not desk.figures.relays_open, 5, "the end")
        assert desk.figures.datagrams[:4] == (1, 0, 5, 0)
        late = await desk.link(client, 2)
        assert await is_reset(late), "there is nobody any more to be joined with it"
        await until(lambda: not desk.figures.visitors_open, 5, "the slots")


# --- figures -----------------------------------------------------------------------------------


@both
async def test_figures_of_datagrams_are_told_while_it_runs_and_afterwards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with serving("log=debug", report_interval=0.3, udp_data_buf_size=100) as desk:
            client = await desk.client()
            visitor, link = await served(desk, client, 1)
            visitor.send(bytes(101))
            await link.write(frame(b"answer"))
            assert await visitor.read() == b"answer"
            expected = Datagrams(up=1, down=1, bytes_up=5, bytes_down=6, too_large=1)
            await until(lambda: desk.figures.datagrams == expected, 5, "the live figures")
            await until(lambda: "datagrams=2  dropped=1" in caplog.text, 5, "the report")
            await until(lambda: "UDP_DATA_BUF_SIZE  count=1" in caplog.text, 5, "a word of it")
            link.close()
            await until(lambda: not desk.figures.visitors_open, 5, "the end")
            assert desk.figures.datagrams == expected
            come(desk, bytes(101))
            expected = expected._replace(too_large=2)
            await until(lambda: desk.figures.datagrams == expected, 5, "another loss")
        assert desk.figures.datagrams == expected, "also after the stop"
        assert (desk.figures.bytes_up, desk.figures.bytes_down) == (5, 6)
    told = [r.getMessage() for r in caplog.records if "UDP_DATA_BUF_SIZE  " in r.getMessage()]
    assert len(told) == 2, "at once, and the rest at the stop"
    assert all("count=1  limit=100  hint=" in line for line in told)
    (ended,) = [r.getMessage() for r in caplog.records if "relay ended" in r.getMessage()]
    assert "up=5  down=6  reason=finished" in ended


# --- stopping ----------------------------------------------------------------------------------


@both
@engines
async def test_stop_cuts_what_does_not_end(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nodepass"):
        async with serving("log=info", shutdown_timeout=0.05, engine=kind) as desk:
            client = await desk.client()
            _, link = await served(desk, client, 1)
            async with within(5):
                await desk.server.stop()
            assert await is_reset(link)
            assert desk.figures.relays_reset == 1
            assert desk.figures.datagrams[:4] == (1, 0, 5, 0)
        assert_free(desk.target)
    assert "relays_cut=1" in caplog.text


@both
@pytest.mark.slow
async def test_stop_waits_for_silence_and_not_for_the_idle_time() -> None:
    """Also beside TCP, whose relays it leaves their time."""
    async with serving(shutdown_timeout=20.0) as desk:
        client = await desk.client()
        quiet, quiet_link = await served(desk, client, 1)
        busy, busy_link = await served(desk, client, 2)
        await desk.links(client, 3)
        caller = await desk.visit()
        assert (await signal(client)).startswith("tcp://3")
        began = time.monotonic()
        stopping = asyncio.create_task(desk.server.stop())
        ended = asyncio.create_task(quiet_link.read())
        while not ended.done():
            busy.send(b"busy")
            assert await read(busy_link) == b"busy"
            await asyncio.sleep(0.1)
        assert await ended == b"", "politely"
        assert 0.5 < time.monotonic() - began < limit(2.5)
        assert desk.figures.relays_open == 2
        caller.reset()
        async with within(5):
            await stopping
        assert not await is_reset(busy_link)
        assert (desk.figures.relays_open, desk.figures.visitors_open) == (0, 0)
        assert not quiet.heard


@both
async def test_stop_with_a_short_idle_time_does_not_lengthen_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(open_relays, "LAST_WORDS", 60.0)
    async with serving(shutdown_timeout=20.0, udp_idle_timeout=0.1) as desk:
        client = await desk.client()
        _, link = await served(desk, client, 1)
        async with within(5):
            await desk.server.stop()
        assert not await is_reset(link)


# --- inside TLS --------------------------------------------------------------------------------


@both
@engines
async def test_datagrams_travel_inside_tls(kind: str) -> None:
    async with serving("log=none&tls=1", engine=kind, udp_idle_timeout=0.3) as desk:
        client = await desk.client()
        visitor, link = await served(desk, client, 1)
        assert isinstance(link, TlsStream)
        await link.write(frame(b"answer"))
        assert await visitor.read() == b"answer"
        assert not await is_reset(outside(link)), "a polite end after the silence"
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        assert desk.figures.relays_reset == 0


@both
async def test_gates_are_opened_where_tls_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native engine cannot do it here, so nothing of UDP may be given to it."""

    def refuse(*_: object, **__: object) -> int:
        raise AssertionError("TLS was given to an engine that has said it cannot")

    class Engine(twin.Engine):
        udp_serve = udp_bind = handshake = refuse

    module = ModuleType("nodepass._fastcopy")
    vars(module).update(
        ABI=twin.ABI,
        Engine=Engine,
        Newcomer=twin.Newcomer,
        tls_trouble=lambda: "SSL_read is not where it was",
        alpn_selector=refuse,
    )
    monkeypatch.setitem(sys.modules, "nodepass._fastcopy", module)
    async with serving("log=none&tls=1") as desk:
        assert desk.relays.kind == "native"
        client = await desk.client()
        visitor, link = await served(desk, client, 1)
        await link.write(frame(b"answer"))
        assert await visitor.read() == b"answer"
        assert desk.relays.statistics().gates_open == 0
    assert_free(desk.target)


@both
async def test_link_number_that_is_on_its_way_to_a_visitor_is_taken() -> None:
    """Two links of one number would be launched as one, and a slot would never come back."""
    async with serving(dial_timeout=0.5) as desk:
        client = await desk.client()
        visitors = [await desk.visit() for _ in range(2)]
        await until(lambda: desk.figures.visitors_waiting == 2, 5, "two that wait")
        links = [await client.greeted() for _ in range(2)]
        for stream, greeting in links:  # in one turn of the server's loop
            proof = mac(
                client.key, b"nodepass/2 link", greeting, b"", client.session.encode(), b"7"
            )
            stream.sock.send(f"link://{client.session}?i=7&p={proof}\n".encode())
        assert await launched(client) == 7
        await until(lambda: desk.figures.visitors_refused == 1, 5, "the other to be turned away")
        for end in (*visitors, *(stream for stream, _ in links)):
            end.close()
        await until(lambda: not desk.figures.visitors_open, 5, "both to have gone")
        assert (desk.server._slots.taken, desk.figures.relays_open) == (0, 0)
