"""Connections that are not joined yet: when they can be read, when they hang up.

Owns: which sockets are watched and for what, never the sockets themselves. Takes no byte from
them: what arrives early stays in the kernel for whoever the connection is joined with. Called by
`acceptor`, `link_dialer`, `pool` and `server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable
from typing import Final

from nodepass.runtime import fork

OnReady = Callable[[], None]

HANGUP: Final = 0x2000 | 1 << 31
"""EPOLLRDHUP | EPOLLET. Edges only: a link that has been hung up on may stay for a while."""
READABLE: Final = 0x1 | HANGUP
"""EPOLLIN besides."""
BATCH: Final = 64
"""Events taken at once; what is left makes the loop call again. With a proof to check behind each
of them they take some 6 ms."""


class Watch:
    """Tell what becomes of many connections.

    One epoll set stands behind one reader of the loop, so to watch a connection costs one
    system call, and neither a handle nor a task. Each connection is watched for one thing at a
    time; to watch it for another replaces that. Callbacks may come without need, and more than
    once. Where the kernel has no room for one more, to watch raises OSError. Without epoll (not
    Linux) the loop itself watches, and early bytes end a watch for hang-ups.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._callbacks: dict[int, OnReady] = {}
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        if self._epoll is not None:
            self._loop.add_reader(self._epoll.fileno(), self._drain, self._epoll)
        fork.own(self)

    def disown(self) -> list[int]:
        """Return what a forked child must not touch, and forget it; it is in one."""
        own = [] if self._epoll is None or self._epoll.closed else [self._epoll.fileno()]
        own += self._callbacks
        self._callbacks.clear()
        return own

    def __len__(self) -> int:
        return len(self._callbacks)

    def readable(self, sock: socket.socket, on_ready: OnReady) -> None:
        """Tell when something has arrived; whoever hears it reads until there is no more."""
        self._watch(sock.fileno(), READABLE, on_ready)

    def hangup(self, sock: socket.socket, on_ready: OnReady) -> None:
        """Tell when the peer has closed or reset the connection."""
        self._watch(sock.fileno(), HANGUP, on_ready)

    def again(self, sock: socket.socket) -> None:
        """Go on watching for hang-ups after bytes that meant nothing and have been read."""
        fd = sock.fileno()
        if self._epoll is None and fd in self._callbacks:
            self._loop.add_reader(fd, self._hung_up, fd)

    def remove(self, sock: socket.socket) -> None:
        """Forget a connection; must happen before it is closed or handed over. Idempotent."""
        fd = sock.fileno()
        if self._callbacks.pop(fd, None) is None:
            return
        if self._epoll is not None:
            self._epoll.unregister(fd)
        else:
            self._leave_loop(fd)

    def release(self, fd: int, on_ready: OnReady) -> None:
        """Forget a connection, unless somebody has it watched for himself by now.

        What is passed on to another owner may be watched all the while; this is for the old
        owner to say when the new one has been heard. It may have been closed meanwhile.

        Args:
            fd: its number when it was passed on.
            on_ready: what the old owner had it watched with.
        """
        if self._callbacks.get(fd) is not on_ready:
            return
        del self._callbacks[fd]
        if self._epoll is None:
            self._leave_loop(fd)
            return
        with contextlib.suppress(OSError):  # the kernel forgets what is closed
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Forget all; idempotent."""
        if self._epoll is not None and not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
        elif self._epoll is None:
            for fd in self._callbacks:
                self._leave_loop(fd)
        self._callbacks.clear()

    def _watch(self, fd: int, events: int, on_ready: OnReady) -> None:
        if self._epoll is None:
            self._enter_loop(fd, events, on_ready)
        elif fd in self._callbacks:
            try:
                self._epoll.modify(fd, events)  # tells at once of what has come before
            except FileNotFoundError:
                # Closed, and its number given again, before its owner has released it.
                del self._callbacks[fd]
                self._epoll.register(fd, events)
        else:
            self._epoll.register(fd, events)
        self._callbacks[fd] = on_ready

    def _drain(self, epoll: select.epoll) -> None:
        for fd, _ in epoll.poll(0, BATCH):
            on_ready = self._callbacks.get(fd)
            if on_ready is not None:
                try:
                    on_ready()
                except Exception as exc:  # noqa: BLE001 - the others are not told twice
                    told = {"message": f"an internal error behind {on_ready}", "exception": exc}
                    self._loop.call_exception_handler(told)

    # ------------------------------------------------------------------ without epoll

    def _enter_loop(self, fd: int, events: int, on_ready: OnReady) -> None:
        self._leave_loop(fd)
        if events == READABLE:
            self._loop.add_reader(fd, on_ready)
        else:
            self._loop.add_reader(fd, self._hung_up, fd)

    def _leave_loop(self, fd: int) -> None:
        self._loop.remove_reader(fd)

    def _hung_up(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        self._callbacks[fd]()
