"""The documents say what is: tables, names of modules, links, examples, log lines."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nodepass import proof, wire
from nodepass.config import PARAMETERS, Config
from nodepass.environment import VARIABLES, parse_duration
from nodepass.message import (
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

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "nodepass"
READMES = ("README.md", "README.zh-CN.md")
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
    assert {"README.md", "README.zh-CN.md", "protocol.md"} <= {path.name for path in DOCUMENTS}


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
        assert variable.default in (default, "cores"), variable.name
    assert all(table[secret][0] == "–" for secret in PASSWORDS)


@pytest.mark.parametrize("name", READMES)
def test_nothing_is_made_up(name: str) -> None:
    known = {v.name for v in VARIABLES} | {p.name for p in PARAMETERS} | {*PASSWORDS, "NO_COLOR"}
    listed = {n for n in rows(read(name)) if re.fullmatch(r"[a-z]+|[A-Z]+_[A-Z_]+", n)}
    assert listed == known


@pytest.mark.parametrize("name", READMES)
def test_what_comes_later_is_marked(name: str) -> None:
    table = rows(read(name))
    later = ("尚不支持", "不起作用", "此版本只能") if "zh" in name else ("in this build",)
    for option in ("tls", "crt", "key", "ca", "sni", "udp", "RELOAD_INTERVAL", *PASSWORDS):
        assert any(word in table[option][-1] for word in later), option


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_urls_and_durations_are_good(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for url in re.findall(r'"((?:server|client)://[^"…]+)"', text):
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
    modules = {path.stem for path in SOURCE.glob("*.py")} | native
    assert set(rows(section)) == modules - {"__init__", "__main__"}
    picture = section.split("```")[1]
    named = set(re.findall(r"\b_?[a-z_]+\b", picture))
    assert modules - {"__init__"} <= named, "the picture of the layers lacks a module"


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
    for path in SOURCE.glob("*.py"):
        for section in re.findall(r'docs/protocol\.md, "([^"]+)"', path.read_text()):
            assert section in heads, path.name


# --- the worked examples -------------------------------------------------------------------------

NONCES = [bytes(range(start, start + 16)) for start in (0, 16, 32)]
KEY = bytes(range(64, 96))
SESSION = "0123456789abcdef"


def line(packed: bytes) -> str:
    assert packed.endswith(b"\n")
    return packed[:-1].decode()


def link_lines(key: bytes, data_port: int, needs_password: bool) -> tuple[bytes, bytes]:
    greeting = wire.pack_greeting(Greeting(data_port, 0, NONCES[2], needs_password, VERSION))
    mac = proof.link_proof(key, greeting[:-1], b"", SESSION, 1)
    return greeting, wire.pack_link_claim(LinkClaim(SESSION, 1, mac))


def plain_examples() -> Iterator[tuple[str, str]]:
    yield "server", line(wire.pack_greeting(Greeting(40001, 0, NONCES[0], False, VERSION)))
    yield "client", line(wire.pack_hello(Hello("office", NONCES[1])))
    yield "server", line(wire.pack_answer(Welcome(SESSION, 16, key=KEY)))
    greeting, claim = link_lines(KEY, 40001, False)
    yield "server", line(greeting)
    yield "client", line(claim)
    covered = (b"nodepass/2 link", greeting[:-1], b"", SESSION.encode(), b"1")
    yield "LP", proof.length_prefixed(*covered).hex()


def password_examples() -> Iterator[tuple[str, str]]:
    key = proof.stretch_password("correct horse")
    greeting = wire.pack_greeting(Greeting(0, 0, NONCES[0], True, VERSION))
    script = proof.transcript(greeting[:-1], b"", wire.pack_hello(Hello("office", NONCES[1]))[:-1])
    hello = Hello("office", NONCES[1], proof.client_proof(key, script))
    session_key = proof.session_key(key, script, SESSION)
    yield "K", key.hex()
    yield "server", line(greeting)
    yield "T", script.hex()
    yield "client", line(wire.pack_hello(hello))
    mac = proof.server_proof(key, script, SESSION)
    yield "server", line(wire.pack_answer(Welcome(SESSION, 16, proof=mac)))
    yield "S", session_key.hex()
    for who, packed in zip(("server", "client"), link_lines(session_key, 0, True), strict=True):
        yield who, line(packed)


def signal_examples() -> Iterator[tuple[str, str]]:
    yield "server", line(wire.pack_signal(Launch(Kind.TCP, 1, "203.0.113.9:50312")))
    yield "server", line(wire.pack_signal(Launch(Kind.UDP, 2, "[2001:db8::9]:4500")))
    yield "client", line(wire.pack_signal(Fail(1, "refused")))
    yield "server", line(wire.pack_signal(Idle(24)))
    for signal in (Ping(1), Pong(1), Drain(), Bye("stopped")):
        yield "either", line(wire.pack_signal(signal))


def other_examples() -> Iterator[tuple[str, str]]:
    for datagram in (b"hi", b"", b"0123456789"):
        yield "frame", wire.pack_frame(datagram).hex()
    yield "server", line(wire.pack_greeting(Greeting(40001, 0)))
    for kind in (Kind.TCP, Kind.UDP):
        yield "server", line(wire.pack_signal(SeedLaunch("5f3dd280", kind)))


PARTS: tuple[Callable[[], Iterator[tuple[str, str]]], ...] = (
    plain_examples,
    password_examples,
    signal_examples,
    other_examples,
)


def test_worked_examples_reproduce() -> None:
    blocks = re.findall(r"(?ms)^```example\n(.*?)^```", read("docs/protocol.md"))
    printed = [tuple(row.split(None, 1)) for block in blocks for row in block.splitlines()]
    assert printed == [example for part in PARTS for example in part()]


# --- log lines -----------------------------------------------------------------------------------

MESSAGE_AT = {"info": 0, "warn": 0, "error": 0, "fatal": 0, "repeated": 2}
"""Which argument of a Log method is the message."""


def literal(node: ast.expr) -> str:
    """Return the message, or its beginning where the rest is only known at run time."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def printed_messages() -> Iterator[str]:
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            place = MESSAGE_AT.get(node.func.attr)
            where = ast.unparse(node.func.value)
            is_log = where.rpartition(".")[2] in ("log", "_log") or where.startswith("Log(")
            if place is not None and is_log and len(node.args) > place:
                yield literal(node.args[place])


def test_every_log_line_is_explained() -> None:
    text = read("docs/operations.md")
    messages = set(printed_messages())
    assert len(messages) > 25
    assert sorted(message for message in messages if f"`{message}" not in text) == []


def test_no_log_line_is_explained_that_is_never_printed() -> None:
    source = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        for path in SOURCE.glob("*.py")
    )
    tables = read("docs/operations.md").partition("## Log lines")[2].partition("## Watching")[0]
    heads = [re.split(r"  |…", name)[0].rstrip() for name in rows(tables)]
    assert len(heads) > 25
    unknown = [head for head in heads if not head.startswith(("nothing heard", "the other side"))]
    assert [head for head in unknown if head not in source] == []
