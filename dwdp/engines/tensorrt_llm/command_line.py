"""``--parallel dwdp`` and its options on ``trtllm-serve``, and what serving means with it.

The command keeps its function; options are added to its list, and the functions that it calls by their
module's names are replaced. What the user gave goes into the arguments of ``LLM``; the keys of a YAML file
win over options, one by one.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

import click

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm import rank_stats
from dwdp.engines.tensorrt_llm.arguments import Request, read_request
from dwdp.engines.tensorrt_llm.conflicts import refuse_conflicts
from dwdp.engines.tensorrt_llm.launch import RankPlace, rank_of_process, server_port
from dwdp.engines.tensorrt_llm.rank_launcher import serve_group
from dwdp.serving.rank_exit import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_PEER_FAILED

_META_KEY = "dwdp"
_PREFIX = "dwdp_"
_ONE_SERVER_ONLY = ("metadata_server_cfg", "server_role", "disagg_cluster_config")
_GROUP_ADVICE = (
    "start every rank by itself (torchrun, srun, mpirun, or DWDP_RANK and DWDP_RENDEZVOUS), or leave "
    "it out"
)


def patch(module: Any) -> None:
    """Add the options to ``serve`` of ``tensorrt_llm.commands.serve``, and give them their meaning."""
    module.serve.params.extend(_options(module.help_info_with_stability_tag))
    module.get_llm_args = _with_options(module.get_llm_args)
    module.update_llm_args_with_extra_dict = _merging(module.update_llm_args_with_extra_dict)
    module.launch_server = _serving(module.launch_server, _serve_http)
    module.launch_grpc_server = _serving(module.launch_grpc_server, _refuse_grpc)
    rank_stats.patch(module)


def _options(with_stability: Callable[[str, str], str]) -> list[click.Option]:
    def option(declaration: str, kind: click.ParamType, text: str) -> click.Option:
        return click.Option(
            [declaration],
            type=kind,
            default=None,
            expose_value=False,
            callback=_remember,
            help=with_stability(text, "prototype"),
        )

    parallel = option(
        "--parallel",
        click.Choice(["dwdp"]),
        "dwdp: every GPU serves whole requests by itself, stores a share of the experts, and reads the "
        "others from its peers' memory. Without a launcher the command starts --dwdp_size ranks and one "
        "endpoint.",
    )
    place = [
        option(
            "--dwdp_rank",
            click.IntRange(min=0),
            "Number of this server among all ranks, if no launcher says it.",
        ),
        option(
            "--dwdp_rendezvous",
            click.STRING,
            "host:port where the ranks meet, with the host of rank 0, if no launcher says it.",
        ),
    ]
    return [
        parallel,
        *(
            option(_flag(name, field.annotation), _kind(field.annotation), field.description or "")
            for name, field in DwdpConfig.model_fields.items()
        ),
        *place,
    ]


def _flag(field_name: str, annotation: Any) -> str:
    name = _PREFIX + field_name.removeprefix(_PREFIX)
    return f"--{name}/--no_{name}" if annotation is bool else f"--{name}"


def _kind(annotation: Any) -> click.ParamType:
    """Bounds are checked by ``DwdpConfig``, after the YAML file is merged."""
    if get_origin(annotation) is UnionType:
        (annotation,) = (kind for kind in get_args(annotation) if kind is not type(None))
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    kinds: dict[Any, click.ParamType] = {
        int: click.INT,
        float: click.FLOAT,
        bool: click.BOOL,
    }
    return kinds[annotation]


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None:
        context.meta.setdefault(_META_KEY, {})[parameter.name] = value


def _given() -> dict[str, Any]:
    """The options of this plugin that the running command was given, by name."""
    context = click.get_current_context(silent=True)
    return {} if context is None else dict(context.meta.get(_META_KEY, {}))


def _with_options(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_llm_args(*args: Any, **kwargs: Any) -> Any:
        llm_args, rest = original(*args, **kwargs)
        given = _given()
        parallel = given.pop("parallel", None)
        if parallel is not None:
            llm_args["parallel"] = parallel
        if given:
            llm_args["dwdp_config"] = {_key(name): value for name, value in given.items()}
        return llm_args, rest

    return get_llm_args


def _key(option_name: str) -> str:
    key = option_name.removeprefix(_PREFIX)
    return option_name if option_name in DwdpConfig.model_fields else key


def _merging(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def update_llm_args_with_extra_dict(
        llm_args: dict[str, Any], llm_args_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        from_options = llm_args.get("dwdp_config")
        from_file = llm_args_dict.get("dwdp_config") if isinstance(llm_args_dict, Mapping) else None
        is_ours = {**llm_args, **(llm_args_dict or {})}.get("parallel") == "dwdp"
        if _given() and not is_ours:
            names = ", ".join(f"--{name}" for name in _given())
            raise click.UsageError(
                f"{names}: needs --parallel dwdp (or parallel: dwdp in the YAML file)"
            )
        if is_ours and isinstance(from_options, Mapping) and isinstance(from_file, Mapping | None):
            merged = {**from_options, **(from_file or {})}
            llm_args_dict = {**llm_args_dict, "dwdp_config": merged}
        return original(llm_args, llm_args_dict, *args, **kwargs)

    return update_llm_args_with_extra_dict


ServeGroup = Callable[[Request, str, int, dict[str, Any], Mapping[str, Any]], None]
"""Serves a whole group: what was asked for, host, port, arguments of LLM, further arguments by name."""


def _serving(original: Callable[..., None], serve_whole_group: ServeGroup) -> Callable[..., None]:
    """``original(host, port, llm_args, ...)``, which serves one model, made to serve a rank or a group."""
    names = list(inspect.signature(original).parameters)[3:]

    def launch(host: str, port: int, llm_args: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        try:
            request = read_request(llm_args)
            if request is None:
                original(host, port, llm_args, *args, **kwargs)
                return
            refuse_conflicts(llm_args)
            place = rank_of_process(
                request.config, rank=request.rank, rendezvous=request.rendezvous
            )
        except ValueError as error:
            _end_with(EXIT_BAD_INPUT, str(error))
        if place is None:
            further = {**dict(zip(names, args, strict=False)), **kwargs}
            serve_whole_group(request, host, port, llm_args, further)
            return
        port = server_port(port)
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "all that are there")
        _log(f"dwdp: {place}; it sees GPU {gpu} and listens on {host}:{port}")
        with _failures_reach_peers(place):
            original(host, port, llm_args, *args, **kwargs)

    return launch


def _serve_http(
    request: Request, host: str, port: int, llm_args: dict[str, Any], further: Mapping[str, Any]
) -> None:
    given = [name for name in _ONE_SERVER_ONLY if further.get(name) is not None]
    if given:
        _end_with(EXIT_BAD_INPUT, f"{given[0]} is for one server, not for a group: {_GROUP_ADVICE}")
    sys.exit(serve_group(request.config, llm_args, host=host, port=port))


def _refuse_grpc(
    request: Request, host: str, port: int, llm_args: dict[str, Any], further: Mapping[str, Any]
) -> None:
    _end_with(EXIT_BAD_INPUT, f"--grpc: the endpoint of a group speaks HTTP only; {_GROUP_ADVICE}")


@contextmanager
def _failures_reach_peers(place: RankPlace) -> Iterator[None]:
    """A rank that fails says so in one line, and tells peers that wait for it while they set up."""
    try:
        yield
    except Exception as error:
        from dwdp.group import fail_before_joining
        from dwdp.launch import discover_launch
        from dwdp.rendezvous import PeerFailure

        traceback.print_exc()
        causes = list(_causes(error))
        message = f"{type(causes[-1]).__name__}: {causes[-1]}"
        if any(isinstance(cause, PeerFailure) for cause in causes):
            _end_with(EXIT_PEER_FAILED, str(causes[-1]))
        is_bad_input = isinstance(causes[-1], ValueError)
        launch = discover_launch(place.variables())
        assert launch is not None
        with suppress(RuntimeError):
            fail_before_joining(launch, message, bad_input=is_bad_input)
        _end_with(EXIT_BAD_INPUT if is_bad_input else EXIT_FAILED, message)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from: the worker's own error comes last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _end_with(exit_code: int, message: str) -> NoReturn:
    """Last words in the form that dwdp's supervisor, and a person, looks for."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def _log(message: str) -> None:
    from tensorrt_llm.logger import logger

    logger.info(message)
