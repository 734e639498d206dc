"""Guards around every test, and the runner of `async def` tests.

* A test must give back what it took: descriptors, threads (Python's and the
  kernel's), child processes, asyncio tasks. What is left when the test and its
  fixtures are done fails the test by name, after a bounded grace.
* `async def test_…` runs on a fresh `asyncio.Runner`: uvloop where installed,
  else asyncio; `NODEPASS_TEST_LOOP=asyncio|uvloop` chooses; `@pytest.mark.loops(
  "asyncio", "uvloop")` runs a test on each. A task that outlives its test fails it.
* Fixtures are plain functions: asynchronous set-up belongs into the test, as
  `async with`.

The kernel's side of the guard needs Linux (/proc); elsewhere Python's side remains.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib.util
import inspect
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

GRACE = 3.0
"""Seconds that threads, children and descriptors get to go away by themselves."""

TASK_GRACE = 1.0
"""Seconds that tasks get to end after their test; a cancelled task needs a few turns."""

DEADLINE = 50.0
"""Seconds for one async test; below faulthandler_timeout, so that its tasks are named first."""

SELF = Path("/proc/self")
HAS_PROC = (SELF / "fd").is_dir() and (SELF / "task").is_dir()

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


# --- loops ---------------------------------------------------------------------------------------


def _loop_factories() -> dict[str, LoopFactory]:
    factories: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop}
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        factories["uvloop"] = uvloop.new_event_loop
    return factories


LOOPS = _loop_factories()


def _default_loop() -> str:
    wanted = os.environ.get("NODEPASS_TEST_LOOP") or ("uvloop" if "uvloop" in LOOPS else "asyncio")
    if wanted not in LOOPS:
        raise pytest.UsageError(f"NODEPASS_TEST_LOOP={wanted}: choose from {', '.join(LOOPS)}")
    return wanted


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; runs by default, -m 'not slow' omits")
    config.addinivalue_line("markers", "loops(*names): run an async test once on each event loop")
    config.addinivalue_line("markers", f"deadline(seconds): async time limit, default {DEADLINE}")
    _default_loop()


def pytest_sessionstart() -> None:
    _warm_up()


def pytest_collection_finish() -> None:
    # Whatever exists now lives to the end; a frozen heap makes the collection after each test
    # cost a millisecond or two instead of twenty.
    gc.collect()
    gc.freeze()


def _warm_up() -> None:
    """Start what libraries start once per process, so that no test is blamed for it."""

    async def resolve() -> None:
        # libuv starts its four worker threads at the first name look-up, and opens its signal
        # pipe with the first loop; both stay until the process ends.
        await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)

    for factory in LOOPS.values():
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(resolve())


@pytest.fixture
def loop_name(request: pytest.FixtureRequest) -> str:
    """Name of the event loop that async tests of this run (or this parameter) use."""
    return str(getattr(request, "param", None) or _default_loop())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("loops")
    if marker is None:
        return
    if "loop_name" not in metafunc.fixturenames:
        metafunc.fixturenames.append("loop_name")
    names = marker.args or tuple(LOOPS)
    metafunc.parametrize(
        "loop_name",
        [
            pytest.param(
                name,
                marks=()
                if name in LOOPS
                else pytest.mark.skip(reason=f"{name} is not installed on this interpreter"),
            )
            for name in names
        ],
        indirect=True,
    )


# --- async tests ---------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests, also under hypothesis' @given."""
    test: Callable[..., object] = pyfuncitem.obj
    drive = functools.partial(_run_async, pyfuncitem)
    given = getattr(test, "hypothesis", None)
    if given is not None and inspect.iscoroutinefunction(given.inner_test):
        given.inner_test = _synchronous(given.inner_test, drive)
        return None
    if not inspect.iscoroutinefunction(test):
        return None
    names = inspect.signature(test).parameters
    drive(test(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


def _synchronous(
    test: Callable[..., Coroutine[object, object, None]],
    drive: Callable[[Coroutine[object, object, None]], None],
) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        drive(test(*args, **kwargs))

    return run


def _run_async(item: pytest.Function, test: Coroutine[object, object, None]) -> None:
    params: Mapping[str, object] = item.callspec.params if hasattr(item, "callspec") else {}
    marker = item.get_closest_marker("deadline")
    deadline = float(marker.args[0]) if marker else DEADLINE
    complaints: list[str] = []
    factory = LOOPS[str(params.get("loop_name", _default_loop()))]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_supervise(test, deadline, complaints))
    if complaints:
        pytest.fail("the event loop was left untidy:\n  " + "\n  ".join(complaints), pytrace=False)


async def _supervise(test: Awaitable[None], deadline: float, complaints: list[str]) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(_describe(context)))
    alarm = loop.call_later(deadline, _print_tasks, deadline)
    try:
        # The grace over the alarm keeps the printed stacks those of the hang.
        async with asyncio.timeout(deadline + 0.1):
            await test
    finally:
        alarm.cancel()
    complaints += [f"task still running: {task!r}" for task in await _leftover_tasks()]
    # A forgotten task's exception is reported when the task is collected.
    gc.collect()


