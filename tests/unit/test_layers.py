"""The house's plan: who may import whom, who may touch the outside, what is public.

docs/architecture.md draws it. An import that is not in the table fails here; before adding it,
ask whether the house still reads from top to bottom.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import nodepass

SOURCE = Path(nodepass.__file__).parent

# Ground floor first; a module may import what stands above it in this table, and of that only
# what is named.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "log": set(),
    "outlet": set(),
    "fork": set(),
    "stats": set(),
    "message": set(),
    "hostname": set(),
    "aside": set(),
    # OpenSSL by its secret doors; its records; neither loads it before it is used
    "advisory": set(),
    "_openssl": {"hostname"},
    "record": {"errors"},
    # the slow twin of the engine
    "_pypulse": set(),
    "_pytls": {"_openssl", "_pypulse", "record"},
    "_pyflow": {"_pytls"},
    "_pyport": set(),
    "_pyudp": {"_pyflow", "_pyport", "_pytls"},
    "_pydial": {"_pyflow", "_pyport", "_pytls", "_pyudp"},
    "_pygate": {"_pyflow", "_pyport", "_pytls", "_pyudp"},
    "_pydesk": {"_pyflow", "_pytls", "errors", "fork"},
    "_pyserve": {
        "_pydesk", "_pydial", "_pyflow", "_pygate", "_pyport", "_pytls", "_pyudp", "errors",
    },
    "_pycopy": {
        "_pydesk", "_pyflow", "_pygate", "_pyport", "_pyserve", "_pytls", "_pyudp", "errors",
    },
    # what the user asks for
    "address": {"errors", "hostname"},
    "password": {"errors"},
    "spelling": set(),
    "environment": {"address", "errors", "spelling"},
    "config": {"address", "environment", "errors", "hostname", "password", "spelling"},
    # pure bytes: no socket, no clock, no dice
    "wire": {"errors", "message"},
    "proof": {"errors", "message", "wire"},
    "handshake": {"errors", "message", "proof", "wire"},
    "session": {"errors", "message", "wire"},
    "penalty": set(),
    # sockets, and beside them certificates and contexts
    "resolver": {"aside", "errors", "hostname"},
    "watch": {"fork"},
    "patience": set(),
    "localport": {"log"},
    "circle": {"message"},
    "net": {"errors", "hostname", "localport", "resolver"},
    "listener": {"errors", "fork", "net", "resolver"},
    "certificate": {"errors"},
    "verdict": {"_openssl", "certificate", "hostname"},
    "trial": {"_openssl", "record"},
    "tls": {
        "_openssl", "certificate", "errors", "hostname", "log", "password", "record", "trial",
        "verdict",
    },
    "drop": {"log", "stats"},
    "slot": set(),
    "datagram": {"errors", "listener", "net", "resolver"},
    "work": {"errors", "stats"},
    "relay": {"_pycopy", "advisory", "aside", "environment", "errors", "fork", "log", "work"},
    "control": {"errors", "fork", "log", "message", "net", "record", "session"},
    "pool": {"errors", "log", "message", "net", "record", "session", "watch"},
    "filler": {"errors", "log", "net", "pool", "session"},
    "caller": {"handshake", "net", "record", "relay"},
    "entrance": {
        "caller", "errors", "handshake", "log", "message", "net", "patience", "penalty", "record",
        "relay", "stats", "tls", "watch", "wire",
    },
    "linkdial": {"errors", "handshake", "net", "patience", "pool", "proof", "wire"},
    "target": {"datagram", "errors", "log", "relay", "resolver"},
    # lifecycles
    "tunnel": {
        "aside", "config", "drop", "environment", "errors", "fork", "log", "net", "proof", "relay",
        "stats",
    },
    "roster": {
        "caller", "control", "environment", "errors", "log", "message", "net",
        "penalty", "pool", "proof", "record", "relay", "session", "stats", "watch", "wire",
    },
    "dataport": {
        "caller", "errors", "log", "message", "net", "patience", "pool", "record", "relay",
        "roster", "stats", "tls",
    },
    "relief": {"log", "net", "relay"},
    "silence": {"log", "message", "patience", "relay", "roster", "stats"},
    "gate": {
        "datagram", "errors", "message", "net", "pool", "relay", "roster", "session", "stats",
    },
    "pairing": {
        "config", "control", "datagram", "environment", "errors", "filler", "linkdial",
        "localport", "log", "message", "net", "pool", "record", "relay", "resolver", "session",
        "stats", "wire",
    },
    "server": {
        "aside", "config", "dataport", "entrance", "environment", "errors", "gate", "listener",
        "log", "message", "net", "penalty", "pool", "relay", "relief", "roster", "session",
        "silence", "slot", "stats", "tls", "tunnel", "watch", "wire",
    },
    "client": {
        "aside", "circle", "config", "environment", "errors", "handshake", "log", "message",
        "net", "pairing", "record", "relay", "session", "slot", "stats", "target", "tls",
        "tunnel", "watch", "wire",
    },
    # the program
    "demo": {"outlet"},
    "title": set(),
    "console": {"log", "outlet"},
    "process": {
        "client", "config", "console", "environment", "errors", "log", "password",
        "relay", "server", "tunnel",
    },
    "help": {"config", "environment"},
    "keygen": {"config", "errors"},
    "cli": {
        "__init__", "config", "console", "demo", "environment", "errors", "help", "keygen",
        "outlet", "password", "process", "spelling", "title",
    },
    "__init__": {"client", "errors", "server"},
    "__main__": {"cli"},
}  # fmt: skip

# Only for annotations, so allowed to point upward.
TYPES_ONLY: dict[str, set[str]] = {
    "_pyflow": {"resolver"},
    "_pydesk": {"resolver"},
    "_pycopy": {"resolver"},
    "work": {"_fastcopy", "resolver"},
    "relay": {"_fastcopy", "resolver"},
    "gate": {"_fastcopy", "server"},
    "linkdial": {"client"},
    "pairing": {"client"},
}

SANS_IO = ("message", "wire", "proof", "handshake", "session", "penalty", "record")
OUTSIDE = {
    "asyncio", "datetime", "io", "logging", "os", "random", "secrets", "select", "selectors",
    "socket", "ssl", "subprocess", "sys", "threading", "time", "uuid",
}  # fmt: skip

PUBLIC = [
    "AuthError", "Client", "ConfigError", "DialError", "EngineClosed", "EngineError",
    "ListenError", "LocalWireError", "NodePassError", "PeerWireError", "PoolClosed", "PoolError",
    "PoolTimeout", "Server", "TlsError", "TunnelError", "WireError", "__version__",
]  # fmt: skip

FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")
}
"""Every module, wherever it stands: "errors", "net.tcp", "net.__init__"."""
MODULES = sorted(FILES)
PACKAGES = {name.removesuffix("__init__").rstrip(".") for name in FILES if "__init__" in name}
"""Names of packages; the empty one is `nodepass` itself."""


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Yield what a module imports, ours by bare name, and whether only for annotations."""

    def walk(node: ast.AST, types_only: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                yield from walk(statement, True)
            for statement in node.orelse:
                yield from walk(statement, types_only)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, types_only
        elif isinstance(node, ast.ImportFrom):
            yield from ((name, types_only) for name in imported_from(node, module))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, types_only)

    yield from walk(tree(module), False)


