"""cli: words to exit codes, error lines, and what is imported when."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Sequence
from importlib import util
from importlib.metadata import version

import pytest

from nodepass import cli, process
from nodepass.config import Config
from nodepass.environment import Settings
from nodepass.log import LEVELS

SERVER = "server://127.0.0.1:10101/127.0.0.1:8080"
CLIENT = "client://127.0.0.1:10101/127.0.0.1:9000"


class Runs:
    """Stands in for `process.run`."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Config], Settings]] = []

    def __call__(self, configs: Sequence[Config], settings: Settings) -> int:
        self.calls.append((list(configs), settings))
        return 7


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(process, "run", runs)
    for name in ("NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE"):
        monkeypatch.delenv(name, raising=False)
    return runs


def test_urls_are_read_and_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMAPHORE_LIMIT", "5")
    assert cli.main([SERVER, CLIENT]) == 7
    ((configs, settings),) = runs.calls
    assert [config.url for config in configs] == [SERVER, CLIENT]
    assert settings.semaphore_limit == 5
    assert all(config.settings is settings for config in configs)


def test_words_of_the_process(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nodepass", SERVER])
    assert cli.main() == 7


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "url: is missing; nodepass --help has examples"),
        (["serve"], "url: starts neither with server:// nor with client://"),
        ([SERVER, "x"], "url: starts neither with server:// nor with client://"),
        (["--versoin"], "--versoin: is not an option; did you mean --version?"),
        (["-x", SERVER], "-x: is not an option; known are --help, --version"),
        (["bench"], "bench: is not in this build yet"),
        (["doctor", "x"], "doctor: is not in this build yet"),
        (["keygen"], "keygen: is not in this build yet"),
        (["top"], "top: is not in this build yet"),
        (["service"], "service: is not in this build yet"),
        ([f"{SERVER}?lgo=debug"], "lgo: is not a parameter of the server; did you mean log?"),
        (["server://s3cret@a:1/b:2"], "password: is not in this build yet; leave it out"),
        (
            [SERVER, SERVER],
            "tunnel: 127.0.0.1:10101 is taken by tunnel 127.0.0.1:10101; use another port",
        ),
    ],
)
def test_wrong_options(
    words: list[str], line: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr() == ("", f"nodepass: error: {line}\n")
    assert runs.calls == []


def test_a_bad_variable(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIAL_TIMEOUT", "5")
    assert cli.main([SERVER]) == 2
    assert re.fullmatch(
        r"nodepass: error: DIAL_TIMEOUT: '5' is not a duration such as .*\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("words", [["--help"], ["-h"], [SERVER, "--help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("nodepass - a tunnel")
    assert err == ""


@pytest.mark.parametrize(
    ("found", "variable", "engine"),
    [(True, None, "native"), (False, None, "python"), (True, "python", "python")],
)
def test_version(
    found: bool,
    variable: str | None,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("NODEPASS_ENGINE", raising=False)
    if variable:
        monkeypatch.setenv("NODEPASS_ENGINE", variable)
    monkeypatch.setattr(util, "find_spec", lambda name: object() if found else None)
    assert cli.main(["--version"]) == 0
    out, _ = capsys.readouterr()
    python = sys.version.split()[0]
    assert out == f"nodepass {version('nodepass')} (engine {engine}, Python {python})\n"


def test_demo_gets_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[str]] = []

    def main(words: Sequence[str]) -> int:
        seen.append(words)
        return 3

    fake = types.ModuleType("nodepass.demo")
    fake.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nodepass.demo", fake)
    monkeypatch.setattr("nodepass.demo", fake, raising=False)
    assert cli.main(["demo", "--help"]) == 3
    assert seen == [["--help"]]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=30, check=False
    )


def test_help_loads_nothing_heavy() -> None:
    done = python(
        "-c",
        "import sys; from nodepass.cli import main; code = main(['--help']);"
        "heavy = {'asyncio', 'uvloop', 'cryptography', 'OpenSSL', 'ssl', 'logging',"
        " 'nodepass._fastcopy', 'importlib.metadata'} & sys.modules.keys();"
        "sys.exit(f'loaded: {heavy}' if heavy else code)",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_module_runs() -> None:
    done = python("-m", "nodepass", "bench")
    assert done.returncode == 2
    assert done.stderr == "nodepass: error: bench: is not in this build yet\n"


def test_levels_are_those_of_the_log() -> None:
    for level in LEVELS:
        assert Config.parse(f"{SERVER}?log={level}", {}).log == level
