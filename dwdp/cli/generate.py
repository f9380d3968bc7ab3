"""``dwdp generate``: text from a group of ranks on this machine.

Without a launcher the command starts the ranks itself. Started by torchrun, mpirun or srun, every
process of the launcher is a rank, and rank 0 hands out the prompts besides. What one rank refuses ends
all of them, with its message and exit code: launchers report the first process that ends, whichever it is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from dwdp.cli.display import show_progress, summary_table
from dwdp.cli.main import EXIT_FAILURE
from dwdp.cli.options import (
    FloatRange,
    IntRange,
    config_from_options,
    config_options,
    device_option,
    dtype_option,
    even_threads,
    fetch_options,
    threads_option,
)
from dwdp.cli.output_files import check_writable, target_of, write_files
from dwdp.cli.rank_command import (
    RankCommand,
    bad_input_is_a_value_error,
    peers_hear_of_refusals,
)
from dwdp.config import DwdpConfig
from dwdp.group import Group
from dwdp.launch import LaunchInfo, discover_launch
from dwdp.observability.report import SamplingReport
from dwdp.rendezvous import PeerFailure
from dwdp.serving.channel import RankChannel
from dwdp.serving.dispatcher import (
    BadInput,
    Dispatcher,
    GenerateError,
    LostRank,
    Outcome,
    SetupFailed,
)
from dwdp.serving.generation import quiet_transformers
from dwdp.serving.messages import Hello, Ready
from dwdp.serving.plan import RunPlan, plan_run
from dwdp.serving.processes import RankProcesses
from dwdp.serving.prompts import Prompt, prompts_from_texts, read_prompts
from dwdp.serving.rank import load_rank, serve_requests
from dwdp.serving.results import completion_lines, make_report, trace_of

MIN_TEMPERATURE = 0.001
"""Below this, logits divided by the temperature leave the range of half precision."""


@dataclass(frozen=True)
class GenerateOptions:
    """The command's options, checked one by one and against each other."""

    model_dir: Path
    config: DwdpConfig
    sampling: SamplingReport
    prompts_path: Path | None
    prompt_texts: tuple[str, ...]
    output: Path | None
    report: Path | None
    trace: Path | None
    dtype: str
    device: str
    threads_per_rank: int
    port: int


@click.command(cls=RankCommand)
@click.argument("model_dir", type=click.Path(path_type=Path))
@config_options("dwdp_size")
@click.option(
    "--prompts",
    "prompts_path",
    type=click.Path(path_type=Path),
    help='JSON Lines: {"id", "prompt"} or {"id", "prompt_token_ids"} per line.',
)
@click.option(
    "--prompt", "prompt_texts", multiple=True, help="A prompt, instead of a file. Can be repeated."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Where the completions go, as JSON Lines. Default: standard output.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Where memory, traffic and speed per rank go, as JSON.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Where a timeline of every rank's forwards and fetches goes, as Chrome trace events (Perfetto).",
)
@click.option(
    "--max-new-tokens",
    type=IntRange(min=1),
    default=64,
    show_default=True,
    help="Tokens to generate per prompt at most.",
)
@click.option(
    "--temperature",
    type=FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token each time; above that, tokens are drawn.",
)
@click.option(
    "--seed",
    type=IntRange(min=0, max=2**63 - 1),
    default=0,
    show_default=True,
    help="Of the draws. A prompt's text does not depend on the rank that it goes to.",
)
@fetch_options
@dtype_option
@device_option
@threads_option
@click.option(
    "--port",
    type=IntRange(min=0, max=65535),
    default=0,
    show_default=True,
    help="Port on the loopback interface where the ranks meet; 0 takes a free one.",
)
@click.pass_context
def generate(context: click.Context, **values: Any) -> int:
    """Generate text with the mixture-of-experts checkpoint in MODEL_DIR.

    The model's experts are shared out over --dwdp-size ranks on this machine; prompts go to the rank
    with the least to do. Started by torchrun, mpirun or srun, its processes are the ranks.
    """
    launch = discover_launch()
    with peers_hear_of_refusals():
        options = _check_options(context, values, launch)
    if launch is None:
        return _run_here(options)
    return _run_launched(options, launch)


