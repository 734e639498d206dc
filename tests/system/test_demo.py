"""`nodepass demo`: what it prints, and that it leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kit.process import PACKAGE
from tests.kit.timing import limit, until, within

from nodepass.cli import demo


def _start(folder: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    """Start the demo with a temporary folder of its own; its children share its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "nodepass", "demo", *words],
        env={**os.environ, "PYTHONPATH": str(PACKAGE), "TMPDIR": str(folder), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _children(folder: Path) -> list[str]:
    """Command lines of all processes that work in the demo's folder, the demo among them."""
    mark = f"TMPDIR={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # ended, or not ours to look at
            continue
    return found


async def test_demo_shows_a_table_and_leaves_nothing(tmp_path: Path) -> None:
    with _start(tmp_path, "--size", "64", "--connections", "100") as process:
        out, err = process.communicate(timeout=limit(20))
    assert process.returncode == 0, err
    assert err == ""
    assert "\r" not in out, "no progress bar without a terminal"
    assert re.search(r"64 MB fetched, SHA-256 equal", out)
    assert re.search(r"100 short connections answered", out)
    assert re.search(r"throughput +\d+\.\d\d GB/s +\d+\.\d\d GB/s", out)
    assert re.search(r"CPU, server \+ client +(\d+\.\d\d s/GB|–)", out)
    assert re.search(r"new connections +\d+ /s", out)
    assert re.search(r"mean added latency +-?\d+\.\d\d ms", out)
    address = r"127\.0\.0\.1:\d+"
    for mode in ("server", "client"):  # C17
        line = rf'NODEPASS_PASSWORD_FILE=\S+ nodepass "{mode}://{address}/{address}\?tls=1"'
        assert re.search(line, out)
    assert list(tmp_path.iterdir()) == []
    assert _children(tmp_path) == []


@pytest.mark.parametrize("children", [2, 4])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_demo_interrupted_leaves_nothing(
    tmp_path: Path, number: signal.Signals, children: int
) -> None:
    """Interrupted when only its target runs, and when the tunnel is busy."""
    async with within(30):
        with _start(tmp_path, "--size", "8", "--connections", "5000") as process:
            await until(lambda: len(_children(tmp_path)) >= children, 10, "the demo's children")
            process.send_signal(number)
            _, err = process.communicate(timeout=limit(15))
        assert process.returncode == 130
        assert err == "nodepass demo: interrupted\n"
        await until(lambda: not _children(tmp_path), 5, "the children to end")
        assert list(tmp_path.iterdir()) == []


async def test_demo_killed_while_tunnelling_takes_its_target_along(tmp_path: Path) -> None:
    """Nobody can clean up after SIGKILL, but the target sees its stdin end."""
    async with within(30):
        with _start(tmp_path, "--size", "200") as process:
            await until(lambda: len(_children(tmp_path)) == 2, 10, "the demo's target")
            process.kill()
            process.communicate()
        await until(lambda: not _children(tmp_path), 10, "the target to end")


@pytest.mark.parametrize(
    ("name", "value"), [("NODEPASS_SHUTDOWN_TIMEOUT", "soon"), ("NODEPASS_ENGINE", "steam")]
)
async def test_demo_failure_is_one_clear_line(tmp_path: Path, name: str, value: str) -> None:
    """The tunnel refuses to start: its own words are passed on."""
    with _start(tmp_path, "--size", "1", "--connections", "1", **{name: value}) as process:
        out, err = process.communicate(timeout=limit(20))
    assert process.returncode in (1, 2)
    assert err.count("\n") == 1, err
    assert name in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []
    assert _children(tmp_path) == []


async def test_demo_ignores_a_password_in_the_environment(tmp_path: Path) -> None:
    variables = {"NODEPASS_PASSWORD": "correct-horse"}
    with _start(tmp_path, "--size", "1", "--connections", "5", **variables) as process:
        out, err = process.communicate(timeout=limit(20))
    assert process.returncode == 0, err
    assert "correct-horse" not in out


@pytest.mark.parametrize("words", [["--size", "0"], ["--size", "1e3"], ["--connections", "-1"]])
async def test_demo_refuses_nonsense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(words)
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


async def test_demo_draws_a_bar_on_a_terminal(tmp_path: Path) -> None:
    import pty

    reading, terminal = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "nodepass", "demo", "--size", "64", "--connections", "5"],
            env={**os.environ, "PYTHONPATH": str(PACKAGE), "TMPDIR": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
        ) as process:
            os.close(terminal)
            shown = b""
            try:
                while data := os.read(reading, 4096):
                    shown += data
            except OSError:  # EIO: the last writer has closed its end
                pass
        assert process.returncode == 0, shown
        assert b"through the tunnel     [" in shown
        assert b"] 100 %" in shown
    finally:
        os.close(reading)
