"""password: where it comes from, what is refused, and that it never shows."""

from __future__ import annotations

import copy
import json
import os
import pickle
import threading
import traceback
from pathlib import Path

import pytest

from nodepass import password
from nodepass.errors import ConfigError
from nodepass.password import (
    PASSWORD_LIMIT,
    Secret,
    checked,
    from_environment,
    is_exposed,
    utf8,
)

VARIABLE, FILE = "NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE"


def refusal(environ: dict[str, str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        from_environment(environ)
    return caught.value


def test_none() -> None:
    assert from_environment({"PATH": "/bin"})[0] is None


@pytest.mark.parametrize("text", ["pw", " p w ", "密码", "x" * PASSWORD_LIMIT, "a%2Fb"])
def test_in_the_environment(text: str) -> None:
    assert from_environment({VARIABLE: text}) == (Secret(text), VARIABLE)


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"pw", "pw"),
        (b"pw\n", "pw"),
        (b"pw\r\n", "pw"),
        (b" p w \n\n", " p w \n"),
        ("密码\n".encode(), "密码"),
        (b"x" * PASSWORD_LIMIT + b"\r\n", "x" * PASSWORD_LIMIT),
    ],
)
def test_in_a_file(content: bytes, password: str, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    secret, source = from_environment({FILE: str(path)})
    assert secret is not None
    assert secret.reveal() == password
    assert source == FILE


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty or too long"),
        (b"\n", "is empty or too long"),
        (b"x" * (PASSWORD_LIMIT + 3), "is empty or too long"),
        (b"topsecret\xff\n", "not UTF-8"),
    ],
    ids=["empty", "empty line", "long", "latin-1"],
)
def test_bad_files(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    error = refusal({FILE: str(path)})
    assert error.option == FILE
    assert says in error.message
    assert "topsecret" not in "".join(traceback.format_exception(error))
    assert error.__context__ is None


@pytest.mark.parametrize("path", ["/no/such/file", "/", "", "\0"])
def test_unreadable_files_are_named(path: str) -> None:
    error = refusal({FILE: path})
    assert error.option == FILE
    assert f"cannot read {path!r}: " in error.message


def test_both() -> None:
    error = refusal({VARIABLE: "topsecret", FILE: "b"})
    assert error.option == VARIABLE
    assert "keep one" in error.message
    assert "topsecret" not in str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty or too long; a password has 1..1024 bytes"),
        ("topsecret" * 114, "is empty or too long"),
        ("密" * 342, "is empty or too long"),
        ("topsecret\udcff", "holds bytes that are not UTF-8"),
    ],
)
def test_what_is_no_password(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked("password", text)
    assert caught.value.option == "password"
    assert says in caught.value.message
    assert "topsecret" not in str(caught.value)
    assert caught.value.__context__ is None


def test_secrets_do_not_show() -> None:
    secret = Secret("hunter2")
    shown = [repr(secret), str(secret), f"{secret}", f"{secret:>9}", "%s" % secret]  # noqa: UP031
    assert set(shown) == {"***"}
    assert secret.reveal() == "hunter2"
    assert secret == Secret("hunter2")
    assert hash(secret) == hash(Secret("hunter2"))
    assert secret != Secret("other")
    assert secret != "hunter2"
    for write in (pickle.dumps, copy.copy, json.dumps):
        with pytest.raises(TypeError):
            write(secret)


def test_utf8() -> None:
    assert utf8("密".encode()) == "密"
    assert utf8(b"\xff") is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_that_nobody_writes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start must not hang without a word."""
    monkeypatch.setattr(password, "PIPE_PATIENCE", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"nothing came out of it in 0\.05 s"):
        password.from_environment({"NODEPASS_PASSWORD_FILE": str(tmp_path / "pipe")})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_that_is_written_to_late(tmp_path: Path) -> None:
    """As a shell's <(command) does it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Timer(0.2, path.write_text, ["swordfish\n"])
    writer.start()
    secret, _ = password.from_environment({"NODEPASS_PASSWORD_FILE": str(path)})
    writer.join()
    assert secret is not None
    assert secret.reveal() == "swordfish"


@pytest.mark.skipif(os.name != "posix", reason="mode bits mean nothing here")
def test_is_exposed(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    assert not is_exposed(str(path))
    path.chmod(0o640)
    assert not is_exposed(str(path)), "a group may be meant to read it"
    path.chmod(0o644)
    assert is_exposed(str(path))
    assert not is_exposed(str(tmp_path / "missing"))


def test_is_exposed_says_nothing_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o644)
    monkeypatch.setattr("nodepass.password.os.name", "nt")
    assert not is_exposed(str(path))
