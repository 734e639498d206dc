"""Messages: one that is answered before the next is sent, on one connection, with sockperf."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.load import PROBE_LIMIT, Load, Sample, Scene, puzzled

SIZE: Final = 14
"""Bytes of a message; the shortest that sockperf knows, all of it header."""
QUESTION: Final = struct.pack("!QHI", 1, 0b11, SIZE)
"""Number, flags (from a client; an answer is wanted) and length, as sockperf 3.7 sends them."""
ANSWER: Final = struct.pack("!QHI", 1, 0b10, SIZE)


@dataclass(frozen=True, slots=True)
class PingPong(Load):
    """One message there and back at a time."""

    name = "latency"
    title = "ping-pong, 1 connection, 14 bytes there and back"
    programs = ("sockperf",)
    headline = "mean"
    unit = "µs"
    scale = 1e6
    cost_unit = "CPU µs/message"
    cost_scale = 1e6

    def target(self, port: int, folder: Path) -> list[str]:
        del folder
        return ["sockperf", "server", "--tcp", "-i", "127.0.0.1", "-p", str(port)]

    def answers(self, port: int, environment: Mapping[str, str]) -> bool:
        del environment
        try:
            with socket.create_connection(("127.0.0.1", port), PROBE_LIMIT) as stream:
                stream.sendall(QUESTION)
                return stream.recv(SIZE, socket.MSG_WAITALL) == ANSWER
        except OSError:
            return False

    def warm_up(self, scene: Scene) -> None:
        """Nothing: sockperf does not count its first 400 ms."""

    def command(self, port: int, seconds: int) -> list[str]:
        words = f"sockperf ping-pong --tcp --full-rtt -i 127.0.0.1 -p {port}"
        return [*words.split(), "-m", str(SIZE), "-t", str(seconds)]

    def parse(self, output: str) -> Sample:
        return parse_sockperf(output)


def parse_sockperf(output: str) -> Sample:
    """Read what sockperf printed; the amount is what came back, warm-up included."""

    def find(pattern: str) -> float:
        found = re.search(pattern, output)
        if found is None:
            raise puzzled("sockperf", output)
        return float(found[1])

    amount = find(r"\[Total Run\].* ReceivedMessages=(\d+)")
    if not amount:
        return Sample(0, {})
    return Sample(
        amount,
        {
            "mean": find(r"avg-rtt=([\d.]+)") / 1e6,
            "p50": find(r"percentile 50\.000 =\s+([\d.]+)") / 1e6,
            "p99": find(r"percentile 99\.000 =\s+([\d.]+)") / 1e6,
            "errors": find(r"dropped messages = (\d+)"),
        },
    )
