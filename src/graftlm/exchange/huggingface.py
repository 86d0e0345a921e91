"""Hugging Face model folders to and from our models.

What is unusual here: a base is loaded tensor by tensor from a memory-mapped file into the dtype it will compute in,
so there is never a second copy; and its hash is taken on the way, so that an adapter always knows its base.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.files.formats import read_json, read_weights, save_safetensors, tensors_sha256, write_json
from graftlm.models import CausalLM, build
from graftlm.models.names import check_names, file_names, read_shape, stored_name, to_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """The model in a Hugging Face folder, in evaluation mode and with nothing trained; InputError for a broken one."""
    shape = read_shape(read_json(folder / CONFIG), str(folder / CONFIG))
    stored = read_weights(folder)
    check_names(shape, stored, str(folder))
    with torch.device("meta"):
        model = build(shape)
    names = file_names(shape)
    for name, empty in list(model.named_parameters()):
        theirs, read = names[name]
        key = stored_name(theirs, stored)
        assert key is not None
        tensor = read(stored[key])
        if tensor.shape != empty.shape:
            raise InputError(f"{folder}: {key} gives shape {list(tensor.shape)}, the config wants {list(empty.shape)}")
        # A copy even where dtype and layout fit: a mapped file that is replaced on disk must not change the model.
        tensor = tensor.to(device=device, dtype=dtype, copy=True).contiguous()
        module, attribute = name.rsplit(".", 1)
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad=False))
    return model.eval()


def base_hash(folder: Path) -> str:
    """sha256 over the sorted names, shapes, dtypes and bytes of the folder's weights, as stored."""
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
    tensors = to_file(model.shape, state)
    if dtype is not None:
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
    save_safetensors(folder / WEIGHTS, tensors)
    stored = next(iter(tensors.values())).dtype
    rest = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype", "quantization_config")}
    write_json(folder / CONFIG, {**rest, "dtype": str(stored).removeprefix("torch.")})
