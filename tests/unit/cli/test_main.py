"""cli: words to exit codes, error lines, and what is imported when."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Sequence
from importlib import util
from importlib.metadata import version

import pytest

from nodepass.cli import main, proctitle, runner
from nodepass.config.environment import Settings
from nodepass.config.url import Config
from nodepass.observe.log import LEVELS

SERVER = "server://127.0.0.1:10101/127.0.0.1:8080"
CLIENT = "client://127.0.0.1:10101/127.0.0.1:9000"

NEITHER = (
    "starts neither with server:// nor with client://, and is no command; those are demo, keygen,"
    " help, version"
)


class Runs:
    """Stands in for `runner.run`."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Config], Settings]] = []
        self.exposed: str | None = None

    def __call__(
        self, configs: Sequence[Config], settings: Settings, exposed: str | None = None
    ) -> int:
        self.calls.append((list(configs), settings))
        self.exposed = exposed
        return 7


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs()
    monkeypatch.setattr(runner, "run", runs)
    for name in ("NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE"):
        monkeypatch.delenv(name, raising=False)
    return runs


def test_urls_are_read_and_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMAPHORE_LIMIT", "5")
    assert main.main([SERVER, CLIENT]) == 7
    ((configs, settings),) = runs.calls
    assert [config.url for config in configs] == [SERVER, CLIENT]
    assert settings.semaphore_limit == 5
    assert all(config.settings is settings for config in configs)


