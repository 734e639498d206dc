"""The stub, the native module and its twin say the same: names, parameters, defaults, fields.

A stub is what type checkers and readers believe; nothing else would notice that it is old.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import nodepass
from nodepass.engine import types

STUB = Path(nodepass.__path__[0]) / "_fastcopy.pyi"
TREE = ast.parse(STUB.read_text())
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}


@pytest.fixture(params=["_fastcopy", "engine.twin.engine"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    name = f"nodepass.{request.param}"
    if importlib.util.find_spec(name) is None:
        pytest.skip("the native engine is not built for this platform")
    return importlib.import_module(name)


def methods() -> dict[str, ast.FunctionDef]:
    return {
        node.name: node for node in CLASSES["Engine"].body if isinstance(node, ast.FunctionDef)
    }


def value_of(node: ast.expr) -> object:
    """Return what a default stands for: a literal, or a name of `engine.types`."""
    return getattr(types, node.id) if isinstance(node, ast.Name) else ast.literal_eval(node)


def shape(arguments: ast.arguments) -> list[tuple[str, bool, object]]:
    """Return (name, keyword only, default) of each parameter in a stub's def."""
    plain = arguments.posonlyargs + arguments.args
    defaults: list[object] = [inspect.Parameter.empty] * (len(plain) - len(arguments.defaults))
    defaults += [value_of(value) for value in arguments.defaults]
    found = [(arg.arg, False, value) for arg, value in zip(plain, defaults, strict=True)]
    for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = inspect.Parameter.empty if value is None else value_of(value)
        found.append((arg.arg, True, default))
    return found


def test_public_names(module: ModuleType) -> None:
    constants = {
        node.target.id
        for node in TREE.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert constants == {
        "ABI", "REASON_FINISHED", "REASON_RESET", "REASON_ABORTED", "REASON_IDLE", "REASON_UNMET"
    }  # fmt: skip
    for name in constants | CLASSES.keys() | FUNCTIONS.keys():
        assert hasattr(module, name), name
    assert {name for name in vars(module) if name.startswith("REASON_")} < constants


@pytest.mark.parametrize("name", sorted(set(methods())))
def test_method(module: ModuleType, name: str) -> None:
    method = getattr(module.Engine, name)
    wanted = shape(methods()[name].args)
    try:
        signature = inspect.signature(method)
    except ValueError:
        # CPython shows a compiled class's __init__ as a slot without a signature.
        assert (name, module.__name__) == ("__init__", "nodepass._fastcopy")
        check_init_by_use(module)
        return
    found = [
        (parameter.name, parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter.default)
        for parameter in signature.parameters.values()
    ]
    if (name, module.__name__) == ("__init__", "nodepass._fastcopy"):
        check_init_by_use(module)
    else:
        assert found == wanted


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function(module: ModuleType, name: str) -> None:
    wanted = shape(FUNCTIONS[name].args)
    assert [parameter[0] for parameter in wanted] == list(
        inspect.signature(getattr(module, name)).parameters
    )


def check_init_by_use(module: ModuleType) -> None:
    engine = module.Engine(threads=1, flows=1, splice=False)
    assert engine.close()
    with pytest.raises(TypeError):
        module.Engine(1, 1)
    with pytest.raises(TypeError):
        module.Engine(pace=1)


def test_no_method_is_missing_from_the_stub(module: ModuleType) -> None:
    if not module.__name__.endswith("_fastcopy"):
        pytest.skip("the twin's helpers are its own")
    ignored = {"__setstate_cython__", "__reduce_cython__"}
    public = {
        name
        for name, value in vars(module.Engine).items()
        if callable(value) and not name.startswith("__")
    }
    assert public - ignored == {name for name in methods() if not name.startswith("__")}


VALUES = (
    "Completion",
    "EngineStatistics",
    "FlowOptions",
    "Newcomer",
    "UdpCompletion",
    "UdpCounts",
)


@pytest.mark.parametrize("name", VALUES)
def test_values_are_declared_once(module: ModuleType, name: str) -> None:
    """Both engines make the very types of `engine.types`, and the stub names no others."""
    assert getattr(module, name) is getattr(types, name)
    assert name not in CLASSES


def test_statistics_do_not_change() -> None:
    assert types.EngineStatistics.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__slots__" in vars(types.EngineStatistics)


@pytest.mark.parametrize("name", sorted(set(methods()) - {"__init__"}))
def test_docstrings_are_mirrored(name: str) -> None:
    if importlib.util.find_spec("nodepass._fastcopy") is None:
        pytest.skip("the native engine is not built for this platform")
    module = importlib.import_module("nodepass._fastcopy")
    assert inspect.getdoc(getattr(module.Engine, name)) == ast.get_docstring(methods()[name])
