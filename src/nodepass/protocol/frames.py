"""Frames: how datagrams stand on a link, each behind its length. Sans-IO."""

from __future__ import annotations

from typing import Final

from .fields import require

MAX_DATAGRAM: Final = 65535
"""Bytes: what the 2-byte length of a frame can say."""


def pack_frame(datagram: bytes) -> bytes:
    """Put a datagram into a frame: 2-byte big-endian length, then the bytes."""
    require(len(datagram) <= MAX_DATAGRAM, f"frame: datagram over {MAX_DATAGRAM} bytes")
    return len(datagram).to_bytes(2, "big") + datagram


class FrameBuffer:
    """Cut a byte stream back into the datagrams that were framed into it."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Append bytes as they came; return the datagrams that are whole now, in order."""
        self._data += data
        datagrams = []
        start = 0
        while len(self._data) - start >= 2:
            end = start + 2 + int.from_bytes(self._data[start : start + 2], "big")
            if len(self._data) < end:
                break
            datagrams.append(bytes(self._data[start + 2 : end]))
            start = end
        del self._data[:start]
        return datagrams

    @property
    def has_rest(self) -> bool:
        """Whether the stream stands in the middle of a frame."""
        return bool(self._data)
