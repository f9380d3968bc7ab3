"""Whole models on rank processes that share a GPU: the same bits as the unsharded model, in every mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from gpu_support import MODES, needs_gpu
from rank_jobs import compare_models, replay_model, replay_runtime
from rank_pool import RankPool

pytestmark = needs_gpu
NUM_EXPERTS = 22


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Experts of half a MiB that end in the midst of pages, so that ranks share pages."""
    path: Path = tmp_path_factory.mktemp("gpu") / "model"
    make_checkpoint(
        "qwen3_moe",
        path,
        dtype=torch.bfloat16,
        hidden_size=512,
        moe_intermediate_size=264,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=4,
        num_hidden_layers=5,
    )
    return str(path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("num_ranks", "share"), [(2, None), (3, None), (3, 10)])
def test_logits_and_tokens_equal_the_unsharded_models(
    ranks: RankPool, checkpoint: str, mode: str, num_ranks: int, share: int | None
) -> None:
    for stats in ranks.run(compare_models, checkpoint, mode, share, size=num_ranks):
        assert stats["fetch_mode"] == mode
        assert (stats["num_fetches"] > 0) == (mode in ("staged", "auto"))
        assert (stats["num_demands"] > 0) == (mode in ("demand", "auto"))
        assert (stats["fetched_bytes"] > 0) == (mode != "direct")


@pytest.mark.parametrize("mode", MODES)
def test_a_captured_forward_replays_with_other_inputs(
    ranks: RankPool, checkpoint: str, mode: str
) -> None:
    reasons = ranks.run(replay_model, checkpoint, mode, size=2)
    if reasons[0] is not None:
        pytest.skip(f"Transformers' own model cannot be captured: {reasons[0]}")


@pytest.mark.parametrize("mode", MODES)
def test_captured_reads_follow_the_routers_choice(ranks: RankPool, mode: str) -> None:
    ranks.run(replay_runtime, mode)
