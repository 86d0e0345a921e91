"""Atomic checkpoints, exact resume, best and last.

    out_dir/checkpoints/step-N/   an exchange folder (PEFT's, or Hugging Face's for full fine-tuning), and beside it
        optimizer.safetensors     AdamW's two moments of every trained tensor, float32
        trainer_state.json        where the run stands: step, examples, best so far, times
        trainable.safetensors     what is trained, where the exchange folder only tells what it comes to
    out_dir/best, out_dir/last    links to two of them

Sharded full fine-tuning saves one file of weights and optimizer state per rank, with an index (`files/sharded.py`),
until the run ends: then they are consolidated into the one that a single process would have written. All that reads a
checkpoint, transformers included, reads both, and so does any number of processes. What is unusual here: nothing
random has to be saved. Data order, dropout and initial weights are pure functions of (seed, step), so weights,
moments and the step number are the whole state, and a resumed run equals one that never stopped, to the bit. A folder
appears under its name only when it is complete, links are swapped atomically, and a run killed between two of these
steps is put right by `repair`.
"""

import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.config.renamed import upgrade_state
from graftlm.errors import InputError
from graftlm.exchange.adapters import read_adapter, save_adapter
from graftlm.exchange.huggingface import iter_local_shards, lazy_state_dict, save_config, save_model
from graftlm.files.atomic import atomic_directory, atomic_symlink, write_json, write_text
from graftlm.files.formats import LazyTensors, load_safetensors, read_json, read_weights, save_safetensors
from graftlm.files.sharded import LazyTensor, consolidate, local_rows, remove_weights, save_sharded, to_local, wrap_like
from graftlm.methods import Method
from graftlm.methods.base import load_trainable_state_dict, trainable, trainable_state_dict
from graftlm.models.base import CausalLM
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.distributed import DistContext

OPTIMIZER, STATE, TRAINABLE = "optimizer.safetensors", "trainer_state.json", "trainable.safetensors"
OLD_STATE, OLD_TRAINABLE = "progress.json", "trained.safetensors"
"""Their names in run folders of version 0.1."""
FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """Where a run stands after `step` optimiser steps."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Wall seconds since the first start, pauses between a stop and its resume apart."""
    timed_examples: int = 0
    """Examples of the steps that count for examples_per_s: all but the first 5%."""
    timed_seconds: float = 0.0
    timed_model_tokens: int = 0
    """Tokens of the same steps, what a batch's prompts begin with counted once for each batch."""
    seconds_to_first_step: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)
    """step, val_loss, val_accuracy of the latest validation."""
    best: dict[str, Any] = field(default_factory=dict)
    """The same of the validation with the lowest loss."""
    evals_since_best: int = 0
    """Validations since the best."""
    loss_scale: float = 1.0
    """What the loss is multiplied by in float16, so that small gradients do not vanish (Micikevicius et al. 2018)."""
    steps_since_overflow: int = 0
    """Steps since the scale last changed."""
    skipped: int = 0
    """Steps whose gradient overflowed at the scale they had: they changed no weight."""

    def update_loss_scale(self, finite: bool) -> None:
        """Take note of a float16 step: half the scale behind an overflow, twice behind GROWTH_STEPS without one."""
        self.steps_since_overflow += 1
        if not finite:
            self.loss_scale, self.steps_since_overflow, self.skipped = self.loss_scale / 2, 0, self.skipped + 1
        elif self.steps_since_overflow == GROWTH_STEPS:
            self.loss_scale, self.steps_since_overflow = self.loss_scale * 2, 0

    def update_best(self, loss: float, accuracy: float | None) -> bool:
        """Take note of a validation at the present step; True if it is the best so far."""
        self.last = {"step": self.step, "val_loss": loss, "val_accuracy": accuracy}
        better = not self.best or loss < self.best["val_loss"]
        self.evals_since_best = 0 if better else self.evals_since_best + 1
        if better:
            self.best = dict(self.last)
        return better


