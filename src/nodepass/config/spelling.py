"""Words that were meant otherwise: which known one is near.

Pure text. `environment` looks for misspelt variables with it, `url` and `main` name in an
error what may have been meant.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["distance", "suggest"]


def distance(one: str, other: str) -> int:
    """Count the slips between two words: a letter too many, missing, wrong, or two swapped.

    Source: the "optimal string alignment" form of the Damerau-Levenshtein distance.
    """
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        earlier, before, row = before, row, [i]
        for j, wanted in enumerate(other, 1):
            least = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                least = min(least, earlier[j - 2] + 1)
            row.append(least)
    return row[-1]


def suggest(wrong: str, known: Iterable[str]) -> str:
    """Name the nearest of what is known, or all of it."""
    from difflib import get_close_matches

    known = list(known)
    near = get_close_matches(wrong, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
