"""benchmarks: what tools print, and the loads of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks import (
    catalog,
    datagram,
    message,
    run,
    visit,
)
from benchmarks import load as loads
from benchmarks.bulk import parse_iperf3
from benchmarks.load import Sample, Scene
from benchmarks.machine import BenchmarkError
from benchmarks.request import parse_wrk
from tests.kit.benchmark_words import ENVIRONMENT

# --- what tools print ----------------------------------------------------------------------------


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


# --- loads ---------------------------------------------------------------------------------------


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