def _check_options(
    context: click.Context, values: dict[str, Any], launch: LaunchInfo | None
) -> GenerateOptions:
    if launch is not None:
        if context.get_parameter_source("dwdp_size") is ParameterSource.DEFAULT:
            values["dwdp_size"] = launch.size
        elif values["dwdp_size"] != launch.size:
            raise click.BadParameter(
                f"{values['dwdp_size']}: {launch.launcher} started {launch.size} ranks; "
                "leave the option out, or start as many",
                param_hint="--dwdp-size",
            )
        if values["port"]:
            raise click.BadParameter(
                f"{values['port']}: {launch.launcher} has chosen where the ranks meet",
                param_hint="--port",
            )
    if 0 < values["temperature"] < MIN_TEMPERATURE:
        raise click.BadParameter(
            f"{values['temperature']:g}: use 0 for the likeliest token, or {MIN_TEMPERATURE} and above",
            param_hint="--temperature",
        )
    config = config_from_options(values)
    if (values["prompts_path"] is None) == (not values["prompt_texts"]):
        raise click.UsageError("give either --prompts FILE or --prompt TEXT")
    paths = [values["prompts_path"], values["output"], values["report"], values["trace"]]
    targets = [target_of(path) for path in paths if path is not None]
    if len(set(targets)) < len(targets):
        raise click.UsageError(
            "--prompts, --output, --report and --trace have to be different files"
        )
    return GenerateOptions(
        model_dir=values["model_dir"],
        config=config,
        sampling=SamplingReport(
            max_new_tokens=values["max_new_tokens"],
            temperature=values["temperature"],
            seed=values["seed"],
        ),
        prompts_path=values["prompts_path"],
        prompt_texts=values["prompt_texts"],
        output=values["output"],
        report=values["report"],
        trace=values["trace"],
        dtype=values["dtype"],
        device=values["device"],
        threads_per_rank=values["threads_per_rank"] or even_threads(config.dwdp_size),
        port=values["port"],
    )


def _plan(options: GenerateOptions) -> RunPlan:
    for path in (options.output, options.report, options.trace):
        if path is not None:
            check_writable(path)
    quiet_transformers()
    plan = plan_run(
        options.model_dir,
        options.config,
        _read_prompts(options),
        options.sampling,
        dtype=options.dtype,
        device=options.device,
    )
    if options.trace is None:
        return plan
    return replace(plan, requests=tuple(replace(each, trace=True) for each in plan.requests))


def _read_prompts(options: GenerateOptions) -> list[Prompt]:
    if options.prompts_path is not None:
        return read_prompts(options.prompts_path)
    return prompts_from_texts(options.prompt_texts)


def _run_here(options: GenerateOptions) -> int:
    """Start the ranks, and hand out the prompts."""
    plan = _plan(options)
    with RankProcesses(options.config, port=options.port) as processes:
        dispatcher = Dispatcher(options.config.dwdp_size, describe_loss=processes.describe_loss)
        with dispatcher:
            processes.start(
                str(options.model_dir),
                dtype=options.dtype,
                device=options.device,
                num_threads=options.threads_per_rank,
                dispatcher=dispatcher.name,
                token=dispatcher.token,
            )
            outcome = _dispatch(dispatcher, plan, processes.check)
    _hand_over(options, plan, dispatcher.ready, outcome, launcher="dwdp")
    return 0


def _run_launched(options: GenerateOptions, launch: LaunchInfo) -> int:
    """Be one of the launcher's ranks; rank 0 also hands out the prompts, in a thread of its own."""
    desk: _Desk | None = None
    channel: RankChannel | None = None
    try:
        group = Group.join(launch, timeout_s=options.config.setup_timeout_s)
        with group.setting_up(), bad_input_is_a_value_error():
            _check_one_host(group)
            if launch.rank == 0:
                desk = _Desk(options)
            address = desk.address if desk is not None else b""
            name, token = group.exchange("dispatcher", address)[0].decode().split()
            channel = RankChannel.connect(name)
            channel.send(Hello(launch.rank, token))
            attachment = load_rank(
                str(options.model_dir),
                group,
                options.config,
                dtype=options.dtype,
                device=options.device,
                num_threads=options.threads_per_rank,
            )
        with attachment:
            is_finished = serve_requests(channel, attachment)
        if desk is not None:
            plan, outcome = desk.outcome()
            _hand_over(options, plan, desk.ready, outcome, launcher=launch.launcher)
        return 0 if is_finished else EXIT_FAILURE
    except PeerFailure as failure:
        if failure.bad_input:
            raise BadInput(str(failure)) from failure
        raise
    finally:
        if channel is not None:
            channel.close()
        if desk is not None:
            desk.close()


