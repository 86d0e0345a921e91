"""Atomic checkpoints, exact resume, best and last.

    out_dir/checkpoints/step-N/   an exchange folder (PEFT's, or Hugging Face's for full fine-tuning), and beside it
        optimizer.safetensors     AdamW's two moments of every trained tensor, float32
        progress.json             where the run stands: step, examples, best so far, times
        trained.safetensors       what is trained, where the exchange folder only tells what it comes to
    out_dir/best, out_dir/last    links to two of them

Of full fine-tuning in several processes, weights and moments stand in a file for each process, with an index
(`files/cut.py`), until the run ends: then they are joined into the one that one process would have written. All that
reads a checkpoint, transformers included, reads both, and so does any number of processes.

What is unusual here: nothing random has to be saved. Data order, dropout and initial weights are pure functions of
(seed, step), so weights, moments and the step number are the whole state, and a resumed run equals one that never
stopped, to the bit. A folder appears under its name only when it is complete, links are swapped atomically, and a run
killed between two of these steps is put right by `repair`.
"""

import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.exchange.adapters import read_adapter, save_adapter
from graftlm.exchange.huggingface import later_file, save_config, save_model, stored_rows
from graftlm.files.atomic import folder_atomically, link_atomically, write_json, write_text
from graftlm.files.cut import Later, join, like, local, remove, rows_of, save_cut
from graftlm.files.formats import LazyTensors, load_safetensors, read_json, read_weights, save_safetensors
from graftlm.methods import Method
from graftlm.methods.base import delta_state, load_delta, trainable
from graftlm.models.base import CausalLM
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.distributed import World

