"""Datagrams: UDP there and back as fast as a window lets them, with udpload.

Owns: build/udpload, which it compiles from udpload.c when that is newer.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.load import Load, Sample, Scene, puzzled
from benchmarks.machine import HERE, BenchmarkError

COMPILER_FLAGS: Final = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")
FOLDER: Final = HERE / "build"
WARM_UP: Final = 1.0
"""Seconds of load before the clock runs, but not longer than half of what is measured: sessions
come to be. Those of 100 visitors over TLS exist by then."""
PROBE: Final = 0.1
"""Seconds to wait for the answer to one datagram."""


def build(folder: Path) -> Path:
    """Compile udpload.c into this folder, unless what is there is newer than the source.

    Raises:
        BenchmarkError: there is no compiler, or it does not like the source.
    """
    source, program = HERE / "udpload.c", folder / "udpload"
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise BenchmarkError("there is no C compiler (cc, or what CC names)")
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"udpload.{os.getpid()}"
    command = [compiler, *COMPILER_FLAGS, "-o", str(fresh), str(source)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"{compiler} does not compile udpload.c:\n{done.stderr.strip()}")
    fresh.replace(program)  # at once: another run may be starting it
    return program


@dataclass(frozen=True, slots=True)
class Udp(Load):
    """Datagrams of one size; each answer releases the next."""

    size: int
    """Bytes of payload."""
    visitors: int
    window: int
    """Datagrams in flight for each visitor."""

    network = "udp"
    programs = ()
    unit = "datagrams/s"
    cost_unit = "CPU µs/datagram"
    cost_scale = 1e6

    @property
    def name(self) -> str:
        return f"udp-{self.size}-{self.visitors}"

    @property
    def title(self) -> str:
        each = "" if self.visitors == 1 else " each"
        plural = "" if self.visitors == 1 else "s"
        return (
            f"UDP there and back, {self.size} B, {self.visitors} visitor{plural}, "
            f"{self.window} in flight{each}"
        )

    def why_not(self, path: str) -> str | None:
        del path
        try:
            build(FOLDER)
        except BenchmarkError as error:
            return str(error).partition("\n")[0]
        return None

    def target(self, port: int, folder: Path) -> list[str]:
        del folder
        return [str(FOLDER / "udpload"), "echo", f"127.0.0.1:{port}"]

    def answers(self, port: int, environment: Mapping[str, str]) -> bool:
        del environment
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect(("127.0.0.1", port))
            try:
                probe.send(b"is anybody there?")
                return bool(select.select([probe], [], [], PROBE)[0]) and bool(probe.recv(64))
            except ConnectionRefusedError:
                time.sleep(PROBE)
                return False

    def warm_up(self, scene: Scene) -> None:
        """Nothing: sessions belong to udpload's sockets, so it warms up by itself."""

    def command(self, port: int, seconds: int) -> list[str]:
        options = {
            "--size": self.size,
            "--window": self.window,
            "--visitors": self.visitors,
            "--seconds": seconds,
            "--warmup": min(WARM_UP, seconds / 2),
        }
        words = [str(word) for option in options.items() for word in option]
        return [str(FOLDER / "udpload"), "window", f"127.0.0.1:{port}", *words]

    def parse(self, output: str) -> Sample:
        return parse_udpload(output)


def parse_udpload(output: str) -> Sample:
    """Read the JSON of udpload; damaged and misdirected datagrams are errors, lost ones are not.

    The amount includes the warm-up, as CPU does; all the rest is from the time after it.
    """
    try:
        found = json.loads(output)
        return Sample(
            found["echoed_in_all"] if found["echoed"] else 0,
            {
                "rate": found["datagrams_per_s"],
                "mean": found["rtt_mean_us"] / 1e6,
                "p50": found["rtt_p50_us"] / 1e6,
                "p99": found["rtt_p99_us"] / 1e6,
                "lost": found["lost"],
                "sent": found["sent"],
                "drops": found["socket_drops"],
                "errors": found["corrupt"] + found["strays"],
            },
        )
    except (ValueError, KeyError, TypeError):
        raise puzzled("udpload", output) from None