def imported_from(node: ast.ImportFrom, module: str) -> list[str]:
    """What a statement of a module imports, ours by dotted names."""
    where = origin(node, module)
    inner = where.removeprefix("nodepass").lstrip(".")
    if not (where == "nodepass" or where.startswith("nodepass.")) or inner not in PACKAGES:
        return [where]
    found = []
    for alias in node.names:  # from . import net, __version__
        name = f"{inner}.{alias.name}".lstrip(".")
        is_package = name in PACKAGES
        own = f"{inner}.__init__".lstrip(".")
        found.append(f"{name}.__init__" if is_package else name if name in MODULES else own)
    return [f"nodepass.{name}" for name in found]


def origin(node: ast.ImportFrom, module: str) -> str:
    """The module or package that a statement imports from, with all its parents."""
    if not node.level:
        return node.module or ""
    parents = module.split(".")[:-1]
    parents = parents[: len(parents) + 1 - node.level]
    return ".".join(filter(None, ("nodepass", *parents, node.module)))


def test_the_readers_of_imports_know_every_form() -> None:
    def read(module: str, statement: str) -> list[str]:
        node = ast.parse(statement).body[0]
        assert isinstance(node, ast.ImportFrom)
        return imported_from(node, module)

    assert read("deep.down.here", "from .there import x") == ["nodepass.deep.down.there"]
    assert read("deep.down.here", "from ..there import x") == ["nodepass.deep.there"]
    assert read("deep.down.here", "from ... import errors, x") == [
        "nodepass.errors", "nodepass.__init__",
    ]  # fmt: skip
    assert read("errors", "from nodepass import errors") == ["nodepass.errors"]
    assert read("errors", "from .a.b import c") == ["nodepass.a.b"]
    assert read("errors", "from nodepasses import errors") == ["nodepasses"]


