"""title: passwords leave the process list, the other words stay as and where they were."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.cli import proctitle
from nodepass.cli.proctitle import hide_passwords, masked

SECRET = "server://hunter2@h:1/t:2?log=debug"

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc, which only Linux has"
)


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("server://hunter2@h:1/t:2", "server://***@h:1/t:2"),
        ("client://hunter2@h:1/t:2?log=x", "client://***@h:1/t:2?log=x"),
        ("SERVER://hunter2@h:1/t:2", "SERVER://***@h:1/t:2"),
        ("server://a@b:c@h:1/t:2", "server://***@h:1/t:2"),
        ("server://%70%2f%3F%40@h:1/t:2", "server://***@h:1/t:2"),
        ("server://密码@h:1/t:2", "server://***@h:1/t:2"),
        ("server://a\udcffb@h:1/t:2", "server://***@h:1/t:2"),
        ("server://abc@h:1/t:2", "server://***@h:1/t:2"),
        ("server://ab@h:1/t:2", "server://**@h:1/t:2"),
        ("server://a@h:1/t:2", "server://*@h:1/t:2"),
        ("server://***@h:1/t:2", "server://***@h:1/t:2"),
        (f"server://{'x' * 5000}@h:1/t:2", "server://***@h:1/t:2"),
        ("server://@h:1/t:2", "server://@h:1/t:2"),
        ("server://h:1/t:2", "server://h:1/t:2"),
        ("server://:1/:2?crt=a@b", "server://:1/:2?crt=a@b"),
        ("http://hunter2@h", "http://hunter2@h"),
        ("-m", "-m"),
        ("", ""),
    ],
)
def test_one_word(word: str, shown: str) -> None:
    typed = word.encode(errors="surrogateescape")
    result = masked(b"python\0" + typed + b"\0last\0")
    assert result == b"python\0" + shown.encode().ljust(len(typed), b"\0") + b"\0last\0"


@given(st.lists(st.text("abserv:/@?%* ", max_size=20).map(str.encode)))
def test_nothing_moves(words: list[bytes]) -> None:
    memory = b"".join(b"server://" + word + b"\0" for word in words)
    result = masked(memory)
    assert len(result) == len(memory)
    place = 0
    for word in words:
        place += len(word) + len(b"server://\0")
        assert result[place - 1 : place] == b"\0"
    assert masked(result) == result


SHOW = """
import os, sys
from pathlib import Path
from nodepass.cli.proctitle import hide_passwords

words = list(sys.argv)
print(hide_passwords(sys.argv[1:]))
print(Path("/proc/self/cmdline").read_bytes().split(bytes(1))[3:])
assert sys.argv == words, "the program itself has lost its words"
assert os.environ["LAST"] == "kept"
"""


@linux_only
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["server://hunter2@h:1/t:2"], ["server://***@h:1/t:2", "", "", "", "", ""]),
        (["client://ab@h:1/t:2"], ["client://**@h:1/t:2", ""]),
        (
            ["--first", "server://%68unter2@h:1/t:2", "server://h:1/t:2", "client://密@h:1/t:2"],
            ["--first", "server://***@h:1/t:2", *[""] * 6, "server://h:1/t:2",
             "client://***@h:1/t:2", ""],
        ),
        (["server://h:1/t:2"], ["server://h:1/t:2", ""]),
        ([f"server://{'x' * 100_000}@h:1/t:2"], ["server://***@h:1/t:2", *[""] * 99_998]),
    ],
    ids=["one", "short", "several", "none", "long"],
)  # fmt: skip
def test_in_a_process(words: list[str], shown: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOW, *words],
        env={"LAST": "kept", "PYTHONPATH": str(Path(proctitle.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"None\n{[word.encode() for word in shown]}\n"


class Proc:
    """What /proc/self would be for a process whose words lie in a buffer of the test."""

    def __init__(self, place: ctypes.Array[ctypes.c_char], stat: Path) -> None:
        self.place = place
        self.stat = stat

    def __truediv__(self, name: str) -> Proc | Path:
        return self if name == "cmdline" else self.stat

    def read_bytes(self) -> bytes:
        return self.place.raw


@linux_only
def test_in_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = b"a\0" + SECRET.encode() + b"\0"
    place = ctypes.create_string_buffer(memory, len(memory))
    start = ctypes.addressof(place)
    fake_proc(tmp_path, start, start + len(memory), b"")
    monkeypatch.setattr(proctitle, "SELF", Proc(place, tmp_path / "stat"))
    assert hide_passwords([SECRET]) is None
    assert place.raw == b"a\0server://***@h:1/t:2?log=debug\0\0\0\0\0"


# --- where it cannot be done ---------------------------------------------------------------------


def test_without_a_password_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proctitle, "_overwrite", lambda: pytest.fail("touched"))
    assert hide_passwords([]) is None
    assert hide_passwords(["server://h:1/t:2", "-x", "demo", "\udcff", "\ud800"]) is None


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hide_passwords([SECRET]) == "only Linux lets a process change its words"


def fake_proc(folder: Path, start: int, end: int, cmdline: bytes) -> Path:
    fields = [b"S", *[b"0"] * 44, str(start).encode(), str(end).encode(), b"0", b"0"]
    name = b"\xff) S 1 2 (x"
    (folder / "stat").write_bytes(b"7 (" + name + b") " + b" ".join(fields) + b"\n")
    (folder / "cmdline").write_bytes(cmdline)
    return folder


@linux_only
@pytest.mark.parametrize(
    ("memory", "cmdline", "why"),
    [
        (b"a\0" + SECRET.encode() + b"\0", None, "the system shows a copy of them"),
        (b"a\0b\0", b"a\0c\0", "the system does not tell where they lie"),
        (b"a\0b\0", b"a\0b\0c\0", "the system does not tell where they lie"),
        (b"", b"", "the system does not tell where they lie"),
    ],
)
def test_systems_that_tell_other_things(
    memory: bytes,
    cmdline: bytes | None,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = ctypes.create_string_buffer(memory, len(memory)) if memory else None
    start = 0 if place is None else ctypes.addressof(place)
    shown = memory if cmdline is None else cmdline
    monkeypatch.setattr(proctitle, "SELF", fake_proc(tmp_path, start, start + len(memory), shown))
    assert hide_passwords([SECRET]) == why
    if place is not None:
        assert place.raw == (masked(memory) if cmdline is None else memory)


@linux_only
@pytest.mark.parametrize("stat", [None, "", "7 (x) S 1", "7 (x) " + "S " * 60])
def test_it_never_raises(
    stat: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stat is not None:
        (tmp_path / "stat").write_text(stat)
    monkeypatch.setattr(proctitle, "SELF", tmp_path)
    why = hide_passwords([SECRET])
    assert why is not None
    assert why.startswith("the words of this process cannot be changed: ")
    assert "hunter2" not in why
