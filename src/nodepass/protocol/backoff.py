"""Pauses between tries that fail. Pure: chance and the clock are arguments."""

from __future__ import annotations

from typing import Final

BACKOFF_FIRST: Final = 0.1
"""Seconds, ceiling of the first reconnect pause: below what a person notices."""


class Backoff:
    """Pauses between tries: doubling ceilings, each drawn in full from zero (full jitter).

    Args:
        ceiling: seconds, the longest pause.
    """

    def __init__(self, ceiling: float) -> None:
        self._ceiling = ceiling
        self._tries = 0

    def next_pause(self, fraction: float) -> float:
        """Return seconds to wait; `fraction` is random, 0 <= fraction < 1."""
        bound = min(self._ceiling, BACKOFF_FIRST * 2.0 ** min(self._tries, 32))
        self._tries += 1
        return fraction * bound

    def reset_after(self, lasted: float) -> None:
        """Start over if what ended had lasted for a stable period, seconds."""
        if lasted >= self._ceiling:
            self.reset()

    def reset(self) -> None:
        """Start over."""
        self._tries = 0
