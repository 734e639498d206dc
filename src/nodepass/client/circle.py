"""Notice a tunnel whose target leads back to its own visitors' port.

Such a visitor is dialled for, arrives as a visitor again, is dialled for again, and takes every
place of SEMAPHORE_LIMIT within a moment. The proof is in the addresses: the new visitor comes from
the very address that one of our connections to the target has. Several tunnels of one process may
stand between the two, so the way back is followed from visitor to visitor.

It would cost every visitor something to keep those addresses, so that is done only where it may be
of use: while many visitors are open at once, for visitors who come from a host that our own
connections leave from.

Owns: the local addresses of this process' target connections while they are watched. Touches no
socket. Called by `session`.
"""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from nodepass.protocol.messages import Kind

SHARE: Final = 1 / 8
"""Of SEMAPHORE_LIMIT: visitors open beyond which a circle is looked for. One is through that in a
tenth of a second, and the other places are still free by then."""
LEAST: Final = 8
"""Visitors, however small the limit."""
ALARM: Final = 60.0
"""Seconds after a circle was found in which every visitor is looked at: he may try again."""
MAX_HOSTS: Final = 64
"""Addresses of this machine that are remembered: it rarely has more."""
LONGEST: Final = 16
"""Tunnels that are followed back: nobody chains more of them in one process."""

Source = tuple[Kind, str]
"""Local address of a target connection, as "ip:port"; TCP and UDP have ports of their own."""


class _Step(NamedTuple):
    """A watched target connection."""

    owner: Circle
    visitor: str
    """Address of the visitor whom it is for."""


_steps: dict[Source, _Step] = {}
_hosts: dict[str, None] = {}
"""Of this process, as its connections are; touched by its event loop alone."""


def _plain(address: str) -> str:
    """Take off the zone of a link-local address: each side has its own name for it."""
    host, mark, rest = address.partition("%")
    if not mark:
        return address
    return host + rest[rest.rfind("]:") :] if "]:" in rest else host


def _host_of(address: str) -> str:
    return _plain(address).rpartition(":")[0]


class Circle:
    """What one client knows of its own target connections.

    Args:
        limit: visitors that may be open at once.
    """

    def __init__(self, limit: int) -> None:
        self._least = max(LEAST, int(limit * SHARE))
        self._alarmed_until = 0.0

    def is_near(self, visitor: str, count: int) -> bool:
        """Tell whether a visitor is worth a look.

        Args:
            visitor: address as the server gives it, "ip:port"; empty = unknown.
            count: visitors that are open.
        """
        if count < self._least and not self._alarmed_until:
            return False  # nearly always
        if not visitor:
            return False
        if count < self._least and time.monotonic() > self._alarmed_until:
            self._alarmed_until = 0.0
            return False
        return not _hosts or _host_of(visitor) in _hosts

    def begin(self, kind: Kind, source: str, visitor: str) -> Source:
        """Watch a target connection.

        Args:
            source: its local address, "ip:port".
            visitor: address of the visitor whom it is for.

        Returns:
            What `end` takes.
        """
        address = _plain(source)
        _hosts[_host_of(address)] = None
        while len(_hosts) > MAX_HOSTS:
            del _hosts[next(iter(_hosts))]
        _steps[kind, address] = _Step(self, _plain(visitor))
        return kind, address

    def end(self, source: Source) -> None:
        """Watch a target connection no more; idempotent."""
        step = _steps.get(source)
        if step is not None and step.owner is self:
            del _steps[source]

    def leads_back(self, kind: Kind, visitor: str) -> bool:
        """Tell whether a visitor is what has become of an earlier visitor of this client."""
        address = _plain(visitor)
        for _ in range(LONGEST):
            step = _steps.get((kind, address))
            if step is None:
                return False
            if step.owner is self:
                self._alarmed_until = time.monotonic() + ALARM
                return True
            address = step.visitor
        return False
