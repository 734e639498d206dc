"""Every engine test runs on the native engine and on its Python twin, where both exist.

`kind` is one engine set-up; `engine_module` the module alone; `engine` opens a rig:

    async with engine(pair="unix") as rig: ...
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from types import ModuleType

import pytest
from tests.engine.rig import Kind, Rig

HAS_NATIVE = importlib.util.find_spec("nodepass._fastcopy") is not None
NATIVE_ONLY = os.environ.get("NODEPASS_TEST_ENGINE") == "native"
"""Set by scripts/sanitize: there is nothing to sanitize in Python."""

TWINS = {"twin", "_pycopy"}
"""Words in the ids of tests that run on the twin."""

WHY_NOT = "the native engine is not built for this platform (no nodepass._fastcopy)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the twin's tests out on demand, without a word about each."""
    if not NATIVE_ONLY:
        return
    twins = [item for item in items if TWINS & set(re.split(r"[\[\]-]", item.name))]
    config.hook.pytest_deselected(items=twins)
    items[:] = [item for item in items if item not in twins]


def load(name: str) -> ModuleType:
    if name == "_fastcopy" and not HAS_NATIVE:
        pytest.skip(WHY_NOT)
    return importlib.import_module(f"nodepass.{name}")


@pytest.fixture(params=["_fastcopy", "_pycopy"])
def engine_module(request: pytest.FixtureRequest) -> ModuleType:
    """One implementation of the engine."""
    return load(str(request.param))


KINDS = {
    "native": ("_fastcopy", True, 1),
    "native-copy": ("_fastcopy", False, 1),
    "native-2": ("_fastcopy", True, 2),
    "twin": ("_pycopy", False, 1),
}


@pytest.fixture(params=["native", "twin"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """One set-up of an engine; tests may parametrise it indirectly with any of KINDS."""
    name, splice, threads = KINDS[str(request.param)]
    return Kind(load(name), splice, threads)


@pytest.fixture
def engine(kind: Kind) -> Callable[..., Rig]:
    """Opener of rigs around engines of this kind."""

    def open_rig(**options: object) -> Rig:
        return Rig(kind, **options)  # type: ignore[arg-type]

    return open_rig
