"""run.json: what it records of a run, which flags a resumed run may change, and what --init_from names.

    --init_from smollm2-135m     a base: a method is installed on it
    --init_from runs/sft         a run: training continues its adapter, on the base it was trained on
                                 (full fine-tuning: its weights are the base)

The initial adapter is not merged. The new run's checkpoints are adapters of the same published base, and the initial
model, adapter included, is the reference of preference training.
"""

import os
import platform
import secrets
import subprocess
from collections.abc import Callable, Container, Set
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from graftlm.config import TrainConfig
from graftlm.config.flags import MethodFlags
from graftlm.config.values import ROWS
from graftlm.errors import InputError
from graftlm.exchange.huggingface import check_no_adapter, read_adapter
from graftlm.exchange.load import check_base, resolve_path
from graftlm.exchange.runs import RESUME, find_run, format_of_run, read_run
from graftlm.files.assets import model_folder
from graftlm.files.atomic import LOCK_NAME, write_json
from graftlm.files.formats import tensors_sha256
from graftlm.files.in_memory import rows_record
from graftlm.methods import Method, method_from_flags, method_from_json
from graftlm.methods.base import count_parameters, load_trainable_state_dict
from graftlm.models.base import CausalLM
from graftlm.models.config import ModelConfig
from graftlm.training.distributed import DistContext
from graftlm.training.reference import REFERENCE_FILES
from graftlm.training.token_cache import PreparedData

if TYPE_CHECKING:
    from graftlm.training.setup import RunContext

CONTENT_CHECKED = {"init_from", "data", "val_data", "test_data"}
"""Flags that name files: on resume they may name another place, because the content is checked by its hash."""
RESUME_MUTABLE = {*CONTENT_CHECKED, "resume", "plan", "shard", "max_iters", "epochs", "wandb_project", "tensorboard"}
"""Flags that a resumed run may change; all others decide its numbers."""
OVERRIDABLE_FLAGS = {"lora_dropout", "lora_plus_ratio"}
"""Flags that change how a method is trained, not its parameters."""


@dataclass
class RunManifest:
    """The content of a run's run.json."""

    folder: Path
    values: dict[str, Any]
    is_writer: bool = True
    """Whether this rank writes the file."""

    def update(self, **changes: Any) -> None:
        """Change entries and write the file."""
        self.values |= changes
        if self.is_writer:
            write_json(self.folder / "run.json", self.values)


def new_manifest(
    run: "RunContext",
    data: PreparedData,
    base_sha256: str,
    start: dict[str, Any] | None,
    previous: dict[str, Any] | None,
) -> RunManifest:
    """The manifest of a run that is ready to start; of a resumed run what its start recorded is taken over.

    start: the adapter that training starts from. previous: run.json of the run that is resumed.
    """
    trained, total = count_parameters(run.loaded.model)
    template = run.loaded.template
    assert template is not None
    history = [*previous["resume_history"], config_diff(previous, run.config, run.dist)] if previous else []
    previous = previous or {}
    rows = {flag: record for flag in sorted(ROWS) if (record := rows_record(getattr(run.config, flag)))}
    values = {
        "config": asdict(run.config),
        "method": run.method.to_json(),
        "base": {"name": run.loaded.name, "sha256": base_sha256, "format": run.config.base_format},
        "parent_run": start,
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "tokens": data.cached_as,
            "examples": {split: len(examples) for split, examples in run.data.splits.items()},
            "chat": data.is_chat,
            **({"from_python": rows} if rows else {}),
        },
        "template": template.to_json(),
        "device": str(run.device),
        "dtype": str(run.loaded.model.dtype).removeprefix("torch."),
        "dtype_reason": run.loaded.dtype_reason,
        "trainable": trained,
        "total": total,
        "versions": _versions(),
        "git": _git_state(),
        "wandb_id": previous.get("wandb_id") or secrets.token_hex(8),
        "date": run.loaded.tokenizer.date,
        "notes": run.notes,
        "plan": previous.get("plan"),
        "cpp_kernels": previous.get("cpp_kernels"),
        "reference": previous.get("reference"),
        "distributed": run.dist.to_json(),
        "resume_history": history,
        "results": None,
    }
    return RunManifest(Path(run.config.out_dir), values, run.dist.is_main)


