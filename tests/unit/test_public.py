"""What a program that embeds a tunnel may use; whatever is added here has to stay."""

from __future__ import annotations

import pytest

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