OPTIMIZER, PROGRESS, TRAINED = "optimizer.safetensors", "progress.json", "trained.safetensors"
FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """Where a run stands after `step` optimiser steps."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Wall seconds since the first start, pauses between a stop and its resume apart."""
    timed_examples: int = 0
    """Examples of the steps that count for examples_per_s: all but the first 5%."""
    timed_seconds: float = 0.0
    timed_needed: int = 0
    """Tokens of the same steps, what a batch's prompts begin with counted once for each batch."""
    seconds_to_first_step: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)
    """step, val_loss, val_accuracy of the latest validation."""
    best: dict[str, Any] = field(default_factory=dict)
    """The same of the validation with the lowest loss."""
    stale: int = 0
    """Validations since the best."""
    loss_scale: float = 1.0
    """What the loss is multiplied by in float16, so that small gradients do not vanish (Micikevicius et al. 2018)."""
    clean_steps: int = 0
    """Steps since the scale last changed."""
    skipped: int = 0
    """Steps whose gradient overflowed at the scale they had: they changed no weight."""

    def rescale(self, finite: bool) -> None:
        """Take note of a float16 step: half the scale behind an overflow, twice behind GROWTH_STEPS without one."""
        self.clean_steps += 1
        if not finite:
            self.loss_scale, self.clean_steps, self.skipped = self.loss_scale / 2, 0, self.skipped + 1
        elif self.clean_steps == GROWTH_STEPS:
            self.loss_scale, self.clean_steps = self.loss_scale * 2, 0

    def judge(self, loss: float, accuracy: float | None) -> bool:
        """Take note of a validation at the present step; True if it is the best so far."""
        self.last = {"step": self.step, "val_loss": loss, "val_accuracy": accuracy}
        better = not self.best or loss < self.best["val_loss"]
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best = dict(self.last)
        return better


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run folder."""

    out_dir: Path
    method: Method
    base_name: str
    revision: str | None
    base_folder: Path
    tokenizer: Tokenizer
    keep: bool = False
    """Whether checkpoints that are neither best nor last stay."""
    world: World = field(default_factory=World)
    """This process among those of the run: of trained tensors that are cut over them each writes a part, of all else
    the first."""

    @property
    def _folder(self) -> Path:
        return self.out_dir / "checkpoints"

    def save(self, model: CausalLM, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Write checkpoints/step-N, swing `last` to it, and `best` if it is; returns the folder."""
        target = self._folder / f"step-{progress.step}"
        with self.world.alike():
            if self.by_all:
                self._save_by_all(target, model, optimizer, progress)
            elif self.world.first:
                with folder_atomically(target) as temp:
                    self._save_weights(temp, model)
                    save_safetensors(temp / OPTIMIZER, _moments(model, optimizer))
                    write_json(temp / PROGRESS, asdict(progress))
            if self.world.first:
                link_atomically(self.out_dir / "last", f"checkpoints/{target.name}")
                self.repair(progress)
        return target

    @property
    def by_all(self) -> bool:
        """Whether each process writes a part: what is trained is cut over them."""
        return self.world.size > 1 and self.method.stores_model

    def _save_by_all(self, target: Path, model: CausalLM, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """As `save` writes the folder, each process its part; an error of one is raised in all, and nothing is left."""
        world = self.world
        with ExitStack() as held:
            with world.alike():
                made = held.enter_context(folder_atomically(target)) if world.first else Path()
            temp = Path(world.tell(str(made.resolve())))
            with world.alike():
                save_cut(temp, "model", later_file(model, dict(model.named_parameters())), world.rank, world.size)
            with world.alike():
                moments = {name: Later.of(t) for name, t in _moments(model, optimizer).items()}
                save_cut(temp, "optimizer", moments, world.rank, world.size)
            with world.alike():
                if world.first:
                    save_config(temp, read_json(self.base_folder / "config.json"), next(model.parameters()).dtype)
                    self.tokenizer.save(temp)
                    write_json(temp / PROGRESS, asdict(progress))

    def join(self) -> None:
        """Make the folders that several processes wrote those that one would have written; repeatable."""
        with self.world.alike():
            if self.world.first and self.method.stores_model:
                for folder in self._folder.iterdir():
                    for stem in ("model", "optimizer"):
                        join(folder, stem)

    def _save_weights(self, folder: Path, model: CausalLM) -> None:
        if not self.method.stores_model:
            save_adapter(folder, model, self.method, self.base_name, self.revision)
            if not self.method.lossless:
                save_safetensors(folder / TRAINED, delta_state(model))
            return
        save_model(folder, model, dict(model.named_parameters()), read_json(self.base_folder / "config.json"))
        self.tokenizer.save(folder)

    def repair(self, progress: Progress) -> None:
        """Make `best` and the set of folders what `progress`, the newest checkpoint's, says they are; repeatable."""
        last, best = f"step-{progress.step}", f"step-{progress.best['step']}" if progress.best else ""
        if best:
            link_atomically(self.out_dir / "best", f"checkpoints/{best}")
        for folder in self._folder.iterdir():
            kept = folder.name in (last, best) or (self.keep and folder.name.startswith("step-"))
            if not kept:
                shutil.rmtree(folder)
            elif folder.name != last:
                # Only the newest can be resumed from, and moments take twice the room of the weights.
                remove(folder, "optimizer")
                (folder / TRAINED).unlink(missing_ok=True)

    def newest(self) -> Path | None:
        """The folder `last` points to; None if the run has saved nothing yet."""
        return self.out_dir / "last" if (self.out_dir / "last" / PROGRESS).is_file() else None

    def restore(self, model: CausalLM, optimizer: torch.optim.Optimizer) -> Progress:
        """Set model and optimiser to the newest checkpoint; a fresh Progress if there is none."""
        at = self.newest()
        if at is None:
            return Progress()
        progress = Progress(**read_json(at / PROGRESS))
        if self.method.stores_model:
            with torch.no_grad():
                for name, rows in stored_rows(model, at, trainable(model)):
                    local(model.get_parameter(name)).copy_(rows)
        else:
            trained = (at / TRAINED).is_file()
            state = load_safetensors(at / TRAINED) if trained else read_adapter(at, model.shape, self.method)
            load_delta(model, state, str(at))
        _set_moments(model, optimizer, read_weights(at, "optimizer"), progress.step - progress.skipped, at / OPTIMIZER)
        if self.world.first:
            self.repair(progress)
        return progress


def _moments(model: CausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    def moment(p: Tensor, m: str) -> Tensor:  # there is none before the first update
        found: Tensor = optimizer.state[p][m] if p in optimizer.state else torch.zeros_like(p)
        return found

    return {f"{name}.{m}": moment(p, m) for name, p in trainable(model).items() for m in _MOMENTS}


def _set_moments(model: CausalLM, optimizer: torch.optim.Optimizer, saved: LazyTensors, step: int, where: Path) -> None:
    for name, p in trainable(model).items():
        moments = {}
        for m in _MOMENTS:
            key, rows = f"{name}.{m}", rows_of(p)
            if key not in saved or saved.shape(key) != p.shape:
                raise InputError(f"{where}: {key} is missing or has another shape; this checkpoint is of another run")
            kept = torch.empty_like(local(p))
            if rows:
                kept.copy_(saved.part(key, slice(rows.start, rows.stop)) if p.dim() else saved[key])
            moments[m] = like(p, kept)
        optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}


def cut_metrics(path: Path, step: int) -> None:
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
