"""The recorded conversations of tests/data, as values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parents[1] / "data"


class Row(NamedTuple):
    """Bytes that one side of the reference program wrote at once."""

    channel: str
    """"control", "data0", "data1", … in the order of dialling, or "target"."""
    direction: str
    """"s>c" or "c>s" between server and client, "c>t" or "t>c" at the target."""
    data: bytes
    """Empty: the end of that direction, or silence; the note says which."""
    note: str


def recording(name: str) -> list[Row]:
    """Return the rows of one conversation, in the order of their time."""
    rows = json.loads((DATA / f"{name}.json").read_text())
    for row in rows:
        assert row["text"].encode("latin-1") == bytes.fromhex(row["hex"]), row
    assert [row["t"] for row in rows] == sorted(row["t"] for row in rows)
    return [
        Row(row["channel"], row["dir"], bytes.fromhex(row["hex"]), row["note"]) for row in rows
    ]


def written(rows: list[Row], channel: str, direction: str) -> bytes:
    """Return all that went over one channel in one direction."""
    return b"".join(r.data for r in rows if (r.channel, r.direction) == (channel, direction))
