"""A server and a client of ours in one process: what they agree on, and what they do not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.kit.authority import Authority, self_signed
from tests.kit.engines import both, engines
from tests.kit.peer import Listener
from tests.kit.stream import Stream, connect
from tests.kit.timing import free_port, until, within

from nodepass.client.client import Client
from nodepass.config.environment import Settings
from nodepass.config.url import Config
from nodepass.server.server import Server

PASSWORD = "correct-horse"


class Pair:
    """A running server and a running client in front of one target."""

    def __init__(self, server: Server, client: Client, target: Listener) -> None:
        self.server = server
        self.client = client
        self.target = target
        self.stack = contextlib.AsyncExitStack()

    async def visit(self) -> tuple[Stream, Stream]:
        """Return a visitor and its other end at the target."""
        async with within(10):
            visitor = await connect(self.server.config.target.port)
            self.stack.callback(visitor.close)
            other = await self.target.accept()
            self.stack.callback(other.close)
        return visitor, other

    async def up(self) -> None:
        await until(lambda: self.client.statistics().links_idle >= 2, 10, "two links")


@contextlib.asynccontextmanager
async def pair(
    server: str = "log=none",
    client: str = "log=none",
    *,
    passwords: tuple[str, str] = ("", ""),
    kinds: tuple[str, str] = ("native", "native"),
    **settings: object,
) -> AsyncIterator[Pair]:
    """Run both; queries, passwords and engines are those of the server and of the client."""
    options: dict[str, object] = {
        "threads": 1,
        "semaphore_limit": 100,
        "min_pool_capacity": 2,
        "service_cooldown": 0.05,
        "shutdown_timeout": 0.01,
        **settings,
    }
    target, port = Listener(), free_port()
    wheres = (f"{port}/127.0.0.1:{free_port()}", f"{port}/127.0.0.1:{target.port}")
    configs = [
        Config.parse(
            f"{mode}://{password}{'@' if password else ''}127.0.0.1:{where}?{query}",
            {},
            Settings(**{**options, "engine": kind}),  # type: ignore[arg-type]
        )
        for mode, where, query, password, kind in zip(
            ("server", "client"), wheres, (server, client), passwords, kinds, strict=True
        )
    ]
    try:
        async with Server(configs[0]) as listening, Client(configs[1]) as dialling:
            made = Pair(listening, dialling, target)
            async with made.stack, within(40):
                yield made
    finally:
        target.close()


async def carries(visitor: Stream, target: Stream, size: int = 300_000) -> None:
    """Send bytes both ways, then end both directions one after the other."""
    up, down = os.urandom(size), os.urandom(size)
    async with within(20):
        writing = asyncio.gather(visitor.write(up), target.write(down))
        assert await target.read_exactly(size) == up
        assert await visitor.read_exactly(size) == down
        await writing
        visitor.finish()
        assert await target.read() == b""
        await target.write(b"last words")
        target.finish()
        assert await visitor.read_all() == b"last words"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def of_mode(mode: int, authority: Authority, log: str = "none") -> tuple[str, str]:
    """Return the queries of a server and a client that fit each other."""
    if mode < 2:
        return f"log={log}&tls={mode}", f"log={log}"
    issued = authority.issue("127.0.0.1")
    return (
        f"log={log}&tls=2&crt={issued.crt}&key={issued.key}",
        f"log={log}&ca={authority.ca}",
    )


# --- they meet ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("password", ["", PASSWORD])
@pytest.mark.parametrize("mode", [0, 1, 2])
async def test_they_meet_and_carry(mode: int, password: str, authority: Authority) -> None:
    server, client = of_mode(mode, authority)
    async with pair(server, client, passwords=(password, password)) as made:
        for _ in range(3):
            await carries(*await made.visit())
        await until(lambda: not made.server.statistics().relays_open, 5, "the end")
        for figures in (made.server.statistics(), made.client.statistics()):
            assert (figures.bytes_up, figures.bytes_down) == (900_000, 900_030)
            assert (figures.relays_reset, figures.strangers, figures.sessions) == (0, 0, 1)


@engines
async def test_engines_of_both_sides_need_not_be_the_same(kind: str) -> None:
    other = "python" if kind == "native" else "native"
    async with pair("log=none&tls=1", kinds=(kind, other)) as made:
        await carries(*await made.visit())


@both
async def test_fingerprint_is_the_same_in_both_logs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nodepass"):
        async with pair("log=info&tls=1", "log=info") as made:
            await made.up()
    lines = [r.getMessage() for r in caplog.records if "fingerprint=" in r.getMessage()]
    shown = {line.rpartition("fingerprint=")[2].split()[0] for line in lines}
    assert len(lines) == 2
    assert len(shown) == 1


@both
async def test_many_visitors_at_once_inside_tls() -> None:
    async with pair("log=none&tls=1", passwords=(PASSWORD, PASSWORD)) as made:
        await made.up()
        visits = [await made.visit() for _ in range(25)]
        for number, (visitor, _) in enumerate(visits):
            await visitor.write(b"%d\n" % number)
        async with within(10):
            heard = [await target.read_line() for _, target in visits]
            assert sorted(heard) == sorted(b"%d\n" % number for number in range(25))
            for (_, target), line in zip(visits, heard, strict=True):
                await target.write(line)
            for number, (visitor, _) in enumerate(visits):
                assert await visitor.read_line() == b"%d\n" % number
        assert made.server.statistics().strangers == 0


@both
async def test_server_comes_back_in_another_mode(authority: Authority) -> None:
    """The client takes what the greeting says, each time anew."""
    async with pair("log=none&tls=0") as made:
        await made.up()
        config = made.server.config
        await made.server.stop()
        tunnel, target = config.tunnel.port, config.target.port
        url = f"server://127.0.0.1:{tunnel}/127.0.0.1:{target}?log=none&tls=1"
        async with Server(Config.parse(url, {}, config.settings)) as again:
            made.server = again
            await until(lambda: again.statistics().links_idle >= 2, 10, "links")
            assert made.client._reconnect.session is not None
            assert made.client._reconnect.session.tls == 1
            await carries(*await made.visit())


@both
async def test_stop_of_the_client_makes_no_stranger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with pair("log=warn&tls=1", passwords=(PASSWORD, PASSWORD)) as made:
            await made.up()
            async with within(10):
                await made.client.stop()
            await until(lambda: not made.server.statistics().sessions_open, 5, "its end")
            figures = made.server.statistics()
            assert (figures.links_idle, figures.strangers) == (0, 0)
    told = [r.getMessage() for r in caplog.records if r.name != "nodepass.relay"]
    assert told == []


# --- they do not -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize(
    ("passwords", "at_server", "at_client"),
    [
        ((PASSWORD, "wrong"), "a wrong password", "the server refused us: auth"),
        ((PASSWORD, ""), "", "wants a password and none is given"),
        (("", PASSWORD), "", "asks for no password"),
    ],
)
async def test_passwords_that_differ(
    mode: int,
    passwords: tuple[str, str],
    at_server: str,
    at_client: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with pair(f"log=warn&tls={mode}", "log=warn", passwords=passwords) as made:
            await until(lambda: "do not agree" in caplog.text, 10, "a word about it")
            figures = made.server.statistics()
            assert (figures.sessions, made.client.statistics().sessions) == (0, 0)
    assert at_server in caplog.text
    assert at_client in caplog.text
    assert PASSWORD not in caplog.text
    assert "wrong@" not in caplog.text


@both
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("wrong name", "is for other.example, not for 127.0.0.1"),
        ("untrusted", "is not among what ca="),
        ("self-signed", "is self-signed and not among"),
    ],
)
async def test_certificate_that_is_refused(
    what: str,
    told: str,
    authority: Authority,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    issued = {
        "wrong name": lambda: authority.issue("other.example"),
        "untrusted": lambda: Authority(tmp_path / "other").issue("127.0.0.1"),
        "self-signed": lambda: self_signed(tmp_path, "127.0.0.1"),
    }[what]()
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with pair(
            f"log=warn&tls=2&crt={issued.crt}&key={issued.key}", f"log=warn&ca={authority.ca}"
        ) as made:
            await until(lambda: "no secure tunnel" in caplog.text, 10, "the client's word")
            await until(lambda: "turned away" in caplog.text, 10, "the server's word")
            assert made.client.statistics().sessions == 0
            assert made.server.statistics().sessions == 0
    assert told in caplog.text
    assert 'turned away  host=127.0.0.1  why="the client ' in caplog.text, "with its alert"


@both
@pytest.mark.parametrize(("offered", "floor"), [(0, 1), (0, 2), (1, 2)])
async def test_floor_above_what_the_server_offers(
    offered: int, floor: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nodepass"):
        async with pair(f"log=error&tls={offered}", f"log=warn&tls={floor}") as made:
            await until(lambda: "offers tls=" in caplog.text, 10, "a word about it")
            assert made.client.statistics().sessions == 0


# --- reload ------------------------------------------------------------------------------------


@both
async def test_reload_on_both_sides_leaves_open_relays_alone(
    authority: Authority, tmp_path: Path
) -> None:
    server, client = of_mode(2, authority)
    async with pair(server, client) as made:
        await made.up()
        visitor, target = await made.visit()
        other = Authority(tmp_path / "other")
        renewed = other.issue("127.0.0.1")
        old = made.server.config
        assert old.crt is not None
        assert old.key is not None
        Path(old.key).write_bytes(Path(renewed.key).read_bytes())
        Path(old.crt).write_bytes(Path(renewed.crt).read_bytes())
        Path(authority.ca).write_bytes(Path(other.ca).read_bytes())
        assert made.server.reload()
        assert made.client.reload()
        pairing = made.client._reconnect.session
        assert pairing is not None
        pairing.idle_links.clear()
        pairing.refill.fill()
        for _ in range(3):
            await carries(*await made.visit(), 1000)
        await carries(visitor, target)
        assert made.client.statistics().sessions == 1
