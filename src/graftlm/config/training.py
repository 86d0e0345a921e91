"""Settings of `graft train`: the base and method, the data, the objective, the run and its machine."""

from dataclasses import dataclass
from typing import Literal

from graftlm.config.common import Device, Dtype, LossType, MethodFlags, require
from graftlm.errors import InputError


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
        require(self.lr is None or self.lr > 0, "lr", self.lr, "greater than 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        for flag in ("batch_size", "grad_accum"):
            require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        for flag in ("max_iters", "epochs", "eval_every", "max_length"):
            value = getattr(self, flag)
            require(value is None or value > 0, flag, value, "greater than 0")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 or more, and below 2**32")
        for flag in ("val_limit", "weight_decay", "clip", "patience", "frozen_cache_gb"):
            require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        require(self.micro_tokens is None or self.micro_tokens >= 0, "micro_tokens", self.micro_tokens, "0 or more")
        require(self.warmup is None or self.warmup >= 0, "warmup", self.warmup, "0 or more")
        require(bool(self.out_dir.strip()), "out_dir", repr(self.out_dir), "a folder's name")
        self._check_preferences()

    def _check_preferences(self) -> None:
        require(self.beta is None or self.beta > 0, "beta", self.beta, "greater than 0")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "at least 0 and below 0.5")
        require(self.gamma >= 0, "gamma", self.gamma, "0 or more")
        require(self.kl_samples >= 0, "kl_samples", self.kl_samples, "0 or more")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "sigmoid_norm"):
            raise InputError(f"--label_smoothing {self.label_smoothing}: --loss_type {self.loss_type} takes none")
        if self.reference and (self.objective != "dpo" or self.loss_type in ("simpo", "orpo")):
            what = "--objective sft" if self.objective != "dpo" else f"--loss_type {self.loss_type}"
            raise InputError(f"--reference {self.reference}: {what} needs no reference; leave it out")
        if self.objective == "dpo" and self.loss_on == "all":
            raise InputError("--loss_on all: --objective dpo learns from the answers only; leave it out")
