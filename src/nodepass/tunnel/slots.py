"""Slots: how many visitors are served at once, and who gets the place of one who leaves.

    Slots      SEMAPHORE_LIMIT on the server, shared by TCP and UDP
    Slot       one visitor's part of it
    SlotQueue  the same limit on the client, where launches wait their turn

Called by `server` and `client`; knows neither sockets nor datagrams.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

TCP_SHARE: Final = 8
"""One slot in so many is never given to UDP where both are carried: sources cost nothing to make
up, and must not shut everybody else out."""


class Slots:
    """Places for visitors.

    Args:
        limit: how many there are, > 0.
        keeps_for_tcp: whether TCP visitors come, too.
        on_full: called when the last one for anybody, or for UDP, is taken.
        resume_tcp: called when a TCP visitor may come again; returns whether any were held up.
        admit_udp: called when a UDP visitor may come again; returns whether any waited.
    """

    def __init__(
        self,
        limit: int,
        *,
        keeps_for_tcp: bool,
        on_full: Callable[[], None],
        resume_tcp: Callable[[], bool],
        admit_udp: Callable[[], bool],
    ) -> None:
        self.limit = limit
        self._udp_limit = limit - limit // TCP_SHARE if keeps_for_tcp else limit
        self._on_full = on_full
        self._resume_tcp = resume_tcp
        self._admit_udp = admit_udp
        self._is_udp_turn = False
        self._was_full = False
        """Whether anybody may have been kept waiting, and may wait still."""
        self.taken = 0
        """Visitors with a slot."""
        self.udp = 0
        """How many of them are UDP sessions."""

    def __repr__(self) -> str:
        return f"<Slots {self.taken} of {self.limit}, udp={self.udp}>"

    @property
    def has_room(self) -> bool:
        """Whether one more TCP visitor may be served."""
        return self.taken < self.limit

    @property
    def has_udp_room(self) -> bool:
        """Whether one more UDP visitor may be served."""
        return self.has_room and self.udp < self._udp_limit

    def take(self, *, is_udp: bool = False) -> None:
        """Count a visitor until `give`."""
        self.taken += 1
        self.udp += is_udp
        if not self.has_udp_room:
            self._was_full = True
            self._on_full()

    def give(self, *, is_udp: bool = False) -> None:
        """Take a slot back; those who wait get it, TCP and UDP by turns."""
        self.taken -= 1
        self.udp -= is_udp
        if not self._was_full or not self.has_room:
            return
        self._is_udp_turn = not self._is_udp_turn
        if self._is_udp_turn and self.has_udp_room and self._admit_udp():
            return
        if not self._resume_tcp() and self.has_udp_room and not self._admit_udp():
            self._was_full = False


class Slot:
    """One visitor's slot: taken as it is made, given back once.

    Args:
        slots: where it is taken.
        is_udp: whether the visitor is a UDP session.
    """

    __slots__ = ("_is_held", "_is_udp", "_slots")

    def __init__(self, slots: Slots, *, is_udp: bool = False) -> None:
        self._slots = slots
        self._is_udp = is_udp
        self._is_held = True
        slots.take(is_udp=is_udp)

    def release(self) -> None:
        """Give the slot back; idempotent."""
        if self._is_held:
            self._is_held = False
            self._slots.give(is_udp=self._is_udp)


class SlotQueue:
    """Places for launches: taken at once, or waited for, first come first served."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def is_full(self) -> bool:
        """Whether the next one has to wait."""
        return not self._free

    def take_nowait(self) -> bool:
        """Take a place if one is free."""
        if not self._free:
            return False
        self._free -= 1
        return True

    async def take(self) -> None:
        """Take a place, waiting for one if need be."""
        if self.take_nowait():
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._waiting.remove(place)
            else:
                self.give()  # it came in the turn in which we gave up
            raise

    def give(self) -> None:
        """Give a place back; whoever waits longest gets it."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._free += 1
