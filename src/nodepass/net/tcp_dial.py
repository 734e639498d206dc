"""Dialling TCP: names afresh, addresses in a race, connects that are begun and looked after.

Sockets are those of `tcp`: bare, non-blocking, armed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from itertools import chain, zip_longest
from typing import Final

from nodepass.config.address import join_address
from nodepass.errors import DialError

from . import tcp
from .local_ports import LOCAL_PORTS, Need
from .resolver import Candidate, SocketAddress, literal, resolve

HAPPY_DELAY: Final = 0.25
"""Seconds before the next address is tried beside the last: RFC 8305, section 8."""
_CONNECTING: Final = frozenset({errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK, errno.EINTR})
"""What connect(2) says while it cannot tell yet."""
_CONNECTED: Final = frozenset({0, errno.EISCONN})
BROKEN_LATER: Final = frozenset({errno.ECONNRESET, errno.EPIPE})
"""Errors that only a connection can have that has come about."""
_BEGUN: Final = _CONNECTED | _CONNECTING


async def dial(host: str, port: int, timeout: float) -> socket.socket:  # noqa: ASYNC109
    """Connect to a host, resolving its name afresh and racing its addresses.

    Args:
        host: address or name; empty = this machine.
        timeout: seconds for all of it.

    Returns:
        A tuned non-blocking connection, the caller's own.

    Raises:
        DialError: the name does not resolve, or no address answered in time.

    Source: RFC 8305 (happy eyeballs).
    """
    host = host or "localhost"
    shown = join_address(host, port)
    attempts = 0
    failures: dict[str, int] = {}
    candidates: list[Candidate] = []
    try:
        async with asyncio.timeout(timeout):
            candidate = literal(host, port)
            if candidate is not None:
                attempts = 1
                return await _connect(candidate)
            candidates = _take_turns(await resolve(host, port))
            attempts = len(candidates)
            return await _race(candidates, failures)
    except TimeoutError as exc:
        if not failures:
            raise DialError(shown, errno.ETIMEDOUT, attempts) from exc
        late = {address[0]: errno.ETIMEDOUT for _, address in candidates}
        raise DialError.of_all(shown, {**late, **failures}) from exc
    except socket.gaierror as exc:
        text = f"the name does not resolve ({exc.strerror})"
        raise DialError(shown, errno.EHOSTUNREACH, 0, text) from exc
    except OSError as exc:
        if failures:
            raise DialError.of_all(shown, failures) from exc
        raise DialError(shown, exc.errno or errno.EIO, attempts) from exc


def _take_turns(candidates: list[Candidate]) -> list[Candidate]:
    """Alternate between the families, the resolver's first one first: RFC 8305, section 4."""
    first = [c for c in candidates if c[0] == candidates[0][0]]
    other = [c for c in candidates if c[0] != candidates[0][0]]
    turns = chain.from_iterable(zip_longest(first, other))
    return [candidate for candidate in turns if candidate is not None]