def ours(module: str, types_only: bool) -> set[str]:
    found = {name for name, only in imports(module) if only is types_only}
    return {n.removeprefix("nodepass.") for n in found if n.startswith("nodepass.")}


def test_the_table_lists_every_module() -> None:
    assert sorted(ALLOWED) == MODULES


def test_the_table_only_points_down() -> None:
    standing: set[str] = set()
    for module, allowed in ALLOWED.items():
        # cli asks the package itself for its version; the package loads nothing for that.
        assert allowed - {"__init__"} <= standing, f"{module} would import upward"
        standing.add(module)


@pytest.mark.parametrize("module", MODULES)
def test_imports(module: str) -> None:
    surplus = ours(module, types_only=False) - ALLOWED[module]
    assert not surplus, f"{module} may not import {', '.join(sorted(surplus))}: see ALLOWED"
    upward = ours(module, types_only=True) - ALLOWED[module] - TYPES_ONLY.get(module, set())
    assert not upward, f"{module} may not even for types import {', '.join(sorted(upward))}"


@pytest.mark.parametrize("module", SANS_IO)
def test_sans_io(module: str) -> None:
    touched = {name.split(".")[0] for name, _ in imports(module)} & OUTSIDE
    assert not touched, f"{module} is pure: time, chance and bytes are arguments, not {touched}"


def test_only_relay_knows_the_engine() -> None:
    knows = {
        module
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Constant)
        and node.value in ("._fastcopy", "._pycopy", "nodepass._pycopy")
    }
    assert knows == {"relay"}


HEAVY = {"OpenSSL", "cryptography"}
LOADS_OPENSSL = {"certificate", "tls", "trial", "verdict"}
"""Modules that cost 0.1 s to load; nobody loads them before TLS is wanted."""


@pytest.mark.parametrize("module", MODULES)
def test_openssl_is_loaded_by_those_who_need_it(module: str) -> None:
    """Elsewhere by functions only; and `tls` and its kin likewise."""
    top = {name for node in tree(module).body for name in loaded_by(node, module)}
    heavy = {name for name in top if name.split(".")[0] in HEAVY}
    kin = {name for name in top if name.removeprefix("nodepass.") in LOADS_OPENSSL}
    assert module in LOADS_OPENSSL or not heavy | kin, f"{module} loads {heavy | kin} at once"


def loaded_by(node: ast.stmt, module: str) -> list[str]:
    """What one statement of a module's outer level imports at run time."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return imported_from(node, module) if isinstance(node, ast.ImportFrom) else []


def test_a_start_without_tls_loads_no_openssl() -> None:
    engines = [name for name in ("_fastcopy", "_pycopy") if name in IMPORTABLE]
    names = ["cli", "process", "client", "server", "_openssl", "record", *engines]
    script = f"""
import importlib, sys
for name in {names}:
    importlib.import_module("nodepass." + name)
print(sorted({HEAVY} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


SECRETS = ("_ssl", "_context", "_into_ssl", "_from_ssl", "cryptography.hazmat.bindings")
"""Names that pyOpenSSL and cryptography may move in any release."""


@pytest.mark.parametrize("module", [m for m in MODULES if m != "_openssl"])
def test_only_openssl_py_knows_what_may_move(module: str) -> None:
    attributes = {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    foreign = {name for name, _ in imports(module) if name.startswith(SECRETS[-1])}
    assert not attributes & set(SECRETS), f"{module}: ask `_openssl` for it"
    assert not foreign, f"{module}: ask `_openssl` for it"


def test_server_and_client_do_not_know_each_other() -> None:
    assert "client" not in reach("server")
    assert "server" not in reach("client")


def reach(module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in ours(waiting.pop(), types_only=False) - found:
            found.add(name)
            waiting.append(name)
    return found


def test_no_module_for_all_and_sundry() -> None:
    parts = {part for module in MODULES for part in module.split(".")}
    assert not {"common", "utils", "util", "misc", "helpers"} & parts


IMPORTABLE = [m for m in MODULES if not m.endswith("__")]
if find_spec("nodepass._fastcopy") is not None:
    IMPORTABLE.append("_fastcopy")


@pytest.mark.parametrize("module", ["", *IMPORTABLE])
def test_each_module_imports_alone_and_in_silence(module: str) -> None:
    name = f"nodepass.{module}" if module else "nodepass"
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", f"import {name}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names() -> None:
    assert sorted(nodepass.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(nodepass, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        nodepass.Nothing  # noqa: B018
