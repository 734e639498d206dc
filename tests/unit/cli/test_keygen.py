"""keygen: a good secret, and lines that a shell hands on as they are meant."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
from base64 import urlsafe_b64decode
from pathlib import Path

import pytest

from nodepass.cli.keygen import make_secret, text
from nodepass.config.address import Address
from nodepass.config.url import Config
from nodepass.errors import ConfigError

SHELLS = [name for name in ("sh", "bash", "dash", "zsh", "ksh", "fish") if shutil.which(name)]

needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="pastes into a Unix shell")

TELL = """\
#!/bin/sh
cat "$NODEPASS_PASSWORD_FILE"
printf '%s\\n' "$#" "$@"
"""


def lines(*words: str) -> tuple[str, list[str]]:
    """Return the secret, and the three lines to paste."""
    secret, *rest = text(words).splitlines()
    return secret, [line for line in rest if line and not line.startswith("#")]


def test_secrets() -> None:
    made = {make_secret() for _ in range(500)}
    assert len(made) == 500
    for secret in made:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{42}", secret)
        assert len(urlsafe_b64decode(secret + "=")) * 8 == 256


def test_no_secret_looks_like_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = ["-a", "--", "fine"]
    monkeypatch.setattr(secrets, "token_urlsafe", lambda size: drawn.pop(0))
    assert make_secret() == "fine"


@needs_shell
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("words", "host"),
    [
        ((), "rented.example.org"),
        (("box.example.net.",), "box.example.net"),
        (("192.0.2.7",), "192.0.2.7"),
        (("2001:db8::7",), "2001:db8::7"),
        (("[2001:db8::7]",), "2001:db8::7"),
        (("bücher.example",), "xn--bcher-kva.example"),
    ],
)
def test_the_lines_can_be_pasted(
    shell: str, words: tuple[str, ...], host: str, tmp_path: Path
) -> None:
    fake = tmp_path / "nodepass"
    fake.write_text(TELL)
    fake.chmod(0o755)
    (tmp_path / "nodepass.secret").write_text("an old one, which goes\n")
    secret, (keep, *pasted) = lines(*words)
    assert len(pasted) == 2
    assert keep.startswith(" "), "would stay in the shell's history"
    run(shell, keep, tmp_path)
    path = tmp_path / "nodepass.secret"
    assert path.read_text() == secret + "\n"
    assert path.stat().st_mode & 0o777 == 0o600
    for line, mode in zip(pasted, ("server", "client"), strict=True):
        password, count, url = run(shell, line, tmp_path).splitlines()
        assert (password, count) == (secret, "1")
        config = Config.parse(url, {"NODEPASS_PASSWORD": password})
        assert (config.mode, config.tls) == (mode, 1)
        assert config.tunnel == Address(host if mode == "client" else "", 10101)
        assert secret not in line, "would stand in the process list, or in the environment"


def run(shell: str, line: str, home: Path) -> str:
    """Return what a line prints that somebody pastes."""
    return subprocess.run(
        [shell, "-c", line],
        env={"PATH": f"{home}{os.pathsep}{os.environ['PATH']}", "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout


def test_what_stands_between_does_no_harm() -> None:
    for words in ((), ("h",)):
        for line in text(words).splitlines():
            if line.startswith("#"):
                assert not set(line) & set("'\"`()[]{};&|<>$*?!\\~"), line
    assert "rented.example.org" not in text(["h"])


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(word: str) -> None:
    assert text([word]).startswith("usage: nodepass keygen [HOST]\n")
    assert text([word]).endswith("\n")
    assert max(map(len, text([word]).splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "option", "says"),
    [
        (("a", "b"), "keygen", "one word at most"),
        (("--host", "a"), "keygen", "one word at most"),
        (("-x",), "keygen", "one word at most"),
        (("a:1",), "HOST", "no host name"),
        (("",), "HOST", "no host name"),
        (("$(reboot)",), "HOST", "no host name"),
        (("a'b",), "HOST", "no host name"),
        (("server://secret@a:1/b:2",), "HOST", "without scheme and port"),
    ],
)
def test_wrong_words(words: tuple[str, ...], option: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        text(words)
    assert caught.value.option == option
    assert says in caught.value.message
    assert "secret" not in str(caught.value)
