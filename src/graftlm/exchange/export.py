"""`graft export`: write a run's checkpoint as a folder that PEFT or transformers loads, and verify it.

    adapter     PEFT's folder, or our own if PEFT has no such method (`adapters.py`)
    model       --format merged, or full fine-tuning: a Hugging Face folder with tokenizer and model card
    gguf        --format gguf, gguf-lora or ollama: for llama.cpp and Ollama (`gguf_export.py`)

A folder gets its name only after its files were read back and gave the logits of the adapted base. Those are computed
with the update added and not merged, so merging is verified too. export.json records the folder's origin and the
difference of the logits.
"""

from collections.abc import Callable
from datetime import date
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graftlm.config import ExportConfig
from graftlm.config.exchange import GGUF_FORMATS
from graftlm.errors import InputError
from graftlm.exchange.base_format import dequantize_base, format_note
from graftlm.exchange.endings import write_generation_config, write_tokenizer
from graftlm.exchange.gguf_export import GGUFExport, record_path
from graftlm.exchange.huggingface import EXPORT_JSON, config_json_of, load_model, save_adapter, save_model
from graftlm.exchange.load import DTYPES, ModelBundle, hub_revision, load, load_base, load_foreign_adapter
from graftlm.exchange.runs import RESUME, find_run, format_of_run
from graftlm.exchange.verify import ReferenceLogits
from graftlm.files.atomic import atomic_directory, check_new_file, check_new_folder, write_json, write_text
from graftlm.files.fetch import HUB_NAME
from graftlm.methods import Method, method_from_json
from graftlm.methods.base import mergeable_linears
from graftlm.models import CausalLM
from graftlm.models.config import tensor_mapping

