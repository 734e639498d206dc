"""benchmarks/run: the file of contenders, tools' outputs, medians, and a dry run with fakes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from benchmarks import contender as contenders
from benchmarks import load as loads
from benchmarks import process, report, run
from benchmarks.bench_udp import BenchmarkError, free_ports
from benchmarks.load import Load, Sample
from benchmarks.report import Outcome, Result

if not Path("/proc/self/stat").exists():
    pytest.skip("the benchmarks need Linux", allow_module_level=True)

ENVIRONMENT = dict(os.environ)


# --- the file of contenders ------------------------------------------------------------------


def test_the_file_that_ships_is_right() -> None:
    rows = {row.name: row for row in contenders.read()}
    expected = ("direct", "nodepass", "nodepass-tls", "haproxy", "haproxy-tls", "socat")
    assert tuple(rows) == expected
    assert not rows["direct"].sides
    for name in expected[1:]:
        assert [side for side, _ in rows[name].sides] == ["server", "client"]
        assert ("tls" in rows[name].protocols) == name.endswith("-tls")
        assert all(rows[name].wants(word) for word in ("visitors", "target", "tunnel"))
    assert report.STRAIGHT in rows
    assert {*report.RIVALS.values()} <= rows.keys()


def toml(text: str) -> str:
    """A row with this text in it; each "|" is a line of its own."""
    return f'[[contender]]\nname = "one"\nprotocols = ["tcp"]\n{text}'.replace("|", "\n")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "contender: there is no row"),
        ("contenders = []", "contenders: there is no such key; each row starts with [["),
        ("contender = 5", "contender: must be rows"),
        ("[[contender]", "rows.toml: "),
        ('[[contender]]\nprotocols = ["tcp"]', "row 1: name: is missing"),
        ("[[contender]]\nname = 5", "row 1: name: must be a text"),
        ('[[contender]]\nname = "a,b"', "a,b: name: only small letters"),
        ('[[contender]]\nname = "one"', 'one: protocols: must hold "tcp"'),
        ('[[contender]]\nname = "one"\nprotocols = ["tls"]', 'one: protocols: must hold "tcp"'),
        ('[[contender]]\nname = "one"\nprotocols = ["tcp", "ip"]', "one: protocols: 'ip' is none"),
        (toml("") + toml(""), "one: name: two rows have it"),
        (toml("program = []"), "one: program: there is no such key; choose from name, protocols"),
        (toml('programs = "socat"'), "one: programs: must be a list of texts"),
        (toml("programs = [5]"), "one: programs: must be a list of texts"),
        (toml("environment = {A = 5}"), "one: environment: must be a table of texts"),
        (toml("environment = 5"), "one: environment: must be a table"),
        (toml('server = "socat"'), "one: server: must be a table"),
        (toml("[contender.server]"), "one: server: command: is missing"),
        (toml("[contender.client]|command = []"), "one: client: command: is missing"),
        (toml('[contender.client]|command = "x"'), "one: client: command: must be a list"),
        (toml('[contender.server]|command = ["x"]|wait = 1'), "one: server: wait: there is no"),
        (toml('[contender.server]|command = ["x"]|ready = ""'), "one: server: ready: must be a"),
        (toml('[contender.server]|command = ["{port}"]'), "server: command: {port} is none of {v"),
        (toml('[contender.server]|command = ["{config}"]'), "command: {config} without a config"),
        (toml('[contender.server]|command = ["x"]|config = "{a}"'), "server: config: {a} is none"),
        (toml('[contender.server]|command = ["{certificate}"]'), "one: programs: must hold"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_row_and_key(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "rows.toml"
    path.write_text(text)
    with pytest.raises(BenchmarkError) as caught:
        contenders.read(path)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("rows.toml: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--contenders", str(tmp_path / "none.toml")]) == 1
    assert capsys.readouterr().err.endswith("none.toml: No such file or directory\n")


def test_placeholders_are_replaced_and_other_braces_stay(tmp_path: Path) -> None:
    place = contenders.Place(tmp_path, {}, tmp_path / "both.pem", 1, 2, 3)
    values = place.values(tmp_path / "side.conf")
    assert set(values) == set(contenders.PLACEHOLDERS)
    text = '{"a": {"port": {tunnel}}, "b": "{python} {config}", "c": {}} {visitors}{target}'
    expected = (
        f'{{"a": {{"port": 3}}, "b": "{sys.executable} {tmp_path}/side.conf", "c": {{}}}} 12'
    )
    assert contenders.fill(text, values) == expected
    assert contenders.fill("{certificate}", values) == f"{tmp_path}/both.pem"


def test_missing_programs_are_named() -> None:
    path = os.environ["PATH"]
    assert contenders.missing([], path) is None
    assert contenders.missing(["sh", sys.executable], path) is None
    assert contenders.missing(["sh", "no-such"], path) == "no-such is not on the PATH"
    both = contenders.missing(["no-such", "nor-such"], path)
    assert both == "no-such and nor-such are not on the PATH"


# --- what tools print ------------------------------------------------------------------------

# What iperf3 3.12 -J and wrk 4.1.0 printed; of iperf3 the parts that nobody reads are cut.
IPERF3 = """{
"start": {"connected": [], "version": "iperf 3.12"},
"intervals": [],
"end": {
 "streams": [],
 "sum_sent": {"start": 0, "end": 1.000915, "seconds": 1.000915, "bytes": 2386821120,
  "bits_per_second": 19077113401.23787, "retransmits": 0, "sender": false},
 "sum_received": {"start": 0, "end": 1.000025, "seconds": 1.000025, "bytes": 2379612160,
  "bits_per_second": 19036421369.465763, "sender": false}
}}"""
IPERF3_REFUSED = """{
\t"start":\t{
\t\t"connected":\t[],
\t\t"version":\t"iperf 3.12",
\t\t"system_info":\t"Linux vm 6.18.44-fc-v669 #1 SMP PREEMPT_DYNAMIC @0 x86_64"
\t},
\t"intervals":\t[],
\t"end":\t{
\t},
\t"error":\t"unable to connect to server: Connection refused"
}"""
WRK = """Running 1s test @ http://127.0.0.1:18999/
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     3.14ms    9.81ms  71.77ms   95.10%
    Req/Sec    11.70k     2.92k   15.70k    70.00%
  Latency Distribution
     50%  618.00us
     75%    1.10ms
     90%    4.26ms
     99%   60.14ms
  11738 requests in 1.01s, 0.95MB read
