"""Demand against a model: how far the wish may go, and that it follows and forgets the rate."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nodepass.tunnel.demand import DECAY, DEMAND_MARGIN, DEMAND_WINDOW, GROWTH, Demand

PERIODS: int = 60
"""Quiet report periods after which any wish has shrunk to the least: 10,000 * 0.75 ** 60 < 1."""


class DemandMachine(RuleBasedStateMachine):
    """Launches, waiting visitors and report periods in any order, on a clock of its own."""

    @initialize(least=st.integers(1, 40), spare=st.integers(0, 2000))
    def begin(self, least: int, spare: int) -> None:
        self.least, self.most = least, least + spare
        self.now = 0.0
        self.window, self.launches = 0.0, 0
        self.needed = least
        """The most that was needed since the last report period."""
        self.demand = Demand(self.least, self.most, self.now)

    @rule(pause=st.floats(0, 2 * DEMAND_WINDOW, width=32), count=st.integers(1, 50))
    def launch(self, pause: float, count: int) -> None:
        self.now += pause
        if self.now - self.window >= DEMAND_WINDOW:
            self.window, self.launches = self.now, 0
        for _ in range(count):
            self.launches += 1
            before = self.demand.wanted
            grew = self.demand.count_launch(self.now)
            self._look(before, grew, self.least + DEMAND_MARGIN * self.launches)

    @rule(waiting=st.integers(1, 3000))
    def wait(self, waiting: int) -> None:
        before = self.demand.wanted
        self._look(before, self.demand.count_waiting(waiting), self.least + waiting)

    @rule()
    def end_period(self) -> None:
        before = self.demand.wanted
        shrunk = self.demand.end_period()
        assert shrunk == before - self.demand.wanted >= 0
        assert self.demand.wanted >= int(before * DECAY), "a lull does not undo the stock"
        assert self.demand.wanted >= min(self.most, self.needed), "it was needed just now"
        self.needed = self.least

    @rule()
    def fall_silent(self) -> None:
        for _ in range(PERIODS):
            self.demand.end_period()
        self.needed = self.least
        assert self.demand.wanted == self.least

    def _look(self, before: int, grew: bool, need: int) -> None:
        after = self.demand.wanted
        self.needed = max(self.needed, min(self.most, need))
        assert grew is (after > before)
        assert after >= min(self.most, need), "what is needed now is wanted"
        if grew:
            assert after >= min(self.most, int(before * GROWTH)), "a raise is worth its signal"
            assert after <= max(need, int(before * GROWTH)), "and not more than that"

    @invariant()
    def stays_within_bounds(self) -> None:
        if hasattr(self, "demand"):
            assert self.least <= self.demand.wanted <= self.most


TestDemand = DemandMachine.TestCase
