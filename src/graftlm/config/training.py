"""Flags of `graft train`, in groups; other subcommands share some of them.

The first line of a group's docstring is its title on the help page.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from graftlm.config.flags import DataFlags, Flags, MethodFlags, bounded, flag_group, require

Device = str
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
BaseFormat = Literal["auto", "dense", "stored", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
Checkpoint = Literal["best", "last"]
OBJECTIVES = tuple(
    sorted(file.stem for file in (Path(__file__).parents[1] / "training" / "objectives").glob("[!_]*.py"))
)
"""The training objectives: one file each."""


def method_titles() -> dict[str, str]:
    """What each method is, by its name: the first line of its file, read without importing torch."""
    texts = {
        file.stem: file.read_text(encoding="utf-8")
        for file in sorted((Path(__file__).parents[1] / "methods").glob("*.py"))
    }
    return {
        name: text.removeprefix('"""').partition("\n")[0]
        for name, text in texts.items()
        if "    name: ClassVar[str] = " in text
    }


if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[OBJECTIVES]
LossType = Literal["sigmoid", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"]


@flag_group
class OptimizerFlags(Flags):
    """Optimizer and schedule."""

    lr: float | None = bounded(gt=0)
    """Peak learning rate of AdamW. Default: the method's (LoRA: 2.5e-4); a fifth of it with --objective dpo or kto."""
    batch_size: int = bounded(16, ge=1)
    """Examples per forward and backward pass."""
    grad_accum: int = bounded(1, ge=1)
    """Batches accumulated per optimizer step: a step uses batch_size * grad_accum examples."""
    max_iters: int | None = bounded(gt=0)
    """Optimizer steps of the whole run. Default: as many as --epochs needs."""
    epochs: float | None = bounded(gt=0)
    """Passes over the training split. Default: 2, unless --max_iters is given."""
    warmup_steps: int | None = bounded(ge=0)
    """Steps over which the learning rate rises linearly to its peak. Default: 6% of the run, at most 100."""
    weight_decay: float = bounded(0.0, ge=0)
    """AdamW's decoupled weight decay, applied to matrices only."""
    grad_clip: float = bounded(1.0, ge=0)
    """Maximum global norm of a step's gradient; 0: no clipping."""
    dropout: float = 0.0
    """Dropout on embeddings, attention probabilities and residual branches, a probability."""
    patience: int = bounded(0, ge=0)
    """Stop after this many validations without a lower loss (early stopping); 0: never."""
    seed: int = 0
    """Random seed of weight initialisation, data order and dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 or more, and below 2**32")


@flag_group
class ObjectiveFlags(Flags):
    """Objective and preferences."""

    objective: ObjectiveName = "sft"
    """Train on completions (sft), on preference pairs (dpo: fields prompt, chosen, rejected; see --loss_type), or on
    answers marked as desirable or not (kto: fields prompt, completion, label)."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens in the loss: those of the completion, including end-of-text, or all."""
    loss_type: LossType = "sigmoid"
    """Preference loss: sigmoid (DPO), hinge, ipo, sigmoid_norm (DPO averaged over tokens), or simpo and orpo, which
    need no reference model."""
    beta: float | None = bounded(gt=0)
    """Beta of DPO and KTO: strength of the KL penalty to the reference model; also SimPO's scale and ORPO's lambda.
    Default: 0.1 (simpo: 2)."""
    desirable_weight: float = bounded(1.0, ge=0)
    """KTO's weight of a desirable answer's loss; with undesirable_weight it balances unequal numbers of both."""
    undesirable_weight: float = bounded(1.0, ge=0)
    """KTO's weight of an undesirable answer's loss."""
    label_smoothing: float = 0.0
    """Assumed fraction of pairs labelled the wrong way round (cDPO); for sigmoid and sigmoid_norm."""
    gamma: float = bounded(1.0, ge=0)
    """SimPO's target margin between the rewards of chosen and rejected."""
    reference: str = ""
    """A run folder to take the reference log-probabilities from; it must have the same pairs and initial weights.
    Default: compute them before the first step."""
    kl_samples: int = bounded(32, ge=0)
    """Completions sampled at each validation of preference training to estimate the KL to the reference; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "at least 0 and below 0.5")


@flag_group
class SpeedFlags(Flags):
    """Speed and memory."""

    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Data type of the frozen base and of the arithmetic; trained weights are float32."""
    base_format: BaseFormat = "auto"
    """How the frozen base is kept in memory: dense (in --dtype), stored (the blocks of a .gguf file, or 16 bits), or
    packed to bf16, f16, q8_0, q5_1, q5_0, q4_1 or q4_0. auto: dense if that takes at most half of the free memory, else
    stored."""
    kernels: Literal["auto", "cpp", "torch"] = "auto"
    """Kernels of the fused operations: cpp (compiled with this machine's C++ compiler, about a second, once), torch, or
    auto (cpp from step 11 on if there is a compiler). Equal up to rounding."""
    microbatch_tokens: int | None = bounded(ge=0)
    """Maximum number of tokens per forward and backward pass, padding included, a shared prefix excluded; larger
    batches are split into micro-batches whose gradients are accumulated. Default: 512 on a CPU, 0 (no limit)
    elsewhere."""
    group_by_length: bool = True
    """Put examples of similar length into one batch."""
    packing: bool = False
    """Pack the examples of a batch into rows of at most --max_length tokens instead of padding each. Examples attend to
    themselves alone, so the results are the same; batch_size still counts examples, not rows as in TRL. Of documents
    each is split on its own: no window holds tokens of two."""
    activation_cache_gb: float = bounded(8.0, ge=0)
    """Maximum size on disk, in GB, of the cached hidden states of frozen lower layers; 0: recompute them each time."""
    shared_prefix: bool = True
    """Compute the instruction that all prompts of a batch share once per batch. Same gradients."""
    target_positions: bool = True
    """Compute logits (and the last layer's queries and MLP) only at target positions. Exact; saves time."""
    fused: bool = True
    """Use fused autograd functions for norms, RoPE, gated MLP, LoRA and the loss, instead of autograd's own
    backward."""
    shard: bool = False
    """With torchrun: shard the frozen base across ranks. Full fine-tuning is always sharded."""


@flag_group
class LoggingFlags(Flags):
    """Validation, checkpoints and logging."""

    eval_every: int | None = bounded(gt=0)
    """Steps between validations; each saves a checkpoint. Default: a tenth of the run."""
    val_limit: int = bounded(512, ge=0)
    """Number of validation examples, or of documents (a fixed sample, drawn without looking at labels); 0: all."""
    keep_checkpoints: bool = False
    """Keep the checkpoint of every validation, instead of only the best and the last."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project (needs the extra: pip install 'graftlm[wandb]')."""
    tensorboard: bool = False
    """Also write TensorBoard event files to the run folder (needs the extra: pip install 'graftlm[tensorboard]')."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MethodFlags, DataFlags, OptimizerFlags, ObjectiveFlags, SpeedFlags, LoggingFlags):
    """Fine-tune a pretrained model on labelled text, conversations or preferences; writes a run folder."""

    MAIN: ClassVar = (
        *("init_from", "method", "rank", "alpha", "targets", "data", "columns", "template", "labels", "objective"),
        *("lr", "batch_size", "epochs", "max_iters", "out_dir", "resume", "plan"),
    )

    init_from: str = "smollm2-135m"
    """The base model: a built-in name, a hub id (with @revision), a local folder or a .gguf file; or a run folder, to
    continue from what that run trained."""
    out_dir: str = "graft-run"
    """The run folder to create; it must not hold another run unless --resume is given."""
    resume: bool = False
    """Resume the run in --out_dir from its last checkpoint, bit-exactly."""
    plan: bool = False
    """Estimate time, memory and model FLOPs of the run from a short measurement on this machine, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.out_dir.strip()), "out_dir", repr(self.out_dir), "a folder's name")
