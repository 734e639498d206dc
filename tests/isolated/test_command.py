"""The command as a user starts it: exit codes, error lines, signals; a process per test."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest

PATIENCE = 20.0
"""Seconds for any step on a busy machine; nothing here needs one."""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends Unix signals")


def free_ports(count: int) -> list[int]:
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [holder.getsockname()[1] for holder in holders]
    for holder in holders:
        holder.close()
    return ports


def server_url(*ports: int) -> str:
    tunnel, target = ports or free_ports(2)
    return f"server://127.0.0.1:{tunnel}/127.0.0.1:{target}"


@contextmanager
def nodepass(*words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "nodepass", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(stream: IO[str] | None, words: str, times: int = 1) -> str:
    """Return the lines up to the one that has the words for the nth time."""
    assert stream is not None
    read = ""
    end = time.monotonic() + PATIENCE
    while read.count(words) < times:
        line = stream.readline()
        assert line, f"ended without {words!r}: {read!r}"
        assert time.monotonic() < end, f"no {words!r} in {read!r}"
        read += line
    return read


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_good_end(number: signal.Signals) -> None:
    with nodepass(server_url()) as process:
        said = read_until(process.stderr, "server listening")
        process.send_signal(number)
        code, rest = finish(process)
    assert code == 0, said + rest
    assert "stopped" in rest
    assert "Traceback" not in rest


def test_a_hangup_is_no_end() -> None:
    with nodepass(server_url()) as process:
        read_until(process.stderr, "server listening")
        process.send_signal(signal.SIGHUP)
        read_until(process.stderr, "nothing to reload")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert finish(process)[0] == 0


def test_a_client_without_a_server_waits_for_it_and_for_a_signal() -> None:
    port, target = free_ports(2)
    with nodepass(f"client://127.0.0.1:{port}/127.0.0.1:{target}") as process:
        read_until(process.stderr, "WARN")
        process.send_signal(signal.SIGTERM)
        code, rest = finish(process)
    assert code == 0, rest
    assert "Traceback" not in rest


@pytest.mark.parametrize("place", [0, 1])
def test_a_taken_address_is_one_line(place: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        ports = free_ports(2)
        ports[place] = taken
        with nodepass(server_url(*ports)) as process:
            code, said = finish(process)
    assert code == 1
    assert said == (
        f"nodepass: error: cannot listen on 127.0.0.1:{taken}: address already in use\n"
    )


def test_one_that_cannot_start_stops_the_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        first, second, third = free_ports(3)
        with nodepass(server_url(first, second), server_url(taken, third)) as process:
            code, said = finish(process)
        assert code == 1, said
        lines = said.splitlines()
        assert sum(line.startswith("nodepass: error: ") for line in lines) == 1
        # What the first tunnel held is free again.
        for port in (first, second):
            socket.create_server(("127.0.0.1", port)).close()


def test_several_tunnels_in_one_process() -> None:
    with nodepass(server_url(), server_url()) as process:
        read_until(process.stderr, "server listening", times=2)
        process.send_signal(signal.SIGTERM)
        code, rest = finish(process)
    assert code == 0, rest
    assert rest.count("stopped") == 2


def test_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FORMAT", "json")
    with nodepass(server_url()) as process:
        line = read_until(process.stderr, "server listening").splitlines()[-1]
    assert line.startswith('{"time": ')


@pytest.mark.parametrize("words", [(), ("bench",), ("server://:1/:1",), ("--nonsense",)])
def test_wrong_options_are_code_two(words: tuple[str, ...]) -> None:
    with nodepass(*words) as process:
        code, said = finish(process)
    assert code == 2
    assert said.startswith("nodepass: error: ")
    assert said.count("\n") == 1
