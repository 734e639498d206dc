"""One engine that runs, and all that it has been given.

Owns: the watch on the engine's bell, and which of our objects a completion belongs to. Made by
`relays`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from nodepass.runtime import fork

from .operations import Engine, Gate, Handshake, Relay, UdpRelay
from .types import Newcomer

ENDS_A_TURN: Final = 256
"""Ends that are handed out in one turn of the loop: some 5 ms, with what follows from them."""
NEWCOMERS_A_TURN: Final = 64
"""The same of UDP sources that wait for a link."""


class RunningEngine:
    """One engine and what runs on it."""

    def __init__(self, engine: Engine) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine = engine
        self._forks = fork.count()
        self.open: dict[int, Relay | Handshake | UdpRelay | Gate] = {}
        self._ends: deque[Relay | Handshake | UdpRelay | Gate] = deque()
        self._newcomers: deque[Newcomer] = deque()
        """News that the engine has told and nobody has heard yet."""
        self._again: asyncio.Handle | None = None
        self._loop.add_reader(engine.fileno(), self.drain)
        fork.own(self)

    def disown(self) -> list[int]:
        """Give up, in a forked child, what only the parent's engine could end."""
        works = [*self.open.values(), *self._ends]
        self.open.clear()
        self._ends.clear()
        self._newcomers.clear()
        for work in works:
            work.result.cancel()
        return []

    def drain(self, *, takes_all: bool = False, is_last: bool = False) -> None:
        """Hand out what the engine has to tell, as much as a turn of the loop bears.

        Args:
            takes_all: hand out all ends, since somebody needs the room that they make.
            is_last: the same, and nobody who is new is met any more.
        """
        if self._forks != fork.count():
            return  # a forked child: the news are the parent's
        for report in self.engine.poll():
            if isinstance(report, Newcomer):
                self._newcomers.append(report)
                continue
            work = self.open.pop(report[0], None)
            if work is not None:
                work.ending = report
                self._ends.append(work)
        left = len(self._ends) if is_last or takes_all else ENDS_A_TURN
        if is_last:
            self._newcomers.clear()
        elif len(self._ends) > left or self._newcomers:
            self._go_on_soon()
        while self._ends and left:
            left -= 1
            self._ends.popleft().finish()
        self._meet()  # behind ends: each of them may have made room

    def _meet(self) -> None:
        for _ in range(min(NEWCOMERS_A_TURN, len(self._newcomers))):
            newcomer = self._newcomers.popleft()
            gate = self.open.get(newcomer.gate)
            if isinstance(gate, Gate):
                gate.meet(newcomer)

    def _go_on_soon(self) -> None:
        if self._again is None:
            self._again = self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._again = None
        self.drain()

    def leave_loop(self) -> None:
        """Listen to the engine no more."""
        self._loop.remove_reader(self.engine.fileno())
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def forget(self) -> None:
        """Let go of what the engine did not end in time."""
        self.drain(is_last=True)
        for work in self.open.values():
            work.result.cancel()
        self.open.clear()