def config_diff(previous: dict[str, Any], config: TrainConfig, dist: DistContext) -> dict[str, Any]:
    """What a resume changed, {flag: [before, now]}. A new last step changes the learning rate's schedule."""
    recorded, was = previous["config"], previous.get("distributed", DistContext().to_json())
    distributed = {"distributed": [was, dist.to_json()]} if was != dist.to_json() else {}
    flags = {k: [recorded.get(k), v] for k, v in asdict(config).items() if k != "resume" and recorded.get(k) != v}
    return {**flags, **distributed}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("graftlm", "torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "platform": platform.platform(), **packages}


def _git_state() -> str | None:
    """Commit and dirtiness of the checkout graftlm runs from; None when it is installed elsewhere."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


# Resume ---------------------------------------------------------------------------------------------------------------


def check_out_dir(out_dir: Path) -> None:
    """An InputError unless a new run can start there."""
    if (out_dir / "run.json").exists():
        raise InputError(f"--out_dir {out_dir}: holds a run already; add --resume to continue it, or name another")
    if out_dir.is_file():
        raise InputError(f"--out_dir {out_dir}: is a file; name a folder")
    # Of a first start that was killed before it wrote run.json:
    leftovers = (LOCK_NAME, ".run.json.tmp-", REFERENCE_FILES, f".{REFERENCE_FILES}")
    if out_dir.is_dir() and any(not p.name.startswith(leftovers) for p in out_dir.iterdir()):
        raise InputError(f"--out_dir {out_dir}: holds other files; name a folder that is empty or does not exist")


def read_previous(config: TrainConfig) -> dict[str, Any] | None:
    """run.json of the run to resume; None without --resume. An InputError if it cannot be resumed."""
    if not config.resume:
        return None
    out_dir = Path(config.out_dir)
    previous = read_run(out_dir)
    if "imported" in previous:
        raise InputError(
            f"{out_dir}: was imported without optimizer state, so there is no training to resume; merge it (graft "
            f"export --out_dir {out_dir} --format merged --to FOLDER) and train that (--init_from FOLDER)"
        )
    return previous


def resumed_config(config: TrainConfig, recorded: dict[str, Any], explicit: Set[str] | None) -> TrainConfig:
    """The recorded flags with the new last step; an InputError if an explicit flag contradicts them."""
    changes: dict[str, Any] = {"resume": True}
    for f in fields(TrainConfig):
        value = getattr(config, f.name)
        was = recorded.get(f.name, None if f.default is MISSING else f.default)
        is_explicit = value != f.default if explicit is None else f.name in explicit
        if f.name in RESUME_MUTABLE:
            if f.name != "resume" and is_explicit:
                changes[f.name] = value
        elif is_explicit and f.name != "out_dir" and value != was:
            raise InputError(f"--resume with --{f.name} {value}: the run has {was}; leave it out, or start a new run")
    check_one_length(changes)
    if "epochs" in changes:
        changes["max_iters"] = None
    kept = {f.name: recorded[f.name] for f in fields(TrainConfig) if f.name in recorded}
    kept.setdefault("base_format", "dense")  # the only one before the flag
    return replace(TrainConfig(**{**kept, "out_dir": config.out_dir}), **changes)


def check_one_length(flags: Container[str]) -> None:
    """An InputError if the flags name the run's length twice."""
    if "epochs" in flags and "max_iters" in flags:
        raise InputError("--epochs and --max_iters both say how long the run is; give one of them")


def explicit_flags(config: TrainConfig, given: Set[str] | None) -> Set[str]:
    """The flags that were typed; if that is unknown, those that differ from their defaults."""
    found = {f.name for f in fields(config) if getattr(config, f.name) != f.default} if given is None else given
    check_one_length(found)
    return found


# --init_from ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InitSource:
    """The model that a run starts from."""

    base: str
    """The base model's name, as in run.json."""
    folder: Path
    """Its files."""
    method: Method
    base_format: str = "dense"
    """How its weights are kept in memory (`exchange/base_format.py`)."""
    adapter: Path | None = None
    """The checkpoint folder of the initial adapter."""
    saved: Method | None = None
    """The method with which that checkpoint was saved."""
    learned_chat: bool | None = None
    """Whether it is of a run that learned to chat; None for a base of other origin."""

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


def resolve_init(
    config: TrainConfig,
    typed: Set[str],
    resumed: bool,
    weights: bool = True,
    select_format: Callable[[str, Method], str] = lambda name, method: "dense",
) -> InitSource:
    """Resolve --init_from and the method's flags; `typed` are the explicit flags. weights: as in `model_folder`.

    select_format: the format of a base's weights in memory, by its name and the method.

    Raises InputError for a model that cannot be found, a run whose base has changed, and flags that contradict the
    method of the run it starts from.
    """
    if config.init_from == RESUME:
        raise InputError(
            "--init_from resume: is for graft generate and evaluate; graft train continues a run with --resume, and "
            "starts a new one from it with --init_from FOLDER"
        )
    source = find_run(config.init_from)
    if source is None:
        method = method_from_flags(config, typed)
        base_format = select_format(config.init_from, method)
        folder = model_folder(config.init_from, weights, base_format == "stored")
        check_no_adapter(folder)
        return InitSource(resolve_path(config.init_from), folder, method, base_format)
    run, run_dir, checkpoint = source.record, source.folder, source.folder / source.checkpoint
    saved, chat = method_from_json(run["method"]), bool(run["data"].get("chat"))
    if saved.is_full_finetune:
        name, method = resolve_path(str(checkpoint)), method_from_flags(config, typed)
        return InitSource(name, checkpoint, method, select_format(str(checkpoint), method), learned_chat=chat)
    _check_flags(config, typed, saved, run_dir)
    free = {
        flag: field for flag, field in saved.flags.items() if flag in OVERRIDABLE_FLAGS and (resumed or flag in typed)
    }
    method = replace(saved.for_inference, **{field: getattr(config, flag) for flag, field in free.items()})
    base_format = format_of_run(run)
    if config.base_format not in ("auto", base_format):
        raise InputError(f"--base_format {config.base_format}: {run_dir} was trained with {base_format}; leave it out")
    folder = model_folder(run["base"]["name"], weights, base_format == "stored")
    if not config.plan:
        check_base(folder, run, run_dir)
    return InitSource(run["base"]["name"], folder, method, base_format, checkpoint, saved, chat)


def _check_flags(config: MethodFlags, typed: Set[str], saved: Method, run_dir: Path) -> None:
    """An InputError if an explicit flag contradicts the method of the initial adapter."""
    for name in (f.name for f in fields(MethodFlags)):
        if name not in typed or name in ("init_from", *OVERRIDABLE_FLAGS):
            continue
        value = getattr(config, name)
        was: Any = saved.name if name == "method" else getattr(saved, saved.flags.get(name, ""), None)
        if name == "train_layers":
            was = "{}:{}".format(*saved.layers) if saved.layers else "all"
        elif isinstance(was, tuple):
            was = ",".join(was)
        if value != was:
            raise InputError(
                f"--{name} {value}: {run_dir} is of {saved.name}, with {name} {was}, which training continues; for "
                f"another method, merge it first (graft export --format merged --out_dir {run_dir} --to FOLDER)"
            )
