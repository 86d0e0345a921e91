"""What a run reports: lines on the terminal, a row of metrics per step, memory, and results compared with the estimate.

Memory is in MB (10^6 bytes). MFU is model FLOPs utilisation: the FLOPs the model needs per second, divided by the
measured peak of the machine's matrix products.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn

from graftlm.errors import require_posix
from graftlm.exchange.load import measure_matmul_flops
from graftlm.files.formats import to_local
from graftlm.methods import Method
from graftlm.methods.cost_model import model_flops
from graftlm.models.base import CausalLM
from graftlm.training.checkpoint import TrainState


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did."""

    loss: float
    """Mean over the step's target tokens, pairs or examples, before the update."""
    lr: float
    examples: int
    tokens: int
    unique_tokens: int
    """Tokens with a batch's shared prefix counted once."""
    seconds: float
    metrics: dict[str, float | None]
    """The objective's columns."""

    @property
    def examples_per_s(self) -> float:
        """Examples per second of wall time in this step."""
        return self.examples / self.seconds


# Terminal and metrics -------------------------------------------------------------------------------------------------


def progress_bar(console: Console) -> Bar:
    """A bar with the steps and a field `info`; it disappears when it is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
    )
    return Bar(*columns, TimeRemainingColumn(), console=console, transient=True)


def metrics_row(
    done: StepMetrics, state: TrainState, model: CausalLM, evaluated: dict[str, float | None]
) -> dict[str, Any]:
    """A row of metrics.jsonl; `evaluated` are the columns that only a validation measures, None at other steps."""
    row: dict[str, Any] = {
        "step": state.step,
        "examples": state.examples,
        "tokens": state.tokens,
        "train_loss": done.loss,
        "val_loss": None,
        "val_accuracy": None,
        "lr": done.lr,
        "examples_per_s": round(done.examples_per_s, 3),
        "tokens_per_s": round(done.tokens / done.seconds, 1),
        "peak_rss_mb": peak_rss_mb(),
        "seconds": round(state.seconds, 3),
    }
    return row | done.metrics | evaluated | _peak_cuda(model)


def print_eval(row: dict[str, Any], console: Console, best: dict[str, Any]) -> None:
    """A validation's row, in a line."""
    accuracy = "" if row["val_accuracy"] is None else f"  val accuracy {row['val_accuracy']:.3f}"
    console.print(
        f"step {row['step']:>5}  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}{accuracy}"
        + (f"  margin {row['reward_margin']:.3f}" if row.get("reward_margin") is not None else "")
        + (f"  KL {row['kl']:.2f}" if row.get("kl") is not None else "")
        + ("  best" if best["step"] == row["step"] else ""),
        highlight=False,
    )


# Results --------------------------------------------------------------------------------------------------------------


def format_estimate(estimate: dict[str, Any]) -> str:
    """The estimate of a run that is about to start, in a line."""
    return (
        f"plan: {estimate['steps']:,} steps at about {estimate['examples_per_s']:.1f} examples/s, "
        f"{estimate['minutes']:.1f} minutes with validations, {estimate['peak_rss_mb']:,.0f} MB"
    )


def results_of_state(state: TrainState, model: CausalLM, estimate: dict[str, Any]) -> dict[str, Any]:
    """What a finished run did, and its estimate compared with what was measured."""
    speed = state.timed_examples / state.timed_seconds if state.timed_seconds else 0.0
    results = {
        "steps": state.step,
        "examples": state.examples,
        "seconds": round(state.seconds, 3),
        "seconds_to_first_step": state.seconds_to_first_step,
        "examples_per_s": round(speed, 3),
        "peak_rss_mb": peak_rss_mb(),
        "plan": compare_to_estimate(estimate, speed, state.seconds),
        "best": state.best,
        "last": state.last,
        **_peak_cuda(model),
    }
    if model.dtype == torch.float16:
        results["skipped_steps"] = state.skipped
    return results


def compare_to_estimate(estimate: dict[str, Any], examples_per_s: float, seconds: float) -> dict[str, dict[str, float]]:
    """Planned, measured, and measured / planned."""
    pairs = {
        "examples_per_s": (estimate["examples_per_s"], examples_per_s),
        "seconds": (estimate["train_seconds"] + estimate["validation_seconds"], seconds),
        "peak_rss_mb": (estimate["peak_rss_mb"], peak_rss_mb()),
    }
    return {
        key: {"predicted": round(planned, 3), "measured": round(measured, 3), "ratio": round(measured / planned, 3)}
        for key, (planned, measured) in pairs.items()
    }


def mfu(model: CausalLM, method: Method, state: TrainState, cached_layers: int) -> dict[str, float]:
    """Model FLOPs utilisation of the timed steps, and GFLOP/s of the model and of the machine's peak.

    cached_layers: the frozen lower layers whose hidden states came from the activation cache.
    """
    flops = model_flops(model.config, state.timed_model_tokens, method.passes(model.config, cached_layers))
    speed = flops / state.timed_seconds if state.timed_seconds else 0.0
    peak = measure_matmul_flops(model.device, model.dtype)
    return {
        "model_gflops_per_s": round(speed / 1e9, 1),
        "peak_gflops": round(peak / 1e9, 1),
        "mfu": round(speed / peak, 4),
    }


def parameter_counts(run: dict[str, Any]) -> dict[str, Any]:
    """What run.json records of the parameters: how many are trained, of how many."""
    trainable, total = run["trainable"], run["total"]
    return {"trainable": trainable, "total": total, "trainable_fraction": trainable / total}


# Memory ---------------------------------------------------------------------------------------------------------------


def peak_rss_mb() -> float:
    """The peak resident memory of this process so far."""
    if (peak := _status_mb("VmHWM")) is not None:
        return peak
    resource = require_posix("resource")
    peak_rss = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return round(peak_rss * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def rss_mb() -> float:
    """The resident memory now, or the peak where the system does not report it."""
    now = _status_mb("VmRSS")
    return peak_rss_mb() if now is None else now


def _status_mb(field: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith(field))
    return round(int(line.split()[1]) * 1024 / 1e6, 1)


def _peak_cuda(model: CausalLM) -> dict[str, float]:
    if model.device.type != "cuda":
        return {}
    return {"peak_cuda_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1)}


@contextmanager
def saved_activation_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the bytes autograd saved within: each storage once, parameters excluded."""
    parameters = {to_local(p).untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # holding a storage prevents that its number is used again

    def save(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        # To be called after the pass: the gathered weights of a sharded block are freed by then.
        yield lambda: sum(storage.nbytes() for storage in saved.values())
