"""Lost datagrams in the log: at once, then one line a minute for each cause, with what to do.

Owns: which losses have been told. Called by `base`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .log import REPEAT_PAUSE, Log
from .stats import Datagrams

CAUSES: Final[dict[str, str]] = {
    "too_large": "datagrams dropped: longer than UDP_DATA_BUF_SIZE",
    "slow_link": "datagrams dropped: they come faster than the tunnel takes them",
    "no_link": "datagrams dropped: their source had no link in time",
    "overrun": "datagrams dropped by the kernel: its receive buffer was full",
    "unsent": "datagrams dropped: the kernel would not send them",
    "refused": "nobody listens at the target",
}
"""What is counted, and the line about it."""

HINTS: Final[dict[str, str]] = {
    "too_large": "raise UDP_DATA_BUF_SIZE on the side that drops",
    "no_link": "a client must be connected; raise SEMAPHORE_LIMIT if as many visitors are served",
    "overrun": "raise net.core.rmem_max, or send in smaller bursts",
    "unsent": "look at the firewall and the routes of this machine",
    "refused": "start the service, or correct the client's target",
}


class DropReport:
    """Tell of losses as they are counted.

    Args:
        log: where to.
        fields: for some causes, what else belongs into the line.
    """

    def __init__(self, log: Log, fields: Callable[[str], dict[str, object]]) -> None:
        self._log = log
        self._fields = fields
        self._told = dict.fromkeys(CAUSES, 0)
        self._told_at: dict[str, float] = {}

    def look(self, datagrams: Datagrams, now: float, *, is_last: bool = False) -> None:
        """Tell what has been lost since the last line about it.

        Args:
            datagrams: the counts so far.
            now: seconds of a steady clock.
            is_last: there will be no other look, so nothing is saved for later.
        """
        for cause, message in CAUSES.items():
            count = getattr(datagrams, cause) - self._told[cause]
            last = self._told_at.get(cause)
            if count <= 0 or (last is not None and now - last < REPEAT_PAUSE and not is_last):
                continue
            self._told[cause] += count
            self._told_at[cause] = now
            fields = {"count": count, **self._fields(cause)}
            if cause in HINTS:
                fields["hint"] = HINTS[cause]
            self._log.warn(message, **fields)
