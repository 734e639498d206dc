"""benchmarks: medians, tables and aims."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import (
    aim,
    catalog,
    machine,
    picture,
    report,
)
from benchmarks import contender as contenders
from benchmarks import result as results
from benchmarks.load import Load
from benchmarks.result import Outcome, Result
from tests.kit.benchmark_words import BULK, FIRST, HTTP, IDLE, UDP

# --- medians and tables --------------------------------------------------------------------------


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


# --- aims ----------------------------------------------------------------------------------------


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


# --- pictures ------------------------------------------------------------------------------------


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
