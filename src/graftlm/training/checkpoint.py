"""Atomic checkpoints, exact resume, best and last.

    out_dir/checkpoints/step-N/   a PEFT adapter folder (full fine-tuning: a Hugging Face model folder), and in it
        optimizer.safetensors     AdamW's exp_avg and exp_avg_sq of every trained tensor, float32
        trainer_state.json        the train state: step, examples, best validation, times
        trainable.safetensors     the trained tensors, where the adapter folder holds only values derived from them
    out_dir/best, out_dir/last    links to two of them

Sharded full fine-tuning saves one file of weights and optimizer state per rank, with an index (`files/sharded.py`).
When the run ends they are consolidated into the single file that one process would have written. Readers of
checkpoints, transformers included, read both, on any number of ranks.

No random state is saved: data order, dropout and initial weights are pure functions of (seed, step). So weights,
optimizer state and the step number are the whole state, and a resumed run equals one that never stopped, to the bit.
A folder appears under its name only when it is complete, links are swapped atomically, and `prune` repairs what a
process killed between these steps leaves.
"""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.config.renamed import upgrade_state
from graftlm.errors import InputError
from graftlm.exchange.endings import write_generation_config, write_tokenizer
from graftlm.exchange.huggingface import (
    iter_local_shards,
    lazy_state_dict,
    read_adapter,
    save_adapter,
    save_config,
    save_model,
)
from graftlm.exchange.load import ModelBundle
from graftlm.files.atomic import atomic_directory, atomic_symlink, write_json
from graftlm.files.formats import (
    LazyTensor,
    LazyTensors,
    consolidate,
    load_safetensors,
    local_rows,
    read_json,
    read_weights,
    remove_weights,
    save_safetensors,
    save_sharded,
    to_local,
    wrap_like,
)
from graftlm.methods import Method
from graftlm.methods.base import load_trainable_state_dict, trainable, trainable_state_dict
from graftlm.models.base import CausalLM
from graftlm.training.distributed import DistContext

OPTIMIZER, STATE, TRAINABLE = "optimizer.safetensors", "trainer_state.json", "trainable.safetensors"
OLD_STATE, OLD_TRAINABLE = "progress.json", "trained.safetensors"
"""Their names in run folders of version 0.1."""
FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000
_STATE_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """The state of a run after `step` optimizer steps, apart from the tensors."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Wall seconds of training, without pauses between a stop and its resume."""
    timed_examples: int = 0
    """Examples of the steps that are timed: all but the first 5%."""
    timed_seconds: float = 0.0
    timed_model_tokens: int = 0
    """Tokens of the timed steps, with a batch's shared prefix counted once."""
    seconds_to_first_step: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)
    """step, val_loss, val_accuracy of the latest validation."""
    best: dict[str, Any] = field(default_factory=dict)
    """The same of the validation with the lowest loss."""
    evals_since_best: int = 0
    """Validations since the best."""
    loss_scale: float = 1.0
    """Factor of the loss in float16, against underflow of small gradients (Micikevicius et al. 2018)."""
    steps_since_overflow: int = 0
    """Steps since the scale last changed."""
    skipped: int = 0
    """Steps that changed no weight, because their gradient overflowed."""

    def update_loss_scale(self, finite: bool) -> None:
        """After a float16 step: halve the scale after an overflow, double it after GROWTH_STEPS without one."""
        self.steps_since_overflow += 1
        if not finite:
            self.loss_scale, self.steps_since_overflow, self.skipped = self.loss_scale / 2, 0, self.skipped + 1
        elif self.steps_since_overflow == GROWTH_STEPS:
            self.loss_scale, self.steps_since_overflow = self.loss_scale * 2, 0

    def update_best(self, loss: float, accuracy: float | None, own: Mapping[str, float]) -> None:
        """Record a validation at the current step, with the caller's metrics, and whether it is the best so far."""
        self.last = {"step": self.step, "val_loss": loss, "val_accuracy": accuracy, **own}
        better = not self.best or loss < self.best["val_loss"]
        self.evals_since_best = 0 if better else self.evals_since_best + 1
        if better:
            self.best = dict(self.last)


