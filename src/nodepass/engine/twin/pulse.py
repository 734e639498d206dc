"""The slow twin's look at what has come back from the far end of a connection.

Part of `engine`, which describes the whole; nobody else comes here. The rules, and why they are
so, stand in fastcopy/pulse.pxi; the figures here are the same. Only Linux tells what it takes.

Ground floor.
"""

from __future__ import annotations

import array
import contextlib
import socket
import struct
import sys
import time
from typing import Final

LOOKS: Final = 10  # parts of the patience: between two looks, and a doubt
DOUBT_LOOKS: Final = 50  # between two looks while an end is in doubt
LOOKS_WATCHED: Final = 3
MISSES: Final = 3
DOUBT_MISSES: Final = 2
JITTER: Final = 0.06
HURRIED_MS: Final = 5000
HURRY_BACKOFF: Final = 3
PROBING: Final = (1, 2)  # seconds: TCP_KEEPIDLE, TCP_KEEPINTVL
KEEPALIVE: Final = (30, 10)

TCP_RTO_MAX_MS: Final = 44  # Linux 6.15
SIOCOUTQ: Final = 0x5411
TCP_INFO_BYTES: Final = 60  # to the end of what is read of Linux' struct tcp_info


class Pulse:
    """Whether the far end of one connection is there."""

    __slots__ = (
        "_due", "_heard", "_is_hurried", "_is_probed", "_missed", "_since", "_sock", "doubted_at",
    )  # fmt: skip

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._due = 0.0
        self._heard = 0.0
        self._since = 0.0
        self._missed = 0
        self._is_probed = False
        self._is_hurried = False
        self.doubted_at = 0.0
        """On the monotonic clock; 0 = there is no doubt."""

    def doubt(self, *, quiet: bool) -> None:
        """Take it that the end may be gone; `quiet`: ask it even if nothing is unanswered."""
        now = time.monotonic()
        self.doubted_at = self.doubted_at or now
        self._due = now
        if quiet and not self._is_probed:
            self._is_probed = True
            self._keep_alive(*PROBING)

    def look(self, patience: float) -> bool:
        """Look, if a look is due; return whether the end is gone.

        Args:
            patience: seconds of silence that are too long.
        """
        now = time.monotonic()
        if now < self._due:
            return False
        waiting = self._unanswered()
        info = self._info() if waiting > 0 or self.doubted_at else None
        is_lost = False
        if info is None:
            self._heard = 0.0
            self._trust()
        else:
            is_lost = self._judge(now, patience, waiting > 0, *info)
        self._due = now + patience / (DOUBT_LOOKS if self.doubted_at else LOOKS)
        return is_lost

    def _judge(
        self,
        now: float,
        patience: float,
        is_waiting: bool,
        age: float,
        missed: int,
        backoff: int,
    ) -> bool:
        heard, part = now - age, patience / LOOKS
        if not self._heard or heard > self._heard + JITTER:
            self._heard, self._since, self._missed = heard, now, missed
        if self.doubted_at and heard > self.doubted_at + JITTER:
            self._trust()
        self._missed = min(self._missed, missed)
        if is_waiting and not self._is_hurried and (missed or backoff >= HURRY_BACKOFF):
            self._is_hurried = True
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, HURRIED_MS)
        missed -= self._missed
        is_over = self.doubted_at and now - self.doubted_at >= part and missed >= DOUBT_MISSES
        if is_over and (is_waiting or self._is_probed):
            return True
        is_watched = now - self._since >= LOOKS_WATCHED * part
        return is_waiting and missed >= MISSES and age >= patience and is_watched

    def _unanswered(self) -> int:
        """Return how many bytes wait for an acknowledgement, the end of the stream among them."""
        if sys.platform != "linux":
            return 0
        import fcntl

        count = array.array("i", [0])
        try:
            fcntl.ioctl(self._sock.fileno(), SIOCOUTQ, count)
        except OSError:
            return 0
        return count[0]

    def _info(self) -> tuple[float, int, int] | None:
        """Return seconds since the last sign of life, resends, doublings of their pause."""
        if sys.platform != "linux":
            return None
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            resends, probes, backoff = info[2:5]
            data, ack = struct.unpack_from("II", info, 52)
        except (OSError, ValueError, struct.error):
            return None  # no TCP: its end cannot go without a word
        return min(data, ack) / 1000, resends + probes, backoff

    def _trust(self) -> None:
        self.doubted_at = 0.0
        if self._is_probed:
            self._is_probed = False
            self._keep_alive(*KEEPALIVE)

    def _keep_alive(self, idle: int, interval: int) -> None:
        if sys.platform != "linux":
            return
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
