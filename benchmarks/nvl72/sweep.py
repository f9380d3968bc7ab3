"""Sweep files: which points are measured. ``README.md`` here has the table of keys."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from dwdp.perf.model import Model
from dwdp.perf.model_config import load_model
from dwdp.perf.workload import Lengths
from dwdp.placement import build_placement

Mode = Literal["context_only", "end_to_end"]
Table = Literal[
    "runs", "iteration", "roofline", "contention", "end_to_end", "length_variation", "group_size"
]
Share = Annotated[float, Field(gt=0, le=1)]

AXES = (
    "system",
    "group_size",
    "num_groups",
    "isl",
    "length_ratio",
    "length_cv",
    "max_num_tokens",
    "context_batch_size",
    "contention_opt",
    "num_experts_per_worker",
    "seed",
)
"""Keys that may be lists: a point is made for every combination."""
LONGEST_IN_CVS = 3
"""Lengths drawn with a CV are cut at the mean plus so many standard deviations."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Point(_Section):
    """One deployment, one dataset, and the loads that are put on it."""

    name: str = Field(default="", pattern=r"^(\w[\w.-]*)?$")
    system: Literal["dep", "dwdp"]
    group_size: int = Field(ge=1, le=72)
    num_groups: PositiveInt = 1
    generation_gpus: PositiveInt
    generation_server_gpus: PositiveInt | None = None
    isl: PositiveInt
    osl: PositiveInt = 1
    length_ratio: Share | None = None
    length_cv: float | None = Field(default=None, ge=0, le=0.5)
    seed: NonNegativeInt = 0
    concurrency: tuple[PositiveInt, ...] = ()
    tps_per_user: tuple[PositiveFloat, ...] = ()
    rounds: PositiveInt = 8
    max_num_tokens: PositiveInt
    context_batch_size: PositiveInt = 64
    context_kv_share: Share = 0.3
    generation_batch_size: PositiveInt | None = None
    generation_kv_share: Share = 0.75
    contention_opt: bool = True
    num_experts_per_worker: PositiveInt | None = None
    num_prefetch_experts: PositiveInt | None = None
    mtp_layers: NonNegativeInt = 0
    expert_slots: NonNegativeInt = 0
    moe_backend: str = "CUTEDSL"
    kv_cache_dtype: str = "fp8"
    transfer_backend: str = "DEFAULT"
    context_router: dict[str, Any] | None = None
    context_options: dict[str, Any] = {}
    generation_options: dict[str, Any] = {}

    @property
    def lengths(self) -> Lengths:
        """Distribution of the input lengths."""
        if self.length_cv is not None:
            return Lengths(self.isl, cv=self.length_cv)
        return Lengths(self.isl, ratio=1.0 if self.length_ratio is None else self.length_ratio)

    @property
    def longest_input(self) -> int:
        """The longest input that the dataset may have."""
        return round(self.isl * (1 + LONGEST_IN_CVS * (self.length_cv or 0.0)))

    @property
    def context_gpus(self) -> int:
        """GPUs of all context servers."""
        return self.group_size * self.num_groups

    @property
    def num_gpus(self) -> int:
        """Context and generation GPUs."""
        return self.context_gpus + self.generation_gpus

    @property
    def server_gpus(self) -> int:
        """GPUs of one generation server."""
        return self.generation_server_gpus or self.generation_gpus

    def check(self, model: Model, mode: Mode) -> None:
        """Whether the point can be run.

        Raises:
            ValueError: it cannot; begins with the key.
        """
        if self.length_ratio is not None and self.length_cv is not None:
            raise ValueError("length_cv: give length_ratio or length_cv, not both")
        if bool(self.concurrency) == bool(self.tps_per_user):
            raise ValueError("concurrency: give either concurrency or tps_per_user")
        if mode == "context_only" and (self.osl != 1 or self.tps_per_user):
            key = "osl" if self.osl != 1 else "tps_per_user"
            raise ValueError(f"{key}: a context_only sweep generates one token per prompt")
        if self.longest_input > self.max_num_tokens:
            raise ValueError(
                f"max_num_tokens: {self.max_num_tokens}, but inputs have up to {self.longest_input} "
                "tokens"
            )
        if self.generation_gpus % self.server_gpus:
            raise ValueError(
                f"generation_server_gpus: {self.generation_gpus} GPUs do not make servers of "
                f"{self.server_gpus}"
            )
        self._check_experts(model.moe.num_experts)

    def _check_experts(self, num_experts: int) -> None:
        slots = self.expert_slots or num_experts
        if slots < num_experts or slots % self.server_gpus:
            key = "expert_slots" if self.expert_slots else "generation_server_gpus"
            raise ValueError(
                f"{key}: {slots} expert slots do not share out {num_experts} experts over "
                f"{self.server_gpus} GPUs"
            )
        if self.system == "dep":
            if self.num_experts_per_worker or self.num_prefetch_experts:
                raise ValueError("num_experts_per_worker: is an option of system dwdp")
            if num_experts % self.group_size:
                raise ValueError(
                    f"group_size: {num_experts} experts do not divide over {self.group_size} ranks of "
                    "expert parallelism"
                )
            return
        if self.group_size < 2:
            raise ValueError("group_size: a DWDP group has at least 2 ranks")
        try:
            build_placement(
                num_experts,
                self.group_size,
                num_experts_per_worker=self.num_experts_per_worker,
                num_prefetch_experts=self.num_prefetch_experts,
            )
        except ValueError as error:
            raise ValueError(f"num_experts_per_worker: {error}") from error


