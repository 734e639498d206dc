"""TCP sockets: their options, how they are dialled, how they end, how many there may be.

Owns: every rule about how a TCP socket of ours comes to be, and how it goes. Sockets are bare and
non-blocking, never wrapped in a transport, because the engine takes them over: a transport
would already have read bytes that belong to the relay.

Each is born armed: whoever closes it, we or the kernel for a process that has died, its peer sees
a reset. Nobody can tell in time when a connection begins to stand for somebody's stream: an idle
link may have a visitor whose launch is on its way. A clean end has to be asked for: `finish`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import struct
import sys
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Final, NamedTuple

from nodepass.config.hostname import readable
from nodepass.errors import DialError

from .local_ports import LOCAL_PORTS, Need
from .resolver import Candidate, SocketAddress, resolve

if TYPE_CHECKING:
    from asyncio.trsock import TransportSocket

KEEPALIVE_IDLE: Final = 30
"""Seconds: below the shortest NAT time-out for TCP seen in the wild (60 s)."""
KEEPALIVE_INTERVAL: Final = 10
"""Seconds between probes."""
KEEPALIVE_PROBES: Final = 3
"""Unanswered probes until the path is dead: found out within a minute in all."""
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

_CONNECTING: Final = frozenset({errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK, errno.EINTR})
"""What connect(2) says while it cannot tell yet."""
_CONNECTED: Final = frozenset({0, errno.EISCONN})
_BEGUN: Final = _CONNECTED | _CONNECTING
_NONBLOCK: Final = getattr(socket, "SOCK_NONBLOCK", 0)
_STREAM: Final = socket.SOCK_STREAM | _NONBLOCK
"""Non-blocking from the start where the kernel can do that, which saves a system call."""


def _tuning() -> list[tuple[int, int, int]]:
    options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


_TUNING: Final = _tuning()
"""What every TCP leg of ours has: level, option, value."""
_TCP_INFO: Final = getattr(socket, "TCP_INFO", None) if sys.platform == "linux" else None
_UNACKNOWLEDGED: Final = 0x5411 if sys.platform == "linux" else None
"""SIOCOUTQ of tcp(7): bytes sent and not acknowledged."""
_TCP_ESTABLISHED: Final = 1
"""Of Linux' struct tcp_info: neither side has ended."""
_LINGER_SHAPE: Final = "hh" if sys.platform == "win32" else "ii"
_LINGER_RESET: Final = struct.pack(_LINGER_SHAPE, 1, 0)
_LINGER_OFF: Final = struct.pack(_LINGER_SHAPE, 0, 0)


def join_address(host: str, port: int) -> str:
    """Write an address as people do: "host:port", IPv6 in brackets, names in their own letters."""
    return f"[{host}]:{port}" if ":" in host else f"{readable(host)}:{port}"


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
    for level, option, value in _TUNING:
        sock.setsockopt(level, option, value)


def limit_silence(sock: socket.socket, seconds: float) -> None:
    """End a connection whose bytes stay unacknowledged; only where the peer always reads."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        option = socket.TCP_USER_TIMEOUT
        sock.setsockopt(socket.IPPROTO_TCP, option, max(1, int(seconds * 1000)))


def arm(sock: socket.socket) -> None:
    """Make a fresh socket's end a reset, whoever closes it; a listener passes that on, too."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)


def disarm(sock: socket.socket | TransportSocket) -> None:
    """Make a socket's end a clean one again: what was sent arrives, then the end."""
    with contextlib.suppress(OSError):  # macOS refuses options on a socket that was reset
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF)


def reset(sock: socket.socket) -> None:
    """Close a socket so that its peer sees a reset, never a clean end."""
    with contextlib.suppress(OSError):  # as above; and it may have been made by somebody else
        arm(sock)
    sock.close()


def finish(sock: socket.socket) -> None:
    """Close a socket cleanly: what was sent to it arrives, then the end.

    For our last words to who has nobody's stream: a refusal, an alert.
    """
    disarm(sock)
    sock.close()


