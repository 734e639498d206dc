"""Which idle link a visitor gets: the server's choice among all its sessions.

Owns: who waits for a link. Called by `server`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from nodepass.errors import PoolClosed, PoolTimeout
from nodepass.net import tcp
from nodepass.protocol.messages import Dialect, Idle
from nodepass.protocol.session import Session, State

from .demand import Demand
from .idle_links import IdleLinks, Link

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Member:
    """One session as the pool sees it."""

    session: Session
    idle_links: IdleLinks
    demand: Demand
    relays: int = 0
    """Open relays: what "least loaded" means."""
    turn: int = 0
    """When it was last given a visitor, as a number that grows; among equals the first is next."""
    handed: set[int | str] = field(default_factory=set)
    """Links on their way to who has waited for one: not idle any more, and not launched yet."""

    @property
    def can_launch(self) -> bool:
        return self.session.state is State.LIVE


class Pool:
    """Give each visitor an idle link of the least loaded live session, equals by turns.

    Visitors that find none wait their turn, first come first served; links that arrive go to
    them before they lie idle.
    """

    def __init__(self) -> None:
        self._members: list[Member] = []
        self._waiting: deque[asyncio.Future[tuple[Member, Link]]] = deque()
        self._turns = 0
        self._is_closed = False

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    @property
    def waiting(self) -> int:
        """Visitors without a link."""
        return len(self._waiting)

    def add(self, member: Member) -> None:
        """Let a session take part."""
        self._members.append(member)
        if self._waiting:
            self._tell_waiting()

    def remove(self, member: Member) -> None:
        """Drop a session and reset its idle links; idempotent."""
        if member in self._members:
            self._members.remove(member)
        member.idle_links.clear()

    def take_nowait(self) -> tuple[Member, Link] | None:
        """Return a live idle link and its session, now the caller's, or None."""
        if self._waiting:
            return None  # those who wait came first
        while True:
            able = [m for m in self._members if m.can_launch and len(m.idle_links)]
            if not able:
                return None
            member = min(able, key=_load) if len(able) > 1 else able[0]
            link = member.idle_links.take()
            if link is not None:
                self._take_turn(member)
                return member, link

    def _take_turn(self, member: Member) -> None:
        self._turns += 1
        member.turn = self._turns

    async def take(self, timeout: float) -> tuple[Member, Link]:  # noqa: ASYNC109
        """Return a live idle link and its session, waiting for one if need be.

        Raises:
            PoolTimeout: none came within `timeout` seconds.
            PoolClosed: the tunnel is being stopped.
        """
        try:
            async with asyncio.timeout(timeout):
                while True:
                    member, link = await self._next()
                    if member.can_launch:
                        return member, link
                    tcp.reset(link.sock)  # its session ended in the turn that gave it to us
        except TimeoutError as exc:
            found = self.take_nowait()  # one may have come in the turn in which the time ran out
            if found is not None:
                return found
            raise PoolTimeout(f"no idle link within {timeout:g} s") from exc

    async def _next(self) -> tuple[Member, Link]:
        if self._is_closed:
            raise PoolClosed("the tunnel is stopping")
        found = self.take_nowait()
        if found is not None:
            return found
        place: asyncio.Future[tuple[Member, Link]] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._tell_waiting()
        try:
            member, link = await place
            member.handed.discard(link.name)
            return member, link
        except asyncio.CancelledError:
            if has_result(place):  # it came in the turn in which we gave up
                member, link = place.result()
                member.handed.discard(link.name)
                self.give(member, link)
            raise
        finally:
            if place in self._waiting:
                self._waiting.remove(place)

    def give(self, member: Member, link: Link) -> None:
        """Take in a fresh link of a session; it is the pool's from here on."""
        if self._is_closed or not member.can_launch:
            tcp.reset(link.sock)
            return
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                member.handed.add(link.name)
                self._take_turn(member)
                place.set_result((member, link))
                return
        member.idle_links.put(link)

    def close(self) -> None:
        """Reset every idle link and turn away who waits; idempotent."""
        self._is_closed = True
        for member in list(self._members):
            self.remove(member)
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_exception(PoolClosed("the tunnel is stopping"))

    def _tell_waiting(self) -> None:
        able = [m for m in self._members if m.can_launch]
        for member in able:
            share = -(-len(self._waiting) // len(able))
            if member.demand.count_waiting(share):
                announce(member)


def announce(member: Member) -> None:
    """Tell a client how many idle links are wanted of it; seed clients have no such word."""
    if member.session.dialect is Dialect.NATIVE:
        member.session.send(Idle(member.demand.wanted))


def has_result(place: asyncio.Future[T]) -> bool:
    """Tell whether a future holds a value: not pending, cancelled or failed."""
    return place.done() and not place.cancelled() and place.exception() is None


def _load(member: Member) -> tuple[int, int]:
    return member.relays, member.turn
