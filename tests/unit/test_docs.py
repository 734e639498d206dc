"""The documents say what is: tables, names of modules, links, examples, log lines."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nodepass.cli import keygen
from nodepass.config import password
from nodepass.config.environment import VARIABLES, parse_duration
from nodepass.config.parameters import PARAMETERS
from nodepass.config.url import Config
from nodepass.observe import console, log, outlet
from nodepass.protocol import frames, lines, proof
from nodepass.protocol.messages import (
    VERSION,
    Bye,
    Drain,
    Fail,
    Greeting,
    Hello,
    Idle,
    Kind,
    Launch,
    LinkClaim,
    Ping,
    Pong,
    SeedLaunch,
    Welcome,
)
from nodepass.server import acceptor, seed_port, sessions, throttle
from nodepass.tls import certificate, codec, contexts

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "nodepass"
READMES = ("README.md", "README.zh-CN.md")
GUIDES = (*READMES, "docs/security.md")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PASSWORDS = ("NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows(text: str) -> dict[str, list[str]]:
    """Return table rows by what stands in backquotes in their first cell."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and (name := re.fullmatch(r"`([^`]+)`", cells[0])):
            found[name[1]] = cells[1:]
    return found


def test_all_documents_are_there() -> None:
    names = {path.name for path in DOCUMENTS}
    assert {"README.md", "README.zh-CN.md", "protocol.md", "security.md"} <= names


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READMES)
def test_every_parameter_has_its_row(name: str) -> None:
    table = rows(read(name))
    words = {"server": ("server", "服务器"), "client": ("client", "客户端"), "": ("both", "两端")}
    for parameter in PARAMETERS:
        where, default, meaning = table[parameter.name]
        mode = parameter.modes[0].value if len(parameter.modes) == 1 else ""
        assert where == words[mode][READMES.index(name)], parameter.name
        if parameter.name != "name":  # this machine's name
            assert default.strip("`") == (parameter.default or "–"), parameter.name
        missing = [v for v in parameter.values if parameter.name == "log" and v not in meaning]
        assert not missing, parameter.name


@pytest.mark.parametrize("name", READMES)
def test_every_variable_has_its_row(name: str) -> None:
    table = rows(read(name))
    for variable in VARIABLES:
        default = table[variable.name][0].strip("`")
        assert variable.default in (default, "half the cores"), variable.name
    assert all(table[secret][0] == "–" for secret in PASSWORDS)


@pytest.mark.parametrize("name", READMES)
def test_nothing_is_made_up(name: str) -> None:
    known = {v.name for v in VARIABLES} | {p.name for p in PARAMETERS} | {*PASSWORDS, "NO_COLOR"}
    listed = {n for n in rows(read(name)) if re.fullmatch(r"[a-z]+|[A-Z]+_[A-Z_]+", n)}
    assert listed == known


def test_both_readmes_have_the_same_tables_and_commands() -> None:
    english, chinese = map(read, READMES)
    assert list(rows(english)) == list(rows(chinese))
    assert commands(english) == commands(chinese)


def commands(text: str) -> list[str]:
    """Return the lines of all blocks of shell, without comments."""
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```", text)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("name", READMES)
def test_the_quick_start_says_what_keygen_prints(name: str) -> None:
    section = re.split(r"(?m)^## ", read(name))[3]
    lines = keygen.text(["rented.example.org"]).splitlines()
    for part in (f":{keygen.TUNNEL_PORT}/", ":8080?tls=1", "127.0.0.1:80?tls=1"):
        assert any(part in line for line in lines), part
    assert "nodepass keygen rented.example.org" in section
    assert {str(keygen.TUNNEL_PORT), "8080", "80"} <= set(re.findall(r"\d+", section))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_password_stands_here_to_be_pasted(path: Path) -> None:
    for block in re.findall(r"(?ms)^ *```.*?^ *```", path.read_text(encoding="utf-8")):
        assert not re.search(r"NODEPASS_PASSWORD=(?!\$)", block)
        assert not re.search(r"(?:server|client)://[^\s/@\[]+@", block)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_urls_and_durations_are_good(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for _, url in re.findall(r"""(["'])((?:server|client)://[^"'…]+)\1""", text):
        Config.parse(url, {})
    for value in re.findall(r"_(?:TIMEOUT|INTERVAL|COOLDOWN)=([^\s`)]+)", text):
        assert parse_duration(value) > 0


# --- names and links -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_mentioned_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    here = {p.name for p in ROOT.rglob("*") if ".venv" not in p.parts}
    for file in re.findall(r"[\w./-]*\w\.(?:pyx|pyi|pxd|pxi|py|json|toml)\b", text):
        assert Path(file).name in here, file


