"""Imports run one way. The order is read from the module map in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dwdp"
ENGINE_LIBRARIES = {"tensorrt_llm", "transformers"}

_MAP_ROW = re.compile(r"^\| (\d+) \| `(dwdp[\w.]*)` \|", re.MULTILINE)


def read_module_map() -> dict[str, int]:
    """Module or package -> its number in the map; imports go to equal or higher numbers."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return {name: int(number) for number, name in _MAP_ROW.findall(text)}


MODULE_MAP = read_module_map()


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def order_of(module: str) -> int | None:
    """The number of the longest entry of the map that ``module`` is or lies in."""
    while module != "dwdp":
        if module in MODULE_MAP:
            return MODULE_MAP[module]
        module = module.rpartition(".")[0]
    return None


class ImportCollector(ast.NodeVisitor):
    """Every module named by an import, in functions too, except under ``if TYPE_CHECKING:``."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.package = module if is_package else module.rpartition(".")[0]
        self.found: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.visit(node.test)
            for child in node.body:
                self.visit(child)
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            is_module = full in MODULES or full in MODULE_MAP
            self.found.append((node.lineno, full if is_module else base))


def imports_of(module: str) -> list[tuple[int, str]]:
    path = MODULES[module]
    collector = ImportCollector(module, path.name == "__init__.py")
    collector.visit(ast.parse(path.read_text(encoding="utf-8")))
    return collector.found


def internal_imports(module: str) -> Iterator[tuple[int, str]]:
    for line, name in imports_of(module):
        if name == "dwdp" or name.startswith("dwdp."):
            yield line, name


def test_the_map_names_every_module_and_only_what_exists() -> None:
    unplaced = [name for name in MODULES if name != "dwdp" and order_of(name) is None]
    assert not unplaced, f"not in the module map of CONTRIBUTING.md: {unplaced}"
    stale = [name for name in MODULE_MAP if name not in MODULES and name != "dwdp._C"]
    assert not stale, f"in the module map of CONTRIBUTING.md, but gone: {stale}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_the_map(module: str) -> None:
    own = order_of(module) if module != "dwdp" else MODULE_MAP["dwdp._version"]
    assert own is not None
    for line, name in internal_imports(module):
        where = f"{MODULES[module].relative_to(ROOT)}:{line}"
        assert name != "dwdp", (
            f"{where} imports a name from the package itself, not from its module"
        )
        target = order_of(name)
        assert target is not None and target >= own, f"{where} imports {name}, which is above it"


def test_imports_have_no_cycle() -> None:
    graph = {
        module: {name for _, name in internal_imports(module) if name in MODULES and name != module}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_engine_libraries_stay_in_engines(module: str) -> None:
    order = order_of(module)
    if order is not None and order <= MODULE_MAP["dwdp.engines"]:
        return
    for line, name in imports_of(module):
        assert name.partition(".")[0] not in ENGINE_LIBRARIES, (
            f"{MODULES[module].relative_to(ROOT)}:{line} imports {name} below dwdp.engines"
        )


def test_the_collector_sees_function_level_and_relative_imports() -> None:
    source = """
from typing import TYPE_CHECKING
from . import layout
from .fabric.base import Fabric
if TYPE_CHECKING:
    import torch
else:
    import numpy
def f():
    from transformers import AutoConfig
"""
    collector = ImportCollector("dwdp.weights", is_package=False)
    collector.visit(ast.parse(source))
    names = [name for _, name in collector.found]
    assert names == ["typing", "dwdp.layout", "dwdp.fabric.base", "numpy", "transformers"]
