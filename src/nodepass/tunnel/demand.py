"""How many idle links a session should have, from how fast they are taken.

Pure: the clock is an argument. Called by both ends.
"""

from __future__ import annotations

from typing import Final

DEMAND_WINDOW: Final = 0.25
"""Seconds of launches that the idle links must cover: replacing one takes 2.5 round trips,
which is this much on a path of 100 ms."""
DEMAND_MARGIN: Final = 2
"""Idle links per launch of the busiest recent window: bursts are uneven."""
GROWTH: Final = 1.25
"""Least factor of a raise, so that a rising rate does not cost a signal per launch."""
DECAY: Final = 0.75
"""What is kept of a surplus each quiet period: a lull of seconds must not undo the stock."""


class Demand:
    """Follow how many links are taken and say how many should lie ready.

    Args:
        least: never fewer.
        most: never more.
        now: seconds.
    """

    def __init__(self, least: int, most: int, now: float) -> None:
        self._least = least
        self._most = most
        self._window_at = now
        self._count = 0
        self._need = least
        self.wanted = least
        """Idle links that should lie ready now."""

    def count_launch(self, now: float) -> bool:
        """Count one launch; return whether more links are wanted than before."""
        if now - self._window_at >= DEMAND_WINDOW:
            self._window_at = now
            self._count = 0
        self._count += 1
        return self._raise_to(self._least + DEMAND_MARGIN * self._count)

    def count_waiting(self, waiting: int) -> bool:
        """Take note of visitors that found no link; return whether more links are wanted."""
        return self._raise_to(self._least + waiting)

    def end_period(self) -> int:
        """Look back on a report period; return by how many links the wish has shrunk."""
        goal = min(self._most, self._need)
        self._need = self._least
        if goal >= self.wanted:
            return 0
        before = self.wanted
        self.wanted = max(goal, int(before * DECAY))
        return before - self.wanted

    def _raise_to(self, need: int) -> bool:
        self._need = max(self._need, need)
        if need <= self.wanted or self.wanted >= self._most:
            return False
        self.wanted = min(self._most, max(need, int(self.wanted * GROWTH)))
        self._need = self.wanted
        return True
