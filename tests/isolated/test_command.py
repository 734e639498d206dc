"""The command as a user starts it: exit codes, error lines, signals; a process per test."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import pytest
from tests.kit.timing import free_port

from nodepass.errors import TOO_FEW_THREADS

PATIENCE = 20.0
"""Seconds for any step on a busy machine; nothing here needs one."""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends Unix signals")


def server_url(*ports: int) -> str:
    tunnel, target = ports or (free_port(), free_port())
    return f"server://127.0.0.1:{tunnel}/127.0.0.1:{target}"


@contextmanager
def nodepass(*words: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "nodepass", *words]
    with started(command, **environ) as process:
        yield process


@contextmanager
def started(command: list[str], **environ: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, env={**os.environ, **environ}, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(stream: IO[str] | None, words: str, times: int = 1) -> str:
    """Return the lines up to the one that has the words for the nth time."""
    assert stream is not None
    read = ""
    end = time.monotonic() + PATIENCE
    while read.count(words) < times:
        line = stream.readline()
        assert line, f"ended without {words!r}: {read!r}"
        assert time.monotonic() < end, f"no {words!r} in {read!r}"
        read += line
    return read


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_good_end(number: signal.Signals) -> None:
    with nodepass(server_url()) as process:
        said = read_until(process.stderr, "server listening")
        process.send_signal(number)
        code, rest = finish(process)
    assert code == 0, said + rest
    assert "stopped" in rest
    assert "Traceback" not in rest


def test_a_hangup_is_no_end() -> None:
    with nodepass(server_url()) as process:
        read_until(process.stderr, "server listening")
        process.send_signal(signal.SIGHUP)
        read_until(process.stderr, "nothing to reload")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert finish(process)[0] == 0


def test_a_client_without_a_server_waits_for_it_and_for_a_signal() -> None:
    port, target = free_port(), free_port()
    with nodepass(f"client://127.0.0.1:{port}/127.0.0.1:{target}") as process:
        read_until(process.stderr, "WARN")
        process.send_signal(signal.SIGTERM)
        code, rest = finish(process)
    assert code == 0, rest
    assert "Traceback" not in rest


@pytest.mark.parametrize("place", [0, 1])
def test_a_taken_address_is_one_line(place: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        ports = [free_port(), free_port()]
        ports[place] = taken
        with nodepass(server_url(*ports)) as process:
            code, said = finish(process)
    assert code == 1
    assert said == (
        f"nodepass: error: cannot listen on 127.0.0.1:{taken}: address already in use\n"
    )


def test_one_that_cannot_start_stops_the_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        first, second, third = free_port(), free_port(), free_port()
        with nodepass(server_url(first, second), server_url(taken, third)) as process:
            code, said = finish(process)
        assert code == 1, said
        lines = said.splitlines()
        assert sum(line.startswith("nodepass: error: ") for line in lines) == 1
        # What the first tunnel held is free again.
        for port in (first, second):
            socket.create_server(("127.0.0.1", port)).close()


def test_several_tunnels_in_one_process() -> None:
    with nodepass(server_url(), server_url()) as process:
        read_until(process.stderr, "server listening", times=2)
        process.send_signal(signal.SIGTERM)
        code, rest = finish(process)
    assert code == 0, rest
    assert rest.count("stopped") == 2


def test_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FORMAT", "json")
    with nodepass(server_url()) as process:
        line = read_until(process.stderr, "server listening").splitlines()[-1]
    assert line.startswith('{"time": ')


def test_c18_each_line_says_which_tunnel() -> None:
    dead, target = free_port(), free_port()
    there = server_url()
    urls = (
        there,
        f"{there.replace('server', 'client').rpartition('/')[0]}/127.0.0.1:{target}",
        f"client://hunter2@127.0.0.1:{dead}/127.0.0.1:{target}",
    )
    with nodepass(*urls, NODEPASS_ENGINE="python", NODEPASS_COMPAT_SWITCH="x") as process:
        said = read_until(process.stderr, "tunnel up")
        if "no tunnel" not in said:
            said += read_until(process.stderr, "no tunnel")
        process.send_signal(signal.SIGTERM)
        code, rest = finish(process)
    assert code == 0
    lines = (said + rest).splitlines()
    assert [line for line in lines if "  tunnel=" not in line] == []
    server, client, other = (url.replace("hunter2@", "").rpartition("/")[0] for url in urls)
    assert labels(lines, "server listening") == {server}
    assert labels(lines, "tunnel up") == {client}
    assert labels(lines, "no tunnel") == {other}
    assert labels(lines, "stopped") == {server, client, other}
    assert labels(lines, "the slow Python engine runs") == {"all"}


def labels(lines: list[str], message: str) -> set[str]:
    """Return which tunnels the lines with a message are about."""
    found = [line for line in lines if line[23:].split("  ")[2].startswith(message)]
    return {line.partition("  tunnel=")[2].split("  ")[0] for line in found}


def test_c18_a_tunnel_that_is_alone_needs_no_label() -> None:
    with nodepass(f"client://127.0.0.1:{free_port()}/127.0.0.1:1") as process:
        said = read_until(process.stderr, "no tunnel")
        process.send_signal(signal.SIGTERM)
        code, rest = finish(process)
    assert code == 0
    assert "tunnel=" not in said + rest


@pytest.mark.parametrize("name", ["LOG_FORMAT", "NODEPASS_LOG_FORMAT"])
@pytest.mark.parametrize(
    ("words", "environ", "code"),
    [
        ((), {}, 2),
        (("bench",), {}, 2),
        (("kygen",), {}, 2),
        (("keygen", "a", "b"), {}, 2),
        (("server://:1/:1",), {}, 2),
        (("--nonsense",), {}, 2),
        (("server://:1/:2?lgo=x",), {}, 2),
        (("server://:1/:2",), {"NODEPASS_DIAL_TIMEOUT": "soon"}, 2),
        (("server://:1/:2",), {"NODEPASS_PASSWORD_FILE": "/no/such/file"}, 2),
        (("server://192.0.2.1:1000/:2",), {}, 1),
        (("server://:1/:2?tls=2&crt=/no&key=/no",), {}, 1),
        (("client://a:1/b:2?ca=/no",), {"DIAL_TIMEOUT": "soon", "NODEPASS_PASWORD": "x"}, 1),
    ],
)
def test_c18_json_from_the_first_line_on(
    words: tuple[str, ...], environ: dict[str, str], code: int, name: str
) -> None:
    with nodepass(*words, **environ, **{name: "json"}) as process:
        ended, said = finish(process)
    lines = [json.loads(line) for line in said.splitlines()]
    assert ended == code, said
    assert all({"time", "level", "message", "logger"} <= line.keys() for line in lines)
    assert [line["level"] for line in lines] == ["warn"] * (len(lines) - 1) + ["fatal"]
    assert not lines[-1]["message"].startswith("nodepass")
    assert len(lines) == (3 if "DIAL_TIMEOUT" in environ else 1)


@pytest.mark.parametrize("words", [(), ("bench",), ("server://:1/:1",), ("--nonsense",)])
def test_wrong_options_are_code_two(words: tuple[str, ...]) -> None:
    with nodepass(*words) as process:
        code, said = finish(process)
    assert code == 2
    assert said.startswith("nodepass: error: ")
    assert (said.count("\n") == 1) is bool(words), "without a word it shows the first steps"


@pytest.mark.parametrize("side", ["server", "client"])
def test_f17_a_certificate_that_cannot_be_read_is_one_line(side: str) -> None:
    option, query = ("crt", "tls=2&crt=/no&key=/no") if side == "server" else ("ca", "ca=/no")
    with nodepass(f"{server_url()}?{query}".replace("server", side)) as process:
        code, said = finish(process)
    assert code == 1
    assert said == f"nodepass: error: {option}: cannot read '/no': no such file or directory\n"


# --- passwords -----------------------------------------------------------------------------------

SECRET, WRONG = "hunter2-Zq", "hunter3-Zq"


def passed(port: int, target: socket.socket) -> bytes:
    """Send a word through the tunnel and return what its target heard."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as visitor:
        visitor.sendall(b"through")
        accepted, _ = target.accept()
        with accepted:
            accepted.settimeout(PATIENCE)
            return accepted.recv(100)


