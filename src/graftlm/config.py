"""What a user can set: one frozen dataclass a verb, one documented field a flag.

The string under a field is its help text on the command line and its entry in the reference.
A default of None means "decided by the method or the run"; `run.json` records what was decided.
No torch here: `graft --help` must answer at once.
"""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from graftlm.errors import InputError

Device = str
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Checkpoint = Literal["best", "last"]
LossType = Literal["sigmoid", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"]
Style = Literal["zero-shot", "few-shot", "few-shot-cot", "zero-shot-cot"]
Choice = Literal["fixed", "random", "balanced", "bm25", "embedding"]


def _require(ok: bool, flag: str, value: object, allowed: str) -> None:
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
        _require(self.rank is None or self.rank >= 0, "rank", self.rank, "0 (full fine-tuning) or more")
        _require(self.alpha is None or self.alpha > 0, "alpha", self.alpha, "greater than 0")
        _require(self.lora_plus_ratio > 0, "lora_plus_ratio", self.lora_plus_ratio, "greater than 0")
        _require(self.prefix_length >= 1, "prefix_length", self.prefix_length, "1 or more")
        _require(self.prefix_hidden >= 0, "prefix_hidden", self.prefix_hidden, "0 (no network) or more")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MethodFlags):
    """Adapt a pretrained model to labelled text or to preferences; writes a run folder."""

    init_from: str = "smollm2-135m"
    """The base model: a built-in name, a hub id (with @revision), a local folder or a .gguf file; or a run's folder, to
    go on training what that run made of its base."""
    data: str = "rotten-tomatoes-pypi"
    """The data: a built-in name, a hub name, a folder with train/validation/test files, or one file."""
    val: str = ""
    """A file with the validation split, beside --data FILE."""
    test: str = ""
    """A file with the test split, beside --data FILE."""
    out_dir: str = "graft-run"
    """The run folder to create; it must not hold another run unless --resume is given."""
    lr: float | None = None
    """Peak learning rate of AdamW. Default: the method's; a fifth of it for --objective dpo."""
    dropout: float = 0.0
    """Dropout on embeddings, attention probabilities and residual branches; a probability."""
    batch_size: int = 16
    """Examples in one forward and backward pass."""
    grad_accum: int = 1
    """Passes added up before one optimiser step; a step sees batch_size * grad_accum examples."""
    micro_tokens: int | None = None
    """Most tokens in one forward and backward pass, padding counted, shared ones not: a larger batch runs in parts
    whose gradients add up, which bounds the memory. Default: 512 on a CPU, 0 (no bound) elsewhere."""
    max_iters: int | None = None
    """Optimiser steps of the whole run. Default: as many as --epochs need."""
    epochs: float | None = None
    """Passes over the training split. Default: 2, unless --max_iters is given."""
    eval_every: int | None = None
    """Steps between validations, each followed by a checkpoint. Default: a tenth of the run."""
    val_limit: int = 512
    """Validation examples read each time (a fixed, label-blind sample); 0 means all."""
    seed: int = 0
    """Seed of initial weights, data order and dropout."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the frozen base and of the arithmetic; trained weights are kept in float32."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that are trained on: the completion with its end-of-text, or every token."""
    objective: Literal["sft", "dpo"] = "sft"
    """What is learned from: completions (sft), or pairs of answers, one preferred to the other (dpo: fields prompt,
    chosen, rejected; see --loss_type)."""
    loss_type: LossType = "sigmoid"
    """The loss of a pair: DPO's (sigmoid), a hinge, IPO, DPO averaged over tokens, or SimPO and ORPO, which need no
    reference."""
    beta: float | None = None
    """How strongly a pair's loss holds to the reference; SimPO's scale, ORPO's lambda. Default: 0.1 (simpo: 2)."""
    label_smoothing: float = 0.0
    """The share of pairs that are thought to be labelled the wrong way round (cDPO); for sigmoid and sigmoid_norm."""
    gamma: float = 1.0
    """SimPO's target margin between the two rewards."""
    reference: str = ""
    """A run folder to take the reference's log-probabilities from, if it is of the same pairs and start. Default: they
    are computed before the first step."""
    kl_samples: int = 32
    """Answers sampled at each validation of preference training to estimate the KL to the start; 0: none."""
    shared_prefix: bool = True
    """Run the instruction that all prompts of a batch begin with once per batch; same gradients."""
    target_positions: bool = True
    """Run the head, and in the last layer all but keys and values, only where a target is predicted; same gradients."""
    fused: bool = True
    """Use gradients written out by hand (norms, rotations, gated MLP, LoRA, head and loss), equal to autograd's own."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Train with kernels compiled by this machine's C++ compiler (about a second, once): auto, from step 11 on where
    there is one; on, from the first step; off. The same gradients, rounded elsewhere."""
    buckets: bool = True
    """Put examples of similar length into a batch; without, a batch takes them as the shuffle gives them."""
    template: str = "sentiment"
    """The prompt: a built-in name, a file, or a string with {text} in it."""
    labels: str = "negative,positive"
    """The label words, by label number."""
    text_field: str = "text"
    """The field of the data that holds the text."""
    label_field: str = "label"
    """The field of the data that holds the label."""
    max_length: int | None = None
    """Longest example in tokens; longer texts are cut inside the template. Default: the model's context."""
    frozen_cache_gb: float = 8.0
    """Room on disk, in GB, for the output of frozen lower layers, computed once for the data; 0: compute each time."""
    warmup: int | None = None
    """Steps over which the learning rate rises from lr/warmup to lr. Default: 6% of the run, at most 100."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, applied to matrices only."""
    clip: float = 1.0
    """Largest global norm of a step's gradient; 0 turns clipping off."""
    patience: int = 0
    """Stop after so many validations without a better loss; 0 never stops early."""
    keep_checkpoints: bool = False
    """Keep the checkpoint of every validation, rather than the best and the last."""
    shard: bool = False
    """In several processes (torchrun): cut the frozen base over them, so that none holds all of it. Full fine-tuning
    always does."""
    plan: bool = False
    """Say what the run would take (work, speed, minutes, memory; from a short probe of this machine), and stop."""
    wandb_project: str = ""
    """Log to this Weights & Biases project too (needs the extra: pip install 'graftlm[wandb]')."""
    tensorboard: bool = False
    """Write event files for TensorBoard to the run folder too (needs the extra: pip install 'graftlm[tensorboard]')."""
    resume: bool = False
    """Go on with the run in --out_dir from its last checkpoint, exact to the bit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.lr is None or self.lr > 0, "lr", self.lr, "greater than 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        for flag in ("batch_size", "grad_accum"):
            _require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        for flag in ("max_iters", "epochs", "eval_every", "max_length"):
            value = getattr(self, flag)
            _require(value is None or value > 0, flag, value, "greater than 0")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 or more, and below 2**32")
        for flag in ("val_limit", "weight_decay", "clip", "patience", "frozen_cache_gb"):
            _require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        _require(self.micro_tokens is None or self.micro_tokens >= 0, "micro_tokens", self.micro_tokens, "0 or more")
        _require(self.warmup is None or self.warmup >= 0, "warmup", self.warmup, "0 or more")
        _require(bool(self.out_dir.strip()), "out_dir", repr(self.out_dir), "a folder's name")
        self._check_preferences()

    def _check_preferences(self) -> None:
        _require(self.beta is None or self.beta > 0, "beta", self.beta, "greater than 0")
        _require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "at least 0 and below 0.5")
        _require(self.gamma >= 0, "gamma", self.gamma, "0 or more")
        _require(self.kl_samples >= 0, "kl_samples", self.kl_samples, "0 or more")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "sigmoid_norm"):
            raise InputError(f"--label_smoothing {self.label_smoothing}: --loss_type {self.loss_type} takes none")
        if self.reference and (self.objective != "dpo" or self.loss_type in ("simpo", "orpo")):
            what = "--objective sft" if self.objective != "dpo" else f"--loss_type {self.loss_type}"
            raise InputError(f"--reference {self.reference}: {what} needs no reference; leave it out")
        if self.objective == "dpo" and self.loss_on == "all":
            raise InputError("--loss_on all: --objective dpo learns from the answers only; leave it out")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt; without --prompt, classify the test split by generation."""

    init_from: str = "resume"
    """"resume" for the run in --out_dir, or a model's name, folder or .gguf file."""
    out_dir: str = "graft-run"
    """The run folder to read when --init_from is resume."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    prompt: str | None = None
    """The text to continue; - reads standard input. Without it, the test split is classified."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Say the prompt in the model's chat template, and show the answer. auto: of a run that learned conversations."""
    data: str = ""
    """The data to classify when no prompt is given. Default: the run's, else rotten-tomatoes-pypi."""
    limit: int = 0
    """Classify so many examples only (a fixed, label-blind sample); 0 means all."""
    batch_size: int = 32
    """Prompts decoded together."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the weights and of the arithmetic."""
    max_new_tokens: int | None = None
    """Longest continuation in tokens. Default: 64 for a prompt; to classify 5, or the longest label's."""
    temperature: float = 0.0
    """Divides the logits before sampling; 0 always takes the likeliest token (greedy)."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    num_samples: int = 1
    """Continuations of the prompt."""

    def __post_init__(self) -> None:
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        for flag in ("limit", "top_k", "seed"):
            _require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        for flag in ("batch_size", "num_samples"):
            _require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        _require(
            self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more"
        )


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
        _require(bool(known), "ray", repr(self.ray), "auto, local, or HOST:PORT as in 127.0.0.1:6379")
        _require(self.ray_cpus >= 1, "ray_cpus", self.ray_cpus, "1 or more")
        whole = self.ray_gpus == int(self.ray_gpus)
        _require(0 <= self.ray_gpus <= 1 or (self.ray_gpus > 1 and whole), "ray_gpus", self.ray_gpus, "0 to 1 or whole")
        for flag in ("ray_cpus", "ray_gpus"):
            if not self.ray and getattr(self, flag) != getattr(RayFlags, flag):
                raise InputError(f"--{flag} {getattr(self, flag)}: says something of a cluster; give --ray too")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RayFlags):
    """Measure a model or a run on labelled text."""

    init_from: str = "resume"
    """"resume" for the run in --out_dir, or a model's name for its zero-shot accuracy."""
    out_dir: str = "graft-run"
    """The run folder to read when --init_from is resume."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    data: str = ""
    """The data to read. Default: the run's, else rotten-tomatoes-pypi."""
    val: str = ""
    """A file with the validation split, beside --data FILE."""
    test: str = ""
    """A file with the test split, beside --data FILE."""
    split: Literal["train", "validation", "test"] = "test"
    """The split to read."""
    shots: int = 0
    """Demonstrations before each text, out of the train split; no text that is asked about is ever one."""
    choose: Choice = "fixed"
    """Which ones: fixed (by a hash of the text), random, balanced (over the labels), or for each text those nearest to
    it, by bm25 or by the base model's embedding."""
    seed: int = 0
    """Seed of the choice of demonstrations, where it is random or balanced."""
    calibrate: bool = False
    """Take out of the label scores what the prompt answers to a text without content (contextual calibration)."""
    limit: int = 0
    """Read so many examples only (a fixed, label-blind sample); 0 means all."""
    batch_size: int = 32
    """Examples computed together."""
    read: Literal["both", "score", "generate"] = "both"
    """How an answer is read: by the labels' scores, in the generated text, or both side by side."""
    predictions: str = ""
    """A jsonl file to write, one row an example."""
    template: str = ""
    """The prompt. Default: the run's, else sentiment."""
    labels: str = ""
    """The label words by label number. Default: the run's, else negative,positive."""
    text_field: str = "text"
    """The field of the data that holds the text."""
    label_field: str = "label"
    """The field of the data that holds the label."""
    max_length: int | None = None
    """Longest example in tokens; longer texts are cut inside the template. Default: the model's context."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the weights and of the arithmetic."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("limit", "shots", "seed"):
            _require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        _require(self.max_length is None or self.max_length > 0, "max_length", self.max_length, "greater than 0")
        if self.shots and self.split == "train":
            raise InputError("--shots: demonstrations come out of the train split; read another --split")
        if self.calibrate and self.read == "generate":
            raise InputError("--calibrate: changes label scores, and --read generate reads none; use both or score")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Answer questions by prompting alone: few-shot, chain of thought, zero-shot chain of thought."""

    task: str = "electricity"
    """What to ask: electricity, arithmetic, rotten-tomatoes, imdb, or a .toml or .jsonl file (docs/prompting.md)."""
    style: Literal["all", "zero-shot", "few-shot", "few-shot-cot", "zero-shot-cot"] = "all"
    """How to ask; all: few-shot, few-shot-cot and zero-shot-cot."""
    init_from: str = "smollm2-135m"
    """A model's name, folder or .gguf file, or "resume" for the run in --out_dir."""
    out_dir: str = "graft-run"
    """The run folder to read when --init_from is resume."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    limit: int = 1
    """Questions to ask, from the first on; 0 means all. Three or fewer are shown with their answers."""
    shots: int = 8
    """Demonstrations before each question, in the few-shot styles."""
    choose: Choice = "fixed"
    """Which ones: fixed (the task's first), random, balanced (over the answers), or for each question those nearest to
    it, by bm25 or by the model's embedding."""
    seed: int = 0
    """Seed of the choice of demonstrations, where it is random or balanced, and of sampled answers."""
    task_seed: int = 0
    """Seed of the questions and demonstrations of electricity and arithmetic."""
    seeds: int = 1
    """Do all of it with so many seeds, and report each."""
    orders: int = 1
    """Show the same demonstrations in so many orders, and report each."""
    samples: int = 1
    """Answers sampled for each question, of which the most frequent counts (self-consistency)."""
    temperature: float = 0.0
    """Divides the logits before sampling; 0 always takes the likeliest token (greedy)."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: 256 with reasoning, else 24."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Ask in the model's chat template. auto: where it has one, and for a run, which was trained on plain text, not."""
    calibrate: bool = False
    """Take out of the label scores what the prompt answers to a question without content (contextual calibration)."""
    show: bool = False
    """Print the exact prompts, and stop."""
    predictions: str = ""
    """A jsonl file to write, one row an answer."""
    batch_size: int = 32
    """Questions computed together."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the weights and of the arithmetic."""

    def __post_init__(self) -> None:
        for flag in ("limit", "shots", "seed", "task_seed", "temperature"):
            _require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        for flag in ("seeds", "orders", "samples", "batch_size"):
            _require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        _require(
            self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more"
        )
        if self.shots == 0 and self.style.startswith("few-shot"):
            raise InputError(f"--shots 0: style {self.style} shows demonstrations; use zero-shot or zero-shot-cot")
        if self.samples > 1 and self.temperature == 0:
            raise InputError(f"--samples {self.samples}: all would be the same; give a --temperature, as in 0.7")


@dataclass(frozen=True, kw_only=True)
class PreferConfig:
    """Sample answers, judge them by a classifier or a command, and write pairs of a better and a worse one."""

    init_from: str = "resume"
    """The model that answers: "resume" for the run in --out_dir, or a model's name, folder or .gguf file."""
    out_dir: str = "graft-run"
    """The run folder to read when --init_from is resume."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    prompts: str
    """What to answer: a data name, folder or file with a field prompt, or with texts for --opening."""
    split: Literal["train", "validation", "test"] = "train"
    """The split to read, of data in several files; a single file is read whole."""
    opening: int = 0
    """Make prompts of the first so many words of the texts; 0: the data has prompts."""
    text_field: str = "text"
    """The field of the data that holds the text, for --opening."""
    limit: int = 0
    """Answer so many prompts only (a fixed sample); 0 means all. Equal prompts count once."""
    n: int = 2
    """Answers to each prompt."""
    max_new_tokens: int = 64
    """Longest answer in tokens; one that has not ended by then is cut, as its row will say."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 32
    """Prompts decoded, and answers judged, together."""
    judge: str = ""
    """The run folder of a classifier: the reward is its probability that prompt and answer have the label --want."""
    want: str = ""
    """The label to prefer, by word or number. Default: the judge's last, positive."""
    judge_command: str = ""
    """Instead of --judge a program (run once, without a shell): reads one {"prompt", "answer"} a line from its
    standard input and prints one number a line, higher is better."""
    margin: float = 0.0
    """Smallest difference of rewards that makes a pair; equal ones never do."""
    pairs: Literal["best", "all"] = "best"
    """Of each prompt's answers pair the best with the worst, or each with each."""
    out: str = "pairs.jsonl"
    """The jsonl file to write; it must not exist."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the weights and of the arithmetic."""

    def __post_init__(self) -> None:
        _require(bool(self.prompts.strip()), "prompts", repr(self.prompts), "a data set's name, a folder or a file")
        if bool(self.judge) == bool(self.judge_command):
            both = "name one of the two" if self.judge else "name a classifier's run folder, or give --judge_command"
            raise InputError(f"--judge{' and --judge_command' if self.judge else ''}: {both}")
        if self.judge_command and self.want:
            raise InputError(
                f"--want {self.want}: a label of the classifier that --judge names; --judge_command has none"
            )
        _require(self.n >= 2, "n", self.n, "2 or more, as a pair needs two answers")
        _require(self.temperature > 0, "temperature", self.temperature, "above 0, or all answers would be equal")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        for flag in ("opening", "limit", "top_k", "seed", "margin"):
            _require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        for flag in ("max_new_tokens", "batch_size"):
            _require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        _require(self.out.lower().endswith(".jsonl"), "out", repr(self.out), "a file's name that ends in .jsonl")


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
            _require(value is None or value > 0, flag, value, "greater than 0")
        _require(self.processes > 0, "processes", self.processes, "greater than 0")
        if self.processes == 1 and (self.shard or self.link_gbs is not None):
            flag = "shard" if self.shard else "link_gbs"
            raise InputError(f"--{flag}: add --processes N, as one process has nobody to share with")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run as a folder that PEFT or transformers loads, and prove that it is the same model."""

    out_dir: str = "graft-run"
    """The run folder to export."""
    to: str = ""
    """The folder to create; it must not exist, or be empty. Must be given."""
    merged: bool = False
    """Write a whole model, the update merged into its weights, rather than the adapter alone."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the written weights of a whole model; an adapter's are always float32."""

    def __post_init__(self) -> None:
        _require(bool(self.out_dir.strip()), "out_dir", repr(self.out_dir), "a folder's name")
        if not self.to.strip():
            raise InputError("--to: name the folder to create, as in --to my-model")


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make a run folder of an adapter's folder, PEFT's or our own, and prove that it is the same model."""

    folder: str
    """The adapter's folder."""
    out_dir: str = "graft-run"
    """The run folder to create; it must not exist, or be empty."""
    init_from: str = ""
    """The base model: a built-in name, a hub id, a local folder or a .gguf file. Default: what the adapter names."""
    template: str = "sentiment"
    """The prompt the adapter was trained with: a built-in name, a file, or a string with {text} in it."""
    labels: str = "negative,positive"
    """The label words, by label number."""

    def __post_init__(self) -> None:
        for flag in ("folder", "out_dir"):
            _require(bool(getattr(self, flag).strip()), flag, repr(getattr(self, flag)), "a folder's name")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Fetch a model or a data set and print its local folder."""

    name: str
    """A model's or a data set's name."""


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
        _require(bool(self.out_dir.strip()), "out_dir", repr(self.out_dir), "a folder's name")
        budgets = {f: v for f in ("steps", "seconds", "tflop") if (v := getattr(self, f"budget_{f}")) is not None}
        for unit, value in budgets.items():
            _require(value > 0, f"budget_{unit}", value, "greater than 0")
        if len(budgets) > 1:
            raise InputError(f"--budget_{' and --budget_'.join(budgets)}: one budget holds for all; give one of them")
        _require(self.limit >= 0, "limit", self.limit, "0 or more")
        _require(self.jobs is None or self.jobs >= 1, "jobs", self.jobs, "1 or more")


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
        _require(bool(self.folders) and all(map(str.strip, self.folders)), "folders", "''", "folders' names")
        _require(
            self.out.lower().endswith((".html", ".htm")), "out", repr(self.out), "a file's name that ends in .html"
        )
        _require(bool(self.title.strip()), "title", repr(self.title), "a text")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve a base model and adapters of it: a page to try them side by side, and an OpenAI-compatible API."""

    adapters: tuple[str, ...] = ()
    """LoRA runs (or PEFT's LoRA folders) of one base, each as FOLDER or NAME=FOLDER; NAME is what requests call it, by
    default the folder's own name."""
    init_from: str = ""
    """The base model: a built-in name, a hub id, a local folder or a .gguf file; or, without adapters, a run's folder,
    whatever its method. Default: the base that the runs were trained on; without adapters smollm2-135m."""
    host: str = "127.0.0.1"
    """The address to listen at. By default only this machine reaches it; 0.0.0.0 is open to all (give a --key)."""
    port: int = 8000
    """The port to listen at; 0 takes any free one."""
    key: str = field(default="", repr=False)
    """What requests must bring as their bearer key; best given as the environment variable GRAFT_SERVE_KEY, since other
    users of the machine can read a command's words. Default: that variable, else no key."""
    allow_hosts: tuple[str, ...] = ()
    """Further names that requests may call this server by, such as the name that a proxy in front of it has."""
    rate: int = 0
    """Requests a minute that one client address may make; 0: no limit."""
    max_rows: int = 32
    """Answers decoded together; more wait for a place."""
    max_tokens: int = 512
    """Most tokens of an answer that a request may ask for."""
    grace: float = 30.0
    """Seconds that requests in flight have to end in, once the server is told to stop."""
    template: str = ""
    """How the base is asked about a review: as in graft train. Default: its run's, else its first adapter's, else
    sentiment."""
    labels: str = ""
    """The base's label words by label number. Default: as the template's."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the weights and of the arithmetic."""

    def __post_init__(self) -> None:
        _require(bool(self.host.strip()), "host", repr(self.host), "an address, as in 127.0.0.1")
        _require(0 <= self.port < 2**16, "port", self.port, "0 (any free one) to 65535")
        for flag in ("rate", "grace"):
            _require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        for flag in ("max_rows", "max_tokens"):
            _require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        check_key(self.key, "--key")


def check_key(key: str, where: str) -> None:
    """An InputError that does not show it for a key that no header can hold."""
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"{where} (not shown): must be made of printable ASCII characters without spaces")
