"""Settings of the verbs that look at several runs or at none: compare, report and account."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from graftlm.config.common import MethodFlags, RayFlags, require
from graftlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RayFlags):
    """Train and measure many settings under one budget; makes one table."""

    TABLES: ClassVar[tuple[str, ...]] = ("train", "grid", "rows")

    out_dir: str = "graft-compare"
    """The folder that holds the runs and the table. Given again, what is done there is not done again."""
    budget_steps: int | None = None
    """Optimiser steps of each run."""
    budget_seconds: float | None = None
    """Seconds of optimiser steps of each run, as --plan sees this machine before the run's start."""
    budget_tflop: float | None = None
    """Needed work of each run in the layers' matrices, 10^12 operations, as --plan counts it."""
    checkpoint: Literal["best", "last", "both"] = "best"
    """Which checkpoints are measured on the test split."""
    read: Literal["both", "score", "generate"] = "score"
    """How an answer is read: by the labels' scores, in the generated text, or both."""
    limit: int = 0
    """Measure on so many examples of the test split only (a fixed, label-blind sample); 0 means all."""
    jobs: int | None = None
    """Runs at the same time, each a process; the processor's cores are divided between them. Default: 1, and with --ray
    as many as the cluster has room for."""
    init_from: str = ""
    """The base model of all rows, whatever the sweep says."""
    device: str = ""
    """Where all rows compute, whatever the sweep says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.out_dir.strip()), "out_dir", repr(self.out_dir), "a folder's name")
        budgets = {f: v for f in ("steps", "seconds", "tflop") if (v := getattr(self, f"budget_{f}")) is not None}
        for unit, value in budgets.items():
            require(value > 0, f"budget_{unit}", value, "greater than 0")
        if len(budgets) > 1:
            raise InputError(f"--budget_{' and --budget_'.join(budgets)}: one budget holds for all; give one of them")
        require(self.limit >= 0, "limit", self.limit, "0 or more")
        require(self.jobs is None or self.jobs >= 1, "jobs", self.jobs, "1 or more")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Show runs beside each other on one page of HTML: curves, tables, where they disagree; needs no network."""

    folders: tuple[str, ...]
    """Run folders, and folders of graft compare, which stand for all their runs."""
    out: str = "report.html"
    """The page to write; a file of that name is replaced."""
    title: str = "graft report"
    """The page's title."""

    def __post_init__(self) -> None:
        require(bool(self.folders) and all(map(str.strip, self.folders)), "folders", "''", "folders' names")
        require(self.out.lower().endswith((".html", ".htm")), "out", repr(self.out), "a file's name that ends in .html")
        require(bool(self.title.strip()), "title", repr(self.title), "a text")


@dataclass(frozen=True, kw_only=True)
class AccountConfig(MethodFlags):
    """Count a method's parameters, work and memory by formula; no weights are loaded."""

    ffn: str = ""
    """Instead of a model a plain feed-forward net with biases: the widths of its layers, the input's first, as in
    1024,512,1. --method is then full (the default), bitfit or adapter (behind every layer)."""
    max_length: int | None = None
    """Tokens of a text, on which attention's own products depend. Default: all that the model reads."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the frozen weights; trained weights are kept in float32."""
    gflops: float | None = None
    """Predict times at this speed, in 10^9 operations a second. Default: no prediction, as no speed is known."""
    batch_size: int | None = None
    """Texts of one step, in all processes together: adds what a step computes and what it keeps for the way back."""
    processes: int = 1
    """Processes of one run (torchrun): adds what each of them holds and sends."""
    shard: bool = False
    """Cut the frozen weights over the processes, too; what full fine-tuning trains always is."""
    link_gbs: float | None = None
    """What a process sends in a second, in 10^9 bytes: with --gflops and --batch_size adds the seconds of a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("max_length", "gflops", "batch_size", "link_gbs"):
            value = getattr(self, flag)
            require(value is None or value > 0, flag, value, "greater than 0")
        require(self.processes > 0, "processes", self.processes, "greater than 0")
        if self.processes == 1 and (self.shard or self.link_gbs is not None):
            flag = "shard" if self.shard else "link_gbs"
            raise InputError(f"--{flag}: add --processes N, as one process has nobody to share with")
