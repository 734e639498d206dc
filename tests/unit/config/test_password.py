"""password: where it comes from, what is refused, and that it never shows."""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from urllib.parse import quote

import hypothesis
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from nodepass.cli import keygen
from nodepass.config import password
from nodepass.config.password import (
    PASSWORD_LIMIT,
    CommonPassword,
    Secret,
    checked,
    is_exposed,
    utf8,
)
from nodepass.config.url import Config
from nodepass.errors import ConfigError

VARIABLE, FILE = "NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE"


def from_environment(environ: dict[str, str]) -> tuple[Secret | None, str]:
    return CommonPassword(environ).read()


def refusal(environ: dict[str, str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        from_environment(environ)
    return caught.value


def test_none() -> None:
    assert from_environment({"PATH": "/bin"})[0] is None


@pytest.mark.parametrize("text", ["pw", "p w", "p\tw", "密码", "x" * PASSWORD_LIMIT, "a%2Fb"])
def test_in_the_environment(text: str) -> None:
    assert from_environment({VARIABLE: text}) == (Secret(text), VARIABLE)


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"pw", "pw"),
        (b"pw\n", "pw"),
        (b"pw\r\n", "pw"),
        (b"p w\n", "p w"),
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
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"x" * (PASSWORD_LIMIT + 3), "is too long"),
        ("密".encode() * PASSWORD_LIMIT, "is too long"),
        (b"topsecret\xff\n", "not UTF-8"),
        ("topsecret\n".encode("utf-16"), "is UTF-16"),
        ("topsecret\n".encode("utf-16-be"), "holds a NUL byte"),
        (b"topsecret\n" * 1000, "has more than one line"),
    ],
    ids=[
        "empty",
        "empty line",
        "long",
        "long in a letter",
        "latin-1",
        "utf-16",
        "no mark",
        "many",
    ],
)
def test_bad_files(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    error = refusal({FILE: str(path)})
    assert error.option == FILE
    assert says in error.message
    assert repr(str(path)) in error.message
    assert "topsecret" not in "".join(traceback.format_exception(error))
    assert error.__context__ is None


@pytest.mark.parametrize("path", ["/etc/no/such/file", "/"])
def test_unreadable_files_are_named(path: str) -> None:
    error = refusal({FILE: path})
    assert error.option == FILE
    assert f"cannot read {path!r}: " in error.message


@pytest.mark.parametrize(
    "secret",
    [
        "correct-horse",
        "Zm9v/YmFy+Cg==",
        "/9j4AAQSkZJRg/x",
        "a\0b",
        "\0",
        "x" * 5000,
        "s3cret" * 60 + "/x",
    ],
)
def test_c29_a_password_in_the_place_of_its_file_does_not_show(secret: str) -> None:
    error = refusal({FILE: secret})
    assert error.option == FILE
    assert "does not name a file that can be read" in error.message
    assert secret not in "".join(traceback.format_exception(error))


def test_both() -> None:
    error = refusal({VARIABLE: "topsecret", FILE: "b"})
    assert error.option == VARIABLE
    assert "keep one" in error.message
    assert "topsecret" not in str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; a password has 1..1024 bytes"),
        ("topsecret" * 114, "is too long; a password has 1..1024 bytes"),
        ("密" * 342, "is too long"),
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


def given(source: str, text: str, tmp_path: Path) -> Secret:
    """Return a password that has been given in one of the three ways."""
    if source == "url":
        password = Config.parse(f"server://{quote(text, safe='')}@:1/:2", {}).password
    elif source == "variable":
        password, _ = from_environment({VARIABLE: text})
    else:
        path = tmp_path / "password"
        path.write_bytes(text.encode())
        password, _ = from_environment({FILE: str(path)})
    assert password is not None
    return password


WAYS = {"variable": VARIABLE, "file": FILE, "url": "password"}


@pytest.mark.parametrize("source", WAYS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("text", ["correct-horse", "QUJDRA==", "MFRGG===", "a=b", "密 码"])
def test_c06_one_line_end_is_no_part_of_it(
    source: str, end: str, text: str, tmp_path: Path
) -> None:
    assert given(source, text + end, tmp_path).reveal() == text


@pytest.mark.parametrize("source", WAYS)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("\r\n", "is empty"),
        ("topsecret\n\n", "has more than one line"),
        ("topsecret\r\n\r\n", "has more than one line"),
        ("\ntopsecret", "has more than one line"),
        ("topsecret\nmore", "has more than one line"),
        ("topsecret\rmore\n", "has more than one line"),
        ("topsecret\r", "ends in a carriage return"),
        ("topsecret\r\r\n", "ends in a carriage return"),
        ("\ufefftopsecret\n", "holds a byte order mark"),
        ("topsecret\ufeff", "holds a byte order mark"),
        (" topsecret", "begins with a blank"),
        ("\ttopsecret", "begins with a blank"),
        ("\u00a0topsecret", "begins with a blank"),
        ("topsecret \n", "ends in a blank"),
        ("topsecret\u3000\n", "ends in a blank"),
        ("topsecret\u2028", "ends in a blank"),
        ("topsecret\u200b", "ends in an invisible character"),
        ("\u200etopsecret", "begins with an invisible character"),
        (" ", "begins with a blank"),
        ("top\x1b[200~secret", "holds a control character"),
        ("NODEPASS_PASSWORD=topsecret\n", "looks like NAME=value"),
        ("NODEPASS_PASSWORD='topsecret'", "looks like NAME=value"),
        ("export NODEPASS_PASSWORD=topsecret", "looks like NAME=value"),
        ("NODEPASS_PASSWORD = topsecret", "looks like NAME=value"),
        ("password=topsecret", "looks like NAME=value"),
        ("TUNNEL=topsecret", "looks like NAME=value"),
        ("db_token=topsecret", "looks like NAME=value"),
    ],
)
def test_c06_what_cannot_be_meant_is_refused(
    source: str, text: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        given(source, text, tmp_path)
    assert caught.value.option == WAYS[source]
    assert says in caught.value.message
    assert "topsecret" not in "".join(traceback.format_exception(caught.value))


def test_c06_a_nul_is_refused(tmp_path: Path) -> None:
    """A variable cannot hold one."""
    for source in ("file", "url"):
        with pytest.raises(ConfigError, match="holds a NUL byte"):
            given(source, "top\0secret", tmp_path)


def test_c06_keygens_own_words(tmp_path: Path) -> None:
    """All that keygen prints, in the file, is too much; its first line is right."""
    printed = keygen.text([])
    with pytest.raises(ConfigError, match="of what keygen prints the first"):
        given("file", printed, tmp_path)
    secret = printed.splitlines(keepends=True)[0]
    assert given("file", secret, tmp_path).reveal() == secret.strip()


@settings(deadline=None)
@hypothesis.given(st.binary(min_size=1, max_size=48))
def test_c06_what_generators_make_is_fine(data: bytes) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode, base64.b32encode, bytes.hex):
        text = encode(data)
        text = text if isinstance(text, str) else text.decode()
        assert checked("password", text).reveal() == text


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
        from_environment({"NODEPASS_PASSWORD_FILE": str(tmp_path / "pipe")})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_that_is_written_to_late(tmp_path: Path) -> None:
    """As a shell's <(command) does it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Timer(0.2, path.write_text, ["swordfish\n"])
    writer.start()
    secret, _ = from_environment({"NODEPASS_PASSWORD_FILE": str(path)})
    writer.join()
    assert secret is not None
    assert secret.reveal() == "swordfish"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_c12_a_pipe_is_read_once_for_all_urls(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=["swordfish\n"])
    writer.start()
    environ = {"NODEPASS_PASSWORD_FILE": str(path)}
    common = CommonPassword(environ)
    urls = ["server://:1/:2", "server://:3/:4", "client://:5/:6", "client://own@:5/:6"]
    passwords = [Config.parse(url, environ, None, common).password for url in urls]
    writer.join()
    assert passwords == [*[Secret("swordfish")] * 3, Secret("own")]


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
    monkeypatch.setattr("nodepass.config.password.os.name", "nt")
    assert not is_exposed(str(path))


@pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux")
def test_c29_a_process_with_a_password_leaves_no_core_dump() -> None:
    """In a process of its own: its debugger, if the tests have one, must not be shut out."""
    script = (
        "import ctypes; from nodepass.config.password import keep_out_of_core_dumps as keep; "
        "is_dumpable = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0); "
        "before = is_dumpable(); keep(); print(before, is_dumpable())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"1 0\n"
