"""A name or a run folder -> model, tokenizer, template, ready to use.

    load("smollm2-135m")                         a pretrained model
    load("resume", "runs/demo", "last")          the same model as a run adapted it

What is unusual here: loading a run is strict. The base must be, byte for byte, the one the run was trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.config.renamed import upgrade_run
from graftlm.errors import InputError
from graftlm.exchange.adapters import read_adapter
from graftlm.exchange.device import pick_device, pick_dtype
from graftlm.exchange.huggingface import base_hash, load_model
from graftlm.files.assets import model_folder
from graftlm.files.formats import read_json
from graftlm.methods import Method, method_from_json
from graftlm.methods.base import load_trainable_state_dict
from graftlm.methods.mergeable import MergeableLinear
from graftlm.models import CausalLM, clone_with_shared_weights
from graftlm.models.checkpoint_mapping import read_model_config
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer


@dataclass
class Loaded:
    """A model ready for inference, and what belongs to it."""

    model: CausalLM
    tokenizer: Tokenizer
    name: str
    """The base model's name."""
    folder: Path
    """The base model's files."""
    dtype_reason: str
    """Why the arithmetic has the dtype it has."""
    template: Template | None = None
    """The run's template; None for a model without a run."""
    run: dict[str, Any] | None = None
    """The run's run.json; None for a model without a run."""


def load(
    init_from: str,
    out_dir: str | Path | None = None,
    checkpoint: str = "best",
    device: str = "auto",
    dtype: str = "auto",
    onto: Loaded | None = None,
) -> Loaded:
    """Load a model by name, or with init_from "resume" the model that the run in `out_dir` adapted.

    With `onto`, a loaded base, the run's adapter is put beside it: the new model has the base's very tensors, so that
    many adapters of one base take hardly more memory than one, and each call names the model it means. Device and
    dtype are then the base's.

    Raises InputError for an unknown name or device, a folder without a run or checkpoint, and a base whose weights
    are not those the run was trained on.
    """
    if onto is not None:
        device, dtype = str(onto.model.device), str(onto.model.dtype).removeprefix("torch.")
    target = pick_device(device)
    number_format, reason = pick_dtype(dtype, target)
    if init_from != "resume":
        folder = model_folder(init_from)
        model = load_model(folder, target, number_format)
        return Loaded(model, read_tokenizer(folder), init_from, folder, reason)
    run_dir = Path(out_dir or "graft-run")
    run = read_run(run_dir)
    at = run_dir / checkpoint
    if not at.is_dir():
        raise InputError(f"{at}: no such checkpoint; the run has not saved one yet, go on with graft train --resume")
    folder = model_folder(run["base"]["name"])
    check_base(folder, run, run_dir)
    method = method_from_json(run["method"])
    if onto is not None:
        if onto.folder != folder or onto.run is not None:
            raise InputError(f"{run_dir}: is an adapter of {run['base']['name']}; load that first, and put it onto it")
        model = adapter_on_shared_base(onto.model, at, method)
    else:
        model = load_checkpoint(at, folder, method, target, number_format)
    template = Template(run["template"]["name"], run["template"]["text"], tuple(run["template"]["labels"]))
    return Loaded(model, read_tokenizer(folder), run["base"]["name"], folder, reason, template, run)


def read_run(run_dir: Path) -> dict[str, Any]:
    """The run.json of a run folder; an InputError if there is none, or none of ours."""
    if not (run_dir / "run.json").is_file():
        raise InputError(f"{run_dir}: holds no run (no run.json); train one with graft train --out_dir {run_dir}")
    run = read_json(run_dir / "run.json")
    if not isinstance(run, dict) or not {"config", "method", "base", "data", "template"} <= run.keys():
        raise InputError(f"{run_dir / 'run.json'}: is no record of a run; restore it, or train again in another folder")
    return upgrade_run(run)


def resolve_path(name: str) -> str:
    """A base model's name as run.json keeps it: a local path whole, so that the run can be loaded from any folder."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def hub_revision(name: str) -> tuple[str, str | None]:
    """A base model's name without its @revision, and that; a local path has none."""
    repo, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    return repo, revision or None


def read_tokenizer(folder: Path) -> Tokenizer:
    """A model folder's tokenizer; an InputError if it makes tokens that the model has no embedding for."""
    tokenizer = Tokenizer.from_folder(folder)
    config = folder / "config.json"
    vocab = read_model_config(read_json(config), str(config)).vocab_size
    if tokenizer.largest >= vocab:
        raise InputError(
            f"{folder}: its tokenizer has a token {tokenizer.largest}, its model embeds {vocab}: the files are of two "
            "models; fetch them again"
        )
    return tokenizer


def check_base(folder: Path, run: dict[str, Any], run_dir: Path, found: str = "") -> None:
    """An InputError if the weights in `folder` (whose hash is `found`) are not those `run` was trained on."""
    found = found or base_hash(folder)
    if found != run["base"]["sha256"]:
        raise InputError(
            f"{run_dir}: was trained on {run['base']['name']} with weights {run['base']['sha256'][:12]}, "
            f"but {folder} holds {found[:12]}; use the base it was trained on"
        )


def load_checkpoint(checkpoint: Path, base: Path, method: Method, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The model of a checkpoint folder, in evaluation mode."""
    if method.is_full_finetune:
        return load_model(checkpoint, device, dtype)
    return _adapted(load_model(base, device, dtype), checkpoint, method.for_inference)


def adapter_on_shared_base(base: CausalLM, checkpoint: Path, method: Method) -> CausalLM:
    """An adapted model, in evaluation mode, that has the tensors of `base`, which stays as it is."""
    if method.is_full_finetune:
        raise InputError(f"{checkpoint}: full fine-tuning trained the base's own weights; load it on its own")
    return _adapted(clone_with_shared_weights(base), checkpoint, method.for_inference, folds=False)


def _adapted(model: CausalLM, checkpoint: Path, method: Method, folds: bool = True) -> CausalLM:
    return apply_adapter(model, method, read_adapter(checkpoint, model.config, method), str(checkpoint), folds)


def apply_adapter(model: CausalLM, method: Method, state: Mapping[str, Tensor], where: str, folds: bool) -> CausalLM:
    """The model adapted by a method with these trained tensors, in evaluation mode; `folds`: merged where possible."""
    method.install(model, torch.Generator().manual_seed(0))
    load_trainable_state_dict(model, state, where)
    for module in model.modules():
        if isinstance(module, MergeableLinear):
            module.merge_on_eval = folds
    return model.eval()
