"""What a run reports: lines on the terminal, metrics.jsonl and its copies, memory, results.

metrics.jsonl is the record. Weights & Biases and TensorBoard get copies if their flags are set; a copy that fails is
disabled with one warning and never stops a run, but a package or key that is missing before the start is an InputError.
A key for Weights & Biases comes from WANDB_API_KEY or a git-ignored wandb_api.json; it is passed to wandb and never
printed or saved.

Memory is in MB (10^6 bytes). MFU is model FLOPs utilisation: the FLOPs the model needs per second, divided by the
measured peak of the machine's matrix products.
"""

import json
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graftlm.config import TrainConfig
from graftlm.errors import InputError, require_posix
from graftlm.exchange.load import measure_matmul_flops
from graftlm.files.atomic import disk_errors, write_text
from graftlm.files.formats import read_json, to_local
from graftlm.files.memory import proc_mb
from graftlm.methods import Method
from graftlm.methods.cost_model import model_flops
from graftlm.models.base import CausalLM
from graftlm.models.packed import packed_weights
from graftlm.training.checkpoint import TrainState

KEY_FILE = Path("wandb_api.json")
MetricsRow = dict[str, Any]


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did."""

    loss: float
    """Mean over the step's target tokens, pairs or examples, before the update."""
    lr: float
    grad_norm: float
    """The norm of the trained parameters' gradient, before it is clipped."""
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


# Terminal -------------------------------------------------------------------------------------------------------------


def progress_bar(console: Console) -> Bar:
    """A bar with the steps and a field `info`; it disappears when it is done."""
    what, info = TextColumn("{task.description}"), TextColumn("{task.fields[info]}")
    columns = (what, BarColumn(), MofNCompleteColumn(), info, TimeRemainingColumn())
    return Bar(*columns, console=console, transient=True)


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
        "grad_norm": done.grad_norm if math.isfinite(done.grad_norm) else None,  # a float16 gradient may overflow
        "examples_per_s": round(done.examples_per_s, 3),
        "tokens_per_s": round(done.tokens / done.seconds, 1),
        "peak_rss_mb": peak_rss_mb(),
        "seconds": round(state.seconds, 3),
    }
    return row | done.metrics | evaluated | _peak_cuda(model)


