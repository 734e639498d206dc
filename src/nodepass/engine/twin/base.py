"""What the halves of the slow twin's Engine share: descriptors, tokens, the bell, the watch.

Part of `engine`, which describes the whole and has the half for TCP; `udp` has the one for
UDP. Nobody else comes here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import operator
import os
import socket
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from nodepass.engine.types import FlowOptions
from nodepass.errors import EngineClosed, EngineError
from nodepass.runtime import fork

from .legs import Leg, TlsLeg, is_usable

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

    from nodepass.net.resolver import SocketAddress

BUFFER_BYTES: Final = 524288  # one recv; the native size, and the bound per direction
WATCH_SECONDS: Final = 0.1  # step of the idle limit, as the native engine's wheel
MAX_FLOWS: Final = 1 << 24  # the native engine's limits, checked alike
MAX_IDLE: Final = 4e6  # seconds
MAX_DATAGRAM: Final = 65535  # bytes

STREAM: Final = socket.SOCK_STREAM
DATAGRAM: Final = socket.SOCK_DGRAM


class Watched(Protocol):
    """Something that changes by the mere passing of time."""

    def watch_step(self) -> None:
        """Look for what no event tells."""


News = TypeVar("News")

_lent: weakref.WeakSet[Connection] = weakref.WeakSet()
"""Connections that an engine holds, from their admission until their end is polled."""


class EngineBase(Generic[News]):
    """Descriptors come in here, and news go out.

    Args:
        flows: how many tokens may be out at once.
        patience: seconds of silence after which a far end that does not answer is gone.
    """

    _is_closed = True  # until everything is open; __del__ also runs after a refused argument

    def __init__(self, flows: int, patience: float) -> None:
        patience = take_patience(patience)
        flows = take_whole("flows", flows, MAX_FLOWS)
        if hasattr(self, "loop"):
            raise EngineError("init", errno.EALREADY)
        self.loop = asyncio.get_running_loop()
        self.buffer = memoryview(bytearray(BUFFER_BYTES))
        self.turns = 0
        self.patience = patience
        self._capacity = flows
        self._next = 1
        self._refused = 0
        self._news: list[News] = []
        self._watch: asyncio.TimerHandle | None = None
        self._pid = os.getpid()
        try:
            self._bell, self._ear = socket.socketpair()
        except OSError as exc:
            raise EngineError("start", exc.errno or errno.EIO) from exc
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._held: weakref.WeakValueDictionary[int, socket.socket] = weakref.WeakValueDictionary()
        """Sockets by the number that they had at admission; closed ones have none any more."""
        self._lent: dict[int, list[Connection]] = {}
        """By token, until its end is polled."""
        for sock in (self._bell, self._ear):
            self._held[sock.fileno()] = sock
        self._is_closed = False
        fork.own(self)

    def disown(self) -> list[int]:
        """Return what a forked child must not touch; it is in one."""
        return [sock.fileno() for sock in self._held.values()]

    def _check(self, operation: str) -> None:
        self._check_process(operation)
        if self._is_closed:
            raise EngineClosed(operation, errno.ESHUTDOWN)

    def _check_process(self, operation: str) -> None:
        if self._pid != os.getpid():
            raise EngineClosed(operation, errno.ECHILD)

    def fileno(self) -> int:
        """Return the descriptor that is readable while completions wait."""
        self._check("fileno")
        return self._ear.fileno()

    # --- what comes in ---

    # As in the native engine each argument is converted once, and before anything is looked at: to
    # convert one may run code of the caller's, which may call this very engine. `_admit` comes
    # behind that, and is left with the sockets either taken or untouched.

    @contextlib.contextmanager
    def _admit(
        self, operation: str, *wanted: tuple[int, int], tls: Iterable[Connection | None] = ()
    ) -> Iterator[list[socket.socket]]:
        """Lend the sockets of descriptors, whose they stay if anything fails inside.

        Args:
            wanted: descriptors, and which type each must have.
            tls: Connections that must be fit and free.
        """
        sockets: list[socket.socket] = []
        used = [one for one in tls if one is not None]
        is_begun = False
        try:
            if not all(map(is_usable, used)):
                raise EngineError(operation, errno.EOPNOTSUPP)
            self._check(operation)
            self._adopt(wanted, sockets)
            if len({id(one) for one in used}) < len(used):
                raise OSError(errno.EINVAL, "")
            if any(one in _lent for one in used):
                raise OSError(errno.EBUSY, "")
            is_begun = True
            yield sockets
        except BaseException as exc:
            if is_begun:
                self._leave_loop(sockets)  # else what the loop watches there is somebody else's
            for sock in sockets:
                sock.detach()
            if isinstance(exc, NotImplementedError):
                raise EngineError(operation, errno.EOPNOTSUPP) from exc
            if isinstance(exc, OSError) and not isinstance(exc, EngineError):
                raise EngineError(operation, exc.errno or errno.EIO) from exc
            raise
        for sock in sockets:
            self._held[sock.fileno()] = sock

    def _adopt(self, wanted: Iterable[tuple[int, int]], sockets: list[socket.socket]) -> None:
        for fd, kind in wanted:
            if fd < 0:
                raise OSError(errno.EBADF, "")
            sockets.append(socket.socket(fileno=fd))
            if sockets[-1].type != kind:
                raise OSError(errno.EPROTOTYPE, "")
            if os.get_blocking(fd) or any(sock.fileno() == fd for sock in sockets[:-1]):
                raise OSError(errno.EINVAL, "")
            if fd in self._held and self._held[fd].fileno() == fd:
                raise OSError(errno.EBUSY, "")
            sockets[-1].setblocking(False)

    def _lend(self, token: int, *tls: Connection | None) -> None:
        used = [one for one in tls if one is not None]
        if used:
            self._lent[token] = used
            _lent.update(used)

    def _leave_loop(self, sockets: Iterable[socket.socket]) -> None:
        for sock in sockets:
            if sock.fileno() >= 0:
                self.loop.remove_reader(sock)
                self.loop.remove_writer(sock)

    def _places_taken(self) -> int:
        """Return how many tokens are out: of what is open, and of what nobody has polled yet."""
        raise NotImplementedError

    def _take_token(self) -> int:
        """Return a new token; 0: every place is taken."""
        if self._places_taken() >= self._capacity:
            return 0
        self._next += 1
        return self._next - 1

    def _require_token(self, operation: str) -> int:
        token = self._take_token()
        if not token:
            self._refused += 1
            raise EngineError(operation, errno.ENOBUFS)
        return token

    # --- what goes out ---

    def _tell(self, news: News) -> None:
        self._news.append(news)
        if len(self._news) == 1:
            self._bell.send(b"!")

    def _take_news(self) -> list[News]:
        news, self._news = self._news, []
        for token in [token for token in self._lent if self._is_over(token)]:
            _lent.difference_update(self._lent.pop(token))
        if news and not self._is_closed:
            self._ear.recv(1)
        return news

    def _is_over(self, token: int) -> bool:
        """Tell whether a token is of nothing that is open."""
        raise NotImplementedError

    # --- what the clock does ---

    def _watched(self) -> list[Watched]:
        """Return what needs a look now and then."""
        raise NotImplementedError

    def _keep_watch(self) -> None:
        """Look at what needs it ten times a second, for as long as there is something."""
        if self._watch is None and not self.loop.is_closed():
            self._watch = self.loop.call_later(WATCH_SECONDS, self._watch_all)

    def _watch_all(self) -> None:
        for watched in self._watched():
            watched.watch_step()
        self._watch = None
        if self._watched():
            self._keep_watch()

    def _shut_base(self) -> None:
        """Give back what the desk itself holds; the news stay."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._is_closed = True
        self._bell.close()
        self._ear.close()


