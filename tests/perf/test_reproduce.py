"""How far the model reproduces the paper, cell by cell, and the command that shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dwdp.cli.main import run
from dwdp.perf import paper
from dwdp.perf.calibration import calibrate, paper_model
from dwdp.perf.hardware import load_hardware
from dwdp.perf.reproduce import (
    BREAKDOWN,
    CONTENTION,
    END_TO_END,
    SHARE,
    TABLE_1,
    Cell,
    Reproduction,
    concurrency_gain,
)

pytestmark = pytest.mark.slow

KNOWN_MISSES = {
    (END_TO_END, "170-180 TPS/user", "TPS/GPU gain"),
}
"""What the model does not reproduce; ``dwdp.perf.reproduce.CANNOT_FIT`` says why."""


def cells(reproduction: Reproduction, result: str) -> list[Cell]:
    return [cell for cell in reproduction.cells if cell.result == result]


def test_exactly_the_known_cells_miss(reproduction: Reproduction) -> None:
    misses = {(cell.result, cell.row, cell.column) for cell in reproduction.misses()}
    assert misses == KNOWN_MISSES


@pytest.mark.parametrize(
    ("result", "count", "tolerance"),
    [
        (TABLE_1, 8, 0.05),
        (SHARE, 1, 0.05),
        (BREAKDOWN, 16, 0.10),
        (CONTENTION, 1, 0.05),
        (END_TO_END, 6, 0.03),
    ],
)
def test_no_result_is_left_out_or_judged_more_kindly_than_stated(
    reproduction: Reproduction, result: str, count: int, tolerance: float
) -> None:
    found = cells(reproduction, result)
    assert len(found) == count
    assert all(cell.tolerance <= tolerance for cell in found)


def test_each_constant_is_fitted_to_a_cell_and_most_cells_to_no_constant(
    reproduction: Reproduction,
) -> None:
    calibrated = [cell for cell in reproduction.cells if cell.kind == "calibrated"]
    predicted = [cell for cell in reproduction.cells if cell.kind == "predicted"]
    assert len(calibrated) == len(reproduction.calibration.constants) == 8
    assert len(predicted) >= 2 * len(calibrated)
    # One set of constants for all rows: shares of a peak are shares.
    shares = [c.value for c in reproduction.calibration.constants if c.unit.startswith("of ")]
    assert all(0 < share <= 1 for share in shares)


def test_the_headline_gain_is_predicted(reproduction: Reproduction) -> None:
    mean = next(cell for cell in cells(reproduction, END_TO_END) if "mean" in cell.row)
    assert mean.kind == "predicted" and mean.ours == pytest.approx(1.088, abs=0.015)


def test_table_1_rules_out_other_assumptions(reproduction: Reproduction) -> None:
    worst = dict(reproduction.alternatives)
    assert worst.pop("as shown") < 0.05
    assert worst["a token sent once per rank, NVFP4 out"] > 0.15
    assert worst["everything in NVFP4"] > 0.15


def test_the_synchronisation_share_grows_with_the_load_cv(reproduction: Reproduction) -> None:
    shares = [share for _, share in reproduction.sync_curve]
    assert 0 < shares[0] < 0.04  # layers vary even where loads do not
    assert shares == sorted(shares)


def test_the_packaged_gb200_carries_the_calibrated_constants() -> None:
    packaged = load_hardware("gb200").achieved.model_dump(exclude={"source"})
    calibrated = calibrate().hardware.achieved.model_dump(exclude={"source"})
    for name, value in calibrated.items():
        assert packaged[name] == pytest.approx(value, rel=0.01), name


def test_reading_all_sources_at_once_gains_more_than_the_papers_mitigation(
    reproduction: Reproduction,
) -> None:
    hardware = reproduction.calibration.hardware
    sliced = cells(reproduction, CONTENTION)[0].ours
    assert concurrency_gain(hardware, paper_model()) > sliced > 1


def test_the_papers_columns_add_up() -> None:
    for column in (paper.DEP4_MS, paper.DWDP4_MS):
        parts = sum(value for row, value in column.items() if row != "iteration")
        assert parts == pytest.approx(column["iteration"], abs=0.01)


def test_an_error_is_relative_to_the_nearer_end_of_a_range() -> None:
    def error(ours: float, theirs: float = 0.10, upper: float | None = 0.12) -> float:
        return Cell("", "", "", theirs, ours, 0.05, "predicted", upper).error

    assert error(0.11) == 0
    assert error(0.09) == pytest.approx(-0.1)
    assert error(0.15) == pytest.approx(0.25)
    assert error(0.0, 0.0, None) == 0
    assert math.isinf(error(1.0, 0.0, None))


def test_the_command_prints_every_cell_and_writes_them(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reproduction: Reproduction,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dwdp.perf.reproduce.reproduce", lambda: reproduction)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "r.json"
    assert run(["reproduce", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["schema"] == "dwdp-reproduction-1"
    assert len(written["cells"]) == len(reproduction.cells)
    for cell in written["cells"]:
        assert cell["row"] in text
    missed = [cell for cell in written["cells"] if not cell["reproduced"]]
    assert len(missed) == text.count("misses") == len(KNOWN_MISSES)
