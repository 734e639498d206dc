"""Sockets: listen, dial, resolve, options, accept back-off.

Owns: every rule about how a TCP socket of ours comes to be. Sockets are bare and
non-blocking, never wrapped in a transport, because the engine takes them over: a transport
would already have read bytes that belong to the relay. Called by `pool`, `server`, `client`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from itertools import chain, zip_longest
from typing import Final, NamedTuple

from .errors import DialError, ListenError
from .resolver import Candidate, SocketAddress, resolve

KEEPALIVE_IDLE: Final = 30
"""Seconds: below the shortest NAT time-out for TCP seen in the wild (60 s)."""
KEEPALIVE_INTERVAL: Final = 10
"""Seconds between probes."""
KEEPALIVE_PROBES: Final = 3
"""Unanswered probes until the path is dead: found out within a minute in all."""
BACKLOG: Final = 4096
"""Connections the kernel may hold for us; it cuts this to net.core.somaxconn."""
ACCEPT_BATCH: Final = 64
"""Accepts per wake-up, so that a flood on one listener leaves the loop to others."""
ACCEPT_PAUSE: Final = 0.1
"""Seconds without accepting after the system ran out of something (EMFILE and its like)."""
HAPPY_DELAY: Final = 0.25
"""Seconds before the next address is tried beside the last: RFC 8305, section 8."""

STALLED_RESENDS: Final = 2
"""Resends in a row without an answer."""
RESERVED_DESCRIPTORS: Final = 96
"""Files kept back for listeners, engine, control channels and a few pipes."""
DESCRIPTORS_PER_VISITOR: Final = 2
"""Its connection and the link."""
IDLE_ROOM: Final = 2
"""Idle links a client may bring per link that it is asked for; the wish may have shrunk since."""
UNLIMITED_DESCRIPTORS: Final = 1 << 20
"""Stands for "no limit": Linux' own ceiling for a process (fs.nr_open)."""

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
_CONNECTING: Final = frozenset({errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK, errno.EINTR})
"""What connect(2) says while it cannot tell yet."""
_LINGER_RESET: Final = struct.pack("ii", 1, 0)

OnAccept = Callable[[socket.socket, str, int], None]
Bind = Callable[[int, SocketAddress, bool], socket.socket]


def join_address(host: str, port: int) -> str:
    """Write an address as people do: "host:port", IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def plain_host(host: str) -> str:
    """Undo what a dual-stack socket makes of an IPv4 address."""
    return host.removeprefix("::ffff:") if "." in host else host


def source_of(host: str) -> str:
    """Return what counts as one source: an IPv4 address, or the /64 of an IPv6 address."""
    if ":" not in host:
        return host
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex(":", 2)


def tune(sock: socket.socket) -> None:
    """Set what every TCP leg of ours has; a listener passes it on to what it accepts.

    No TCP_USER_TIMEOUT here: Linux also counts it while a peer's window stays closed, so it
    would cut off a reader that merely pauses. `tests/system` shows this.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def limit_silence(sock: socket.socket, seconds: float) -> None:
    """End a connection whose bytes stay unacknowledged; only where the peer always reads."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        option = socket.TCP_USER_TIMEOUT
        sock.setsockopt(socket.IPPROTO_TCP, option, max(1, int(seconds * 1000)))


def reset(sock: socket.socket) -> None:
    """Close a socket so that its peer sees a reset, never a clean end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    sock.close()


def is_alive(sock: socket.socket) -> bool:
    """Tell whether a connection is without error; a peer that has cleanly ended still counts."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def peer_host(sock: socket.socket) -> str:
    """Return the address of the far end, fit to be dialled again.

    Raises:
        OSError: the connection is gone.
    """
    name = sock.getpeername()
    is_scoped = len(name) == 4 and name[3]
    return f"{name[0]}%{socket.if_indextoname(name[3])}" if is_scoped else plain_host(name[0])


def descriptor_limit() -> int:
    """Return how many files this process may have open."""
    try:
        import resource
    except ImportError:  # Windows: its sockets are bounded by memory alone
        return UNLIMITED_DESCRIPTORS
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UNLIMITED_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


class Shares(NamedTuple):
    """How the limit of open files is divided."""

    visitors: int
    """Most visitors at once."""
    idle: int
    """Most idle links to ask for, of one client."""
    stock: int
    """Most idle links to keep, of all clients together."""


def share_descriptors(visitors: int, idle: int) -> Shares:
    """Cut what the user allows to what the limit of open files allows."""
    room = descriptor_limit() - RESERVED_DESCRIPTORS
    stock = max(1, room // 4)
    return Shares(
        visitors=max(1, min(visitors, (room - stock) // DESCRIPTORS_PER_VISITOR)),
        idle=max(1, min(idle, stock // IDLE_ROOM)),
        stock=stock,
    )


def is_stalled(sock: socket.socket) -> bool:
    """Tell whether a connection's bytes have gone unanswered through several resends."""
    if not hasattr(socket, "TCP_INFO"):
        return False
    # struct tcp_info: state, ca_state, retransmits, each one byte. Two resends without an
    # answer take at least 0.6 s: no healthy path looks like this.
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    return info[2] >= STALLED_RESENDS


def has_ended(sock: socket.socket) -> bool:
    """Tell whether the peer of an idle connection has gone, without taking a byte from it."""
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


# ---------------------------------------------------------------------------- listening


