"""`graft import`: turn an adapter folder, PEFT's or our own, into a run folder for evaluate, generate and export.

    out_dir/run.json                 as a run's own, with "imported" and without results
    out_dir/checkpoints/step-0/      the adapter; best and last are links to it

The run folder appears only if its model gives the logits of the folder as it was read. It has no optimizer state, so
`graft train --resume` refuses to continue it.
"""

from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graftlm.config import ImportConfig
from graftlm.errors import InputError
from graftlm.exchange.huggingface import (
    ADAPTER_WEIGHTS,
    OWN_WEIGHTS,
    base_hash,
    base_of,
    check_exported_base,
    check_source,
    save_adapter,
)
from graftlm.exchange.load import (
    ModelBundle,
    adapter_notes,
    hub_revision,
    learned_chat,
    load,
    load_foreign_adapter,
    read_tokenizer,
    resolve_path,
)
from graftlm.exchange.runs import base_name
from graftlm.exchange.verify import ReferenceLogits
from graftlm.files.assets import model_folder
from graftlm.files.atomic import atomic_directory, atomic_symlink, check_new_folder, write_json
from graftlm.files.formats import sha256_file
from graftlm.methods.base import count_parameters
from graftlm.text.template import load_template


def import_adapter(config: ImportConfig, say: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Make a run folder of an adapter folder; returns the object of `graft import --json`.

    `say` gets lines for the terminal. Raises InputError for wrong input, GraftError if the run, read back, does not
    give the folder's logits; in both cases nothing is left.
    """
    source, out_dir = Path(config.folder), Path(config.out_dir)
    check_source(source)
    check_new_folder(out_dir, "out_dir")
    template = load_template(config.template, config.labels)
    name, base = _base(config, source)
    sha256 = base_hash(base)
    check_exported_base(source, base, sha256, name)
    model, method = load_foreign_adapter(base, source, torch.float32)
    if not config.init_from:
        say(f"base model, as the adapter says: {name}")
    name = resolve_path(name)
    tokenizer = read_tokenizer(base)
    for note in adapter_notes(source, model.config, tokenizer):
        say(note)
    reference = ReferenceLogits(ModelBundle(model, tokenizer, name, base, "", template), {})
    with atomic_directory(out_dir) as folder:
        step = folder / "checkpoints" / "step-0"
        step.mkdir(parents=True)
        format_ = save_adapter(step, model, method, *hub_revision(name))
        for link in ("best", "last"):
            atomic_symlink(folder / link, f"checkpoints/{step.name}")
        trainable, total = count_parameters(model)
        del model  # there may be memory for one only
        imported: dict[str, Any] = {
            "from": str(source.resolve()),
            "sha256": sha256_file(source / (OWN_WEIGHTS if format_ == "graft" else ADAPTER_WEIGHTS)),
            "format": format_,
            "date": date.today().isoformat(),
        }
        run: dict[str, Any] = {
            "config": {"init_from": name, "template": config.template, "labels": config.labels},
            "method": method.to_json(),
            "base": {"name": name, "sha256": sha256},
            "data": {"name": None, "fingerprint": None, "examples": {}, "chat": learned_chat(source, tokenizer)},
            "template": template.to_json(),
            "versions": {"graftlm": version("graftlm")},
            "results": None,
            "trainable": trainable,
            "total": total,
            "imported": imported,
        }
        write_json(folder / "run.json", run)
        say(f"comparing logits on {reference.source}")
        read_back = load(str(folder), device="cpu", dtype="float32").model
        verification = reference.verify(read_back, "float32", f"import of {source}")
        imported["verification"] = verification.to_json()
        write_json(folder / "run.json", run)
    return {"path": str(out_dir), "max_abs_logit_diff": verification.max_abs_logit_diff, "format": format_}


def _base(config: ImportConfig, source: Path) -> tuple[str, Path]:
    """The base's name and folder: of --init_from, else the one that the adapter names."""
    if config.init_from:
        name = base_name(config.init_from)
        return name, model_folder(name)
    name, file = base_of(source)
    try:
        return name, model_folder(name)
    except InputError as error:
        raise InputError(f"{file}: its base {name!r} cannot be loaded; give --init_from ({error})") from None
