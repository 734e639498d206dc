"""spelling: how far two words are apart, and which one may have been meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.config.spelling import distance, suggest


@pytest.mark.parametrize(
    ("one", "other", "slips"),
    [
        ("", "", 0),
        ("log", "log", 0),
        ("", "log", 3),
        ("lgo", "log", 1),
        ("kygen", "keygen", 1),
        ("keyygen", "keygen", 1),
        ("keygan", "keygen", 1),
        ("ca", "abc", 3),
        ("server", "serve", 1),
        ("tls", "udp", 3),
    ],
)
def test_distance(one: str, other: str, slips: int) -> None:
    assert distance(one, other) == distance(other, one) == slips


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_distance_is_bounded(one: str, other: str) -> None:
    assert abs(len(one) - len(other)) <= distance(one, other) <= max(len(one), len(other))
    assert (distance(one, other) == 0) is (one == other)


def test_suggest() -> None:
    assert suggest("lgo", ["log", "tls"]) == "did you mean log?"
    assert suggest("zzz", ["log", "tls"]) == "known are log, tls"
