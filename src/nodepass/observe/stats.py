"""Counters of one tunnel, and the line that reports them.

One writer: the tunnel's own loop. Imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple


class Datagrams(NamedTuple):
    """What became of datagrams since the start; "up" is from visitors towards the target."""

    up: int = 0
    """Carried on."""
    down: int = 0
    bytes_up: int = 0
    """Bytes of those, without headers."""
    bytes_down: int = 0
    too_large: int = 0
    """Dropped: longer than UDP_DATA_BUF_SIZE."""
    slow_link: int = 0
    """Dropped: the link did not take them fast enough, or broke."""
    no_link: int = 0
    """Dropped: their source had no link in time."""
    overrun: int = 0
    """Dropped by the kernel, whose receive buffer was full."""
    unsent: int = 0
    """Dropped: the kernel would not send them."""
    refused: int = 0
    """Times that nobody listened at the target."""

    @classmethod
    def total(cls, parts: Iterable[Datagrams]) -> Datagrams:
        """Return the sum of some counts, field by field."""
        return cls(*map(sum, zip(cls(), *parts, strict=True)))

    @property
    def dropped(self) -> int:
        """All that were lost on the way, whatever the cause."""
        return self.too_large + self.slow_link + self.no_link + self.overrun + self.unsent


NOTHING: Final = Datagrams()


@dataclass(slots=True)
class Counters:
    """What has happened since the tunnel started; each only ever grows."""

    visitors: int = 0
    visitors_refused: int = 0
    relays_reset: int = 0
    launches_failed: int = 0
    sessions: int = 0
    links: int = 0
    links_lost: int = 0
    strangers: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    datagrams: Datagrams = NOTHING
    """Of the UDP relays that have ended."""


class Gauges(NamedTuple):
    """What a tunnel has at this moment, as only its kind can tell; see `TunnelStatistics`."""

    sessions_open: int
    visitors_open: int
    visitors_waiting: int
    links_idle: int
    links_wanted: int
    rtt: float | None


@dataclass(frozen=True, slots=True)
class TunnelStatistics:
    """One look at a tunnel; counts since its start unless a field says "now"."""

    mode: str
    """"server" or "client"."""
    sessions_open: int
    """Now: clients connected to a server; 1 or 0 on a client."""
    sessions: int
    visitors_open: int
    """Now: visitors served or waiting for a link."""
    visitors_waiting: int
    """Now: visitors without a link."""
    visitors: int
    visitors_refused: int
    """Visitors reset because no link came in time or the target could not be reached."""
    relays_open: int
    """Now: joined pairs; on a client also links whose target is being dialled."""
    relays_reset: int
    """Relays that ended by an error or a reset instead of two clean ends."""
    launches_failed: int
    links_idle: int
    """Now: links that lie ready."""
    links_wanted: int
    """Now: links that should lie ready."""
    links: int
    links_lost: int
    """Links that died while they lay ready."""
    strangers: int
    """Connections turned away: silent, garbage, unproven, or over a limit."""
    bytes_up: int
    """Bytes from visitors to the target, open relays included, TCP and UDP."""
    bytes_down: int
    """Bytes from the target to visitors, open relays included."""
    datagrams: Datagrams
    """What became of datagrams, those of open relays included."""
    rtt: float | None
    """Now: seconds to the other side and back, the least of all sessions; None = not known."""

    def report(self) -> dict[str, object]:
        """Return the fields of the report line, in its order."""
        return {
            "sessions": self.sessions_open,
            "visitors": self.visitors_open,
            "waiting": self.visitors_waiting,
            "relays": self.relays_open,
            "idle": self.links_idle,
            "wanted": self.links_wanted,
            "up": self.bytes_up,
            "down": self.bytes_down,
            "datagrams": self.datagrams.up + self.datagrams.down,
            "dropped": self.datagrams.dropped,
            "rtt_ms": "-" if self.rtt is None else f"{self.rtt * 1000:.1f}",
        }


def least_rtt(rtts: Iterable[float | None]) -> float | None:
    """Return the least round-trip time, seconds, that is known."""
    return min((rtt for rtt in rtts if rtt is not None), default=None)
