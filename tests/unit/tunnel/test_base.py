"""tunnel: being started, watched and stopped, in every order."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from tests.kit.engine_rig import tcp_pair
from tests.kit.engines import both
from tests.kit.timing import until, within

from nodepass.client.client import Client
from nodepass.config.environment import Settings
from nodepass.config.parameters import Mode
from nodepass.config.url import Config
from nodepass.engine.relays import Relay, Relays
from nodepass.errors import ConfigError, EngineError, TunnelError
from nodepass.observe.stats import Gauges
from nodepass.server.server import Server
from nodepass.tunnel import base as tunnel_module
from nodepass.tunnel.base import Tunnel
from nodepass.tunnel.context import Context


def config(*, log: str = "none", shutdown: float = 5.0, report: float = 5.0) -> Config:
    settings = Settings(threads=1, shutdown_timeout=shutdown, report_interval=report)
    return Config.parse(f"server://127.0.0.1:1/127.0.0.1:2?log={log}", {}, settings)


class Toy(Tunnel):
    """The least that a tunnel can be; what it does on its way is written down."""

    mode = Mode.SERVER

    def __init__(
        self,
        url: str | Config | None = None,
        *,
        relays: Relays | None = None,
        on_open: Callable[[], Awaitable[None]] | None = None,
        on_begin: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config() if url is None else url, relays=relays)
        self.done: list[str] = []
        self.looks = 0
        self._on_open = on_open
        self._on_begin = on_begin
        self._ends: list[socket.socket] = []

    async def _open(self, context: Context) -> None:
        self.done.append("open")
        for name in ("first", "second"):
            self._resources.callback(self.done.append, f"undo {name}")
            await asyncio.sleep(0)
        if self._on_open is not None:
            await self._on_open()

    def _begin(self, context: Context) -> None:
        self.done.append("begin")
        if self._on_begin is not None:
            self._on_begin()

    async def _drain(self) -> None:
        self.done.append("drain")
        await self._open_relays.wait(self._settings.shutdown_timeout)

    def _gauges(self) -> Gauges:
        self.looks += 1
        return Gauges(0, 0, 0, 0, 0, None)

    @property
    def relays(self) -> Relays:
        assert self._common is not None
        return self._common.relays

    def carry(self) -> tuple[socket.socket, Relay, socket.socket]:
        """Open a relay; return its outer ends."""
        visitor, a = tcp_pair()
        b, target = tcp_pair()
        relay = self.relays.join(a, b)
        self._open_relays.hold(relay)
        relay.result.add_done_callback(lambda result: self._part(relay))
        self._ends += [visitor, target]
        return visitor, relay, target

    def _part(self, relay: Relay) -> None:
        self._open_relays.end(relay, relay.result)

    def close_ends(self) -> None:
        for end in self._ends:
            end.close()


UNDONE = ["undo second", "undo first"]
WHOLE = ["open", "begin", "drain", *UNDONE]


async def read(sock: socket.socket) -> bytes:
    async with within(5):
        return await asyncio.get_running_loop().sock_recv(sock, 1000)


# --- being made --------------------------------------------------------------------------------


def test_mode_must_fit() -> None:
    with pytest.raises(ConfigError, match="must be server://"):
        Toy("client://127.0.0.1:1/127.0.0.1:2")


def test_c18_records_say_which_tunnel(caplog: pytest.LogCaptureFixture) -> None:
    """A host program may have several tunnels, too, and shapes its lines itself."""
    one = config(log="info")
    with caplog.at_level("INFO", "nodepass"):
        for tunnel in (Toy(one), Toy(replace(one, label="mine"))):
            tunnel._log.child().info("x")
    address = f"server://{one.tunnel}"
    said = [(record.getMessage(), record.__dict__["tunnel"]) for record in caplog.records]
    assert said == [("x", address), ("x  tunnel=mine", "mine")]


def test_url_is_read_with_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMAPHORE_LIMIT", "7")
    toy = Toy("server://127.0.0.1:1/127.0.0.1:2")
    assert toy._settings.semaphore_limit == 7
    assert "server://127.0.0.1:1/127.0.0.1:2" in repr(toy)


async def test_nothing_can_be_asked_of_a_tunnel_that_never_ran() -> None:
    toy = Toy()
    with pytest.raises(TunnelError, match="not been started"):
        toy.statistics()
    await toy.stop()
    assert toy.done == []


# --- start and stop ----------------------------------------------------------------------------


@both
async def test_life_from_start_to_stop() -> None:
    toy = Toy()
    waiting = asyncio.create_task(toy.wait_closed())
    async with toy:
        assert toy.done == ["open", "begin"]
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert toy.statistics().mode == "server"
        assert not toy._is_stopping
    assert toy.done == WHOLE
    assert toy._is_stopping
    async with within(1):
        await waiting
    assert toy.statistics().relays_open == 0, "also after the end"


@both
async def test_start_twice() -> None:
    async with Toy() as toy:
        with pytest.raises(TunnelError, match="once only"):
            await toy.start()
        assert toy.done == ["open", "begin"], "the running one is not harmed"
    with pytest.raises(TunnelError, match="once only"):
        await toy.start()


@both
async def test_stop_twice_in_a_row_and_at_once() -> None:
    async with Toy() as toy:
        await asyncio.gather(toy.stop(), toy.stop())
        await toy.stop()
    assert toy.done == WHOLE


@both
async def test_stop_before_the_start_is_nothing() -> None:
    toy = Toy()
    await toy.stop()
    async with toy:
        assert toy.done == ["open", "begin"]


@both
@pytest.mark.parametrize("turns", range(6))
async def test_stop_during_the_start(turns: int) -> None:
    toy = Toy()
    starting = asyncio.create_task(toy.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    async with within(5):
        stopping = asyncio.create_task(toy.stop())
        await asyncio.wait({starting, stopping})
        # A stop that came before the start had its first turn found nothing to stop.
        await toy.stop()
        await toy.wait_closed()
    assert toy.done[0] == "open"
    assert toy.done[-2:] == UNDONE


@both
@pytest.mark.parametrize("turns", range(8))
async def test_start_cancelled_leaves_nothing(turns: int) -> None:
    toy = Toy()
    starting = asyncio.create_task(toy.start())
    for _ in range(turns):
        await asyncio.sleep(0)
    starting.cancel()
    async with within(5):
        await asyncio.wait({starting})
        if not starting.cancelled():
            starting.result()
            await toy.stop()
        if toy.done:
            await toy.wait_closed()
            assert toy.done[-1] == "undo first"


@both
async def test_start_that_fails_gives_everything_back() -> None:
    async def fail() -> None:
        raise OSError("no room")

    toy = Toy(on_open=fail)
    with pytest.raises(OSError, match="no room"):
        await toy.start()
    assert toy.done == ["open", *UNDONE]
    async with within(1):
        await toy.stop()
        await toy.wait_closed()
    with pytest.raises(TunnelError, match="not been started"):
        toy.statistics()


@both
async def test_stop_while_a_start_fails() -> None:
    gate = asyncio.Event()

    async def fail() -> None:
        await gate.wait()
        raise OSError("no room")

    toy = Toy(on_open=fail)
    starting = asyncio.create_task(toy.start())
    await asyncio.sleep(0.01)
    stopping = asyncio.create_task(toy.stop())
    await asyncio.sleep(0)
    gate.set()
    async with within(1):
        await asyncio.wait({starting, stopping})
    assert isinstance(starting.exception(), OSError)
    assert stopping.exception() is None
    assert "drain" not in toy.done


@both
async def test_start_that_fails_at_the_last_step() -> None:
    def fail() -> None:
        toy._spawn(asyncio.sleep(60), "sleeping")
        raise OSError("no room")

    toy = Toy(on_begin=fail)
    with pytest.raises(OSError, match="no room"):
        await toy.start()
    assert toy.done[-2:] == UNDONE


@both
async def test_start_without_an_engine_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Settings) -> Relays:
        raise EngineError("start", 24)

    monkeypatch.setattr(tunnel_module, "Relays", refuse)
    toy = Toy()
    with pytest.raises(EngineError):
        await toy.start()
    async with within(1):
        await toy.stop()
        await toy.wait_closed()
    assert toy.done == []


# --- draining ----------------------------------------------------------------------------------


@both
async def test_stop_lets_an_open_relay_finish() -> None:
    async with Toy() as toy:
        visitor, _, target = toy.carry()
        stopping = asyncio.create_task(toy.stop())
        await asyncio.sleep(0.02)
        assert not stopping.done()
        visitor.send(b"question")
        assert await read(target) == b"question"
        visitor.close()
        target.send(b"late")
        target.close()
        async with within(5):
            await stopping
        assert toy._counters.bytes_up == 8
        toy.close_ends()


@both
async def test_stop_cuts_what_does_not_finish(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nodepass"):
        async with Toy(config(log="info", shutdown=0.05)) as toy:
            visitor, relay, target = toy.carry()
            async with within(5):
                await toy.stop()
            assert relay.result.done()
            assert toy._counters.relays_reset == 1
            for end in (visitor, target):
                with pytest.raises(ConnectionResetError):
                    await read(end)
            toy.close_ends()
    assert "stopped  relays_cut=1" in caplog.text


@both
async def test_stop_cancelled_ends_at_once() -> None:
    async with Toy(config(shutdown=60.0)) as toy:
        visitor, relay, _ = toy.carry()
        stopping = asyncio.create_task(toy.stop())
        waiting = asyncio.create_task(toy.stop())
        await asyncio.sleep(0.01)
        stopping.cancel()
        async with within(5):
            with pytest.raises(asyncio.CancelledError):
                await stopping
            await waiting
            await toy.wait_closed()
        assert relay.result.done()
        with pytest.raises(ConnectionResetError):
            await read(visitor)
        toy.close_ends()
    assert toy.done == WHOLE


@both
@pytest.mark.parametrize("turns", range(4))
async def test_stop_cancelled_twice_leaves_nothing(turns: int) -> None:
    """The leak guard looks for the engine's threads and descriptors."""
    toy = Toy(config(shutdown=60.0))
    await toy.start()
    toy.carry()
    stopping = asyncio.create_task(toy.stop())
    await asyncio.sleep(0.01)
    stopping.cancel()
    for _ in range(turns):
        await asyncio.sleep(0)
    stopping.cancel()
    async with within(5):
        await asyncio.wait({stopping})
        assert stopping.cancelled()
        await toy.wait_closed()
        await toy.stop()
    toy.close_ends()


