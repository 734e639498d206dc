"""TCP connects to addresses, many at once, on callbacks: no task and no timer for each.

Owns: the sockets that have no answer yet. What is a name goes through `net.dial` instead.
Called by `linkdial` and `pairing`.
"""

from __future__ import annotations

import errno
import functools
import socket
from collections.abc import Callable

from . import net
from .errors import DialError
from .patience import Patience
from .resolver import Candidate
from .watch import Watch

OnEnd = Callable[[socket.socket | DialError], None]


class _Connect:
    """One socket that waits for its answer."""

    __slots__ = ("candidate", "on_end", "sock")

    def __init__(self, sock: socket.socket, candidate: Candidate, on_end: OnEnd) -> None:
        self.sock = sock
        self.candidate = candidate
        self.on_end = on_end

    def fail(self, code: int | None) -> None:
        """Close the socket and say why."""
        self.sock.close()
        self.on_end(_error(self.candidate, code))


class Dials:
    """Every connect of a client that has no answer yet.

    Args:
        watch: tells of answers.
        timeout: seconds that each may take.
    """

    def __init__(self, watch: Watch, timeout: float) -> None:
        self._watch = watch
        self._waiting = Patience[_Connect](timeout, self._on_late)
        self._open: set[_Connect] = set()

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, candidate: Candidate, on_end: OnEnd) -> None:
        """Connect to an address.

        Args:
            on_end: called once, maybe before this returns, with the connection, tuned and the
                hearer's own, or with what was wrong. Must not raise.
        """
        family, address = candidate
        try:
            sock = net.open_stream(family, address[0])
        except OSError as exc:
            on_end(_error(candidate, exc.errno))
            return
        try:
            if not net.connect_now(sock, address):
                self._wait(_Connect(sock, candidate, on_end))
                return
        except OSError as exc:
            sock.close()
            on_end(_error(candidate, exc.errno))
            return
        except BaseException:
            sock.close()
            raise
        on_end(sock)

    def _wait(self, connect: _Connect) -> None:
        self._watch.writable(connect.sock, functools.partial(self._on_answer, connect))
        self._open.add(connect)
        self._waiting.add(connect)

    def close(self) -> None:
        """Give up what is under way, ECANCELED; idempotent."""
        for connect in list(self._open):
            self._forget(connect)
            connect.fail(errno.ECANCELED)
        self._waiting.close()

    def _on_answer(self, connect: _Connect) -> None:
        try:
            if not net.connect_now(connect.sock, connect.candidate[1]):
                return
        except OSError as exc:
            self._forget(connect)
            connect.fail(exc.errno)
            return
        self._forget(connect)
        connect.on_end(connect.sock)

    def _on_late(self, connect: _Connect) -> None:
        self._forget(connect)
        connect.fail(errno.ETIMEDOUT)

    def _forget(self, connect: _Connect) -> None:
        self._open.discard(connect)
        self._waiting.remove(connect)
        self._watch.remove(connect.sock)


def _error(candidate: Candidate, code: int | None) -> DialError:
    host, port = candidate[1][:2]
    return DialError(net.join_address(host, port), code or errno.EIO, 1)
