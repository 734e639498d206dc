"""The loads: what goes through a contender, with which tool, and what that tool's output says.

Owns: nothing that lasts; a load is a value. Must never know a contender: it sees a port that
leads to its own target. Imported by `run` and `report`.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.bench_udp import BenchmarkError
from benchmarks.process import is_listening, run_tool

TOOL_LIMIT: Final = 10.0
"""Seconds that a tool may take beyond the time it was given."""
PROBE_LIMIT: Final = 2.0
"""Seconds for one try to reach the target."""
WARM_UP: Final = 0.4
"""Seconds of wrk before the clock runs: pools of ready links fill, interpreters warm up."""
WARM_UP_BYTES: Final = "128M"
"""Of iperf3 before the clock runs; a tenth of a second."""
REST: Final = 0.1
"""Seconds until an iperf3 server has opened its listener again after a test."""

TARGET_CONFIG: Final = """
global
    nbthread 1
    maxconn 4000
defaults
    mode http
    timeout client 1m
    timeout http-request 1m
frontend target
    bind 127.0.0.1:{port}
    http-request return status 200 content-type text/plain string ok
"""

_TIME: Final = r"([\d.]+)(us|ms|s|m|h)\b"
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Sample:
    """What a tool says of one run."""

    rate: float
    """In the load's unit a second."""
    amount: float
    """In the load's unit, all that was carried."""
    latency: Mapping[str, float]
    """Seconds: mean, p50, p99; empty where the tool does not tell."""
    errors: int = 0


@dataclass(frozen=True, slots=True)
class Load(ABC):
    """One kind of load."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What --only calls it: a family and what tells its loads apart, joined by "-"."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What the report calls it."""

    @property
    @abstractmethod
    def programs(self) -> tuple[str, ...]:
        """What must be on the PATH: tool and target."""

    @property
    @abstractmethod
    def rate_unit(self) -> str:
        """Unit of a sample's rate."""

    @property
    @abstractmethod
    def cost_unit(self) -> str:
        """Unit of what is computed from CPU and amount."""

    @property
    @abstractmethod
    def cost_scale(self) -> float:
        """What CPU seconds for one unit of the amount are multiplied with to be in cost_unit."""

    @abstractmethod
    def target(self, port: int, folder: Path) -> list[str]:
        """Return the command of the service that this load wants to reach."""

    @abstractmethod
    def answers(self, port: int, environment: Mapping[str, str]) -> bool:
        """Try once whether the target answers."""

    @abstractmethod
    def warm_up(self, port: int, target: int, environment: Mapping[str, str]) -> None:
        """Run for a moment without measuring."""

    @abstractmethod
    def command(self, port: int, seconds: int) -> list[str]:
        """Return the command that makes the load."""

    @abstractmethod
    def parse(self, output: str) -> Sample:
        """Read the figures in what the command printed."""

    def measure(self, port: int, seconds: int, environment: Mapping[str, str]) -> Sample:
        """Make the load and return what its tool says."""
        output = run_tool(self.command(port, seconds), seconds + TOOL_LIMIT, environment)
        sample = self.parse(output)
        if not sample.amount:
            raise BenchmarkError(f"nothing came through; {sample.errors} errors")
        return sample

    def belongs_to(self, word: str) -> bool:
        """Whether a word of --only means this load: its name or the beginning of it."""
        return self.name == word or self.name.startswith(f"{word}-")


# --- bulk ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bulk(Load):
    """As many bytes as will go, in parallel streams, with iperf3."""

    streams: int
    is_backwards: bool = False
    """From the target to the visitor, as downloads go."""

    programs = ("iperf3",)
    rate_unit = "GB/s"
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

    def warm_up(self, port: int, target: int, environment: Mapping[str, str]) -> None:
        _let_rest(target)
        command = [*self._client(port), "-n", WARM_UP_BYTES]
        parse_iperf3(run_tool(command, TOOL_LIMIT, environment))
        _let_rest(target)

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
        return Sample(received["bits_per_second"] / 8e9, received["bytes"] / 1e9, {})
    except (ValueError, KeyError, TypeError):
        raise BenchmarkError(
            f"iperf3 printed what we do not understand: {output[:60]!r}"
        ) from None