@dataclass(frozen=True)
class CheckpointManager:
    """The checkpoints of one run folder."""

    out_dir: Path
    method: Method
    base_name: str
    revision: str | None
    base: ModelBundle
    """The base, with the run's run.json, which says what the run teaches."""
    keep_all: bool = False
    """Whether checkpoints that are neither best nor last are kept."""
    dist: DistContext = field(default_factory=DistContext)
    """This rank. Of sharded weights each rank writes its part; everything else is written by rank 0."""

    @property
    def _folder(self) -> Path:
        return self.out_dir / "checkpoints"

    def save(self, model: CausalLM, optimizer: torch.optim.Optimizer, state: TrainState) -> Path:
        """Write checkpoints/step-N and update the links `last` and `best`; returns the folder."""
        target = self._folder / f"step-{state.step}"
        with self.dist.same_error_on_all_ranks():
            if self.writes_sharded:
                self._save_sharded(target, model, optimizer, state)
            elif self.dist.is_main:
                with atomic_directory(target) as temp:
                    self._save_weights(temp, model)
                    save_safetensors(temp / OPTIMIZER, _optimizer_state(model, optimizer))
                    write_json(temp / STATE, asdict(state))
            if self.dist.is_main:
                atomic_symlink(self.out_dir / "last", f"checkpoints/{target.name}")
                self.prune(state)
        return target

    @property
    def writes_sharded(self) -> bool:
        """Whether every rank writes a part, because the trained weights are sharded."""
        return self.dist.size > 1 and self.method.is_full_finetune

    def _save_sharded(self, target: Path, model: CausalLM, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Write the folder, each rank its part; an error on one is raised on all, and nothing is left."""
        dist = self.dist
        with ExitStack() as stack:
            with dist.same_error_on_all_ranks():
                target_dir = stack.enter_context(atomic_directory(target)) if dist.is_main else Path()
            temp = Path(dist.broadcast_object(str(target_dir.resolve())))
            with dist.same_error_on_all_ranks():
                save_sharded(
                    temp, "model", lazy_state_dict(model, dict(model.named_parameters())), dist.rank, dist.size
                )
            with dist.same_error_on_all_ranks():
                lazy = {name: LazyTensor.of(t) for name, t in _optimizer_state(model, optimizer).items()}
                save_sharded(temp, "optimizer", lazy, dist.rank, dist.size)
            with dist.same_error_on_all_ranks():
                if dist.is_main:
                    save_config(temp, model.config, self.base.folder, next(model.parameters()).dtype)
                    self._save_endings(temp)
                    write_json(temp / STATE, asdict(state))

    def consolidate(self) -> None:
        """Turn folders written by several ranks into those of a single process; idempotent."""
        with self.dist.same_error_on_all_ranks():
            if self.dist.is_main and self.method.is_full_finetune:
                for folder in self._folder.iterdir():
                    for stem in ("model", "optimizer"):
                        consolidate(folder, stem)

    def _save_weights(self, folder: Path, model: CausalLM) -> None:
        if not self.method.is_full_finetune:
            save_adapter(folder, model, self.method, self.base_name, self.revision)
            if not self.method.resumable_from_adapter:
                save_safetensors(folder / TRAINABLE, trainable_state_dict(model))
            return
        save_model(folder, model, dict(model.named_parameters()), self.base.folder)
        self._save_endings(folder)

    def _save_endings(self, folder: Path) -> None:
        write_tokenizer(folder, self.base)
        write_generation_config(folder, self.base)

    def prune(self, state: TrainState) -> None:
        """Make `best` and the set of folders agree with the latest checkpoint's state; idempotent."""
        last, best = f"step-{state.step}", f"step-{state.best['step']}" if state.best else ""
        if best:
            atomic_symlink(self.out_dir / "best", f"checkpoints/{best}")
        for folder in self._folder.iterdir():
            kept = folder.name in (last, best) or (self.keep_all and folder.name.startswith("step-"))
            if not kept:
                shutil.rmtree(folder)
            elif folder.name != last:
                # Only the latest is resumed from, and optimizer state is twice as large as the weights.
                remove_weights(folder, "optimizer")
                for name in (TRAINABLE, OLD_TRAINABLE):
                    (folder / name).unlink(missing_ok=True)

    def latest(self) -> Path | None:
        """The folder that `last` points to; None if the run has saved nothing yet."""
        last = self.out_dir / "last"
        return last if (last / STATE).is_file() or (last / OLD_STATE).is_file() else None

    def load_checkpoint(self, model: CausalLM, optimizer: torch.optim.Optimizer) -> TrainState:
        """Load the latest checkpoint into model and optimizer; a fresh TrainState if there is none."""
        folder = self.latest()
        if folder is None:
            return TrainState()
        state = TrainState(**upgrade_state(read_json(_existing(folder, STATE, OLD_STATE))))
        if self.method.is_full_finetune:
            with torch.no_grad():
                for name, rows in iter_local_shards(model, folder, trainable(model)):
                    to_local(model.get_parameter(name)).copy_(rows)
        else:
            saved = _existing(folder, TRAINABLE, OLD_TRAINABLE)
            tensors = load_safetensors(saved) if saved.is_file() else read_adapter(folder, model.config, self.method)
            load_trainable_state_dict(model, tensors, str(folder))
        _set_optimizer_state(
            model, optimizer, read_weights(folder, "optimizer"), state.step - state.skipped, folder / OPTIMIZER
        )
        if self.dist.is_main:
            self.prune(state)
        return state


def _existing(folder: Path, name: str, old: str) -> Path:
    """The file of that name, or the one that version 0.1 wrote."""
    return folder / old if (folder / old).is_file() else folder / name


def _optimizer_state(model: CausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    def value_of(p: Tensor, m: str) -> Tensor:  # the state is empty before the first update
        value: Tensor = optimizer.state[p][m] if p in optimizer.state else torch.zeros_like(p)
        return value

    return {f"{name}.{m}": value_of(p, m) for name, p in trainable(model).items() for m in _STATE_KEYS}


def _set_optimizer_state(
    model: CausalLM, optimizer: torch.optim.Optimizer, saved: LazyTensors, step: int, where: Path
) -> None:
    for name, p in trainable(model).items():
        loaded = {}
        for m in _STATE_KEYS:
            key, rows = f"{name}.{m}", local_rows(p)
            if key not in saved or saved.shape(key) != p.shape:
                raise InputError(f"{where}: {key} is missing or has another shape; this checkpoint is of another run")
            values = torch.empty_like(to_local(p))
            if rows:
                values.copy_(saved.part(key, slice(rows.start, rows.stop)) if p.dim() else saved[key])
            loaded[m] = wrap_like(p, values)
        optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **loaded}
