"""Write a .gguf file: settings and tensors, as llama.cpp reads them. The `gguf` package has the container's format.

Tensors are quantised and written one at a time. Matrices get the file's type; norms, biases, positions and short
convolutions stay float32, and so does a matrix whose rows are no multiple of the type's block. Embedding and head are
never below Q8_0: they are used most, and llama.cpp, too, gives them more bits.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.files.gguf_file import GGUFFile

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""What the `gguf` package can quantise."""
EMBEDDINGS = ("token_embd.weight", "output.weight")
PLAIN = ("position_embd.weight", "shortconv.conv.weight", "rope_freqs.weight", "rope_factors")


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its name, its shape, rows first, and its float32 values."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]


def tensor_type(tensor: Planned, kind: str) -> GGMLQuantizationType:
    """The type in which a tensor is stored in a file of this kind."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(tensor.shape) < 2 or any(part in tensor.name for part in PLAIN):
        return GGMLQuantizationType.F32
    low = kind.startswith(("q4", "q5"))
    matrix = GGMLQuantizationType["Q8_0" if low and tensor.name in EMBEDDINGS else kind.upper()]
    block, _ = GGML_QUANT_SIZES[matrix]
    return matrix if tensor.shape[-1] % block == 0 else GGMLQuantizationType.F32


def write_gguf(
    path: Path, architecture: str, settings: Mapping[str, Any], tensors: Iterable[Planned], kind: str
) -> None:
    """Write a file with these settings (lists of one type, texts, numbers, booleans) and tensors."""
    import gguf
    import numpy as np

    tensors = list(tensors)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in settings.items():
        if key != "general.architecture" and value is not None:
            writer.add_key_value(key, value, _value_type(value), *_item_type(value))
    types = [tensor_type(tensor, kind) for tensor in tensors]
    for tensor, stored in zip(tensors, types, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[stored]
        bytes_ = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), bytes_, stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, stored in zip(tensors, types, strict=True):
            values = np.ascontiguousarray(tensor.values(), dtype=np.float32)
            assert values.shape == tensor.shape, tensor.name
            writer.write_tensor_data(gguf.quantize(values, stored))
    except OSError as error:
        if error.errno is None:  # numpy's: "1536 requested and 1008 written"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        writer.close()


def _value_type(value: Any) -> Any:
    from gguf import GGUFValueType

    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return GGUFValueType[kinds[type(value)]]


def _item_type(value: Any) -> tuple[Any, ...]:
    from gguf import GGUFValueType

    if not isinstance(value, list):
        return ()
    return (GGUFValueType.INT32 if type(value[0]) is int else _value_type(value[0]),)


class _Field:
    def __init__(self, value: Any) -> None:
        self._value = value
        self.data = value if isinstance(value, list) else []

    def contents(self, index: int | None = None) -> Any:
        return self._value if index is None else self._value[index]


class _Tensor:
    def __init__(self, tensor: Planned) -> None:
        import numpy as np
        from gguf import GGMLQuantizationType

        self.shape = np.array(tensor.shape[::-1])
        self.tensor_type = GGMLQuantizationType.F32
        self._tensor = tensor

    @property
    def data(self) -> np.ndarray:
        return self._tensor.values()


def planned_file(path: Path, settings: Mapping[str, Any], tensors: Iterable[Planned]) -> GGUFFile:
    """What `GGUFFile` would read of the file, before it is written."""
    file = GGUFFile.__new__(GGUFFile)
    fields = {key: _Field(value) for key, value in settings.items() if value is not None}
    file.set_contents(path, fields, {tensor.name: _Tensor(tensor) for tensor in tensors})
    return file
