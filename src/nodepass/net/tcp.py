"""TCP sockets: how they are made, their options, how they end.

Owns: every rule about how a TCP socket of ours comes to be, and how it goes. Sockets are bare and
non-blocking, never wrapped in a transport, because the engine takes them over: a transport
would already have read bytes that belong to the relay.

Each is born armed: whoever closes it, we or the kernel for a process that has died, its peer sees
a reset. Nobody can tell in time when a connection begins to stand for somebody's stream: an idle
link may have a visitor whose launch is on its way. A clean end has to be asked for: `finish`.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import sys
from typing import TYPE_CHECKING, Final

from .hosts import plain_host

if TYPE_CHECKING:
    from asyncio.trsock import TransportSocket

KEEPALIVE_IDLE: Final = 30
"""Seconds: below the shortest NAT time-out for TCP seen in the wild (60 s)."""
KEEPALIVE_INTERVAL: Final = 10
"""Seconds between probes."""
KEEPALIVE_PROBES: Final = 3
"""Unanswered probes until the path is dead: found out within a minute in all."""

STALLED_RESENDS: Final = 2
"""Resends in a row without an answer."""

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


def send_line(sock: socket.socket, line: bytes) -> None:
    """Send a line on a fresh connection, whose buffer takes it whole.

    Raises:
        OSError: the peer has gone, or ours is a kernel with buffers of a few hundred bytes.
    """
    if sock.send(line) < len(line):
        raise OSError(errno.ENOBUFS, "the socket's buffer does not take one line")