def test_the_table_of_modules_is_complete() -> None:
    text = read("docs/architecture.md")
    section = text.partition("## Modules and layers")[2].partition("### ")[0]
    native = {path.stem for path in SOURCE.glob("*.pyx")}
    dotted = (".".join(p.relative_to(SOURCE).with_suffix("").parts) for p in SOURCE.rglob("*.py"))
    modules = {name for name in dotted if not name.endswith("__")} | native
    assert set(rows(section)) == modules
    picture = section.split("```")[1]
    packages = {name.rpartition(".")[0].replace(".", "/") for name in modules} - {""}
    named = set(re.findall(r"([a-z/]+)/ ", picture))
    assert packages <= named, "the picture lacks a package"


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    text = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8"))
    heads = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), link
        assert not anchor or anchor in anchors(other), link


SECTIONS = (
    "Greeting",
    "TLS",
    "Opening",
    "Proofs",
    "Signals",
    "Health",
    "UDP frames",
    "Seed dialect",
    "Telling the dialects apart",
    "Limits before anyone is trusted",
)


def test_sections_that_comments_name_are_there() -> None:
    heads = re.findall(r"(?m)^## (.+)$", read("docs/protocol.md"))
    assert set(SECTIONS) <= set(heads)
    for path in SOURCE.rglob("*.py"):
        for section in re.findall(r'docs/protocol\.md, "([^"]+)"', path.read_text()):
            assert section in heads, path.name


# --- the worked examples -------------------------------------------------------------------------

NONCES = [bytes(range(start, start + 16)) for start in (0, 16, 32)]
KEY = bytes(range(64, 96))
BINDINGS = bytes(range(128, 160)), bytes(range(160, 192))
SESSION = "0123456789abcdef"


def line(packed: bytes) -> str:
    assert packed.endswith(b"\n")
    return packed[:-1].decode()


def link_lines(
    key: bytes, data_port: int, needs_password: bool, mode: int = 0, binding: bytes = b""
) -> tuple[bytes, bytes]:
    greeting = lines.pack_greeting(Greeting(data_port, mode, NONCES[2], needs_password, VERSION))
    mac = proof.LinkKey(key, SESSION).proof(greeting[:-1], binding, 1)
    return greeting, lines.pack_link_claim(LinkClaim(SESSION, 1, mac))


def plain_examples() -> Iterator[tuple[str, str]]:
    yield "server", line(lines.pack_greeting(Greeting(40001, 0, NONCES[0], False, VERSION)))
    yield "client", line(lines.pack_hello(Hello("office", NONCES[1])))
    yield "server", line(lines.pack_answer(Welcome(SESSION, 16, key=KEY)))
    greeting, claim = link_lines(KEY, 40001, False)
    yield "server", line(greeting)
    yield "client", line(claim)
    covered = (b"nodepass/2 link", greeting[:-1], b"", SESSION.encode(), b"1")
    yield "LP", proof.length_prefixed(*covered).hex()


def password_examples(mode: int = 0) -> Iterator[tuple[str, str]]:
    control, link = BINDINGS if mode else (b"", b"")
    key = proof.stretch_password("correct horse")
    greeting = lines.pack_greeting(Greeting(0, mode, NONCES[0], True, VERSION))
    hello = lines.pack_hello(Hello("office", NONCES[1]))
    script = proof.transcript(greeting[:-1], control, hello[:-1])
    session_key = proof.session_key(key, script, SESSION)
    yield ("B", control.hex()) if mode else ("K", key.hex())
    yield "server", line(greeting)
    yield "T", script.hex()
    mac = proof.client_proof(key, script)
    yield "client", line(lines.pack_hello(Hello("office", NONCES[1], mac)))
    mac = proof.server_proof(key, script, SESSION)
    yield "server", line(lines.pack_answer(Welcome(SESSION, 16, proof=mac)))
    yield "S", session_key.hex()
    if mode:
        yield "B", link.hex()
    both = link_lines(session_key, 0, True, mode, link)
    for who, packed in zip(("server", "client"), both, strict=True):
        yield who, line(packed)


def tls_examples() -> Iterator[tuple[str, str]]:
    return password_examples(mode=1)


def signal_examples() -> Iterator[tuple[str, str]]:
    yield "server", line(lines.pack_signal(Launch(Kind.TCP, 1, "203.0.113.9:50312")))
    yield "server", line(lines.pack_signal(Launch(Kind.UDP, 2, "[2001:db8::9]:4500")))
    yield "client", line(lines.pack_signal(Fail(1, "refused")))
    yield "server", line(lines.pack_signal(Idle(24)))
    for signal in (Ping(1), Pong(1), Drain(), Bye("stopped")):
        yield "either", line(lines.pack_signal(signal))


