"""Whether dwdp can patch a TensorRT-LLM, installed or a source checkout. Imports nothing of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dwdp.engines.tensorrt_llm import contract
from dwdp.engines.tensorrt_llm.contract import Verdict
from dwdp.engines.tensorrt_llm.contract_reader import Surface, find_source, read_surface
from dwdp.engines.tensorrt_llm.contract_readings import ERAS


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        source: the folder ``tensorrt_llm`` that was read.
        surface: its symbols.
        verdict: how they compare with the contract.
    """

    source: Path
    surface: Surface
    verdict: Verdict


def examine(path: Path | None = None) -> Examination:
    """Read the checkout at ``path``, or the installed package.

    Raises:
        SourceError: there is none.
    """
    source = find_source(path)
    surface = read_surface(source, contract.wanted())
    return Examination(source, surface, contract.check(surface))


def describe(examination: Examination) -> list[str]:
    """Lines of text: one per module, one per symbol that moved, and the conclusion.

    For a version that is not the tested one, also what is known of those before and after it.
    """
    verdict = examination.verdict
    lines = [f"TensorRT-LLM {verdict.version} in {examination.source}"]
    totals = Counter(symbol.module for symbol in contract.SYMBOLS)
    moved = Counter(problem.symbol.module for problem in verdict.problems)
    for module, total in totals.items():
        if module not in examination.surface.modules:
            lines.append(f"  moved  {module}: there is no such module")
            continue
        state = "moved" if moved[module] else "ok"
        lines.append(f"  {state:<5}  {module}: {total - moved[module]} of {total} symbols fit")
        lines += [
            f"           {problem} ({problem.symbol.why})"
            for problem in verdict.problems
            if problem.symbol.module == module
        ]
    if verdict.has_own_dwdp:
        lines.append(
            "It has a DWDP of its own: dwdp_config keeps its meaning there, and dwdp is used where "
            'parallel="dwdp" asks for it.'
        )
    if not verdict.is_tested:
        lines += [era.summary() for era in ERAS]
    return [*lines, _conclusion(verdict)]


def _conclusion(verdict: Verdict) -> str:
    if not verdict.fits:
        return (
            f"dwdp does not fit: {len(verdict.problems)} symbols moved. It patches nothing there, and "
            "--parallel dwdp fails."
        )
    if not verdict.is_tested:
        return f"dwdp fits as far as names and signatures say; it is tested with {contract.TESTED_VERSION}."
    return "dwdp fits, and is tested with this version."
