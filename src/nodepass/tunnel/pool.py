"""Links: kept idle, watched, taken, claimed; and how many are wanted.

    Link    one pooled data connection, used once
    IdleLinks   the idle links of one session, on either side
    Demand  how many idle links a session should have
    Pool    the server's choice among the idle links of all its sessions, and who waits for one

A link's socket belongs to its IdleLinks while it lies there and to whoever takes it afterwards.
Called by `server`, `client` and `refill`.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final, TypeVar

from nodepass.errors import PoolClosed, PoolTimeout, TlsError
from nodepass.net import tcp
from nodepass.net.readiness import Watch
from nodepass.protocol.messages import Dialect, Idle
from nodepass.protocol.session import Session, State
from nodepass.tls.codec import Records

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

DEMAND_WINDOW: Final = 0.25
"""Seconds of launches that the idle links must cover: replacing one takes 2.5 round trips,
which is this much on a path of 100 ms."""
DEMAND_MARGIN: Final = 2
"""Idle links per launch of the busiest recent window: bursts are uneven."""
GROWTH: Final = 1.25
"""Least factor of a raise, so that a rising rate does not cost a signal per launch."""
DECAY: Final = 0.75
"""What is kept of a surplus each quiet period: a lull of seconds must not undo the stock."""


READ_SIZE: Final = 2048
"""Bytes per read of an idle TLS link: two session tickets are 160."""
LOOKS: Final = 3
"""Reads of one link: its tickets, its end, and one for good measure. What is a visitor's need
not be read here, and what is there to hold us up must not be."""
MAX_ENDING: Final = 64
"""Ended links of one session that wait for a launch: those whose visitor left within a round
trip, a handful; more are a far side that drops what we dial."""

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Link:
    """One pooled data connection, idle."""

    sock: socket.socket
    name: int | str
    """Number in the native dialect, id of 8 hex characters in the seed dialect."""
    head: bytes = b""
    """Bytes that came behind its opening line; owed to whom it is joined with."""
    tls: Connection | None = field(default=None, repr=False)
    """Its TLS, the handshake done; None = it carries plain bytes."""
    since: float = 0.0
    """Seconds of the loop's clock at which it was shelved."""
    ending: asyncio.TimerHandle | None = field(default=None, repr=False)
    """Runs while a link that the far side has ended waits for a launch."""


