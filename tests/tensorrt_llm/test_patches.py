"""Patches on TensorRT-LLM's own modules, in this process, in MPI's children, and where one symbol moved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dwdp.engines.tensorrt_llm.patches import PATCHES

pytestmark = pytest.mark.trtllm


def test_every_patch_applies() -> None:
    import tensorrt_llm  # noqa: F401

    from dwdp.engines.tensorrt_llm import patches

    for name in PATCHES:
        import_module(name)
    assert patches.obstacle() is None


def test_what_derives_from_the_arguments_is_initialised_as_before() -> None:
    """AutoDeploy's arguments are settings besides, which read files and the environment."""
    import tensorrt_llm  # noqa: F401
    from pydantic import BaseModel
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

    class Settings(BaseModel):
        def __init__(self, **data: Any) -> None:
            super().__init__(**{"max_seq_len": 77, **data})

    class Arguments(TorchLlmArgs, Settings):  # type: ignore[misc, valid-type]
        pass

    made = Arguments(model="/nowhere", skip_tokenizer_init=True, gpus_per_node=1)
    assert (made.max_seq_len, made.parallel) == (77, None)


IN_CHILDREN = """
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

def fields():
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
    return sorted({"parallel", "dwdp_config"} & set(TorchLlmArgs.model_fields))

if __name__ == "__main__":
    import tensorrt_llm
    from mpi4py.futures import MPIPoolExecutor
    with MPIPoolExecutor(max_workers=1, path=sys.path) as pool:
        print("fields", pool.submit(fields).result())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        print("fields", pool.submit(fields).result())
"""


def run_script(folder: Path, text: str, **variables: str) -> list[str]:
    script = folder / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_children_of_mpi_and_spawned_processes_are_patched(tmp_path: Path) -> None:
    lines = run_script(tmp_path, IN_CHILDREN, OMPI_MCA_rmaps_base_oversubscribe="1")
    assert [line for line in lines if line.startswith("fields")] == [
        "fields ['dwdp_config', 'parallel']"
    ] * 2


WITH_ONE_SYMBOL_MOVED = """
import json
from click.testing import CliRunner
import tensorrt_llm
import tensorrt_llm._torch.modules.fused_moe.fused_moe_cutlass as cutlass
from tensorrt_llm.commands import serve
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

def answer(*arguments):
    result = CliRunner().invoke(serve.main, arguments)
    return [result.exit_code, result.output]

def refusal():
    try:
        tensorrt_llm.LLM("no-such-model", parallel="dwdp")
    except RuntimeError as error:
        return str(error)

print("RESULT" + json.dumps({
    "fields": sorted(TorchLlmArgs.model_fields),
    "backend": cutlass.CutlassFusedMoE.create_weights.__module__,
    "wrapped": hasattr(cutlass.CutlassFusedMoE.create_weights, "__wrapped__"),
    "help": answer("serve", "--help"),
    "asked": answer("no-such-model", "--parallel", "dwdp"),
    "llm": refusal(),
}))
"""


@pytest.mark.slow
def test_nothing_is_patched_where_a_symbol_moved(tmp_path: Path) -> None:
    if "TRTLLM_SOURCE" not in os.environ:
        pytest.skip("needs a checkout to change: TRTLLM_SOURCE is not set")
    checkout = changed_checkout(
        tmp_path / "checkout",
        "_torch/pyexecutor/model_loader.py",
        "def reload(",
        "def reload_weights(",
    )
    lines = run_script(tmp_path, WITH_ONE_SYMBOL_MOVED, TRTLLM_SOURCE=str(checkout))
    [result] = [json.loads(line[6:]) for line in lines if line.startswith("RESULT")]
    assert not {"parallel", "dwdp_config"} & set(result["fields"])
    assert result["wrapped"] is False
    assert result["help"][0] == 0 and "--dwdp_size" not in result["help"][1]
    moved = "tensorrt_llm._torch.pyexecutor.model_loader.ModelLoader.reload is missing"
    assert result["asked"][0] != 0 and moved in result["asked"][1]
    assert moved in result["llm"]


def changed_checkout(folder: Path, name: str, old: str, new: str) -> Path:
    """The checkout as links, but for one file in which ``old`` is replaced."""
    spec = find_spec("tensorrt_llm")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent
    (folder / "triton_kernels").mkdir(parents=True)
    (folder / "triton_kernels" / "__init__.py").write_text("")
    part, own = Path(), folder / "tensorrt_llm"
    for inner in (*Path(name).parts[:-1], Path(name).name):
        own.joinpath(part).mkdir()
        for path in (source / part).iterdir():
            if path.name not in (inner, "__pycache__"):
                own.joinpath(part, path.name).symlink_to(path)
        part = part / inner
    text = (source / name).read_text(encoding="utf-8")
    assert old in text
    (own / name).write_text(text.replace(old, new), encoding="utf-8")
    return folder
