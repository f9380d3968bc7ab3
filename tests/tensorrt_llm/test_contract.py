"""The contract against recorded names and signatures, against changes to them, and the real sources."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from dwdp.engines.tensorrt_llm import contract
from dwdp.engines.tensorrt_llm.contract import (
    SYMBOLS,
    TESTED_VERSION,
    check,
    has_shape,
    satisfies,
)
from dwdp.engines.tensorrt_llm.contract_reader import (
    SourceError,
    Surface,
    find_source,
    read_surface,
    read_version,
)
from dwdp.engines.tensorrt_llm.contract_readings import ERAS, FITS, NEWER, NOT_READ, OLDER, Era
from dwdp.engines.tensorrt_llm.doctor import examine
from dwdp.engines.tensorrt_llm.patches import PATCHES, watched_modules

RECORDED = Path(__file__).parent / "recorded"
TESTED = Surface.from_json((RECORDED / f"{TESTED_VERSION}.json").read_text())


def changed(module: str, attribute: str, shape: str | None) -> Surface:
    """The recording with one symbol changed, or missing."""
    modules = copy.deepcopy(TESTED.modules)
    if shape is None:
        del modules[module][attribute]
    else:
        modules[module][attribute] = shape
    return Surface(TESTED.version, modules)


def test_the_recorded_version_fits() -> None:
    verdict = check(TESTED)
    assert [str(problem) for problem in verdict.problems] == []
    assert verdict.fits and verdict.is_tested and not verdict.has_own_dwdp


def test_the_recording_has_what_the_contract_wants_and_nothing_else() -> None:
    """After a change to the contract: dwdp doctor --trtllm --source DIR --record FILE."""
    wanted = {(s.module, s.attribute) for s in SYMBOLS if s.shape != "absent"}
    recorded = {(module, name) for module, names in TESTED.modules.items() for name in names}
    assert recorded == wanted


def test_no_symbol_is_listed_twice() -> None:
    names = [
        (symbol.module, name)
        for symbol in SYMBOLS
        for name in (symbol.attribute, *symbol.later_names)
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda s: f"{s.module}.{s.attribute}")
def test_every_symbol_that_is_missing_or_changed_is_named(symbol: contract.Symbol) -> None:
    if symbol.shape == "absent":
        surfaces = [changed(symbol.module, symbol.attribute, "member")]
    else:
        surfaces = [changed(symbol.module, symbol.attribute, None)]
        if symbol.shape != "global":
            surfaces.append(changed(symbol.module, symbol.attribute, "(nobody, knows, *, these)"))
    for surface in surfaces:
        verdict = check(surface)
        [problem] = verdict.problems
        name = f"tensorrt_llm.{symbol.module}.{symbol.attribute}"
        assert str(problem).startswith(name)
        assert name in verdict.explain()


def test_a_missing_module_is_named_once() -> None:
    modules = {name: names for name, names in TESTED.modules.items() if name != "commands.serve"}
    text = check(Surface("1.3.0rc3", modules)).explain()
    assert text.count("commands.serve") == 1
    assert "there is no module tensorrt_llm.commands.serve" in text


def test_an_untested_version_fits_by_its_names_and_says_so() -> None:
    verdict = check(Surface("1.3.0rc4", TESTED.modules))
    assert verdict.fits and not verdict.is_tested


def test_a_dwdp_of_its_own_is_recognised() -> None:
    module, attribute = contract.OWN_DWDP
    verdict = check(changed(module, attribute, "member"))
    assert verdict.fits and verdict.has_own_dwdp


def test_a_later_name_serves_as_well() -> None:
    surface = changed("llmapi.llm_args", "TorchLlmArgs.enable_sleep", None)
    surface.modules["llmapi.llm_args"]["TorchLlmArgs.sleep_config"] = "member"
    assert check(surface).fits
    surface.modules["llmapi.llm_args"]["TorchLlmArgs.sleep_config"] = "(self)"
    [problem] = check(surface).problems
    assert str(problem) == "tensorrt_llm.llmapi.llm_args.TorchLlmArgs.enable_sleep is missing"


def found_in(era: Era) -> Surface:
    """The signatures that were found in the files that were read."""
    return Surface.from_json((RECORDED / f"{era.name}.json").read_text())


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.name)
def test_every_line_of_the_contract_is_marked_by_what_was_found(era: Era) -> None:
    modules = found_in(era).modules
    for symbol in SYMBOLS:
        mark = era.mark(symbol)
        name = f"{symbol.module}.{symbol.attribute}"
        if mark == NOT_READ:
            assert symbol.attribute not in modules.get(symbol.module, {}), name
            continue
        found = modules[symbol.module]
        assert (mark == FITS) is satisfies(found, symbol), name
        assert mark == FITS or mark.startswith(found.get(symbol.attribute, "missing: ")), name


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.name)
def test_a_reading_is_of_a_module_and_of_symbols_of_the_contract(era: Era) -> None:
    assert sorted(reading.module for reading in era.readings) == sorted(found_in(era).modules)
    for reading in era.readings:
        assert re.fullmatch("[0-9a-f]{40}", reading.commit)
        listed = {symbol.attribute for symbol in SYMBOLS if symbol.module == reading.module}
        assert listed >= {*reading.moved, *reading.not_read}


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.name)
def test_a_summary_counts_what_was_read(era: Era) -> None:
    marks = [era.mark(symbol) for symbol in SYMBOLS]
    num_read = len([mark for mark in marks if mark != NOT_READ])
    assert f"{num_read} of {len(SYMBOLS)} symbols were read" in era.summary()
    assert f"{marks.count(FITS)} of them fit" in era.summary()


def test_what_was_read_of_other_versions_does_not_fit() -> None:
    older, newer = check(found_in(OLDER)), check(found_in(NEWER))
    assert not older.has_own_dwdp and newer.has_own_dwdp
    for verdict in (older, newer):
        named = [str(problem) for problem in verdict.problems]
        assert "tensorrt_llm.commands.serve.launch_grpc_server is missing" in named
    assert not any("enable_sleep" in str(problem) for problem in newer.problems)


@pytest.mark.parametrize(
    ("found", "shape", "fits"),
    [
        ("(self, a, b=)", "(self, a, b=)", True),
        ("(self, a, b)", "(self, a, b=)", False),
        ("(self, a, b=)", "(self, a, b)", True),
        ("(self, b, a)", "(self, a, b)", False),
        ("(self, a, b, c=)", "(self, a, ...)", True),
        ("(self)", "(self, ...)", True),
        ("(self, a, *, b, **kwargs)", "(self, a, ..., **kwargs)", True),
        ("(self, a, *, b)", "(self, a, ..., **kwargs)", False),
        ("(self, ab)", "(self, a)", False),
        ("()", "(self)", False),
        ("(self) of Base", "(self)", True),
        ("(self) of Base", "(self) of Base", True),
        ("(self)", "(self) of Base", False),
        ("(self) of Other", "(self) of Base", False),
        ("member", "(self)", False),
        ("member of Base", "member", True),
        ("(self)", "member", False),
        ("class", "global", True),
        (None, "global", False),
        (None, "absent", True),
        ("member", "absent", False),
    ],
)
def test_shapes(found: str | None, shape: str, fits: bool) -> None:
    assert has_shape(found, shape) is fits


SOURCE = {
    "__init__.py": "raise RuntimeError('imported')",
    "version.py": '# comment\n__version__ = "9.9"\n',
    "base.py": "class Base:\n    size: int = 1\n    def run(self, x, y=1): ...\n",
    "sub/__init__.py": "from ..base import Base as Renamed\n",
    "sub/deep.py": """
