"""How many files this process may have open, and what they are shared out to."""

from __future__ import annotations

from typing import Final, NamedTuple

RESERVED_DESCRIPTORS: Final = 96
"""Files kept back for listeners, engine, control channels and a few pipes."""
DESCRIPTORS_PER_VISITOR: Final = 2
"""Its connection and the link."""
IDLE_ROOM: Final = 2
"""Idle links a client may bring per link that it is asked for; the wish may have shrunk since."""
UNLIMITED_DESCRIPTORS: Final = 1 << 20
"""Stands for "no limit": Linux' own ceiling for a process (fs.nr_open)."""


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
