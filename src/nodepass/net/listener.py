"""Listening: ports are bound, connections accepted, and nothing spins when the system is full.

Owns: listening sockets. Hands over bare non-blocking connections, never wrapped in a transport
(see `tcp`). Called by `server` and `udp`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Any, Final

from nodepass.config.address import join_address
from nodepass.errors import ListenError
from nodepass.runtime import fork

from .hosts import plain_host
from .resolver import Candidate, SocketAddress, literal, resolve
from .tcp import arm, tune

BACKLOG: Final = 4096
"""Connections the kernel may hold for us; it cuts this to net.core.somaxconn."""
ACCEPT_BATCH: Final = 64
"""Accepts per wake-up, so that a flood on one listener leaves the loop to others."""
ACCEPT_PAUSE: Final = 0.1
"""Seconds without accepting after the system ran out of something (EMFILE and its like)."""
_PASSING: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.EPERM,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
    }
)
"""What accept(2) reports of one connection that died in the queue; the next may be fine."""

_ABSENT: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""What an address is that this machine has not got. A port in use is another matter: whoever has
it may be meant to give it up, so that ends the start."""

OnAbsent = Callable[[str], None]
OnAccept = Callable[[socket.socket, str, int], None]
Bind = Callable[[int, SocketAddress, bool], socket.socket]


def _ignore(_address: str) -> None:
    pass


async def listen(host: str, port: int, on_absent: OnAbsent = _ignore) -> list[socket.socket]:
    """Open listening sockets on every address of a host.

    Args:
        host: address or name; empty = every address, one dual-stack socket where possible.
        port: 0..65535; 0 = the kernel picks one, the same for all.
        on_absent: as `bind_all`.

    Returns:
        At least one non-blocking listening socket, the caller's own.

    Raises:
        ListenError: the name does not resolve, or an address cannot be bound.
    """
    return await bind_all(host, port, _bind, join_address(host, port), on_absent)


async def bind_all(
    host: str,
    port: int,
    bind: Bind,
    shown: str,
    on_absent: OnAbsent = _ignore,
    way_out: str = "",
) -> list[socket.socket]:
    """Open a socket on every address of a host that this machine has.

    A name may stand for more: in most containers `localhost` is ::1, too, and there is no IPv6.

    Args:
        host: as `listen`; so is port.
        bind: opens one, given its family, its address, and whether it is for both families.
        shown: the address as errors name it.
        on_absent: called with each address that was passed over.
        way_out: one clause on how to go without it, empty if there is none.

    Returns:
        At least one socket, the caller's own.

    Raises:
        ListenError: the name does not resolve, this machine has none of its addresses, or another
            cannot be bound.
    """
    opened: list[socket.socket] = []
    absent: list[str] = []
    failure: OSError | None = None
    at = ""
    try:
        for family, address in await _listen_addresses(host, port):
            if opened and port == 0:
                address = (address[0], opened[0].getsockname()[1], *address[2:])  # noqa: PLW2901
            at = join_address(address[0], address[1])
            try:
                opened.append(bind(family, address, not host))
            except OSError as exc:
                if exc.errno not in _ABSENT:
                    raise
                failure = exc
                absent.append(address[0])
        if failure is not None and not opened:
            at = ", ".join(absent)
            raise failure
    except OSError as exc:
        for sock in opened:
            sock.close()
        is_name = bool(host) and literal(host, port) is None
        where = f"{shown} ({at})" if is_name and at else shown
        raise _listen_error(where, exc, way_out) from exc
    for address_of_others in absent:
        on_absent(address_of_others)
    return opened


def _listen_error(shown: str, exc: OSError, way_out: str) -> ListenError:
    if isinstance(exc, socket.gaierror):
        text = f"the name does not resolve ({exc.strerror})"
        return ListenError(shown, errno.EADDRNOTAVAIL, text)
    code = exc.errno or errno.EIO
    hint = f"{os.strerror(code).lower()}; {way_out}" if way_out else ""
    if code in _ABSENT:
        hint = "this machine has no such address"
    return ListenError(shown, code, hint)


async def _listen_addresses(host: str, port: int) -> list[Candidate]:
    if host:
        return await resolve(host, port, socket.AI_PASSIVE)
    if socket.has_dualstack_ipv6():
        return [(socket.AF_INET6, ("::", port))]
    return [(socket.AF_INET, ("0.0.0.0", port))]  # noqa: S104 - the user asked for every address


def _bind(family: int, address: SocketAddress, is_dual: bool) -> socket.socket:
    sock = Port(family)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
        tune(sock)
        arm(sock)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


class Port(socket.socket):
    """A listening socket that accepts at less cost.

    `socket.socket.accept` turns family and type into enumerations and back, and asks for the
    default time-out, for each connection: a third of what accepting one costs in Python.
    """

    def __init__(self, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._family = family

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection; it is blocking."""
        fd, address = self._accept()  # type: ignore[attr-defined]
        return socket.socket(self._family, socket.SOCK_STREAM, 0, fd), address


class Listener:
    """Accept on listening sockets and hand over bare non-blocking connections.

    Args:
        socks: listening sockets; owned from here on.
        on_accept: called with the connection, now the hearer's, and the peer's host and port.
        on_trouble: called when the system has run out of something, or worse; accepting then
            pauses for ACCEPT_PAUSE seconds and goes on by itself.
    """

    def __init__(
        self,
        socks: list[socket.socket],
        on_accept: OnAccept,
        on_trouble: Callable[[OSError], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socks = socks
        name = socks[0].getsockname()
        self.address: tuple[str, int] = (str(name[0]), int(name[1]))
        """Host and port of the first socket."""
        self._on_accept = on_accept
        self._on_trouble = on_trouble
        self._is_reading = False
        self._is_paused = True
        self._retry: asyncio.TimerHandle | None = None
        fork.own(self)

    def disown(self) -> list[int]:
        """Return what a forked child must not touch; it is in one."""
        return [sock.fileno() for sock in self._socks]

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    def resume(self) -> None:
        """Begin, or go on, accepting."""
        self._is_paused = False
        self._poll()

    def pause(self) -> None:
        """Leave new connections in the kernel's queue; none is refused."""
        self._is_paused = True
        self._poll()

    def close(self) -> None:
        """Stop listening; idempotent."""
        self.pause()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        for sock in self._socks:
            sock.close()
        self._socks = []

    def _poll(self) -> None:
        wants = not self._is_paused and self._retry is None
        if wants == self._is_reading:
            return
        self._is_reading = wants
        try:
            for sock in self._socks:
                if wants:
                    self._loop.add_reader(sock.fileno(), self._accept, sock)
                else:
                    self._loop.remove_reader(sock.fileno())
        except OSError as exc:  # no room in the kernel to watch one more (ENOSPC, ENOMEM)
            for sock in self._socks:
                self._loop.remove_reader(sock.fileno())
            self._is_reading = False
            self._back_off(exc)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPT_BATCH):
            if not self._is_reading:
                return
            try:
                sock, address = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                if exc.errno in _PASSING:
                    continue
                self._back_off(exc)
                return
            sock.setblocking(False)
            self._on_accept(sock, plain_host(address[0]), address[1])

    def _back_off(self, exc: OSError) -> None:
        self._retry = self._loop.call_later(ACCEPT_PAUSE, self._try_again)
        self._poll()
        self._on_trouble(exc)

    def _try_again(self) -> None:
        self._retry = None
        self._poll()
