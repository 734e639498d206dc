"""A visitor that sends one byte and waits for it to come back: how long it takes, what stays.

    python -I visitor.py first-byte PORT SECONDS    one connection after another; prints JSON
    python -I visitor.py idle PORT COUNT            so many that stay; does what stdin says:
        open     connect all, prove each; prints `open COUNT`
        check    prove each again; prints `whole COUNT`

Blocking sockets and one thread. Python's own share of a visit is some 20 µs, the same for every
contender. Ends when stdin does. Imports nothing of ours, since it is a program of its own.
"""

from __future__ import annotations

import gc
import json
import socket
import statistics
import sys
import time
from typing import Final

LIMIT: Final = 5.0
"""Seconds that a visitor waits for its byte; then the visit has failed."""
PAUSE: Final = 0.003
"""Seconds between two visits: what the last one left to do is done, and nothing else is."""
WARM_UP: Final = 50
"""Visits before the clock runs: interpreters and caches warm up."""
BYTE: Final = b"x"


class Broken(Exception):
    """A connection that did not bring the byte back; one line."""


def visit(port: int) -> socket.socket:
    """Connect, and prove that the target answers.

    Raises:
        OSError: the connection failed, or nothing came in time.
        Broken: it was closed, or something else came.
    """
    stream = socket.socket()
    try:
        stream.settimeout(LIMIT)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.connect(("127.0.0.1", port))
        prove(stream)
    except BaseException:
        stream.close()
        raise
    return stream


def prove(stream: socket.socket) -> None:
    """Send one byte and wait for it; raises as visit does."""
    stream.sendall(BYTE)
    if (came := stream.recv(2)) != BYTE:
        raise Broken("closed" if not came else f"{came!r} came back")


def first_byte(port: int, seconds: float) -> None:
    """Visit for so long, after a warm-up; print what it took, from before the connect."""
    for _ in range(WARM_UP):
        visit(port).close()  # what fails here is said by the traceback
        time.sleep(PAUSE)
    times: list[float] = []
    errors = 0
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        try:
            stream = visit(port)
        except (OSError, Broken):
            errors += 1
        else:
            times.append(time.perf_counter() - start)
            stream.close()
        time.sleep(PAUSE)
    visits = WARM_UP + len(times) + errors
    print(json.dumps({"visits": visits, "errors": errors, **spread(times)}))


def spread(times: list[float]) -> dict[str, float]:
    """Return mean, p50 and p99; nothing if there are too few."""
    if len(times) < 2:
        return {}
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"mean": statistics.fmean(times), "p50": cuts[49], "p99": cuts[98]}


def idle(port: int, count: int) -> None:
    """Hold so many connections, as told by stdin."""
    print("ready", flush=True)
    streams: list[socket.socket] = []
    for line in sys.stdin:
        try:
            if line.strip() == "open":
                while len(streams) < count:
                    streams.append(visit(port))
                print(f"open {len(streams)}", flush=True)
            else:
                for stream in streams:
                    prove(stream)
                print(f"whole {len(streams)}", flush=True)
        except (OSError, Broken) as error:
            print(f"a visitor failed, {len(streams)} are open: {error}", flush=True)


if __name__ == "__main__":
    gc.disable()  # a collection would fall into somebody's visit
    if sys.argv[1] == "idle":
        idle(int(sys.argv[2]), int(sys.argv[3]))
    else:
        first_byte(int(sys.argv[2]), float(sys.argv[3]))