async def _race(candidates: list[Candidate], failures: dict[str, int]) -> socket.socket:
    """Try addresses in order, each HAPPY_DELAY after the last or at once when it failed.

    Args:
        candidates: at least one.
        failures: gets an errno for each address that has failed.
    """
    waiting = list(reversed(candidates))
    running: set[asyncio.Task[socket.socket]] = set()
    hosts: dict[asyncio.Task[socket.socket], str] = {}
    failure: OSError = OSError(errno.EHOSTUNREACH, "no address")
    try:
        while waiting or running:
            if waiting:
                candidate = waiting.pop()
                task = asyncio.ensure_future(_connect(candidate))
                hosts[task] = candidate[1][0]
                running.add(task)
            done, running = await asyncio.wait(
                running,
                timeout=HAPPY_DELAY if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                try:
                    sock = task.result()
                except OSError as exc:
                    failure = exc
                    failures[hosts[task]] = exc.errno or errno.EIO
                    continue
                _close_others(done - {task})
                return sock
        raise failure
    finally:
        for task in running:
            task.cancel()
            task.add_done_callback(_close_late)


def _close_others(done: set[asyncio.Task[socket.socket]]) -> None:
    for task in done:
        _close_late(task)


def _close_late(task: asyncio.Task[socket.socket]) -> None:
    if not task.cancelled() and task.exception() is None:
        tcp.finish(task.result())  # somebody's service, which has done nothing wrong


async def _connect(candidate: Candidate) -> socket.socket:
    family, address = candidate
    sock = begin_dial(family, address)
    try:
        await connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def begin_dial(family: int, address: SocketAddress, *, is_armed: bool = True) -> socket.socket:
    """Make a tuned non-blocking socket and begin to connect it; what comes of it, reading tells.

    Args:
        is_armed: as for `open_stream`.

    Raises:
        OSError: the kernel has its answer already, and it is no.
    """
    while True:
        sock, has_begun = open_dial(family, address, is_armed)
        try:
            if not has_begun:
                begin_connect(sock, address)
        except BaseException as exc:
            sock.close()
            if not (isinstance(exc, OSError) and exc.errno == errno.EADDRNOTAVAIL):
                raise
            if not LOCAL_PORTS.miss(address[0], address[1]):
                raise
        else:
            return sock


def open_dial(
    family: int, address: SocketAddress, is_armed: bool = True
) -> tuple[socket.socket, bool]:
    """Make a tuned non-blocking socket to dial an address with.

    Args:
        is_armed: as for `open_stream`.

    Returns:
        The socket, and whether its connect has begun: where local ports run short, that is how
        one learns whether it can have a certain port.
    """
    need = LOCAL_PORTS.note(address[0], address[1])
    if need is Need.BOUND:
        for port in LOCAL_PORTS.choose():
            if port == address[1]:
                continue  # on this machine it would be connected with itself
            sock = tcp.open_stream(family, address[0], is_armed)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):  # somebody else has the port
                sock.bind(("", port))
                if sock.connect_ex(address) in _BEGUN:
                    return sock, True
            sock.close()
        LOCAL_PORTS.miss(address[0], address[1])
    sock = tcp.open_stream(family, address[0], is_armed)
    if need is not Need.FRESH:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock, False


async def connect(sock: socket.socket, address: SocketAddress) -> None:
    """Connect a non-blocking socket to an address that is no name.

    The loop's `sock_connect` is not used: uvloop's asks the resolver even about addresses, in
    another thread, which cost more than all the rest of a dial.

    Raises:
        OSError: the kernel's answer.
    """
    loop = asyncio.get_running_loop()
    while not connect_now(sock, address):
        place: asyncio.Future[None] = loop.create_future()
        fd = sock.fileno()
        loop.add_writer(fd, _settle, place)
        try:
            await place
        finally:
            loop.remove_writer(fd)


def connect_now(sock: socket.socket, address: SocketAddress) -> bool:
    """Begin to connect a non-blocking socket, or look how far it has come.

    Returns:
        True if it is connected, False if the answer is still to come.

    Raises:
        OSError: the kernel's answer.
    """
    # Asked twice, since by then this machine's own listeners have answered.
    if not (_try_connect(sock, address) or _try_connect(sock, address)):
        return False
    _refuse_mirror(sock, address)
    return True


def begin_connect(sock: socket.socket, address: SocketAddress) -> None:
    """Begin to connect a non-blocking socket; what comes of it, reading tells.

    Raises:
        OSError: the kernel has its answer already, and it is no.
    """
    _try_connect(sock, address)
    _refuse_mirror(sock, address)


def _refuse_mirror(sock: socket.socket, address: SocketAddress) -> None:
    # Nobody listens on a port of this machine from the ephemeral range, and the kernel has picked
    # that very port for us: we would be talking to ourselves.
    if sock.getsockname()[1] == address[1] and is_mirror(sock):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")


def is_mirror(sock: socket.socket) -> bool:
    """Tell whether the kernel has connected a socket with itself."""
    return is_connected(sock) and bool(sock.getsockname() == sock.getpeername())


def is_connected(sock: socket.socket) -> bool:
    """Tell whether a connect has come to a good end."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _try_connect(sock: socket.socket, address: SocketAddress) -> bool:
    """Begin a connect, or ask what has come of it; return whether it has been made."""
    code = sock.connect_ex(address)
    if code in _CONNECTED:
        return True
    if code in _CONNECTING:
        return False
    if code == errno.EINVAL:  # BSD: it has failed before, and this tells why
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or code
    raise OSError(code, os.strerror(code))


def _settle(place: asyncio.Future[None]) -> None:
    if not place.done():
        place.set_result(None)