def take_whole(name: str, value: int, most: int) -> int:
    """Return a limit as a plain integer; ValueError if it is out of range."""
    number = operator.index(value)
    if not 1 <= number <= most:
        raise ValueError(f"{name}: {number} is not within 1..{most}")
    return number


def take_float(value: float) -> float:
    """Return a number as a plain one, and no text as one."""
    return math.ldexp(value, 0)


def take_seconds(value: float, name: str = "idle") -> float:
    """Return an idle limit, or another time; ValueError if it is out of range."""
    seconds = take_float(value)
    if not 0.0 <= seconds <= MAX_IDLE:
        raise ValueError(f"{name}: {seconds} is not within 0..4000000 seconds")
    return seconds


def take_options(options: FlowOptions) -> FlowOptions:
    """Return options as plain values; TypeError, ValueError if one is none or out of range."""
    if type(options) is not FlowOptions:
        raise TypeError(f"options are FlowOptions, not {type(options).__name__}")
    return FlowOptions(
        idle=take_seconds(options.idle),
        timeout=take_seconds(options.timeout, "timeout"),
        datagram=take_whole("datagram", options.datagram, MAX_DATAGRAM),
        raw=bool(options.raw),
        gso=bool(options.gso),
    )


def take_patience(value: float) -> float:
    """Return an engine's patience; ValueError if it is out of range."""
    seconds = take_float(value)
    if not 1.0 <= seconds <= MAX_IDLE:
        raise ValueError(f"patience: {seconds} is not within 1..4000000 seconds")
    return seconds


def check_head(head: bytes) -> None:
    """Raise TypeError if something is not the start of a stream."""
    if type(head) is not bytes:
        raise TypeError(f"heads are bytes, not {type(head).__name__}")


def take_address(address: SocketAddress) -> tuple[int, SocketAddress]:
    """Return the family of an address, and how its sockets want it.

    Raises:
        ValueError: the host is a name, or another part is out of range.
    """
    host, port, label, scope = (*address, 0, 0) if len(address) == 2 else address
    if not isinstance(host, str):
        raise TypeError(f"address: a host is text, not {type(host).__name__}")
    port, label, scope = [operator.index(number) for number in (port, label, scope)]
    if not 0 <= port <= 65535:
        raise ValueError(f"address: port {port} is not within 0..65535")
    if not 0 <= label < 1 << 20:
        raise ValueError(f"address: flow label {label} is not within 0..1048575")
    if not 0 <= scope < 1 << 32:
        raise ValueError(f"address: scope {scope} is not within 0..4294967295")
    with contextlib.suppress(OSError, ValueError):
        socket.inet_pton(socket.AF_INET, host)
        return socket.AF_INET, (host, port)
    with contextlib.suppress(OSError, ValueError):
        socket.inet_pton(socket.AF_INET6, host)
        return socket.AF_INET6, (host, port, label, scope)
    raise ValueError(f"address: {host!r} is no address")


def make_leg(sock: socket.socket, tls: Connection | None) -> Leg:
    """Return one side of a flow, or a link."""
    return Leg(sock) if tls is None else TlsLeg(sock, tls)