# --- requests --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Http(Load):
    """As many small requests as will go, on so many connections at once, with wrk."""

    connections: int
    is_closing: bool = False
    """Each request on a connection of its own."""

    programs = ("wrk", "haproxy")

    @property
    def rate_unit(self) -> str:
        return "connections/s" if self.is_closing else "requests/s"

    @property
    def cost_unit(self) -> str:
        return "CPU ms/connection" if self.is_closing else "CPU µs/request"

    @property
    def cost_scale(self) -> float:
        return 1e3 if self.is_closing else 1e6

    @property
    def name(self) -> str:
        return f"{'new' if self.is_closing else 'http'}-{self.connections}"

    @property
    def title(self) -> str:
        if self.is_closing:
            return f"new connections, {self.connections} at a time, one HTTP request each"
        plural = "" if self.connections == 1 else "s"
        return f"HTTP requests, {self.connections} connection{plural} kept alive"

    def target(self, port: int, folder: Path) -> list[str]:
        config = folder / "target.conf"
        config.write_text(TARGET_CONFIG.format(port=port))
        return ["haproxy", "-db", "-f", str(config)]

    def answers(self, port: int, environment: Mapping[str, str]) -> bool:
        del environment
        try:
            with socket.create_connection(("127.0.0.1", port), PROBE_LIMIT) as stream:
                stream.sendall(b"GET / HTTP/1.1\r\nHost: target\r\nConnection: close\r\n\r\n")
                return stream.recv(64).startswith(b"HTTP/1.1 200 ")
        except OSError:
            return False

    def warm_up(self, port: int, target: int, environment: Mapping[str, str]) -> None:
        del target
        # Its shortest time is a second; an interrupt ends it properly before that.
        with subprocess.Popen(
            self.command(port, 1),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            env=environment,
        ) as tool:
            try:
                time.sleep(WARM_UP)
                tool.send_signal(signal.SIGINT)
                tool.wait(TOOL_LIMIT)
            except subprocess.TimeoutExpired:
                raise BenchmarkError("wrk did not end after an interrupt") from None
            finally:
                tool.kill()

    def command(self, port: int, seconds: int) -> list[str]:
        words = f"wrk --threads 1 --connections {self.connections} --duration {seconds}s --latency"
        header = ["--header", "Connection: close"] if self.is_closing else []
        return [*words.split(), *header, f"http://127.0.0.1:{port}/"]

    def parse(self, output: str) -> Sample:
        return parse_wrk(output)


def parse_wrk(output: str) -> Sample:
    """Read what wrk printed; its latency runs from request to answer, without the connect."""
    rate = re.search(r"^Requests/sec:\s+([\d.]+)", output, re.MULTILINE)
    amount = re.search(r"^\s*(\d+) requests in ", output, re.MULTILINE)
    if rate is None or amount is None:
        raise BenchmarkError(f"wrk printed what we do not understand: {output[:60]!r}")
    latency: dict[str, float] = {}
    for name, label in (("mean", "Latency"), ("p50", "50%"), ("p99", "99%")):
        if found := re.search(rf"^\s*{label}\s+{_TIME}", output, re.MULTILINE):
            latency[name] = float(found[1]) * _SECONDS[found[2]]
    errors = 0
    if found := re.search(r"Socket errors: (.*)", output):
        errors += sum(map(int, re.findall(r"\d+", found[1])))
    if found := re.search(r"Non-2xx or 3xx responses: (\d+)", output):
        errors += int(found[1])
    return Sample(float(rate[1]), float(amount[1]), latency, errors)


# --- all of them -----------------------------------------------------------------------------

LOADS: Final[tuple[Load, ...]] = (
    *(Bulk(streams, back) for back in (False, True) for streams in (1, 4, 16)),
    *(Http(connections) for connections in (1, 16, 256)),
    Http(16, is_closing=True),
)
ALL: Final = tuple(load.name for load in LOADS)
QUICK: Final = ("bulk-up-1", "http-16", "new-16")
"""Names of the loads that --quick takes."""


def choose(words: tuple[str, ...]) -> list[Load]:
    """Return the loads that the words of --only mean, in our order.

    Raises:
        BenchmarkError: a word means none.
    """
    for word in words:
        if not any(load.belongs_to(word) for load in LOADS):
            names = ", ".join(ALL)
            raise BenchmarkError(f"--only: {word!r} is none of {names}, nor the beginning of one")
    return [load for load in LOADS if any(map(load.belongs_to, words))]
