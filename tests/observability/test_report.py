"""The report: its documentation and its schema say what the model says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from dwdp.config import DwdpConfig
from dwdp.observability.report import (
    GenerateReport,
    ModelReport,
    RankReport,
    SamplingReport,
    Totals,
    per_second,
    schema_text,
    total,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
_ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)

SECTIONS: dict[str, type[BaseModel]] = {
    "The document": GenerateReport,
    "model": ModelReport,
    "sampling": SamplingReport,
    "ranks": RankReport,
    "totals": Totals,
}


def rank_report(rank: int, **values: float) -> RankReport:
    zeros = {
        name: field.annotation(0)
        for name, field in RankReport.model_fields.items()
        if field.annotation
    }
    return RankReport.model_validate({**zeros, "rank": rank, **values})


def report() -> GenerateReport:
    ranks = (
        rank_report(
            0,
            num_prompts=2,
            generated_tokens=30,
            num_demands=3,
            fetched_bytes=5,
            exposed_wait_s=0.5,
        ),
        rank_report(
            1,
            num_prompts=1,
            generated_tokens=10,
            num_demands=4,
            fetched_bytes=7,
            exposed_wait_s=0.25,
        ),
    )
    return GenerateReport(
        dwdp_version="1.2.3",
        launcher="dwdp",
        model=ModelReport(
            path="m", model_type="x", num_layers=2, num_moe_layers=1, num_experts=8, dtype="float32"
        ),
        sampling=SamplingReport(max_new_tokens=4, temperature=0.0, seed=0),
        device="cpu",
        threads_per_rank=1,
        fetch_mode="direct",
        config=DwdpConfig(dwdp_size=2),
        ranks=ranks,
        lost_ranks=(1,),
        totals=total(ranks, 4.0),
    )


def type_name(annotation: object) -> str:
    if isinstance(annotation, type):
        if annotation is DwdpConfig or annotation in SECTIONS.values():
            return "object"
        return {int: "integer", float: "number", str: "string"}[annotation]
    if get_origin(annotation) is tuple:
        return f"list of {type_name(get_args(annotation)[0])}s"
    return f"{get_args(annotation)[0]}"


def section(title: str) -> str:
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    _, _, rest = text.partition(f"\n## {title}\n")
    assert rest, f"docs/report.md has no section {title!r}"
    return rest.partition("\n## ")[0]


@pytest.mark.parametrize("title", SECTIONS)
def test_every_field_is_documented_as_the_model_says(title: str) -> None:
    documented = _ROW.findall(section(title))
    expected = [
        (name, type_name(field.annotation), field.description)
        for name, field in SECTIONS[title].model_fields.items()
    ]
    assert documented == expected


def test_the_schema_file_is_current() -> None:
    assert (DOCS / "report.schema.json").read_text(encoding="utf-8") == schema_text(), (
        "run: python -m dwdp.observability.report > docs/report.schema.json"
    )


def test_a_report_survives_the_file() -> None:
    text = report().model_dump_json()
    assert GenerateReport.model_validate_json(text) == report()


def test_an_unknown_version_or_field_is_refused() -> None:
    text = report().model_dump_json()
    with pytest.raises(ValidationError, match="schema_version"):
        GenerateReport.model_validate_json(text.replace('"schema_version":2', '"schema_version":1'))
    with pytest.raises(ValidationError, match="extra"):
        GenerateReport.model_validate_json(text.replace('"launcher"', '"surprise":1,"launcher"'))


def test_totals_are_sums_over_the_ranks() -> None:
    totals = report().totals
    assert (totals.num_prompts, totals.generated_tokens, totals.fetched_bytes) == (3, 40, 12)
    assert (totals.num_demands, totals.exposed_wait_s) == (7, 0.75)
    assert totals.tokens_per_s == 10.0
    assert per_second(0, 0.0) == 0.0
