"""``dwdp doctor``: what it says and how it exits."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from dwdp._version import __version__
from dwdp.cli.main import run
from dwdp.engines.tensorrt_llm.contract import SYMBOLS, TESTED_VERSION
from dwdp.engines.tensorrt_llm.contract_readings import ERAS


@pytest.fixture
def other_source(tmp_path: Path) -> Path:
    """A TensorRT-LLM of another version, in which next to everything has moved."""
    package = tmp_path / "checkout" / "tensorrt_llm"
    (package / "llmapi").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "version.py").write_text('__version__ = "9.9.9"')
    (package / "llmapi" / "llm_args.py").write_text(
        "class TorchLlmArgs:\n    dwdp_config = None\n    load_format: str\n    parallel: str\n"
    )
    return package.parent


def test_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"dwdp {__version__} (native: host")
    assert "host fabric: ready" in lines
    for start in ("Python 3.", "CUDA fabric: ", "GPU", "IMEX: ", "memory: "):
        assert any(line.startswith(start) for line in lines)


def test_a_tensorrt_llm_that_does_not_fit(
    other_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    code = run(["doctor", "--trtllm", "--source", str(other_source), "--record", str(record)])
    out = capsys.readouterr().out
    assert code == 1
    assert f"TensorRT-LLM 9.9.9 in {other_source}/tensorrt_llm" in out
    assert "  moved  commands.serve: there is no such module" in out
    assert "tensorrt_llm.llmapi.llm_args.Field is missing" in out
    assert "tensorrt_llm.llmapi.llm_args.TorchLlmArgs.parallel is there already" in out
    assert "TorchLlmArgs.load_format is missing" not in out
    assert "It has a DWDP of its own" in out
    assert f"dwdp does not fit: {len(SYMBOLS) - 2} symbols moved" in out
    for start, era in zip(
        (f"Before {TESTED_VERSION}", f"After {TESTED_VERSION}"), ERAS, strict=True
    ):
        assert era.summary() in out.splitlines()
        assert era.summary().startswith(start)
    assert json.loads(record.read_text())["modules"]["llmapi.llm_args"] == {
        "TorchLlmArgs": "class",
        "TorchLlmArgs.dwdp_config": "member",
        "TorchLlmArgs.load_format": "member",
        "TorchLlmArgs.parallel": "member",
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--source", "."], "--source and --record need --trtllm"),
        (["--trtllm", "--source", "no-such-folder"], "does not exist"),
        (["--trtllm", "--source", "docs"], "name a checkout of TensorRT-LLM"),
    ],
)
def test_bad_input(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_no_tensorrt_llm(capsys: pytest.CaptureFixture[str]) -> None:
    spec = find_spec("tensorrt_llm")
    if spec is not None and spec.origin is not None:
        pytest.skip("there is a TensorRT-LLM")
    assert run(["doctor", "--trtllm"]) == 2
    assert "TensorRT-LLM is not installed" in capsys.readouterr().err


@pytest.mark.trtllm
def test_the_tensorrt_llm_of_these_tests_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--trtllm"]) == 0
    out = capsys.readouterr().out
    assert "moved" not in out
    assert f"Before {TESTED_VERSION}" not in out
    assert "dwdp fits" in out.splitlines()[-1]
