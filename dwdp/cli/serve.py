"""``dwdp serve``: an OpenAI-compatible endpoint over a group of ranks on this machine."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel, ValidationError

from dwdp.cli.options import (
    IntRange,
    bad_parameter,
    config_from_options,
    config_options,
    device_option,
    dtype_option,
    even_threads,
    fetch_options,
    field_option,
    threads_option,
)
from dwdp.serving.rank_server.options import RankOptions
from dwdp.serving.router.service import Service, run_service
from dwdp.serving.router.settings import RouterSettings
from dwdp.serving.supervisor.checkpoint import check_servable
from dwdp.serving.supervisor.life import Watch
from dwdp.serving.supervisor.transformers_ranks import TransformersRanks

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Model = TypeVar("_Model", bound=BaseModel)

# One option says how long running requests may go on, for the router and the ranks alike.
_SHARED = {"drain_grace_s": "grace_s"}

_START_MARGIN_S = 120.0
"""A rank that waits in vain for its peers says so itself; one that hangs is killed so much later."""
_DRAIN_MARGIN_S = 30.0


def _model_options(model: type[BaseModel], *left_out: str) -> Callable[[_Function], _Function]:
    """One flag per field of ``model``, in its order."""

    def decorate(function: _Function) -> _Function:
        for name in reversed(model.model_fields):
            if name not in left_out:
                function = field_option(name, model.model_fields[name])(function)
        return function

    return decorate


def _model_from_options(model: type[_Model], options: Mapping[str, Any]) -> _Model:
    values = {name: options[_SHARED.get(name, name)] for name in model.model_fields}
    try:
        return model(**values)
    except ValidationError as error:
        raise bad_parameter(error) from error


@click.command()
@click.argument("model_dir", type=click.Path(path_type=Path))
@config_options("dwdp_size")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. The default can be reached from this machine only.",
)
@click.option(
    "--port",
    type=IntRange(min=0, max=65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="DWDP_API_KEY",
    show_envvar=True,
    help="Key that clients have to send. Can be repeated. Other users of this machine can read a command "
    "line; the environment variable holds keys separated by spaces.",
)
@click.option(
    "--served-model-name", help="What requests call the model. Default: the directory's name."
)
@fetch_options
@_model_options(RankOptions, *_SHARED)
@_model_options(RouterSettings)
@dtype_option
@device_option
@threads_option
def serve(model_dir: Path, **values: Any) -> int:
    """Serve the mixture-of-experts checkpoint in MODEL_DIR to OpenAI clients.

    The model's experts are shared out over --dwdp-size ranks on this machine. A rank that dies is started
    again while the others go on. Ends on SIGTERM when running requests have finished; / shows the group.
    """
    config = config_from_options(values)
    options = _model_from_options(RankOptions, values)
    settings = _model_from_options(RouterSettings, values)
    if any(not key.strip() for key in values["api_keys"]):
        raise click.BadParameter("a key is empty", param_hint="--api-key")
    if "DWDP_API_KEY" in os.environ and not values["api_keys"]:
        raise click.BadParameter(
            "it is set but holds no key; unset it to serve without one", param_hint="DWDP_API_KEY"
        )
    logging.basicConfig(level=logging.INFO, format="dwdp: %(message)s")
    check_servable(model_dir, config, options, dtype=values["dtype"], device=values["device"])
    launcher = TransformersRanks(
        model_dir.resolve(),
        values["served_model_name"] or model_dir.resolve().name,
        config,
        options,
        dtype=values["dtype"],
        device=values["device"],
        num_threads=values["threads_per_rank"] or even_threads(config.dwdp_size),
    )
    watch = Watch(
        start_timeout_s=config.setup_timeout_s + _START_MARGIN_S,
        drain_timeout_s=options.drain_grace_s + _DRAIN_MARGIN_S,
    )
    gc.freeze()  # what is imported stays; a collection that went through it would hold up all streams
    return run_service(lambda: _new_service(launcher, settings, watch, values))


def _new_service(
    launcher: TransformersRanks,
    settings: RouterSettings,
    watch: Watch,
    values: Mapping[str, Any],
) -> Service:
    return Service(
        launcher,
        launcher.model_name,
        settings,
        host=values["host"],
        port=values["port"],
        keys=values["api_keys"],
        watch=watch,
        announce=_announce,
    )


def _announce(url: str, num_ranks: int) -> None:
    click.echo(f"dwdp: ready at {url} with {num_ranks} rank(s)")
