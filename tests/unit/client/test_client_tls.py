"""client: TLS on control and links, and certificates that change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.kit.acceptor_desk import outside
from tests.kit.authority import Authority, Issued
from tests.kit.client_desk import (
    Desk,
    accept,
    is_reset,
    running,
    signal,
    welcome_again,
)
from tests.kit.client_tls_words import as_tls, carries, paired
from tests.kit.engines import both, engines
from tests.kit.peer import NativeServer, SeedServer
from tests.kit.secure import (
    PythonSide,
    TlsFault,
    TlsStream,
    library_server,
    python_server,
)
from tests.kit.stream import Stream
from tests.kit.timing import limit, until, within

from nodepass.client import server_dialer as dialer_module
from nodepass.client.client import Client
from nodepass.config.environment import Settings
from nodepass.config.url import Config
from nodepass.errors import ConfigError
from nodepass.tls.contexts import ClientTls

# --- carried -------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("mode", [1, 2])
async def test_visitor_is_carried_inside_tls(
    kind: str, mode: int, files: Issued, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    query = "log=info" if mode == 1 else f"log=info&ca={authority.ca}"
    with caplog.at_level(logging.INFO, "nodepass"):
        async with paired(files, query, tls=mode, engine=kind) as (server, desk, links):
            await server.say("tcp://1?from=10.0.0.1:1")
            target = await desk.at_target()
            await carries(links[1], target)
            as_tls(links[1]).finish(fin=False)
            async with within(5):
                assert await target.read() == b"", "half-closed by a close_notify alone"
                await target.write(b"late")
                assert await links[1].read_exactly(4) == b"late"
                target.finish()
                assert await links[1].read() == b"", "a close_notify"
            await until(lambda: not desk.figures.visitors_open, 5, "the end")
            figures = desk.figures
            assert (figures.bytes_up, figures.bytes_down) == (100_000, 100_004)
            assert figures.relays_reset == 0
            assert (await server.link())[0] == 3, "and another lies ready"
    assert f"tls={mode}" in caplog.text
    assert "fingerprint=SHA256:" in caplog.text
    assert ("nobody has verified" in caplog.text) is (mode == 1)


@engines
async def test_early_bytes_and_tickets_reach_the_target_in_order(kind: str, files: Issued) -> None:
    async with paired(files, engine=kind) as (server, desk, links):
        await links[1].write(b"early ")
        await asyncio.sleep(0.02)
        await links[1].write(b"bytes")
        await server.say("tcp://1?from=10.0.0.1:1")
        target = await desk.at_target()
        async with within(5):
            assert await target.read_exactly(11) == b"early bytes"


@engines
@pytest.mark.parametrize("question", [b"", b"question"])
@pytest.mark.parametrize("has_fin", [True, False])
async def test_visitors_end_may_overtake_its_launch(
    kind: str, question: bytes, has_fin: bool, files: Issued
) -> None:
    async with paired(files, engine=kind) as (server, desk, links):
        if question:
            await links[1].write(question)
        as_tls(links[1]).finish(fin=has_fin)
        await asyncio.sleep(0.03)
        await server.say("tcp://1?from=10.0.0.1:1")
        target = await desk.at_target()
        async with within(5):
            assert await target.read_all() == question
            await target.write(b"answer")
            target.finish()
            assert await links[1].read_all() == b"answer"


@engines
async def test_link_that_is_cut_resets_its_target(kind: str, files: Issued) -> None:
    async with paired(files, engine=kind) as (server, desk, links):
        await server.say("tcp://1?from=10.0.0.1:1")
        target = await desk.at_target()
        await links[1].write(b"half")
        async with within(5):
            assert await target.read_exactly(4) == b"half"
        outside(as_tls(links[1])).finish()
        assert await is_reset(target)


@both
async def test_dead_idle_link_is_replaced(files: Issued) -> None:
    async with paired(files) as (server, desk, links):
        links[1].reset()
        async with within(5):
            assert (await server.link())[0] == 3
        outside(as_tls(links[2])).finish()
        async with within(5):
            assert (await server.link())[0] == 4
        assert desk.figures.links_lost == 2


# --- control -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("how", ["close_notify", "end", "reset", "bad record"])
async def test_lost_control_costs_idle_links_and_no_relay(how: str, files: Issued) -> None:
    async with paired(files) as (server, desk, links):
        await server.say("tcp://1?from=10.0.0.1:1")
        target = await desk.at_target()
        control = as_tls(server.control)
        if how == "close_notify":
            control.finish(fin=False)
        elif how == "end":
            outside(control).finish()
        elif how == "reset":
            control.reset()
        else:
            await outside(control).write(b"\x17\x03\x03\x00\x20" + bytes(32))
        assert await is_reset(outside(as_tls(links[2])))
        assert await welcome_again(server) == "me", "back by itself"
        await carries(links[1], target, 1000)


@engines
async def test_stop_ends_control_cleanly(kind: str, files: Issued) -> None:
    async with paired(files, shutdown_timeout=5.0, engine=kind) as (server, desk, links):
        stopping = asyncio.create_task(desk.client.stop())
        assert await signal(server) == "drain://"
        for link in links.values():
            link.reset()  # what a server does that has heard of it
        assert await signal(server) == "bye://stopped"
        async with within(5):
            assert await server.control.read_all() == b"", "to a close_notify"
            await stopping


@engines
@pytest.mark.parametrize("stage", ["hello", "welcome"])
async def test_stop_in_the_middle_of_a_handshake(kind: str, stage: str, files: Issued) -> None:
    """The leak guard looks for what is lent to the engine."""
    async with (
        NativeServer(tls=1, files=files) as server,
        running(server.listener.port, engine=kind) as desk,
    ):
        if stage == "hello":
            stream = server.keep(await accept(server.listener))
            await stream.write(b"//0?v=2&n=" + b"00" * 16 + b"&a=0#1\n")
            async with within(5):
                assert (await stream.read())[:1] == b"\x16"
        else:
            await server.accept()
        async with within(5):
            await desk.client.stop()


# --- the seed dialect with TLS -------------------------------------------------------------------


@contextlib.asynccontextmanager
async def seeded(
    files: Issued, query: str = "log=none", *, tls: int = 1, **settings: object
) -> AsyncIterator[tuple[SeedServer, Desk]]:
    """Run a client whose first two links at a seed server are named."""
    async with (
        SeedServer(files=files) as server,
        running(server.listener.port, query, **settings) as desk,  # type: ignore[arg-type]
    ):
        async with within(10):
            await server.greet(tls, beat=0.05)
            for _ in range(2):
                await server.take()
        await until(lambda: desk.figures.links_idle == 2, 5, "both links")
        yield server, desk


@engines
@pytest.mark.parametrize("mode", [1, 2])
async def test_seed_launch_inside_tls(
    kind: str, mode: int, files: Issued, authority: Authority
) -> None:
    query = "log=none" if mode == 1 else f"log=none&ca={authority.ca}"
    async with seeded(files, query, tls=mode, engine=kind) as (server, desk):
        link = as_tls(await server.launch(next(iter(server.links))))
        target = await desk.at_target()
        await carries(link, target)
        link.finish(fin=False)
        async with within(5):
            assert await target.read() == b""
            await target.write(b"late")
            target.finish()
            assert await link.read_all() == b"late", "to a close_notify"
            await server.take()
        await until(lambda: not desk.figures.visitors_open, 5, "the end")
        assert desk.figures.relays_reset == 0


@engines
@pytest.mark.parametrize(
    "records",
    [
        (b"aaaa0001question",),
        (b"aaaa0001", b"question"),
        (b"aa", b"aa0001", b"quest", b"ion"),
        (b"aaaa0001qu", b"estion"),
    ],
)
async def test_seed_id_and_what_follows_in_any_records(
    kind: str, records: tuple[bytes, ...], files: Issued
) -> None:
    """Written behind the handshake in one segment, with the launch already here."""
    async with (
        SeedServer(files=files) as server,
        running(server.listener.port, engine=kind) as desk,
    ):
        await server.greet(1)
        data = server.keep(await accept(server.data))
        link = TlsStream(data, PythonSide(python_server(files), is_server=True))
        async with within(10):
            await link.shake()
            for record in records:
                link.side.write(record)
            await outside(link).write(link.side.give())
            await server.say("//aaaa0001#1")
            target = await desk.at_target()
            assert await target.read_exactly(8) == b"question"
            await target.write(b"answer")
            assert await link.read_exactly(6) == b"answer"


@both
@pytest.mark.parametrize("has_words", [True, False])
async def test_seed_visitors_end_may_come_with_the_id(has_words: bool, files: Issued) -> None:
    async with SeedServer(files=files) as server, running(server.listener.port) as desk:
        await server.greet(1)
        data = server.keep(await accept(server.data))
        link = TlsStream(data, PythonSide(python_server(files), is_server=True))
        words = b"question" if has_words else b""
        async with within(10):
            await link.shake()
            link.side.write(b"aaaa0001" + words)
            link.side.end()
            await outside(link).write(link.side.give())
            await server.say("//aaaa0001#1")
            target = await desk.at_target()
            assert await target.read_all() == words
            await target.write(b"answer")
            target.finish()
            assert await link.read_all() == b"answer"


@engines
@pytest.mark.parametrize("how", ["plain", "silent", "close_notify", "cut", "no hex", "bad record"])
async def test_seed_data_port_that_gives_no_id(kind: str, how: str, files: Issued) -> None:
    async with (
        SeedServer(files=files) as server,
        running(server.listener.port, engine=kind, handshake_timeout=limit(0.4)) as desk,
    ):
        await server.greet(1, beat=0.05)
        for _ in range(2):
            async with await accept(server.data) as stream:
                # The second waits in the kernel while the first is at it, perhaps for too long.
                with contextlib.suppress(OSError, EOFError):
                    async with within(5):
                        await misbehave(stream, how, files)
                        while await stream.read():
                            pass
        async with within(10):
            await server.take()
        await until(lambda: desk.figures.links_idle >= 1, 5, "a link after all")
        assert desk.figures.sessions == 1


async def misbehave(stream: Stream, how: str, files: Issued) -> None:
    if how == "plain":
        await stream.write(b"aaaa0001")
        return
    inner = TlsStream(stream, PythonSide(python_server(files), is_server=True))
    await inner.shake()
    if how == "close_notify":
        await inner.write(b"aaaa")
        inner.finish()
    elif how == "cut":
        await inner.write(b"aaaa")
        stream.finish()
    elif how == "no hex":
        await inner.write(b"NOTHEX!!")
    elif how == "bad record":
        await stream.write(b"\x17\x03\x03\x00\x20" + bytes(32))


@both
async def test_seed_links_with_a_wrong_certificate_are_told(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with (
            SeedServer(files=authority.issue("other.example")) as server,
            running(server.listener.port, f"log=warn&ca={authority.ca}") as desk,
        ):
            await server.greet(2, beat=0.05)
            async with within(20):
                while "cannot make a link" not in caplog.text:
                    with pytest.raises(TlsFault):
                        await server.take()
            assert desk.figures.links_idle == 0
    assert "is for other.example, not for 127.0.0.1" in caplog.text


@both
@pytest.mark.parametrize("has_floor", [True, False])
async def test_seed_server_that_meets_a_floor_is_told_apart(
    has_floor: bool, files: Issued, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody in between may have taken the native dialect out of the greeting."""
    query = f"log=warn&tls={int(has_floor)}"
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with seeded(files, query):
            pass
    assert ("control channel is plain" in caplog.text) is has_floor


