"""Fixtures of several tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.kit.authority import Authority, Issued


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def files(authority: Authority) -> Issued:
    return authority.issue("127.0.0.1")
