"""The load, echo and sink that the UDP benchmark leans on count what really happened."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.datagram import build
from benchmarks.machine import BenchmarkError

LIMIT = 10.0
"""Seconds for one call of udpload; it takes a fraction of one."""

Counts = dict[str, float]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(tmp_path_factory.mktemp("udpload"))
    except BenchmarkError as error:
        if "no C compiler" not in str(error):
            raise
        pytest.skip(str(error))


class Service:
    """A running echo or sink."""

    def __init__(self, child: subprocess.Popen[str], port: int) -> None:
        self.child = child
        self.port = port

    def stop(self) -> Counts:
        """End it as a user would; return what it has counted."""
        self.child.send_signal(signal.SIGTERM)
        output, _ = self.child.communicate(timeout=LIMIT)
        assert self.child.returncode == 0
        counts: Counts = json.loads(output)
        return counts


@contextlib.contextmanager
def serving(program: Path, mode: str, address: str = "127.0.0.1:0") -> Iterator[Service]:
    with subprocess.Popen([program, mode, address], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            word, port = child.stdout.readline().split()
            assert word == "ready"
            yield Service(child, int(port))
        finally:
            child.kill()


def load(program: Path, mode: str, address: str, words: str) -> Counts:
    done = subprocess.run(
        [program, mode, address, *words.split()],
        check=True,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    counts: Counts = json.loads(line)
    return counts


class Troublemaker(threading.Thread):
    """Passes datagrams on, or back, and does to some of them what a bad network does.

    Of every visitor's datagrams, by sequence number modulo 64: 10 is swallowed, 20 comes twice,
    30 has a byte changed, 40 comes after 41.
    """

    def __init__(self, onward: int | None = None) -> None:
        super().__init__()
        self.done: Counter[str] = Counter()
        self._onward = onward
        self.held: dict[object, bytes] = {}
        self._socket = socket.socket(type=socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._is_stopped = threading.Event()

    def __enter__(self) -> Troublemaker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopped.set()
        self.join()
        self._socket.close()

    def run(self) -> None:
        while not self._is_stopped.is_set():
            with contextlib.suppress(TimeoutError):
                data, source = self._socket.recvfrom(65536)
                self._pass(data, source)
                self.done["come"] += 1

    def wait_for(self, count: int) -> None:
        """Wait until so many datagrams have come."""
        end = time.monotonic() + LIMIT
        while self.done["come"] < count:
            assert time.monotonic() < end
            time.sleep(0.002)

    def _pass(self, data: bytes, source: tuple[str, int]) -> None:
        target = source if self._onward is None else ("127.0.0.1", self._onward)
        sequence = int.from_bytes(data[8:16])
        copies = [data]
        match sequence % 64:
            case 10:
                self.done["swallowed"] += 1
                copies = []
            case 20:
                self.done["doubled"] += 1
                copies = [data, data]
            case 30:
                self.done["changed"] += 1
                place = sequence % len(data)
                copies = [data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]]
            case 40:
                self.held[source] = data
                copies = []
            case 41 if source in self.held:
                self.done["swapped"] += 1
                copies = [data, self.held.pop(source)]
        for copy in copies:
            self._socket.sendto(copy, target)


# --- echo and window -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [24, 203, 1400])
def test_a_small_window_loses_nothing_and_both_ends_count_the_same(
    program: Path, size: int
) -> None:
    with serving(program, "echo") as echo:
        words = f"--size {size} --window 8 --visitors 4 --seconds 0.2 --warmup 0.05"
        counts = load(program, "window", f"127.0.0.1:{echo.port}", words)
        echoed = echo.stop()
    # On a machine that stands still for 200 ms an answer comes late, but it comes.
    assert counts["lost"] == counts["late"]
    assert counts["echoed"] + counts["lost"] == counts["sent"] > 32
    assert counts["received"] == counts["sent"]
    assert counts["sent_in_all"] > counts["sent"]
    assert echoed["received"] == echoed["sent"] == counts["sent_in_all"]
    assert echoed["bytes"] == size * counts["sent_in_all"]
    assert (counts["size"], counts["in_flight"]) == (size, 32)
    for fault in ("corrupt", "duplicates", "strays", "socket_drops"):
        assert counts[fault] == 0
    assert 0.2 <= counts["seconds"] < 5
    assert counts["datagrams_per_s"] == pytest.approx(
        counts["echoed"] / counts["seconds"], rel=1e-3
    )
    assert counts["bytes_per_s"] == pytest.approx(size * counts["datagrams_per_s"], rel=1e-3)
    assert 0 < counts["rtt_p50_us"] <= counts["rtt_p99_us"] <= counts["rtt_max_us"] * 1.02
    assert 0 < counts["rtt_mean_us"] <= counts["rtt_max_us"]


def test_every_fault_of_a_network_is_counted(program: Path) -> None:
    with Troublemaker() as network:
        words = "--size 100 --window 24 --visitors 2 --seconds 0.5"
        counts = load(program, "window", network.address, words)
    done = network.done
    assert min(done[name] for name in ("swallowed", "doubled", "changed", "swapped")) > 0
    assert counts["corrupt"] == done["changed"]
    assert counts["duplicates"] == done["doubled"]
    assert counts["reordered"] >= done["swapped"]  # one that is held for long is late besides
    missing = counts["sent"] - counts["echoed"] - counts["late"]
    assert missing == done["swallowed"] + done["changed"] + len(network.held)
    assert counts["lost"] == counts["sent"] - counts["echoed"]
    assert counts["loss"] == pytest.approx(counts["lost"] / counts["sent"], abs=1e-8)
    assert counts["strays"] == 0


def test_an_answer_to_somebody_else_is_a_stray(program: Path) -> None:
    """Each datagram goes back to the visitor before, as a tunnel that mixes up sessions does."""
    with socket.socket(type=socket.SOCK_DGRAM) as mixer:
        mixer.bind(("127.0.0.1", 0))
        mixer.settimeout(LIMIT)
        address = f"127.0.0.1:{mixer.getsockname()[1]}"
        words = "--size 64 --window 1 --visitors 2 --seconds 0.15"
        command = [str(program), "window", address, *words.split()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            first, second = mixer.recvfrom(100), mixer.recvfrom(100)
            mixer.sendto(first[0], second[1])
            mixer.sendto(second[0], first[1])
            output, _ = child.communicate(timeout=LIMIT)
    counts: Counts = json.loads(output)
    assert (counts["sent"], counts["echoed"], counts["lost"]) == (2, 0, 2)
    assert (counts["strays"], counts["corrupt"], counts["received"]) == (2, 0, 2)


def test_silence_is_loss_and_each_lost_datagram_is_replaced(program: Path) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        words = "--size 24 --window 3 --visitors 1 --seconds 0.5"
        counts = load(program, "window", address, words)
    assert 6 <= counts["sent"] <= 9  # two or three windows
    assert (counts["lost"], counts["loss"]) == (counts["sent"], 1)
    assert (counts["datagrams_per_s"], counts["rtt_p99_us"]) == (0, 0)


@pytest.mark.parametrize("host", ["[::1]", "localhost"])
def test_addresses_may_be_ipv6_or_names(program: Path, host: str) -> None:
    if host == "[::1]":
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
    with serving(program, "echo", f"{host}:0") as echo:
        words = "--size 24 --window 1 --visitors 1 --seconds 0.02"
        counts = load(program, "window", f"{host}:{echo.port}", words)
    assert counts["echoed"] > 0


# --- rate and sink ---------------------------------------------------------------------------


def test_a_rate_is_kept_or_what_is_missing_is_named(program: Path) -> None:
    with serving(program, "echo") as echo:
        words = "--size 100 --rate 2000 --visitors 3 --seconds 0.3 --warmup 0.05"
        counts = load(program, "rate", f"127.0.0.1:{echo.port}", words)
    assert counts["sent"] <= 600 + 3  # a bucket of 1 ms, and one
    assert counts["sent"] + counts["skipped"] == pytest.approx(600, abs=5)
    assert counts["echoed"] + counts["lost"] == counts["sent"]
    assert counts["lost"] == counts["late"]


def test_one_way_adds_up_with_the_sink(program: Path) -> None:
    with serving(program, "sink") as sink:
        words = "--size 100 --rate 4000 --visitors 5 --seconds 0.2 --one-way"
        sent = load(program, "rate", f"127.0.0.1:{sink.port}", words)
        counts = sink.stop()
    assert sent["sent"] > 0
    assert counts["datagrams"] == counts["received"] == sent["sent"]
    assert counts["bytes"] == 100 * sent["sent"]
    assert counts["visitors"] == 5
    for fault in ("lost", "reordered", "duplicates", "stale", "corrupt", "socket_drops"):
        assert counts[fault] == 0
    assert "loss" not in sent


def test_the_sink_counts_every_fault(program: Path) -> None:
    with serving(program, "sink") as sink:
        with Troublemaker(sink.port) as network:
            words = "--size 40 --rate 4000 --visitors 2 --seconds 0.2 --one-way"
            sent = load(program, "rate", network.address, words)
            network.wait_for(int(sent["sent"]))
        counts = sink.stop()
    done = network.done
    assert min(done[name] for name in ("swallowed", "doubled", "changed", "swapped")) > 0
    assert counts["corrupt"] == done["changed"]
    assert counts["duplicates"] == done["doubled"]
    assert counts["reordered"] == done["swapped"]
    missing = done["swallowed"] + done["changed"] + len(network.held)
    assert counts["received"] == sent["sent"] - missing
    # The sink cannot know of what was lost after the last one that came; 10, 30 and 40 can be.
    assert missing - 2 * 3 <= counts["lost"] <= missing


# --- the command line ------------------------------------------------------------------------


LOAD = "--size 100 --window 1 --visitors 1 --seconds 1"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("", "echo, sink, window or rate"),
        ("listen 127.0.0.1:9", "listen: "),
        ("echo", "HOST:PORT"),
        ("echo 127.0.0.1", "127.0.0.1: "),
        ("echo 127.0.0.1:0 127.0.0.1:0", "one address"),
        ("echo 127.0.0.1:65536", "from 0 to 65535"),
        ("echo ::1:9", "[::1]"),
        ("sink 127.0.0.1:0 --size 100", "--size: "),
        (f"window 127.0.0.1:0 {LOAD}", "from 1 to 65535"),
        (f"window :9 {LOAD}", "no host"),
        ("window 127.0.0.1:9 --size 100", "--window"),
        (f"window 127.0.0.1:9 {LOAD} --size 23", "header alone takes 24 bytes"),
        (f"window 127.0.0.1:9 {LOAD} --size 65508", "from 24 to 65507"),
        (f"window 127.0.0.1:9 {LOAD} --visitors 1.5", "whole number"),
        (f"window 127.0.0.1:9 {LOAD} --seconds soon", "soon: "),
        (f"window 127.0.0.1:9 {LOAD} --warmup", "no value"),
        (f"window 127.0.0.1:9 {LOAD} --one-way", "--one-way: "),
        (
            "rate 127.0.0.1:9 --size 99 --rate 9 --visitors 1 --seconds 1 --one-way --warmup 1",
            "--warmup: ",
        ),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(
    program: Path, words: str, complaint: str
) -> None:
    done = subprocess.run(
        [program, *words.split()], check=False, capture_output=True, text=True, timeout=LIMIT
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("udpload: ")
    assert complaint in line


def test_an_address_in_use_is_exit_code_1(program: Path) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [program, "echo", address], check=False, capture_output=True, text=True, timeout=LIMIT
        )
    assert done.returncode == 1
    assert done.stderr == f"udpload: {address}: Address already in use\n"


def test_help(program: Path) -> None:
    done = subprocess.run(
        [program, "--help"], check=True, capture_output=True, text=True, timeout=LIMIT
    )
    assert all(mode in done.stdout for mode in ("echo", "sink", "window", "rate"))
    assert done.stderr == ""
