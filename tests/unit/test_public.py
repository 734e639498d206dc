"""What a program that embeds a tunnel may use; whatever is added here has to stay."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kit.timing import free_port

from nodepass import Client, Server

TUNNEL = {"config", "mode", "reload", "start", "statistics", "stop", "wait_closed"}
ADDRESSES = {"target_address", "tunnel_address"}


@pytest.mark.parametrize(
    ("kind", "url", "expected"),
    [
        (
            Server,
            "server://127.0.0.1:1/127.0.0.1:2",
            TUNNEL | {"target_address", "tunnel_address"},
        ),
        (Client, "client://127.0.0.1:1/127.0.0.1:2", TUNNEL),
    ],
)
def test_public_names_of_a_tunnel(
    kind: type[Server | Client], url: str, expected: set[str]
) -> None:
    made = kind(f"{url}?log=none")
    found = {name for name in (*dir(kind), *vars(made)) if not name.startswith("_")}
    assert found == expected
    undocumented = [
        name for name in expected - {"config", "mode"} if not getattr(kind, name).__doc__
    ]
    assert not undocumented


DOCUMENT = Path(__file__).parents[2] / "docs" / "embedding.md"


@pytest.mark.parametrize("kind", ["Server", "Client"])
def test_the_example_runs(kind: str) -> None:
    """As it stands, but for its ports and its patience."""
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"))
    (example,) = (block for block in blocks if f"import {kind}" in block or f", {kind}" in block)
    for port in re.findall(r"127\.0\.0\.1:(\d+)", example):
        example = example.replace(f":{port}", f":{free_port()}")
    example = re.sub(r"sleep\(\d+\)", "sleep(0.05)", example).replace("range(360)", "range(2)")
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", example],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = {"Server": "visitors welcome at 127.0.0.1:", "Client": "no server at the moment; 0"}
    assert said[kind] in done.stdout


def test_the_document_names_everything() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"`{name}" in text for name in TUNNEL | ADDRESSES)
