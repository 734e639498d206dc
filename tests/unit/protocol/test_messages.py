"""The vocabulary itself: values, words and limits that both generations agreed on."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from nodepass.protocol import messages
from nodepass.protocol.messages import (
    Dialect,
    Fail,
    Failure,
    Greeting,
    Heartbeat,
    Hello,
    Kind,
    Launch,
    Ping,
    Pong,
    Refusal,
    Signal,
)


def words(kind: type[Dialect | Kind | Refusal | Failure]) -> list[str]:
    return [str(word) for word in kind]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (Dialect, "seed native"),
        (Kind, "tcp udp"),
        (Refusal, "auth version busy limit tls"),
        (Failure, "refused timeout unreachable limit circle unknown"),
    ],
)
def test_words_of_the_wire(kind: type[Dialect | Kind | Refusal | Failure], wanted: str) -> None:
    assert words(kind) == wanted.split()


@pytest.mark.parametrize(
    ("version", "is_native"), [(0, False), (1, False), (2, True), (3, True), (2**53 - 1, True)]
)
def test_greeting_is_native(version: int, is_native: bool) -> None:
    assert Greeting(1, 0, version=version).is_native is is_native


def test_a_plain_greeting_is_of_the_seed() -> None:
    assert Greeting(1, 0) == Greeting(1, 0, b"", False, 0)


def test_a_hello_speaks_our_version() -> None:
    assert Hello("web", b"").version == messages.VERSION


@pytest.mark.parametrize("kind", get_args(Signal))
def test_signals_are_values(kind: type) -> None:
    """Events go to several hearers: none may change what another hears."""
    assert dataclasses.is_dataclass(kind)
    assert not hasattr(object.__new__(kind), "__dict__"), "slots"
    names = [field.name for field in dataclasses.fields(kind)]
    filled = [kind(*(1 for _ in names)) for _ in range(2)]
    assert filled[0] == filled[1]
    assert hash(filled[0]) == hash(filled[1])
    for name in names:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(filled[0], name, 2)


def test_signals_of_different_kinds_differ() -> None:
    assert len({Ping(1), Pong(1), Ping(2)}) == 3
    assert Launch(Kind.TCP, 1) != Launch(Kind.UDP, 1)
    assert Fail(1, "limit") != Fail(1, "timeout")
    assert Heartbeat() == Heartbeat()
