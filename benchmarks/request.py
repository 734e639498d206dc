"""Requests: as many small ones as will go, on so many connections at once, with wrk."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.load import PROBE_LIMIT, TOOL_LIMIT, Load, Sample, Scene, puzzled
from benchmarks.machine import BenchmarkError

WARM_UP: Final = 0.4
"""Seconds of wrk before the clock runs: pools of ready links fill, interpreters warm up."""

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
class Http(Load):
    """As many small requests as will go."""

    connections: int
    is_closing: bool = False
    """Each request on a connection of its own."""

    programs = ("wrk", "haproxy")

    @property
    def unit(self) -> str:
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

    def warm_up(self, scene: Scene) -> None:
        # Its shortest time is a second; an interrupt ends it properly before that.
        with subprocess.Popen(
            self.command(scene.port, 1),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            env=scene.environment,
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
        raise puzzled("wrk", output)
    figures = {"rate": float(rate[1])}
    for name, label in (("mean", "Latency"), ("p50", "50%"), ("p99", "99%")):
        if found := re.search(rf"^\s*{label}\s+{_TIME}", output, re.MULTILINE):
            figures[name] = float(found[1]) * _SECONDS[found[2]]
    errors = 0
    if found := re.search(r"Socket errors: (.*)", output):
        errors += sum(map(int, re.findall(r"\d+", found[1])))
    if found := re.search(r"Non-2xx or 3xx responses: (\d+)", output):
        errors += int(found[1])
    return Sample(float(amount[1]), {**figures, "errors": float(errors)})
