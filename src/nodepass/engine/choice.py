"""Which engine runs: the native one or its slow twin, and what this kernel can be asked for.

The only importer of either.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Final, Protocol, cast

from nodepass.observe.log import Log

from .operations import Engine

NO_ENGINE: Final = (
    "take a wheel for this platform, or have a C compiler and Python's headers, then "
    "pip install --force-reinstall --no-cache-dir"
    if sys.platform.startswith("linux")
    else "it needs Linux"
)
"""What to do about a missing native engine."""
_RELEASE: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
_GSO_BROKEN: Final = ((7, 0, 0), (7, 1, 5))
"""Kernels, from the first to the one before the second, that spoil headers and checksums of
runs of equally long datagrams: Linux commit b10b446 until 78effd8."""


def may_use_gso() -> bool:
    release = os.uname().release if hasattr(os, "uname") else ""
    found = _RELEASE.match(release)
    if found is None or not _GSO_BROKEN[0] <= tuple(map(int, found.groups("0"))) < _GSO_BROKEN[1]:
        return True
    Log("relay").warn(
        "this kernel garbles datagrams that it cuts itself; NODEPASS_UDP_GSO=1 is not followed",
        kernel=release,
    )
    return False


class EngineModule(Protocol):
    Engine: Callable[..., Engine]

    def tls_trouble(self) -> str | None: ...
    def alpn_selector(self) -> int | None: ...


def choose(wish: str) -> tuple[str, EngineModule]:
    if wish == "native":
        try:
            native = importlib.import_module("nodepass._fastcopy")
            twin = importlib.import_module("nodepass.engine.twin.engine")
            if native.ABI != twin.ABI:
                raise ImportError("it was built from another release")
            return "native", native
        except ModuleNotFoundError:
            Log("relay").warn(
                "the native engine cannot be loaded; the slow Python engine runs instead",
                cause=f"none was installed: {NO_ENGINE}",
            )
        except ImportError as exc:
            Log("relay").warn(
                "the native engine cannot be loaded; the slow Python engine runs instead",
                cause=str(exc),
            )
    else:
        Log("relay").warn("the slow Python engine runs, as NODEPASS_ENGINE=python asks")
    return "python", load_twin()


def load_twin() -> EngineModule:
    return cast(EngineModule, importlib.import_module("nodepass.engine.twin.engine"))
