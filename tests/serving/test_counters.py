"""What a run counts where experts are fetched on demand. The ranks are threads of this process."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from ranks import run_ranks

from dwdp.config import DwdpConfig
from dwdp.engines.transformers import load
from dwdp.group import Group
from dwdp.observability.report import GenerateReport, ModelReport, SamplingReport
from dwdp.observability.spans import COMPUTE, DEMAND_LANE, EXPOSED_WAIT
from dwdp.serving.channel import RankChannel
from dwdp.serving.dispatcher import Dispatcher, Outcome
from dwdp.serving.messages import Hello, Request
from dwdp.serving.plan import RunPlan
from dwdp.serving.rank import serve_requests
from dwdp.serving.results import make_report

NUM_RANKS = 2
NUM_LAYERS = 3
CONFIG = DwdpConfig(dwdp_size=NUM_RANKS, fetch_mode="demand")
REQUESTS = tuple(
    Request(index, (5, 9, 40 + index), max_new_tokens=3, temperature=0.0, seed=0, trace=True)
    for index in range(6)
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, GenerateReport]:
    path = tmp_path_factory.mktemp("model")
    checkpoint = make_checkpoint("qwen3_moe", path, num_hidden_layers=NUM_LAYERS)
    with Dispatcher(NUM_RANKS) as dispatcher:

        def serve(group: Group) -> None:
            channel = RankChannel.connect(dispatcher.name)
            channel.send(Hello(group.rank, dispatcher.token))
            with load(checkpoint, group, CONFIG) as attachment:
                assert serve_requests(channel, attachment)
            channel.close()

        ranks = threading.Thread(target=run_ranks, args=(NUM_RANKS, serve), daemon=True)
        ranks.start()
        dispatcher.wait_until_ready()
        outcome = dispatcher.run(REQUESTS)
        dispatcher.finish()
        ranks.join()
        return outcome, report_of(checkpoint, dispatcher, outcome)


def report_of(checkpoint: Path, dispatcher: Dispatcher, outcome: Outcome) -> GenerateReport:
    model = ModelReport(
        path=str(checkpoint),
        model_type="qwen3_moe",
        num_layers=NUM_LAYERS,
        num_moe_layers=NUM_LAYERS,
        num_experts=4,
        dtype="float32",
    )
    return make_report(
        RunPlan(model, tuple(range(len(REQUESTS))), REQUESTS, None),
        outcome,
        dispatcher.ready,
        config=CONFIG,
        sampling=SamplingReport(max_new_tokens=3, temperature=0.0, seed=0),
        launcher="dwdp",
        device="cpu",
        threads_per_rank=1,
    )


def test_fetches_on_demand_are_in_the_report(run: tuple[Outcome, GenerateReport]) -> None:
    _, report = run
    assert report.fetch_mode == "demand"
    for rank in report.ranks:
        assert rank.num_prompts > 0
        # Each forward makes one token, and fetches the activated experts of every layer.
        assert rank.num_demands == NUM_LAYERS * rank.generated_tokens
        assert (rank.num_fetches, rank.num_waits, rank.num_slots) == (0, 0, 1)
        assert rank.fetched_bytes > 0
        assert rank.exposed_wait_s > 0
    assert report.totals.num_demands == sum(rank.num_demands for rank in report.ranks)


def test_the_trace_has_every_fetch_on_demand(run: tuple[Outcome, GenerateReport]) -> None:
    outcome, report = run
    for rank in report.ranks:
        completions = [done for number, done in outcome.completions if number == rank.rank]
        spans = [span for completion in completions for span in completion.spans]
        fetched = [span for span in spans if span.lane == DEMAND_LANE]
        assert sum(span.num_bytes for span in fetched) == rank.fetched_bytes
        assert {span.lane for span in spans} == {COMPUTE, DEMAND_LANE, EXPOSED_WAIT}
