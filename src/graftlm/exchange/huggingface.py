"""Read and write Hugging Face model folders.

A base is loaded tensor by tensor from a memory-mapped file into its compute dtype, so there is never a second copy. Of
a sharded model each rank reads only the rows that it holds: `meta_model`, then shard, then `load_weights_into`.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.files.atomic import write_json
from graftlm.files.formats import (
    LazyTensor,
    full_tensor,
    local_rows,
    read_json,
    read_weights,
    save_safetensors,
    tensors_sha256,
    to_local,
    wrap_like,
)
from graftlm.models import CausalLM
from graftlm.models.config import (
    TensorMapping,
    check_names,
    file_parts,
    one_to_file,
    read_model_config,
    stored_name,
    tensor_mapping,
    to_file,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The model of a Hugging Face folder, in evaluation mode and frozen; InputError for a broken one."""
    model = meta_model(folder, dtype)
    load_weights_into(model, folder, device, dtype)
    return model


def meta_model(folder: Path, dtype: torch.dtype) -> CausalLM:
    """The same without weights: all are on torch's meta device, and take no memory."""
    config = read_model_config(read_json(folder / CONFIG), str(folder / CONFIG))
    check_names(config, read_weights(folder), str(folder))
    with torch.device("meta"):
        model = CausalLM(config).to(dtype)
    return model.requires_grad_(False).eval()


def load_weights_into(model: CausalLM, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Load every parameter that is on the meta device and in the folder, trained ones too.

    All are rounded to `dtype` first, as a frozen base's are.
    """
    on_meta = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    for name, rows in iter_local_shards(model, folder, on_meta):
        module, _, attribute = name.rpartition(".")
        p = model.get_parameter(name)
        # A copy even if dtype and layout fit: a mapped file that is replaced on disk must not change the model.
        tensor = rows.to(device=device, dtype=dtype, copy=True).to(p.dtype).contiguous()
        loaded = nn.Parameter(wrap_like(p, tensor), requires_grad=p.requires_grad)
        setattr(model.get_submodule(module), attribute, loaded)


def iter_local_shards(model: CausalLM, folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(our name, the rows on this rank, as stored in the folder) of these parameters, if the folder has them."""
    stored, mapping = read_weights(folder), tensor_mapping(model.config)
    for name in (name for name in names if name in mapping):
        p, source = model.get_parameter(name), mapping[name]
        key = stored_name(source.name, stored)
        if key is None:
            raise InputError(f"{folder}: the tensor {source.name} is missing: fetch it again")
        shape = source.read(torch.empty(stored.shape(key), device="meta")).shape
        if shape != p.shape:
            raise InputError(f"{folder}: {key} gives shape {list(shape)}, the config wants {list(p.shape)}")
        rows = local_rows(p)
        if len(rows) == (p.shape[0] if p.dim() else 1):
            yield name, source.read(stored[key])
        else:
            yield name, source.part(stored, key, rows) if rows else torch.empty(to_local(p).shape)


def base_hash(folder: Path) -> str:
    """sha256 of the sorted names, shapes, dtypes and bytes of the folder's weights, as stored."""
    return tensors_sha256(read_weights(folder))


def save_model(
    folder: Path,
    model: CausalLM,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and model.safetensors into an existing folder.

    `state` holds all parameters by our names; `config` is the base's config.json, whose dtype entry is corrected.
    """
    tensors = to_file(model.config, state)
    if dtype is not None:
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
    save_safetensors(folder / WEIGHTS, tensors)
    save_config(folder, config, next(iter(tensors.values())).dtype)


def save_config(folder: Path, config: Mapping[str, Any], stored: torch.dtype) -> None:
    """Write config.json for weights of this dtype."""
    fields = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype", "quantization_config")}
    write_json(folder / CONFIG, {**fields, "dtype": str(stored).removeprefix("torch.")})


def lazy_state_dict(model: CausalLM, state: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """The tensors of the folder that `save_model` would write, each gathered from all ranks when it is read."""

    def lazy(parts: Mapping[str, TensorMapping]) -> LazyTensor:
        empty = one_to_file(parts, {n: torch.empty(state[n].shape, device="meta") for n in parts})

        def gather() -> Tensor:
            return one_to_file(parts, {n: full_tensor(state[n].detach()) for n in parts})

        return LazyTensor(state[next(iter(parts))].dtype, tuple(empty.shape), gather)

    return {name: lazy(parts) for name, parts in file_parts(model.config).items()}
