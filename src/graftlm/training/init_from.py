"""What a run starts from: a base model, or the model that another run made of one.

    --init_from smollm2-135m     a base: a method is installed on it
    --init_from runs/sft         a run: its adapter goes on being trained, on the base it was trained on
                                 (of full fine-tuning: its weights are the base)

What is unusual here: an adapted start is not merged. The new run's checkpoints are adapters of the same published base,
and the start, adapter included, is the reference of preference training.
"""

from collections.abc import Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graftlm.config import MethodFlags, TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.adapters import read_adapter
from graftlm.exchange.load import check_base, read_run, resolve_path
from graftlm.files.assets import model_folder
from graftlm.files.formats import tensors_sha256
from graftlm.methods import Method, method_from_flags, method_from_json
from graftlm.methods.base import load_trainable_state_dict, parse_layer_range
from graftlm.models.base import CausalLM
from graftlm.models.config import ModelConfig

OVERRIDABLE_FLAGS = {"lora_dropout", "lora_plus_ratio"}
"""Flags of a method that decide how it is trained, not what it is."""


@dataclass(frozen=True)
class InitSource:
    """Where a run begins."""

    base: str
    """The base model's name, as run.json keeps it."""
    folder: Path
    """Its files."""
    method: Method
    adapter: Path | None = None
    """The checkpoint folder whose adapter goes on being trained."""
    saved: Method | None = None
    """The method as that checkpoint was written."""

    def load_initial_adapter(self, model: CausalLM) -> None:
        """Set what the installed method trains to what the start made of it, where it starts from an adapter."""
        if (state := self._state(model.config)) is not None:
            load_trainable_state_dict(model, state, str(self.adapter))

    def sha256(self, shape: ModelConfig) -> str | None:
        """Of the adapter it starts from; None where it starts from a base."""
        state = self._state(shape)
        return None if state is None else tensors_sha256(state)

    def _state(self, shape: ModelConfig) -> dict[str, Tensor] | None:
        if self.adapter is None or self.saved is None:
            return None
        return read_adapter(self.adapter, shape, self.saved)


def resolve_init(config: TrainConfig, typed: Set[str], resumed: bool) -> InitSource:
    """What `--init_from` and the method's flags mean; `typed` are those that were given.

    Raises InputError for a model that cannot be found, a run whose base is not the one it was trained on, and flags
    that say something else of the method than the run it starts from.
    """
    found = _adapted(config.init_from)
    if found is None:
        return InitSource(
            resolve_path(config.init_from), model_folder(config.init_from), method_from_flags(config, typed)
        )
    run_dir, at = found
    run = read_run(run_dir)
    if not at.is_dir():
        raise InputError(f"--init_from {run_dir}: the run has saved no checkpoint yet; go on with graft train --resume")
    saved = method_from_json(run["method"])
    if saved.is_full_finetune:
        return InitSource(resolve_path(str(at)), at, method_from_flags(config, typed))
    _agree(config, typed, saved, run_dir)
    free = {
        flag: field for flag, field in saved.flags.items() if flag in OVERRIDABLE_FLAGS and (resumed or flag in typed)
    }
    method = replace(saved.for_inference, **{field: getattr(config, flag) for flag, field in free.items()})
    folder = model_folder(run["base"]["name"])
    check_base(folder, run, run_dir)
    return InitSource(run["base"]["name"], folder, method, at, saved)


def _adapted(name: str) -> tuple[Path, Path] | None:
    """The run folder and the checkpoint that a name means; None: it is no run's."""
    path = Path(name)
    if (path / "run.json").is_file():
        return path, path / "best"
    if path.is_dir() and (path.parent / "run.json").is_file():
        return path.parent, path
    return None


def _agree(config: MethodFlags, typed: Set[str], saved: Method, run_dir: Path) -> None:
    """An InputError if a flag of the method was typed that the start contradicts."""
    for name in (
        f.name for f in fields(MethodFlags) if f.name in typed and f.name not in {"init_from", *OVERRIDABLE_FLAGS}
    ):
        value: Any = getattr(config, name)
        was: Any = saved.name if name == "method" else getattr(saved, saved.flags.get(name, ""), None)
        if name == "train_layers":
            same = saved.layers is not None and value == "{}:{}".format(*saved.layers)
            was = "{}:{}".format(*saved.layers) if saved.layers else "all"
        else:
            was = ",".join(was) if isinstance(was, tuple) else was
            same = value == was
        if not same:
            raise InputError(
                f"--{name} {value}: {run_dir} is of {saved.name}, with {name} {was}, and goes on as it is; to put "
                f"another method on it, merge it first (graft export --merged --out_dir {run_dir} --to FOLDER)"
            )


def with_layer_range(config: TrainConfig, origin: InitSource, layers: int) -> Method:
    """The method with the layers that it adapts decided."""
    if origin.adapter is not None:
        return origin.method
    return replace(origin.method, layers=parse_layer_range(config.train_layers, layers))
