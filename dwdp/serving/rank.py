"""One rank: it is set up with its group, then answers requests one at a time until there are no more.

``main`` runs in a process that :class:`dwdp.serving.processes.RankProcesses` started; under another
launcher the command itself calls :func:`serve_requests`.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dwdp.config import DwdpConfig
from dwdp.group import Group
from dwdp.launch import discover_launch
from dwdp.observability.spans import Span
from dwdp.rendezvous import PeerFailure
from dwdp.serving.channel import RankChannel
from dwdp.serving.generation import Generator, quiet_transformers
from dwdp.serving.messages import (
    Completion,
    Counters,
    Failed,
    Finish,
    Hello,
    PromptFailed,
    Ready,
    Request,
)
from dwdp.serving.rank_exit import EXIT_DONE, EXIT_FAILED, EXIT_PEER_FAILED, EXPECTED_ERRORS
from dwdp.serving.recorder import recording
from dwdp.system_memory import peak_rss_bytes

if TYPE_CHECKING:
    from dwdp.engines.transformers import Attachment


@dataclass(frozen=True)
class RankJob:
    """What a rank's process is told, as one line of JSON on its standard input.

    Attributes:
        dispatcher, token: whom to connect to, and what to prove it with.
    """

    dispatcher: str
    token: str
    model_dir: str
    dtype: str
    device: str
    num_threads: int
    config: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankJob:
        return cls(**json.loads(text))


def main() -> int:
    """Run the rank that the environment and standard input describe; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    line = sys.stdin.readline()
    if not line:
        return EXIT_FAILED
    job = RankJob.from_json(line)
    try:
        return _run(job)
    except OSError:  # the dispatcher is gone, and nobody is left to tell
        return EXIT_FAILED


def _run(job: RankJob) -> int:
    launch = discover_launch()
    assert launch is not None
    channel = RankChannel.connect(job.dispatcher)
    channel.send(Hello(launch.rank, job.token))
    config = DwdpConfig(**job.config)
    try:
        with _complaints_to(channel):
            group = Group.join(launch, timeout_s=config.setup_timeout_s)
        # The dispatcher hears of an error before the group does: it believes the first complaint.
        with group.setting_up(), _complaints_to(channel):
            attachment = load_rank(
                job.model_dir,
                group,
                config,
                dtype=job.dtype,
                device=job.device,
                num_threads=job.num_threads,
            )
    except PeerFailure:
        return EXIT_PEER_FAILED
    except Exception:
        return EXIT_FAILED
    with attachment:
        try:
            with _complaints_to(channel):
                is_finished = serve_requests(channel, attachment)
        except ValueError:
            return EXIT_FAILED
        return EXIT_DONE if is_finished else EXIT_FAILED


def load_rank(
    model_dir: str,
    group: Group,
    config: DwdpConfig,
    *,
    dtype: str,
    device: str,
    num_threads: int,
) -> Attachment:
    """This rank's share of the model, on ``num_threads`` compute threads. Every rank calls it.

    Raises:
        ValueError: the checkpoint, the dtype or the placement is no good.
        GroupError, FabricError: the group cannot be set up.
    """
    import torch

    from dwdp.engines.transformers import load

    torch.set_num_threads(num_threads)
    quiet_transformers()
    return load(model_dir, group, config, dtype=dtype, device=device)


def serve_requests(channel: RankChannel, attachment: Attachment) -> bool:
    """Answer the dispatcher's requests, in order. Waits for nobody but the dispatcher.

    Returns:
        Whether the dispatcher said that it is finished; otherwise it died.

    Raises:
        ValueError: the checkpoint's generation config cannot be used.
    """
    generator = Generator(attachment.model)
    channel.send(_ready(attachment))
    num_prompts = prompt_tokens = generated_tokens = 0
    first_request_s: float | None = None
    for message in channel:
        if isinstance(message, Finish):
            return True
        if not isinstance(message, Request):
            continue
        if first_request_s is None:
            first_request_s = time.monotonic()
        recorder: AbstractContextManager[list[Span]] = (
            recording(attachment.model, attachment.runtime) if message.trace else nullcontext([])
        )
        try:
            with recorder as spans:
                token_ids, finish_reason = generator.generate(message)
        except Exception as error:
            traceback.print_exc()
            channel.send(PromptFailed(message.index, _describe(error)))
            continue
        num_prompts += 1
        prompt_tokens += len(message.token_ids)
        generated_tokens += len(token_ids)
        stats = attachment.runtime.stats()
        counters = Counters(
            num_prompts=num_prompts,
            prompt_tokens=prompt_tokens,
            generated_tokens=generated_tokens,
            wall_s=time.monotonic() - first_request_s,
            num_fetches=stats.num_fetches,
            num_demands=stats.num_demands,
            fetched_bytes=stats.fetched_bytes,
            num_waits=stats.num_waits,
            exposed_wait_s=stats.exposed_wait_s,
            peak_rss_bytes=peak_rss_bytes(),
        )
        channel.send(Completion(message.index, token_ids, finish_reason, counters, tuple(spans)))
    return False


def _ready(attachment: Attachment) -> Ready:
    stats = attachment.runtime.stats()
    report = attachment.load_report
    assert report is not None
    return Ready(
        fetch_mode=stats.fetch_mode,
        num_slots=stats.num_slots,
        dense_bytes=report.dense_bytes,
        resident_expert_bytes=stats.resident_expert_bytes,
        staging_bytes=stats.staging_bytes,
        load_s=report.seconds,
        peak_rss_bytes=peak_rss_bytes(),
    )


@contextmanager
def _complaints_to(channel: RankChannel) -> Iterator[None]:
    """Tell the dispatcher what goes wrong inside, unless it went wrong elsewhere."""
    try:
        yield
    except PeerFailure:
        raise
    except Exception as error:
        if not isinstance(error, EXPECTED_ERRORS):
            traceback.print_exc()
        channel.send(Failed(_describe(error), isinstance(error, ValueError)))
        raise


def _describe(error: Exception) -> str:
    text = str(error)
    return (
        text if isinstance(error, EXPECTED_ERRORS) and text else f"{type(error).__name__}: {text}"
    )