def check_room(sock: socket.socket | TransportSocket) -> None:
    """Find out whether the kernel has room to watch one connection more.

    For libuv, which ends the whole process where it finds none (`uv__io_poll`).

    Raises:
        OSError: ENOSPC or ENOMEM, it has none.
    """
    if not hasattr(select, "epoll"):
        return
    try:
        probe = select.epoll()
    except OSError:  # no descriptor to ask with; to watch takes none
        return
    with probe:
        probe.register(sock.fileno(), 0)


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


def is_acknowledged(sock: socket.socket) -> bool:
    """Tell whether the peer's kernel has everything that was sent; True where nobody can tell."""
    if _UNACKNOWLEDGED is None:
        return True
    from fcntl import ioctl

    return not int.from_bytes(ioctl(sock.fileno(), _UNACKNOWLEDGED, bytes(4)), sys.byteorder)


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
    # The first byte of TCP_INFO is the state. A look at it takes no exception where nothing is to
    # be read, which is the usual case and costs more than all the rest of taking a link.
    try:
        if (
            _TCP_INFO is not None
            and sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 1)[0] == _TCP_ESTABLISHED
        ):
            return False
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


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
        finish(task.result())  # somebody's service, which has done nothing wrong


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


def open_stream(family: int, host: str = "", is_armed: bool = True) -> socket.socket:
    """Make a tuned non-blocking socket to dial a host with.

    This machine itself cannot vanish without a word, so its own addresses need no keepalive: four
    system calls less where most targets are.

    Args:
        host: address that it is for.
        is_armed: whether its end is a reset until `finish`; False only for what the engine is to
            dial, which arms it before.
    """
    sock = socket.socket(family, _STREAM)
    try:
        if not _NONBLOCK:
            sock.setblocking(False)
        if is_armed:
            arm(sock)
        if host == "::1" or host.startswith("127."):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            tune(sock)
    except BaseException:
        sock.close()
        raise
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
            sock = open_stream(family, address[0], is_armed)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):  # somebody else has the port
                sock.bind(("", port))
                if sock.connect_ex(address) in _BEGUN:
                    return sock, True
            sock.close()
        LOCAL_PORTS.miss(address[0], address[1])
    sock = open_stream(family, address[0], is_armed)
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
    if not (_is_connected(sock, address) or _is_connected(sock, address)):
        return False
    _refuse_mirror(sock, address)
    return True


def begin_connect(sock: socket.socket, address: SocketAddress) -> None:
    """Begin to connect a non-blocking socket; what comes of it, reading tells.

    Raises:
        OSError: the kernel has its answer already, and it is no.
    """
    _is_connected(sock, address)
    _refuse_mirror(sock, address)


def _refuse_mirror(sock: socket.socket, address: SocketAddress) -> None:
    # Nobody listens on a port of this machine from the ephemeral range, and the kernel has picked
    # that very port for us: we would be talking to ourselves.
    if sock.getsockname()[1] == address[1] and _is_mirror(sock):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to itself")


def _is_mirror(sock: socket.socket) -> bool:
    return is_connected(sock) and bool(sock.getsockname() == sock.getpeername())


def is_connected(sock: socket.socket) -> bool:
    """Tell whether a connect has come to a good end."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _is_connected(sock: socket.socket, address: SocketAddress) -> bool:
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


def send_line(sock: socket.socket, line: bytes) -> None:
    """Send a line on a fresh connection, whose buffer takes it whole.

    Raises:
        OSError: the peer has gone, or ours is a kernel with buffers of a few hundred bytes.
    """
    if sock.send(line) < len(line):
        raise OSError(errno.ENOBUFS, "the socket's buffer does not take one line")


def literal(host: str, port: int) -> Candidate | None:
    """Return how to dial a host, None if it is a name and has to be resolved."""
    host, _, zone = host.partition("%")
    if zone:
        return _scoped(host, port, zone)
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family, (host, port)
    return None


def _scoped(host: str, port: int, zone: str) -> Candidate | None:
    try:
        socket.inet_pton(socket.AF_INET6, host)
        return socket.AF_INET6, (host, port, 0, socket.if_nametoindex(zone))
    except OSError:
        return None
