"""penalty: who has failed waits, nobody else does, and little is remembered."""

from __future__ import annotations

import itertools

import pytest

from nodepass.server import throttle
from nodepass.server.throttle import FIRST_DELAY, FORGET_AFTER, LONGEST_DELAY, Throttle


def failed(times: int, source: str = "10.0.0.1", now: float = 100.0) -> Throttle:
    penalties = Throttle()
    for _ in range(times):
        penalties.fail(source, now)
    return penalties


def test_nobody_waits_who_has_not_failed() -> None:
    penalties = failed(5)
    assert penalties.delay("10.0.0.2", 100.0) == 0.0
    assert Throttle().delay("10.0.0.1", 0.0) == 0.0
    assert len(penalties) == 1, "asking leaves nothing behind"


def test_delay_doubles_up_to_its_limit() -> None:
    delays = [failed(times).delay("10.0.0.1", 100.0) for times in range(1, 9)]
    assert delays[0] == FIRST_DELAY
    for before, after in itertools.pairwise(delays):
        assert after == min(LONGEST_DELAY, 2 * before)
    assert delays[-1] == LONGEST_DELAY


def test_delay_of_somebody_who_never_stops_stays_a_number() -> None:
    assert failed(5000).delay("10.0.0.1", 100.0) == LONGEST_DELAY


def test_longest_delay_leaves_a_client_its_answer() -> None:
    """A client with the right password behind a guesser's address waits for 5 s by default."""
    assert LONGEST_DELAY <= 5.0 / 2


def test_time_without_a_failure_forgets() -> None:
    penalties = failed(3)
    assert penalties.delay("10.0.0.1", 100.0 + FORGET_AFTER - 0.001) == 4 * FIRST_DELAY
    assert penalties.delay("10.0.0.1", 100.0 + FORGET_AFTER) == 0.0
    assert len(penalties) == 0
    penalties.fail("10.0.0.1", 200.0)
    assert penalties.delay("10.0.0.1", 200.0) == FIRST_DELAY, "it starts over"


def test_each_failure_starts_the_time_anew() -> None:
    penalties = failed(1)
    penalties.fail("10.0.0.1", 100.0 + FORGET_AFTER - 1)
    assert penalties.delay("10.0.0.1", 100.0 + FORGET_AFTER + 1) == 2 * FIRST_DELAY


def test_failure_after_a_long_time_is_the_first_again() -> None:
    penalties = failed(4)
    penalties.fail("10.0.0.1", 100.0 + FORGET_AFTER)
    assert penalties.delay("10.0.0.1", 100.0 + FORGET_AFTER) == FIRST_DELAY


def test_table_is_bounded_and_the_longest_quiet_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "MAX_SOURCES", 4)
    penalties = Throttle()
    for moment, number in enumerate((0, 1, 2, 0, 3, 4, 5)):  # 0 does not stay quiet
        penalties.fail(f"10.0.0.{number}", 100.0 + moment)
    assert len(penalties) == 4
    delays = [penalties.delay(f"10.0.0.{number}", 107.0) for number in range(6)]
    assert delays == [2 * FIRST_DELAY, 0.0, 0.0, FIRST_DELAY, FIRST_DELAY, FIRST_DELAY]


def test_many_sources_cost_no_more_than_the_table() -> None:
    penalties = Throttle()
    for number in range(throttle.MAX_SOURCES + 500):
        penalties.fail(f"source {number}", 100.0)
    assert len(penalties) == throttle.MAX_SOURCES