def test_the_password_does_not_stay_in_the_environment(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODEPASS_PASSWORD", "hunter2")
    assert main.main([SERVER, CLIENT]) == 7
    ((configs, _),) = runs.calls
    assert [c.password.reveal() for c in configs if c.password is not None] == ["hunter2"] * 2
    assert "NODEPASS_PASSWORD" not in os.environ
    shown = subprocess.run(["env"], capture_output=True, text=True, timeout=30, check=True).stdout
    assert "hunter2" not in shown


@pytest.mark.parametrize("why", [None, "because"])
def test_the_process_is_told_what_can_be_seen(
    why: str | None, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[str]] = []

    def hide(urls: Sequence[str]) -> str | None:
        seen.append(urls)
        return why

    monkeypatch.setattr(proctitle, "hide_passwords", hide)
    words = [SERVER.replace("://", "://secret@"), CLIENT]
    assert main.main(words) == 7
    assert seen == [words]
    assert runs.exposed == why


@pytest.mark.parametrize("more", [["--help"], ["--version"], ["-h"]])
def test_c29_a_password_beside_other_words_is_hidden_too(
    more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[str]] = []
    monkeypatch.setattr(proctitle, "hide_passwords", seen.append)
    words = [SERVER.replace("://", "://secret@"), *more]
    assert main.main(words) == 0
    with pytest.raises(SystemExit):
        main.main(["demo", words[0]])
    assert seen == [words, ["demo", words[0]]]


def test_words_of_the_process(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nodepass", SERVER])
    assert main.main() == 7


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([""], f"url: {NEITHER}"),
        (["hunter2"], f"url: {NEITHER}"),
        (["topsecretpassword"], f"url: {NEITHER}"),
        (["127.0.0.1:80"], f"url: {NEITHER}"),
        ([SERVER, "x"], f"url: {NEITHER}"),
        (["kygen"], "kygen: is neither a command nor a URL; did you mean nodepass keygen?"),
        (["key"], "key: is neither a command nor a URL; did you mean nodepass keygen?"),
        (["Keygen"], "Keygen: is neither a command nor a URL; did you mean nodepass keygen?"),
        (["dmeo"], "dmeo: is neither a command nor a URL; did you mean nodepass demo?"),
        (["hlep"], "hlep: is neither a command nor a URL; did you mean nodepass help?"),
        (["serve"], "serve: is neither a command nor a URL; did you mean server://…?"),
        (["client"], "client: is neither a command nor a URL; did you mean client://…?"),
        ([SERVER, "demo"], "demo: is neither a command nor a URL; did you mean nodepass demo?"),
        (["--keygen"], "--keygen: is not an option; did you mean nodepass keygen?"),
        (["--versoin"], "--versoin: is not an option; did you mean --version?"),
        (["-x", SERVER], "-x: is not an option; known are --help, --version"),
        (["bench"], "bench: is not in this build yet"),
        (["doctor", "x"], "doctor: is not in this build yet"),
        (["keygen", "a", "b"], "keygen: takes one word at most, the server's host"),
        (
            ["keygen", "a:1"],
            "HOST: is no host name and no IP address; write it without scheme and port",
        ),
        (["--password=hunter2"], "--password: is not an option; known are --help, --version"),
        (["-phunter2", SERVER], "-p: is not an option; known are --help, --version"),
        (["--=hunter2"], "-: is not an option; known are --help, --version"),
        (["-"], "-: is not an option; known are --help, --version"),
        (["top"], "top: is not in this build yet"),
        (["service"], "service: is not in this build yet"),
        ([f"{SERVER}?lgo=debug"], "lgo: is not a parameter of the server; did you mean log?"),
        (
            ["server://s3cret@a:1/b:2?compat=1"],
            "compat: is 1, but a password shuts seed peers out; leave it out",
        ),
        (
            [SERVER, SERVER],
            "tunnel: 127.0.0.1:10101 is taken by tunnel 127.0.0.1:10101; use another port",
        ),
    ],
)
def test_wrong_options(
    words: list[str], line: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(words) == 2
    assert capsys.readouterr() == ("", f"nodepass: error: {line}\n")
    assert runs.calls == []


def test_c17_without_a_word_it_leads_on(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a screen, and still an error: the URL may have been an empty variable."""
    assert main.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nodepass: error: url: is missing\n\n")
    assert 10 <= err.count("\n") <= 20
    for part in ("nodepass demo", "nodepass keygen", "nodepass --help", "server://", "client://"):
        assert part in err
    assert runs.calls == []


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["help"], "nodepass - a tunnel"),
        (["help", "keygen"], "usage: nodepass keygen"),
        (["version"], "nodepass "),
    ],
)
def test_c17_words_that_are_taken_for_options(
    words: list[str], start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith(start)
    assert err == ""


def test_c17_help_for_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["help", "demo"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: nodepass demo")


def test_c29_the_demo_repeats_no_word(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["server://hunter2@h:1/t:2"], ["--size", "1", "-x", "--password=hunter2"]):
        with pytest.raises(SystemExit) as caught:
            main.main(["demo", *words])
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        assert "nodepass demo: error: takes no URL" in err
        assert "hunter2" not in out + err


def test_a_bad_variable(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NODEPASS_DIAL_TIMEOUT", "5")
    assert main.main([SERVER]) == 2
    assert re.fullmatch(
        r"nodepass: error: NODEPASS_DIAL_TIMEOUT: '5' is not a duration such as .*\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("words", [["--help"], ["-h"], [SERVER, "--help"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("nodepass - a tunnel")
    assert err == ""


def test_keygen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["keygen", "box.example.org"]) == 0
    out, err = capsys.readouterr()
    assert "'client://box.example.org:10101/127.0.0.1:80?tls=1'" in out
    assert err == ""
    assert main.main(["keygen", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: nodepass keygen")


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
    assert main.main(["--version"]) == 0
    out, _ = capsys.readouterr()
    python = sys.version.split()[0]
    assert out == f"nodepass {version('nodepass')} (engine {engine}, Python {python})\n"


def test_demo_gets_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[str]] = []

    def run_demo(words: Sequence[str]) -> int:
        seen.append(words)
        return 3

    fake = types.ModuleType("nodepass.cli.demo")
    fake.main = run_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nodepass.cli.demo", fake)
    monkeypatch.setattr("nodepass.cli.demo", fake, raising=False)
    assert main.main(["demo", "--help"]) == 3
    assert seen == [["--help"]]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["keygen"], ["server://pw@a:1/b:2?lgo=x"]])
def test_what_answers_at_once_loads_nothing_heavy(words: list[str]) -> None:
    done = python(
        "-c",
        f"import sys; from nodepass.cli.main import main; code = main({words});"
        "heavy = {'asyncio', 'uvloop', 'cryptography', 'OpenSSL', 'ssl', 'logging',"
        " 'nodepass._fastcopy', 'importlib.metadata'} & sys.modules.keys();"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)",
    )
    assert done.returncode == 0, done.stderr


INTERRUPTED = """
import os, runpy, signal, sys


class Interrupter:
    # Sends the signal that ctrl-c sends, at the moment at which a module is looked for.
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
        return None


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
sys.meta_path.insert(0, Interrupter())
sys.argv = ["nodepass", {url!r}]
{start}
"""

STARTS = {
    "module": "runpy.run_module('nodepass', run_name='__main__')",
    "script": "from nodepass.cli.main import main; sys.exit(main())",
}


@pytest.mark.skipif(sys.platform == "win32", reason="sends itself Unix signals")
@pytest.mark.parametrize(
    ("start", "module"),
    [
        ("module", "nodepass.cli.main"),
        ("module", "nodepass.config.url"),
        ("module", "nodepass.cli.runner"),
        ("module", "asyncio"),
        ("script", "nodepass.config.password"),
        ("script", "nodepass.config.url"),
        ("script", "nodepass.cli.runner"),
    ],
)
def test_an_interrupt_while_starting_is_quiet(start: str, module: str) -> None:
    done = python("-c", INTERRUPTED.format(module=module, url=CLIENT, start=STARTS[start]))
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


def test_an_interrupt_becomes_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_fill_standard_streams", interrupt)
    assert main.main([]) == 130


def test_the_module_runs() -> None:
    done = python("-m", "nodepass", "bench")
    assert done.returncode == 2
    assert done.stderr == "nodepass: error: bench: is not in this build yet\n"


def test_levels_are_those_of_the_log() -> None:
    for level in LEVELS:
        assert Config.parse(f"{SERVER}?log={level}", {}).log == level