@dataclass(frozen=True)
class CheckpointManager:
    """The checkpoints of one run folder."""

    out_dir: Path
    method: Method
    base_name: str
    revision: str | None
    base_folder: Path
    tokenizer: Tokenizer
    keep_all: bool = False
    """Whether checkpoints that are neither best nor last stay."""
    world: DistContext = field(default_factory=DistContext)
    """This process among those of the run: of trained tensors that are cut over them each writes a part, of all else
    the first."""

    @property
    def _folder(self) -> Path:
        return self.out_dir / "checkpoints"

    def save(self, model: CausalLM, optimizer: torch.optim.Optimizer, progress: TrainState) -> Path:
        """Write checkpoints/step-N, swing `last` to it, and `best` if it is; returns the folder."""
        target = self._folder / f"step-{progress.step}"
        with self.world.same_error_on_all_ranks():
            if self.writes_sharded:
                self._save_sharded(target, model, optimizer, progress)
            elif self.world.is_main:
                with atomic_directory(target) as temp:
                    self._save_weights(temp, model)
                    save_safetensors(temp / OPTIMIZER, _moments(model, optimizer))
                    write_json(temp / STATE, asdict(progress))
            if self.world.is_main:
                atomic_symlink(self.out_dir / "last", f"checkpoints/{target.name}")
                self.prune(progress)
        return target

    @property
    def writes_sharded(self) -> bool:
        """Whether each process writes a part: what is trained is cut over them."""
        return self.world.size > 1 and self.method.is_full_finetune

    def _save_sharded(
        self, target: Path, model: CausalLM, optimizer: torch.optim.Optimizer, progress: TrainState
    ) -> None:
        """As `save` writes the folder, each process its part; an error of one is raised in all, and nothing is left."""
        world = self.world
        with ExitStack() as held:
            with world.same_error_on_all_ranks():
                made = held.enter_context(atomic_directory(target)) if world.is_main else Path()
            temp = Path(world.broadcast_object(str(made.resolve())))
            with world.same_error_on_all_ranks():
                save_sharded(
                    temp, "model", lazy_state_dict(model, dict(model.named_parameters())), world.rank, world.size
                )
            with world.same_error_on_all_ranks():
                moments = {name: LazyTensor.of(t) for name, t in _moments(model, optimizer).items()}
                save_sharded(temp, "optimizer", moments, world.rank, world.size)
            with world.same_error_on_all_ranks():
                if world.is_main:
                    save_config(temp, read_json(self.base_folder / "config.json"), next(model.parameters()).dtype)
                    self.tokenizer.save(temp)
                    write_json(temp / STATE, asdict(progress))

    def consolidate(self) -> None:
        """Make the folders that several processes wrote those that one would have written; repeatable."""
        with self.world.same_error_on_all_ranks():
            if self.world.is_main and self.method.is_full_finetune:
                for folder in self._folder.iterdir():
                    for stem in ("model", "optimizer"):
                        consolidate(folder, stem)

    def _save_weights(self, folder: Path, model: CausalLM) -> None:
        if not self.method.is_full_finetune:
            save_adapter(folder, model, self.method, self.base_name, self.revision)
            if not self.method.resumable_from_adapter:
                save_safetensors(folder / TRAINABLE, trainable_state_dict(model))
            return
        save_model(folder, model, dict(model.named_parameters()), read_json(self.base_folder / "config.json"))
        self.tokenizer.save(folder)

    def prune(self, progress: TrainState) -> None:
        """Make `best` and the set of folders what `progress`, the newest checkpoint's, says they are; repeatable."""
        last, best = f"step-{progress.step}", f"step-{progress.best['step']}" if progress.best else ""
        if best:
            atomic_symlink(self.out_dir / "best", f"checkpoints/{best}")
        for folder in self._folder.iterdir():
            kept = folder.name in (last, best) or (self.keep_all and folder.name.startswith("step-"))
            if not kept:
                shutil.rmtree(folder)
            elif folder.name != last:
                # Only the newest can be resumed from, and moments take twice the room of the weights.
                remove_weights(folder, "optimizer")
                for name in (TRAINABLE, OLD_TRAINABLE):
                    (folder / name).unlink(missing_ok=True)

    def latest(self) -> Path | None:
        """The folder `last` points to; None if the run has saved nothing yet."""
        last = self.out_dir / "last"
        return last if (last / STATE).is_file() or (last / OLD_STATE).is_file() else None

    def load_checkpoint(self, model: CausalLM, optimizer: torch.optim.Optimizer) -> TrainState:
        """Set model and optimiser to the newest checkpoint; a fresh Progress if there is none."""
        at = self.latest()
        if at is None:
            return TrainState()
        progress = TrainState(**upgrade_state(read_json(_existing(at, STATE, OLD_STATE))))
        if self.method.is_full_finetune:
            with torch.no_grad():
                for name, rows in iter_local_shards(model, at, trainable(model)):
                    to_local(model.get_parameter(name)).copy_(rows)
        else:
            trained = _existing(at, TRAINABLE, OLD_TRAINABLE)
            state = load_safetensors(trained) if trained.is_file() else read_adapter(at, model.config, self.method)
            load_trainable_state_dict(model, state, str(at))
        _set_moments(model, optimizer, read_weights(at, "optimizer"), progress.step - progress.skipped, at / OPTIMIZER)
        if self.world.is_main:
            self.prune(progress)
        return progress


def _existing(folder: Path, name: str, old: str) -> Path:
    """The file of that name, or the one that version 0.1 wrote."""
    return folder / old if (folder / old).is_file() else folder / name


def _moments(model: CausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    def moment(p: Tensor, m: str) -> Tensor:  # there is none before the first update
        found: Tensor = optimizer.state[p][m] if p in optimizer.state else torch.zeros_like(p)
        return found

    return {f"{name}.{m}": moment(p, m) for name, p in trainable(model).items() for m in _MOMENTS}


def _set_moments(model: CausalLM, optimizer: torch.optim.Optimizer, saved: LazyTensors, step: int, where: Path) -> None:
    for name, p in trainable(model).items():
        moments = {}
        for m in _MOMENTS:
            key, rows = f"{name}.{m}", local_rows(p)
            if key not in saved or saved.shape(key) != p.shape:
                raise InputError(f"{where}: {key} is missing or has another shape; this checkpoint is of another run")
            kept = torch.empty_like(to_local(p))
            if rows:
                kept.copy_(saved.part(key, slice(rows.start, rows.stop)) if p.dim() else saved[key])
            moments[m] = wrap_like(p, kept)
        optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the rows of metrics.jsonl behind `step`, and a half-written last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:  # the line a killed process was writing, or the empty one behind the last
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
