"""How long a source has to wait after it has failed to prove itself.

Guessing a password online costs the guesser time, and nobody else: a source that has never
failed never waits. What is remembered is bounded, however many sources there are.

Pure: the clock is an argument. Called by `acceptor` and `sessions`.
"""

from __future__ import annotations

from typing import Final

FIRST_DELAY: Final = 0.25
"""Seconds after the first failure: a mistyped password is no attack."""
LONGEST_DELAY: Final = 2.0
"""Seconds: with it, a client still gets its answer before its own time-out of 5 s, and 64
connections of one source make 32 guesses a second, 10^9 in a year."""
FORGET_AFTER: Final = 60.0
"""Seconds without a failure after which a source starts over."""
MAX_SOURCES: Final = 4096
"""Sources remembered, the longest quiet ones forgotten first: some 0.5 MiB."""


class Throttle:
    """Failures by source, as `tcp.source_of` names it."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._failures)

    def fail(self, source: str, now: float) -> None:
        """Note a failed proof.

        Args:
            now: seconds of any clock that does not jump.
        """
        count = self._count(source, now) + 1
        self._failures.pop(source, None)
        if len(self._failures) >= MAX_SOURCES:
            del self._failures[next(iter(self._failures))]
        self._failures[source] = (count, now)

    def delay(self, source: str, now: float) -> float:
        """Return for how many seconds a proof of this source has to wait."""
        count = self._count(source, now)
        if not count:
            return 0.0
        return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(count - 1, 16))

    def _count(self, source: str, now: float) -> int:
        count, last = self._failures.get(source, (0, now))
        if now - last >= FORGET_AFTER:
            self._failures.pop(source, None)
            return 0
        return count
