"""Options of flows, written as arguments of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nodepass.engine.types import PLAIN, FlowOptions


def fold(arguments: Mapping[str, object]) -> dict[str, Any]:
    """Put what is an option into the one argument that carries them all."""
    options: dict[str, Any] = {
        name: arguments[name] for name in FlowOptions._fields if name in arguments
    }
    found = {name: value for name, value in arguments.items() if name not in options}
    given = found.get("options", PLAIN)
    if options and isinstance(given, FlowOptions):
        found["options"] = given._replace(**options)
    return found
