"""What the report line shows."""

from __future__ import annotations

import dataclasses

import pytest

from nodepass.observe.stats import NOTHING, Counters, Datagrams, TunnelStatistics, least_rtt

STATISTICS = TunnelStatistics(
    mode="server",
    sessions_open=1,
    sessions=2,
    visitors_open=3,
    visitors_waiting=4,
    visitors=5,
    visitors_refused=6,
    relays_open=7,
    relays_reset=8,
    launches_failed=9,
    links_idle=10,
    links_wanted=11,
    links=12,
    links_lost=13,
    strangers=14,
    bytes_up=15,
    bytes_down=16,
    datagrams=Datagrams(up=17, down=18, too_large=1, slow_link=2, no_link=3, overrun=4, unsent=5),
    rtt=0.01234,
)


def test_counters_start_at_nothing() -> None:
    counts = dataclasses.asdict(Counters())
    assert counts.pop("datagrams") == NOTHING
    assert set(counts.values()) == {0}


def test_report() -> None:
    assert list(STATISTICS.report().items()) == [
        ("sessions", 1),
        ("visitors", 3),
        ("waiting", 4),
        ("relays", 7),
        ("idle", 10),
        ("wanted", 11),
        ("up", 15),
        ("down", 16),
        ("datagrams", 35),
        ("dropped", 15),
        ("rtt_ms", "12.3"),
    ]


def test_report_without_a_round_trip() -> None:
    assert dataclasses.replace(STATISTICS, rtt=None).report()["rtt_ms"] == "-"


def test_statistics_are_one_look() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        STATISTICS.visitors = 0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("rtts", "least"),
    [
        ([], None),
        ([None, None], None),
        ([0.2, None, 0.1, 0.3], 0.1),
        ([0.0, 1.0], 0.0),
    ],
)
def test_least_rtt(rtts: list[float | None], least: float | None) -> None:
    assert least_rtt(iter(rtts)) == least


def test_datagrams_add_up_field_by_field() -> None:
    one = Datagrams(*range(10))
    assert Datagrams.total([]) == NOTHING
    assert Datagrams.total([one]) == one
    assert Datagrams.total([one, one, NOTHING]) == Datagrams(*range(0, 20, 2))


def test_refusals_are_no_losses() -> None:
    assert Datagrams(up=9, refused=3).dropped == 0
    assert Datagrams(too_large=1, slow_link=2, no_link=4, overrun=8, unsent=16).dropped == 31
