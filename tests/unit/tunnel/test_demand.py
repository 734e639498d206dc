"""demand: how many idle links are wanted, from how fast they are taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodepass.tunnel.demand import DEMAND_MARGIN, DEMAND_WINDOW, Demand


def test_demand_starts_with_the_least() -> None:
    assert Demand(16, 1024, 0.0).wanted == 16


def test_demand_follows_a_burst_up_to_the_most() -> None:
    demand = Demand(4, 20, 0.0)
    raises = [demand.wanted for _ in range(100) if demand.count_launch(0.0)]
    assert raises == sorted(raises)
    assert demand.wanted == 20
    assert not demand.count_launch(0.0)
    assert len(raises) < 10, "a steadily rising rate does not cost a signal per launch"


def test_demand_counts_a_window_at_a_time() -> None:
    demand = Demand(4, 1000, 0.0)
    for turn in range(100):
        demand.count_launch(turn * DEMAND_WINDOW)
    assert demand.wanted <= 4 + 2 * DEMAND_MARGIN


def test_demand_shrinks_in_quiet_and_not_below_the_least() -> None:
    demand = Demand(4, 1000, 0.0)
    for _ in range(200):
        demand.count_launch(0.0)
    demand.end_period()
    assert demand.wanted >= 4 + DEMAND_MARGIN * 200, "that period was no quiet one"
    before = demand.wanted
    surplus = demand.end_period()
    assert 0 < surplus == before - demand.wanted
    for _ in range(100):
        demand.end_period()
    assert demand.wanted == 4
    assert demand.end_period() == 0


def test_demand_counts_who_waits() -> None:
    demand = Demand(4, 100, 0.0)
    assert demand.count_waiting(50)
    assert demand.wanted >= 54
    assert not demand.count_waiting(10)
    assert demand.count_waiting(1000)
    assert demand.wanted == 100
    assert not demand.count_waiting(2000)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.floats(0, 10)),
        st.tuples(st.just("wait"), st.integers(0, 5000)),
        st.tuples(st.just("rest"), st.just(0)),
    ),
    max_size=200,
)


@given(st.integers(1, 100), st.integers(0, 1000), steps)
def test_demand_keeps_its_bounds_and_tells_the_truth(
    least: int, span: int, done: list[tuple[str, float]]
) -> None:
    most = least + span
    demand = Demand(least, most, 0.0)
    now = 0.0
    for what, value in done:
        before = demand.wanted
        if what == "take":
            now += value
            assert demand.count_launch(now) is (demand.wanted > before)
            assert demand.wanted >= before
        elif what == "wait":
            assert demand.count_waiting(int(value)) is (demand.wanted > before)
            assert demand.wanted >= min(most, least + int(value))
        else:
            assert demand.end_period() == before - demand.wanted
        assert least <= demand.wanted <= most


@given(st.integers(1, 200), st.integers(1, 400))
def test_demand_covers_the_busiest_window_of_the_period(least: int, launches: int) -> None:
    demand = Demand(least, 100_000, 0.0)
    for _ in range(launches):
        demand.count_launch(0.0)
    assert demand.wanted >= least + DEMAND_MARGIN * launches
    demand.count_launch(10.0)
    demand.end_period()
    assert demand.wanted >= least + DEMAND_MARGIN * launches, "a burst is remembered one period"
