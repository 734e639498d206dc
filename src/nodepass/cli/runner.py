"""The running process: event loop, signals, the one `Relays`, tunnels from start to stop.

    start all ──failure──▶ one line, stop what started, exit 1
        │ good start
        ▼
    wait ──SIGINT/SIGTERM──▶ drain ──done──▶ exit 0
                               │ again
                               ▼
                        reset all, exit 1

After a good start nothing but a signal ends the process. Only `main` calls it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from nodepass.config.environment import Settings
from nodepass.config.parameters import Mode
from nodepass.config.password import FILE_VARIABLE, is_exposed, keep_out_of_core_dumps
from nodepass.config.url import Config
from nodepass.errors import NodePassError
from nodepass.observe.console import Console
from nodepass.observe.log import COMPLAINT, LEVELS, Log, mask
from nodepass.tunnel.base import tell_remarks

__all__ = ["run", "serve"]

FINE, FAILED = 0, 1

DESCRIPTORS = 1 << 20
"""Most descriptors asked for; Linux' own ceiling for a process (fs.nr_open)."""


def run(configs: Sequence[Config], settings: Settings, exposed: str | None = None) -> int:
    """Run tunnels until a signal ends them.

    Args:
        configs: one for each tunnel; already checked against each other.
        settings: those of the process.
        exposed: why a password can be read in the process list; None = it cannot.

    Returns:
        The exit code, as `serve` returns it.
    """
    with Console(settings.log_format, is_shared=len(configs) > 1) as console:
        _warn_of_words(configs, exposed)
        tell_remarks(Log("cli", _most_talkative(configs)), settings)
        _warn_of_open_file(configs)
        if any(config.password is not None for config in configs):
            keep_out_of_core_dumps()
        _raise_descriptor_limit()
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            try:
                return runner.run(serve(configs, settings, None, console.leave))
            finally:
                _deafen()


def _warn_of_words(configs: Sequence[Config], exposed: str | None) -> None:
    """Say if the password can be read in the process list."""
    if exposed is not None:
        Log("cli", _most_talkative(configs)).warn(
            "the password is visible in the process list; put it into a file and name the file "
            "in NODEPASS_PASSWORD_FILE",
            why=exposed,
        )


def _warn_of_open_file(configs: Sequence[Config]) -> None:
    """Say if everybody on this machine may read the password that is used."""
    path = os.environ.get(FILE_VARIABLE)
    if path is None or all(config.password is None for config in configs):
        return
    if is_exposed(path):
        Log("cli", _most_talkative(configs)).warn(
            "every user of this machine can read the password; chmod 600 its file", file=path
        )


def _deafen() -> None:
    """Let a signal that comes while the process already ends not change its exit code."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number: signal.Signals | None = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_IGN)


def _raise_descriptor_limit() -> None:
    """Use what the hard limit allows: a visitor takes two descriptors on either side."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # Windows, PyPy
        return asyncio.new_event_loop
    return uvloop.new_event_loop