class Sweep(_Section):
    """A sweep file.

    Attributes:
        name: of the folder that the results are in.
        description: one line for people.
        mode: ``context_only`` (prefill; one token is generated) or ``end_to_end``.
        table: how results are laid out, beside the paper's.
        model: for the performance model: a name that ``dwdp plan`` knows, or a ``config.json``.
        hardware: likewise, e.g. ``gb200``.
        defaults: keys of all points.
        points: what is measured; each adds to the defaults, or overrides them.
    """

    name: str = Field(pattern=r"^\w[\w.-]*$")
    description: str
    mode: Mode
    table: Table
    model: str
    hardware: str = "gb200"
    defaults: dict[str, Any] = {}
    points: tuple[dict[str, Any], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_points(self) -> Sweep:
        model = load_model(self.model)
        names = Counter(point.name for point in self.expanded)
        for number, entry in enumerate(self.points):
            for point in self._expand(number, entry):
                try:
                    point.check(model, self.mode)
                except ValueError as error:
                    raise ValueError(f"points.{number}.{error}") from error
                if names[point.name] > 1:
                    raise ValueError(
                        f"points.{number}.name: {names[point.name]} points are called {point.name}"
                    )
        return self

    @cached_property
    def expanded(self) -> tuple[Point, ...]:
        """Every point, lists of axes resolved."""
        return tuple(
            point
            for number, entry in enumerate(self.points)
            for point in self._expand(number, entry)
        )

    def _expand(self, number: int, entry: dict[str, Any]) -> Iterator[Point]:
        merged = {**self.defaults, **entry}
        for key, other in (("length_cv", "length_ratio"), ("length_ratio", "length_cv")):
            if key in entry and other not in entry:
                merged.pop(other, None)  # the point's distribution, not the defaults'
        swept = [key for key in AXES if isinstance(merged.get(key), list)]
        for key in swept:
            if not merged[key]:
                raise ValueError(f"points.{number}.{key}: an empty list makes no points")
        for values in itertools.product(*(merged[key] for key in swept)):
            chosen = dict(zip(swept, values, strict=True))
            try:
                point = Point.model_validate({**merged, **chosen})
            except ValidationError as error:
                raise ValueError(f"points.{number}.{_problem(error)}") from error
            parts = [point.name] if point.name else []
            parts += [_label(key, value) for key, value in chosen.items()]
            if not parts:
                parts = [point.system]
            yield point.model_copy(update={"name": "-".join(parts)})


_SHORT = {
    "system": "",
    "group_size": "group",
    "num_groups": "groups",
    "length_ratio": "ratio",
    "length_cv": "cv",
    "max_num_tokens": "tokens",
    "context_batch_size": "batch",
    "num_experts_per_worker": "experts",
}


def _label(key: str, value: Any) -> str:
    """What a swept key adds to the name of a point."""
    if isinstance(value, bool):
        return f"{key}-{'on' if value else 'off'}"
    return re.sub(r"[^\w.-]", "-", f"{_SHORT.get(key, key)}{value}")


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file.

    Raises:
        ValueError: not there, not YAML, or a key is missing, unknown or wrong; one line that names it.
    """
    return read_section(Path(path), Sweep)


def read_section(path: Path, kind: type[Any]) -> Any:
    """A YAML file as a ``kind``; every problem is one line that names the file and the key."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a mapping of keys to values")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {_problem(error)}") from error


def _problem(error: ValidationError) -> str:
    """What is wrong, with its key. A misspelt key is also a missing one: it is named as it is there."""
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {text}" if key else text
