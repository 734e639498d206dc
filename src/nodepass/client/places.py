"""How many visitors the client serves at once, and who waits.

Owns: the count of visitors from their launch on, and the slots of SEMAPHORE_LIMIT. Called by
`visitors`.
"""

from __future__ import annotations

import asyncio
from typing import Final

from nodepass.errors import PoolTimeout
from nodepass.tunnel.context import Context
from nodepass.tunnel.slots import SlotQueue

LEAST_QUEUE: Final = 64
"""Launches that may wait for a slot, however few slots there are; else as many as slots."""


class Places:
    """Every visitor of one client.

    Args:
        limit: slots, > 0.
    """

    def __init__(self, context: Context, limit: int) -> None:
        self._log = context.log
        self._open_relays = context.open_relays
        self._timeout = context.settings.dial_timeout
        self._limit = limit
        self._slots = SlotQueue(limit)
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.count = 0
        """Visitors that are served, or wait for it."""

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return not self._slots.is_full

    @property
    def waiting(self) -> int:
        """Visitors without a relay."""
        return self.count - len(self._open_relays)

    async def wait_idle(self) -> None:
        """Wait until there is no visitor."""
        while self.count:
            await self._is_idle.wait()

    # ---------------------------------------------------------------- used by a Place

    def enter(self) -> None:
        """Count a visitor."""
        if not self.count:
            self._is_idle.clear()
        self.count += 1

    def leave(self) -> None:
        """Stop counting a visitor."""
        self.count -= 1
        if not self.count:
            self._is_idle.set()

    def take_slot(self) -> bool:
        """Take a slot if one is free."""
        return self._slots.take_nowait()

    async def wait_slot(self) -> None:
        """Take a slot, waiting for it at most DIAL_TIMEOUT.

        Raises:
            PoolTimeout: none came free in time, or as many as are served wait already.
        """
        if self._slots.is_full:
            self._log.repeated(
                "warn",
                "limit",
                "as many visitors as SEMAPHORE_LIMIT allows; more wait",
                limit=self._limit,
            )
            if self.waiting > max(self._limit, LEAST_QUEUE):
                raise PoolTimeout("as many visitors wait as SEMAPHORE_LIMIT allows to be served")
        try:
            async with asyncio.timeout(self._timeout):
                await self._slots.take()
        except TimeoutError as exc:
            raise PoolTimeout("no slot of SEMAPHORE_LIMIT came free in time") from exc

    def give_slot(self) -> None:
        """Give a slot back."""
        self._slots.give()


class Place:
    """One visitor's place: counted as it is made, later with a slot, given back once."""

    __slots__ = ("_has_slot", "_is_held", "_places")

    def __init__(self, places: Places) -> None:
        self._places = places
        self._has_slot = False
        self._is_held = True
        places.enter()

    def take_slot(self) -> bool:
        """Take a slot if one is free."""
        self._has_slot = self._places.take_slot()
        return self._has_slot

    async def wait_slot(self) -> None:
        """Wait until fewer visitors than SEMAPHORE_LIMIT are served; see `Places.wait_slot`."""
        await self._places.wait_slot()
        self._has_slot = True

    def release(self) -> None:
        """Give back what was taken; idempotent."""
        if not self._is_held:
            return
        self._is_held = False
        if self._has_slot:
            self._places.give_slot()
        self._places.leave()
