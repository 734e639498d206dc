"""Idle links of one session: kept, watched, taken, claimed.

A link's socket belongs to its `IdleLinks` while it lies there and to whoever takes it afterwards.
Used by both ends: the server takes any, the client claims the one that a launch names.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from nodepass.errors import TlsError
from nodepass.net import tcp
from nodepass.net.readiness import Watch
from nodepass.tls.codec import Records

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

READ_SIZE: Final = 2048
"""Bytes per read of an idle TLS link: two session tickets are 160."""
LOOKS: Final = 3
"""Reads of one link: its tickets, its end, and one for good measure. What is a visitor's need
not be read here, and what is there to hold us up must not be."""
MAX_ENDING: Final = 64
"""Ended links of one session that wait for a launch: those whose visitor left within a round
trip, a handful; more are a far side that drops what we dial."""


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
    """Seconds of the loop's clock at which it became idle."""
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
