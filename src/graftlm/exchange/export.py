"""`graft export`: a run's checkpoint -> a folder that PEFT or transformers loads, with the proof that it is the same.

    adapter     PEFT's folder, or our own where PEFT has no such method (`adapters.py`)
    model       --merged, or a full fine-tuning: a Hugging Face folder with tokenizer and model card

What is unusual here: nothing appears under the name that was asked for before the files were read back and gave the
logits of the adapted base, with the update added and not merged, so that merging is proven too. export.json tells what
the folder was made of and how far the logits lie apart.
"""

import shutil
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graftlm.config import ExportConfig
from graftlm.errors import InputError
from graftlm.exchange.adapters import from_foreign_peft, save_adapter
from graftlm.exchange.device import DTYPES
from graftlm.exchange.huggingface import load_model, save_model
from graftlm.exchange.load import Loaded, apply_adapter, hub_revision, load, read_run
from graftlm.exchange.model_card import card
from graftlm.exchange.verify import logits, verification_prompts, verify
from graftlm.files.atomic import atomic_directory, check_new_folder, write_json, write_text
from graftlm.files.formats import read_json
from graftlm.methods import Method, method_from_json
from graftlm.methods.mergeable import MergeableLinear
from graftlm.models import CausalLM
from graftlm.models.checkpoint_mapping import file_names, with_biases

ABOUT, CARD, GENERATION = "export.json", "README.md", "generation_config.json"
CPU = torch.device("cpu")


def export(config: ExportConfig, say: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Write the folder that `config` asks for; returns the object of `graft export --json`.

    `say` is given lines to show. Raises InputError for wrong input, before anything is written; GraftError when the
    files, read back, do not give the run's logits, and then nothing is left.
    """
    target, run_dir = Path(config.to), Path(config.out_dir)
    check_new_folder(target, "to")
    run = read_run(run_dir)
    method = method_from_json(run["method"])
    whole = config.merged or method.is_full_finetune
    _check(config, method, whole)
    loaded = _unmerged(config, run, method)
    prompts = verification_prompts(loaded, run["config"])
    say(f"comparing logits on {prompts.source}")
    expected, base = logits(loaded.model, prompts), loaded.folder
    with atomic_directory(target) as folder:
        if whole:
            kind = "huggingface"
            _write_model(folder, loaded, config.dtype)
        else:
            kind = save_adapter(folder, loaded.model, method.for_inference, *hub_revision(loaded.name))
        del loaded  # there may be room for one model only
        found = logits(_read_back(folder, base, whole), prompts)
        proof = verify(expected, found, config.dtype, prompts.source, f"export of {run_dir}")
        about = {"format": kind, **_about(config, run), "verification": proof.to_json()}
        write_json(folder / ABOUT, about)
        if whole:
            write_text(folder / CARD, card(target.resolve().name, about))
    return {"path": str(target), "max_abs_logit_diff": proof.max_abs_logit_diff, "format": kind}


def _check(config: ExportConfig, method: Method, whole: bool) -> None:
    if config.merged and not method.mergeable:
        raise InputError(
            f"--merged: what {method.name} adds is no change of the base's weights, so it cannot be merged into them; "
            "leave out --merged for the adapter's folder, which graft import puts onto its base"
        )
    if not whole and config.dtype != "float32":
        raise InputError(f"--dtype {config.dtype}: an adapter is kept in float32; add --merged, or leave out --dtype")


def _about(config: ExportConfig, run: dict[str, Any]) -> dict[str, Any]:
    """What export.json says of the run."""
    at = (Path(config.out_dir) / config.checkpoint).resolve().name
    return {
        "base": run["base"],
        "method": run["method"],
        "data": {key: run["data"].get(key) for key in ("name", "fingerprint")},
        "template": run["template"],
        "checkpoint": f"{config.checkpoint}, {at}",
        "val_metrics": (run.get("results") or {}).get(config.checkpoint),
        "dtype": config.dtype,
        "graftlm": version("graftlm"),
        "date": date.today().isoformat(),
    }


def _unmerged(config: ExportConfig, run: dict[str, Any], method: Method) -> Loaded:
    """The run's model in float32, its update added to the base's products and not merged into its weights."""
    base = None if method.is_full_finetune else load(run["base"]["name"], device="cpu", dtype="float32")
    return load("resume", config.out_dir, config.checkpoint, "cpu", "float32", onto=base)


def _write_model(folder: Path, loaded: Loaded, dtype: str) -> None:
    model = loaded.model
    for module in model.modules():
        if isinstance(module, MergeableLinear):
            module.merge()
    names = file_names(model.config)
    state = {name: p.detach() for name, p in model.named_parameters() if name in names}
    file = loaded.folder / "config.json"
    save_model(folder, model, state, with_biases(read_json(file), model.config, str(file)), DTYPES[dtype])
    loaded.tokenizer.save(folder)
    if (loaded.folder / GENERATION).is_file():
        shutil.copyfile(loaded.folder / GENERATION, folder / GENERATION)
    else:
        write_json(folder / GENERATION, {"eos_token_id": loaded.tokenizer.eot})


def _read_back(folder: Path, base: Path, whole: bool) -> CausalLM:
    """The model as anyone would load it from the written files."""
    if whole:
        return load_model(folder, CPU, torch.float32)
    model = load_model(base, CPU, torch.float32)
    method, state = from_foreign_peft(folder, model.config)
    return apply_adapter(model, method, state, str(folder), folds=False)
