"""One session as the server holds it: a pool member, and how to talk to its client.

A value with a book of launches: `sessions` makes and seats it, `launches` writes into the book.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from nodepass.engine.relays import Relay, UdpRelay
from nodepass.protocol.proof import LinkKey
from nodepass.tunnel.control import Control
from nodepass.tunnel.pool import Member

LINK: Final = 2
"""Side of a relay that is the link; the other one is the visitor."""
PARTED: Final = 256
"""Links remembered after their relay: more than can fail within the time a signal takes."""


@dataclass(slots=True, eq=False)
class ConnectedClient(Member):
    """One client and its session."""

    id: str = ""
    name: str = ""
    host: str = ""
    key: LinkKey | None = field(default=None, repr=False)
    """None = its links prove nothing: it speaks the seed dialect."""
    control: Control | None = None
    has_drained: bool = False
    """Whether it has said that it is stopping."""
    brought: int = 0
    """Links of a seed client that have been given an id."""
    launched: dict[int | str, tuple[Relay | UdpRelay, float]] = field(default_factory=dict)
    """Open relays by link, each with the time of its launch in seconds of the loop."""
    parted: deque[int | str] = field(default_factory=lambda: deque(maxlen=PARTED))
    """Links whose relays have ended last: why they failed may come behind their reset."""
    _blamed: set[int | str] = field(default_factory=set)
    """Links in `launched` of which that is known already."""

    def has_link(self, name: int | str) -> bool:
        """Tell whether a link of this name is here in any way: idle, handed over, launched."""
        return name in self.idle_links or name in self.handed or name in self.launched

    def blame(self, name: int | str) -> bool:
        """Take note that the client has said why a launch failed; return whether it is news."""
        if name in self.launched and name not in self._blamed:
            self._blamed.add(name)
            return True
        if name in self.parted:
            self.parted.remove(name)
            return True
        return False

    def join(self, name: int | str, relay: Relay | UdpRelay, now: float) -> None:
        """Take note that a link has been launched, at seconds of the loop."""
        self.launched[name] = (relay, now)
        self.relays += 1

    def doubt_links(self, *, is_back: bool = False) -> None:
        """Have the engine find out which relays have lost their client.

        Args:
            is_back: the client is here again, so a link that does not even answer when it is
                asked is gone; otherwise its path may come back while nobody says anything.
        """
        for relay, _ in self.launched.values():
            relay.doubt(LINK, is_quiet=is_back)

    def part(self, name: int | str) -> None:
        """Take note that a relay has ended."""
        del self.launched[name]
        self.relays -= 1
        if name in self._blamed:
            self._blamed.remove(name)
        else:
            self.parted.append(name)
