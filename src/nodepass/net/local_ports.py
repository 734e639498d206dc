"""Local ports of outgoing connections: what is done before they run out.

A connection that this side ended first keeps its local port for a minute (TIME-WAIT), and the
kernel gives each connection to one address a port of its own. So a few hundred short connections
in a second use all of them up. A socket that is *bound* to a port may be connected from it again
although that minute is not over, as long as both ends send TCP timestamps, which Linux does unless
told otherwise. So where connections to one address come fast, a quarter of the ports is used in
turn. The other three quarters stay with the rest of the machine: the kernel gives a port that was
bound by hand to nobody else.

Owns: how often each address was dialled of late, and whose turn it is. Touches no socket; `tcp`
binds and connects.

    FRESH ──dialled often──> MARKED ──oftener──> BOUND ──slack again──> FRESH
                                └──a port could not be had──^
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Final

from nodepass.observe.log import Log

PERIOD: Final = 30.0
"""Seconds: half of the time for which Linux keeps a connection in TIME-WAIT. Dials are counted in
this period and the last one, so those of 30 to 60 s."""
MARK_SHARE: Final = 1 / 16
"""Of the ports: dials of one address beyond which sockets are made such that their port can be
used again. They have to be so when they are made; it is a system call that nobody else needs."""
BIND_SHARE: Final = 1 / 4
"""Of the ports: dials of one address beyond which old ports are used again, and how many are.
Beyond that the kernel's own search takes longer and longer, too."""
TRIES: Final = 16
"""Ports that are tried for one connection: even with half of them in use one in 65,536 fails."""
MAX_ADDRESSES: Final = 64
"""Addresses that dials are counted of: the server, and those of the target's name."""
DEFAULT_RANGE: Final = (32768, 60999)
"""Linux' own."""
HINT: Final = "see Local ports in docs/operations.md"
_SYSCTL: Final = Path("/proc/sys/net/ipv4")
_IS_LINUX: Final = sys.platform == "linux"
"""Elsewhere SO_REUSEADDR means other things."""


class Need(Enum):
    """What a new connection to an address needs."""

    FRESH = "fresh"
    """Nothing: the kernel chooses among plenty."""
    MARKED = "marked"
    """To be made such that its port can be used again."""
    BOUND = "bound"
    """A port that was used before."""


class _Address:
    """How often an address is dialled."""

    __slots__ = ("at", "before", "is_short", "now")

    def __init__(self, at: float) -> None:
        self.at = at
        self.now = 0
        self.before = 0
        self.is_short = False
        """Whether a port could not be had."""

    def turn(self, now: float) -> None:
        """Begin a new period."""
        is_recent = now - self.at < 2 * PERIOD
        self.before = self.now - 1 if is_recent else 0
        self.now = 1  # the dial that is being counted
        self.at = now
        self.is_short = False


class LocalPorts:
    """The local ports of this process' connections to other machines."""

    def __init__(self) -> None:
        self._addresses: dict[tuple[str, int], _Address] = {}
        self._ports: list[int] = []
        self._at = 0
        self._mark = self._bind = 0

    def note(self, host: str, port: int) -> Need:
        """Count a dial of an address; return what it needs."""
        if not _IS_LINUX or host == "::1" or host.startswith("127."):
            # Within a machine Linux does it all by itself, unless somebody has set tcp_tw_reuse=0.
            return Need.FRESH
        address = self._addresses.get((host, port)) or self._meet(host, port)
        address.now += 1
        if address.before + address.now <= self._mark and not address.is_short:
            return Need.FRESH
        now = time.monotonic()
        if now - address.at >= PERIOD:
            address.turn(now)
        dials = address.before + address.now
        if dials > self._bind or address.is_short:
            self._tell(host, port, dials)
            return Need.BOUND
        return Need.MARKED if dials > self._mark else Need.FRESH

    def _tell(self, host: str, port: int, dials: int) -> None:
        """Warn long before anything fails: a quarter of the ports has gone in a minute."""
        _log.repeated(
            "warn",
            f"ports {host}",
            "local ports are used again before their minute is over, so many connections are made",
            address=_shown(host, port),
            last_minute=dials,
            hint=HINT,
        )

    def choose(self) -> Iterator[int]:
        """Return a few ports, each tried only if the last would not do.

        They come in turn, so that the one that was used longest ago is next. Those beside one that
        is in use are likely to be so, too: links that were made together lie idle together.
        """
        for _ in range(TRIES):
            if not self._at:
                self._ports = self._read_range()
                self._at = len(self._ports)
            if not self._at:
                return
            self._at -= 1
            yield self._ports[self._at]
            self._at = random.randrange(len(self._ports))  # noqa: S311 - nothing secret

    def miss(self, host: str, port: int) -> bool:
        """Take it that no port could be had for an address; return whether that is news."""
        if not _IS_LINUX:
            return False
        address = self._addresses.get((host, port)) or self._meet(host, port)
        is_news, address.is_short = not address.is_short, True
        _log.repeated(
            "warn",
            f"ports {host}",
            "local ports run short: connections are made faster than their ports come free again",
            address=_shown(host, port),
            last_minute=address.before + address.now,
            hint=HINT,
        )
        return is_news

    def _meet(self, host: str, port: int) -> _Address:
        if len(self._addresses) >= MAX_ADDRESSES:
            del self._addresses[next(iter(self._addresses))]
        self._read_range()
        address = self._addresses[host, port] = _Address(time.monotonic())
        return address

    def _read_range(self) -> list[int]:
        """Take note of what the kernel chooses from; return the ports that we may use in turn."""
        first, last = DEFAULT_RANGE
        with contextlib.suppress(OSError, ValueError):
            first, last = map(int, (_SYSCTL / "ip_local_port_range").read_text().split())
        size = last + 1 - first
        self._mark, self._bind = int(size * MARK_SHARE), int(size * BIND_SHARE)
        reserved: set[int] = set()
        with contextlib.suppress(OSError, ValueError):
            for part in (_SYSCTL / "ip_local_reserved_ports").read_text().strip().split(","):
                low, _, high = part.partition("-")
                reserved.update(range(int(low), int(high or low) + 1))
        return [port for port in range(last + 1 - self._bind, last + 1) if port not in reserved]


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


LOCAL_PORTS: Final = LocalPorts()
"""Of this process, as its connections are."""
_log: Final = Log("localport")