@both
async def test_only_the_second_of_two_stops_is_cancelled() -> None:
    async with Toy() as toy:
        visitor, _, target = toy.carry()
        first, second = (asyncio.create_task(toy.stop()) for _ in range(2))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.wait({second})
        visitor.send(b"x")
        assert await read(target) == b"x", "the drain goes on"
        toy.close_ends()
        async with within(5):
            await first


# --- relays and tasks --------------------------------------------------------------------------


@both
async def test_counts_what_relays_have_carried() -> None:
    async with Toy() as toy:
        visitor, _, target = toy.carry()
        visitor.send(b"12345")
        assert await read(target) == b"12345"
        await until(lambda: toy._open_relays.live_bytes() == (5, 0), 5, "the live count")
        assert toy._counters.bytes_up == 0, "counted at the end"
        visitor.close()
        target.close()
        await until(lambda: toy._counters.bytes_up == 5, 5, "the end")
        assert toy._open_relays.live_bytes() == (5, 0)
        assert toy._counters.relays_reset == 0


@both
async def test_a_shared_engine_outlives_the_tunnel() -> None:
    relays = Relays(Settings(threads=1))
    try:
        async with Toy(relays=relays) as toy:
            assert toy.relays is relays
        async with Toy(relays=relays) as toy:
            visitor, _, target = toy.carry()
            visitor.send(b"x")
            assert await read(target) == b"x"
            toy.close_ends()
    finally:
        await relays.close()


