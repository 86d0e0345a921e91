"""A .gguf file -> a model folder in the Hugging Face layout: config.json, float32 weights, tokenizer.

`gguf_file.py` reads the container, `gguf_models.py` maps settings and tensors by the table of `gguf_architectures.py`,
`gguf_tokenizer.py` rebuilds the tokenizer.
Weights are streamed: a slice of rows is dequantised and written at a time, so the peak memory is a few tens of MB for a
model of any size. torch is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftlm.files.atomic import write_json
from graftlm.files.formats import write_safetensors
from graftlm.files.gguf_file import GGUFFile, one_line
from graftlm.files.gguf_models import config_json, read_config, tensor_entries
from graftlm.files.gguf_tokenizer import token_ids, write_tokenizer


def gguf_to_folder(path: Path, folder: Path, packed: bool = False) -> None:
    """Convert a .gguf file into `folder`: config.json, model.safetensors (float32) and the tokenizer's files.

    packed: matrices keep their blocks, in tensors of bytes whose names end with the format: `….weight.q4_0`.
    Raises InputError for a corrupted or truncated file and for anything that is not supported.
    """
    with one_line(path):
        file = GGUFFile(path)
        config, ids = read_config(file), token_ids(file)
        entries = tensor_entries(file, config)
        write_safetensors(folder / "model.safetensors", [entry.written(file, packed) for entry in entries])
        write_tokenizer(file, config["max_position_embeddings"], folder)
    write_json(folder / "config.json", config_json(file, config) | ids)
    write_json(folder / "generation_config.json", ids)


def gguf_config(path: Path) -> dict[str, Any]:
    """The config.json of a .gguf file, from its header. The weights are not read."""
    with one_line(path):
        file = GGUFFile(path)
        return config_json(file, read_config(file)) | token_ids(file)
