"""Reads what the contract is about from the sources of TensorRT-LLM, without importing them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "tensorrt_llm"

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


class SourceError(ValueError):
    """There are no sources of TensorRT-LLM where they were looked for."""


@dataclass(frozen=True)
class Surface:
    """The symbols that were found.

    Attributes:
        version: what ``tensorrt_llm/version.py`` says.
        modules: found shapes by attribute, by module below ``tensorrt_llm``. A module that is not there is
            missing, as is an attribute. A shape is a signature such as ``(self, model, *, dtype=)``,
            ``class``, ``member`` for what a class or its instances have, or ``global``. What a class
            inherits ends in `` of Base``.
    """

    version: str
    modules: dict[str, dict[str, str]]

    def as_json(self) -> str:
        content = {"version": self.version, "modules": self.modules}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Surface:
        content = json.loads(text)
        return cls(content["version"], content["modules"])


def find_source(path: Path | None = None) -> Path:
    """The folder ``tensorrt_llm`` of the checkout at ``path``, or of the installed package.

    Raises:
        SourceError: there is none.
    """
    if path is not None:
        for folder in (path / PACKAGE, path):
            if folder.name == PACKAGE and (folder / "__init__.py").is_file():
                return folder
        raise SourceError(f"{path} has no {PACKAGE}/__init__.py: name a checkout of TensorRT-LLM")
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SourceError("TensorRT-LLM is not installed in this Python environment")
    return Path(spec.origin).parent


def read_version(source: Path) -> str:
    """The version that the sources in ``source`` say they are.

    Raises:
        SourceError: they say none.
    """
    try:
        text = (source / "version.py").read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError(f"{source}/version.py cannot be read: {error.strerror}") from error
    match = re.search(r"^__version__\s*=\s*[\"']([^\"']+)[\"']", text, re.MULTILINE)
    if match is None:
        raise SourceError(f"{source}/version.py names no __version__")
    return match.group(1)


def read_surface(source: Path, wanted: Iterable[tuple[str, str]]) -> Surface:
    """Look for ``wanted``, pairs of module and attribute, in the folder ``source``."""
    reader = _Reader(source)
    modules: dict[str, dict[str, str]] = {}
    for module, attribute in wanted:
        if not reader.has_module(module):
            continue
        found = modules.setdefault(module, {})
        shape = reader.shape_of(module, attribute)
        if shape is not None:
            found[attribute] = shape
    return Surface(read_version(source), modules)


@dataclass
class _Module:
    """The names of one module; of those that are defined more than once, the last."""

    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = field(default_factory=dict)
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    values: set[str] = field(default_factory=set)


class _Reader:
    def __init__(self, source: Path) -> None:
        self._source = source
        self._modules: dict[str, _Module | None] = {}

    def has_module(self, name: str) -> bool:
        return self._module(name) is not None

    def shape_of(self, module_name: str, attribute: str) -> str | None:
        module = self._module(module_name)
        assert module is not None
        name, _, member = attribute.partition(".")
        if member:
            shape, owner = self._find_member(module_name, name, member, seen=set())
            return f"{shape} of {owner}" if shape is not None and owner != name else shape
        if name in module.functions:
            return signature(module.functions[name])
        if name in module.classes:
            return "class"
        return "global" if name in module.imported or name in module.values else None

    def _find_member(
        self, module_name: str, class_name: str, member: str, seen: set[tuple[str, str]]
    ) -> tuple[str | None, str]:
        """The shape, and the class that defines the member: this one or, depth first, a base."""
        module = self._module(module_name)
        if module is None or (module_name, class_name) in seen:
            return None, class_name
        seen.add((module_name, class_name))
        if class_name in module.imported:
            return self._find_member(*module.imported[class_name], member, seen)
        node = module.classes.get(class_name)
        if node is None:
            return None, class_name
        own = own_member(node, member)
        if own is not None:
            return own, class_name
        for base in node.bases:
            if isinstance(base, ast.Name):
                inherited, owner = self._find_member(module_name, base.id, member, seen)
                if inherited is not None:
                    return inherited, owner
        return None, class_name

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> _Module | None:
        stem = self._source.joinpath(*name.split("."))
        path = (
            stem.with_suffix(".py") if stem.with_suffix(".py").is_file() else stem / "__init__.py"
        )
        if not path.is_file():
            return None
        try:
            tree = ast.parse(path.read_bytes(), str(path))
        except SyntaxError:
            return None
        is_package = path.name == "__init__.py"
        return _names(tree, name if is_package else name.rpartition(".")[0])


def _names(tree: ast.Module, package: str) -> _Module:
    module = _Module()
    for node in _top_level(tree.body):
        if isinstance(node, ast.ClassDef):
            module.classes[node.name] = node
        elif isinstance(node, _Function):
            module.functions[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, package)
            for alias in node.names:
                module.imported[alias.asname or alias.name] = (origin, alias.name)
        elif isinstance(node, ast.Import):
            module.values |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        else:
            module.values |= set(_targets(node))
    return module


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, those inside ``if``, ``try`` and ``with`` included."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _top_level(getattr(node, name, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _top_level(handler.body)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that is imported from, below ``tensorrt_llm``; outside of it a name that is not there."""
    name = node.module or ""
    if node.level == 0:
        return name.removeprefix(PACKAGE + ".") if name.startswith(PACKAGE + ".") else f"<{name}>"
    parents = package.split(".") if package else []
    parents = parents[: len(parents) - node.level + 1]
    return ".".join([*parents, *filter(None, [name])])


def _targets(node: ast.stmt) -> Iterator[str]:
    """Names that an assignment binds, ``self.x`` as ``x``."""
    if isinstance(node, ast.Assign):
        targets: list[ast.expr] = list(node.targets)
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return
    while targets:
        target = targets.pop()
        if isinstance(target, (ast.Tuple, ast.List)):
            targets += target.elts
        elif isinstance(target, ast.Name):
            yield target.id
        elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            yield target.attr


def own_member(node: ast.ClassDef, member: str) -> str | None:
    """The shape of what the class itself, not a base, defines under this name."""
    methods = [item for item in _top_level(node.body) if isinstance(item, _Function)]
    for method in reversed(methods):
        if method.name == member:
            return "member" if _is_property(method) else signature(method)
    if any(member in _targets(item) for item in _top_level(node.body)):
        return "member"
    for method in methods:
        statements = (item for item in ast.walk(method) if isinstance(item, ast.stmt))
        if any(member in _targets(item) for item in statements):
            return "member"
    return None


def _is_property(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {ast.unparse(decorator).rpartition(".")[2] for decorator in method.decorator_list}
    return bool(names & {"property", "cached_property", "setter"})


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """``(self, model, dtype=, *, name, **kwargs)``: names, ``=`` for those with a default."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    num_required = len(positional) - len(arguments.defaults)
    parts = [a.arg + ("=" if i >= num_required else "") for i, a in enumerate(positional)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg is not None:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(argument.arg + ("" if default is None else "="))
    if arguments.kwarg is not None:
        parts.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(parts)})"
