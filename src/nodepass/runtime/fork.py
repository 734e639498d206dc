"""A program that embeds us may fork: the child leaves alone what is the parent's.

    descriptors of ours ──▶ one dead socket in the place of each: what the child's copy of a task
                            writes, shuts or resets on its way out reaches nobody
    epoll sets ──────────▶ private copies that report nothing: an epoll_ctl in the child would
                            edit the parent's
    what wakes the loop ─▶ new ones, so that the child's loop can still come to its end

A child shares with its parent every open file: sockets, but also the epoll set behind the
event loop. Without this a child that leaves by an exception (its loop cancels what runs, its
`async with` blocks close what they hold) would take the parent's watches away and talk in
its sessions. Nothing here looks at sockets of the program's own; a loop in which a tunnel
runs watches nothing any more in the child, which can have a loop of its own.

Ground floor: imports nothing of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

__all__ = ["Owner", "count", "own", "shield"]

_FILES: Final = Path("/proc/self/fd")
_NOTES: Final = Path("/proc/self/fdinfo")
_EVENTS: Final = "anon_inode:[eventfd]"
_EPOLL: Final = "anon_inode:[eventpoll]"


class Owner(Protocol):
    """Has what no child may touch."""

    def disown(self) -> Iterable[int]:
        """Forget what is the parent's, and return its descriptors; called in a child."""


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
_forks: Final = [0]
"""In a list, so that a hook can count."""


def count() -> int:
    """Return how many forks lie between this process and the import; equal = the same process."""
    return _forks[0]


def own(owner: Owner) -> None:
    """Keep the descriptors of an owner from children, for as long as it lives."""
    _owners.add(owner)


def shield(loop: asyncio.AbstractEventLoop) -> None:
    """Keep what a loop watches from children."""
    _loops.add(loop)


def _leave_alone() -> None:
    """Run in every forked child, before anything of the program's does."""
    _forks[0] += 1
    if not _loops:
        return
    with contextlib.suppress(OSError, ValueError):
        # It would pass the child's signals on to the parent's loop.
        signal.set_wakeup_fd(-1)
    with contextlib.suppress(OSError, RuntimeError):
        _put_to_rest(list(_owners))
    for loop in list(_loops):  # for good: a child's child would share its loop with the child
        with contextlib.suppress(OSError, ValueError):
            _detach_loop(loop)


def _put_to_rest(owners: Iterable[Owner]) -> None:
    """Put an end of a pair that nobody uses in the place of every socket."""
    dead, other = socket.socketpair()
    dead.setblocking(False)
    other.detach()  # stays open until the child ends, or the dead one would report an end
    with dead:
        for fd in [fd for owner in owners for fd in owner.disown() if fd >= 0]:
            if _kind(fd) == _EPOLL:
                with select.epoll() as empty:
                    _replace(fd, empty.fileno())
            else:
                _replace(fd, dead.fileno())


def _kind(fd: int) -> str:
    with contextlib.suppress(OSError):
        return str((_FILES / str(fd)).readlink())
    return ""


def _replace(fd: int, by: int) -> None:
    """Let a number mean something else; the parent's stays what it is."""
    os.dup2(by, fd, inheritable=os.get_inheritable(fd))


def _detach_loop(loop: asyncio.AbstractEventLoop) -> None:
    epoll = _epoll_of(loop)
    if epoll is None:
        return
    waker = _renew_waker(loop)
    with select.epoll() as fresh:
        for fd, events in _watched(epoll):
            with contextlib.suppress(OSError, ValueError):
                if _kind(fd) == _EVENTS:
                    _renew_event(fd)
                elif fd != waker:
                    events = select.EPOLLONESHOT  # noqa: PLW2901 - known, and silent
                fresh.register(fd, events)
        _replace(epoll, fresh.fileno())


def _epoll_of(loop: asyncio.AbstractEventLoop) -> int | None:
    """Return the descriptor of a loop's epoll set, None where it has none that we know."""
    if not _NOTES.exists() or not hasattr(select, "epoll"):
        return None
    selector = getattr(loop, "_selector", None)  # asyncio
    backend = getattr(loop, "_get_backend_id", None)  # uvloop
    fd = selector.fileno() if selector is not None else backend() if backend else -1
    return int(fd) if _kind(fd) == _EPOLL else None


def _watched(epoll: int) -> Iterator[tuple[int, int]]:
    """Yield descriptors and events of an epoll set, as proc(5) shows them."""
    for line in (_NOTES / str(epoll)).read_text().splitlines():
        words = line.split()
        if words[:1] == ["tfd:"]:
            yield int(words[1]), int(words[3], 16)


def _renew_waker(loop: asyncio.AbstractEventLoop) -> int:
    """Give asyncio's loop another pair to wake it by; return the end that it watches, or -1."""
    ear, bell = getattr(loop, "_ssock", None), getattr(loop, "_csock", None)
    if not isinstance(ear, socket.socket) or not isinstance(bell, socket.socket):
        return -1
    for sock, end in zip((ear, bell), socket.socketpair(), strict=True):
        with end:
            end.setblocking(False)
            if sock.fileno() >= 0:
                _replace(sock.fileno(), end.fileno())
    return ear.fileno()


def _renew_event(fd: int) -> None:
    fresh = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        _replace(fd, fresh)
    finally:
        os.close(fresh)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_alone)
