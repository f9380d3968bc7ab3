"""Everything of TensorRT-LLM that dwdp touches: name, shape, why. Checked before anything is patched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dwdp.engines.tensorrt_llm.contract_symbols import SYMBOLS, TESTED_VERSION, Symbol

if TYPE_CHECKING:
    from dwdp.engines.tensorrt_llm.contract_reader import Surface

__all__ = [
    "OWN_DWDP",
    "SYMBOLS",
    "TESTED_VERSION",
    "Problem",
    "Symbol",
    "Verdict",
    "check",
    "satisfies",
    "wanted",
]

OWN_DWDP = ("llmapi.llm_args", "TorchLlmArgs.dwdp_config")
"""Where TensorRT-LLM keeps the settings of a DWDP of its own, in versions that have one."""


@dataclass(frozen=True)
class Problem:
    """A symbol that is not as the contract has it."""

    symbol: Symbol
    found: str | None
    module_is_there: bool = True

    def __str__(self) -> str:
        if not self.module_is_there:
            return f"there is no module tensorrt_llm.{self.symbol.module}"
        name = f"tensorrt_llm.{self.symbol.module}.{self.symbol.attribute}"
        if self.found is None:
            return f"{name} is missing"
        if self.symbol.shape == "absent":
            return f"{name} is there already"
        return f"{name} is {self.found}, not {self.symbol.shape}"


@dataclass(frozen=True)
class Verdict:
    """Whether a TensorRT-LLM is as the contract has it.

    Attributes:
        version: of TensorRT-LLM.
        problems: what has moved; empty if dwdp can patch it.
        has_own_dwdp: it brings a DWDP of its own. Its settings keep their meaning; dwdp's is used where
            ``parallel`` is ``"dwdp"``.
    """

    version: str
    problems: tuple[Problem, ...]
    has_own_dwdp: bool

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def is_tested(self) -> bool:
        return self.version == TESTED_VERSION

    def explain(self) -> str:
        """What moved, in one text for a user."""
        moved = "; ".join(dict.fromkeys(map(str, self.problems)))
        return (
            f"dwdp does not fit TensorRT-LLM {self.version} (tested with {TESTED_VERSION}): {moved}. "
            "Nothing was patched; 'dwdp doctor --trtllm' shows the whole check"
        )


def wanted() -> list[tuple[str, str]]:
    """Pairs of module and attribute to look for in the sources."""
    names = [
        (symbol.module, name)
        for symbol in SYMBOLS
        for name in (symbol.attribute, *symbol.later_names)
    ]
    return [*names, OWN_DWDP]


def check(surface: Surface) -> Verdict:
    """Compare what was found with the contract."""
    problems = []
    for symbol in SYMBOLS:
        found = surface.modules.get(symbol.module)
        if found is None:
            problems.append(Problem(symbol, None, module_is_there=False))
        elif not satisfies(found, symbol):
            problems.append(Problem(symbol, found.get(symbol.attribute)))
    module, attribute = OWN_DWDP
    has_own_dwdp = attribute in surface.modules.get(module, {})
    return Verdict(surface.version, tuple(problems), has_own_dwdp)


def satisfies(found: Mapping[str, str], symbol: Symbol) -> bool:
    """Whether the shapes that a module was found to have, by attribute, are what ``symbol`` wants."""
    names = (symbol.attribute, *symbol.later_names)
    return any(has_shape(found.get(name), symbol.shape) for name in names)


def has_shape(found: str | None, shape: str) -> bool:
    """Whether ``found`` satisfies ``shape``.

    Signatures have to agree but for ``...``, which stands for any parameters, and for defaults: ``x`` is
    satisfied by ``x`` and ``x=``. ``global`` is satisfied by anything that a module has. Where the shape
    does not say which class a member is inherited from, any will do.
    """
    if found is None:
        return shape == "absent"
    if " of " not in shape:
        found = found.partition(" of ")[0]
    if not shape.startswith("("):
        return found == shape or shape == "global"
    expected, _, owner = shape.partition(" of ")
    actual, _, actual_owner = found.partition(" of ")
    pattern = "".join(_parameter_pattern(name) for name in _parameters(expected))
    names = "".join(f"{name}," for name in _parameters(actual))
    return owner == actual_owner and re.fullmatch(pattern, names) is not None


def _parameters(signature: str) -> list[str]:
    return [name for name in signature[1:-1].split(", ") if name]


def _parameter_pattern(name: str) -> str:
    if name == "...":
        return "(?:[^,]+,)*"
    return re.escape(name) + ("," if name.endswith("=") or name.startswith("*") else "=?,")