async def _leftover_tasks() -> set[asyncio.Task[object]]:
    end = time.monotonic() + TASK_GRACE
    while True:
        left = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
        if not left or time.monotonic() > end:
            return left
        await asyncio.sleep(0.005)


def _describe(context: dict[str, object]) -> str:
    parts = [str(context.get("message", "loop exception"))]
    parts += [f"{k}={v!r}" for k, v in context.items() if k != "message"]
    return "  ".join(parts)


def _print_tasks(deadline: float) -> None:
    print(f"async test did not end within {deadline} s; its tasks:", file=sys.stderr)
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)


# --- the leak guard ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holdings:
    """What the process holds at one moment, each thing by an identity and a readable name."""

    fds: dict[int, str]
    threads: dict[int, str]
    tasks: dict[int, str]
    children: dict[int, str]

    @classmethod
    def now(cls) -> Holdings:
        return cls(_fds(), _threads(), _kernel_threads(), _children())

    def surplus(self, before: Holdings) -> list[str]:
        """Name what is held now and was not before, and what has vanished from under others."""
        found: list[str] = []
        for noun, new, old in (
            ("descriptor", self.fds, before.fds),
            ("thread", self.threads, before.threads),
            ("kernel thread", self.tasks, before.tasks),
            ("child process", self.children, before.children),
        ):
            found += [f"{noun} {i}: {name}" for i, name in new.items() if old.get(i) is None]
        for fd, name in before.fds.items():
            if self.fds.get(fd) != name:
                found.append(f"descriptor {fd} was {name}, is now {self.fds.get(fd, 'closed')}")
        return found


def _fds() -> dict[int, str]:
    found: dict[int, str] = {}
    if HAS_PROC:
        for entry in (SELF / "fd").iterdir():
            try:
                found[int(entry.name)] = str(entry.readlink())
            except OSError:  # the listing's own descriptor, gone by now
                continue
    return found


def _threads() -> dict[int, str]:
    return {thread.ident or 0: repr(thread) for thread in threading.enumerate()}


def _kernel_threads() -> dict[int, str]:
    found: dict[int, str] = {}
    if HAS_PROC:
        for entry in (SELF / "task").iterdir():
            try:
                found[int(entry.name)] = (entry / "comm").read_text().strip()
            except OSError:  # ended between the two calls
                continue
    return found


def _children() -> dict[int, str]:
    """Children of every thread; the tracker that multiprocessing keeps for good is not counted."""
    found = {child.pid or 0: repr(child) for child in multiprocessing.active_children()}
    if HAS_PROC:
        for listing in (SELF / "task").glob("*/children"):
            try:
                pids = listing.read_text().split()
            except OSError:
                continue
            for pid in pids:
                found.setdefault(int(pid), _command(pid))
    return {pid: name for pid, name in found.items() if "resource_tracker" not in name}


def _command(pid: str) -> str:
    try:
        words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
    except OSError:
        return "(ended)"
    return b" ".join(words).decode(errors="replace").strip() or "(zombie)"


class _Ear(logging.Handler):
    """Hears what asyncio only logs: tasks destroyed while pending, callbacks that raised."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(f"asyncio logged: {record.getMessage()}")


@pytest.fixture(autouse=True)
def leak_guard() -> Iterator[None]:
    """Fail the test for whatever it leaves behind."""
    ear = _Ear()
    logging.getLogger("asyncio").addHandler(ear)
    before = Holdings.now()
    try:
        yield
        gc.collect()  # unclosed files and sockets speak up now, within the test that dropped them
        surplus = _settled(before)
    finally:
        logging.getLogger("asyncio").removeHandler(ear)
    surplus += ear.heard
    if surplus:
        pytest.fail("left behind:\n  " + "\n  ".join(surplus), pytrace=False)


def _settled(before: Holdings) -> list[str]:
    """Return what remains too much once the grace is over, or nothing as soon as all is well."""
    end = time.monotonic() + GRACE
    pause = 0.001
    while surplus := Holdings.now().surplus(before):
        if time.monotonic() > end:
            break
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    return surplus
