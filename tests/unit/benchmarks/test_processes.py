"""benchmarks: processes, visits and starts."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import (
    catalog,
    process,
    start,
    visit,
    visitor,
)
from benchmarks.load import Load, Sample, Scene
from benchmarks.machine import BenchmarkError, free_ports
from tests.kit.benchmark_words import ENVIRONMENT, FIRST

# --- processes -----------------------------------------------------------------------------------


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, "ready", flush=True)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_that_does_not_stop_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_LIMIT", 0.1)
    command = [sys.executable, "-c", STUBBORN]
    with process.running("stubborn one", command, tmp_path, ENVIRONMENT) as child:
        child.wait_until(lambda: child.says("ready"), "'ready'")
        grandchild = int(child.log.read_text().split()[0])
        assert process.family([child.pid]) == [child.pid, grandchild]
        child.wait_until(lambda: process.memory_of([grandchild]) > 1e6, "its start")
        assert process.memory_of([child.pid]) > process.memory_of([grandchild])
    end = time.monotonic() + 5
    while is_alive(grandchild):
        assert time.monotonic() < end
        time.sleep(0.005)
    assert not is_alive(child.pid)


LEAVING = """
import os, subprocess, sys, time
command = [sys.executable, "-c", "import os, time; os.write(1, b'moved '); time.sleep(60)"]
child = subprocess.Popen(command, start_new_session=True)
os.write(1, b"%d " % child.pid)
time.sleep(60)
"""


def test_a_grandchild_in_a_session_of_its_own_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVING]
    with process.running("leaving", command, tmp_path, ENVIRONMENT) as child:
        child.wait_until(lambda: len(child.log.read_text().split()) == 2, "both words")
        words = child.log.read_text().split()
        (grandchild,) = (int(word) for word in words if word.isdecimal())
        assert os.getpgid(grandchild) == grandchild
    end = time.monotonic() + 5
    while is_alive(grandchild):
        assert time.monotonic() < end
        time.sleep(0.005)


def test_shared_memory_counts_in_parts() -> None:
    """A copy of a process shares nearly all of its pages, and half of those is counted."""
    code = "import os, sys; os.write(1, b'%d\\n' % os.fork()); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", f"ballast = b'x' * 50_000_000; {code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        pids = {int(child.stdout.readline()) for _ in range(2)} - {0}  # 0 is what the copy sees
        (copy,) = pids
        assert process.family([child.pid]) == [child.pid, copy]
        assert 50e6 < process.pss_of([child.pid]) < 75e6  # with the copy
        assert 25e6 < process.pss_of([copy]) < 40e6
        child.stdin.close()  # both read it


def test_a_process_that_has_gone_costs_nothing() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert process.family([pid]) == [pid]
    assert (process.cpu_of([pid]), process.memory_of([pid]), process.pss_of([pid])) == (0, 0, 0)


def test_a_child_that_ends_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no such option')"]
    with (
        process.running("server", command, tmp_path, ENVIRONMENT) as child,
        pytest.raises(BenchmarkError, match=r"^the server ended: no such option$"),
    ):
        child.wait_until(lambda: False, "a listener")


def test_a_child_that_is_never_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START_LIMIT", 0.05)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with (
        process.running("client", command, tmp_path, ENVIRONMENT) as child,
        pytest.raises(BenchmarkError, match="the client: a listener did not come in 0 s; it said"),
    ):
        child.wait_until(lambda: False, "a listener")


def test_cpu_of_children_counts(tmp_path: Path) -> None:
    work = "import time\nwhile time.process_time() < 0.1: pass"
    script = (
        "import subprocess, sys, time\n"
        f"subprocess.run([sys.executable, '-c', {work!r}])\n"
        "print('done', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", script]
    with process.running("parent", command, tmp_path, ENVIRONMENT) as child:
        child.wait_until(lambda: child.says("done"), "'done'")
        assert process.cpu_of([child.pid]) >= 0.09


def test_listening_is_seen_without_a_connection() -> None:
    (free,) = free_ports(1)
    assert not process.is_listening(free)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert process.is_listening(port)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_datagram_socket_is_seen_unless_it_is_connected() -> None:
    (free,) = free_ports(1)
    assert not process.is_listening(free, "udp")
    with socket.socket(type=socket.SOCK_DGRAM) as service:
        service.bind(("127.0.0.1", free))
        assert process.is_listening(free, "udp")
        assert not process.is_listening(free)
        service.connect(("127.0.0.1", 9))
        assert not process.is_listening(free, "udp")


def test_a_tool_that_fails_or_hangs() -> None:
    fails = [sys.executable, "-c", "raise SystemExit('unable to connect')"]
    with pytest.raises(BenchmarkError, match=r"ended with code 1: unable to connect$"):
        process.run_tool(fails, 10, ENVIRONMENT)
    hangs = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(BenchmarkError, match="did not end within 0 s"):
        process.run_tool(hangs, 0.1, ENVIRONMENT)


# --- visits and starts ---------------------------------------------------------------------------


@contextlib.contextmanager
def echoing(load: Load, folder: Path) -> Iterator[tuple[int, process.Child]]:
    """Run a load's target for the length of a block, as if it were a contender's server."""
    (port,) = free_ports(1)
    with process.running("server", load.target(port, folder), folder, ENVIRONMENT) as child:
        child.wait_until(lambda: process.is_listening(port), "a listener")
        yield port, child


def first_bytes(port: int, seconds: float) -> Sample:
    """What visitor.py would print in a process of its own."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        visitor.first_byte(port, seconds)
    return FIRST.parse(output.getvalue())


