"""circle: a visitor who comes from one of our own target connections."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodepass.client import circle
from nodepass.client.circle import ALARM, LEAST, LONGEST, MAX_HOSTS, SHARE, Circle
from nodepass.protocol.messages import Kind


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(circle, "time", clock)
    monkeypatch.setattr(circle, "_steps", {})
    monkeypatch.setattr(circle, "_hosts", {})
    yield clock
    assert not circle._steps, "a target connection is still watched"


FULL = int(1024 * SHARE)


def test_c10_own_connection_comes_back() -> None:
    ours = Circle(1024)
    source = ours.begin(Kind.TCP, "10.0.0.1:40000", "192.0.2.7:1234")
    assert ours.leads_back(Kind.TCP, "10.0.0.1:40000")
    assert not ours.leads_back(Kind.TCP, "10.0.0.1:40001")
    assert not ours.leads_back(Kind.UDP, "10.0.0.1:40000"), "the ports of UDP are others"
    ours.end(source)
    ours.end(source)
    assert not ours.leads_back(Kind.TCP, "10.0.0.1:40000")


def test_c10_way_back_through_other_tunnels() -> None:
    one, two = Circle(64), Circle(64)
    first = one.begin(Kind.TCP, "[2001:db8::1]:1", "192.0.2.7:1")
    second = two.begin(Kind.TCP, "10.0.0.2:2", "[2001:db8::1]:1")
    assert one.leads_back(Kind.TCP, "10.0.0.2:2")
    assert two.leads_back(Kind.TCP, "10.0.0.2:2")
    assert not two.leads_back(Kind.TCP, "[2001:db8::1]:1"), "a chain of tunnels is no circle"
    one.end(second)
    assert two.leads_back(Kind.TCP, "10.0.0.2:2"), "it is not its own"
    one.end(first)
    two.end(second)


def test_c10_ring_of_foreign_steps_ends() -> None:
    other, ours = Circle(64), Circle(64)
    steps = [
        other.begin(Kind.TCP, f"10.0.0.1:{n}", f"10.0.0.1:{(n + 1) % LONGEST}")
        for n in range(LONGEST)
    ]
    assert not ours.leads_back(Kind.TCP, "10.0.0.1:0")
    for step in steps:
        other.end(step)


@pytest.mark.parametrize(
    ("source", "visitor"),
    [
        ("[fe80::1%eth0]:5", "[fe80::1%3]:5"),
        ("[fe80::1%eth0]:5", "[fe80::1]:5"),
        ("[::1]:5", "[::1]:5"),
    ],
)
def test_c10_zones_are_left_aside(source: str, visitor: str) -> None:
    ours = Circle(64)
    step = ours.begin(Kind.TCP, source, "192.0.2.7:1")
    assert ours.is_near(visitor, 64)
    assert ours.leads_back(Kind.TCP, visitor)
    assert not ours.leads_back(Kind.TCP, "[fe80::1%eth0]:6")
    ours.end(step)


def test_c10_looked_at_only_among_many_and_from_our_hosts(clock: Clock) -> None:
    ours = Circle(1024)
    assert not ours.is_near("10.0.0.1:1", FULL - 1)
    assert ours.is_near("10.0.0.1:1", FULL), "no host is known yet"
    assert not ours.is_near("", FULL), "a seed server says no address"
    step = ours.begin(Kind.TCP, "10.0.0.1:40000", "192.0.2.7:1")
    assert ours.is_near("10.0.0.1:1", FULL)
    assert not ours.is_near("10.0.0.2:1", FULL)
    assert ours.leads_back(Kind.TCP, "10.0.0.1:40000")
    assert ours.is_near("10.0.0.1:1", 1), "from now on all are looked at"
    clock.now += ALARM + 1
    assert not ours.is_near("10.0.0.1:1", 1)
    ours.end(step)


def test_c10_small_limits_have_a_floor() -> None:
    assert not Circle(1).is_near("10.0.0.1:1", LEAST - 1)
    assert Circle(1).is_near("10.0.0.1:1", LEAST)


def test_c10_hosts_are_bounded() -> None:
    ours = Circle(64)
    for number in range(2 * MAX_HOSTS):
        ours.end(ours.begin(Kind.TCP, f"10.0.0.{number}:1", "192.0.2.7:1"))
    assert len(circle._hosts) == MAX_HOSTS
