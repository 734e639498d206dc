"""UDP sockets: bound to the target address, or connected to the target; and links that carry UDP.

Owns: every rule about how a UDP socket of ours comes to be. Sockets are bare and non-blocking,
because the engine takes them over. Called by `udp_visitors` and `session`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
from collections.abc import Collection
from typing import Final

from nodepass.config.address import join_address
from nodepass.errors import DialError

from . import tcp
from .listener import OnAbsent, bind_all
from .resolver import Candidate, SocketAddress, resolve

GATE_BUFFER: Final = 7 * 1024 * 1024
"""Bytes that may wait in the socket of all visitors: 50 ms of a full 1 Gbit/s, and the size that
QUIC and WireGuard programs ask for."""
TARGET_BUFFER: Final = 1024 * 1024
"""Bytes that may wait in the socket of one visitor: what a link takes in a moment's delay."""
UNSENT_LINK: Final = 256 * 1024
"""Bytes a link may hold beyond what is in flight: more would not lose fewer datagrams, only
deliver them late."""
LEAST_SILENCE: Final = 5.0
"""Seconds: a few resends on a bad path are no dead path, whatever REPORT_INTERVAL is."""

_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
"""Linux' include/uapi/asm-generic/socket.h; the socket module does not have them, and elsewhere
the numbers mean something else."""
_IP_MTU_DISCOVER: Final = 10
_IP_PMTUDISC_DONT: Final = 0
"""Linux' include/uapi/linux/in.h."""


async def listen(
    host: str, port: int, on_absent: OnAbsent = lambda _address: None
) -> list[socket.socket]:
    """Bind UDP sockets to every address of a host.

    Args:
        host: address or name; empty = every address, one dual-stack socket where possible.
        port: 0..65535; 0 = the kernel picks one, the same for all.
        on_absent: as `listener.bind_all`.

    Returns:
        At least one non-blocking socket, the caller's own.

    Raises:
        ListenError: the name does not resolve, or an address cannot be bound.
    """
    shown = f"udp {join_address(host, port)}"
    way_out = "udp=0 goes without UDP"
    return await bind_all(host, port, _bind, shown, on_absent, way_out)


def _bind(family: int, address: SocketAddress, is_dual: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
        _set_buffers(sock, GATE_BUFFER)
        _allow_fragments(sock)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _allow_fragments(sock: socket.socket) -> None:
    """Let routers cut what is too large for their next hop, in IPv4; in IPv6 they never do.

    Linux forbids them that, so that it hears how much a path takes. Where the answer of the router
    is filtered, every datagram above that is lost. Who has sent a datagram may have forbidden it
    as well, but no kernel tells its receiver.
    """
    if sys.platform == "linux":  # an option of IPv4 for sockets of both families
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)


def _set_buffers(sock: socket.socket, size: int) -> None:
    """Ask for large buffers; what the system refuses stays as it was.

    Beyond its limit takes CAP_NET_ADMIN. Linux cuts what is too much, others refuse it.
    """
    for forced, plain in (
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
    ):
        for option in (forced, plain) if sys.platform == "linux" else (plain,):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, size)
                break


async def dial(
    host: str,
    port: int,
    timeout: float,  # noqa: ASYNC109
    avoid: Collection[SocketAddress] = (),
) -> tuple[socket.socket, SocketAddress]:
    """Connect a UDP socket to a host, resolving its name afresh.

    Nothing travels, so nobody can tell whether anyone listens there. IPv4 comes first, as the Go
    program has it: a service that a name stands for may well listen there only.

    Args:
        host: address or name; empty = this machine.
        timeout: seconds for the lookup.
        avoid: addresses that have refused lately; taken only if there is no other.

    Returns:
        A non-blocking connected socket, the caller's own, and the address it is connected to.

    Raises:
        DialError: the name does not resolve, or there is no route to any of its addresses.
    """
    return connect(shown_target(host, port), await look_up(host, port, timeout), avoid)


def shown_target(host: str, port: int) -> str:
    """Return a target as errors and log lines name it."""
    return f"udp {join_address(host or 'localhost', port)}"


async def look_up(host: str, port: int, timeout: float) -> list[Candidate]:  # noqa: ASYNC109
    """Resolve a target afresh.

    Args:
        host: address or name; empty = this machine.
        timeout: seconds.

    Returns:
        Its addresses, at least one.

    Raises:
        DialError: the name does not resolve.
    """
    shown = shown_target(host, port)
    try:
        async with asyncio.timeout(timeout):
            return await resolve(host or "localhost", port)
    except TimeoutError as exc:
        text = f"the name lookup took longer than {timeout:g} s"
        raise DialError(shown, errno.ETIMEDOUT, 0, text) from exc
    except socket.gaierror as exc:
        text = f"the name does not resolve ({exc.strerror})"
        raise DialError(shown, errno.EHOSTUNREACH, 0, text) from exc


def connect(
    shown: str, candidates: Collection[Candidate], avoid: Collection[SocketAddress] = ()
) -> tuple[socket.socket, SocketAddress]:
    """Connect a UDP socket to the first address that there is a route to.

    Args:
        shown: the target in an error.
        candidates: addresses, at least one.
        avoid: those that are taken only if there is no other.

    Returns:
        As `dial`.

    Raises:
        DialError: there is no route to any of them.
    """
    failures: dict[str, int] = {}
    for family, address in sorted(candidates, key=lambda c: _rank(c, avoid)):
        try:
            return _connect(family, address), address
        except OSError as exc:
            failures[address[0]] = exc.errno or errno.EIO
    raise DialError.of_all(shown, failures)


def _rank(candidate: Candidate, avoid: Collection[SocketAddress]) -> tuple[bool, bool]:
    family, address = candidate
    return address in avoid, family != socket.AF_INET


def _connect(family: int, address: SocketAddress) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        _set_buffers(sock, TARGET_BUFFER)
        _allow_fragments(sock)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def tune_link(sock: socket.socket, silence: float) -> None:
    """Prepare a link for datagrams, which are better lost than late.

    Args:
        silence: seconds that bytes may go unacknowledged, at least LEAST_SILENCE. (Its far
            end always reads, so there is no slow reader that this could cut off.)
    """
    tcp.limit_silence(sock, max(silence, LEAST_SILENCE))
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_LINK)
