"""A name or a run folder -> model, tokenizer, template, ready to use.

    load("smollm2-135m")                         a pretrained model
    load("resume", "runs/demo", "last")          the same model as a run adapted it

What is unusual here: loading a run is strict. The base must be, byte for byte, the one the run was trained on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftlm.errors import InputError
from graftlm.exchange.device import pick_device, pick_dtype
from graftlm.exchange.huggingface import base_hash, load_model
from graftlm.exchange.peft import read_adapter
from graftlm.files.assets import model_folder
from graftlm.files.formats import read_json
from graftlm.methods import Full, LoRA, Method, method_from_json
from graftlm.methods.base import load_delta
from graftlm.models.base import CausalLM
from graftlm.models.names import read_shape
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
) -> Loaded:
    """Load a model by name, or with init_from "resume" the model that the run in `out_dir` adapted.

    Raises InputError for an unknown name or device, a folder without a run or checkpoint, and a base whose weights
    are not those the run was trained on.
    """
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
    model = restore(at, folder, method, target, number_format)
    template = Template(run["template"]["name"], run["template"]["text"], tuple(run["template"]["labels"]))
    return Loaded(model, read_tokenizer(folder), run["base"]["name"], folder, reason, template, run)


def read_run(run_dir: Path) -> dict[str, Any]:
    """The run.json of a run folder; an InputError if there is none, or none of ours."""
    if not (run_dir / "run.json").is_file():
        raise InputError(f"{run_dir}: holds no run (no run.json); train one with graft train --out_dir {run_dir}")
    run = read_json(run_dir / "run.json")
    if not isinstance(run, dict) or not {"config", "method", "base", "data", "template"} <= run.keys():
        raise InputError(f"{run_dir / 'run.json'}: is no record of a run; restore it, or train again in another folder")
    return run


def read_tokenizer(folder: Path) -> Tokenizer:
    """A model folder's tokenizer; an InputError if it makes tokens that the model has no embedding for."""
    tokenizer = Tokenizer.from_folder(folder)
    config = folder / "config.json"
    vocab = read_shape(read_json(config), str(config)).vocab
    if tokenizer.largest >= vocab:
        raise InputError(
            f"{folder}: its tokenizer has a token {tokenizer.largest}, its model embeds {vocab}: the files are of two "
            "models; fetch them again"
        )
    return tokenizer


def check_base(folder: Path, run: dict[str, Any], run_dir: Path) -> None:
    """An InputError if the weights in `folder` are not those `run` was trained on."""
    found = base_hash(folder)
    if found != run["base"]["sha256"]:
        raise InputError(
            f"{run_dir}: was trained on {run['base']['name']} with weights {run['base']['sha256'][:12]}, "
            f"but {folder} holds {found[:12]}; use the base it was trained on"
        )


def restore(checkpoint: Path, base: Path, method: Method, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The model of a checkpoint folder, in evaluation mode."""
    if isinstance(method, Full):
        return load_model(checkpoint, device, dtype)
    assert isinstance(method, LoRA)
    model = load_model(base, device, dtype)
    method.install(model, torch.Generator().manual_seed(0))
    load_delta(model, read_adapter(checkpoint, model.shape, method), str(checkpoint))
    return model.eval()
