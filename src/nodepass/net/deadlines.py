"""Deadlines of many things that are all given the same time, for one timer.

Owns: the timer. Called by `acceptor` and `link_dialer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Deadlines(Generic[T]):
    """Call back for each thing that is still there when its time is over.

    Args:
        seconds: what each thing is given.
        on_late: called with a thing that has been forgotten by then.
    """

    def __init__(self, seconds: float, on_late: Callable[[T], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._on_late = on_late
        self._ends: dict[T, float] = {}
        """Seconds of the loop's clock, in the order in which they come."""
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, thing: T) -> None:
        """Give a thing its time from now on; it must not be here already."""
        self._ends[thing] = self._loop.time() + self._seconds
        self._arm()

    def remove(self, thing: T) -> None:
        """Forget a thing; idempotent. The timer stays: the next thing is likely to need it."""
        self._ends.pop(thing, None)

    def close(self) -> None:
        """Forget all; idempotent."""
        self._ends.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        now = self._loop.time()
        late = []
        for thing, end in self._ends.items():
            if end > now:
                break
            late.append(thing)
        for thing in late:
            # Those before it may have had it removed.
            if self._ends.pop(thing, None) is not None:
                try:
                    self._on_late(thing)
                except Exception as exc:  # noqa: BLE001 - the others' time is over, too
                    told = {"message": f"an internal error behind {self._on_late}"}
                    self._loop.call_exception_handler({**told, "exception": exc})
        if self._timer is not None:  # or somebody has closed us
            self._timer = None
            self._arm()

    def _arm(self) -> None:
        if self._timer is None and self._ends:
            self._timer = self._loop.call_at(next(iter(self._ends.values())), self._look)