def print_eval(row: dict[str, Any], console: Console, best: dict[str, Any], documents: bool = False) -> None:
    """A validation's row, in a line; of documents with the perplexity."""
    accuracy = "" if row["val_accuracy"] is None else f"  val accuracy {row['val_accuracy']:.3f}"
    perplexity = f" (perplexity {math.exp(min(row['val_loss'], 700)):.4g})" if documents else ""
    console.print(
        f"step {row['step']:>5}  train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
        + perplexity
        + accuracy
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
    measured = {"examples_per_s": speed, "seconds": state.seconds, "peak_rss_mb": peak_rss_mb()}
    planned = {**estimate, "seconds": estimate["train_seconds"] + estimate["validation_seconds"]}
    results = {
        "steps": state.step,
        "examples": state.examples,
        "seconds": round(state.seconds, 3),
        "seconds_to_first_step": state.seconds_to_first_step,
        "examples_per_s": round(speed, 3),
        "peak_rss_mb": measured["peak_rss_mb"],
        "plan": {
            key: {"predicted": round(planned[key], 3), "measured": round(x, 3), "ratio": round(x / planned[key], 3)}
            for key, x in measured.items()
        },
        "best": state.best,
        "last": state.last,
        **_peak_cuda(model),
    }
    if model.dtype == torch.float16:
        results["skipped_steps"] = state.skipped
    return results


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
    if (peak := proc_mb("self/status", "VmHWM")) is not None:
        return peak
    resource = require_posix("resource")
    peak_rss = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return round(peak_rss * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def rss_mb() -> float:
    """The resident memory now, or the peak where the system does not report it."""
    now = proc_mb("self/status", "VmRSS")
    return peak_rss_mb() if now is None else now


def _peak_cuda(model: CausalLM) -> dict[str, float]:
    if model.device.type != "cuda":
        return {}
    return {"peak_cuda_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1)}


def _weights(model: nn.Module) -> set[int]:
    """The storages of a model's weights, packed ones too."""
    tensors = (*model.parameters(), *(packed.data for packed in packed_weights(model)))
    return {to_local(t).untyped_storage()._cdata for t in tensors}


class PeakTensorBytes(TorchDispatchMode):
    """Counts the most bytes of tensors that were created within it and alive at the same time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._sizes = dict.fromkeys(_weights(model), 0)
        self.alive = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count the storages of its results."""
        results = func(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            if isinstance(t, Tensor) and (key := (storage := t.untyped_storage())._cdata) not in self._sizes:
                weakref.finalize(storage, self._freed, key)
                self._sizes[key] = storage.nbytes()
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
        return results

    def _freed(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


@contextmanager
def saved_activation_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the bytes autograd saved within: each storage once, parameters excluded."""
    parameters = _weights(model)
    saved: dict[int, torch.UntypedStorage] = {}  # holding a storage prevents that its number is used again

    def save(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        # To be called after the pass: the gathered weights of a sharded block are freed by then.
        yield lambda: sum(storage.nbytes() for storage in saved.values())


# metrics.jsonl and its copies -----------------------------------------------------------------------------------------


class Logger(Protocol):
    """A destination for copies of the rows."""

    def log(self, row: MetricsRow) -> None:
        """One row of metrics.jsonl; a value of None was not measured at this step."""

    def close(self) -> None:
        """Called after the last row."""


class MetricsLogger:
    """Appends rows to metrics.jsonl, flushing each, and copies them to loggers."""

    def __init__(self, path: Path, loggers: Iterable[tuple[str, Logger]], warn: Callable[[str], None]) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._path = path
        self._loggers = dict(loggers)
        self._warn = warn

    def write(self, row: MetricsRow) -> None:
        """Add one row."""
        with disk_errors(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self._call_all(lambda logger: logger.log(row))

    def close(self) -> None:
        """Close the file, and the loggers."""
        try:
            with disk_errors(self._path):
                self._file.close()  # retries what a full disk refused
        finally:
            self._call_all(lambda logger: logger.close())

    def _call_all(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:  # of any kind: another library, network or disk must not stop a run
                del self._loggers[name]
                self._warn(disabled_message(name, error))


def disabled_message(name: str, error: Exception) -> str:
    """The warning about a logger that failed."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{name} failed and is disabled; metrics.jsonl continues: {what[:200]}"


def check_loggers(config: TrainConfig) -> None:
    """An InputError before anything starts if a logger's package or key is missing."""
    if config.wandb_project:
        _wandb()
        _key()
    if config.tensorboard:
        _summary_writer()


def start_loggers(
    config: TrainConfig, run: dict[str, Any], step: int, warn: Callable[[str], None]
) -> list[tuple[str, Logger]]:
    """The loggers that the flags select, by name, for a run that continues after `step`; without those that fail."""
    out_dir = Path(config.out_dir)
    selected: dict[str, Callable[[], Logger]] = {}
    if config.wandb_project:
        selected["Weights & Biases"] = lambda: Wandb(config.wandb_project, run["wandb_id"], out_dir, run["config"])
    if config.tensorboard:
        selected["TensorBoard"] = lambda: TensorBoard(out_dir / "tensorboard", step)
    started: list[tuple[str, Logger]] = []
    for name, start in selected.items():
        try:
            started.append((name, start()))
        except Exception as error:  # as in MetricsLogger
            warn(disabled_message(name, error))
    return started


class TensorBoard:
    """TensorBoard event files with one scalar per number of a row."""

    def __init__(self, folder: Path, step: int) -> None:
        # Events after the checkpoint that a run resumes from are purged from what TensorBoard shows.
        self._writer = _summary_writer()(str(folder), purge_step=step + 1)

    def log(self, row: MetricsRow) -> None:
        """Every number but the step itself, at its step."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the tensorboard package: pip install 'graftlm[tensorboard]'") from None
    return SummaryWriter


class Wandb:
    """A Weights & Biases run that a resumed run continues."""

    def __init__(self, project: str, run_id: str, out_dir: Path, config: dict[str, Any]) -> None:
        wandb = _wandb()
        if key := _key():
            os.environ["WANDB_API_KEY"] = key
        self._run = wandb.init(
            project=project, id=run_id, resume="allow", name=out_dir.name, dir=str(out_dir), config=config
        )

    def log(self, row: MetricsRow) -> None:
        """The values measured at this step."""
        self._run.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def close(self) -> None:
        """Send the remaining rows."""
        self._run.finish()


def _wandb() -> ModuleType:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError:
        raise InputError("--wandb_project needs the wandb package: pip install 'graftlm[wandb]'") from None
    return wandb


def _key() -> str | None:
    """The API key, or None if none is needed; an InputError if it is missing."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return None
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    if KEY_FILE.is_file():
        data = read_json(KEY_FILE)
        key = data.get("key") or data.get("api_key") or data.get("wandb_api_key") if isinstance(data, dict) else None
        if isinstance(key, str) and key:
            return key
        raise InputError(f'{KEY_FILE}: contains no key; write {{"key": "..."}}')
    raise InputError(
        f'--wandb_project: no key; set WANDB_API_KEY, write {{"key": "..."}} to {KEY_FILE}, or set WANDB_MODE=offline'
    )


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the rows of metrics.jsonl after `step`, and a half-written last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:  # a half-written line of a killed process, or the empty string after the last newline
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
