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

# Ground floor first: a package may use what stands above it in this table, and of that only what
# is named here.
PACKAGE_MAY_USE: dict[str, set[str]] = {
    "errors": set(),
    "runtime": set(),
    "observe": set(),
    "config": {"errors"},
    # pure bytes and rules: no socket, no clock, no dice
    "protocol": {"errors"},
    "net": {"config", "errors", "observe", "runtime"},
    "tls": {"config", "errors", "observe"},
    # what goes into an engine and comes out of it, for both twins and whoever asks them
    "engine.types": set(),
    "engine.twin": {"engine.types", "errors", "net", "runtime", "tls"},
    "engine": {
        "config", "engine.twin", "engine.types", "errors", "net", "observe", "runtime", "tls",
    },
    # lifecycles
    "tunnel": {"config", "engine", "errors", "net", "observe", "protocol", "runtime", "tls"},
    "server": {
        "config", "engine", "engine.types", "errors", "net", "observe", "protocol", "runtime",
        "tls", "tunnel",
    },
    "client": {
        "config", "engine", "errors", "net", "observe", "protocol", "runtime", "tls", "tunnel",
    },
    # the program, and what a program that embeds us sees
    "cli": {
        "", "client", "config", "engine", "errors", "observe", "protocol", "runtime", "server",
        "tunnel",
    },
    "": {"cli", "client", "errors", "server"},
}  # fmt: skip

SANS_IO = ("server.throttle", "tls.codec", "tunnel.demand")
"""Beside the whole of `protocol`."""
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


def ours(module: str, *, types_only: bool) -> set[str]:
    """Our own modules that a module imports, by dotted names."""
    found = {name for name, only in imports(module) if only is types_only}
    return {n.removeprefix("nodepass.") for n in found if n.startswith("nodepass.")}


def used_by(module: str) -> set[str]:
    return ours(module, types_only=False) | ours(module, types_only=True)


def package_of(module: str) -> str:
    """The package that a module belongs to; some are one of their own."""
    if module in ("errors", "engine.types", "_fastcopy"):
        return module
    return module.rpartition(".")[0]


def test_the_table_lists_every_package() -> None:
    assert set(PACKAGE_MAY_USE) == PACKAGES | {"errors", "engine.types"}


def test_the_table_only_points_down() -> None:
    standing: set[str] = set()
    for package, allowed in PACKAGE_MAY_USE.items():
        # The command line asks the package itself for its version, which loads nothing.
        assert allowed - {""} <= standing, f"{package} would import upward"
        standing.add(package)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    own = package_of(module)
    found = {package_of(name) for name in used_by(module)} - {own, "_fastcopy"}
    surplus = found - PACKAGE_MAY_USE[own]
    assert not surplus, f"{module} may not use {', '.join(sorted(surplus))}: see PACKAGE_MAY_USE"


def opened(package: str) -> set[str]:
    """The modules that a package names in its `__init__` as being for others."""
    for node in tree(f"{package}.__init__").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {f"{package}.{name}" for name in ast.literal_eval(node.value)}
    return set()


@pytest.mark.parametrize("package", sorted(PACKAGES - {""}))
def test_inner_modules_stay_inside(package: str) -> None:
    used = {
        name
        for module in MODULES
        if package_of(module) != package
        for name in used_by(module)
        if package_of(name) == package and not name.endswith("__init__")
    }
    assert used == opened(package), f"{package}/__init__.py names what others use, and only that"


def test_no_imports_in_a_circle() -> None:
    """Neither between modules nor between their types."""
    edges = {module: used_by(module) for module in MODULES}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " > ".join((*way[way.index(module) :], module))
        if module in done:
            return
        for name in sorted(edges.get(module, set()) - {"__init__"}):
            walk(name, (*way, module))
        done.add(module)

    for module in MODULES:
        walk(module, ())


MOST_ARGUMENTS = 6
"""Of a constructor: who needs more is given a value that holds some of them."""


@pytest.mark.parametrize("module", MODULES)
def test_constructors_take_few_arguments(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            count = len(node.args.args) + len(node.args.kwonlyargs) - 1
            assert count <= MOST_ARGUMENTS, f"{module}, line {node.lineno}: {count} arguments"


def test_only_the_twin_may_be_slow_in_secret() -> None:
    """What the engine is made of is the business of `engine`, and of its types."""
    for module in MODULES:
        if package_of(module) != "engine":
            assert "_fastcopy" not in used_by(module), module


@pytest.mark.parametrize("module", [*SANS_IO, *(m for m in MODULES if m.startswith("protocol."))])
def test_sans_io(module: str) -> None:
    touched = {name.split(".")[0] for name, _ in imports(module)} & OUTSIDE
    assert not touched, f"{module} is pure: time, chance and bytes are arguments, not {touched}"


QUESTIONS = ("is_", "has_", "can_", "may_", "needs_", "leads_", "fits_")


@pytest.mark.parametrize("module", MODULES)
def test_a_question_changes_nothing(module: str) -> None:
    """Whoever reads `if link.is_alive()` may take it that nothing has happened."""
    for node in ast.walk(tree(module)):
        if not isinstance(node, ast.FunctionDef) or not node.name.lstrip("_").startswith(
            QUESTIONS
        ):
            continue
        for part in ast.walk(node):
            changed = part.targets if isinstance(part, ast.Assign | ast.Delete) else []
            changed = [part.target] if isinstance(part, ast.AugAssign) else changed
            assert not any(isinstance(one, ast.Attribute | ast.Subscript) for one in changed), (
                f"{module}, line {node.lineno}: {node.name} changes something"
            )


LONGEST_MODULE = 450
"""Lines: as much as one reads in one go."""
LONGEST_TEST = 600
TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module: str) -> None:
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE


def test_test_files_are_short() -> None:
    long = {
        str(path.relative_to(TESTS)): count
        for path in TESTS.rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_TEST
    }
    assert not long, "cut them by their own banners"


def test_only_choice_knows_the_engines() -> None:
    knows = {
        module
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Constant)
        and node.value in ("nodepass._fastcopy", "nodepass.engine.twin.engine")
    }
    knows.discard("cli.main")  # it only looks whether it is built
    assert knows == {"engine.choice"}


HEAVY = {"OpenSSL", "cryptography"}
LOADS_OPENSSL = {"tls.certificate", "tls.contexts", "tls.trial", "tls.explain"}
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
    late = LOADS_OPENSSL | {"tls._openssl"}
    names = [name for name in IMPORTABLE if name not in late]
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


@pytest.mark.parametrize("module", [m for m in MODULES if m != "tls._openssl"])
def test_only_openssl_py_knows_what_may_move(module: str) -> None:
    attributes = {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    foreign = {name for name, _ in imports(module) if name.startswith(SECRETS[-1])}
    assert not attributes & set(SECRETS), f"{module}: ask `_openssl` for it"
    assert not foreign, f"{module}: ask `_openssl` for it"


def test_server_and_client_do_not_know_each_other() -> None:
    assert not any(name.startswith("client.") for name in reach("server.server"))
    assert not any(name.startswith("server.") for name in reach("client.client"))


def reach(module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in (ours(waiting.pop(), types_only=False) & set(MODULES)) - found:
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