async def listen(host: str, port: int) -> list[socket.socket]:
    """Open listening sockets on every address of a host.

    Args:
        host: address or name; empty = every address, one dual-stack socket where possible.
        port: 0..65535; 0 = the kernel picks one, the same for all.

    Returns:
        At least one non-blocking listening socket, the caller's own.

    Raises:
        ListenError: the name does not resolve, or an address cannot be bound.
    """
    return await bind_all(host, port, _bind, join_address(host, port))


async def bind_all(
    host: str, port: int, bind: Bind, shown: str, way_out: str = ""
) -> list[socket.socket]:
    """Open a socket on every address of a host.

    Args:
        host: as `listen`; so is port.
        bind: opens one, given its family, its address, and whether it is for both families.
        shown: the address as errors name it.
        way_out: one clause on how to go without it, empty if there is none.

    Returns:
        At least one socket, the caller's own.

    Raises:
        ListenError: the name does not resolve, or an address cannot be bound.
    """
    opened: list[socket.socket] = []
    try:
        for family, address in await _listen_addresses(host, port):
            if opened and port == 0:
                address = (address[0], opened[0].getsockname()[1], *address[2:])  # noqa: PLW2901
            opened.append(bind(family, address, not host))
    except OSError as exc:
        for sock in opened:
            sock.close()
        raise _listen_error(shown, exc, way_out) from exc
    return opened


def _listen_error(shown: str, exc: OSError, way_out: str) -> ListenError:
    if isinstance(exc, socket.gaierror):
        text = f"the name does not resolve ({exc.strerror})"
        return ListenError(shown, errno.EADDRNOTAVAIL, text)
    code = exc.errno or errno.EIO
    hint = f"{os.strerror(code).lower()}; {way_out}" if way_out else ""
    if code == errno.EADDRNOTAVAIL:
        hint = "this machine has no such address"
    return ListenError(shown, code, hint)


async def _listen_addresses(host: str, port: int) -> list[Candidate]:
    if host:
        return await resolve(host, port, socket.AI_PASSIVE)
    if socket.has_dualstack_ipv6():
        return [(socket.AF_INET6, ("::", port))]
    return [(socket.AF_INET, ("0.0.0.0", port))]  # noqa: S104 - the user asked for every address


def _bind(family: int, address: SocketAddress, is_dual: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
        tune(sock)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


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
        for sock in self._socks:
            if wants:
                self._loop.add_reader(sock.fileno(), self._accept, sock)
            else:
                self._loop.remove_reader(sock.fileno())

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


# ------------------------------------------------------------------------------ dialling


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
    try:
        async with asyncio.timeout(timeout):
            family = _literal_family(host)
            if family is not None:
                attempts = 1
                return await _connect((family, (host, port)))
            candidates = _take_turns(await resolve(host, port))
            attempts = len(candidates)
            return await _race(candidates)
    except TimeoutError as exc:
        raise DialError(shown, errno.ETIMEDOUT, attempts) from exc
    except socket.gaierror as exc:
        text = f"the name does not resolve ({exc.strerror})"
        raise DialError(shown, errno.EHOSTUNREACH, 0, text) from exc
    except OSError as exc:
        raise DialError(shown, exc.errno or errno.EIO, attempts) from exc


def _take_turns(candidates: list[Candidate]) -> list[Candidate]:
    """Alternate between the families, the resolver's first one first: RFC 8305, section 4."""
    first = [c for c in candidates if c[0] == candidates[0][0]]
    other = [c for c in candidates if c[0] != candidates[0][0]]
    turns = chain.from_iterable(zip_longest(first, other))
    return [candidate for candidate in turns if candidate is not None]


async def _race(candidates: list[Candidate]) -> socket.socket:
    """Try addresses in order, each HAPPY_DELAY after the last or at once when it failed."""
    waiting = list(reversed(candidates))
    running: set[asyncio.Task[socket.socket]] = set()
    failure: OSError = OSError(errno.EHOSTUNREACH, "no address")
    try:
        while waiting or running:
            if waiting:
                running.add(asyncio.ensure_future(_connect(waiting.pop())))
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
        task.result().close()


async def _connect(candidate: Candidate) -> socket.socket:
    family, address = candidate
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        tune(sock)
        await connect(sock, address)
        if sock.getsockname()[:2] == address[:2]:
            # Nobody listens on a port of this machine from the ephemeral range, and the
            # kernel has picked that very port for us: we are talking to ourselves.
            raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")
    except BaseException:
        sock.close()
        raise
    return sock


async def connect(sock: socket.socket, address: SocketAddress) -> None:
    """Connect a non-blocking socket to an address that is no name.

    The loop's `sock_connect` is not used: uvloop's asks the resolver even about addresses, in
    another thread, which cost more than all the rest of a dial.

    Raises:
        OSError: the kernel's answer.
    """
    # Asked twice, since by then this machine's own listeners have answered.
    if _is_connected(sock.connect_ex(address)) or _is_connected(sock.connect_ex(address)):
        return
    loop = asyncio.get_running_loop()
    place: asyncio.Future[None] = loop.create_future()
    fd = sock.fileno()
    loop.add_writer(fd, _settle, place)
    try:
        await place
    finally:
        loop.remove_writer(fd)
    _is_connected(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def _is_connected(code: int) -> bool:
    if code in (0, errno.EISCONN):
        return True
    if code in _CONNECTING:
        return False
    raise OSError(code, os.strerror(code))


def _settle(place: asyncio.Future[None]) -> None:
    if not place.done():
        place.set_result(None)


def _literal_family(host: str) -> socket.AddressFamily | None:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family
    return None
