"""First lines, and a street of those who say them."""

from __future__ import annotations

from tests.kit.acceptor_desk import Street
from tests.kit.timing import until

from nodepass.protocol import lines
from nodepass.protocol.messages import Hello, LinkClaim

HELLO = lines.pack_hello(Hello("somebody", b"n" * 16))


CLAIM = lines.pack_link_claim(LinkClaim("ab" * 8, 7, b"p" * 32))


def street(kind: str, timeout: float = 30.0, *, level: str = "none", data_port: int = 0) -> Street:
    return Street(timeout, level=level, data_port=data_port, kind=kind, is_secure=True)


async def gone(street: Street) -> None:
    """Wait until nobody stands here, nothing is lent, and the sockets are closed."""
    await until(lambda: not len(street.acceptor), 5, "their going")
    await until(lambda: not len(street.relays), 5, "the engine's leave")
    await until(lambda: all(sock.fileno() < 0 for sock in street._given), 5, "closed sockets")