def other_examples() -> Iterator[tuple[str, str]]:
    for datagram in (b"hi", b"", b"0123456789"):
        yield "frame", frames.pack_frame(datagram).hex()
    yield "server", line(lines.pack_greeting(Greeting(40001, 0)))
    for kind in (Kind.TCP, Kind.UDP):
        yield "server", line(lines.pack_signal(SeedLaunch("5f3dd280", kind)))


PARTS: tuple[Callable[[], Iterator[tuple[str, str]]], ...] = (
    plain_examples,
    password_examples,
    tls_examples,
    signal_examples,
    other_examples,
)


def test_worked_examples_reproduce() -> None:
    blocks = re.findall(r"(?ms)^```example\n(.*?)^```", read("docs/protocol.md"))
    printed = [tuple(row.split(None, 1)) for block in blocks for row in block.splitlines()]
    assert printed == [example for part in PARTS for example in part()]


# --- figures -------------------------------------------------------------------------------------

LIMITS = {
    "docs/security.md": (
        f"{acceptor.MAX_PENDING}, of one source {acceptor.MAX_PENDING_PER_SOURCE} (",
        f" ({acceptor.KNOWN_SHARE * acceptor.MAX_PENDING_PER_SOURCE} where a client is connected",
        f" {acceptor.CROWD_SHARE * acceptor.MAX_PENDING:.0f} where several are)",
        f"{throttle.FIRST_DELAY:g} s, then 0.5 s, 1 s, at most {throttle.LONGEST_DELAY:g} s",
        f"forgotten after {throttle.FORGET_AFTER:g} s",
        f"| sources remembered for that | {throttle.MAX_SOURCES} |",
        f"some {acceptor.MAX_PENDING_PER_SOURCE / throttle.LONGEST_DELAY:g} guesses a second",
        f"all others, with `repeats=`; of one kind {log.LINES_A_MINUTE} a minute",
        f"| log lines that wait for a slow reader | {outlet.ROOM >> 20} MiB;",
        f"| sessions of one server | {sessions.MAX_CLIENTS} |",
        f"| first line | {lines.MAX_LINE} bytes |",
        f"takes {seed_port.MAX_SHAKES} TLS handshakes",
        f"scrypt, N = 2^{proof.SCRYPT_COST.bit_length() - 1}, r = {proof.SCRYPT_BLOCK}, p = 1",
        f"salt `{proof.SCRYPT_SALT.decode()}`",
        f"1 to {password.PASSWORD_LIMIT} bytes",
        f"daily from {contexts.EXPIRY_WARNING.days} days before",
        f"has {8 * keygen.SECRET_SIZE} random bits",
    ),
    "docs/protocol.md": (
        f"| {acceptor.MAX_PENDING}, and an eighth",
        f"| {acceptor.MAX_PENDING_PER_SOURCE}; from one with a connected client twice",
        f"{throttle.FIRST_DELAY:g} s later, then 0.5 s, 1 s, at most {throttle.LONGEST_DELAY:g} s",
        f"{throttle.FORGET_AFTER:g} s without a failure",
        f"{throttle.MAX_SOURCES} sources",
        f"| {seed_port.MAX_SHAKES}, HANDSHAKE_TIMEOUT each |",
        f"offers `{contexts.ALPN.decode()}`",
        f"| {codec.MOST_FRUITLESS // 1024} KiB, at any time |",
        f"`0x{acceptor.TLS_FIRST_BYTE:x}`",
        f'"{codec.BINDING_LABEL.decode()}"',
        f"1 to {password.PASSWORD_LIMIT} bytes",
    ),
    "docs/operations.md": (
        f"From {contexts.EXPIRY_WARNING.days} days before",
        f"less than {contexts.EXPIRY_WARNING.days} days are left",
        f"at most {log.LINES_A_MINUTE} lines a minute of one kind, a quarter of them",
        f"in a queue of {outlet.ROOM >> 20} MiB",
        f"written within {console.SHORT_WORDS:g} s",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_figures_are_those_of_the_code(name: str) -> None:
    text = " ".join(read(name).split())
    assert [figure for figure in LIMITS[name] if figure not in text] == []
    assert (log.CAUSES, log.LINES_A_MINUTE // log.SHARE) == (8, 4)  # "the ninth", "a quarter"
    assert (certificate.OWN_NAME, log.REPEAT_PAUSE) == ("nodepass", 60)  # "once a minute"
    # "twice as many", "three quarters of all"
    assert (acceptor.KNOWN_SHARE, acceptor.CROWD_SHARE) == (2, 3 / 4)


# --- log lines -----------------------------------------------------------------------------------

MESSAGE_AT = {
    "info": 0, "warn": 0, "error": 0, "fatal": 0, "repeated": 2, "bounded": 2, "_warn_once": 0,
}  # fmt: skip
"""Which argument of a Log method is the message."""


def literal(node: ast.expr) -> str:
    """Return the message, or its beginning where the rest is only known at run time."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def printed_messages() -> Iterator[str]:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            place = MESSAGE_AT.get(node.func.attr)
            where = ast.unparse(node.func.value)
            is_log = where.rpartition(".")[2] in ("log", "_log") or where.startswith("Log(")
            is_log |= node.func.attr == "_warn_once"
            if place is not None and is_log and len(node.args) > place:
                yield literal(node.args[place])


def test_every_log_line_is_explained() -> None:
    text = read("docs/operations.md")
    messages = set(printed_messages())
    assert len(messages) > 25
    assert sorted(message for message in messages if f"`{message}" not in text) == []


FILLED = {
    "{peer}": ("server", "client"),
    "{what}": ("certificate", "ca"),
    "{whose}": ("the server's certificate",),
    "{_owner(place)}": ("the server's certificate",),
    "{timeout:g}": ("5",),
}
"""What may stand in the places of messages that are put together."""


def everything_printed() -> str:
    """Return the source with its messages in one piece, once for each way to fill them."""
    parts = [path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")]
    plain = re.sub(r'"\s*\n\s*f?"', "", " ".join(parts))
    filled = [plain.replace(hole, word) for hole, words in FILLED.items() for word in words]
    return " ".join([plain, *filled])


def test_no_log_line_is_explained_that_is_never_printed() -> None:
    source = everything_printed()
    tables = read("docs/operations.md").partition("## Log lines")[2].partition("## Watching")[0]
    heads = [re.split(r"  |…", name)[0].rstrip() for name in rows(tables)]
    assert len(heads) > 50
    unknown = [head for head in heads if not head.startswith(("nothing heard", "the other side"))]
    assert [head for head in unknown if head not in source] == []


SYSTEM_SAYS = (
    "connection refused", "timed out", "Too many open files", "cannot assign requested address",
    "address already in use", "permission denied",
)  # fmt: skip


@pytest.mark.parametrize("name", READMES)
def test_common_log_lines_are_printed_somewhere(name: str) -> None:
    source = everything_printed()
    table = read(name).partition("#log-lines)")[2].partition("\n## ")[0]
    for head in rows(table):
        message = re.split(r"  |…", head)[0].removeprefix("nodepass: error: ")
        assert message.rstrip("; ") in source, head
        for why in re.findall(r'(?:why|reason)="([^"]*)"', head):
            texts = [part.strip() for part in why.split("…") if part.strip()]
            known = [text in source or text in SYSTEM_SAYS for text in texts]
            is_fixed = why.startswith(("nothing heard for", "the other side said bye", "no idle"))
            assert is_fixed or all(known), why


# --- what others can make us keep ----------------------------------------------------------------


def bounds() -> list[list[str]]:
    section = read("docs/security.md").partition("## What others can make us keep")[2]
    section = section.partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows][1:]


@pytest.mark.parametrize("row", bounds(), ids=lambda row: row[1][:50])
def test_c23_each_bound_is_what_it_says(row: list[str]) -> None:
    """Every row names a number that stands where it says, and a test that is there."""
    assert len(row) == 6, row
    _, _, bound, _, where, shown = row
    assert shown in {f"`{name}`" for name in names_of_tests()}, "no such test"
    assert re.fullmatch(r"\d+", bound), "a bound is a number"
    native = re.fullmatch(r"`([A-Z_]+)` in (\w+\.p\w+)", where)
    if native:
        (path,) = SOURCE.rglob(native[2])
        assert re.search(rf"\b{native[1]} = {bound}\b", path.read_text(encoding="utf-8")), where
        return
    found = re.fullmatch(r"`([a-z_]+(?:\.\w+)+)(?:\((\w+)\))?`", where)
    assert found, f"{where}: neither module.NAME nor NAME in a file of the engine"
    assert value_at(found[1], found[2]) == float(bound), where


def test_c23_the_table_is_there() -> None:
    assert len(bounds()) >= 40


def is_module(name: str) -> bool:
    return SOURCE.joinpath(*name.split(".")).with_suffix(".py").exists()


def value_at(path: str, parameter: str | None) -> object:
    """Return a constant, the default of a field or of a parameter, or 1 for a dictionary."""
    parts = path.split(".")
    size = next(n for n in range(len(parts), 0, -1) if is_module(".".join(parts[:n])))
    value: Any = importlib.import_module(f"nodepass.{'.'.join(parts[:size])}")
    for name in parts[size:]:
        is_record = isinstance(value, type) and dataclasses.is_dataclass(value)
        value = getattr(value() if is_record else value, name)
    if parameter:
        return inspect.signature(value).parameters[parameter].default
    return 1 if isinstance(value, dict) else value  # one entry for each key


@cache
def names_of_tests() -> set[str]:
    texts = (path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    return {name for text in texts for name in re.findall(r"def (test_\w+)", text)}
