"""Work that would hold up the event loop, in threads that nobody has to wait for.

A thread for each piece: they are few (a password to stretch, certificates to load, an engine to
stop, names to look up), and the executor of asyncio has two faults here. The end of a process
waits for its threads, and where no more threads are allowed it cannot even be closed.

Ground floor: imports nothing of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar, cast

__all__ = ["run", "start"]

T = TypeVar("T")


def start(work: Callable[[], None], name: str) -> bool:
    """Begin a piece of work in a daemon thread; False = no thread is to be had."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except (RuntimeError, MemoryError):  # Python tells EAGAIN and ENOMEM as these
        return False
    return True


async def run(work: Callable[[], T]) -> T:
    """Do a piece of work in a thread; without one, here: better late than not at all.

    Cancelled, the work goes on unheard.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, fault: BaseException | None) -> None:
        if answer.done():  # given up
            return
        if fault is not None:
            answer.set_exception(fault)
        else:
            answer.set_result(cast(T, result))

    def do() -> None:
        result: T | None = None
        fault: BaseException | None = None
        try:
            result = work()
        except BaseException as exc:  # noqa: BLE001 - whoever waits gets it
            fault = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed; nobody waits any more
            loop.call_soon_threadsafe(tell, result, fault)

    if not start(do, "nodepass-aside"):
        return work()
    return await answer
