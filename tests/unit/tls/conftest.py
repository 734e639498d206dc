"""Fixtures of several tests of this folder."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pytest
from tests.kit.authority import Authority, Issued
from tests.kit.pump import (
    NAME,
)

from nodepass.observe.log import Log, setup


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Issued:
    return authority.issue(NAME, "*.wild.example.org", "192.0.2.1", "2001:db8::1")


@pytest.fixture
def lines() -> Iterator[Callable[[], list[str]]]:
    """Return a function that gives the log lines since it was last called."""
    stream = io.StringIO()
    root = Log("x")._logger.parent
    assert root is not None
    before = root.handlers[:], root.level, root.propagate
    setup("text", stream)

    def take() -> list[str]:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return [line.split("  ", 1)[1] for line in text.splitlines()]

    yield take
    root.handlers, root.level, root.propagate = before
    root.manager._clear_cache()  # type: ignore[attr-defined]
