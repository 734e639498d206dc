"""benchmarks: dry runs with fakes, and the pictures."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from benchmarks import (
    catalog,
    datagram,
    machine,
    picture,
    run,
    stage,
    start,
)
from benchmarks import contender as contenders
from benchmarks import load as loads
from benchmarks.load import Load, Sample, Scene
from tests.kit.benchmark_words import ENVIRONMENT

# --- a dry run -----------------------------------------------------------------------------------


RELAY = """
import socket, sys, threading
def pump(one, other):
    while data := one.recv(65536):
        other.sendall(data)
    other.shutdown(socket.SHUT_WR)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("relay ready", flush=True)
while True:
    visitor, _ = listener.accept()
    onward = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
    for pair in ((visitor, onward), (onward, visitor)):
        threading.Thread(target=pump, args=pair, daemon=True).start()
"""


TARGET = """
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    visitor, _ = listener.accept()
    with visitor:
        visitor.sendall(visitor.recv(100).upper())
"""


TOOL = """
import socket, sys
for turn in range(20):
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as stream:
        stream.sendall(b"hello")
        assert stream.recv(100) == b"HELLO"
print(20)
"""


@dataclass(frozen=True, slots=True)
class Hello(Load):
    """A load that needs nothing but Python."""

    interrupted: bool = False

    name = "hello-1"
    title = "hello"
    programs = (sys.executable,)
    unit = "hellos/s"
    cost_unit = "CPU ms/hello"
    cost_scale = 1e3

    def target(self, port: int, folder: Path) -> list[str]:
        return [sys.executable, "-c", TARGET, str(port)]

    def answers(self, port: int, environment: Mapping[str, str]) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as stream:
                stream.sendall(b"hello")
                return stream.recv(100) == b"HELLO"
        except OSError:
            return False

    def warm_up(self, scene: Scene) -> None:
        if self.interrupted:
            os.kill(os.getpid(), signal.SIGINT)

    def command(self, port: int, seconds: int) -> list[str]:
        return [sys.executable, "-c", TOOL, str(port)]

    def parse(self, output: str) -> Sample:
        return Sample(float(output), {"rate": float(output) * 2, "mean": 0.001})


ROWS = f'''
[[contender]]
name = "direct"
protocols = ["tcp", "udp"]
[[contender]]
name = "haproxy"
protocols = ["tcp"]
help = ["{{python}}", "-c", "pass"]
[contender.server]
command = ["{{python}}", "-c", """{RELAY}""", "{{visitors}}", "{{tunnel}}"]
ready = "relay ready"
[contender.client]
command = ["{{python}}", "{{config}}", "{{tunnel}}", "{{target}}"]
config = """{RELAY}"""
[[contender]]
name = "absent"
protocols = ["tcp"]
programs = ["no-such-program"]
[[contender]]
name = "broken"
protocols = ["tcp", "udp"]
[contender.server]
command = ["{{python}}", "-c", "raise SystemExit('wrong option')"]
'''


def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load, *words: str) -> int:
    monkeypatch.setattr(catalog, "LOADS", (load,))
    monkeypatch.setattr(catalog, "ALL", (load.name,))
    monkeypatch.setattr(picture, "can_draw", lambda: False)  # it has a test of its own
    monkeypatch.setattr(machine, "raise_file_limit", lambda: 0)  # other tests run after this one
    rows = tmp_path / "rows.toml"
    rows.write_text(ROWS)
    out = tmp_path / "out"
    words = ("--contenders", str(rows), "--out", str(out), "--runs", "3", *words)
    return run.main(words)


def test_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(tmp_path, monkeypatch, Hello()) == 1  # one contender is broken
    output, errors = capsys.readouterr()
    assert "### hello-1: hello" in output
    assert "| direct | 40.0 (40.0 – 40.0) | 1.00 |" in output
    assert "Skipped: absent: no-such-program is not on the PATH" in output
    assert "Failed: broken under hello-1: the server ended: wrong option" in output
    order = [line.split("round ")[1] for line in errors.splitlines() if "40.0 hellos" in line]
    names = [words.rpartition(": ")[0] for words in order]
    assert names == [
        *("1: direct", "1: haproxy"),
        *("2: haproxy", "2: direct"),
        *("3: direct", "3: haproxy"),
    ]
    assert errors.endswith("no pictures, since matplotlib is not installed\n")
    assert (tmp_path / "out" / "table.md").read_text() == output
    content = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert {"kernel", "cores", "commit", "python", "seconds", "rounds"} <= content.keys()
    assert content["aims"] == []
    rows = {row["contender"]: row for row in content["results"]}
    assert set(rows) == {"direct", "haproxy"}
    assert [turn["round"] for turn in rows["haproxy"]["runs"]] == [0, 1, 2]
    assert rows["haproxy"]["median"]["headline_of_direct"] == 1
    assert rows["haproxy"]["median"]["memory"] > 5e6
    assert "cost" in rows["haproxy"]["runs"][0]
    assert "cost" not in rows["direct"]["runs"][0]


def test_a_contender_that_was_asked_for_and_is_skipped_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dry_run(tmp_path, monkeypatch, Hello(), "--contender", "direct") == 0
    assert dry_run(tmp_path, monkeypatch, Hello(), "--contender", "direct,absent") == 1


def test_nothing_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(tmp_path, monkeypatch, Hello(), "--contender", "absent") == 1
    assert capsys.readouterr().err.endswith("benchmarks.run: nothing could be measured\n")
    assert not (tmp_path / "out").exists()


def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Hello(interrupted=True)
    # A shell that puts us in the background has us ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert dry_run(tmp_path, monkeypatch, load, "--contender", "haproxy") == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_answer_from_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "START_LIMIT", 0.1)
    monkeypatch.setattr(Hello, "answers", lambda *_: False)
    assert dry_run(tmp_path, monkeypatch, Hello(), "--contender", "direct") == 1
    assert "direct failed: no answer from the target in 0 s" in capsys.readouterr().err


def test_help_alone_starts_no_tunnel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "STARTS", 2)
    monkeypatch.setattr(contenders, "started", None)  # whoever calls it fails
    (load,) = catalog.choose(("help",))
    assert dry_run(tmp_path, monkeypatch, load) == 0
    output, errors = capsys.readouterr()
    assert "### help: start-up" in output
    assert len([line for line in errors.splitlines() if ": haproxy: " in line]) == 3


@dataclass(frozen=True, slots=True)
class Briefly(datagram.Udp):
    """A tenth of a second is enough to see that it runs."""

    def command(self, port: int, seconds: int) -> list[str]:
        words = datagram.Udp.command(self, port, seconds)
        words[words.index("--seconds") + 1] = "0.1"
        words[words.index("--warmup") + 1] = "0.05"
        return words


def test_a_dry_run_with_datagrams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The straight way is measured all the same, and the exit code is 1."""
    load = Briefly(200, 2, 4)
    monkeypatch.setattr(datagram, "FOLDER", tmp_path / "build")
    if (why := load.why_not("")) is not None:
        assert "no C compiler" in why
        pytest.skip(why)
    words = ("--contender", "direct,haproxy,broken")
    assert dry_run(tmp_path, monkeypatch, load, *words) == 1
    output, _ = capsys.readouterr()
    assert "### udp-200-2: UDP there and back, 200 B, 2 visitors, 4 in flight each" in output
    assert "Skipped: haproxy: none of these loads suits it" in output
    assert "Failed: broken under udp-200-2: the server ended: wrong option" in output
    (row,) = json.loads((tmp_path / "out" / "figures.json").read_text())["results"]
    assert row["contender"] == "direct"
    assert [turn["errors"] for turn in row["runs"]] == [0, 0, 0]
    assert all(turn["sent"] > 0 for turn in row["runs"])
    assert row["median"]["headline_of_direct"] == 1


def test_keys_are_for_us_alone(tmp_path: Path) -> None:
    if (why := loads.missing([*contenders.MAKERS.values()], os.environ["PATH"])) is not None:
        pytest.skip(why)
    rows = {row.name: row for row in contenders.read()}
    assert contenders.make_files([rows["nodepass"]], tmp_path, ENVIRONMENT) == {}
    files = contenders.make_files([rows["stunnel"], rows["ssh"]], tmp_path, ENVIRONMENT)
    assert set(files) == set(contenders.MAKERS)
    assert [path.stat().st_mode & 0o777 for path in files.values()] == [0o600, 0o600]
    assert {"BEGIN CERTIFICATE", "BEGIN PRIVATE KEY"} <= {
        line.strip("-") for line in files["certificate"].read_text().splitlines()
    }
    assert (tmp_path / "ssh.pub").read_text().startswith("ssh-ed25519 ")
