"""What the engine's UDP tests say and by what: frames, and sockets in the hands of a test."""

from __future__ import annotations

import contextlib
import socket
import ssl

from OpenSSL import SSL
from tests.kit.tls_rig import End, TlsEnd, our_end

HEADER = 2
"""Bytes in front of a datagram on a link."""

BIG_BUFFER = 4 << 20
"""Receive buffer asked for, so that nothing is lost to a full one; the kernel may grant less."""

MAX_PAYLOAD = 65507
"""Bytes in the largest datagram of IPv4."""

HOST = "127.0.0.1"
ANY = "0.0.0.0"

DROPS = ("too_large", "slow_link", "no_link", "overrun", "unsent")
"""Counts of datagrams that were lost."""


def has_ipv6() -> bool:
    """Tell whether ::1 can be bound here."""
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def frame(data: bytes) -> bytes:
    """Return a datagram as it stands on a link."""
    return len(data).to_bytes(HEADER, "big") + data


def frames(*datagrams: bytes) -> bytes:
    """Return several datagrams as they stand on a link."""
    return b"".join(map(frame, datagrams))


def unframe(stream: bytes) -> list[bytes]:
    """Return the datagrams of a stream of whole frames."""
    found = []
    while stream:
        assert len(stream) >= HEADER, "the stream ends inside a header"
        end = HEADER + int.from_bytes(stream[:HEADER], "big")
        assert len(stream) >= end, "the stream ends inside a datagram"
        found.append(stream[HEADER:end])
        stream = stream[end:]
    return found


async def hear_frame(end: End) -> bytes:
    """Receive one frame from a link and return its datagram."""
    header = await end.hear(HEADER)
    assert len(header) == HEADER, "the link ended"
    size = int.from_bytes(header, "big")
    data = await end.hear(size)
    assert len(data) == size, "the link ended inside a frame"
    return data


async def hear_frames(end: End, count: int) -> list[bytes]:
    """Receive so many frames."""
    return [await hear_frame(end) for _ in range(count)]


async def hear_to_fin(end: End) -> bytes:
    """Receive up to a FIN, with or without a close_notify of TLS before it; a RST is an error."""
    parts = []
    with contextlib.suppress(ssl.SSLEOFError):
        while part := await end.hear(1):
            parts.append(part)
    return b"".join(parts)


def udp_socket(
    host: str = HOST, port: int = 0, *, is_dual: bool = False, rcvbuf: int = BIG_BUFFER
) -> socket.socket:
    """Return a bound non-blocking UDP socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    sock.setblocking(False)
    sock.bind((host, port))
    return sock


def udp_pair(host: str = HOST) -> tuple[socket.socket, socket.socket]:
    """Return two UDP sockets connected to each other."""
    outer, inner = udp_socket(host), udp_socket(host)
    outer.connect(inner.getsockname())
    inner.connect(outer.getsockname())
    return outer, inner


def unix_datagrams() -> tuple[socket.socket, socket.socket]:
    """Return two connected AF_UNIX datagram sockets: unlike UDP on loopback, these can be full."""
    outer, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    outer.setblocking(False)
    inner.setblocking(False)
    return outer, inner


def closed_target(host: str = HOST) -> socket.socket:
    """Return a UDP socket connected to a port where nobody listens."""
    with udp_socket(host) as gone:
        sock = udp_socket(host)
        sock.connect(gone.getsockname())
    return sock


def secure_pair() -> tuple[SSL.Connection, SSL.Connection]:
    """Return (server, client), our own both, their handshake done in memory."""
    server, client = our_end(True), our_end(False)
    is_done = {server: False, client: False}
    while not all(is_done.values()):
        for one, other in ((client, server), (server, client)):
            with contextlib.suppress(SSL.WantReadError):
                one.do_handshake()
                is_done[one] = True
            with contextlib.suppress(SSL.WantReadError):
                while True:
                    other.bio_write(one.bio_read(1 << 16))
    return server, client


def tls_end(end: End) -> TlsEnd:
    """Return an end that speaks TLS."""
    assert isinstance(end, TlsEnd)
    return end
