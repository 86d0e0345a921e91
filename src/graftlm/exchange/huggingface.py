"""Read and write Hugging Face model folders, and adapter folders.

A base is loaded tensor by tensor from a memory-mapped file into its compute dtype, so there is never a second copy. Of
a sharded model each rank reads only the rows that it holds: `meta_model`, then shard, then `load_weights_into`.

An adapter folder holds PEFT's two files if PEFT has the method, else our own two:

    adapter_config.json   adapter_model.safetensors      PEFT's (LoRA, DoRA, prefix tuning, IA3)
    graft_adapter.json    graft_adapter.safetensors      ours (BitFit, bottleneck adapters): {"format": 1, "method":
                                                         {"method": name, its fields}, "base_model_name_or_path",
                                                         "revision"}, and the trained tensors by our names

Reading an adapter is strict: exactly the tensors and settings of the method, or an error that names the difference.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.exchange.base_format import (
    dense_hash,
    fill_packed,
    load_packed,
    packed_plan,
    read_dense,
    stored_parameters,
)
from graftlm.files import formats
from graftlm.files.atomic import write_json
from graftlm.files.memory import free_mb, out_of_memory_error
from graftlm.methods import METHODS, Method, method_from_json
from graftlm.methods.base import PeftFolder, load_trainable_state_dict, mergeable_linears, trainable_state_dict
from graftlm.models.base import CausalLM
from graftlm.models.config import (
    ModelConfig,
    TensorMapping,
    check_dtypes,
    check_names,
    file_parts,
    one_to_file,
    read_model_config,
    to_file,
    untie_if_different,
    with_biases,
)
from graftlm.models.packed import FORMATS

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_CONFIG, OWN_WEIGHTS = "graft_adapter.json", "graft_adapter.safetensors"
EXPORT_JSON = "export.json"
"""The record of `graft export`, next to the files that it wrote."""
FORMAT_VERSION = 1
"""Of our own adapter folders."""
HEAD_ROWS = 16
"""Rows of a tied model's head that are compared with the embedding where no weights are to be read."""
RANDOM_BLOCK = 1_000_003
"""Random values that are drawn and then repeated; a prime number, so that rows differ."""


# ------------------------------------------------------------------------------------------------ model folders


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, base_format: str = "dense") -> CausalLM:
    """The model of a Hugging Face folder, in evaluation mode and frozen; InputError if it is broken or too large.

    base_format: a value of `--base_format` other than auto (`base_format.py`).
    """
    model = meta_model(folder, dtype)
    plan = packed_plan(model, folder, base_format, _on_meta(model))
    check_memory(model, folder, device, plan)
    load_packed(model, folder, plan, device)
    load_weights_into(model, folder, device, dtype)
    return model


def random_weights_model(
    folder: Path, device: torch.device, dtype: torch.dtype, base_format: str = "dense"
) -> CausalLM:
    """The same with random weights: what is timed or counted on it is that of the model, and no weights are read.

    Of a head that is stored although the config ties it a few rows are read, to see whether it is the embedding.
    """
    model = meta_model(folder, dtype, HEAD_ROWS)
    plan = packed_plan(model, folder, base_format, _on_meta(model))
    check_memory(model, folder, device, plan)
    fill_packed(model, plan, _random_block(), device)
    fill_with_random(model, folder, device, dtype)
    return model


def meta_model(folder: Path, dtype: torch.dtype, head_rows: int | None = None) -> CausalLM:
    """The same without weights: all are on torch's meta device, and take no memory.

    head_rows: see `untie_if_different`.
    """
    config = read_model_config(formats.read_json(folder / CONFIG), str(folder / CONFIG))
    stored = formats.read_weights(folder)
    check_dtypes(config, stored, str(folder))
    config = untie_if_different(config, stored, head_rows)
    check_names(config, stored, str(folder))
    with torch.device("meta"):
        model = CausalLM(config).to(dtype)
    return model.requires_grad_(False).eval()


def check_memory(model: CausalLM, folder: Path, device: torch.device, plan: Mapping[str, str]) -> None:
    """An InputError if the model's weights need more memory than is free. plan: `packed_plan`'s."""
    blocks = {name: FORMATS[kind] for name, kind in plan.items()}
    size = sum(
        p.numel() // blocks[name].block_size * blocks[name].block_bytes if name in blocks else p.nbytes
        for name, p in model.named_parameters()
    )
    if size > 1e6 * free_mb(device):
        raise out_of_memory_error(f"{folder}: the model in {str(model.dtype).removeprefix('torch.')}", size, device)


