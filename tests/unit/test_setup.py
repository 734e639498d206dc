"""setup.py: what it builds where nothing can be compiled, and the page for the package index."""

from __future__ import annotations

import re
import runpy
import sys
import sysconfig
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RELATIVE = re.compile(r"\]\((?!https?:)")

pytestmark = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and sys.implementation.name == "cpython"),
    reason="the engine is built on Linux with CPython alone",
)


class Build:
    """Stands for setuptools, which need not be installed where tests run."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    def setup(self, **arguments: Any) -> None:
        self.arguments = arguments


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """Return what setup() is called with; nothing is built."""
    stub = Build()
    modules: dict[str, dict[str, Any]] = {
        "setuptools": {"Extension": lambda name, *_, **__: name, "setup": stub.setup},
        "setuptools.command": {},
        "setuptools.command.build_ext": {"build_ext": type("build_ext", (), {})},
        "Cython": {},
        "Cython.Build": {"cythonize": lambda modules, **_: modules},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for switch in ("PURE", "NATIVE", "DEBUG", "SANITIZE", "WERROR"):
        monkeypatch.delenv(f"NODEPASS_{switch}", raising=False)
    return stub


def run_setup() -> None:
    runpy.run_path(str(ROOT / "setup.py"))


def compiler(folder: Path, *, says: str, code: int) -> str:
    """Make a program that fails as a compiler does."""
    program = folder / "cc"
    program.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit {code}\n")
    program.chmod(0o755)
    return str(program)


def test_c20_without_a_compiler_the_twin_is_installed_alone(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    run_setup()
    assert build.arguments["ext_modules"] == []
    assert "no C compiler (/nowhere/cc;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("trial.c:1:10: fatal error: Python.h: No such file or directory", "no headers of this"),
        ("trial.c:2:10: fatal error: sys/epoll.h: No such file", "no headers of the C library"),
        ("Segmentation fault", "does not work"),
    ],
)
def test_c20_what_is_missing_is_named(
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    says: str,
    told: str,
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, says=says, code=1))
    run_setup()
    assert build.arguments["ext_modules"] == []
    assert told in capsys.readouterr().err


def test_c20_where_the_engine_is_asked_for_its_lack_is_an_error(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setenv("NODEPASS_NATIVE", "1")
    with pytest.raises(SystemExit, match=r"^nodepass: error: no C compiler"):
        run_setup()
    assert build.arguments == {}


def test_c20_with_a_compiler_the_engine_is_built(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", compiler(tmp_path, says="", code=0))
    run_setup()
    assert build.arguments["ext_modules"] == ["nodepass._fastcopy"]


def test_c20_the_trial_finds_the_compiler_of_this_machine(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("this Python has no headers")
    monkeypatch.delenv("CC", raising=False)
    run_setup()
    assert build.arguments["ext_modules"] == ["nodepass._fastcopy"]


def test_c20_pure_asks_no_compiler(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODEPASS_PURE", "1")
    monkeypatch.setenv("NODEPASS_NATIVE", "1")
    monkeypatch.setenv("CC", "/nowhere/cc")
    run_setup()
    assert build.arguments["ext_modules"] == []


def test_c20_the_index_page_has_no_link_that_leads_nowhere(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODEPASS_PURE", "1")
    run_setup()
    page = build.arguments["long_description"]
    assert not RELATIVE.search(page)
    assert "![" not in page
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert RELATIVE.search(text), "or this test shows nothing"
    for line in ("# nodepass", "## Quick start", "## Performance", "MIT licence."):
        assert line in page


def test_c20_metadata_says_what_it_is() -> None:
    about = metadata.metadata("nodepass")
    assert "UDP" in about["Summary"]
    assert about.get_all("Project-URL")
    assert not RELATIVE.search(about["Description"])
    versions = about.get_all("Classifier") or []
    assert "Programming Language :: Python :: 3.15" in versions
