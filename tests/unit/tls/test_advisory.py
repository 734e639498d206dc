"""Libraries below their floor are named; the floors are those of our own metadata."""

from __future__ import annotations

import asyncio
import logging
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from nodepass.config.environment import Settings
from nodepass.engine.relays import Relays
from nodepass.tls import advisory

ROOT = Path(__file__).parents[3]
SOUND = {"cryptography": (48, 0, 1), "pyopenssl": (26, 0, 0)}
"""GHSA-537c-gmf6-5ccf; CVE-2026-27448 and CVE-2026-27459."""


def pretend(monkeypatch: pytest.MonkeyPatch, lines: list[str], **installed: str) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(advisory, "requires", lambda _package: lines)
    monkeypatch.setattr(advisory, "version", version)


def test_c28_what_is_installed_here_is_sound() -> None:
    assert advisory.outdated() == []


def test_c28_the_floors_are_above_the_known_holes() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = {}
    for line in listed:
        match = re.match(r"([A-Za-z0-9_-]+)>=([0-9.]+)", line)
        assert match is not None, f"{line} has no floor"
        floors[match[1].lower()] = tuple(map(int, match[2].split(".")))
    for name, sound in SOUND.items():
        assert floors[name] >= sound


def test_c28_an_older_release_is_named_with_the_one_to_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ["cryptography>=48.0.1", "pyOpenSSL>=26.2", "uvloop>=0.21; sys_platform != 'win32'"]
    pretend(monkeypatch, lines, cryptography="45.0.7", pyOpenSSL="26.2.0", uvloop="0.19.0")
    assert advisory.outdated() == [
        "cryptography 45.0.7 (48.0.1 or newer)",
        "uvloop 0.19.0 (0.21 or newer)",
    ]


@pytest.mark.parametrize(
    ("installed", "is_outdated"),
    [("48.0.1", False), ("48.0.1.post1", False), ("48.0.0", True), ("9.9", True), ("100", False),
     ("48.1rc1", False)],
)  # fmt: skip
def test_c28_releases_are_compared_as_numbers(
    monkeypatch: pytest.MonkeyPatch, installed: str, is_outdated: bool
) -> None:
    pretend(monkeypatch, ["cryptography>=48.0.1"], cryptography=installed)
    assert bool(advisory.outdated()) is is_outdated


def test_c28_extras_and_what_is_not_installed_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ['pytest>=9; extra == "test"', "cryptography>=48.0.1", "idna"]
    pretend(monkeypatch, lines, pytest="1.0")
    assert advisory.outdated() == []


def test_c28_without_metadata_nobody_knows() -> None:
    assert advisory.outdated("there-is-no-such-package") == []


async def test_c28_loading_tls_warns_of_each_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, ["cryptography>=48.0.1"], cryptography="45.0.7")
    relays = Relays(Settings())
    try:
        with caplog.at_level(logging.WARNING, "nodepass"):
            await asyncio.to_thread(relays.load_tls)
            await asyncio.to_thread(relays.load_tls)
    finally:
        await relays.close()
    warnings = [line.getMessage() for line in caplog.records if "known holes" in line.getMessage()]
    assert len(warnings) == 1
    assert "cryptography 45.0.7 (48.0.1 or newer)" in warnings[0]
