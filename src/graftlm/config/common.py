"""What several verbs' settings share: names of values, the check of one, flags of methods and of clusters."""

import re
from dataclasses import dataclass
from typing import Literal

from graftlm.errors import InputError

Device = str
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Checkpoint = Literal["best", "last"]
LossType = Literal["sigmoid", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"]
Style = Literal["zero-shot", "few-shot", "few-shot-cot", "zero-shot-cot"]
DemoSelection = Literal["fixed", "random", "balanced", "bm25", "embedding"]


def require(ok: bool, flag: str, value: object, allowed: str) -> None:
    """An InputError that says what the flag must be, unless the check was passed."""
    if not ok:
        raise InputError(f"--{flag} {value}: must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class MethodFlags:
    """A base model and how it is adapted."""

    init_from: str = "smollm2-135m"
    """The base model: a built-in name, a hub id (with @revision), a local folder or a .gguf file."""
    method: str = "lora"
    """How to adapt: a method's name. graft train --help lists them, each with its defaults."""
    rank: int | None = None
    """LoRA's rank r, or the width of an adapter's bottleneck; 0 means full fine-tuning. Default: the method's."""
    alpha: float | None = None
    """LoRA's alpha; the update is scaled by alpha / rank. Default: the method's."""
    targets: str | None = None
    """The linears to adapt, by role: q, k, v, o, up, gate, down. Default: the method's."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead (rsLoRA)."""
    lora_plus_ratio: float = 1.0
    """Learning rate of LoRA's B as a multiple of A's (LoRA+; its paper finds 16 good)."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """Where bottleneck adapters stand: behind attention and MLP (houlsby), or behind the MLP only (pfeiffer)."""
    add_biases: bool = False
    """For bitfit: give every linear a bias that starts at zero, in models that have none."""
    prefix_length: int = 20
    """Positions of the learned prefix."""
    prefix_hidden: int = 0
    """Width of the network that makes the prefix while it is trained; 0: the keys and values themselves are trained."""
    prefix_init: str = ""
    """A text whose tokens the prefix starts as, or random. Default: what the run's prompts begin with."""
    lora_dropout: float = 0.05
    """Dropout on the input of LoRA's A; a probability."""
    train_layers: str = ""
    """Layers to adapt, as a Python slice: 20: are all from number 20 (the 21st) on, -4: the last four. Default: all."""
    settings: str = ""
    """What a method can be told beside its flags, as name=value,name=value: its fields that no flag sets."""

    def __post_init__(self) -> None:
        require(self.rank is None or self.rank >= 0, "rank", self.rank, "0 (full fine-tuning) or more")
        require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "greater than 0")
        require(self.lora_plus_ratio > 0, "lora_plus_ratio", self.lora_plus_ratio, "greater than 0")
        require(self.prefix_length >= 1, "prefix_length", self.prefix_length, "1 or more")
        require(self.prefix_hidden >= 0, "prefix_hidden", self.prefix_hidden, "0 (no network) or more")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class RayFlags:
    """A cluster to spread the work over."""

    ray: str = ""
    """Work on a Ray cluster: auto (the one this machine belongs to), HOST:PORT of one, or local, which starts one on
    this machine alone (needs the extra: pip install 'graftlm[ray]')."""
    ray_cpus: int = 1
    """With --ray, the processor cores of a task, and its threads."""
    ray_gpus: float = 0.0
    """With --ray, the GPUs of a task: 0 (computes without), a share such as 0.5, or a whole number."""

    def __post_init__(self) -> None:
        known = self.ray in ("", "auto", "local") or re.fullmatch(r"(\w[\w.-]*|\[[0-9a-f:]+\]):\d{1,5}", self.ray)
        require(bool(known), "ray", repr(self.ray), "auto, local, or HOST:PORT as in 127.0.0.1:6379")
        require(self.ray_cpus >= 1, "ray_cpus", self.ray_cpus, "1 or more")
        whole = self.ray_gpus == int(self.ray_gpus)
        require(0 <= self.ray_gpus <= 1 or (self.ray_gpus > 1 and whole), "ray_gpus", self.ray_gpus, "0 to 1 or whole")
        for flag in ("ray_cpus", "ray_gpus"):
            if not self.ray and getattr(self, flag) != getattr(RayFlags, flag):
                raise InputError(f"--{flag} {getattr(self, flag)}: says something of a cluster; give --ray too")
