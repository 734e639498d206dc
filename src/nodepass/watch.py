"""Hang-ups of idle connections, noticed at once and for next to nothing.

Owns: which idle sockets are watched, never the sockets themselves. Takes no byte from them:
what arrives early stays in the kernel for whoever the connection is joined with. Called by
`pool` and `server`.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable


class HangupWatch:
    """Tell when the peers of many idle connections close or reset them.

    One epoll set stands behind one reader of the loop, so a connection costs two system
    calls in and out instead of a handle. Bytes that arrive early are left where they are;
    without epoll (not Linux) they also end the watch of that connection.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        if self._epoll is not None:
            self._loop.add_reader(self._epoll.fileno(), self._drain, self._epoll)

    def __len__(self) -> int:
        return len(self._callbacks)

    def add(self, sock: socket.socket, on_hangup: Callable[[], None]) -> None:
        """Watch a connection until `remove`; may call back more than once."""
        fd = sock.fileno()
        self._callbacks[fd] = on_hangup
        if self._epoll is not None:
            self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLET)
        else:
            self._loop.add_reader(fd, self._readable, fd)

    def again(self, sock: socket.socket) -> None:
        """Go on watching after bytes that meant nothing and have been read."""
        fd = sock.fileno()
        if self._epoll is None and fd in self._callbacks:
            self._loop.add_reader(fd, self._readable, fd)

    def remove(self, sock: socket.socket) -> None:
        """Forget a connection; must happen before it is closed or handed over."""
        fd = sock.fileno()
        if self._callbacks.pop(fd, None) is None:
            return
        if self._epoll is not None:
            self._epoll.unregister(fd)
        else:
            self._loop.remove_reader(fd)

    def close(self) -> None:
        """Forget all; idempotent."""
        if self._epoll is not None and not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
        elif self._epoll is None:
            for fd in self._callbacks:
                self._loop.remove_reader(fd)
        self._callbacks.clear()

    def _drain(self, epoll: select.epoll) -> None:
        for fd, _ in epoll.poll(0, 256):
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()

    def _readable(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        self._callbacks[fd]()
