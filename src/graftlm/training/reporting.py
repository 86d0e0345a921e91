"""What a run tells: the lines before its first step, a row a step, and what it came to."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from graftlm.models.base import CausalLM
from graftlm.training.checkpoint import TrainState
from graftlm.training.distributed import model_is_sharded
from graftlm.training.memory import peak_rss_mb
from graftlm.training.mfu import compare_to_estimate, mfu, parameter_counts
from graftlm.training.setup import RunContext


@dataclass(frozen=True)
class StepMetrics:
    """What one optimiser step did."""

    loss: float
    """Mean over the step's target tokens, before the update."""
    lr: float
    examples: int
    tokens: int
    unique_tokens: int
    """Tokens that cannot be done without: what a batch's prompts begin with is counted once."""
    seconds: float
    metrics: dict[str, float]
    """What the objective tells of the step's examples, on average; empty for most."""

    @property
    def examples_per_s(self) -> float:
        """Wall time of this step alone."""
        return self.examples / self.seconds


def print_header(prepared: RunContext, console: Console) -> None:
    """What is about to be trained, and on what: lines before the first step."""
    run, config = prepared.run, prepared.config
    console.print(
        f"{run['base']['name']} in {run['dtype']} on {run['device']}: {prepared.loaded.dtype_reason}", highlight=False
    )
    console.print(
        f"{prepared.method.name} trains {run['trainable']:,} of {run['total']:,} parameters "
        f"({run['trainable'] / run['total']:.2%})",
        highlight=False,
    )
    if line := prepared.method.describe_scale(prepared.loaded.model, config.lr or 0.0):
        console.print(line, highlight=False)
    if (world := prepared.world).size > 1:
        how = "weights cut over them" if model_is_sharded(prepared.loaded.model) else "each holds the model"
        console.print(f"{world.size} processes ({world.backend}): {how}", highlight=False)
    for note in prepared.notes:
        console.print(note, markup=False, highlight=False)


def progress_bar(console: Console) -> Bar:
    """A bar that shows the steps and a field `info`, and goes when it is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
    )
    return Bar(*columns, TimeRemainingColumn(), console=console, transient=True)


def metrics_row(
    done: StepMetrics, progress: TrainState, model: CausalLM, *, judged: bool, **about: float | None
) -> dict[str, Any]:
    """A row of metrics.jsonl; `about`: what else is measured in this run, None where it was not this time."""
    row: dict[str, Any] = {
        "step": progress.step,
        "examples": progress.examples,
        "tokens": progress.tokens,
        "train_loss": done.loss,
        "val_loss": progress.last["val_loss"] if judged else None,
        "val_accuracy": progress.last["val_accuracy"] if judged else None,
        "lr": done.lr,
        "examples_per_s": round(done.examples_per_s, 3),
        "tokens_per_s": round(done.tokens / done.seconds, 1),
        "peak_rss_mb": peak_rss_mb(),
        "seconds": round(progress.seconds, 3),
    }
    row |= done.metrics | about
    if model.device.type == "cuda":
        row["peak_cuda_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return row


def print_eval(row: dict[str, Any], console: Console, *, new_best: bool) -> None:
    """A validation's row, in a line."""
    accuracy = "" if row["val_accuracy"] is None else f"  val accuracy {row['val_accuracy']:.3f}"
    console.print(
        f"step {row['step']:>5}  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}{accuracy}"
        + (f"  margin {row['reward_margin']:.3f}" if "reward_margin" in row else "")
        + (f"  KL {row['kl']:.2f}" if row.get("kl") is not None else "")
        + ("  best" if new_best else ""),
        highlight=False,
    )


def final_results(prepared: RunContext, progress: TrainState, *, below_kept: bool) -> dict[str, Any]:
    """What the run came to, for run.json and `graft train --json`; every process of it must ask.

    below_kept: whether what frozen lower layers give was read from the disk.
    """
    run, model, world = prepared.run, prepared.loaded.model, prepared.world
    speed = progress.timed_examples / progress.timed_seconds if progress.timed_seconds else 0.0
    results = {
        "steps": progress.step,
        "examples": progress.examples,
        "seconds": round(progress.seconds, 3),
        "seconds_to_first_step": progress.seconds_to_first_step,
        "examples_per_s": round(speed, 3),
        "peak_rss_mb": peak_rss_mb(),
        **mfu(model, prepared.method, progress, below_kept=below_kept),
        "plan": compare_to_estimate(run["plan"], speed, progress.seconds),
        **parameter_counts(run),
        "best": progress.best,
        "last": progress.last,
        "out_dir": str(prepared.out_dir),
    }
    if model.dtype == torch.float16:
        results["skipped_steps"] = progress.skipped
    if world.size > 1:
        peaks = [peak for (peak,) in world.all_gather([peak_rss_mb()])]
        results["distributed"] = {**world.to_json(), "peak_rss_mb": peaks, "comm_bytes": world.bytes_communicated}
    if model.device.type == "cuda":
        results["peak_cuda_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return results