@both
async def test_an_engine_closed_under_a_tunnel_does_it_no_harm() -> None:
    relays = Relays(Settings(threads=1))
    async with Toy(relays=relays) as toy:
        _, relay, _ = toy.carry()
        await relays.close()
        await asyncio.sleep(0.01)
        assert relay.result.done()
        assert toy.statistics().bytes_up == 0
        toy.close_ends()


@both
async def test_a_relay_without_a_result_is_forgotten() -> None:
    async with Toy() as toy:
        _, relay, _ = toy.carry()
        relay.result.cancel()
        await asyncio.sleep(0.01)
        assert "relays=0" in repr(toy)
        assert toy.statistics().bytes_up == 0
        toy.close_ends()


@both
async def test_a_fault_in_a_task_is_told_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ZeroDivisionError("oops")

    with caplog.at_level(logging.INFO, "nodepass"):
        async with Toy(config(log="error")) as toy:
            toy._spawn(fail(), "counting")
            await asyncio.sleep(0.01)
            ran = asyncio.Event()

            async def run() -> None:
                ran.set()

            toy._spawn(run(), "running")
            async with within(1):
                await ran.wait()
    assert "an internal error in counting" in caplog.text
    assert "oops" in caplog.text


@both
async def test_tasks_end_with_the_tunnel() -> None:
    ended: list[str] = []

    async def sleep() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("sleep")

    async with Toy() as toy:
        toy._spawn(sleep(), "sleeping")
        await asyncio.sleep(0.01)
    assert ended == ["sleep"]
    toy._spawn(sleep(), "too late")  # closed unstarted: no warning of a coroutine never awaited


