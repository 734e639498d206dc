"""What the halves of the slow twin's Engine share: descriptors, tokens, the bell, the watch.

Part of `_pycopy`, which describes the whole and has the half for TCP; `_pyserve` has the one for
UDP. Nobody else comes here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from ._pytls import Leg, TlsLeg, is_usable
from .errors import EngineClosed, EngineError

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

    from .resolver import SocketAddress

BUFFER_BYTES: Final = 524288  # one recv; the native size, and the bound per direction
WATCH_SECONDS: Final = 0.1  # step of the idle limit, as the native engine's wheel
MAX_FLOWS: Final = 1 << 24  # the native engine's limits, checked alike
MAX_IDLE: Final = 4e6  # seconds

STREAM: Final = socket.SOCK_STREAM
DATAGRAM: Final = socket.SOCK_DGRAM


class Watched(Protocol):
    """Something that changes by the mere passing of time."""

    def watch_step(self) -> None:
        """Look for what no event tells."""


News = TypeVar("News")


class Desk(Generic[News]):
    """Descriptors come in here, and news go out.

    Args:
        flows: how many tokens may be out at once.
        patience: seconds of silence after which a far end that does not answer is gone.
    """

    _is_closed = True  # until everything is open; __del__ also runs after a refused argument

    def __init__(self, flows: int, patience: float) -> None:
        check_patience(patience)
        check_range("flows", flows, MAX_FLOWS)
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
        self._is_closed = False

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

    def _require_tls(self, operation: str, *tls: Connection | None) -> None:
        if not all(one is None or is_usable(one) for one in tls):
            raise EngineError(operation, errno.EOPNOTSUPP)

    def _adopt(self, operation: str, *wanted: tuple[int, int]) -> list[socket.socket]:
        """Return the sockets of descriptors; each comes with the type that it must have."""
        sockets: list[socket.socket] = []
        fds = [fd for fd, _ in wanted]
        try:
            for fd, kind in wanted:
                if fd < 0:
                    raise OSError(errno.EBADF, "")
                sockets.append(socket.socket(fileno=fd))
                if sockets[-1].type != kind:
                    raise OSError(errno.EPROTOTYPE, "")
                if os.get_blocking(fd) or fds.count(fd) > 1:
                    raise OSError(errno.EINVAL, "")
                sockets[-1].setblocking(False)
        except OSError as exc:
            raise self._refuse(operation, sockets, exc) from exc
        return sockets

    def _refuse(self, operation: str, sockets: list[socket.socket], exc: Exception) -> EngineError:
        self._disown(sockets)
        code = exc.errno if isinstance(exc, OSError) else errno.EOPNOTSUPP
        return EngineError(operation, code or errno.EIO)

    def _disown(self, sockets: Iterable[socket.socket]) -> None:
        for sock in sockets:
            if sock.fileno() >= 0:
                self.loop.remove_reader(sock)
                self.loop.remove_writer(sock)
                sock.detach()

    def _places_taken(self) -> int:
        """Return how many tokens are out: of what is open, and of what nobody has polled yet."""
        raise NotImplementedError

    def _take_token(self) -> int:
        """Return a new token; 0: every place is taken."""
        if self._places_taken() >= self._capacity:
            return 0
        self._next += 1
        return self._next - 1

    def _require_token(self, operation: str, sockets: list[socket.socket]) -> int:
        token = self._take_token()
        if not token:
            self._refused += 1
            self._disown(sockets)
            raise EngineError(operation, errno.ENOBUFS)
        return token

    # --- what goes out ---

    def _tell(self, news: News) -> None:
        self._news.append(news)
        if len(self._news) == 1:
            self._bell.send(b"!")

    def _take_news(self) -> list[News]:
        news, self._news = self._news, []
        if news and not self._is_closed:
            self._ear.recv(1)
        return news

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

    def _shut_desk(self) -> None:
        """Give back what the desk itself holds; the news stay."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._is_closed = True
        self._bell.close()
        self._ear.close()


def check_range(name: str, value: int, most: int) -> None:
    """Raise ValueError if a limit is out of range."""
    if not 1 <= value <= most:
        raise ValueError(f"{name}: {value} is not within 1..{most}")


def check_seconds(seconds: float, name: str = "idle") -> None:
    """Raise ValueError if an idle limit, or another time, is out of range."""
    if not 0.0 <= seconds <= MAX_IDLE:
        raise ValueError(f"{name}: {seconds} is not within 0..4000000 seconds")


def check_patience(seconds: float) -> None:
    """Raise ValueError if an engine's patience is out of range."""
    if not 1.0 <= seconds <= MAX_IDLE:
        raise ValueError(f"patience: {seconds} is not within 1..4000000 seconds")


def check_head(head: bytes) -> None:
    """Raise TypeError if something is not the start of a stream."""
    if not isinstance(head, bytes):
        raise TypeError(f"heads are bytes, not {type(head).__name__}")


def take_address(address: SocketAddress) -> tuple[int, SocketAddress]:
    """Return the family of an address, and how its sockets want it.

    Raises:
        ValueError: the host is a name, or another part is out of range.
    """
    host, port, label, scope = (*address, 0, 0) if len(address) == 2 else address
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
