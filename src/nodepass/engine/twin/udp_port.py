"""The slow twin's UDP sockets: datagrams with what the kernel remarks on them, and their counts.

Part of `engine`, which describes the whole; nobody else comes here. Elsewhere than on Linux
answers leave from the address that the kernel chooses, and overruns are not counted: Windows has
no recvmsg, and others mean other things by these options.

Ground floor.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple

from nodepass.engine.types import UdpCounts

HAS_REMARKS: Final = sys.platform == "linux"
"""Whether the kernel's remarks are asked for."""
# Python has no names for the first two; the numbers are Linux's (asm/socket.h, linux/in.h).
SO_RXQ_OVFL: Final = 40
IP_PKTINFO: Final = 8
IPV6_PKTINFO: Final[int] = getattr(socket, "IPV6_PKTINFO", 50)
IPV6_RECVPKTINFO: Final[int] = getattr(socket, "IPV6_RECVPKTINFO", 49)

PKTINFO: Final = struct.Struct("=i4s4s")  # ip(7): interface, address of ours, address written to
PKTINFO6: Final = struct.Struct("=16si")  # ipv6(7): address written to, interface
DROPS: Final = struct.Struct("=I")  # socket(7): datagrams dropped since the socket was made
DROPS_MASK: Final = 0xFFFFFFFF
REMARKS_BYTES: Final = 128  # room for all three: headers of 16 bytes, bodies of at most 20

WILDCARDS: Final = ("0.0.0.0", "::")  # noqa: S104 -- looked for, not bound
MAX_PAYLOAD: Final = 65507  # bytes in the largest datagram of IPv4

Remark = tuple[int, int, bytes]
"""(level, type, data) of an ancillary message, ready for sendmsg."""


@dataclass(slots=True)
class Tally:
    """Counts that still run, field by field those of UdpCounts."""

    datagrams_up: int = 0
    datagrams_down: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    too_large: int = 0
    slow_link: int = 0
    no_link: int = 0
    overrun: int = 0
    unsent: int = 0
    refused: int = 0

    def counts(self) -> UdpCounts:
        """Return the counts as they are now."""
        return UdpCounts(*(getattr(self, field.name) for field in fields(self)))

    def add(self, counts: UdpCounts) -> None:
        """Add the counts of something that has ended."""
        for name, value in counts._asdict().items():
            setattr(self, name, getattr(self, name) + value)

    def go_up(self, data: bytes) -> None:
        """Count a datagram carried towards the target."""
        self.datagrams_up += 1
        self.bytes_up += len(data)

    def go_down(self, data: bytes) -> None:
        """Count a datagram carried towards the visitor."""
        self.datagrams_down += 1
        self.bytes_down += len(data)

    def lose(self) -> None:
        """Count a datagram that the kernel would not send."""
        self.unsent += 1


def dropped(counts: UdpCounts) -> int:
    """Return how many datagrams were lost; `refused` are answers, not datagrams."""
    return counts.too_large + counts.slow_link + counts.no_link + counts.overrun + counts.unsent


class Parcel(NamedTuple):
    """One datagram as received."""

    data: bytes
    is_whole: bool
    """Whether it is within the limit; `data` is cut otherwise."""
    address: Any
    """The source, as the socket module says it."""
    local: Remark | None
    """What makes an answer leave from the address that was written to, if that is in doubt."""


class UdpPort:
    """A UDP socket.

    Args:
        sock: bound or connected.
        limit: longest datagram, bytes.
        tally: where overruns are counted.
    """

    __slots__ = ("_drops", "_limit", "_tally", "sock")

    def __init__(self, sock: socket.socket, limit: int, tally: Tally) -> None:
        self.sock = sock
        self._limit = limit
        self._tally = tally
        self._drops = 0
        """What the kernel said last; it counts in 32 bits."""
        if not HAS_REMARKS:
            return
        self._ask(socket.SOL_SOCKET, SO_RXQ_OVFL)
        if sock.family in {socket.AF_INET, socket.AF_INET6} and is_wildcard(sock):
            if sock.family == socket.AF_INET:
                self._ask(socket.IPPROTO_IP, IP_PKTINFO)
            else:
                self._ask(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO)

    def _ask(self, level: int, option: int) -> None:
        with contextlib.suppress(OSError):  # a kernel may be old, or built without IPv6
            self.sock.setsockopt(level, option, 1)

    def receive(self) -> Parcel:
        """Return the next datagram.

        Raises:
            BlockingIOError: there is none.
            OSError: an error that an earlier datagram met.
        """
        room = self._limit + 1  # one byte more tells too long from just right
        if not HAS_REMARKS:
            return self._receive_bare(room)
        data, remarks, flags, address = self.sock.recvmsg(room, REMARKS_BYTES)
        local: Remark | None = None
        for level, kind, body in remarks:
            if (level, kind) == (socket.SOL_SOCKET, SO_RXQ_OVFL):
                self._note_drops(DROPS.unpack_from(body)[0])
            else:
                local = local or answering(level, kind, body)
        is_whole = len(data) < room and not flags & socket.MSG_TRUNC
        return Parcel(data, is_whole, address, local)

    def _receive_bare(self, room: int) -> Parcel:
        try:
            data, address = self.sock.recvfrom(room)
        except OSError as exc:
            if exc.errno != errno.EMSGSIZE:  # how Windows says MSG_TRUNC
                raise
            return Parcel(b"", False, None, None)
        return Parcel(data, len(data) < room, address, None)

    def _note_drops(self, drops: int) -> None:
        self._tally.overrun += (drops - self._drops) & DROPS_MASK
        self._drops = drops

    def send(self, data: bytes, address: Any = None, local: Remark | None = None) -> None:
        """Send a datagram; without an address over a connected socket.

        Raises:
            BlockingIOError: no room for now.
            OSError: it is lost, or (ECONNREFUSED) an earlier one was.
        """
        if address is None:
            self.sock.send(data)
        elif local is None:
            self.sock.sendto(data, address)
        else:
            self.sock.sendmsg([data], [local], 0, address)


def is_wildcard(sock: socket.socket) -> bool:
    """Tell whether a socket receives what is sent to any address of this machine."""
    return sock.getsockname()[0] in WILDCARDS


def answering(level: int, kind: int, body: bytes) -> Remark | None:
    """Turn the kernel's word on where a datagram came in into a wish where to leave."""
    if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
        _, ours, _ = PKTINFO.unpack_from(body)
        # No interface: the way back is the routing table's business.
        return level, kind, PKTINFO.pack(0, ours, bytes(4))
    if (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
        ours, interface = PKTINFO6.unpack_from(body)
        if ours[0] == 0xFF:  # multicast: nothing can leave from there
            return None
        is_link_local = ours[0] == 0xFE and ours[1] & 0xC0 == 0x80  # RFC 4291, section 2.5.6
        return level, kind, PKTINFO6.pack(ours, interface if is_link_local else 0)
    return None
