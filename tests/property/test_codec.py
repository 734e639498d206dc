"""A stream of TLS records, cut, merged, damaged and cut short, on both engines.

The other side gets the right bytes and an end, or fewer of them and a reset: never wrong or
additional bytes, never a clean end of a stream that was touched, never silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from dataclasses import dataclass

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.engine.conftest import kinds
from tests.kit.engine_rig import CHUNK, PATIENCE, Kind, Rig
from tests.kit.tls_rig import RECORD, SHAPES, End, Secured, TlsEnd, join

PATTERN = bytes(range(251)) * 1000
HEADER = 5
"""Bytes of a record before its ciphertext."""

SHORT = [3, 1, 4]
SHORT_BYTES = sum(SHORT) + (len(SHORT) + 1) * (HEADER + 17) + 2
"""Each record has a header, one byte of type and 16 of authentication; an alert has two."""

SIZES = st.one_of(st.integers(1, 60), st.sampled_from([1000, RECORD - 1, RECORD]))
CUTS = st.one_of(
    st.just([1 << 20]),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.lists(st.sampled_from([1, 4, 5, 6, 21, 22, 700, 20_000]), min_size=1, max_size=4),
)
WHOLE, TORN, FLIPPED, DROPPED, REPEATED, SWAPPED, STUFFED = range(7)
DAMAGE = st.sampled_from(
    [WHOLE, WHOLE, TORN, TORN, FLIPPED, FLIPPED, DROPPED, REPEATED, SWAPPED, STUFFED]
)


@dataclass(frozen=True)
class Stream:
    """What an honest end would send, as records, and what becomes of it on the way."""

    sizes: list[int]
    has_end: bool
    damage: int
    place: float
    """Where the damage is done, 0..1 of the stream."""

    def plain(self) -> bytes:
        return PATTERN[: sum(self.sizes)]

    def seal(self, end: TlsEnd) -> list[bytes]:
        """Return the honest records."""
        records, at = [], 0
        for size in self.sizes:
            records.append(end.seal(PATTERN[at : at + size]))
            at += size
        if self.has_end:
            records.append(end.seal_end())
        return records

    def damaged(self, records: list[bytes]) -> bytes:
        """Return what arrives."""
        index = int(self.place * len(records))
        one = records[index : index + 1]
        before, behind = records[:index], records[index + 1 :]
        whole = b"".join(records)
        at = int(self.place * len(whole))
        if self.damage == TORN:
            return whole[:at]
        if self.damage == FLIPPED:
            return whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :]
        if self.damage == DROPPED:
            return b"".join(before + behind)
        if self.damage == REPEATED:
            return b"".join(before + one + one + behind)
        if self.damage == SWAPPED:
            return b"".join(before + behind[:1] + one + behind[1:])
        if self.damage == STUFFED:
            return whole[:at] + b"\x17\x03\x03" + whole[at:]
        return whole


STREAMS = st.builds(
    Stream,
    st.lists(SIZES, min_size=1, max_size=6),
    st.booleans(),
    DAMAGE,
    st.floats(0, 0.9999),
)


async def deliver(rig: Rig, end: TlsEnd, data: bytes, cuts: list[int]) -> None:
    """Send bytes in pieces of these sizes, over and over, and a FIN."""
    at = turn = 0
    # The engine may reset the connection as soon as it has seen enough.
    with contextlib.suppress(ConnectionResetError, BrokenPipeError, OSError):
        while at < len(data):
            size = cuts[turn % len(cuts)]
            await rig.send(end.sock, data[at : at + size])
            await asyncio.sleep(0)
            at += size
            turn += 1
        end.sock.shutdown(socket.SHUT_WR)


async def hear_out(end: End) -> tuple[bytes, bool]:
    """Listen to the end: (bytes, whether it was a good one)."""
    heard = b""
    try:
        async with asyncio.timeout(PATIENCE):
            while part := await hear_some(end):
                heard += part
    except (ConnectionResetError, BrokenPipeError, ssl.SSLError):
        return heard, False
    return heard, True


async def hear_some(end: End) -> bytes:
    if isinstance(end, TlsEnd):
        return await end.hear_some(CHUNK)
    return await asyncio.get_running_loop().sock_recv(end.sock, CHUNK)


async def play(kind: Kind, shape: str, stream: Stream, cuts: list[int]) -> None:
    async with Rig(kind) as rig:
        flow: Secured = join(rig, shape)
        talker = flow.tls_end()
        listener = flow.other(talker)
        records = stream.seal(talker)
        assert stream.sizes != SHORT or sum(map(len, records)) == SHORT_BYTES
        data = stream.damaged(records)
        heard, is_good = (
            await asyncio.gather(hear_out(listener), deliver(rig, talker, data, cuts))
        )[0]
        plain = stream.plain()
        assert plain.startswith(heard)
        untouched = stream.has_end and data.startswith(b"".join(records))
        assert is_good == untouched
        if is_good:
            assert heard == plain
            await listener.end()
            ended = await rig.ended(flow.token)
            assert ended.reason == kind.module.REASON_FINISHED
        else:
            ended = await rig.ended(flow.token)
            assert ended.reason == kind.module.REASON_RESET
            assert ended.side == flow.side(talker)
            assert ended.code in {errno.EBADMSG, errno.ENODATA}
            # Whatever was whole before the damage has been delivered.
            assert len(heard) == whole_before(stream, records, data)
        assert {ended.up, ended.down} == {len(heard), 0}


def whole_before(stream: Stream, records: list[bytes], data: bytes) -> int:
    """Return how much plaintext lies in the records before the first that was touched."""
    total = at = 0
    for size, record in zip(stream.sizes, records, strict=False):
        if data[at : at + len(record)] != record:
            break
        at += len(record)
        total += size
    return total


# A failing stream is short enough as drawn; shrinking would wait for every hang again.
@settings(phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(stream=STREAMS, cuts=CUTS, shape=st.sampled_from(SHAPES))
async def test_streams(stream: Stream, cuts: list[int], shape: str) -> None:
    for kind in kinds():
        await play(kind, shape, stream, cuts)


@pytest.mark.parametrize("damage", [TORN, FLIPPED, STUFFED], ids=["torn", "flipped", "stuffed"])
async def test_damage_at_every_byte(damage: int) -> None:
    for kind in kinds():
        for at in range(SHORT_BYTES):
            stream = Stream(SHORT, True, damage, (at + 0.5) / SHORT_BYTES)
            await play(kind, SHAPES[at % 3], stream, [1 << 20])


async def test_cut_at_every_byte() -> None:
    for kind in kinds():
        for at in range(1, SHORT_BYTES):
            await play(kind, SHAPES[at % 3], Stream(SHORT, True, WHOLE, 0), [at, 1 << 20])
