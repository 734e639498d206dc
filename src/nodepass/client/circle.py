"""Notice a tunnel whose target leads back to its own visitors' port.

Such a visitor is dialled for, arrives as a visitor again, is dialled for again, and takes every
place of SEMAPHORE_LIMIT within a moment. The server says with its welcome where its visitors
arrive, so it is plain from the start which targets may lead there, and nobody else is looked at.
For those the proof is in the addresses: the new visitor comes from the very address that one of
our connections to that target has. Several tunnels of one process may stand between the two, so
the way back is followed from visitor to visitor.

Owns: the local addresses of this process' target connections while they are watched. Touches no
socket. Called by `session`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from nodepass.config.address import Address
from nodepass.protocol.messages import Kind

LONGEST: Final = 16
"""Tunnels that are followed back: nobody chains more of them in one process."""
_ANY: Final = frozenset({"", "0.0.0.0", "::"})  # noqa: S104

Source = tuple[Kind, str]
"""Local address of a target connection, as "ip:port"; TCP and UDP have ports of their own."""


class _Step(NamedTuple):
    """A watched target connection."""

    owner: Circle
    visitor: str
    """Address of the visitor whom it is for."""


_steps: dict[Source, _Step] = {}
_circles: set[Circle] = set()
"""Of this process, as its connections are; touched by its event loop alone."""


def _plain(address: str) -> str:
    """Take off the zone of a link-local address: each side has its own name for it."""
    host, mark, rest = address.partition("%")
    if not mark:
        return address
    return host + rest[rest.rfind("]:") :] if "]:" in rest else host


def _is_loopback(host: str) -> bool:
    return host in ("::1", "localhost") or host.startswith("127.")


class Circle:
    """What one client knows of its own target connections.

    Args:
        host: of the target, address or name; empty = this machine.
        port: of the target.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = Address(host or "localhost", port)
        self._arrival: Address | None = None
        self._is_one_machine = False
        self._is_near = False
        _circles.add(self)

    def learn(self, arrival: Address | None, *, is_one_machine: bool) -> None:
        """Take note of where the server's visitors arrive.

        Args:
            arrival: as the server says; None = it does not.
            is_one_machine: whether the server runs where we do.
        """
        self._arrival, self._is_one_machine = arrival, is_one_machine
        for circle in list(_circles):
            circle._is_near = any(map(circle._may_lead_to, list(_circles)))

    def close(self) -> None:
        """Be forgotten; idempotent."""
        _circles.discard(self)

    @property
    def is_near(self) -> bool:
        """Whether our target may be where visitors of this process' tunnels arrive."""
        return self._is_near

    def _may_lead_to(self, other: Circle) -> bool:
        there = other._arrival
        if there is None or there.port != self._target.port:
            return False
        here = self._target.host
        if _is_loopback(here) and not other._is_one_machine:
            return False  # ours, not the server's
        is_name = not (":" in here or here.replace(".", "").isdigit())
        return is_name or there.host in _ANY or there.host == here

    def begin(self, kind: Kind, source: str, visitor: str) -> Source:
        """Watch a target connection.

        Args:
            source: its local address, "ip:port".
            visitor: address of the visitor whom it is for.

        Returns:
            What `end` takes.
        """
        key = (kind, _plain(source))
        _steps[key] = _Step(self, _plain(visitor))
        return key

    def end(self, source: Source, visitor: str) -> None:
        """Watch a target connection no more; idempotent. Another may have its address by now."""
        if _steps.get(source) == _Step(self, _plain(visitor)):
            del _steps[source]

    def leads_back(self, kind: Kind, visitor: str) -> bool:
        """Tell whether a visitor is what has become of an earlier visitor of this client."""
        address, at = _plain(visitor), self
        for _ in range(LONGEST):
            step = _steps.get((kind, address))
            # The address alone is no proof: another machine may have it, or another connection.
            if step is None or not step.owner._may_lead_to(at):
                return False
            if step.owner is self:
                return True
            address, at = step.visitor, step.owner
        return False
