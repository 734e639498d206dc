"""Every engine test runs on the native engine and on its Python twin, where both exist.

`kind` is one engine set-up; `engine_module` the module alone; `engine` opens a rig:

    async with engine(pair="unix") as rig: ...
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import resource
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from tests.kit.engine_rig import Kind, Rig

HAS_NATIVE = importlib.util.find_spec("nodepass._fastcopy") is not None
NATIVE_ONLY = os.environ.get("NODEPASS_TEST_ENGINE") == "native"
"""Set by scripts/sanitize: there is nothing to sanitize in Python."""

IS_SANITIZED = "san" in os.environ.get("LD_PRELOAD", "")
"""A sanitizer's shadow and quarantine make resident memory say nothing."""

TWINS = {"twin", "engine.twin.engine"}
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


@pytest.fixture(params=["_fastcopy", "engine.twin.engine"])
def engine_module(request: pytest.FixtureRequest) -> ModuleType:
    """One implementation of the engine."""
    return load(str(request.param))


KINDS = {
    "native": ("_fastcopy", True, 1),
    "native-copy": ("_fastcopy", False, 1),
    "native-2": ("_fastcopy", True, 2),
    "twin": ("engine.twin.engine", False, 1),
}


def kinds() -> list[Kind]:
    """Return the set-ups that one drawn script is played on."""
    found = []
    if HAS_NATIVE:
        native = importlib.import_module("nodepass._fastcopy")
        found += [Kind(native, True, 1), Kind(native, False, 2)]
    if not NATIVE_ONLY:
        found.append(Kind(importlib.import_module("nodepass.engine.twin.engine"), False, 1))
    return found


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


@pytest.fixture
def many_fds() -> Iterator[None]:
    """Lift the soft limit on descriptors: hundreds of flows take four each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