def words_of(process: subprocess.Popen[str]) -> str:
    """Return the words of a process as `ps` shows them; none where there is no /proc."""
    path = Path(f"/proc/{process.pid}/cmdline")
    return path.read_text().replace("\0", " ") if path.exists() else ""


@pytest.mark.parametrize("place", ["url", "NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE"])
def test_f23_a_password_shows_nowhere(place: str, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(SECRET + "\n")
    part = "hunter2%2DZq@" if place == "url" else ""
    values = {"NODEPASS_PASSWORD": SECRET, "NODEPASS_PASSWORD_FILE": str(path)}
    environ = {place: values[place]} if part == "" else {}
    tunnel, port = free_port(), free_port()
    with socket.create_server(("127.0.0.1", 0)) as target:
        target.settimeout(PATIENCE)
        inner = target.getsockname()[1]
        server_word = f"server://{part}127.0.0.1:{tunnel}/127.0.0.1:{port}?log=debug"
        client_word = f"client://{part}127.0.0.1:{tunnel}/127.0.0.1:{inner}?log=debug"
        with nodepass(server_word, **environ) as server:
            said = read_until(server.stderr, "server listening")
            with nodepass(client_word, **environ) as client:
                said += read_until(client.stderr, "tunnel up")
                assert passed(port, target) == b"through"
                shown = words_of(server) + words_of(client)
                client.terminate()
                said += finish(client)[1]
            server.terminate()
            said += finish(server)[1]
    for trace in ("hunter", "Zq"):
        assert trace not in said
        assert trace not in shown
    if part and sys.platform.startswith("linux"):
        assert shown.count("://***@127.0.0.1") == 2


def test_f23_a_wrong_password_shows_nowhere() -> None:
    url = server_url()
    with (
        nodepass(f"{url}?log=debug", NODEPASS_PASSWORD=SECRET) as server,
        nodepass(
            f"{url}?log=debug".replace("server", "client"), NODEPASS_PASSWORD=WRONG
        ) as client,
    ):
        said = read_until(client.stderr, "ERROR")
        for process in (client, server):
            process.terminate()
            said += finish(process)[1]
    assert "refused" in said
    assert "hunter" not in said
    assert "Zq" not in said


@pytest.mark.parametrize(
    "words",
    [
        (f"server://{SECRET}@",),
        (f"server://{SECRET}@:1/:2?lgo=x",),
        (f"server://{SECRET}@:1/:1",),
        (f"server://a/{SECRET}@:1/:2",),
        (f"server://a?{SECRET}@:1/:2",),
        (f"server://{SECRET}%@:1/:2",),
        (f"{SECRET}@:1/:2",),
        (f"--password={SECRET}", "server://:1/:2"),
        ("server://:1/:2?data=7",),
    ],
)
def test_f23_wrong_options_do_not_repeat_a_password(words: tuple[str, ...]) -> None:
    with nodepass(*words, NODEPASS_PASSWORD=SECRET) as process:
        code, said = finish(process)
    assert code == 2
    assert said.count("\n") == 1
    assert "hunter" not in said
    assert "Zq" not in said


def test_the_lines_of_keygen_make_a_tunnel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nodepass", "keygen", "127.0.0.1"]
    printed = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=True
    ).stdout
    tunnel, port = free_port(), free_port()
    with socket.create_server(("127.0.0.1", 0)) as target:
        target.settimeout(PATIENCE)
        # Its ports may be in use here; `exec` lets our signals reach the program itself.
        for old, new in (
            (":10101", f":{tunnel}"),
            (":8080?", f":{port}?"),
            (":80?", f":{target.getsockname()[1]}?"),
            (" nodepass ", f" exec {sys.executable} -m nodepass "),
        ):
            printed = printed.replace(old, new)
        printed = printed.replace("~", str(tmp_path))
        pasted = [line for line in printed.splitlines()[1:] if line and line[0] != "#"]
        keep, for_server, for_client = pasted
        subprocess.run(["sh", "-c", keep], timeout=PATIENCE, check=True)
        with started(["sh", "-c", for_server]) as server:
            read_until(server.stderr, "server listening")
            with started(["sh", "-c", for_client]) as client:
                assert "tls=1" in read_until(client.stderr, "tunnel up")
                assert passed(port, target) == b"through"


