"""benchmarks: the file of contenders, and what is planned of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from benchmarks import (
    catalog,
    datagram,
    run,
    visit,
)
from benchmarks import contender as contenders
from benchmarks import load as loads
from benchmarks import result as results
from benchmarks.load import Load
from benchmarks.machine import BenchmarkError
from benchmarks.result import Outcome
from tests.kit.benchmark_words import toml

# --- the file of contenders ----------------------------------------------------------------------


SHIPPED = (
    *("direct", "nodepass", "nodepass-tls", "haproxy", "haproxy-tls", "haproxy-tls-full"),
    *("socat", "stunnel", "ssh", "nodepass-go", "frp", "rathole", "chisel"),
)


ENCRYPTED = {"nodepass-tls", "haproxy-tls", "haproxy-tls-full", "stunnel", "ssh", "chisel"}


def test_the_file_that_ships_is_right() -> None:
    rows = {row.name: row for row in contenders.read()}
    assert tuple(rows) == SHIPPED
    assert not rows["direct"].sides
    for name in SHIPPED[1:]:
        assert [side for side, _ in rows[name].sides] == ["server", "client"]
        assert all(rows[name].wants(word) for word in ("visitors", "target", "tunnel"))
    assert {row.name for row in rows.values() if "tls" in row.protocols} == ENCRYPTED
    assert results.STRAIGHT in rows
    assert {*results.RIVALS.values(), *run.QUICK} <= rows.keys()


def test_who_meets_which_load() -> None:
    rows = {row.name: row for row in contenders.read()}

    def meets(name: str) -> list[str]:
        row = rows[name]
        return [load.name for load in catalog.LOADS if row.suits(load) and row.prefers(load)]

    *tcp, idle = [load.name for load in catalog.LOADS if load.network == "tcp"]
    udp = [load.name for load in catalog.LOADS if load.network == "udp"]
    assert meets("direct") == [*tcp, *udp]  # no processes, so nothing of theirs to look at
    assert meets("nodepass") == [*tcp, *udp, idle, "help"]
    assert meets("haproxy") == [*tcp, idle]
    assert meets("haproxy-tls-full") == ["new-16", "first-byte"]
    assert meets("ssh") == ["bulk-up-1", "http-16", "new-16", "latency", "first-byte"]
    assert meets("frp") == [*meets("ssh"), "udp-200-1"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "contender: there is no row"),
        ("contenders = []", "contenders: there is no such key; each row starts with [["),
        ("contender = 5", "contender: must be rows"),
        ("[[contender]", "rows.toml: "),
        ('[[contender]]\nprotocols = ["tcp"]', "row 1: name: is missing"),
        ("[[contender]]\nname = 5", "row 1: name: must be a text"),
        ('[[contender]]\nname = "a,b"', "a,b: name: only small letters"),
        ('[[contender]]\nname = "one"', 'one: protocols: must hold "tcp" or "udp"'),
        ('[[contender]]\nname = "one"\nprotocols = ["tls"]', 'one: protocols: must hold "tcp"'),
        ('[[contender]]\nname = "one"\nprotocols = ["tcp", "ip"]', "one: protocols: 'ip' is none"),
        (toml("") + toml(""), "one: name: two rows have it"),
        (toml("program = []"), "one: program: there is no such key; choose from name, protocols"),
        (toml('programs = "socat"'), "one: programs: must be a list of texts"),
        (toml("programs = [5]"), "one: programs: must be a list of texts"),
        (toml("environment = {A = 5}"), "one: environment: must be a table of texts"),
        (toml("environment = 5"), "one: environment: must be a table"),
        (toml('loads = "new"'), "one: loads: must be a list of texts"),
        (toml('loads = ["new", "old"]'), "one: loads: 'old' is none of bulk-up-1, "),
        (toml('help = "x --help"'), "one: help: must be a list of texts"),
        (toml('help = ["{target}"]'), "one: help: {target} is none of {python}"),
        (toml('server = "socat"'), "one: server: must be a table"),
        (toml("[contender.server]"), "one: server: command: is missing"),
        (toml("[contender.client]|command = []"), "one: client: command: is missing"),
        (toml('[contender.client]|command = "x"'), "one: client: command: must be a list"),
        (toml('[contender.server]|command = ["x"]|wait = 1'), "one: server: wait: there is no"),
        (toml('[contender.server]|command = ["x"]|ready = ""'), "one: server: ready: must be a"),
        (toml('[contender.server]|command = ["{port}"]'), "server: command: {port} is none of {v"),
        (toml('[contender.server]|command = ["{config}"]'), "command: {config} without a config"),
        (toml('[contender.server]|command = ["x"]|config = "{a}"'), "server: config: {a} is none"),
        (
            toml('[contender.server]|command = ["{certificate}"]'),
            'one: programs: must hold "openssl", which makes the {certificate}',
        ),
        (
            toml('[contender.server]|command = ["x"]|config = "{key}.pub"'),
            'one: programs: must hold "ssh-keygen", which makes the {key}',
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_row_and_key(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "rows.toml"
    path.write_text(text)
    with pytest.raises(BenchmarkError) as caught:
        contenders.read(path)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("rows.toml: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["--contenders", str(tmp_path / "none.toml")]) == 1
    assert capsys.readouterr().err.endswith("none.toml: No such file or directory\n")


def test_placeholders_are_replaced_and_other_braces_stay(tmp_path: Path) -> None:
    files = {"certificate": tmp_path / "both.pem"}
    place = contenders.Place(tmp_path, {}, files, "udp", 1, 2, 3)
    values = place.values(tmp_path / "side.conf")
    assert set(values) == set(contenders.PLACEHOLDERS)
    text = '{"a": {"port": {tunnel}}, "b": "{python} {config}", "c": {}} {visitors}{target}'
    expected = (
        f'{{"a": {{"port": 3}}, "b": "{sys.executable} {tmp_path}/side.conf", "c": {{}}}} 12'
    )
    assert contenders.fill(text, values) == expected
    assert contenders.fill("{certificate} {network}", values) == f"{tmp_path}/both.pem udp"


def test_a_program_gets_its_whole_path() -> None:
    words = contenders.command_of(["sh", "-c", "{a}"], {"a": "b"}, {"PATH": "/none:/bin"})
    assert words == ["/bin/sh", "-c", "b"]
    assert contenders.command_of(["no-such"], {}, {"PATH": "/bin"}) == ["no-such"]


def test_missing_programs_are_named() -> None:
    path = os.environ["PATH"]
    assert loads.missing([], path) is None
    assert loads.missing(["sh", sys.executable], path) is None
    assert loads.missing(["sh", "no-such"], path) == "no-such is not on the PATH"
    both = loads.missing(["no-such", "nor-such"], path)
    assert both == "no-such and nor-such are not on the PATH"


# --- what is planned -----------------------------------------------------------------------------


def planned(*words: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The contenders by load, and what is skipped."""
    outcome = Outcome()
    meetings = run.plan(run.parse(words), os.environ["PATH"], outcome)
    return {load.name: [row.name for row in rows] for load, rows in meetings}, outcome.skipped


