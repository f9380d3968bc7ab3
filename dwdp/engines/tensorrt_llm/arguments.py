"""``parallel`` and ``dwdp_config`` among the arguments of ``LLM``: fields, validation, what they change.

The fields are added to TensorRT-LLM's class in place, because a dozen of its modules hold it by name. The
configuration is kept as a plain dict, so that the arguments unpickle in a worker that has no plugin.

A version with a ``dwdp_config`` of its own keeps it: only with ``parallel="dwdp"`` the value is ours. It
then travels to the worker as JSON in ``env_overrides``, and the version's own field stays empty.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dwdp.config import DwdpConfig
from dwdp.engines.tensorrt_llm import log
from dwdp.engines.tensorrt_llm.conflicts import refuse_conflicts
from dwdp.engines.tensorrt_llm.launch import (
    DWDP_SERVER_PID,
    INSTANCE_INDEX,
    num_launched_ranks,
    rank_of_process,
)

DWDP_CONFIG = "DWDP_CONFIG"
"""Environment variable with the configuration as JSON, for workers of versions with a field of their own."""

_AUTOTUNER_CACHE = "TLLM_AUTOTUNER_CACHE_PATH"
_PLACE_KEYS = ("rank", "rendezvous")


@dataclass(frozen=True)
class Request:
    """What the user asked for with ``parallel="dwdp"``.

    Attributes:
        config: options of the group.
        rank: this process's number among all ranks; None: as the launcher says.
        rendezvous: host:port where the ranks meet; None: as the launcher says.
    """

    config: DwdpConfig
    rank: int | None = None
    rendezvous: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same in the form that it was given in."""
        place = {"rank": self.rank, "rendezvous": self.rendezvous}
        return self.config.model_dump(exclude_unset=True) | {
            key: value for key, value in place.items() if value is not None
        }


def read_request(settings: Mapping[str, Any]) -> Request | None:
    """What ``settings``, arguments of ``LLM``, ask for; None if it is not ``parallel="dwdp"``.

    ``dwdp_config`` may be a dict, a :class:`DwdpConfig`, or TensorRT-LLM's own class of that name. Besides
    the keys of :class:`DwdpConfig` it takes ``rank`` and ``rendezvous``. ``dwdp_size`` may be left out
    where a launcher started the ranks.

    Raises:
        ValueError: a key or value is refused; the text names it.
    """
    if settings.get("parallel") is None:
        return None
    if settings["parallel"] != "dwdp":
        raise ValueError(f"parallel is {settings['parallel']!r}; it can be 'dwdp', or left out")
    given = settings.get("dwdp_config")
    if isinstance(given, BaseModel):
        given = given.model_dump(exclude_unset=True)
    if not isinstance(given, Mapping | None):
        raise ValueError(f"dwdp_config is {given!r}; it has to be a mapping or a DwdpConfig")
    options = dict(given or {})
    rank, rendezvous = (options.pop(key, None) for key in _PLACE_KEYS)
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
        raise ValueError(f"dwdp_config.rank is {rank!r}; it has to be a number from 0")
    if rendezvous is not None and not isinstance(rendezvous, str):
        raise ValueError(f"dwdp_config.rendezvous is {rendezvous!r}; it has to be host:port")
    _refuse_booleans(options)
    if "dwdp_size" not in options:
        options["dwdp_size"] = _launched_group_size(options.get("num_groups", 1))
    try:
        return Request(DwdpConfig(**options), rank, rendezvous)
    except ValidationError as error:
        raise ValueError(_in_one_line(error)) from error


def _refuse_booleans(options: Mapping[str, Any]) -> None:
    """Pydantic would take ``true`` in a YAML file for 1."""
    for name, value in options.items():
        field = DwdpConfig.model_fields.get(name)
        if isinstance(value, bool) and field is not None and field.annotation is not bool:
            raise ValueError(f"dwdp_config.{name} is {value!r}; it cannot be true or false")


def _launched_group_size(num_groups: object) -> int:
    launched = num_launched_ranks()
    if launched is None:
        # What took the launcher away is the better reason.
        refuse_conflicts({})
        raise ValueError(
            "dwdp_config has no dwdp_size, and no launcher says how many ranks there are"
        )
    if not isinstance(num_groups, int) or num_groups < 1 or launched % num_groups:
        raise ValueError(
            f"dwdp_config.num_groups is {num_groups!r}, and {launched} ranks were started: they cannot be "
            "shared out evenly"
        )
    return launched // num_groups