class Runnable(Protocol):
    """What `Server` and `Client` have in common."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def wait_closed(self) -> None: ...
    def reload(self) -> bool: ...


class Engines(Protocol):
    """What is asked of `Relays` here."""

    async def close(self) -> object: ...


class Factory(Protocol):
    """Makes the parts of a process; tests hand in their own."""

    def relays(self, settings: Settings) -> Engines: ...
    def tunnel(self, config: Config, relays: Engines) -> Runnable: ...


class _RealFactory:
    def relays(self, settings: Settings) -> Engines:
        from nodepass.engine.relays import Relays

        return Relays(settings)

    def tunnel(self, config: Config, relays: Engines) -> Runnable:
        from nodepass.client.client import Client
        from nodepass.engine.relays import Relays
        from nodepass.server.server import Server

        assert isinstance(relays, Relays)
        side = Server if config.mode is Mode.SERVER else Client
        return side(config, relays=relays)


async def serve(
    configs: Sequence[Config],
    settings: Settings,
    factory: Factory | None = None,
    leave: Callable[[int], object] | None = None,
) -> int:
    """Run tunnels until a signal ends them.

    Args:
        configs: one for each tunnel; already checked against each other.
        settings: those of the process.
        factory: makes the parts; None = the real ones.
        leave: ends the process on the spot, with an exit code; None = `os._exit`.

    Returns:
        The exit code: 0 after a signal, 1 when a tunnel could not start, when a
        second signal cut the drain short, or when every tunnel ended by itself.
    """
    factory = _RealFactory() if factory is None else factory
    log = Log("cli", _most_talkative(configs))
    asked, hurried = asyncio.Event(), asyncio.Event()

    def on_stop() -> None:
        if hurried.is_set():
            log.warn("ended on the spot by a third signal")
            (leave or os._exit)(FAILED)  # whoever sends it means it
        if asked.is_set():
            hurried.set()
        asked.set()

    tunnels: list[Runnable] = []
    starting: Config | None = None

    def note(config: Config) -> Config:
        nonlocal starting
        starting = config
        return config

    def on_reload() -> None:
        _reload(tunnels, log)

    handlers = {"SIGINT": on_stop, "SIGTERM": on_stop, "SIGHUP": on_reload}
    with _signals(asyncio.get_running_loop(), handlers):
        try:
            relays = factory.relays(settings)
        except (NodePassError, OSError) as exc:
            return _complain(exc, settings)
        try:
            made = (factory.tunnel(config, relays) for config in map(note, configs))
            code = await _live(made, tunnels, asked, log)
        except (NodePassError, OSError) as exc:
            code = _complain(exc, settings, starting)
        finally:
            if not await _unless(hurried, _stop(tunnels, log)):
                log.warn("stopped at once by a second signal, open relays are reset")
                code = FAILED
            await relays.close()
        return code


def _most_talkative(configs: Sequence[Config]) -> str:
    return min((config.log for config in configs), key=LEVELS.__getitem__, default="info")


@contextlib.contextmanager
def _signals(
    loop: asyncio.AbstractEventLoop, handlers: Mapping[str, Callable[[], None]]
) -> Iterator[None]:
    numbers: list[signal.Signals] = []
    for name, handler in handlers.items():
        number: signal.Signals | None = getattr(signal, name, None)
        if number is None:  # Windows has no SIGHUP
            continue
        try:
            loop.add_signal_handler(number, handler)
            numbers.append(number)
        except NotImplementedError:  # nor handlers on the loop
            _plain_handler(loop, number, handler)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _plain_handler(
    loop: asyncio.AbstractEventLoop, number: signal.Signals, handler: Callable[[], None]
) -> None:
    signal.signal(number, lambda *_: loop.call_soon_threadsafe(handler))


def _reload(tunnels: Sequence[Runnable], log: Log) -> None:
    """Have every tunnel re-read its certificates; what came of it, each tunnel says."""
    has_anything = False
    for tunnel in tunnels:
        try:
            has_anything |= tunnel.reload()
        except Exception as exc:  # noqa: BLE001 - the others' certificates still count
            has_anything = True
            log.error("an internal error in a reload; please report it", error=exc)
    if not has_anything:
        log.info("nothing to reload")


async def _live(
    made: Iterable[Runnable], tunnels: list[Runnable], asked: asyncio.Event, log: Log
) -> int:
    """Start every tunnel and wait; `tunnels` holds whatever has to be stopped."""

    async def start() -> None:
        for tunnel in made:
            tunnels.append(tunnel)
            await tunnel.start()

    async def watch(tunnel: Runnable) -> None:
        await tunnel.wait_closed()
        log.error("tunnel ended by itself, please report it", tunnel=repr(tunnel))

    async def watch_all() -> None:
        await asyncio.gather(*map(watch, tunnels))

    if not await _unless(asked, start()):
        return FINE
    return FAILED if await _unless(asked, watch_all()) else FINE


async def _stop(tunnels: Sequence[Runnable], log: Log) -> None:
    results = await asyncio.gather(*(t.stop() for t in tunnels), return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            log.error("tunnel could not be stopped cleanly", error=result)


async def _unless(event: asyncio.Event, work: Coroutine[object, object, None]) -> bool:
    """Do the work unless the event comes first; tell whether it was done, pass on its errors."""
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        for each in (task, waiter):
            each.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)


def _complain(exc: NodePassError | OSError, settings: Settings, of: Config | None = None) -> int:
    """Say in one line why the start failed; in JSON also of which tunnel."""
    reason = str(exc)
    if isinstance(exc, OSError) and not isinstance(exc, NodePassError):
        reason = exc.strerror or reason  # without "[Errno 98]"
    if settings.log_format == "json":
        fields = {} if of is None or of.label is None else {"tunnel": of.label}
        Log("cli").fatal(reason, **fields)
    else:
        print(f"{COMPLAINT}{mask(reason)}", file=sys.stderr)
    return FAILED