def test_first_bytes_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitor, "WARM_UP", 2)
    monkeypatch.setattr(visitor, "PAUSE", 0)
    with echoing(FIRST, tmp_path) as (port, _):
        assert FIRST.answers(port, ENVIRONMENT)
        sample = first_bytes(port, 0.05)
    assert sample.amount > 2
    assert sample.figures["errors"] == 0
    assert 0 < sample.figures["p50"] <= sample.figures["p99"] < visitor.LIMIT
    assert FIRST.command(port, 2)[-3:] == ["first-byte", str(port), "2"]
    assert not FIRST.answers(port, ENVIRONMENT)


def test_a_visit_that_fails_is_counted_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)  # nobody listens
    with pytest.raises(ConnectionRefusedError):
        visitor.first_byte(port, 0.05)
    monkeypatch.setattr(visitor, "WARM_UP", 0)
    sample = first_bytes(port, 0.02)
    assert sample.amount == 0
    assert sample.figures["errors"] > 0


def test_a_visitor_notices_a_byte_that_is_not_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stream = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
        with stream, other:
            other.sendall(b"y")
            with pytest.raises(visitor.Broken, match="b'y' came back"):
                visitor.prove(stream)
            other.shutdown(socket.SHUT_WR)
            with pytest.raises(visitor.Broken, match="closed"):
                visitor.prove(stream)


def test_quantiles_of_visits() -> None:
    found = visitor.spread([float(i) for i in range(101)])
    assert found == pytest.approx({"mean": 50, "p50": 50, "p99": 99})
    assert visitor.spread([1.0]) == {}


def test_idle_relays_are_counted_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "SETTLE", 0)
    monkeypatch.setattr(visit, "IDLE", 0.01)
    load = visit.Idle(20)
    with echoing(load, tmp_path) as (port, child):
        sample = load.measure(Scene(port, port, ENVIRONMENT, 1, [child]))
    assert sample.amount == 20
    assert set(sample.figures) == {"relay", "relay_server", "idle_cpu"}
    assert sample.figures["relay"] == sample.figures["relay_server"]
    assert abs(sample.figures["relay"]) < 1e6


def test_an_idle_relay_that_does_not_come() -> None:
    (port,) = free_ports(1)
    refused = r"^visitor\.py: a visitor failed, 0 are open: .*Connection refused$"
    with pytest.raises(BenchmarkError, match=refused):
        visit.Idle(3).measure(Scene(port, port, ENVIRONMENT, 1))


def test_an_idle_relay_that_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = visit.Idle(3)
    with echoing(load, tmp_path) as (port, child):

        def silence(_: object) -> float:
            os.kill(child.pid, signal.SIGKILL)
            child_ended = time.monotonic() + 5
            while not child.has_ended():
                assert time.monotonic() < child_ended
            return 0.0

        monkeypatch.setattr(visit, "SETTLE", 0)
        monkeypatch.setattr(visit, "_cpu_share", silence)
        lost = r"^visitor\.py: a visitor failed, 3 are open: "
        with pytest.raises(BenchmarkError, match=lost):
            load.measure(Scene(port, port, ENVIRONMENT, 1, [child]))


def test_starts_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "STARTS", 3)
    (load,) = catalog.choose(("help",))
    sample = load.measure(Scene(0, 0, ENVIRONMENT, 1, command=["/bin/true"]))
    assert sample.amount == 3
    assert sample.figures["p50"] > 0
    with pytest.raises(BenchmarkError, match=r"^/bin/false ended with code 1: it said nothing$"):
        load.warm_up(Scene(0, 0, ENVIRONMENT, 1, command=["/bin/false"]))