def _in_one_line(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    reason = str(problem.get("ctx", {}).get("error", problem["msg"]))
    if not problem["loc"]:
        return f"dwdp_config: {reason}"
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        known = ", ".join((*DwdpConfig.model_fields, *_PLACE_KEYS))
        return f"dwdp_config has no key {name!r}; it has {known}"
    return f"dwdp_config.{name} is {problem['input']!r}: {reason}"


def config_of(llm_args: Any) -> DwdpConfig | None:
    """The configuration that validated arguments carry; None if they do not ask for ``parallel="dwdp"``."""
    if getattr(llm_args, "parallel", None) != "dwdp":
        return None
    carried = (llm_args.env_overrides or {}).get(DWDP_CONFIG)
    return DwdpConfig(**(json.loads(carried) if carried else llm_args.dwdp_config))


def patch(module: Any) -> None:
    """Add the fields to ``TorchLlmArgs`` of ``tensorrt_llm.llmapi.llm_args``."""
    arguments = module.TorchLlmArgs
    has_own_config = "dwdp_config" in arguments.model_fields
    fields: dict[str, tuple[Any, str]] = {
        "parallel": (
            Literal["dwdp"] | None,
            "dwdp: this model is one rank, or all ranks, of a group that shares its experts out.",
        )
    }
    if not has_own_config:
        fields["dwdp_config"] = (
            dict[str, Any] | None,
            "Options of the group, with parallel='dwdp': the keys of dwdp.DwdpConfig, rank and rendezvous.",
        )
    declared = getattr(arguments, "__pydantic_fields__", None) or arguments.model_fields
    for name, (annotation, description) in fields.items():
        declared[name] = FieldInfo.from_annotated_attribute(
            annotation, module.Field(default=None, description=description, status="prototype")
        )
        arguments.__annotations__[name] = annotation
    arguments.__init__ = _asking_first(_initialiser(arguments), has_own_config)
    # Validation of a mapping goes through __init__ as well, and so through the function above.
    arguments.__pydantic_custom_init__ = True
    arguments.model_rebuild(force=True)


def _initialiser(arguments: Any) -> Callable[..., None]:
    """What ``arguments(...)`` calls; where it is inherited, what comes next for the class that is made.

    AutoDeploy's arguments derive from these and from ``BaseSettings``, whose own ``__init__`` has its turn.
    """
    own: Callable[..., None] | None = vars(arguments).get("__init__")
    if own is not None:
        return own

    def initialise(self: Any, **data: Any) -> None:
        super(arguments, self).__init__(**data)

    return initialise


def _asking_first(original: Callable[..., None], has_own_config: bool) -> Callable[..., None]:
    def __init__(self: Any, **data: Any) -> None:
        request = read_request(data)
        if request is None:
            if data.get("dwdp_config") is not None and not has_own_config:
                raise ValueError('dwdp_config is given; it needs parallel="dwdp" besides')
            original(self, **data)
            return
        refuse_conflicts(data)
        data["dwdp_config"] = None if has_own_config else request.as_dict()
        original(self, **data)
        refuse_conflicts(self)
        _settle(self, request, in_environment=has_own_config)

    return __init__


def _settle(arguments: Any, request: Request, *, in_environment: bool) -> None:
    """Change what has to be different in a rank, and say so in one line."""
    config = request.config
    changes = []
    place = rank_of_process(config, rank=request.rank, rendezvous=request.rendezvous)
    variables = {DWDP_CONFIG: json.dumps(config.model_dump())} if in_environment else {}
    if place is not None:
        variables |= place.variables()
        if INSTANCE_INDEX not in os.environ:
            # Otherwise the worker is the process that started this one, and sees to its end itself.
            variables[DWDP_SERVER_PID] = str(os.getpid())
        number = place.group * place.size + place.rank
        if cache := os.environ.get(_AUTOTUNER_CACHE):
            variables[_AUTOTUNER_CACHE] = f"{cache}.rank{number}"
            changes.append(f"{_AUTOTUNER_CACHE}={variables[_AUTOTUNER_CACHE]} (one file per rank)")
    if variables:
        arguments.env_overrides = {**(arguments.env_overrides or {}), **variables}
    whole = f"owns a group of {config.dwdp_size}" if place is None else f"is {place}"
    log.info(f"this model {whole}; changed: {', '.join(changes) or 'nothing'}")
