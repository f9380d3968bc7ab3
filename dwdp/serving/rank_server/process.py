"""The process of one rank: joins its group, loads its share of the model, serves, and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dwdp.group import Group
from dwdp.launch import discover_launch
from dwdp.rendezvous import PeerFailure
from dwdp.serving.lifetime import end_with_parent
from dwdp.serving.rank_exit import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PEER_FAILED,
    EXPECTED_ERRORS,
)
from dwdp.serving.rank_server.job import RankServerJob

if TYPE_CHECKING:
    from dwdp.engines.transformers import Attachment


def main() -> int:
    """Run the rank that the environment and standard input describe; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format=f"rank {os.environ.get('DWDP_RANK', '?')}: %(message)s",
    )
    try:
        job = RankServerJob.model_validate_json(sys.stdin.readline())
    except ValidationError as error:
        return _fail(f"the job on standard input is no good: {error}", EXIT_BAD_INPUT)
    try:
        if job.parent_pid is not None:
            end_with_parent(job.parent_pid)
        failure = _run(job)
    except PeerFailure as error:
        return _fail(str(error), EXIT_PEER_FAILED)
    except ValueError as error:
        return _fail(str(error), EXIT_BAD_INPUT)
    except Exception as error:
        if not isinstance(error, EXPECTED_ERRORS):
            traceback.print_exc()
        return _fail(str(error) or type(error).__name__, EXIT_FAILED)
    return EXIT_DONE if failure is None else _fail(failure, EXIT_FAILED)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _run(job: RankServerJob) -> str | None:
    """Serve until the end; returns why it was too early, or None."""
    import torch

    from dwdp.engines.transformers import load
    from dwdp.serving.generation import quiet_transformers

    launch = discover_launch()
    if launch is None:
        group = Group.single()
    else:
        group = Group.join(launch, timeout_s=job.config.setup_timeout_s)
    torch.set_num_threads(job.num_threads)
    quiet_transformers()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    # What else can go wrong before the first request belongs to set-up: it ends the group, not one rank.
    with group.setting_up():
        attachment = load(job.model_dir, group, job.config, dtype=job.dtype, device=job.device)
        try:
            service = _Service(job, attachment, group)
        except BaseException:
            attachment.detach()
            raise
    with attachment:
        return service.run()


class _Service:
    """Everything between a loaded model and the socket."""

    def __init__(self, job: RankServerJob, attachment: Attachment, group: Group) -> None:
        from dwdp.serving.plan import load_tokenizer
        from dwdp.serving.rank_server.app import RankApplication
        from dwdp.serving.rank_server.batching import create_backend
        from dwdp.serving.rank_server.detokenizer import TokenTexts
        from dwdp.serving.rank_server.engine import Engine
        from dwdp.serving.rank_server.preparation import GenerationDefaults, Preparer
        from dwdp.serving.rank_server.server import RankServer
        from dwdp.serving.rank_server.stats import RankFacts, Statistics
        from dwdp.serving.rank_server.timeline import Timeline
        from dwdp.serving.rank_server.tokenizing import PromptTokenizer, read_chat_template

        model: Any = attachment.model
        options = job.options
        template = read_chat_template(options.chat_template) if options.chat_template else None
        tokenizer = load_tokenizer(Path(job.model_dir))
        if tokenizer is None:
            raise ValueError(f"{job.model_dir} has no tokenizer, and text needs one")
        prompt_tokenizer = PromptTokenizer(tokenizer, template)
        if not prompt_tokenizer.has_own_template:
            logging.warning(
                "%s has no chat template: conversations are written as plain lines", job.model_dir
            )
        defaults = GenerationDefaults.of(model.generation_config)
        self._backend = create_backend(model, options)
        self._timeline = Timeline(model)
        self._engine = Engine(
            self._backend,
            tokenizer,
            max_waiting=options.max_waiting,
            on_failure=self._on_failure,
        )
        self._preparer = Preparer(
            prompt_tokenizer,
            defaults,
            max_sequence_length=self._backend.max_sequence_length,
            vocab_size=model.config.get_text_config().vocab_size,
        )
        facts = RankFacts(
            rank=group.rank,
            dwdp_size=group.size,
            model=job.served_model_name,
            max_batch_tokens=options.max_batch_tokens,
            max_waiting=options.max_waiting,
        )
        application = RankApplication(
            job.served_model_name,
            job.token,
            self._engine,
            self._preparer,
            TokenTexts(tokenizer),
            Statistics(facts, self._engine, attachment, self._timeline),
        )
        self._server = RankServer(application, self._engine, options.drain_grace_s)
        self._socket_name = job.socket

    def run(self) -> str | None:
        """Serve until SIGTERM or a failure of the model, which is returned."""
        from dwdp.serving.rank_server.server import listen

        try:
            asyncio.run(self._server.run(listen(self._socket_name)))
        finally:
            self._backend.stop()
            self._preparer.close()
            self._timeline.close()
        if self._engine.failure is not None:
            return f"the model can no longer be run: {self._engine.failure}"
        return None

    def _on_failure(self, reason: str) -> None:
        logging.error("the model can no longer be run: %s", reason)
        self._server.end()