@both
async def test_tls_is_loaded_once_for_many_links(
    files: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seed server's mode is known only when its links are dialled, several at once."""
    made: list[None] = []
    load = dialer_module.ServerDialer._make_tls

    def count(dialer: dialer_module.ServerDialer) -> ClientTls:
        made.append(None)
        return load(dialer)

    monkeypatch.setattr(dialer_module.ServerDialer, "_make_tls", count)
    async with seeded(files, min_pool_capacity=2):
        assert len(made) == 1


# --- files that change ---------------------------------------------------------------------------


@both
async def test_reload_trusts_the_new_authority(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both sides change their authority; the relay that is open stays."""
    with caplog.at_level(logging.INFO, "nodepass"):
        async with paired(authority.issue("127.0.0.1"), f"log=info&ca={authority.ca}", tls=2) as (
            server,
            desk,
            links,
        ):
            await server.say("tcp://1?from=10.0.0.1:1")
            target = await desk.at_target()
            async with within(5):
                await server.link()
            other = Authority(tmp_path / "other")
            server._context = library_server(other.issue("127.0.0.1"))
            Path(authority.ca).write_bytes(Path(other.ca).read_bytes())
            assert desk.client.reload()
            links[2].reset()
            async with within(5):
                await server.link()
            await carries(links[1], target, 1000)
            assert desk.figures.sessions == 1
    assert "ca reloaded" in caplog.text


@both
async def test_reload_of_a_broken_file_keeps_the_old(
    files: Issued, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "nodepass"):
        async with paired(files, f"log=error&ca={authority.ca}", tls=2) as (server, desk, links):
            Path(authority.ca).write_text("half a file")
            assert desk.client.reload()
            links[1].reset()
            async with within(5):
                await server.link()
    assert "not reloaded" in caplog.text


@both
@pytest.mark.parametrize("mode", [0, 1])
async def test_nothing_to_reload_without_files(mode: int, files: Issued) -> None:
    async with paired(files, tls=mode) as (_, desk, _):
        assert not desk.client.reload()


async def test_start_fails_with_a_ca_that_cannot_be_read(tmp_path: Path) -> None:
    url = f"client://127.0.0.1:1/127.0.0.1:2?log=none&ca={tmp_path}/none.pem"
    client = Client(Config.parse(url, {}, Settings(threads=1)))
    with pytest.raises(ConfigError, match="ca"):
        await client.start()
    async with within(1):
        await client.wait_closed()
