"""The stub, the native module and its twin say the same: names, parameters, defaults, fields.

A stub is what type checkers and readers believe; nothing else would notice that it is old.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import nodepass

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


def fields(name: str) -> list[str]:
    return [
        node.target.id
        for node in CLASSES[name].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def shape(arguments: ast.arguments) -> list[tuple[str, bool, object]]:
    """Return (name, keyword only, default) of each parameter in a stub's def."""
    plain = arguments.posonlyargs + arguments.args
    defaults: list[object] = [inspect.Parameter.empty] * (len(plain) - len(arguments.defaults))
    defaults += [ast.literal_eval(value) for value in arguments.defaults]
    found = [(arg.arg, False, value) for arg, value in zip(plain, defaults, strict=True)]
    for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        default = inspect.Parameter.empty if value is None else ast.literal_eval(value)
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


def test_completion(module: ModuleType) -> None:
    assert list(module.Completion._fields) == fields("Completion")
    assert issubclass(module.Completion, tuple)


def test_statistics(module: ModuleType) -> None:
    found = dataclasses.fields(module.EngineStatistics)
    assert [field.name for field in found] == fields("EngineStatistics")
    # pylint-style check of the promise "frozen and slotted".
    assert module.EngineStatistics.__dataclass_params__.frozen
    assert "__slots__" in vars(module.EngineStatistics)


@pytest.mark.parametrize("name", sorted(set(methods()) - {"__init__"}))
def test_docstrings_are_mirrored(name: str) -> None:
    if importlib.util.find_spec("nodepass._fastcopy") is None:
        pytest.skip("the native engine is not built for this platform")
    module = importlib.import_module("nodepass._fastcopy")
    assert inspect.getdoc(getattr(module.Engine, name)) == ast.get_docstring(methods()[name])
