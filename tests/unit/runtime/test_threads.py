"""aside: blocking work beside the loop, also where no thread is to be had."""

from __future__ import annotations

import asyncio
import threading

import pytest

from nodepass.runtime import threads

ERRORS = (RuntimeError("can't start new thread"), MemoryError())


@pytest.fixture(params=ERRORS, ids=["too many", "no memory"])
def no_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise request.param

    monkeypatch.setattr(threading.Thread, "start", start)


def where() -> threading.Thread:
    return threading.current_thread()


def fail() -> None:
    raise KeyError("lost")


async def test_runs_in_a_thread_that_nobody_waits_for() -> None:
    thread = await threads.run(where)
    assert thread is not where()
    assert thread.daemon
    thread.join(10)


async def test_failures_come_back() -> None:
    with pytest.raises(KeyError, match="lost"):
        await threads.run(fail)


async def test_the_loop_goes_on_meanwhile() -> None:
    may_end = threading.Event()
    task = asyncio.create_task(threads.run(lambda: may_end.wait(10)))
    await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    assert await task is True


async def test_who_gives_up_hears_nothing() -> None:
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        may_end.wait(10)
        ended.set()

    task = asyncio.create_task(threads.run(work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    may_end.set()
    assert ended.wait(10)
    await asyncio.sleep(0.01)


def test_a_loop_that_is_closed_meanwhile() -> None:
    may_end = threading.Event()

    async def main() -> None:
        asyncio.ensure_future(threads.run(lambda: may_end.wait(10)))  # noqa: RUF006 - given up
        await asyncio.sleep(0)

    asyncio.run(main())
    left = [t for t in threading.enumerate() if t.name == "nodepass-aside"]
    may_end.set()
    for thread in left:
        thread.join(10)


@pytest.mark.usefixtures("no_threads")
async def test_c12_without_a_thread_it_is_done_here() -> None:
    assert await threads.run(where) is where()
    with pytest.raises(KeyError, match="lost"):
        await threads.run(fail)
    assert not threads.start(fail, "none")


@pytest.mark.usefixtures("no_threads")
def test_c12_nothing_is_left_that_needs_a_thread_to_be_closed() -> None:
    """The executor of asyncio does, and its failure at the end would be a traceback."""
    with asyncio.Runner() as runner:
        assert runner.run(threads.run(where)) is where()
