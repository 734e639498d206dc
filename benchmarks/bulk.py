"""Bulk: as many bytes as will go, in parallel streams, with iperf3."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.load import PROBE_LIMIT, TOOL_LIMIT, Load, Sample, Scene, puzzled
from benchmarks.machine import BenchmarkError
from benchmarks.process import is_listening, run_tool

WARM_UP_BYTES: Final = "128M"
"""Before the clock runs; a tenth of a second."""
REST: Final = 0.1
"""Seconds until an iperf3 server has opened its listener again after a test."""


@dataclass(frozen=True, slots=True)
class Bulk(Load):
    """As many bytes as will go."""

    streams: int
    is_backwards: bool = False
    """From the target to the visitor, as downloads go."""

    programs = ("iperf3",)
    unit = "GB/s"
    cost_unit = "CPU s/GB"
    cost_scale = 1.0

    @property
    def name(self) -> str:
        return f"bulk-{'down' if self.is_backwards else 'up'}-{self.streams}"

    @property
    def title(self) -> str:
        way = "target to visitor" if self.is_backwards else "visitor to target"
        return f"bulk TCP, {self.streams} stream{'' if self.streams == 1 else 's'}, {way}"

    def target(self, port: int, folder: Path) -> list[str]:
        del folder
        return ["iperf3", "-s", "-B", "127.0.0.1", "-p", str(port)]

    def answers(self, port: int, environment: Mapping[str, str]) -> bool:
        command = [*self._client(port), "-n", "1K"]
        try:
            parse_iperf3(run_tool(command, PROBE_LIMIT, environment))
        except BenchmarkError:
            return False
        return True

    def warm_up(self, scene: Scene) -> None:
        _let_rest(scene.target)
        command = [*self._client(scene.port), "-n", WARM_UP_BYTES]
        parse_iperf3(run_tool(command, TOOL_LIMIT, scene.environment))
        _let_rest(scene.target)

    def command(self, port: int, seconds: int) -> list[str]:
        return [*self._client(port), "-t", str(seconds)]

    def parse(self, output: str) -> Sample:
        return parse_iperf3(output)

    def _client(self, port: int) -> list[str]:
        command = ["iperf3", "-J", "-c", "127.0.0.1", "-p", str(port), "-P", str(self.streams)]
        return [*command, "-R"] if self.is_backwards else command


def _let_rest(port: int) -> None:
    """Let an iperf3 server get ready for its next test: it closes and opens its listener."""
    end = time.monotonic() + TOOL_LIMIT
    time.sleep(REST)
    while not is_listening(port):
        if time.monotonic() > end:
            raise BenchmarkError("the iperf3 server does not listen any more")
        time.sleep(REST)


def parse_iperf3(output: str) -> Sample:
    """Read the JSON of an iperf3 client; what was received counts, in GB.

    Its round-trip time is that of the first leg alone, so it is no latency of the contender.
    """
    try:
        report = json.loads(output)
        if "error" in report:
            raise BenchmarkError(f"iperf3: {report['error']}")
        received = report["end"]["sum_received"]
        return Sample(received["bytes"] / 1e9, {"rate": received["bits_per_second"] / 8e9})
    except (ValueError, KeyError, TypeError):
        raise puzzled("iperf3", output) from None