def load_weights_into(model: CausalLM, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Load every parameter that is on the meta device and in the folder, trained ones too.

    All are rounded to `dtype` first, as a frozen base's are.
    """
    _set_parameters(model, iter_local_shards(model, folder, _on_meta(model)), device, dtype)


def fill_with_random(model: CausalLM, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """The same with random values: matrices normal(0, 0.02), gains 1, biases 0. The folder's shapes are checked."""
    block = _random_block().to(device, dtype)
    places = stored_parameters(model, formats.read_weights(folder), folder, _on_meta(model))
    shards = ((name, _random(formats.to_local(p).shape, name, block)) for name, p, _, _ in places)
    _set_parameters(model, shards, device, dtype)


def _random_block() -> Tensor:
    return torch.randn(RANDOM_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02)


def _random(shape: torch.Size, name: str, block: Tensor) -> Tensor:
    """Drawn once and repeated: this is as fast as memory is, and every page is written."""
    if len(shape) < 2:
        return torch.full(shape, float(name.endswith("weight")), dtype=block.dtype, device=block.device)
    values = torch.empty(shape, dtype=block.dtype, device=block.device)
    for part in values.view(-1).split(len(block)):
        part.copy_(block[: len(part)])
    return values


def _on_meta(model: CausalLM) -> list[str]:
    return [name for name, p in model.named_parameters() if p.device.type == "meta"]


def _set_parameters(
    model: CausalLM, shards: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> None:
    """Replace parameters by these (name, rows on this rank)."""
    for name, rows in shards:
        module, _, attribute = name.rpartition(".")
        p = model.get_parameter(name)
        # A copy even if dtype and layout fit: a mapped file that is replaced on disk must not change the model.
        tensor = rows.to(device=device, dtype=dtype, copy=True).to(p.dtype).contiguous()
        loaded = nn.Parameter(formats.wrap_like(p, tensor), requires_grad=p.requires_grad)
        setattr(model.get_submodule(module), attribute, loaded)


def iter_local_shards(model: CausalLM, folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(our name, the rows on this rank, as stored in the folder) of these parameters, if the folder has them."""
    stored = formats.read_weights(folder)
    for name, p, source, key in stored_parameters(model, stored, folder, list(names)):
        rows = formats.local_rows(p)
        if len(rows) == (p.shape[0] if p.dim() else 1):
            yield name, read_dense(source, stored, key)
        else:
            yield name, source.part(stored, key, rows) if rows else torch.empty(formats.to_local(p).shape)


def base_hash(folder: Path) -> str:
    """sha256 of the sorted names, shapes, dtypes and bytes of the folder's weights, as stored."""
    return formats.tensors_sha256(formats.read_weights(folder))


def save_model(
    folder: Path,
    model: CausalLM,
    state: Mapping[str, Tensor],
    base: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and model.safetensors into an existing folder.

    `state` holds all parameters by our names; `base` is the base's folder.
    """
    tensors = to_file(model.config, state)
    if dtype is not None:
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
    formats.save_safetensors(folder / WEIGHTS, tensors)
    save_config(folder, model.config, base, next(iter(tensors.values())).dtype)


def config_json_of(model: ModelConfig, base: Path) -> dict[str, Any]:
    """The base's config.json, changed to describe `model`; an InputError if that cannot be."""
    return with_biases(formats.read_json(base / CONFIG), model, str(base / CONFIG))


def save_config(folder: Path, model: ModelConfig, base: Path, stored: torch.dtype) -> None:
    """Write the base's config.json, with the biases, the head and the dtype that the weights have now."""
    config = config_json_of(model, base)
    fields = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype", "quantization_config")}
    write_json(folder / CONFIG, {**fields, "dtype": str(stored).removeprefix("torch.")})


def lazy_state_dict(model: CausalLM, state: Mapping[str, Tensor]) -> dict[str, formats.LazyTensor]:
    """The tensors of the folder that `save_model` would write, each gathered from all ranks when it is read."""

    def lazy(parts: Mapping[str, TensorMapping]) -> formats.LazyTensor:
        empty = one_to_file(parts, {n: torch.empty(state[n].shape, device="meta") for n in parts})

        def gather() -> Tensor:
            return one_to_file(parts, {n: formats.full_tensor(state[n].detach()) for n in parts})

        return formats.LazyTensor(state[next(iter(parts))].dtype, tuple(empty.shape), gather)

    return {name: lazy(parts) for name, parts in file_parts(model.config).items()}


# ---------------------------------------------------------------------------------------------- adapter folders


def save_adapter(folder: Path, model: CausalLM, method: Method, base: str, revision: str | None = None) -> str:
    """Write what `method` trained in `model` into an existing folder; returns the format, "peft" or "graft".

    `base` is a hub id or a folder.
    """
    base_model = {"base_model_name_or_path": base, "revision": revision}
    if (as_peft := method.to_peft(model)) is not None:
        config, tensors = as_peft
        formats.save_safetensors(folder / ADAPTER_WEIGHTS, {name: t.contiguous() for name, t in tensors.items()})
        write_json(folder / ADAPTER_CONFIG, {**config, **base_model})
        return "peft"
    formats.save_safetensors(folder / OWN_WEIGHTS, trainable_state_dict(model))
    write_json(folder / OWN_CONFIG, {"format": FORMAT_VERSION, "method": method.to_json(), **base_model})
    return "graft"


def read_adapter(folder: Path, config: ModelConfig, method: Method) -> dict[str, Tensor]:
    """The trained tensors, by our names, of a folder that `save_adapter` wrote with this method."""
    path = folder / OWN_CONFIG
    if not path.is_file():
        return method.from_peft(config, _read_peft(folder), str(folder / ADAPTER_CONFIG))
    adapter, expected = read_object(path), method.to_json()
    fields = adapter.get("method")
    if adapter.get("format") != FORMAT_VERSION or not isinstance(fields, dict):
        raise InputError(f"{path}: is no adapter of format {FORMAT_VERSION}; use the folder as it was written")
    for key in sorted(expected.keys() | fields.keys()):
        value = expected.get(key)
        if fields.get(key) != (list(value) if isinstance(value, tuple) else value):
            raise InputError(f"{path}: {key} is {fields.get(key)!r}, the run says {value!r}")
    return formats.load_safetensors(folder / OWN_WEIGHTS)


def from_foreign_peft(folder: Path, config: ModelConfig) -> tuple[Method, dict[str, Tensor]]:
    """The method and the trained tensors of any adapter folder; an InputError names what is not supported."""
    if (path := folder / OWN_CONFIG).is_file():
        method = method_from_json(read_object(path).get("method"), str(path))
        return method, read_adapter(folder, config, method)
    as_peft, where = _read_peft(folder), str(folder / ADAPTER_CONFIG)
    for cls in METHODS.values():
        if (result := cls.from_foreign_peft(config, as_peft, where)) is not None:
            return result
    known = sorted({cls.peft_type for cls in METHODS.values() if cls.peft_type})
    raise InputError(f"{where}: peft_type {as_peft[0].get('peft_type')!r} is not supported; {', '.join(known)} are")


def apply_adapter(model: CausalLM, method: Method, state: Mapping[str, Tensor], where: str) -> CausalLM:
    """The model adapted by a method with these trained tensors, in evaluation mode; its update is not merged."""
    method.install(model, torch.Generator().manual_seed(0))
    load_trainable_state_dict(model, state, where)
    for linear in mergeable_linears(model):
        linear.merge_on_eval = False
    return model.eval()


def check_source(folder: Path) -> None:
    """An InputError unless it is a folder with an adapter that can be read."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the folder of an adapter")
    files = {path.name for path in folder.iterdir()}
    if "adapter_model.bin" in files and ADAPTER_WEIGHTS not in files:
        raise InputError(
            f"{folder}: holds only adapter_model.bin: a pickle can run code, so only safetensors are read; save the "
            "adapter again with PEFT's safe_serialization=True"
        )
    if "config.json" in files and not files & {ADAPTER_CONFIG, OWN_CONFIG}:
        raise InputError(f"{folder}: is a model, not an adapter; use it as it is with --init_from {folder}")
    if "run.json" in files and not files & {ADAPTER_CONFIG, OWN_CONFIG}:
        raise InputError(f"{folder}: is a run folder already; use it with --out_dir {folder}")


def check_no_adapter(folder: Path) -> None:
    """An InputError if an adapter is next to a model's weights: transformers loads both, and we the model alone."""
    for name in (ADAPTER_CONFIG, OWN_CONFIG):
        if (folder / name).is_file():
            raise InputError(
                f"{folder}: holds an adapter ({name}) next to the model, which would not be loaded: make a run of it "
                f"with graft import {folder}, or move the adapter's files"
            )


def check_exported_base(folder: Path, base: Path, sha256: str, name: str) -> None:
    """An InputError if `graft export` wrote the folder, and for another base than `name` in `base` with this hash."""
    if (folder / EXPORT_JSON).is_file():
        record = formats.read_json(folder / EXPORT_JSON)
        trained = record.get("base") if isinstance(record, dict) else None
        known = trained.get("sha256") if isinstance(trained, dict) else sha256
        if isinstance(trained, dict) and known != sha256 and known != dense_hash(base):
            raise InputError(
                f"{folder}: was trained on {trained.get('name')} with weights {str(known)[:12]}, but {name} "
                f"holds {sha256[:12]}; use the base it was trained on"
            )


def base_of(folder: Path) -> tuple[str, Path]:
    """The base model that an adapter folder names, with its revision, and the file that names it. Raises InputError."""
    path = next((folder / name for name in (OWN_CONFIG, ADAPTER_CONFIG) if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: holds no adapter (neither {ADAPTER_CONFIG} nor {OWN_CONFIG})")
    config = read_object(path)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise InputError(f"{path}: names no base model; give it with --init_from")
    return f"{name}@{revision}" if revision and not Path(name).exists() else name, path


def _read_peft(folder: Path) -> PeftFolder:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{folder}: holds no adapter (no {ADAPTER_CONFIG})")
    return read_object(folder / ADAPTER_CONFIG), formats.load_safetensors(folder / ADAPTER_WEIGHTS)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises InputError."""
    config = formats.read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a JSON object; use the folder as it was written")
    return config
