"""Options made from ``DwdpConfig``: every field has one, with the field's type, bounds, default, help."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from dwdp.cli.options import (
    FloatRange,
    IntRange,
    config_from_options,
    config_options,
    dtype_option,
    flag_name,
)
from dwdp.config import DwdpConfig


def command_with(*field_names: str) -> click.Command:
    @click.command()
    @config_options(*field_names)
    def probe(**options: Any) -> DwdpConfig:
        return config_from_options(options)

    return probe


def invoke(*arguments: str, fields: tuple[str, ...] = ()) -> DwdpConfig:
    result = CliRunner().invoke(command_with(*fields), arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    assert isinstance(result.return_value, DwdpConfig)
    return result.return_value


def options_of(command: click.Command) -> dict[str, click.Option]:
    return {param.name: param for param in command.params if isinstance(param, click.Option)}


def test_every_field_has_an_option_with_its_default_and_help() -> None:
    options = options_of(command_with())
    assert list(options) == list(DwdpConfig.model_fields)
    for name, field in DwdpConfig.model_fields.items():
        assert options[name].opts == [flag_name(name)]
        assert options[name].default == field.default
        assert options[name].help == field.description
        assert field.description


def test_no_flags_give_the_default_config() -> None:
    assert invoke() == DwdpConfig()


def test_named_fields_keep_their_order() -> None:
    assert list(options_of(command_with("slice_bytes", "dwdp_size"))) == [
        "slice_bytes",
        "dwdp_size",
    ]


def test_values_reach_the_config() -> None:
    config = invoke("--dwdp-size", "4", "--fetch-mode", "staged", "--setup-timeout-s", "2.5")
    assert (config.dwdp_size, config.fetch_mode, config.setup_timeout_s) == (4, "staged", 2.5)


def schema_of(name: str) -> dict[str, Any]:
    """A field's JSON schema, without the null of an optional one."""
    schema = DwdpConfig.model_json_schema()["properties"][name]
    return schema.get("anyOf", [schema])[0]


@pytest.mark.parametrize("name", DwdpConfig.model_fields)
def test_bounds_and_choices_are_those_of_the_field(name: str) -> None:
    kind = options_of(command_with(name))[name].type
    schema = schema_of(name)
    if "enum" in schema:
        assert isinstance(kind, click.Choice)
        assert list(kind.choices) == schema["enum"]
    elif schema["type"] == "boolean":
        assert isinstance(kind, click.types.BoolParamType)
    else:
        assert isinstance(kind, click.IntRange | click.FloatRange)
        lower = schema.get("minimum", schema.get("exclusiveMinimum"))
        upper = schema.get("maximum", schema.get("exclusiveMaximum"))
        assert (kind.min, kind.max) == (lower, upper)
        assert kind.min_open == ("exclusiveMinimum" in schema)
        assert kind.max_open == ("exclusiveMaximum" in schema)


def test_bounds_and_choices_are_shown_in_the_help() -> None:
    result = CliRunner().invoke(command_with("lane_depth", "fetch_mode"), ["--help"])
    text = " ".join(result.output.split())
    assert "[default: 1; 1<=x<=16]" in text
    assert "--fetch-mode [staged|direct|demand|auto]" in text


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--dwdp-size", "0"),
        ("--dwdp-size", "73"),
        ("--dwdp-size", "two"),
        ("--fetch-mode", "push"),
        ("--num-slots", "1"),
        ("--setup-timeout-s", "0"),
        ("--setup-timeout-s", "nan"),
    ],
)
def test_a_refused_value_is_named_with_its_flag(flag: str, value: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        invoke(flag, value)
    assert flag in caught.value.format_message()
    assert value in caught.value.format_message()
    assert caught.value.exit_code == 2


def test_values_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(click.BadParameter) as caught:
        invoke("--num-experts-per-worker", "2", "--num-prefetch-experts", "3")
    text = caught.value.format_message()
    assert text.startswith("num_prefetch_experts (3) is larger than num_experts_per_worker (2)")


def test_other_options_of_a_command_are_left_alone() -> None:
    assert config_from_options({"dwdp_size": 2, "seed": 7}) == DwdpConfig(dwdp_size=2)


def test_a_field_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="no field 'dwdp_sise'"):
        config_options("dwdp_sise")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_number_is_finite(value: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{value}' is not a finite number"):
        FloatRange().convert(value, None, None)


def test_words_are_refused_in_words() -> None:
    with pytest.raises(click.BadParameter, match="'two' is not a valid integer"):
        IntRange(min=1).convert("two", None, None)
    with pytest.raises(click.BadParameter, match="'two' is not a valid number"):
        FloatRange(min=1).convert("two", None, None)


def test_every_dtype_that_the_engine_loads_can_be_asked_for() -> None:
    from dwdp.engines.transformers.interception import DTYPES

    @click.command()
    @dtype_option
    def probe(dtype: str) -> None:
        pass

    kind = options_of(probe)["dtype"].type
    assert isinstance(kind, click.Choice)
    assert tuple(kind.choices) == DTYPES
