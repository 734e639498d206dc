"""benchmarks: the file of contenders, tools' outputs, medians, aims, and dry runs with fakes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from benchmarks import (
    aim,
    catalog,
    datagram,
    machine,
    message,
    picture,
    process,
    report,
    run,
    stage,
    start,
    visit,
    visitor,
)
from benchmarks import contender as contenders
from benchmarks import load as loads
from benchmarks import result as results
from benchmarks.bulk import parse_iperf3
from benchmarks.load import Load, Sample, Scene
from benchmarks.machine import BenchmarkError, free_ports
from benchmarks.request import parse_wrk
from benchmarks.result import Outcome, Result

if not Path("/proc/self/stat").exists():
    pytest.skip("the benchmarks need Linux", allow_module_level=True)

ENVIRONMENT = dict(os.environ)


# --- the file of contenders ------------------------------------------------------------------

SHIPPED = (
    *("direct", "nodepass", "nodepass-tls", "haproxy", "haproxy-tls", "haproxy-tls-full"),
    *("socat", "stunnel", "ssh", "nodepass-go", "frp", "rathole", "chisel"),
)
ENCRYPTED = {"nodepass-tls", "haproxy-tls", "haproxy-tls-full", "stunnel", "ssh", "chisel"}


def test_the_file_that_ships_is_right() -> None:
    rows = {row.name: row for row in contenders.read()}
    assert tuple(rows) == SHIPPED
    assert not rows["direct"].sides
    for name in SHIPPED[1:]:
        assert [side for side, _ in rows[name].sides] == ["server", "client"]
        assert all(rows[name].wants(word) for word in ("visitors", "target", "tunnel"))
    assert {row.name for row in rows.values() if "tls" in row.protocols} == ENCRYPTED
    assert results.STRAIGHT in rows
    assert {*results.RIVALS.values(), *run.QUICK} <= rows.keys()


def test_who_meets_which_load() -> None:
    rows = {row.name: row for row in contenders.read()}

    def meets(name: str) -> list[str]:
        row = rows[name]
        return [load.name for load in catalog.LOADS if row.suits(load) and row.prefers(load)]

    *tcp, idle = [load.name for load in catalog.LOADS if load.network == "tcp"]
    udp = [load.name for load in catalog.LOADS if load.network == "udp"]
    assert meets("direct") == [*tcp, *udp]  # no processes, so nothing of theirs to look at
    assert meets("nodepass") == [*tcp, *udp, idle, "help"]
    assert meets("haproxy") == [*tcp, idle]
    assert meets("haproxy-tls-full") == ["new-16", "first-byte"]
    assert meets("ssh") == ["bulk-up-1", "http-16", "new-16", "latency", "first-byte"]
    assert meets("frp") == [*meets("ssh"), "udp-200-1"]


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
        ('[[contender]]\nname = "one"', 'one: protocols: must hold "tcp" or "udp"'),
        ('[[contender]]\nname = "one"\nprotocols = ["tls"]', 'one: protocols: must hold "tcp"'),
        ('[[contender]]\nname = "one"\nprotocols = ["tcp", "ip"]', "one: protocols: 'ip' is none"),
        (toml("") + toml(""), "one: name: two rows have it"),
        (toml("program = []"), "one: program: there is no such key; choose from name, protocols"),
        (toml('programs = "socat"'), "one: programs: must be a list of texts"),
        (toml("programs = [5]"), "one: programs: must be a list of texts"),
        (toml("environment = {A = 5}"), "one: environment: must be a table of texts"),
        (toml("environment = 5"), "one: environment: must be a table"),
        (toml('loads = "new"'), "one: loads: must be a list of texts"),
        (toml('loads = ["new", "old"]'), "one: loads: 'old' is none of bulk-up-1, "),
        (toml('help = "x --help"'), "one: help: must be a list of texts"),
        (toml('help = ["{target}"]'), "one: help: {target} is none of {python}"),
        (toml('server = "socat"'), "one: server: must be a table"),
        (toml("[contender.server]"), "one: server: command: is missing"),
        (toml("[contender.client]|command = []"), "one: client: command: is missing"),
        (toml('[contender.client]|command = "x"'), "one: client: command: must be a list"),
        (toml('[contender.server]|command = ["x"]|wait = 1'), "one: server: wait: there is no"),
        (toml('[contender.server]|command = ["x"]|ready = ""'), "one: server: ready: must be a"),
        (toml('[contender.server]|command = ["{port}"]'), "server: command: {port} is none of {v"),
        (toml('[contender.server]|command = ["{config}"]'), "command: {config} without a config"),
        (toml('[contender.server]|command = ["x"]|config = "{a}"'), "server: config: {a} is none"),
        (
            toml('[contender.server]|command = ["{certificate}"]'),
            'one: programs: must hold "openssl", which makes the {certificate}',
        ),
        (
            toml('[contender.server]|command = ["x"]|config = "{key}.pub"'),
            'one: programs: must hold "ssh-keygen", which makes the {key}',
        ),
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
    files = {"certificate": tmp_path / "both.pem"}
    place = contenders.Place(tmp_path, {}, files, "udp", 1, 2, 3)
    values = place.values(tmp_path / "side.conf")
    assert set(values) == set(contenders.PLACEHOLDERS)
    text = '{"a": {"port": {tunnel}}, "b": "{python} {config}", "c": {}} {visitors}{target}'
    expected = (
        f'{{"a": {{"port": 3}}, "b": "{sys.executable} {tmp_path}/side.conf", "c": {{}}}} 12'
    )
    assert contenders.fill(text, values) == expected
    assert contenders.fill("{certificate} {network}", values) == f"{tmp_path}/both.pem udp"


def test_a_program_gets_its_whole_path() -> None:
    words = contenders.command_of(["sh", "-c", "{a}"], {"a": "b"}, {"PATH": "/none:/bin"})
    assert words == ["/bin/sh", "-c", "b"]
    assert contenders.command_of(["no-such"], {}, {"PATH": "/bin"}) == ["no-such"]


def test_missing_programs_are_named() -> None:
    path = os.environ["PATH"]
    assert loads.missing([], path) is None
    assert loads.missing(["sh", sys.executable], path) is None
    assert loads.missing(["sh", "no-such"], path) == "no-such is not on the PATH"
    both = loads.missing(["no-such", "nor-such"], path)
    assert both == "no-such and nor-such are not on the PATH"


# --- what tools print ------------------------------------------------------------------------

# What iperf3 3.12 -J, wrk 4.1.0, sockperf 3.7 and udpload printed, less what nobody reads.
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


SOCKPERF = """sockperf: \x1b[2;35m== version #3.7-no.git == \x1b[0m
[ 0] IP = 127.0.0.1       PORT = 19911 # TCP
sockperf: Warmup stage (sending a few dummy messages)...
sockperf: [Total Run] RunTime=1.000 sec; Warm up time=400 msec; SentMessages=70013; \
ReceivedMessages=70012
sockperf: [Valid Duration] RunTime=0.550 sec; SentMessages=38735; ReceivedMessages=38735
sockperf: \x1b[2;35m====> avg-rtt=14.181 (std-dev=3.068)\x1b[0m
sockperf: # dropped messages = 0; # duplicated messages = 0; # out-of-order messages = 0
sockperf: Summary: Round trip is 14.181 usec
sockperf: \x1b[2;35mTotal 38735 observations\x1b[0m; each percentile contains 387.35 observations
sockperf: ---> <MAX> observation =  110.724
sockperf: ---> percentile 99.999 =  110.724
sockperf: ---> percentile 99.000 =   19.288
sockperf: ---> percentile 50.000 =   13.369
sockperf: ---> <MIN> observation =   13.139
"""
UDPLOAD = """{"mode": "window", "size": 200, "visitors": 1, "window": 64, "in_flight": 64,
"seconds": 1.000001, "datagrams_per_s": 500.0, "bytes_per_s": 100000.0, "sent": 502,
"sent_in_all": 610, "received": 503, "echoed": 500, "lost": 2, "loss": 0.003984064, "late": 0,
"reordered": 0, "duplicates": 0, "corrupt": 1, "strays": 2, "rtt_mean_us": 7.5,
"rtt_p50_us": 7.0, "rtt_p99_us": 9.0, "rtt_max_us": 12.0, "echoed_in_all": 608,
"socket_drops": 4, "user_seconds": 0.1, "system_seconds": 0.9}"""
VISITS = '{"visits": 60, "errors": 3, "mean": 0.0002, "p50": 0.0001, "p99": 0.0009}'


def test_iperf3_counts_what_was_received() -> None:
    sample = parse_iperf3(IPERF3)
    assert sample.amount == pytest.approx(2.379612160)
    assert sample.figures == pytest.approx({"rate": 2.379552671})


def test_iperf3_says_what_went_wrong() -> None:
    refused = r"^iperf3: unable to connect to server: Connection refused$"
    with pytest.raises(BenchmarkError, match=refused):
        parse_iperf3(IPERF3_REFUSED)


def test_wrk_tells_rate_and_latency() -> None:
    sample = parse_wrk(WRK)
    assert sample.amount == 11738
    assert sample.figures == pytest.approx(
        {"rate": 11567.8, "mean": 3.14e-3, "p50": 618e-6, "p99": 60.14e-3, "errors": 0}
    )


def test_errors_of_wrk_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_wrk(WRK_ERRORS).figures["errors"] == 13777 + 11129
    # Such a line was added by hand; the target answers nothing but 200.
    other = WRK.replace("Requests/sec", "  Non-2xx or 3xx responses: 7\nRequests/sec")
    assert parse_wrk(other).figures["errors"] == 7
    (load,) = catalog.choose(("http-16",))
    monkeypatch.setattr(loads, "run_tool", lambda *_: WRK_ERRORS)
    with pytest.raises(BenchmarkError, match=r"^nothing came through; 24906 errors$"):
        load.measure(Scene(80, 81, ENVIRONMENT, 1))


def test_sockperf_tells_round_trips() -> None:
    sample = message.parse_sockperf(SOCKPERF)
    assert sample.amount == 70012  # the warm-up included, as in the CPU
    expected = {"mean": 14.181e-6, "p50": 13.369e-6, "p99": 19.288e-6, "errors": 0}
    assert sample.figures == pytest.approx(expected)
    dropped = SOCKPERF.replace("dropped messages = 0", "dropped messages = 2")
    assert message.parse_sockperf(dropped).figures["errors"] == 2
    none = SOCKPERF.replace("ReceivedMessages=70012", "ReceivedMessages=0")
    assert message.parse_sockperf(none).amount == 0


def test_what_sockperf_is_asked_and_answers() -> None:
    """As its server was seen to answer."""
    assert message.QUESTION.hex() == "000000000000000100030000000e"
    assert message.ANSWER.hex() == "000000000000000100020000000e"


def test_udpload_tells_loss_and_damage_apart() -> None:
    sample = datagram.parse_udpload(UDPLOAD)
    assert sample.amount == 608
    assert sample.figures == pytest.approx(
        {
            "rate": 500,
            "mean": 7.5e-6,
            "p50": 7e-6,
            "p99": 9e-6,
            "lost": 2,
            "sent": 502,
            "drops": 4,
            "errors": 3,
        }
    )
    none = UDPLOAD.replace('"echoed": 500', '"echoed": 0')
    assert datagram.parse_udpload(none).amount == 0  # though the warm-up saw some


def test_visits_that_failed_are_errors() -> None:
    sample = visit.parse_visitor(VISITS)
    assert sample.amount == 57
    assert sample.figures == {"errors": 3, "mean": 0.0002, "p50": 0.0001, "p99": 0.0009}
    assert visit.parse_visitor('{"visits": 60, "errors": 10}').amount == 0


PARSERS = (
    *(parse_iperf3, parse_wrk, message.parse_sockperf),
    *(datagram.parse_udpload, visit.parse_visitor),
)


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize("text", ["", "no figures\nhere", "{}", '{"end": 5}', "[]", "5", '"a"'])
def test_garbage_is_one_line(parse: Callable[[str], Sample], text: str) -> None:
    with pytest.raises(BenchmarkError, match=r"printed what we do not understand: .*$"):
        parse(text)


# --- loads -----------------------------------------------------------------------------------


def test_each_load_has_a_name_of_its_own() -> None:
    assert len(set(catalog.ALL)) == len(catalog.LOADS) == 20
    assert set(catalog.QUICK) < set(catalog.ALL)
    assert len({load.title for load in catalog.LOADS}) == len(catalog.LOADS)


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("bulk", [f"bulk-{way}-{n}" for way in ("up", "down") for n in (1, 4, 16)]),
        ("bulk-up-1", ["bulk-up-1"]),
        ("http-1", ["http-1"]),
        ("new", ["new-16"]),
        ("udp-200", ["udp-200-1", "udp-200-64", "udp-200-100"]),
        ("idle", ["idle-5000"]),
    ],
)
def test_only_takes_a_name_or_its_beginning(word: str, names: list[str]) -> None:
    assert [load.name for load in catalog.choose((word,))] == names


def test_commands_of_the_tools(tmp_path: Path) -> None:
    (back,) = catalog.choose(("bulk-down-4",))
    assert " ".join(back.command(80, 2)) == "iperf3 -J -c 127.0.0.1 -p 80 -P 4 -R -t 2"
    (kept,) = catalog.choose(("http-256",))
    words = "wrk --threads 1 --connections 256 --duration 3s --latency http://127.0.0.1:80/"
    assert " ".join(kept.command(80, 3)) == words
    (new,) = catalog.choose(("new-16",))
    assert "Connection: close" in new.command(80, 3)
    assert new.target(81, tmp_path)[0] == "haproxy"
    assert "bind 127.0.0.1:81\n" in (tmp_path / "target.conf").read_text()
    (ping,) = catalog.choose(("latency",))
    words = "sockperf ping-pong --tcp --full-rtt -i 127.0.0.1 -p 80 -m 14 -t 2"
    assert " ".join(ping.command(80, 2)) == words
    (udp,) = catalog.choose(("udp-1400-100",))
    words = "window 127.0.0.1:80 --size 1400 --window 1 --visitors 100 --seconds 1 --warmup 0.5"
    assert " ".join(udp.command(80, 1)).endswith(f"/udpload {words}")
    assert udp.command(80, 5)[-1] == "1.0"


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


# --- what is planned -------------------------------------------------------------------------


def planned(*words: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The contenders by load, and what is skipped."""
    outcome = Outcome()
    meetings = run.plan(run.parse(words), os.environ["PATH"], outcome)
    return {load.name: [row.name for row in rows] for load, rows in meetings}, outcome.skipped


@pytest.fixture
def everything_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is missing, and no limit is too low."""
    monkeypatch.setattr(run, "missing", lambda *_: None)
    monkeypatch.setattr(Load, "why_not", lambda *_: None)
    monkeypatch.setattr(visit.Idle, "why_not", lambda *_: None)
    monkeypatch.setattr(datagram.Udp, "why_not", lambda *_: None)


def test_a_row_may_prefer_some_loads(everything_here: None) -> None:
    found, skipped = planned()
    assert not skipped
    assert tuple(found) == catalog.ALL
    assert "ssh" not in found["http-1"]
    assert "ssh" in found["http-16"]
    assert found["help"] == ["nodepass"]
    assert "direct" not in found["idle-5000"]


def test_who_is_named_meets_all_that_it_can(everything_here: None) -> None:
    found, skipped = planned("--contender", "ssh,direct", "--only", "http-1,udp-200-1,help")
    assert found == {"http-1": ["direct", "ssh"], "udp-200-1": ["direct"]}
    assert skipped == {"help": "none of these contenders suits it"}
    found, skipped = planned("--contender", "ssh,direct", "--only", "udp-200-1")
    assert found == {"udp-200-1": ["direct"]}
    assert skipped == {"ssh": "none of these loads suits it"}


def test_quick_takes_fewer_of_both(everything_here: None) -> None:
    found, skipped = planned("--quick")
    assert not skipped
    assert tuple(found) == catalog.QUICK
    assert tuple(found["new-16"]) == run.QUICK
    assert "socat" in planned("--quick", "--contender", "socat")[0]["new-16"]


def test_a_contender_without_its_programs_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        run, "missing", lambda programs, _: "it is not here" if "socat" in programs else None
    )
    monkeypatch.setattr(Load, "why_not", lambda *_: None)
    words = ("--only", "http-16,http-256", "--contender")
    found, skipped = planned(*words, "direct,socat")
    assert found == {"http-16": ["direct"], "http-256": ["direct"]}
    assert skipped == {"socat": "it is not here"}
    assert planned(*words, "socat") == ({}, {"socat": "it is not here"})


def test_a_load_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    (many,) = catalog.choose(("idle-5000",))
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    why = "it takes 11000 open files for each process; the limit is 4096"
    assert many.why_not("") == why
    (udp,) = catalog.choose(("udp-200-1",))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(datagram, "FOLDER", Path("/nonexistent"))
    assert udp.why_not("") == "there is no C compiler (cc, or what CC names)"
    (one,) = catalog.choose(("bulk-up-1",))
    assert one.why_not("/nonexistent") == "iperf3 is not on the PATH"


# --- medians and tables ----------------------------------------------------------------------

BULK, HTTP, FIRST, UDP, IDLE = catalog.choose(
    ("bulk-up-1", "http-16", "first-byte", "udp-200-1", "idle-5000")
)


def result(load: Load, name: str, *runs: tuple[float, float], tls: bool = False) -> Result:
    """Runs of rate and cost, one each round."""
    rest = {"errors": 0.0, "strangers": 0.0, "memory": 3e6}
    figures = [{"rate": rate, "cost": cost, **rest} for rate, cost in runs]
    return Result(load, name, tls, dict(enumerate(figures)))


def other_result(load: Load, name: str, *runs: dict[str, float]) -> Result:
    """Runs of these figures, undisturbed."""
    whole = [{"errors": 0.0, "strangers": 0.0, **figures} for figures in runs]
    return Result(load, name, False, dict(enumerate(whole)))


def test_medians_and_ratios_are_those_of_neighbours() -> None:
    direct = result(BULK, "direct", (4.0, 1.0), (2.0, 1.0), (8.0, 1.0))
    for figures in direct.runs.values():
        del figures["cost"]
    rival = result(BULK, "haproxy", (1.0, 2.0), (1.0, 1.0), (2.0, 4.0))
    ours = result(BULK, "nodepass", (2.0, 1.0), (1.5, 1.0), (6.0, 1.0))
    outcome = Outcome([direct, rival, ours])
    found = results.summary(outcome, ours)
    assert (found["rate"], found["least"], found["most"]) == (2.0, 1.5, 6.0)
    assert found["headline_of_direct"] == 0.75  # of 0.5, 0.75, 0.75; not 2/4
    assert found["headline_of_haproxy"] == 2.0
    assert found["cost_of_haproxy"] == 0.5
    assert "mean" not in found
    assert "cost" not in results.summary(outcome, direct)


def test_a_ratio_takes_the_rounds_that_both_have() -> None:
    ours = result(BULK, "nodepass", (2.0, 1.0), (3.0, 1.0), (8.0, 1.0))
    other = result(BULK, "haproxy", (1.0, 0.0), (9.0, 0.0), (2.0, 0.0))
    del other.runs[1]
    assert results.ratio(ours, other, "rate") == 3.0
    assert results.ratio(ours, other, "cost") is None  # nothing is divided by 0
    assert results.ratio(ours, None, "rate") is None


def test_each_is_compared_with_the_rival_of_its_kind() -> None:
    outcome = Outcome(
        [
            result(HTTP, "haproxy", (10.0, 1.0)),
            result(HTTP, "haproxy-tls", (5.0, 2.0), tls=True),
            result(HTTP, "nodepass-tls", (10.0, 1.0), tls=True),
            result(BULK, "haproxy-tls", (1.0, 1.0), tls=True),
        ]
    )
    found = results.summary(outcome, outcome.results[2])
    assert (found["headline_of_haproxy"], found["cost_of_haproxy"]) == (2.0, 0.5)


def test_loss_is_that_of_all_runs_together() -> None:
    few = {"rate": 1.0, "lost": 1.0, "sent": 10.0}
    many = {"rate": 9.0, "lost": 0.0, "sent": 90.0}
    ours = other_result(UDP, "nodepass", few, many)
    assert results.summary(Outcome([ours]), ours)["loss"] == 0.01
    assert results.loss(result(BULK, "nodepass", (1.0, 1.0))) is None


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
    assert lines[0] == "### Overview"
    lines = lines[lines.index("### http-16: HTTP requests, 16 connections kept alive") :]
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
    assert "### Aims" not in lines  # there is no haproxy to divide by


def test_overview_has_a_row_for_each_load() -> None:
    outcome = Outcome(
        [
            result(HTTP, "direct", (100000.0, 0.0)),
            result(HTTP, "nodepass", (30000.0, 54.0), (33000.0, 54.0)),
            result(HTTP, "haproxy", (20000.0, 60.0), (30000.0, 60.0)),
            result(BULK, "nodepass", (1.5, 0.5)),
        ]
    )
    lines = report.markdown(outcome).splitlines()
    assert lines[:6] == [
        "### Overview",
        "",
        "| load | direct | nodepass | haproxy | nodepass of it |",
        "| --- | --: | --: | --: | --: |",
        "| http-16, requests/s | 100000 | 31500 | 25000 | 1.30 |",
        "| bulk-up-1, GB/s | – | 1.50 | – | – |",
    ]


def test_a_headline_stands_in_its_own_unit() -> None:
    """And has no second column; a loss or an idle CPU of nothing is shown."""
    first = other_result(FIRST, "nodepass", {"p50": 0.00025, "mean": 0.0003, "p99": 0.001})
    udp = other_result(UDP, "nodepass", {"rate": 9e4, "lost": 0.0, "sent": 9.0, "drops": 0.0})
    sides = {"relay_server": 1024.0, "relay_client": 2048.0}
    idle = other_result(IDLE, "nodepass", {"relay": 2048.0, **sides, "idle_cpu": 0.0})
    lines = report.markdown(Outcome([first, udp, idle])).splitlines()
    assert "| contender | µs (least – most) | p99 |" in lines
    assert "| nodepass | 250 (250 – 250) | 1000 µs |" in lines
    assert "| contender | datagrams/s (least – most) | loss |" in lines
    assert "| nodepass | 90000 (90000 – 90000) | 0.000% |" in lines
    assert "| contender | KiB/relay (least – most) | server | client | idle CPU |" in lines
    assert "| nodepass | 2.00 (2.00 – 2.00) | 1.00 KiB | 2.00 KiB | 0.000% |" in lines


def test_one_run_in_a_few_words() -> None:
    figures = {"rate": 90000.0, "mean": 7e-4, "lost": 1.0, "sent": 1000.0, "errors": 0.0}
    words = report.brief(UDP, {**figures, "drops": 3.0, "strangers": 0.5})
    assert words == (
        "90000 datagrams/s, 700 µs mean, loss 0.100%, 3 drops, while others used 0.5 cores"
    )
    idle = {"relay": 1536.0, "idle_cpu": 0.01, "errors": 0.0, "strangers": 0.0}
    assert report.brief(IDLE, idle) == "1.50 KiB/relay, idle CPU 1.000%"


# --- aims ------------------------------------------------------------------------------------


def test_aims_name_what_there_is() -> None:
    rows = {row.name: row for row in contenders.read()}
    for one in aim.AIMS:
        (load,) = [load for load in catalog.LOADS if load.name == one.load]
        assert one.figure in aim.NAMES
        for name in filter(None, (one.contender, one.other)):
            assert rows[name].suits(load)
            assert rows[name].prefers(load)
    assert len({one.text for one in aim.AIMS}) == len(aim.AIMS)


def test_a_ratio_that_is_aimed_at() -> None:
    ours = result(BULK, "nodepass", (2.0, 1.0), (3.0, 1.0), (1.7, 1.0))
    outcome = Outcome([ours, result(BULK, "haproxy", (1.0, 2.0), (2.0, 2.0), (1.0, 2.5))])
    rate, cost = aim.reached(outcome)
    assert rate.aim.text == "bulk-up-1, nodepass: rate ≥ 1.60 × haproxy"
    assert (rate.value, rate.least, rate.most) == (1.7, 1.5, 2.0)
    assert rate.is_met
    assert rate.text == "1.70 × haproxy (1.50 – 2.00)"
    assert cost.aim.text == "bulk-up-1, nodepass: CPU ≤ 0.45 × haproxy"
    assert cost.value == 0.5
    assert not cost.is_met
    lines = report.markdown(outcome).splitlines()
    row = "| bulk-up-1, nodepass: CPU ≤ 0.45 × haproxy | 0.50 × haproxy (0.40 – 0.50) | no |"
    assert row in lines


@pytest.mark.parametrize(
    ("load", "figures", "words", "reached", "is_met"),
    [
        ("help", {"p50": 0.0712}, "time ≤ 150 ms", "71.2 ms (71.2 – 71.2)", True),
        (
            "idle-5000",
            {"relay": 8193.0},
            "memory per relay and side ≤ 8 KiB",
            "8 KiB (8 – 8)",
            False,
        ),
        ("idle-5000", {"idle_cpu": 0.01}, "CPU of both sides ≤ 1 %", "1 % (1 – 1)", True),
        (
            "udp-200-1",
            {"lost": 2.0, "sent": 1000.0},
            "loss ≤ 0.1 %",
            "0.2 % (0.2 – 0.2)",
            False,
        ),
    ],
)
def test_a_figure_that_is_aimed_at(
    load: str, figures: dict[str, float], words: str, reached: str, is_met: bool
) -> None:
    (kind,) = catalog.choose((load,))
    (one,) = aim.reached(Outcome([other_result(kind, "nodepass", figures)]))
    assert one.aim.text == f"{load}, nodepass: {words}"
    assert (one.text, one.is_met) == (reached, is_met)


def test_a_loss_that_is_aimed_at_is_that_of_all_runs() -> None:
    few = {"lost": 1.0, "sent": 10.0}
    none = {"lost": 0.0, "sent": 9990.0}
    (one,) = aim.reached(Outcome([other_result(UDP, "nodepass", few, none)]))
    assert one.value == pytest.approx(0.01)
    assert (one.least, one.most) == (0, 10)
    assert one.is_met


def test_a_rate_that_is_aimed_at_and_its_fields() -> None:
    (load,) = catalog.choose(("new-16",))
    (one,) = aim.reached(Outcome([result(load, "nodepass-tls", (1234.0, 1.0), (900.0, 1.0))]))
    assert one.aim.text == "new-16, nodepass-tls: rate ≥ 800/s"
    assert one.text == "1067/s (900 – 1234)"
    assert one.fields() == {
        "aim": one.aim.text,
        "load": "new-16",
        "contender": "nodepass-tls",
        "figure": "rate",
        "of": None,
        "unit": "/s",
        "at_least": 800,
        "reached": 1067,
        "least": 900,
        "most": 1234,
        "is_met": True,
    }


# --- pictures --------------------------------------------------------------------------------

DRAWING = """
import sys
from pathlib import Path
from benchmarks import catalog, picture
from benchmarks.result import Result
runs = {0: {"rate": 1.5, "cost": 2.0}, 1: {"rate": 2.5, "cost": 3.0}}
results = [
    Result(kind, name, False, runs)
    for kind in catalog.choose(("bulk-up", "new")) for name in ("direct", "nodepass")
]
alone = [Result(kind, "nodepass", False, {0: {"p50": 1}}) for kind in catalog.choose(("help",))]
picture.draw_headlines(Path(sys.argv[1]), results + alone)
print(picture.draw_costs(Path(sys.argv[2]), results + alone))
print(picture.draw_costs(Path(sys.argv[3]), alone))
"""


def test_the_pictures(tmp_path: Path) -> None:
    """In a process of its own: matplotlib keeps fonts open and a thread."""
    if not picture.can_draw():
        pytest.skip("matplotlib is not installed")
    paths = [tmp_path / name for name in ("figures.png", "cpu.png", "none.png")]
    command = [sys.executable, "-c", DRAWING, *map(str, paths)]
    done = subprocess.run(
        command, check=True, cwd=machine.ROOT, timeout=60, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "False"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[:2])
    assert not paths[2].exists()


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


# --- visits and starts -----------------------------------------------------------------------


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
