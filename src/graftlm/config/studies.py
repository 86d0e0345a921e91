"""Flags of the subcommands about several runs or none: compare, report, estimate, data and completion."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from graftlm.config.flags import DataFlags, Flags, MethodFlags, bounded, require
from graftlm.config.inference import Mode, RayFlags
from graftlm.config.paths import has_suffix
from graftlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RayFlags):
    """Train and evaluate a sweep of settings under one budget; makes one table."""

    TABLES: ClassVar[dict[str, str]] = {"train": "[train]", "grid": "[grid]", "rows": "[[rows]]"}

    out_dir: str = "graft-compare"
    """The folder of the runs and the table. If given again, finished runs are not repeated."""
    budget_steps: int | None = bounded(gt=0)
    """Optimizer steps of each run."""
    budget_seconds: float | None = bounded(gt=0)
    """Training seconds of each run, as --plan predicts them on this machine before the run."""
    budget_tflop: float | None = bounded(gt=0)
    """Model FLOPs of each run, in 10^12 operations, as --plan counts them."""
    checkpoint: Literal["best", "last", "both"] = "best"
    """Which checkpoints are evaluated on the test split."""
    mode: Mode = "score"
    """How the model answers: score (the most likely label word), generate (the label word in its generated text), or
    both."""
    limit: int = bounded(0, ge=0)
    """Evaluate on only this many test examples (a fixed sample, drawn without looking at labels); 0: all."""
    jobs: int | None = bounded(ge=1)
    """Runs at the same time, each a process; they share the CPU cores. Default: 1; with --ray as many as fit."""
    init_from: str = ""
    """The base model of all rows; overrides the sweep."""
    data: str = ""
    """The data set of all rows; overrides the sweep."""
    device: str = ""
    """Where all rows compute; overrides the sweep."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.out_dir.strip()), "out_dir", repr(self.out_dir), "a folder's name")
        budgets = [f for f in ("budget_steps", "budget_seconds", "budget_tflop") if getattr(self, f) is not None]
        if len(budgets) > 1:
            raise InputError(f"--{' and --'.join(budgets)}: all runs have one budget; give one of them")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Flags):
    """Show runs on one self-contained HTML page: curves, tables, disagreements."""

    folders: tuple[str, ...]
    """Run folders, and folders of graft compare, which stand for all their runs."""
    out: str = "report.html"
    """The page to write; an existing file is replaced."""
    title: str = "graft report"
    """The page's title."""
    open: bool = False
    """Also show the page in the browser."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.folders) and all(map(str.strip, self.folders)), "folders", "''", "folders' names")
        require(has_suffix(self.out, ".html", ".htm"), "out", repr(self.out), "a file's name that ends in .html")
        require(bool(self.title.strip()), "title", repr(self.title), "a text")


@dataclass(frozen=True, kw_only=True)
class DataConfig(DataFlags):
    """Show what training would read of a data set: layout, lengths, duplicates, examples; loads no weights."""

    init_from: str = "smollm2-135m"
    """The base model whose tokenizer, chat template and context length are used: as in graft train."""
    packing: bool = False
    """As in graft train: no window holds tokens of two documents."""


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(MethodFlags):
    """Compute a method's parameters, FLOPs and memory by formula; loads no weights."""

    mlp_widths: str = ""
    """Instead of a language model a plain MLP with biases: its layer widths from input to output, as in 1024,512,1.
    --method is then full (the default), bitfit or adapter (after every layer)."""
    max_length: int | None = bounded(gt=0)
    """Tokens per text, which the attention products depend on. Default: the model's context length."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Data type of the frozen weights; trained weights are float32."""
    base_format: Literal["dense", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "dense"
    """How the frozen weights are kept in memory: in --dtype, or packed as in graft train."""
    device_gflops: float | None = bounded(gt=0)
    """Predict times at this speed, in 10^9 operations per second. Default: no prediction."""
    batch_size: int | None = bounded(gt=0)
    """Also report FLOPs per step and activation memory, for this many texts per step over all ranks."""
    world_size: int = bounded(1, gt=0)
    """Number of ranks of one run (torchrun); also report the memory and communication of each."""
    shard: bool = False
    """Shard the frozen weights across ranks. The weights of full fine-tuning are always sharded."""
    bandwidth_gbs: float | None = bounded(gt=0)
    """What a rank sends per second, in 10^9 bytes; with --device_gflops and --batch_size also report a step's
    seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world_size == 1 and self.shard:
            raise InputError("--shard needs --world_size N with N > 1")
        if self.world_size == 1 and self.bandwidth_gbs is not None:
            raise InputError("--bandwidth_gbs needs --world_size N with N > 1")
        if self.base_format != "dense" and (self.world_size > 1 or self.mlp_widths):
            with_ = "--mlp_widths" if self.mlp_widths else "--world_size"
            raise InputError(f"--base_format {self.base_format}: is estimated for one process: leave out {with_}")


@dataclass(frozen=True, kw_only=True)
class CompletionConfig(Flags):
    """Print the script that completes subcommands, flags, names and runs in a shell."""

    shell: Literal["bash", "zsh", "fish"]
    """The shell that reads the script."""
