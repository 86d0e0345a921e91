"""`graft import`: a PEFT folder, or an adapter folder of our own, -> a run folder for evaluate, generate and export.

    out_dir/run.json                 as a run's own, with "imported" and without results
    out_dir/checkpoints/step-0/      the adapter; best and last are links to it

What is unusual here: the run folder appears only when the model that it loads gives the logits of the folder as it was
read. There is no optimiser state, so `graft train --resume` refuses to go on with it.
"""

from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graftlm.config import ImportConfig
from graftlm.errors import InputError
from graftlm.exchange.adapters import (
    CONFIG,
    OWN_CONFIG,
    OWN_WEIGHTS,
    WEIGHTS,
    config_of,
    from_foreign_peft,
    save_adapter,
)
from graftlm.exchange.export import ABOUT
from graftlm.exchange.huggingface import base_hash, load_model
from graftlm.exchange.load import Loaded, apply_adapter, hub_revision, load, read_tokenizer, resolve_path
from graftlm.exchange.verify import logits, verification_prompts, verify
from graftlm.files.assets import model_folder
from graftlm.files.atomic import atomic_directory, atomic_symlink, check_new_folder, write_json
from graftlm.files.formats import read_json, sha256_file
from graftlm.methods import Method
from graftlm.methods.base import count_parameters
from graftlm.text.template import Template, load_template

CPU = torch.device("cpu")


def import_adapter(config: ImportConfig, say: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Make a run folder of an adapter folder; returns the object of `graft import --json`.

    `say` is given lines to show. Raises InputError for wrong input, GraftError when the run, read back, does not give
    the folder's logits; in both cases nothing is left.
    """
    source, out_dir = Path(config.folder).expanduser(), Path(config.out_dir)
    check_source(source)
    check_new_folder(out_dir, "out_dir")
    template = load_template(config.template, config.labels)
    name, base = _base(config, source)
    sha256 = base_hash(base)
    check_hash(source, sha256, name)
    model = load_model(base, CPU, torch.float32)
    method, state = from_foreign_peft(source, model.config)
    model = apply_adapter(model, method, state, str(source), folds=False)
    if not config.init_from:
        say(f"base model, as the adapter says: {name}")
    name = resolve_path(name)
    prompts = verification_prompts(Loaded(model, read_tokenizer(base), name, base, "", template), {})
    expected = logits(model, prompts)
    with atomic_directory(out_dir) as folder:
        step = folder / "checkpoints" / "step-0"
        step.mkdir(parents=True)
        kind = save_adapter(step, model, method, *hub_revision(name))
        for link in ("best", "last"):
            atomic_symlink(folder / link, f"checkpoints/{step.name}")
        sizes = dict(zip(("trainable", "total"), count_parameters(model), strict=True))
        del model  # there may be room for one only
        run = _write_manifest(config, method, {"name": name, "sha256": sha256}, template) | sizes
        imported = {
            "from": str(source.resolve()),
            "sha256": sha256_file(source / (OWN_WEIGHTS if kind == "graft" else WEIGHTS)),
            "format": kind,
            "date": date.today().isoformat(),
        }
        write_json(folder / "run.json", {**run, "imported": imported})
        say(f"comparing logits on {prompts.source}")
        found = logits(load("resume", folder, device="cpu", dtype="float32").model, prompts)
        proof = verify(expected, found, "float32", prompts.source, f"import of {source}")
        write_json(folder / "run.json", {**run, "imported": {**imported, "verification": proof.to_json()}})
    return {"path": str(out_dir), "max_abs_logit_diff": proof.max_abs_logit_diff, "format": kind}


def _write_manifest(config: ImportConfig, method: Method, base: dict[str, str], template: Template) -> dict[str, Any]:
    """What run.json of a run that was not trained here can say."""
    return {
        "config": {"init_from": base["name"], "template": config.template, "labels": config.labels},
        "method": method.to_json(),
        "base": base,
        "data": {"name": None, "fingerprint": None, "examples": {}},
        "template": {"name": template.name, "text": template.text, "labels": list(template.labels)},
        "versions": {"graftlm": version("graftlm")},
        "results": None,
    }


def check_source(source: Path) -> None:
    """An InputError unless it is a folder with an adapter that we read."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; name the folder of an adapter")
    there = {path.name for path in source.iterdir()}
    if "adapter_model.bin" in there and WEIGHTS not in there:
        raise InputError(
            f"{source}: holds only adapter_model.bin: a pickle can run code, so only safetensors are read; save the "
            "adapter again with PEFT's safe_serialization=True"
        )
    adapter = there & {CONFIG, OWN_CONFIG}
    if "config.json" in there and not adapter:
        raise InputError(f"{source}: is a model, not an adapter; use it as it is with --init_from {source}")
    if "run.json" in there and not adapter:
        raise InputError(f"{source}: is a run folder already; use it with --out_dir {source}")


def _base(config: ImportConfig, source: Path) -> tuple[str, Path]:
    """The base's name and folder: of --init_from, else what the adapter names."""
    if config.init_from:
        return config.init_from, model_folder(config.init_from)
    file, said = config_of(source)
    name, revision = said.get("base_model_name_or_path"), said.get("revision")
    if not isinstance(name, str) or not name:
        raise InputError(f"{file}: names no base model; give it with --init_from")
    if revision and not Path(name).exists():
        name = f"{name}@{revision}"
    try:
        return name, model_folder(name)
    except InputError as error:
        raise InputError(f"{file}: its base {name!r} cannot be loaded; give --init_from ({error})") from None


def check_hash(source: Path, sha256: str, name: str) -> None:
    """An adapter that `graft export` wrote knows its base's weights."""
    if (source / ABOUT).is_file():
        about = read_json(source / ABOUT)
        said = about.get("base") if isinstance(about, dict) else None
        if isinstance(said, dict) and said.get("sha256") != sha256:
            raise InputError(
                f"{source}: was trained on {said.get('name')} with weights {str(said.get('sha256'))[:12]}, but {name} "
                f"holds {sha256[:12]}; use the base it was trained on"
            )