@pytest.fixture
def everything_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is missing, and no limit is too low."""
    monkeypatch.setattr(run, "missing", lambda *_: None)
    monkeypatch.setattr(Load, "why_not", lambda *_: None)
    monkeypatch.setattr(visit.Idle, "why_not", lambda *_: None)
    monkeypatch.setattr(datagram.Udp, "why_not", lambda *_: None)


def test_a_row_may_prefer_some_loads(everything_here: None) -> None:
    found, skipped = planned()
    assert not skipped
    assert tuple(found) == catalog.ALL
    assert "ssh" not in found["http-1"]
    assert "ssh" in found["http-16"]
    assert found["help"] == ["nodepass"]
    assert "direct" not in found["idle-5000"]


def test_who_is_named_meets_all_that_it_can(everything_here: None) -> None:
    found, skipped = planned("--contender", "ssh,direct", "--only", "http-1,udp-200-1,help")
    assert found == {"http-1": ["direct", "ssh"], "udp-200-1": ["direct"]}
    assert skipped == {"help": "none of these contenders suits it"}
    found, skipped = planned("--contender", "ssh,direct", "--only", "udp-200-1")
    assert found == {"udp-200-1": ["direct"]}
    assert skipped == {"ssh": "none of these loads suits it"}


def test_quick_takes_fewer_of_both(everything_here: None) -> None:
    found, skipped = planned("--quick")
    assert not skipped
    assert tuple(found) == catalog.QUICK
    assert tuple(found["new-16"]) == run.QUICK
    assert "socat" in planned("--quick", "--contender", "socat")[0]["new-16"]


def test_a_contender_without_its_programs_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        run, "missing", lambda programs, _: "it is not here" if "socat" in programs else None
    )
    monkeypatch.setattr(Load, "why_not", lambda *_: None)
    words = ("--only", "http-16,http-256", "--contender")
    found, skipped = planned(*words, "direct,socat")
    assert found == {"http-16": ["direct"], "http-256": ["direct"]}
    assert skipped == {"socat": "it is not here"}
    assert planned(*words, "socat") == ({}, {"socat": "it is not here"})


def test_a_load_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    (many,) = catalog.choose(("idle-5000",))
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    why = "it takes 11000 open files for each process; the limit is 4096"
    assert many.why_not("") == why
    (udp,) = catalog.choose(("udp-200-1",))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(datagram, "FOLDER", Path("/nonexistent"))
    assert udp.why_not("") == "there is no C compiler (cc, or what CC names)"
    (one,) = catalog.choose(("bulk-up-1",))
    assert one.why_not("/nonexistent") == "iperf3 is not on the PATH"