def _check_one_host(group: Group) -> None:
    """Ranks reach the prompts, and with the host fabric the experts, through sockets of one machine."""
    if not group.is_one_host:
        raise ValueError(
            f"dwdp generate runs on one host, and these {group.size} ranks are on several: start all of them "
            "on one (srun --nodes=1, mpirun --host NAME:SLOTS, torchrun --nnodes=1), or on each host a group "
            "of its own with a share of the prompts"
        )


class _Desk:
    """Hands out the prompts in a thread of rank 0, which is busy with its own share of them.

    Raises:
        ValueError: the run cannot start as it was asked for.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self._plan = _plan(options)
        self._dispatcher = Dispatcher(options.config.dwdp_size)
        self._is_cancelled = threading.Event()
        self._outcome: Outcome | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="dwdp-dispatcher")
        self._thread.start()

    @property
    def address(self) -> bytes:
        """The dispatcher's name and token, for the other ranks."""
        return f"{self._dispatcher.name} {self._dispatcher.token}".encode()

    @property
    def ready(self) -> Mapping[int, Ready]:
        return self._dispatcher.ready

    def outcome(self) -> tuple[RunPlan, Outcome]:
        """Wait for the run to end.

        Raises:
            GenerateError: the prompts could not be finished.
        """
        self._thread.join()
        if self._outcome is None:
            raise self._error or GenerateError("the dispatcher ended too early")
        return self._plan, self._outcome

    def close(self) -> None:
        self._is_cancelled.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._dispatcher:
                self._outcome = _dispatch(
                    self._dispatcher, self._plan, self._check, check_run=self._check
                )
        except Exception as error:
            self._error = error

    def _check(self) -> None:
        if self._is_cancelled.is_set():
            raise SetupFailed("rank 0 failed")


def _dispatch(
    dispatcher: Dispatcher,
    plan: RunPlan,
    check_set_up: Callable[[], None],
    *,
    check_run: Callable[[], None] = lambda: None,
) -> Outcome:
    """Wait for the ranks and have the prompts answered, with a progress bar and warnings."""
    console = _console()

    def warn(lost: LostRank) -> None:
        rest = f"; its {lost.num_unfinished} unfinished prompt(s) go to the other ranks"
        _say(console, f"dwdp: warning: rank {lost.rank} {lost.reason}{rest}")

    with show_progress(console, dispatcher.num_ranks, len(plan.requests)) as progress:
        dispatcher.wait_until_ready(check_set_up, progress.rank_is_ready)
        outcome = dispatcher.run(
            plan.requests,
            check=check_run,
            on_completion=progress.prompt_is_finished,
            on_lost=warn,
        )
        dispatcher.finish()
    return outcome


def _hand_over(
    options: GenerateOptions,
    plan: RunPlan,
    ready: Mapping[int, Ready],
    outcome: Outcome,
    *,
    launcher: str,
) -> None:
    """Write the completions, the report and the trace, and show the table."""
    report = make_report(
        plan,
        outcome,
        ready,
        config=options.config,
        sampling=options.sampling,
        launcher=launcher,
        device=options.device,
        threads_per_rank=options.threads_per_rank,
    )
    lines = completion_lines(plan, outcome)
    files = {}
    if options.output is not None:
        files[options.output] = lines
    if options.report is not None:
        files[options.report] = report.model_dump_json(indent=2) + "\n"
    if options.trace is not None:
        files[options.trace] = trace_of(outcome)
    write_files(files)
    if options.output is None:
        sys.stdout.write(lines)
        sys.stdout.flush()
    _console().print(summary_table(report))


def _console() -> Console:
    # Rich takes a file to be 80 columns wide, and would cut the table's longest numbers.
    return Console(stderr=True, width=None if sys.stderr.isatty() else 120)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
