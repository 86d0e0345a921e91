"""What --init_from names: a base model, or another run's adapted model.

    --init_from smollm2-135m     a base: a method is installed on it
    --init_from runs/sft         a run: training continues its adapter, on the base it was trained on
                                 (full fine-tuning: its weights are the base)

The initial adapter is not merged. The new run's checkpoints are adapters of the same published base, and the initial
model, adapter included, is the reference of preference training.
"""

from collections.abc import Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graftlm.config import MethodFlags, TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.huggingface import read_adapter
from graftlm.exchange.load import check_base, read_run, resolve_path
from graftlm.files.assets import model_folder
from graftlm.files.formats import tensors_sha256
from graftlm.methods import Method, method_from_flags, method_from_json
from graftlm.methods.base import load_trainable_state_dict, parse_layer_range
from graftlm.models.base import CausalLM
from graftlm.models.config import ModelConfig

OVERRIDABLE_FLAGS = {"lora_dropout", "lora_plus_ratio"}
"""Flags that change how a method is trained, not its parameters."""


@dataclass(frozen=True)
class InitSource:
    """The model that a run starts from."""

    base: str
    """The base model's name, as in run.json."""
    folder: Path
    """Its files."""
    method: Method
    adapter: Path | None = None
    """The checkpoint folder of the initial adapter."""
    saved: Method | None = None
    """The method with which that checkpoint was saved."""

    def load_initial_adapter(self, model: CausalLM) -> None:
        """Load the initial adapter, if there is one, into a model with the method installed."""
        if (state := self._state(model.config)) is not None:
            load_trainable_state_dict(model, state, str(self.adapter))

    def sha256(self, shape: ModelConfig) -> str | None:
        """The initial adapter's hash; None without one."""
        state = self._state(shape)
        return None if state is None else tensors_sha256(state)

    def _state(self, shape: ModelConfig) -> dict[str, Tensor] | None:
        if self.adapter is None or self.saved is None:
            return None
        return read_adapter(self.adapter, shape, self.saved)


def resolve_init(config: TrainConfig, typed: Set[str], resumed: bool) -> InitSource:
    """Resolve --init_from and the method's flags; `typed` are the explicit flags.

    Raises InputError for a model that cannot be found, a run whose base has changed, and flags that contradict the
    method of the run it starts from.
    """
    adapted = _adapted(config.init_from)
    if adapted is None:
        return InitSource(
            resolve_path(config.init_from), model_folder(config.init_from), method_from_flags(config, typed)
        )
    run_dir, checkpoint = adapted
    run = read_run(run_dir)
    if not checkpoint.is_dir():
        raise InputError(f"--init_from {run_dir}: the run has no checkpoint yet; resume it with graft train --resume")
    saved = method_from_json(run["method"])
    if saved.is_full_finetune:
        return InitSource(resolve_path(str(checkpoint)), checkpoint, method_from_flags(config, typed))
    _check_flags(config, typed, saved, run_dir)
    free = {
        flag: field for flag, field in saved.flags.items() if flag in OVERRIDABLE_FLAGS and (resumed or flag in typed)
    }
    method = replace(saved.for_inference, **{field: getattr(config, flag) for flag, field in free.items()})
    folder = model_folder(run["base"]["name"])
    check_base(folder, run, run_dir)
    return InitSource(run["base"]["name"], folder, method, checkpoint, saved)


def _adapted(name: str) -> tuple[Path, Path] | None:
    """The run folder and the checkpoint of a name; None if it is not a run."""
    path = Path(name)
    if (path / "run.json").is_file():
        return path, path / "best"
    if path.is_dir() and (path.parent / "run.json").is_file():
        return path.parent, path
    return None


def _check_flags(config: MethodFlags, typed: Set[str], saved: Method, run_dir: Path) -> None:
    """An InputError if an explicit flag contradicts the method of the initial adapter."""
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
                f"--{name} {value}: {run_dir} is of {saved.name}, with {name} {was}, which training continues; for "
                f"another method, merge it first (graft export --merged --out_dir {run_dir} --to FOLDER)"
            )


def with_layer_range(config: TrainConfig, origin: InitSource, layers: int) -> Method:
    """The method with its layer range resolved."""
    if origin.adapter is not None:
        return origin.method
    return replace(origin.method, layers=parse_layer_range(config.train_layers, layers))