import os.path as paths
from tensorrt_llm.base import Base
from . import Renamed
try:
    import fast
    LIMIT, OTHER = 1, 2
except ImportError:
    LIMIT = None
if LIMIT:
    def chosen(a, /, b, *rest, c, d=1, **more): ...
class Child(Base):
    FLAG = True
    @property
    def shown(self): ...
    async def fetch(self, *, key=None): ...
    def build(self):
        if self.FLAG:
            self.made, self.other = 1, 2
            other.not_mine = 3
class GrandChild(Renamed, unknown.Thing):
    def run(self): ...
class Circle(Circle): ...
""",
}


@pytest.mark.parametrize(
    ("module", "attribute", "shape"),
    [
        ("base", "Base", "class"),
        ("base", "Base.size", "member"),
        ("sub", "Renamed", "global"),
        ("sub.deep", "paths", "global"),
        ("sub.deep", "fast", "global"),
        ("sub.deep", "OTHER", "global"),
        ("sub.deep", "chosen", "(a, /, b, *rest, c, d=, **more)"),
        ("sub.deep", "Child.FLAG", "member"),
        ("sub.deep", "Child.shown", "member"),
        ("sub.deep", "Child.fetch", "(self, *, key=)"),
        ("sub.deep", "Child.made", "member"),
        ("sub.deep", "Child.other", "member"),
        ("sub.deep", "Child.not_mine", None),
        ("sub.deep", "Child.run", "(self, x, y=) of Base"),
        ("sub.deep", "GrandChild.run", "(self)"),
        ("sub.deep", "GrandChild.size", "member of Base"),
        ("sub.deep", "Circle.size", None),
        ("sub.deep", "Missing.size", None),
        ("sub.deep", "missing", None),
    ],
)
def test_sources_are_read_without_importing_them(
    tmp_path: Path, module: str, attribute: str, shape: str | None
) -> None:
    for name, text in SOURCE.items():
        path = tmp_path / "tensorrt_llm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    surface = read_surface(find_source(tmp_path), [(module, attribute), ("nowhere", "x")])
    assert surface.version == "9.9"
    assert surface.modules == {module: {} if shape is None else {attribute: shape}}
    assert Surface.from_json(surface.as_json()) == surface


def test_a_folder_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="name a checkout of TensorRT-LLM"):
        find_source(tmp_path)
    with pytest.raises(SourceError, match=r"version\.py cannot be read"):
        read_version(tmp_path)


def test_a_module_with_a_syntax_error_counts_as_missing(tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text('__version__ = "1"')
    (tmp_path / "new.py").write_text("def f(: new syntax")
    assert read_surface(tmp_path, [("new", "f")]).modules == {}


def test_every_patched_module_is_in_the_contract() -> None:
    modules = {f"tensorrt_llm.{symbol.module}" for symbol in SYMBOLS}
    assert set(PATCHES) <= modules
    assert set(PATCHES) <= watched_modules()


@pytest.mark.parametrize("target", sorted({t for targets in PATCHES.values() for t in targets}))
def test_every_patch_is_a_function_of_dwdp(target: str) -> None:
    module, _, function = target.partition(":")
    path = Path(contract.__file__).parents[3] / f"{module.replace('.', '/')}.py"
    assert f"\ndef {function}(module: " in path.read_text(encoding="utf-8")


@pytest.mark.trtllm
def test_the_recording_is_what_the_sources_say() -> None:
    examination = examine()
    if not examination.verdict.is_tested:
        pytest.skip(f"TensorRT-LLM is {examination.verdict.version}, recorded is {TESTED_VERSION}")
    assert examination.surface == TESTED