# --- the report --------------------------------------------------------------------------------


@both
async def test_c02_a_program_that_embeds_us_hears_of_its_variables(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHUTDOWN_TIMEOUT", "30")
    with caplog.at_level(logging.INFO, "nodepass"):
        toy = Toy("server://127.0.0.1:1/127.0.0.1:2")
    assert toy._settings.shutdown_timeout == 5.0
    assert "a variable is left aside" in caplog.text


async def test_reports_what_has_changed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with Toy(config(log="debug", report=0.01)) as toy:
            await until(lambda: toy.looks > 5, 5, "looks")
            lines = [r.getMessage() for r in caplog.records if "report" in r.getMessage()]
            assert len(lines) == 1
            visitor, _, target = toy.carry()
            visitor.send(b"12345")
            assert await read(target) == b"12345"
            await until(lambda: "up=5" in caplog.text, 5, "a line with the bytes")
            toy.close_ends()
    looks = toy.looks
    await asyncio.sleep(0.03)
    assert toy.looks == looks, "no report after the end"


async def test_no_report_where_nobody_would_see_it() -> None:
    async with Toy(config(log="info", report=0.001)) as toy:
        await asyncio.sleep(0.02)
        assert toy.looks == 0


# --- passwords and files -----------------------------------------------------------------------


@both
async def test_password_is_stretched_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 0.1 s, and other tunnels of this loop are at work."""
    threads: list[threading.Thread] = []

    def stretch(password: str) -> bytes:
        threads.append(threading.current_thread())
        return password.encode()

    monkeypatch.setattr(tunnel_module, "stretch_password", stretch)
    toy = Toy(Config.parse("server://secret@127.0.0.1:1/127.0.0.1:2?log=none", {}, Settings()))
    assert await toy._stretch_password() == b"secret"
    assert threads
    assert threads[0] is not threading.current_thread()
    assert "secret" not in repr(toy)
    assert await Toy()._stretch_password() is None


class Filed(Toy):
    """A tunnel that has files."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(Config.parse("server://127.0.0.1:1/127.0.0.1:2?log=none", {}, settings))
        self.reloads: list[bool] = []

    def _reload(self, *, force: bool) -> bool:
        self.reloads.append(force)
        return True


@both
async def test_reload_is_for_tunnels_that_run() -> None:
    filed = Filed(Settings(threads=1))
    assert not filed.reload()
    async with filed:
        assert filed.reload()
        assert filed.reloads == [True], "whether they look changed or not"
        _, _, _ = filed.carry()
        stopping = asyncio.create_task(filed.stop())
        await asyncio.sleep(0.01)
        assert not filed.reload(), "it takes no new connections any more"
        filed.close_ends()
        await stopping
    assert not filed.reload()
    assert filed.reloads == [True]


@both
async def test_files_are_looked_at_again_and_again() -> None:
    filed = Filed(Settings(threads=1, reload_interval=0.01))
    async with filed:
        await until(lambda: len(filed.reloads) >= 3, 5, "three looks")
    assert not any(filed.reloads), "only what has changed"
    looks = len(filed.reloads)
    await asyncio.sleep(0.05)
    assert len(filed.reloads) == looks


async def test_tunnel_without_files_has_nothing_to_reload() -> None:
    async with Toy() as toy:
        assert not toy.reload()


@pytest.mark.parametrize("side", [Server, Client])
def test_c29_what_was_refused_can_be_shown(side: type[Server | Client]) -> None:
    """As a traceback with its locals does."""
    made = side.__new__(side)
    with pytest.raises(ConfigError):
        made.__init__("nonsense")  # type: ignore[misc]  # to keep what was refused
    assert repr(made) == f"<{side.__name__} never made>"
