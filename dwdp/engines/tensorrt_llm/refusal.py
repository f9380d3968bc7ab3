"""What is left of the plugin where it cannot patch TensorRT-LLM: asking for DWDP fails, and says why.

Everything here works on classes and commands that any version has, and skips what is not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def refuse(module: ModuleType, reason: str) -> None:
    """Make what ``module`` offers fail with ``reason`` when it is asked for ``parallel="dwdp"``."""
    if module.__name__ in REFUSALS:
        REFUSALS[module.__name__](module, reason)


def _refuse_option(module: ModuleType, reason: str) -> None:
    """``trtllm-serve --parallel dwdp``, and the options that belong to it."""
    import click

    command = getattr(module, "serve", None)
    if not isinstance(command, click.Command):
        return
    parse_args = command.parse_args

    # Before anything is parsed: the options besides --parallel are not there, and would be called unknown.
    def parse_or_fail(ctx: click.Context, args: list[str]) -> list[str]:
        if _asks_for_dwdp(args):
            raise click.ClickException(reason)
        return parse_args(ctx, args)

    command.parse_args = parse_or_fail  # type: ignore[method-assign]
    if any("--parallel" in parameter.opts for parameter in command.params):
        return
    option = click.Option(
        ["--parallel"],
        type=click.Choice(["dwdp"]),
        expose_value=False,
        help="dwdp: not available with this TensorRT-LLM; asking for it says why.",
    )
    command.params.append(option)


def _asks_for_dwdp(args: Sequence[str]) -> bool:
    """Whether a command line has ``--parallel dwdp`` or one of the options that belong to it."""
    return any(
        arg.startswith(("--dwdp_", "--no_dwdp_"))
        or arg == "--parallel=dwdp"
        or (arg == "dwdp" and before == "--parallel")
        for before, arg in zip(("", *args), args, strict=False)
    )


def _refuse_llm(module: ModuleType, reason: str) -> None:
    """``LLM(..., parallel="dwdp")``, which is also where a YAML file's keys arrive."""

    def is_asked(_llm: object, kwargs: dict[str, Any]) -> bool:
        return kwargs.get("parallel") == "dwdp"

    _check_before(getattr(module, "LLM", None), "__init__", is_asked, reason)


def _refuse_model(module: ModuleType, reason: str) -> None:
    """A worker that cannot be patched, of a process that could: it would load the whole model."""

    def is_asked(loader: object, _kwargs: dict[str, Any]) -> bool:
        return getattr(getattr(loader, "llm_args", None), "parallel", None) == "dwdp"

    _check_before(getattr(module, "ModelLoader", None), "load", is_asked, reason)


def _check_before(
    owner: Any, method: str, is_asked: Callable[[object, dict[str, Any]], bool], reason: str
) -> None:
    if not isinstance(owner, type) or not hasattr(owner, method):
        return
    original = getattr(owner, method)

    @functools.wraps(original)
    def checked(self: object, *args: Any, **kwargs: Any) -> Any:
        if is_asked(self, kwargs):
            raise RuntimeError(reason)
        return original(self, *args, **kwargs)

    setattr(owner, method, checked)


REFUSALS: dict[str, Callable[[ModuleType, str], None]] = {
    "tensorrt_llm._torch.pyexecutor.model_loader": _refuse_model,
    "tensorrt_llm.commands.serve": _refuse_option,
    "tensorrt_llm.llmapi.llm": _refuse_llm,
}
"""What refuses, by module. A module that is not there, or has other names, refuses nothing."""
