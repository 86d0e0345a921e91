"""Flags that several subcommands share, each group a dataclass, and the checks of their values.

The first line of a group's docstring is its title on the help page.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftlm.errors import InputError

Device = str
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Checkpoint = Literal["best", "last"]
OBJECTIVES = tuple(
    sorted(file.stem for file in (Path(__file__).parents[1] / "training" / "objectives").glob("[!_]*.py"))
)
"""The training objectives: one file each."""
if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[OBJECTIVES]
LossType = Literal["sigmoid", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"]
Style = Literal["zero-shot", "few-shot", "few-shot-cot", "zero-shot-cot"]
DemoSelection = Literal["fixed", "random", "balanced", "bm25", "embedding"]
Mode = Literal["both", "score", "generate"]


def require(ok: bool, flag: str, value: object, allowed: str) -> None:
    """Raise an InputError that says what the flag must be, unless `ok`."""
    if not ok:
        raise InputError(f"--{flag} {value}: must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The base of all groups of flags."""

    def __post_init__(self) -> None:
        """Check the values; subclasses extend this and call it first. Raises InputError."""

    def require_at_least(self, least: int, *flags: str) -> None:
        """Raise an InputError for the first of these flags that is set to less."""
        for flag in flags:
            value = getattr(self, flag)
            require(value is None or value >= least, flag, value, f"{least} or more")

    def require_positive(self, *flags: str) -> None:
        """Raise an InputError for the first of these flags that is set to 0 or less."""
        for flag in flags:
            value = getattr(self, flag)
            require(value is None or value > 0, flag, value, "greater than 0")


@dataclass(frozen=True, kw_only=True)
class MethodFlags(Flags):
    """Model and method."""

    init_from: str = "smollm2-135m"
    """The base model: a built-in name, a hub id (with @revision), a local folder or a .gguf file."""
    method: str = "lora"
    """The fine-tuning method; graft train --help lists them."""
    rank: int | None = None
    """Rank r of LoRA and DoRA, or the bottleneck width of adapters; 0 means full fine-tuning. Default: the method's
    (LoRA: 128)."""
    alpha: float | None = None
    """LoRA's alpha; the update is scaled by alpha / rank. Default: the method's (LoRA: 512)."""
    targets: str | None = None
    """The linear layers to adapt, comma-separated: q, k, v, o, up, gate, down. Default: the method's (LoRA: q,k,v)."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead (rsLoRA)."""
    lora_plus_ratio: float = 1.0
    """Learning rate of LoRA's B divided by that of A (LoRA+; its paper recommends 16)."""
    lora_dropout: float = 0.05
    """Dropout on the input of LoRA's A, a probability."""
    adapter_placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """Where bottleneck adapters are inserted: after attention and MLP (houlsby), or after the MLP only (pfeiffer)."""
    add_biases: bool = False
    """For bitfit: add a zero-initialised bias to every linear layer of models without biases."""
    prefix_length: int = 20
    """Length of the learned prefix, in positions."""
    prefix_hidden: int = 0
    """Hidden width of the MLP that reparametrises the prefix during training; 0: train keys and values directly."""
    prefix_init: str = ""
    """Text whose tokens initialise the prefix, or random. Default: the common beginning of the run's prompts."""
    train_layers: str = ""
    """Layers to adapt, as a Python slice: 20: means from layer 20 (the 21st) on, -4: the last four. Default: all."""
    method_args: str = ""
    """Extra method settings as name=value,name=value, for fields without a flag of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank is None or self.rank >= 0, "rank", self.rank, "0 (full fine-tuning) or more")
        self.require_positive("alpha", "lora_plus_ratio")
        self.require_at_least(1, "prefix_length")
        require(self.prefix_hidden >= 0, "prefix_hidden", self.prefix_hidden, "0 (no network) or more")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class DataFlags(Flags):
    """Data."""

    data: str = "rotten-tomatoes-pypi"
    """The data set: a built-in name, a hub name, a folder with train/validation/test files, or one file."""
    val_data: str = ""
    """A file with the validation split, given together with --data FILE."""
    test_data: str = ""
    """A file with the test split, given together with --data FILE."""
    columns: str = ""
    """Which columns of the data to read, as text=sentence,label=stars. Default: the record layout is recognised by
    its columns: text, label; prompt, completion; prompt, chosen, rejected; messages; instruction, input, output."""
    template: str = "sentiment"
    """The prompt template: a built-in name (sentiment, question, plain), a file, or a string with {text} in it."""
    labels: str = "negative,positive"
    """The label words, comma-separated, in the order of the label numbers."""
    max_length: int | None = None
    """Maximum length of an example in tokens; longer texts are truncated inside the template. Default: the model's
    context length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("max_length")
        parse_columns(self.columns)