Requests/sec:  11567.80
Transfer/sec:      0.94MB
"""
WRK_ERRORS = """Running 1s test @ http://127.0.0.1:18998/
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     0.00us    0.00us   0.00us    -nan%
    Req/Sec     0.00      0.00     0.00      -nan%
  Latency Distribution
     50%    0.00us
     75%    0.00us
     90%    0.00us
     99%    0.00us
  0 requests in 1.01s, 0.00B read
  Socket errors: connect 0, read 13777, write 11129, timeout 0
Requests/sec:      0.00
Transfer/sec:       0.00B
"""


def test_iperf3_counts_what_was_received() -> None:
    sample = loads.parse_iperf3(IPERF3)
    assert sample.rate == pytest.approx(2.379552671)
    assert sample.amount == pytest.approx(2.379612160)
    assert (sample.latency, sample.errors) == ({}, 0)


def test_iperf3_says_what_went_wrong() -> None:
    refused = r"^iperf3: unable to connect to server: Connection refused$"
    with pytest.raises(BenchmarkError, match=refused):
        loads.parse_iperf3(IPERF3_REFUSED)


def test_wrk_tells_rate_and_latency() -> None:
    sample = loads.parse_wrk(WRK)
    assert (sample.rate, sample.amount, sample.errors) == (11567.8, 11738, 0)
    assert sample.latency == pytest.approx({"mean": 3.14e-3, "p50": 618e-6, "p99": 60.14e-3})


def test_errors_of_wrk_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loads.parse_wrk(WRK_ERRORS).errors == 13777 + 11129
    # Such a line was added by hand; the target answers nothing but 200.
    other = WRK.replace("Requests/sec", "  Non-2xx or 3xx responses: 7\nRequests/sec")
    assert loads.parse_wrk(other).errors == 7
    (load,) = loads.choose(("http-16",))
    monkeypatch.setattr(loads, "run_tool", lambda *_: WRK_ERRORS)
    with pytest.raises(BenchmarkError, match=r"^nothing came through; 24906 errors$"):
        load.measure(80, 1, ENVIRONMENT)


def test_garbage_is_one_line() -> None:
    for read in (loads.parse_iperf3, loads.parse_wrk):
        for text in ("", "no figures\nhere", "{}", '{"end": 5}', "[]", "5"):
            with pytest.raises(BenchmarkError, match=r"printed what we do not understand: .*$"):
                read(text)


# --- loads -----------------------------------------------------------------------------------


def test_each_load_has_a_name_of_its_own() -> None:
    assert len(set(loads.ALL)) == len(loads.LOADS) == 10
    assert set(loads.QUICK) < set(loads.ALL)
    assert len({load.title for load in loads.LOADS}) == len(loads.LOADS)


@pytest.mark.parametrize(
    ("word", "names"),
    [
        (
            "bulk",
            ["bulk-up-1", "bulk-up-4", "bulk-up-16"] + [f"bulk-down-{n}" for n in (1, 4, 16)],
        ),
        ("bulk-up-1", ["bulk-up-1"]),
        ("http-1", ["http-1"]),
        ("new", ["new-16"]),
    ],
)
def test_only_takes_a_name_or_its_beginning(word: str, names: list[str]) -> None:
    assert [load.name for load in loads.choose((word,))] == names


def test_commands_of_the_tools(tmp_path: Path) -> None:
    (back,) = loads.choose(("bulk-down-4",))
    assert " ".join(back.command(80, 2)) == "iperf3 -J -c 127.0.0.1 -p 80 -P 4 -R -t 2"
    (kept,) = loads.choose(("http-256",))
    words = "wrk --threads 1 --connections 256 --duration 3s --latency http://127.0.0.1:80/"
    assert " ".join(kept.command(80, 3)) == words
    (new,) = loads.choose(("new-16",))
    assert "Connection: close" in new.command(80, 3)
    assert new.target(81, tmp_path)[0] == "haproxy"
    assert "bind 127.0.0.1:81\n" in (tmp_path / "target.conf").read_text()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--only", "bulk,nonsense"], "--only: 'nonsense' is none of bulk-up-1, "),
        (["--only", "http-2"], "--only: 'http-2' is none of "),
        (
            ["--contender", "direct,nonsense"],
            "--contender: 'nonsense' is none of direct, nodepass",
        ),
    ],
)
def test_a_name_that_is_unknown(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks.run: {complaint}")


@pytest.mark.parametrize("words", [["--runs", "0"], ["--seconds", "0.5"], ["--runs", "many"]])
def test_a_number_that_is_wrong(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(words)
    assert caught.value.code == 2
    assert "is not a number from 1 to 1000" in capsys.readouterr().err


# --- medians and tables ----------------------------------------------------------------------

BULK, HTTP = loads.choose(("bulk-up-1", "http-16"))


def result(load: Load, name: str, *runs: tuple[float, float], tls: bool = False) -> Result:
    """Runs of rate and cost, one each round."""
    rest = {"errors": 0.0, "strangers": 0.0, "memory": 3e6}
    figures = [{"rate": rate, "cost": cost, **rest} for rate, cost in runs]
    return Result(load, name, tls, dict(enumerate(figures)))


def test_medians_and_ratios_are_those_of_neighbours() -> None:
    direct = result(BULK, "direct", (4.0, 1.0), (2.0, 1.0), (8.0, 1.0))
    for figures in direct.runs.values():
        del figures["cost"]
    rival = result(BULK, "haproxy", (1.0, 2.0), (1.0, 1.0), (2.0, 4.0))
    ours = result(BULK, "nodepass", (2.0, 1.0), (1.5, 1.0), (6.0, 1.0))
    outcome = Outcome([direct, rival, ours])
    found = report.summary(outcome, ours)
    assert (found["rate"], found["least"], found["most"]) == (2.0, 1.5, 6.0)
    assert found["rate_of_direct"] == 0.75  # of 0.5, 0.75, 0.75; not 2/4
    assert found["rate_of_haproxy"] == 2.0
    assert found["cost_of_haproxy"] == 0.5
    assert "mean" not in found
    assert "cost" not in report.summary(outcome, direct)


def test_a_ratio_takes_the_rounds_that_both_have() -> None:
    ours = result(BULK, "nodepass", (2.0, 1.0), (3.0, 1.0), (8.0, 1.0))
    other = result(BULK, "haproxy", (1.0, 0.0), (9.0, 0.0), (2.0, 0.0))
    del other.runs[1]
    assert report.ratio(ours, other, "rate") == 3.0
    assert report.ratio(ours, other, "cost") is None  # nothing is divided by 0
    assert report.ratio(ours, None, "rate") is None


def test_each_is_compared_with_the_rival_of_its_kind() -> None:
    outcome = Outcome(
        [
            result(HTTP, "haproxy", (10.0, 1.0)),
            result(HTTP, "haproxy-tls", (5.0, 2.0), tls=True),
            result(HTTP, "nodepass-tls", (10.0, 1.0), tls=True),
            result(BULK, "haproxy-tls", (1.0, 1.0), tls=True),
        ]
    )
    found = report.summary(outcome, outcome.results[2])
    assert (found["rate_of_haproxy"], found["cost_of_haproxy"]) == (2.0, 0.5)


def test_tables_hold_what_there_is() -> None:
    ours = result(HTTP, "nodepass", (31234.0, 52.0), (30000.0, 54.25))
    for figures in ours.runs.values():
        figures |= {"mean": 0.0005, "p99": 0.001234}
    ours.runs[0]["strangers"] = 0.5
    direct = result(HTTP, "direct", (100000.0, 0.0))
    del direct.runs[0]["cost"], direct.runs[0]["memory"]
    outcome = Outcome(
        [direct, ours, result(BULK, "nodepass", (1.5, 0.5))],
        {"socat": "socat is not on the PATH"},
        {"haproxy under http-16": "it ended"},
    )
    lines = report.markdown(outcome).splitlines()
    assert lines[0] == "### http-16: HTTP requests, 16 connections kept alive"
    assert lines[2] == (
        "| contender | requests/s (least – most) | of direct | CPU µs/request "
        "| latency, mean | p99 | memory |"
    )
    assert lines[4] == "| direct | 100000 (100000 – 100000) | 1.00 | – | – | – | – |"
    assert lines[5] == (
        "| nodepass | 30617 (30000 – 31234) | 0.31 | 53.1 | 500 µs | 1234 µs | 3 MB |"
    )
    assert "| nodepass | 1.50 (1.50 – 1.50) | 0.50 | 3 MB |" in lines
    assert "Skipped: socat: socat is not on the PATH" in lines
    assert "Failed: haproxy under http-16: it ended" in lines
    assert "Disturbed: others used 0.0 cores (median), 0.5 at most." in lines


DRAWING = """
import sys
from pathlib import Path
from benchmarks import load, report
runs = {0: {"rate": 1.5}, 1: {"rate": 2.5}}
report.draw(Path(sys.argv[1]), [
    report.Result(kind, name, False, runs)
    for kind in load.choose(("bulk-up", "new")) for name in ("direct", "nodepass")
])
"""


def test_the_picture(tmp_path: Path) -> None:
    """In a process of its own: matplotlib keeps fonts open and a thread."""
    if not report.can_draw():
        pytest.skip("matplotlib is not installed")
    path = tmp_path / "rates.png"
    root = Path(report.__file__).parents[1]
    command = [sys.executable, "-c", DRAWING, str(path)]
    subprocess.run(command, check=True, cwd=root, timeout=60)
    assert path.read_bytes().startswith(b"\x89PNG")


# --- processes -------------------------------------------------------------------------------

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
        assert process.memory_of([child.pid]) > process.memory_of([grandchild]) > 1e6
    end = time.monotonic() + 5
    while is_alive(grandchild):
        assert time.monotonic() < end
        time.sleep(0.005)
    assert not is_alive(child.pid)


def test_a_process_that_has_gone_costs_nothing() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert process.family([pid]) == [pid]
    assert (process.cpu_of([pid]), process.memory_of([pid])) == (0, 0)


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


def test_a_tool_that_fails_or_hangs() -> None:
    fails = [sys.executable, "-c", "raise SystemExit('unable to connect')"]
    with pytest.raises(BenchmarkError, match=r"ended with code 1: unable to connect$"):
        process.run_tool(fails, 10, ENVIRONMENT)
    hangs = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(BenchmarkError, match="did not end within 0 s"):
        process.run_tool(hangs, 0.1, ENVIRONMENT)


# --- a dry run -------------------------------------------------------------------------------

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
    rate_unit = "hellos/s"
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

    def warm_up(self, port: int, target: int, environment: Mapping[str, str]) -> None:
        if self.interrupted:
            os.kill(os.getpid(), signal.SIGINT)

    def command(self, port: int, seconds: int) -> list[str]:
        return [sys.executable, "-c", TOOL, str(port)]

    def parse(self, output: str) -> Sample:
        return Sample(float(output) * 2, float(output), {"mean": 0.001})


ROWS = f'''
[[contender]]
name = "direct"
protocols = ["tcp"]
[[contender]]
name = "haproxy"
protocols = ["tcp"]
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
protocols = ["tcp"]
[contender.server]
command = ["{{python}}", "-c", "raise SystemExit('wrong option')"]
'''


def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load, *words: str) -> int:
    monkeypatch.setattr(loads, "LOADS", (load,))
    monkeypatch.setattr(loads, "ALL", (load.name,))
    monkeypatch.setattr(report, "can_draw", lambda: False)  # it has a test of its own
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
    assert errors.endswith("no picture, since matplotlib is not installed\n")
    assert (tmp_path / "out" / "table.md").read_text() == output
    content = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert {"kernel", "cores", "commit", "python", "seconds", "rounds"} <= content.keys()
    rows = {row["contender"]: row for row in content["results"]}
    assert set(rows) == {"direct", "haproxy"}
    assert [turn["round"] for turn in rows["haproxy"]["runs"]] == [0, 1, 2]
    assert rows["haproxy"]["median"]["rate_of_direct"] == 1
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
    assert dry_run(tmp_path, monkeypatch, load, "--contender", "haproxy") == 130


def test_no_answer_from_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "START_LIMIT", 0.1)
    monkeypatch.setattr(Hello, "answers", lambda *_: False)
    assert dry_run(tmp_path, monkeypatch, Hello(), "--contender", "direct") == 1
    assert "direct failed: no answer from the target in 0 s" in capsys.readouterr().err


def test_the_certificate_is_for_us_alone(tmp_path: Path) -> None:
    if contenders.missing(["openssl"], os.environ["PATH"]):
        pytest.skip("openssl is not on the PATH")
    path = contenders.make_certificate(tmp_path, ENVIRONMENT)
    assert path.stat().st_mode & 0o777 == 0o600
    assert {"BEGIN CERTIFICATE", "BEGIN PRIVATE KEY"} <= {
        line.strip("-") for line in path.read_text().splitlines()
    }
