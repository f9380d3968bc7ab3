"""What is left of the plugin where a patch failed: a request for DWDP is refused, everything else works."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dwdp.engines.tensorrt_llm import patches, refusal

SERVE = "tensorrt_llm.commands.serve"
LLM = "tensorrt_llm.llmapi.llm"
LOADER = "tensorrt_llm._torch.pyexecutor.model_loader"


class Arguments:
    def __init__(self, parallel: str | None) -> None:
        self.parallel = parallel


class ModelLoader:
    def __init__(self, parallel: str | None) -> None:
        self.llm_args = Arguments(parallel)

    def load(self, checkpoint: str) -> str:
        return f"loaded {checkpoint}"


def module(name: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(names)
    return made


def serve_command() -> click.Command:
    @click.command()
    @click.argument("model")
    def serve(model: str) -> None:
        click.echo(f"serves {model}")

    return serve


@pytest.mark.parametrize(
    "options",
    [
        ["--parallel", "dwdp"],
        ["--parallel=dwdp"],
        ["--parallel", "dwdp", "--dwdp_size", "4"],
        ["--dwdp_size=4", "--parallel", "dwdp"],
        ["--no_dwdp_contention_opt"],
    ],
)
def test_the_options_are_refused(options: list[str]) -> None:
    """With the reason, and not because some of them are unknown."""
    serve = serve_command()
    refusal.refuse(module(SERVE, serve=serve), "the reason")
    asked = CliRunner().invoke(serve, ["m", *options])
    assert (asked.exit_code, asked.output) == (1, "Error: the reason\n")


def test_other_options_work_where_dwdp_is_refused() -> None:
    serve = serve_command()
    refusal.refuse(module(SERVE, serve=serve), "the reason")
    other = CliRunner().invoke(serve, ["m", "--parallel", "tp"])
    assert other.exit_code == 2 and "'tp' is not 'dwdp'" in other.output
    assert CliRunner().invoke(serve, ["m"]).output == "serves m\n"


def test_the_llm_is_refused() -> None:
    class Llm:
        def __init__(self, model: str, **kwargs: Any) -> None:
            self.kwargs = kwargs

    refusal.refuse(module(LLM, LLM=Llm), "the reason")
    with pytest.raises(RuntimeError, match="the reason"):
        Llm("m", parallel="dwdp")
    assert Llm("m", parallel=None, dtype="auto").kwargs == {"parallel": None, "dtype": "auto"}


def test_a_worker_does_not_load_the_whole_model() -> None:
    class Loader(ModelLoader):
        load = ModelLoader.load

    refusal.refuse(module(LOADER, ModelLoader=Loader), "the reason")
    with pytest.raises(RuntimeError, match="the reason"):
        Loader("dwdp").load("m")
    assert Loader(None).load("m") == "loaded m"


@pytest.mark.parametrize("name", sorted(refusal.REFUSALS))
def test_modules_that_have_none_of_the_names_are_left_alone(name: str) -> None:
    refusal.refuse(module(name), "the reason")
    refusal.refuse(module("tensorrt_llm.other"), "the reason")


def test_one_patch_that_fails_refuses_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the modules that were patched before as in those that come after."""

    class Llm:
        def __init__(self, model: str, **kwargs: Any) -> None:
            pass

    class Loader(ModelLoader):
        load = ModelLoader.load

    monkeypatch.setattr(patches, "_failures", [])
    monkeypatch.setattr(patches, "_contract_obstacle", lambda: None)
    monkeypatch.setattr(
        patches, "PATCHES", {"tensorrt_llm.mapping": (f"{__name__}:no_such_patch",)}
    )
    # Not TensorRT-LLM's own, which the other tests of this process need.
    for name in refusal.REFUSALS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    earlier = module(LLM, LLM=Llm)
    monkeypatch.setitem(sys.modules, LLM, earlier)
    patches.apply(earlier)
    Llm("m", parallel="dwdp")

    patches.apply(module("tensorrt_llm.mapping"))
    obstacle = patches.obstacle()
    assert obstacle is not None
    assert obstacle.startswith("dwdp could not patch tensorrt_llm.mapping: AttributeError")
    with pytest.raises(RuntimeError, match="could not patch"):
        Llm("m", parallel="dwdp")
    patches.apply(module(LOADER, ModelLoader=Loader))
    with pytest.raises(RuntimeError, match="could not patch"):
        Loader("dwdp").load("m")