FORM = """It was trained on prompts of this form, followed by {labels}:

````text
{template}
````"""
CHAT_FORM = "It was trained on conversations in the tokenizer's chat template."
TEXT_FORM = "It was trained on texts without labels: it continues a text as it is given."
USAGE = 'inputs = tokenizer("…", return_tensors="pt")'
CHAT_USAGE = """inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "…"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""

PACKED_NOTES = {
    True: "the update is merged into the dequantised weights",
    False: "the adapter was trained on these, and is verified on them",
}


def export(config: ExportConfig, say: Callable[[str], object] = lambda line: None) -> dict[str, Any]:
    """Write the folder that `config` names; returns the object of `graft export --json`.

    `say` gets lines for the terminal. Raises InputError for wrong input, before anything is written; GraftError if the
    files, read back, do not give the run's logits, and then nothing is left.
    """
    target = Path(config.to)
    if config.format in ("gguf", "gguf-lora"):
        check_new_file(target, "to")
        check_new_file(record_path(target), "to")
    else:
        check_new_folder(target, "to")
    source = find_run(RESUME, config.out_dir, config.checkpoint)
    assert source is not None
    run, method = source.record, method_from_json(source.record["method"])
    _check(config, method)
    # The base is loaded first, so that the run's update is added to its output and not merged into its weights.
    base = None if method.is_full_finetune else _dense_base(config, run, say)
    loaded = load(RESUME, source.folder, source.checkpoint, device="cpu", dtype="float32", base=base)
    if config.format in GGUF_FORMATS:
        return _export_gguf(config, loaded, say)
    merged = config.format == "merged" or method.is_full_finetune
    if merged:
        config_json_of(loaded.model.config, loaded.folder)  # refused before anything is computed
    reference, base_folder = ReferenceLogits(loaded, run["config"]), loaded.folder
    say(f"comparing logits on {reference.source}")
    with atomic_directory(target) as folder:
        if merged:
            _write_model(folder, loaded, config.dtype)
            format_, base_folder = "huggingface", folder
        else:
            format_ = save_adapter(folder, loaded.model, method.for_inference, *hub_revision(loaded.name))
        origin = {**_origin(config, loaded), **write_generation_config(folder, loaded)}
        del loaded, base  # there may be memory for one model only
        read_back = _read_back(folder, base_folder, format_of_run(run))
        verification = reference.verify(read_back, config.dtype, f"export of {source.folder}")
        record = {"format": format_, **origin, "verification": verification.to_json()}
        write_json(folder / EXPORT_JSON, record)
        if merged:
            write_text(folder / "README.md", _card(target.resolve().name, record))
    return {"path": str(target), "max_abs_logit_diff": verification.max_abs_logit_diff, "format": format_}


def _dense_base(config: ExportConfig, run: dict[str, Any], say: Callable[[str], object]) -> ModelBundle:
    """The base of a run on the CPU in float32, dequantised if it was packed."""
    base = load_base(run["base"]["name"], device="cpu", dtype="float32", base_format=format_of_run(run))
    for note in format_note(base.model):
        say(f"{note}: {PACKED_NOTES[config.format in ('merged', 'gguf', 'ollama')]}")
    dequantize_base(base.model)
    return base


def _export_gguf(config: ExportConfig, loaded: ModelBundle, say: Callable[[str], object]) -> dict[str, Any]:
    """Write the formats of llama.cpp; the record is next to a file, or in the folder."""
    assert loaded.run is not None
    gguf, target = GGUFExport(loaded, config.format, config.quantization), Path(config.to)
    data = loaded.run["config"]
    longest = min(data.get("max_length") or gguf.context, gguf.context)
    reference = ReferenceLogits(loaded, {**data, "max_length": longest})
    say(f"comparing logits on {reference.source}")
    origin = {
        "format": config.format,
        "quantization": config.quantization,
        **_origin(config, loaded),
        "eos_token_id": loaded.eos_token_ids,
        "ends_with": loaded.tokenizer.token(loaded.eos_token_ids[0]),
    }
    record = gguf.write(target, reference, origin, say)
    difference = record["verification"]["max_abs_logit_diff"]
    llama_cpp = record["llama_cpp"]
    return {"path": str(target), "max_abs_logit_diff": difference, "format": config.format, "llama_cpp": llama_cpp}


def _check(config: ExportConfig, method: Method) -> None:
    merges = config.format in ("merged", "gguf", "ollama")
    if merges and not method.mergeable:
        raise InputError(
            f"--format {config.format}: what {method.name} adds is no change of the base's weights, so it cannot be "
            "merged into them; use --format peft for the adapter's folder, which graft import puts onto its base"
        )
    if config.format == "gguf-lora" and method.is_full_finetune:
        raise InputError("--format gguf-lora: a run of full fine-tuning has no adapter: use --format gguf")
    writes_model = config.format == "merged" or (config.format == "peft" and method.is_full_finetune)
    if config.dtype != "float32" and not writes_model:
        other = "--quantization" if config.format in GGUF_FORMATS else "--format merged"
        raise InputError(f"--dtype {config.dtype}: an adapter is kept in float32; use {other}, or leave out --dtype")
    if config.quantization != "f16" and config.format not in ("gguf", "ollama"):
        raise InputError(f"--quantization {config.quantization}: only for --format gguf and ollama: leave it out")


def _origin(config: ExportConfig, loaded: ModelBundle) -> dict[str, Any]:
    """What export.json takes from the run."""
    assert loaded.source is not None
    run, checkpoint = loaded.source.record, Path(loaded.source.checkpoint).name
    return {
        "base": run["base"],
        "method": run["method"],
        "data": {key: run["data"].get(key) for key in ("name", "fingerprint", "chat")},
        "template": run["template"],
        "checkpoint": f"{checkpoint}, step-{loaded.source.step or 0}",
        "val_metrics": (run.get("results") or {}).get(checkpoint),
        "dtype": config.dtype,
        "graftlm": version("graftlm"),
        "date": date.today().isoformat(),
    }


def _write_model(folder: Path, loaded: ModelBundle, dtype: str) -> None:
    model = loaded.model
    for linear in mergeable_linears(model):
        linear.merge()
    names = tensor_mapping(model.config)
    state = {name: p.detach() for name, p in model.named_parameters() if name in names}
    save_model(folder, model, state, loaded.folder, DTYPES[dtype])
    write_tokenizer(folder, loaded)


def _read_back(folder: Path, base: Path, base_format: str) -> CausalLM:
    """The model of the written files, loaded as any user would; `base` is the folder itself for a merged model."""
    if folder == base:
        return load_model(folder, torch.device("cpu"), torch.float32)
    return load_foreign_adapter(base, folder, torch.float32, base_format)[0]


def _card(title: str, record: dict[str, Any]) -> str:
    """README.md of an exported model, from `model_card.md`; `record` is the contents of export.json.

    The Hugging Face hub reads the YAML block at its top.
    """
    base, data, verification = record["base"], record["data"], record["verification"]
    on_hub = HUB_NAME.fullmatch(base["name"]) is not None and "/" in base["name"]
    base_name = base["name"] if on_hub else Path(base["name"]).name  # a local path is private
    method, *settings = (value for value in record["method"].items() if value[1] is not None)
    fields = ", ".join(f"{key} {'+'.join(map(str, v)) if isinstance(v, list | tuple) else v}" for key, v in settings)
    checkpoint, metrics = record["checkpoint"], record["val_metrics"]
    if metrics:
        checkpoint += f": validation loss {metrics['val_loss']:.4f}"
        checkpoint += "" if metrics.get("val_accuracy") is None else f", accuracy {metrics['val_accuracy']:.4f}"
    rows = {
        "base": base_name,
        "base weights": f"sha256 {base['sha256']}",
        "method": f"{method[1]} ({fields})" if fields else method[1],
        "data": f"{Path(data['name']).name}, fingerprint {data['fingerprint']}" if data.get("name") else "not known",
        "checkpoint": checkpoint,
        "dtype": record["dtype"],
        "made with": f"graftlm {record['graftlm']}, {record['date']}",
        "verification": f"loaded back from these files, the largest difference of a logit from the adapted base is "
        f"{verification['max_abs_logit_diff']:.1e} ({verification['tolerance']:.1e} is accepted; the largest logit is "
        f"{verification['max_abs_logit']:.0f}), on {verification['prompts']}",
    }
    cells = {key: " ".join(text.replace("|", "\\|").split()) for key, text in rows.items()}
    is_labelled = not metrics or metrics.get("val_accuracy") is not None  # an accuracy is measured of labels only
    usage, form = (CHAT_USAGE, CHAT_FORM) if data["chat"] else (USAGE, FORM if is_labelled else TEXT_FORM)
    template = (resources.files("graftlm.exchange") / "model_card.md").read_text(encoding="utf-8")
    return template.format(
        base_model=f"base_model: {base['name'].partition('@')[0]}\n" if on_hub else "",
        method=method[1],
        title=title,
        base=base_name,
        rows="\n".join(f"| {key} | {cell} |" for key, cell in cells.items()),
        usage=usage,
        end=record["ends_with"],
        ids=record["eos_token_id"],
        form=form.format(
            labels=" or ".join(f"`{label}`" for label in record["template"]["labels"]),
            template=record["template"]["text"],
        ),
    )
