"""The page about the paper is what the model computes today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dwdp.perf.display import error_text, figure_text
from dwdp.perf.reproduce import Reproduction

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "paper.md"


def test_every_cell_of_the_page_is_current(reproduction: Reproduction) -> None:
    rows = set(PAGE.read_text(encoding="utf-8").splitlines())
    for cell in reproduction.cells:
        theirs = figure_text(cell.paper)
        if cell.upper is not None:
            theirs += f" to {figure_text(cell.upper)}"
        start = f"| {cell.row} | {cell.column} | {theirs} | {figure_text(cell.ours)} | "
        assert any(row.startswith(start) for row in rows), f"{start}: write the page anew"


def test_the_page_is_written_with_its_pictures(tmp_path: Path, reproduction: Reproduction) -> None:
    pytest.importorskip("matplotlib")
    from dwdp.perf.page import write_page

    write_page(reproduction, tmp_path / "paper.md")
    text = (tmp_path / "paper.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((images/[\w.-]+)\)", text)
    assert len(pictures) == 5
    assert all((tmp_path / picture).stat().st_size > 1000 for picture in pictures)
    assert text.count("misses 10%") + text.count("misses 3%") == len(reproduction.misses())


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0962, "0.0962"), (1.5349, "1.53"), (1319.85, "1,320"), (0.1, "0.1")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert figure_text(value) == text


@pytest.mark.parametrize(
    ("error", "text"), [(0.0, "0 %"), (-0.0241, "-2.4 %"), (float("inf"), "not 0")]
)
def test_errors_are_percentages(error: float, text: str) -> None:
    assert error_text(error) == text
