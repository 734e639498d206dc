"""process: start, signals, stop, and every way a start can fail, with made-up tunnels."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from nodepass.cli import runner
from nodepass.cli.runner import Engines, Runnable, serve
from nodepass.client.client import Client
from nodepass.config.environment import Settings
from nodepass.config.url import Config, label_together
from nodepass.errors import EngineError, ListenError
from nodepass.observe.log import LEVELS
from nodepass.server.server import Server

SERVER = "server://127.0.0.1:10101/127.0.0.1:8080?log=error"
CLIENT = "client://127.0.0.1:10101/127.0.0.1:9000?log=none"
CONFIGS = [Config.parse(url, {}) for url in (SERVER, CLIENT)]

unix_only = pytest.mark.skipif(sys.platform == "win32", reason="sends itself Unix signals")
pytestmark = unix_only


class FakeTunnel:
    """Writes down what happens to it; each step can be made to fail or to hang."""

    def __init__(self, factory: FakeFactory, number: int) -> None:
        self.factory = factory
        self.number = number
        self.closed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<tunnel {self.number}>"

    async def _step(self, name: str) -> None:
        self.factory.events.append(f"{name} {self.number}")
        action = self.factory.actions.get(f"{name} {self.number}")
        if isinstance(action, Exception):
            raise action
        if callable(action):
            await action()

    async def start(self) -> None:
        await self._step("start")

    async def stop(self) -> None:
        try:
            await self._step("stop")
        except asyncio.CancelledError:
            self.factory.events.append(f"abort {self.number}")
            raise
        finally:
            self.closed.set()

    async def wait_closed(self) -> None:
        await self.closed.wait()

    def reload(self) -> bool:
        self.factory.events.append(f"reload {self.number}")
        answer = self.factory.actions.get(f"reload {self.number}")
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)


class FakeFactory:
    def __init__(
        self,
        actions: Mapping[str, Exception | bool | Callable[[], object]] | None = None,
    ) -> None:
        self.actions: dict[str, object] = dict(actions or {})
        self.events: list[str] = []
        self.tunnels: list[FakeTunnel] = []

    def relays(self, settings: Settings) -> Engines:
        action = self.actions.get("relays")
        if isinstance(action, Exception):
            raise action
        return self

    def tunnel(self, config: Config, relays: Engines) -> Runnable:
        assert relays is self
        self.tunnels.append(FakeTunnel(self, len(self.tunnels) + 1))
        return self.tunnels[-1]

    async def close(self) -> None:
        self.events.append("close")


def kill(number: int) -> Callable[[], object]:
    async def send() -> None:
        os.kill(os.getpid(), number)

    return send


def kill_and_hang(number: int) -> Callable[[], object]:
    async def send() -> None:
        os.kill(os.getpid(), number)
        await asyncio.Event().wait()

    return send


async def run(factory: FakeFactory) -> int:
    return await serve(CONFIGS, Settings(), factory)


ALL_STARTED = ["start 1", "start 2"]
ALL_STOPPED = ["stop 1", "stop 2", "close"]


@pytest.mark.loops("asyncio", "uvloop")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it(number: int) -> None:
    factory = FakeFactory({"start 2": kill(number)})
    assert await run(factory) == 0
    assert factory.events == ALL_STARTED + ALL_STOPPED


async def test_a_signal_before_all_have_started() -> None:
    factory = FakeFactory({"start 1": kill_and_hang(signal.SIGTERM)})
    assert await run(factory) == 0
    assert factory.events == ["start 1", "stop 1", "close"]


@pytest.mark.loops("asyncio", "uvloop")
async def test_a_second_signal_cuts_the_drain_short() -> None:
    factory = FakeFactory(
        {"start 2": kill(signal.SIGTERM), "stop 1": kill_and_hang(signal.SIGTERM)}
    )
    assert await run(factory) == 1
    assert factory.events == [*ALL_STARTED, "stop 1", "stop 2", "abort 1", "close"]


async def test_a_third_signal_ends_the_process_there(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    factory = FakeFactory({"start 2": kill(signal.SIGTERM)})

    async def twice_more() -> None:
        # asyncio calls the handler once for each: two turns of the loop apart.
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.shield(asyncio.sleep(0.05))

    factory.actions["stop 1"] = twice_more
    monkeypatch.setattr(runner, "_unless", _patient(runner._unless))
    assert await run(factory) in (0, 1)
    assert codes == [1]


def _patient(real: Callable[..., object]) -> Callable[..., object]:
    """Let the work of a cut drain go on, so that the third signal finds somebody."""

    async def unless(event: asyncio.Event, work: object) -> object:
        if getattr(work, "__name__", "") == "_stop":
            await work  # type: ignore[misc]
            return not event.is_set()
        return await real(event, work)  # type: ignore[misc]

    return unless


async def reload_then_stop() -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    await asyncio.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.loops("asyncio", "uvloop")
@pytest.mark.parametrize(
    ("answers", "lines"),
    [
        ((False, False), ["nothing to reload"]),
        ((True, False), []),
        ((False, True), []),
        ((True, True), []),
        ((ZeroDivisionError(), False), ["an internal error in a reload; please report it"]),
        ((False, ZeroDivisionError()), ["an internal error in a reload; please report it"]),
    ],
)
async def test_a_hangup_reloads_every_tunnel_and_ends_none(
    answers: tuple[bool | Exception, ...], lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    reloads = {f"reload {n}": answer for n, answer in enumerate(answers, 1)}
    factory = FakeFactory({"start 2": reload_then_stop, **reloads})
    configs = [Config.parse(SERVER.replace("error", "info"), {}), CONFIGS[1]]
    with caplog.at_level("DEBUG", "nodepass"):
        assert await serve(configs, Settings(), factory) == 0
    assert factory.events == [*ALL_STARTED, "reload 1", "reload 2", *ALL_STOPPED]
    said = [record.getMessage().partition("  ")[0] for record in caplog.records]
    assert said == lines


async def test_a_hangup_before_there_is_a_tunnel(caplog: pytest.LogCaptureFixture) -> None:
    factory = FakeFactory({"start 1": reload_then_stop})
    with caplog.at_level("DEBUG", "nodepass"):
        assert await run(factory) == 0
    assert "reload 2" not in factory.events


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (ListenError("a:1", errno.EADDRINUSE), "cannot listen on a:1: address already in use"),
        (OSError(errno.EMFILE, "too many open files"), "too many open files"),
        (OSError("server://secret@h odd"), "server://***@h odd"),
    ],
)
async def test_a_failed_start_stops_what_started(
    failure: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = FakeFactory({"start 2": failure})
    assert await run(factory) == 1
    assert factory.events == ALL_STARTED + ALL_STOPPED
    assert capsys.readouterr() == ("", f"nodepass: error: {line}\n")


@pytest.mark.parametrize("place", [1, 2])
async def test_c18_json_says_which_tunnel_failed(
    place: int, caplog: pytest.LogCaptureFixture
) -> None:
    factory = FakeFactory({f"start {place}": ListenError("a:1", errno.EADDRINUSE)})
    with caplog.at_level("DEBUG", "nodepass"):
        code = await serve(label_together(CONFIGS), Settings(log_format="json"), factory)
    assert code == 1
    (record,) = (r for r in caplog.records if r.levelname == "CRITICAL")
    label = ("server://127.0.0.1:10101", "client://127.0.0.1:10101")[place - 1]
    assert record.getMessage() == f"cannot listen on a:1: address already in use  tunnel={label}"


async def test_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    factory = FakeFactory({"relays": EngineError("start", errno.EAGAIN)})
    assert await run(factory) == 1
    assert factory.events == []
    assert "nodepass: error: engine start: " in capsys.readouterr().err


async def test_a_bug_in_start_still_cleans_up() -> None:
    factory = FakeFactory({"start 2": ZeroDivisionError()})
    with pytest.raises(ZeroDivisionError):
        await run(factory)
    assert factory.events == ALL_STARTED + ALL_STOPPED


async def test_a_bug_in_stop_is_logged_and_the_rest_stopped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    factory = FakeFactory({"start 2": kill(signal.SIGTERM), "stop 1": ZeroDivisionError()})
    with caplog.at_level("DEBUG", "nodepass"):
        assert await run(factory) == 0
    assert factory.events == ALL_STARTED + ALL_STOPPED
    assert any("ZeroDivisionError" in record.getMessage() for record in caplog.records)


async def test_one_that_ended_by_itself_leaves_the_other_running(
    caplog: pytest.LogCaptureFixture,
) -> None:
    factory = FakeFactory()

    async def close_first() -> None:
        factory.tunnels[0].closed.set()
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)

    factory.actions["start 2"] = close_first
    with caplog.at_level("DEBUG", "nodepass"):
        assert await run(factory) == 0
    assert any("tunnel ended by itself" in record.getMessage() for record in caplog.records)


async def test_all_ended_by_themselves() -> None:
    factory = FakeFactory()

    async def close_both() -> None:
        for tunnel in factory.tunnels:
            tunnel.closed.set()

    factory.actions["start 2"] = close_both
    assert await run(factory) == 1
    assert factory.events == ALL_STARTED + ALL_STOPPED


async def test_signal_handlers_are_taken_away_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    await run(FakeFactory({"start 2": kill(signal.SIGTERM)}))
    assert signal.getsignal(signal.SIGTERM) == before


async def test_loops_without_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        """A loop as Windows has it."""

        def add_signal_handler(self, number: int, handler: object) -> None:
            raise NotImplementedError

        def call_soon_threadsafe(self, handler: Callable[[], None]) -> None:
            handler()

    set_handlers: dict[int, Callable[..., object]] = {}
    monkeypatch.setattr(signal, "signal", set_handlers.__setitem__)
    heard: list[str] = []
    handlers = {"SIGINT": lambda: heard.append("int"), "SIGNOTHERE": lambda: heard.append("no")}
    with runner._signals(Plain(), handlers):  # type: ignore[arg-type]
        set_handlers[signal.SIGINT](signal.SIGINT, None)
    assert heard == ["int"]
    assert list(set_handlers) == [signal.SIGINT]


def test_the_most_talkative_tunnel_sets_the_level() -> None:
    assert runner._most_talkative(CONFIGS) == "error"
    assert runner._most_talkative([]) == "info"
    assert min(LEVELS.values()) == LEVELS["debug"]


async def test_the_real_parts() -> None:
    factory = runner._RealFactory()
    relays = factory.relays(Settings(threads=1, engine="python"))
    try:
        made = [factory.tunnel(config, relays) for config in CONFIGS]
        assert [type(tunnel) for tunnel in made] == [Server, Client]
    finally:
        await relays.close()


class QuietConsole(contextlib.AbstractContextManager["QuietConsole", None]):
    """Leaves standard error and `logging` as they are."""

    def __init__(self, fmt: str, *, is_shared: bool) -> None:
        self.words = fmt, is_shared

    def __exit__(self, *error: object) -> None:
        return

    def leave(self, code: int) -> None:
        raise AssertionError(code)


def test_run_sets_the_process_up(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    def noted(fmt: str, *, is_shared: bool) -> QuietConsole:
        done.append(fmt)
        assert is_shared
        return QuietConsole(fmt, is_shared=is_shared)

    async def fake_serve(*words: object) -> int:
        done.append(type(asyncio.get_running_loop()).__module__.split(".")[0])
        return 5

    monkeypatch.setattr(runner, "serve", fake_serve)
    monkeypatch.setattr(runner, "Console", noted)
    monkeypatch.setattr(runner, "_raise_descriptor_limit", lambda: done.append("limit"))
    assert runner.run(CONFIGS, Settings(log_format="json")) == 5
    loop = runner._loop_factory()()
    loop.close()
    assert done == ["json", "limit", type(loop).__module__.split(".")[0]]


@pytest.mark.parametrize("why", [None, "only Linux lets a process change its words"])
def test_run_says_what_can_be_seen(
    why: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fake_serve(*words: object) -> int:
        return 0

    monkeypatch.setattr(runner, "serve", fake_serve)
    monkeypatch.setattr(runner, "Console", QuietConsole)
    monkeypatch.setattr(runner, "_raise_descriptor_limit", lambda: None)
    monkeypatch.setattr(runner, "_deafen", lambda: None)
    configs = [Config.parse("server://hunter2@:1/:2", {})]
    with caplog.at_level("DEBUG", "nodepass"):
        assert runner.run(configs, Settings(), why) == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (0 if why is None else 1)
    for line in said:
        assert "NODEPASS_PASSWORD_FILE" in line
        assert f'why="{why}"' in line
        assert "hunter2" not in line


def test_c02_run_says_which_variables_it_does_not_follow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fake_serve(*words: object) -> int:
        return 0

    monkeypatch.setattr(runner, "serve", fake_serve)
    monkeypatch.setattr(runner, "Console", QuietConsole)
    monkeypatch.setattr(runner, "_raise_descriptor_limit", lambda: None)
    monkeypatch.setattr(runner, "_deafen", lambda: None)
    environ = {"SHUTDOWN_TIMEOUT": "30", "NODEPASS_THREDS": "2"}
    settings = Settings.from_environment(environ)
    with caplog.at_level("DEBUG", "nodepass"):
        assert runner.run([Config.parse("server://:1/:2", environ)] * 2, settings) == 0
    value, name = [record.getMessage() for record in caplog.records]
    assert value.startswith("a variable is left aside, since its value can hardly be meant for us")
    assert "variable=SHUTDOWN_TIMEOUT  why=\"'30' is not a duration such as " in value
    assert value.endswith("  kept=5s  unmistakable=NODEPASS_SHUTDOWN_TIMEOUT")
    assert name == (
        "a variable is not read, though its name is almost one of ours"
        "  variable=NODEPASS_THREDS  meant=NODEPASS_THREADS"
    )


@pytest.mark.parametrize(("mode", "is_told"), [(0o600, False), (0o640, False), (0o644, True)])
def test_password_file_that_everybody_can_read(
    mode: int,
    is_told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "secret"
    path.write_text("swordfish")
    path.chmod(mode)
    monkeypatch.setenv("NODEPASS_PASSWORD_FILE", str(path))
    config = Config.parse("server://127.0.0.1:1/127.0.0.1:2", os.environ)
    with caplog.at_level("DEBUG", "nodepass"):
        runner._warn_of_open_file([config])
    assert ("chmod 600" in caplog.text) is is_told
    assert "swordfish" not in caplog.text


def test_without_uvloop(monkeypatch: pytest.MonkeyPatch) -> None:
    _forbid(monkeypatch, "uvloop")
    assert runner._loop_factory() is asyncio.new_event_loop


def _forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = builtins.__import__

    def importing(wanted: str, *rest: object, **more: object) -> object:
        if wanted == name:
            raise ImportError(wanted)
        return real(wanted, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", importing)


UNLIMITED = -1


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, 4096, (4096, 4096)),
        (1024, UNLIMITED, (runner.DESCRIPTORS, UNLIMITED)),
        (1024, 1 << 30, (runner.DESCRIPTORS, 1 << 30)),
        (4096, 4096, None),
        (UNLIMITED, UNLIMITED, None),
    ],
)
def test_descriptor_limit(
    soft: int, hard: int, expected: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    calls: list[object] = []
    monkeypatch.setattr(resource, "RLIM_INFINITY", UNLIMITED)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: calls.append(both))
    runner._raise_descriptor_limit()
    assert calls == ([] if expected is None else [expected])


def test_a_refused_descriptor_limit_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    def refuse(which: int, both: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1, 2))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    runner._raise_descriptor_limit()


def test_descriptor_limit_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _forbid(monkeypatch, "resource")
    runner._raise_descriptor_limit()
