"""Options that several commands have. Those of a group are made from the fields of ``DwdpConfig``."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
import click
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dwdp.config import DwdpConfig

_Function = TypeVar("_Function", bound=Callable[..., Any])


class IntRange(click.IntRange):
    """As click's own, whose refusal of a word says that it is "not a valid integer range"."""

    name = "integer"


class FloatRange(click.FloatRange):
    """As click's own, whose refusal of a word says that it is "not a valid float range".

    Only finite numbers are taken.
    """

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


def flag_name(field_name: str) -> str:
    """``"num_slots"`` -> ``"--num-slots"``."""
    return "--" + field_name.replace("_", "-")


def config_options(*field_names: str) -> Callable[[_Function], _Function]:
    """Add one option per named field of ``DwdpConfig``, in the order given (all fields if none is named).

    Type, bounds, default and help come from the field. The command gets each value under the field's name.

    Raises:
        ValueError: a name is not a field of ``DwdpConfig``, or its type has no option.
    """
    fields = DwdpConfig.model_fields
    for name in field_names:
        if name not in fields:
            raise ValueError(f"DwdpConfig has no field {name!r}; it has {', '.join(fields)}")

    def decorate(function: _Function) -> _Function:
        # click shows options in the reverse of the order in which decorators add them.
        for name in reversed(field_names or tuple(fields)):
            function = field_option(name, fields[name])(function)
        return function

    return decorate


def config_from_options(options: Mapping[str, Any]) -> DwdpConfig:
    """The config that a command's ``options`` describe; keys that are not its fields are left alone.

    Raises:
        click.BadParameter: a value is refused; the text names the flag, the value and the reason.
    """
    fields = DwdpConfig.model_fields
    values = {name: value for name, value in options.items() if name in fields}
    try:
        return DwdpConfig(**values)
    except ValidationError as error:
        raise bad_parameter(error) from error


def bad_parameter(error: ValidationError) -> click.BadParameter:
    problem = error.errors(include_url=False)[0]
    # A validator's own words are in the context: "msg" would put "Value error, " before them.
    reason = str(problem.get("ctx", {}).get("error", problem["msg"]))
    context = click.get_current_context(silent=True)
    if not problem["loc"]:
        return _BadCombination(reason, ctx=context)
    return click.BadParameter(
        f"{problem['input']!r}: {reason}", ctx=context, param_hint=flag_name(str(problem["loc"][0]))
    )


class _BadCombination(click.BadParameter):
    """Values that are fine one by one but not together: the reason names the fields itself."""

    def format_message(self) -> str:
        return self.message


def field_option(name: str, field: FieldInfo) -> Callable[[_Function], _Function]:
    kind = _without_none(field.annotation)
    if kind is bool:
        declaration = f"{flag_name(name)}/--no-{name.replace('_', '-')}"
        return click.option(
            declaration, name, default=field.default, show_default=True, help=field.description
        )
    return click.option(
        flag_name(name),
        name,
        type=_option_type(name, kind, field.metadata),
        default=field.default,
        show_default=field.default is not None,
        help=field.description,
    )


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        if len(kinds) == 1:
            return kinds[0]
    return annotation


def _option_type(name: str, kind: Any, metadata: list[Any]) -> click.ParamType:
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if kind is str:
        return click.STRING
    if kind in (int, float):
        return (IntRange if kind is int else FloatRange)(**_bounds(metadata))
    raise ValueError(f"DwdpConfig.{name}: there is no command-line option for {kind!r}")


def _bounds(metadata: list[Any]) -> dict[str, Any]:
    """click's range arguments for a field's ``ge``, ``gt``, ``le`` and ``lt``."""
    bounds: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, annotated_types.Ge):
            bounds["min"] = item.ge
        elif isinstance(item, annotated_types.Gt):
            bounds.update(min=item.gt, min_open=True)
        elif isinstance(item, annotated_types.Le):
            bounds["max"] = item.le
        elif isinstance(item, annotated_types.Lt):
            bounds.update(max=item.lt, max_open=True)
    return bounds


fetch_options = config_options(
    "fetch_mode",
    "demand_max_tokens",
    "num_slots",
    "num_experts_per_worker",
    "num_prefetch_experts",
    "slice_bytes",
    "num_lanes",
    "lane_depth",
    "contention_opt",
    "setup_timeout_s",
)
"""What a group on this machine can be told besides its size."""

# The names stand in dwdp.engines.transformers.interception as well, whose import takes seconds.
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the weights in memory; auto keeps the checkpoint's.",
)

device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What the ranks compute on. cuda: a GPU each, in turn; ranks share them if there are fewer.",
)

threads_option = click.option(
    "--threads-per-rank",
    type=IntRange(min=1, max=1024),
    help="Compute threads of each rank. Default: the cores, shared out evenly.",
)


def even_threads(num_ranks: int) -> int:
    """What ``--threads-per-rank`` is where it is not given: an even share of the cores, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)
