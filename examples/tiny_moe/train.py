"""Train the example model: a small Qwen3-MoE on the sources of Python's standard library.

    python examples/tiny_moe/train.py --out examples/tiny_moe

writes a checkpoint that Transformers loads (OUT/model), the loss curve (loss.csv, loss.png) and a
model card (README.md). It needs the extras `transformers` and `plot`, and no network.
"""

from __future__ import annotations

import csv
import hashlib
import math
import platform
import shutil
import sysconfig
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 2048
MAX_POSITIONS = 2048
# Tables rather than code (character sets, documentation topics), and tests.
SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test",
    "tests",
}  # fmt: skip
HELD_OUT_OF = 20
"""One file in this many is held out, chosen by the hash of its path."""
AUX_LOSS_WEIGHT = 0.01
SAMPLE_PROMPTS = ("def read_file(path):\n", "import os\n", "class Node:\n")

console = Console()


@dataclass
class Corpus:
    """Python sources as text, split by file."""

    train: list[str]
    held_out: list[str]


@dataclass
class Curve:
    """What was logged: (step, training loss, learning rate) and (step, held-out loss), in nats."""

    train: list[tuple[int, float, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def write(self, out: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        held_out = dict(self.held_out)
        with (out / "loss.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", "train_loss", "learning_rate", "held_out_loss"])
            for step, loss, rate in self.train:
                value = f"{held_out[step]:.4f}" if step in held_out else ""
                writer.writerow([step, f"{loss:.4f}", f"{rate:.3e}", value])

        figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
        axes.plot(
            *zip(*[(s, loss) for s, loss, _ in self.train], strict=True), lw=1, label="training"
        )
        axes.plot(*zip(*self.held_out, strict=True), marker="o", ms=3, lw=1, label="held out")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title="tiny_moe")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        # Without the version text the same curve gives the same file.
        figure.savefig(out / "loss.png", metadata={"Software": None})
        pyplot.close(figure)


@dataclass(frozen=True)
class Evaluation:
    """Loss over the held-out files; `min_share`/`max_share` are experts' shares of the routed
    tokens in any one layer (an even load is 1 / num_experts)."""

    nats_per_token: float
    bits_per_byte: float
    num_tokens: int
    min_share: float
    max_share: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def read_corpus(root: Path) -> Corpus:
    """Every Python source under `root` but for tests, tables and installed packages."""
    corpus = Corpus([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts[:-1]):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        held_out = int.from_bytes(digest[:4], "big") % HELD_OUT_OF == 0
        (corpus.held_out if held_out else corpus.train).append(text)
    if not corpus.train or not corpus.held_out:
        raise click.ClickException(f"too few Python sources under {root}")
    return corpus


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens; any byte string can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of token ids, an end-of-text token after each. int64 [num_tokens]."""
    stream: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        stream += encoding.ids
        stream.append(tokenizer.eos_token_id)
    return torch.tensor(stream)


def sorted_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts implementation for Transformers that trains fast on a CPU.

    Tokens are sorted by expert, so each expert is one pair of matrix products; and because weights
    are unbound once, the backward pass adds to no expert's gradient more than once.
    """
    order = top_k_index.flatten().argsort(stable=True)
    tokens = order // top_k_index.shape[1]
    counts = top_k_index.flatten().bincount(minlength=self.num_experts).tolist()
    inputs = hidden_states.index_select(0, tokens).split(counts)
    outputs = []
    for rows, gate_up, down in zip(
        inputs, self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True
    ):
        gate, up = functional.linear(rows, gate_up).chunk(2, dim=-1)
        outputs.append(functional.linear(self.act_fn(gate) * up, down))
    weights = top_k_weights.flatten().index_select(0, order).unsqueeze(-1)
    return torch.zeros_like(hidden_states).index_add(0, tokens, torch.cat(outputs) * weights)


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)


def build_model(tokenizer: PreTrainedTokenizerFast, experts_per_token: int) -> Qwen3MoeForCausalLM:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": experts_per_token,
        "norm_topk_prob": True,
        "moe_intermediate_size": 112,
        "intermediate_size": 448,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
        "router_aux_loss_coef": AUX_LOSS_WEIGHT,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    model.set_experts_implementation("sorted")
    model.generation_config.update(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def windows(stream: torch.Tensor, batch: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches [batch, length + 1]; each epoch cuts the stream at another offset."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(stream) - offset - 1) // length
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            starts = offset + order[start : start + batch] * length
            yield stream[starts[:, None] + torch.arange(length + 1)]


def forward_loss(
    model: Qwen3MoeForCausalLM, batch: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Next-token loss in nats, and each layer's router output [num_tokens, num_experts]."""
    output = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
    logits = output.logits.float()
    loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    return loss, output.router_logits


@torch.no_grad()
def evaluate(
    model: Qwen3MoeForCausalLM, stream: torch.Tensor, num_bytes: int, length: int, limit: int | None
) -> Evaluation:
    """Loss over `stream` in windows of `length` tokens, at most `limit` windows of it, evenly
    spread. `num_bytes` is the size of the text that the whole stream encodes."""
    model.eval()
    starts = torch.arange(0, len(stream) - length, length)
    if limit is not None and limit < len(starts):
        starts = starts[torch.linspace(0, len(starts) - 1, limit).long()]
    config = model.config
    routed = torch.zeros(config.num_hidden_layers, config.num_experts)
    total, num_tokens = 0.0, 0
    for chunk in starts.split(8):
        batch = stream[chunk[:, None] + torch.arange(length + 1)]
        loss, router_logits = forward_loss(model, batch)
        total += loss.item() * chunk.numel() * length
        num_tokens += chunk.numel() * length
        for layer, logits in enumerate(router_logits):
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices
            routed[layer] += chosen.flatten().bincount(minlength=config.num_experts)
    model.train()
    mean = total / num_tokens
    shares = routed / routed.sum(dim=1, keepdim=True)
    return Evaluation(
        nats_per_token=mean,
        bits_per_byte=mean / math.log(2) * len(stream) / num_bytes,
        num_tokens=num_tokens,
        min_share=shares.min().item(),
        max_share=shares.max().item(),
    )


def optimizer_for(model: Qwen3MoeForCausalLM) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a bfloat16 copy, one tensor per expert as Qwen3-MoE checkpoints have them; replaces
    what `folder` held."""
    copy: Any = Qwen3MoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def complete(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, num_tokens: int) -> str:
    """The prompt and its greedy continuation."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--steps", type=click.IntRange(1), default=2000, help="Optimizer steps.")
@click.option("--max-minutes", type=click.FloatRange(0, min_open=True), default=None,
              help="Finish the schedule by then, with fewer steps if need be.")  # fmt: skip
@click.option("--seed", type=int, default=0)
@click.option("--threads", type=click.IntRange(1), default=2)
@click.option("--batch-size", type=click.IntRange(1), default=8)
@click.option("--seq-len", type=click.IntRange(16, MAX_POSITIONS), default=256)
@click.option("--experts-per-token", type=click.IntRange(1, 16), default=4)
@click.option("--learning-rate", type=float, default=3e-3, help="Peak of the cosine schedule.")
@click.option("--eval-every", type=click.IntRange(1), default=100)
def main(
    out: Path,
    steps: int,
    max_minutes: float | None,
    seed: int,
    threads: int,
    batch_size: int,
    seq_len: int,
    experts_per_token: int,
    learning_rate: float,
    eval_every: int,
) -> None:
    """Train the example model and write it to OUT/model, with its loss curve and model card."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)

    corpus = read_corpus(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(corpus.train)
    train_stream = encode(tokenizer, corpus.train)
    held_out_stream = encode(tokenizer, corpus.held_out)
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out)
    model = build_model(tokenizer, experts_per_token)
    num_params = sum(p.numel() for p in model.parameters())
    console.print(
        f"{len(corpus.train)} files, {len(train_stream):,} tokens to train on; "
        f"{len(corpus.held_out)} files, {len(held_out_stream):,} tokens held out; "
        f"{num_params:,} parameters"
    )

    optimizer = optimizer_for(model)
    curve = Curve()
    batches = windows(train_stream, batch_size, seq_len, seed)
    warmup = max(1, min(100, steps // 10))
    started = time.monotonic()
    step, progress_made, running = 0, 0.0, []
    recent = deque([started], maxlen=100)
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss="")
        while progress_made < 1.0:
            rate = learning_rate * min(1.0, (step + 1) / warmup)
            rate *= 0.5 * (1 + math.cos(math.pi * progress_made)) * 0.98 + 0.02
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, router_logits = forward_loss(model, next(batches))
            # Balanced layer by layer: a balance over all layers at once would let one layer's
            # idle expert be made up for by another layer's.
            aux = sum(
                load_balancing_loss_func((logits,), model.config.num_experts, experts_per_token)
                for logits in router_logits
            ) / len(router_logits)
            (loss + AUX_LOSS_WEIGHT * aux).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            running.append(loss.item())
            progress_made = step / steps
            if max_minutes is not None:
                recent.append(time.monotonic())
                remaining = 60 * max_minutes - (recent[-1] - started)
                seconds = (recent[-1] - recent[0]) / (len(recent) - 1)
                # The steps that fit at the latest speed; others may share the machine.
                progress_made = max(progress_made, step / (step + max(remaining, 0) / seconds))

            if step % 10 == 0 or step % eval_every == 0 or progress_made >= 1.0:
                curve.train.append((step, sum(running) / len(running), rate))
                running = []
                progress.update(task, completed=step, loss=f"loss {curve.train[-1][1]:.3f}")
            if step % eval_every == 0 and progress_made < 1.0:
                result = evaluate(model, held_out_stream, held_out_bytes, seq_len, limit=24)
                curve.held_out.append((step, result.nats_per_token))
                seconds = (time.monotonic() - started) / step
                progress.console.print(
                    f"step {step}: train {curve.train[-1][1]:.3f}, held out "
                    f"{result.nats_per_token:.3f}, experts' share {result.min_share:.3f} to "
                    f"{result.max_share:.3f}, {seconds:.2f} s per step"
                )
                save(model, tokenizer, out / "model")
                curve.write(out)
    minutes = (time.monotonic() - started) / 60
    cpu_minutes = time.process_time() / 60

    save(model, tokenizer, out / "model")
    # What is reported is the checkpoint as written, in bfloat16.
    final = Qwen3MoeForCausalLM.from_pretrained(out / "model", dtype=torch.bfloat16)
    result = evaluate(final, held_out_stream, held_out_bytes, seq_len, limit=None)
    curve.held_out.append((step, result.nats_per_token))
    curve.write(out)
    final.eval()
    samples = [complete(final, tokenizer, prompt, 64) for prompt in SAMPLE_PROMPTS]
    card = model_card(
        final, result, samples,
        files=(len(corpus.train), len(corpus.held_out)),
        num_train_tokens=len(train_stream),
        seq_len=seq_len,
        limits=f"--steps {steps}" + (f" --max-minutes {max_minutes:g}" if max_minutes else ""),
        run={
            "steps": step,
            "batch": f"{batch_size} windows of {seq_len} tokens",
            "tokens seen": f"{step * batch_size * seq_len:,}",
            "optimizer": f"AdamW, peak learning rate {learning_rate:g}, cosine schedule",
            "seed": seed,
            "time": f"{minutes:.0f} minutes, {threads} thread(s), {cpu_minutes:.0f} CPU minutes",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
        },
    )  # fmt: skip
    (out / "README.md").write_text(card)
    console.print(
        f"held-out loss {result.nats_per_token:.3f} nats per token, perplexity "
        f"{result.perplexity:.2f}, {result.bits_per_byte:.3f} bits per byte; {minutes:.1f} minutes"
    )


def model_card(
    model: Qwen3MoeForCausalLM,
    result: Evaluation,
    samples: list[str],
    files: tuple[int, int],
    num_train_tokens: int,
    seq_len: int,
    limits: str,
    run: dict[str, object],
) -> str:
    config = model.config
    params = dict(model.named_parameters())
    total = sum(p.numel() for p in params.values())
    experts = sum(p.numel() for name, p in params.items() if ".experts." in name)
    active = total - experts + experts * config.num_experts_per_tok // config.num_experts
    rows = "\n".join(f"| {key} | {value} |" for key, value in run.items())
    blocks = "\n\n".join(f"```python\n{sample.rstrip()}\n```" for sample in samples)
    return f"""# tiny_moe

A Qwen3-MoE language model of {total / 1e6:.1f} million parameters, trained on the sources of \
Python's standard library: small enough to live in the repository, and trained enough that its \
output has the shape of Python. It knows nothing else, and greedy decoding soon repeats itself.

| | |
|---|---|
| architecture | `qwen3_moe`, {config.num_hidden_layers} layers, hidden size {config.hidden_size} |
| experts | {config.num_experts} per layer, {config.num_experts_per_tok} per token, \
intermediate size {config.moe_intermediate_size} |
| parameters | {total:,}, of which {experts:,} in experts; {active:,} used per token |
| weights | bfloat16 safetensors, one tensor per expert and projection |
| tokenizer | byte-level BPE, {config.vocab_size} tokens, trained on the same sources |
| context | {MAX_POSITIONS} positions, trained on windows of {seq_len} |

## Held-out result

Of the checkpoint as written, over all {result.num_tokens:,} tokens of {files[1]} held-out files:

| loss (nats per token) | perplexity per token | bits per byte | experts' share of tokens |
|---|---|---|---|
| {result.nats_per_token:.3f} | {result.perplexity:.2f} | {result.bits_per_byte:.3f} | \
{100 * result.min_share:.1f} % to {100 * result.max_share:.1f} % (even: \
{100 / config.num_experts:.2f} %) |

![loss curve](loss.png)

## Data and licence

{files[0]} source files ({num_train_tokens:,} tokens) of the standard library that came with the \
Python that ran the training, without tests, character tables and installed packages; 1 file in \
{HELD_OUT_OF} is held out, chosen by a hash of its path. The sources are under the PSF License \
Version 2; the weights are published under the project's own licence, Apache-2.0. A model this \
small repeats passages of what it has read, so treat long completions as the standard library's.

## Training

```
python examples/tiny_moe/train.py --out examples/tiny_moe {limits}
```

| | |
|---|---|
{rows}

The losses of the whole run are in `loss.csv`.

## What it writes

Greedy, 64 tokens:

{blocks}
"""


if __name__ == "__main__":
    main()