def parse_columns(text: str) -> dict[str, str]:
    """Column by field, from "field=column,field=column"; a layout reads the fields (`text/layouts.py`)."""
    columns: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, column = map(str.strip, part.partition("="))
        if not name or not column or name in columns:
            raise InputError(
                f"--columns {part}: must be FIELD=COLUMN, each field once, as in text=sentence,label=stars"
            )
        columns[name] = column
    return columns


@dataclass(frozen=True, kw_only=True)
class RunFlags(Flags):
    """Model."""

    init_from: str = "resume"
    """"resume" for the run in --out_dir, or a model's name, folder or .gguf file."""
    out_dir: str = "graft-run"
    """The run folder to read when --init_from is resume."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    batch_size: int = 32
    """Examples per batch."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Data type of weights and arithmetic."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "batch_size")


def bounded(default: float, **bounds: float) -> Any:
    """A field with bounds: ge, gt and le, as in pydantic, whose models of HTTP requests take them over."""
    return field(default=default, metadata=bounds)


def describe_bounds(bounds: Mapping[str, float]) -> str:
    """The numbers that bounds allow, in words: "0 or more", "above 0 and at most 1"."""
    if "gt" in bounds:
        return f"above {bounds['gt']}" + (f" and at most {bounds['le']}" if "le" in bounds else "")
    return f"from {bounds['ge']} to {bounds['le']}" if "le" in bounds else f"{bounds['ge']} or more"


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(Flags):
    """Sampling."""

    temperature: float = bounded(0.0, ge=0)
    """Divides the logits before sampling; 0 is greedy decoding. Then top_k, top_p and min_p filter, in this order."""
    top_k: int = bounded(0, ge=0)
    """Sample from the k most likely tokens only; 0: from all."""
    top_p: float = bounded(1.0, gt=0, le=1)
    """Sample from the most likely tokens whose probabilities add up to this (nucleus sampling)."""
    min_p: float = bounded(0.0, ge=0, le=1)
    """Sample from tokens at least this many times as probable as the most likely one (min-p sampling); 0: from all."""
    seed: int = bounded(0, ge=0)
    """Random seed of the sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in fields(SamplingFlags):
            value, low, above, high = getattr(self, f.name), *map(f.metadata.get, ("ge", "gt", "le"))
            ok = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
            require(ok and isfinite(value), f.name, value, describe_bounds(f.metadata))


@dataclass(frozen=True, kw_only=True)
class RayFlags(Flags):
    """Ray cluster."""

    ray: str = ""
    """Run on a Ray cluster: auto (the one this machine belongs to), HOST:PORT, or local, which starts one on this
    machine only (needs the extra: pip install 'graftlm[ray]')."""
    cpus_per_task: int = 1
    """CPU cores, and threads, of a task; only with --ray."""
    gpus_per_task: float = 0.0
    """GPUs of a task: 0, a fraction such as 0.5, or a whole number; only with --ray."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.ray in ("", "auto", "local") or re.fullmatch(r"(\w[\w.-]*|\[[0-9a-f:]+\]):\d{1,5}", self.ray)
        require(bool(known), "ray", repr(self.ray), "auto, local, or HOST:PORT as in 127.0.0.1:6379")
        self.require_at_least(1, "cpus_per_task")
        gpus = self.gpus_per_task
        require(0 <= gpus <= 1 or (gpus > 1 and gpus == int(gpus)), "gpus_per_task", gpus, "0 to 1 or whole")
        for flag in ("cpus_per_task", "gpus_per_task"):
            if not self.ray and getattr(self, flag) != getattr(RayFlags, flag):
                raise InputError(f"--{flag} only applies together with --ray; add it, or leave --{flag} out")
