"""drop: losses are told at once, then once a minute with their sum, and each says what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from nodepass.observe.log import REPEAT_PAUSE, Log
from nodepass.observe.loss import CAUSES, HINTS, DropReport
from nodepass.observe.stats import NOTHING, Datagrams


class Hearer:
    """A report and the lines that it has written."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self._report = DropReport(Log("drop", "warn"), self._fields)

    def _fields(self, cause: str) -> dict[str, object]:
        return {"limit": 8192} if cause == "too_large" else {}

    def look(self, datagrams: Datagrams, now: float = 0.0, *, is_last: bool = False) -> list[str]:
        """Let it look; return the lines about it."""
        self._caplog.clear()
        self._report.look(datagrams, now, is_last=is_last)
        assert all(record.levelname == "WARNING" for record in self._caplog.records)
        return [record.getMessage() for record in self._caplog.records]


@pytest.fixture
def hearer(caplog: pytest.LogCaptureFixture) -> Iterator[Hearer]:
    with caplog.at_level(logging.WARNING, "nodepass"):
        yield Hearer(caplog)


def test_every_loss_that_is_counted_has_a_cause() -> None:
    carried = {"up", "down", "bytes_up", "bytes_down"}
    assert set(CAUSES) == set(Datagrams._fields) - carried
    assert set(HINTS) < set(CAUSES)
    lost = [cause for cause in CAUSES if Datagrams(**{cause: 1}).dropped]
    assert set(CAUSES) - set(lost) == {"refused"}, "a refusal is no loss, yet worth a line"


def test_no_line_while_nothing_is_lost(hearer: Hearer) -> None:
    assert hearer.look(NOTHING) == []
    assert hearer.look(Datagrams(up=9, down=9, bytes_up=9, bytes_down=9), 1000.0) == []
    assert hearer.look(NOTHING, 2000.0, is_last=True) == []


@pytest.mark.parametrize("cause", list(CAUSES))
def test_each_loss_is_told_at_once(hearer: Hearer, cause: str) -> None:
    (line,) = hearer.look(Datagrams(**{cause: 3}), 5.0)
    assert line.startswith(f"{CAUSES[cause]}  count=3")
    assert ("limit=8192" in line) is (cause == "too_large")
    assert ("hint=" in line) is (cause in HINTS)
    assert HINTS.get(cause, "") in line


def test_all_losses_of_one_look_are_told(hearer: Hearer) -> None:
    every = Datagrams(*range(1, 11))
    assert [line.partition("  ")[0] for line in hearer.look(every)] == list(CAUSES.values())


def test_what_follows_is_summed_up_for_a_minute(hearer: Hearer) -> None:
    assert len(hearer.look(Datagrams(no_link=1), 0.0)) == 1
    assert hearer.look(Datagrams(no_link=3), 5.0) == []
    assert hearer.look(Datagrams(no_link=6), REPEAT_PAUSE - 0.1) == []
    (line,) = hearer.look(Datagrams(no_link=6), REPEAT_PAUSE)
    assert "count=5" in line, "those since the first line"
    assert hearer.look(Datagrams(no_link=6), 2 * REPEAT_PAUSE) == [], "nothing is new"
    (line,) = hearer.look(Datagrams(no_link=7), 2 * REPEAT_PAUSE)
    assert "count=1" in line


def test_a_loss_after_long_quiet_is_told_at_once(hearer: Hearer) -> None:
    hearer.look(Datagrams(slow_link=1), 0.0)
    assert hearer.look(Datagrams(slow_link=1), REPEAT_PAUSE) == []
    assert len(hearer.look(Datagrams(slow_link=2), REPEAT_PAUSE + 1)) == 1
    assert hearer.look(Datagrams(slow_link=3), REPEAT_PAUSE + 2) == [], (
        "the minute runs from that line"
    )


def test_one_cause_does_not_silence_another(hearer: Hearer) -> None:
    hearer.look(Datagrams(unsent=1), 0.0)
    (line,) = hearer.look(Datagrams(unsent=2, overrun=1), 1.0)
    assert line.startswith(CAUSES["overrun"])


def test_last_look_tells_the_rest(hearer: Hearer) -> None:
    hearer.look(Datagrams(refused=1, unsent=1), 0.0)
    assert hearer.look(Datagrams(refused=4, unsent=1), 1.0) == []
    (line,) = hearer.look(Datagrams(refused=5, unsent=1), 2.0, is_last=True)
    assert line.startswith(CAUSES["refused"])
    assert "count=4" in line


def test_counts_that_were_lost_with_an_engine_are_no_news(hearer: Hearer) -> None:
    """A gate or relay whose engine has not ended in time takes its counts along."""
    hearer.look(Datagrams(no_link=5), 0.0)
    assert hearer.look(NOTHING, 1.0, is_last=True) == []