FEW_THREADS = """
import codecs, importlib, importlib.metadata, os, resource, sys
import encodings.idna, stringprep
importlib.metadata.requires("nodepass")
for codec in ("ascii", "latin-1", "idna", "utf-8"):
    codecs.lookup(codec)
NAMES = "cli.main cli.runner server.server client.client engine.twin.engine tls.contexts"
for name in [*NAMES.split(), *sys.argv[2:]]:
    importlib.import_module("nodepass." + name)
from cryptography.hazmat.bindings._rust import _openssl
if os.getuid() == 0:  # whom the limit does not bind
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
sys.exit(sys.modules["nodepass.cli.main"].main(sys.argv[1:2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit counts no threads")
@pytest.mark.skipif(find_spec("nodepass._fastcopy") is None, reason="the twin has no threads")
def test_c12_too_few_threads_for_the_engine_are_one_line() -> None:
    with started([sys.executable, "-c", FEW_THREADS, server_url(), "_fastcopy"]) as process:
        code, said = finish(process)
    assert (code, said) == (
        1,
        f"nodepass: error: engine start: {TOO_FEW_THREADS}\n",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit counts no threads")
def test_c12_what_needs_no_thread_runs_without_one() -> None:
    """TLS loaded, a password stretched, an engine stopped, addresses bound: all on the loop."""
    command = [sys.executable, "-c", FEW_THREADS, server_url().replace("//", "//pw@") + "?tls=1"]
    with started(command, NODEPASS_ENGINE="python") as process:
        read_until(process.stderr, "server listening")
        process.terminate()
        code, said = finish(process)
    assert code == 0
    assert "Traceback" not in said