class IdleLinks:
    """Idle links of one session; the dead are noticed at once.

    Args:
        watch: tells of hang-ups.
        on_lost: called after a link was found dead and removed.
        grace: seconds for which a link whose peer has cleanly ended stays claimable. The
            launch and the visitor's end travel on different connections, so on the client's
            side the end may come first; the server, which launches, needs no grace (0).
    """

    def __init__(self, watch: Watch, on_lost: Callable[[Link], None], grace: float = 0.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._watch = watch
        self._on_lost = on_lost
        self._grace = grace
        self._idle: dict[int | str, Link] = {}
        self._ending: dict[int | str, Link] = {}
        self.lost = 0
        """Links that died idle."""

    def __len__(self) -> int:
        return len(self._idle)

    def __contains__(self, name: int | str) -> bool:
        return name in self._idle or name in self._ending

    @property
    def has_any(self) -> bool:
        """Whether there is a link that can be claimed."""
        return bool(self._idle or self._ending)

    def put(self, link: Link) -> None:
        """Keep a link; its name must not be here already."""
        self._idle[link.name] = link
        link.since = self._loop.time()
        try:
            self._watch.hangup(link.sock, functools.partial(self._check, link))
        except OSError:  # there is no room in the kernel; it would die unnoticed
            del self._idle[link.name]
            self._bury(link)

    def take(self) -> Link | None:
        """Hand over the newest live link: the one least likely to have died unnoticed."""
        while self._idle:
            _, link = self._idle.popitem()
            self._watch.remove(link.sock)
            if not _has_ended(link):
                return link
            self._bury(link)
        return None

    def claim(self, name: int | str) -> Link | None:
        """Hand over the link of this name; a second claim finds nothing."""
        link = self._idle.pop(name, None)
        if link is None:
            link = self._ending.pop(name, None)
            if link is not None and link.ending is not None:
                link.ending.cancel()
            return link
        self._watch.remove(link.sock)
        return link

    def retire(self, count: int) -> None:
        """Reset the oldest links, which the far side then replaces or not as it is told."""
        for link in list(self._idle.values())[: max(0, count)]:
            del self._idle[link.name]
            self._watch.remove(link.sock)
            tcp.reset(link.sock)

    def clear(self) -> None:
        """Reset all: a visitor whose launch never arrived must not wait on one of them."""
        self.retire(len(self._idle))
        for link in list(self._ending.values()):
            if link.ending is not None:
                link.ending.cancel()
            tcp.reset(link.sock)
        self._ending.clear()

    def _check(self, link: Link) -> None:
        if link.name not in self._idle:
            return
        state = _state_of(link) if link.tls is None else _tls_state_of(link, Records(link.tls))
        if state is LinkState.USABLE:
            if link.tls is not None and not link.head:
                self._watch.again(link.sock)
            return
        del self._idle[link.name]
        self._watch.remove(link.sock)
        if state is LinkState.ENDED and self._grace:
            if len(self._ending) >= MAX_ENDING:
                self._forget(next(iter(self._ending.values())))
            self._ending[link.name] = link
            link.ending = self._loop.call_later(self._grace, self._forget, link)
            self._on_lost(link)
            return
        self._bury(link)

    def _forget(self, link: Link) -> None:
        if self._ending.pop(link.name, None) is not None:
            if link.ending is not None:
                link.ending.cancel()
            tcp.reset(link.sock)

    def _bury(self, link: Link) -> None:
        tcp.reset(link.sock)  # it may live: then a visitor may be on it already
        self.lost += 1
        self._on_lost(link)


class LinkState(Enum):
    """What a look at an idle link that was hung up on tells."""

    USABLE = "usable"
    """Nothing is wrong, or early bytes came before the end: the launch is on its way."""
    ENDED = "ended"
    """The far side has cleanly ended and sent nothing."""
    DEAD = "dead"


def _has_ended(link: Link) -> bool:
    if link.tls is None:
        return tcp.has_ended(link.sock)
    return _tls_state_of(link, Records(link.tls)) is not LinkState.USABLE


def _state_of(link: Link) -> LinkState:
    try:
        return LinkState.USABLE if link.sock.recv(1, socket.MSG_PEEK) else LinkState.ENDED
    except BlockingIOError:
        return LinkState.USABLE
    except OSError:
        return LinkState.DEAD


def _tls_state_of(link: Link, records: Records) -> LinkState:
    """As `_state_of`; reads, because bytes may be session tickets and not a visitor's."""
    try:
        link.head += records.open(b"")  # an end that came along with its claim
        for _ in range(LOOKS):
            if link.head or records.has_ended:
                break
            data = link.sock.recv(READ_SIZE)
            if not data:
                return LinkState.DEAD  # a FIN alone: its process has died
            link.head += records.open(data)
        else:
            return LinkState.USABLE  # the beginning of a large record: the engine's to read
    except BlockingIOError:
        return LinkState.USABLE
    except (OSError, TlsError):
        return LinkState.DEAD
    return LinkState.USABLE if link.head else LinkState.ENDED


class Demand:
    """Follow how many links are taken and say how many should lie ready.

    Args:
        least: never fewer.
        most: never more.
        now: seconds.
    """

    def __init__(self, least: int, most: int, now: float) -> None:
        self._least = least
        self._most = most
        self._window_at = now
        self._count = 0
        self._need = least
        self.wanted = least
        """Idle links that should lie ready now."""

    def take(self, now: float) -> bool:
        """Count one launch; return whether more links are wanted than before."""
        if now - self._window_at >= DEMAND_WINDOW:
            self._window_at = now
            self._count = 0
        self._count += 1
        return self._raise_to(self._least + DEMAND_MARGIN * self._count)

    def wait(self, waiting: int) -> bool:
        """Take note of visitors that found no link; return whether more links are wanted."""
        return self._raise_to(self._least + waiting)

    def rest(self) -> int:
        """Close a report period; return by how many links the wish has shrunk."""
        goal = min(self._most, self._need)
        self._need = self._least
        if goal >= self.wanted:
            return 0
        before = self.wanted
        self.wanted = max(goal, int(before * DECAY))
        return before - self.wanted

    def _raise_to(self, need: int) -> bool:
        self._need = max(self._need, need)
        if need <= self.wanted or self.wanted >= self._most:
            return False
        self.wanted = min(self._most, max(need, int(self.wanted * GROWTH)))
        self._need = self.wanted
        return True


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
            if member.demand.wait(share):
                announce(member)


def announce(member: Member) -> None:
    """Tell a client how many idle links are wanted of it; a seed client has no ear for it."""
    if member.session.dialect is Dialect.NATIVE:
        member.session.send(Idle(member.demand.wanted))


def has_result(place: asyncio.Future[T]) -> bool:
    """Tell whether a future holds a value: not pending, cancelled or failed."""
    return place.done() and not place.cancelled() and place.exception() is None


def _load(member: Member) -> tuple[int, int]:
    return member.relays, member.turn
