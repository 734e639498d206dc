"""circle: a visitor who comes from one of our own target connections."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodepass.client import circle
from nodepass.client.circle import LONGEST, Circle
from nodepass.config.address import Address
from nodepass.protocol.messages import Kind


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(circle, "_steps", {})
    monkeypatch.setattr(circle, "_circles", set())
    yield
    assert not circle._steps, "a target connection is still watched"


def near(target: str = "10.0.0.5", *, arrival: str = "", port: int = 80) -> Circle:
    made = Circle(target, port)
    made.learn(Address(arrival, port), is_one_machine=True)
    return made


def test_c10_own_connection_comes_back() -> None:
    ours = near()
    source = ours.begin(Kind.TCP, "10.0.0.1:40000", "192.0.2.7:1234")
    assert ours.leads_back(Kind.TCP, "10.0.0.1:40000")
    assert not ours.leads_back(Kind.TCP, "10.0.0.1:40001")
    assert not ours.leads_back(Kind.UDP, "10.0.0.1:40000"), "the ports of UDP are others"
    ours.end(source, "192.0.2.7:1234")
    ours.end(source, "192.0.2.7:1234")
    assert not ours.leads_back(Kind.TCP, "10.0.0.1:40000")


@pytest.mark.parametrize(
    ("target", "arrival", "is_one_machine", "expected"),
    [
        (("127.0.0.1", 80), ("127.0.0.1", 80), True, True),
        (("127.0.0.1", 80), ("127.0.0.1", 81), True, False),
        (("127.0.0.1", 80), ("127.0.0.1", 80), False, False),
        (("", 80), ("", 80), True, True),
        (("", 80), ("", 80), False, False),
        (("localhost", 80), ("::1", 80), True, True),
        (("192.0.2.1", 80), ("", 80), False, True),
        (("192.0.2.1", 80), ("0.0.0.0", 80), False, True),
        (("192.0.2.1", 80), ("192.0.2.1", 80), False, True),
        (("192.0.2.1", 80), ("192.0.2.2", 80), False, False),
        (("2001:db8::1", 80), ("::", 80), False, True),
        (("example.org", 80), ("192.0.2.2", 80), False, True),
    ],
)
def test_c10_which_targets_may_lead_back(
    target: tuple[str, int], arrival: tuple[str, int], is_one_machine: bool, expected: bool
) -> None:
    ours = Circle(*target)
    assert not ours.is_near
    ours.learn(Address(*arrival), is_one_machine=is_one_machine)
    assert ours.is_near is expected
    ours.learn(None, is_one_machine=is_one_machine)
    assert not ours.is_near, "a seed server does not say"


def test_c10_way_back_through_other_tunnels() -> None:
    one, two = Circle("10.0.0.5", 81), Circle("10.0.0.6", 80)
    one.learn(Address("", 80), is_one_machine=False)
    assert not one.is_near
    two.learn(Address("", 81), is_one_machine=False)
    assert one.is_near
    assert two.is_near
    first = one.begin(Kind.TCP, "[2001:db8::1]:1", "192.0.2.7:1")
    second = two.begin(Kind.TCP, "10.0.0.2:2", "[2001:db8::1]:1")
    assert one.leads_back(Kind.TCP, "10.0.0.2:2")
    assert not two.leads_back(Kind.TCP, "[2001:db8::1]:1"), "a chain of tunnels is no circle"
    one.end(second, "[2001:db8::1]:1")
    two.end(second, "192.0.2.9:1")
    assert one.leads_back(Kind.TCP, "10.0.0.2:2"), "it was not its own, or another's by now"
    one.end(first, "192.0.2.7:1")
    two.end(second, "[2001:db8::1]:1")
    two.close()
    one.learn(Address("", 80), is_one_machine=False)
    assert not one.is_near


def test_c10_ring_of_foreign_steps_ends() -> None:
    other, ours = near(), near()
    steps = [
        (other.begin(Kind.TCP, f"10.0.0.1:{n}", v := f"10.0.0.1:{(n + 1) % LONGEST}"), v)
        for n in range(LONGEST)
    ]
    assert not ours.leads_back(Kind.TCP, "10.0.0.1:0")
    for step, visitor in steps:
        other.end(step, visitor)


@pytest.mark.parametrize(
    ("source", "visitor"),
    [
        ("[fe80::1%eth0]:5", "[fe80::1%3]:5"),
        ("[fe80::1%eth0]:5", "[fe80::1]:5"),
        ("[::1]:5", "[::1]:5"),
    ],
)
def test_c10_zones_are_left_aside(source: str, visitor: str) -> None:
    ours = near()
    step = ours.begin(Kind.TCP, source, "192.0.2.7:1")
    assert ours.leads_back(Kind.TCP, visitor)
    assert not ours.leads_back(Kind.TCP, "[fe80::1%eth0]:6")
    ours.end(step, "192.0.2.7:1")
