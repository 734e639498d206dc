"""Fixtures of several tests of this folder."""

from __future__ import annotations

import pytest
from tests.kit.relay_house import Slow

from nodepass.engine.twin import engine as twin


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[Slow]:
    """Engines made in a test, slow ones all."""
    made: list[Slow] = []

    def make(*_: object, **__: object) -> Slow:
        made.append(Slow())
        return made[-1]

    monkeypatch.setattr(twin, "Engine", make)
    return made
