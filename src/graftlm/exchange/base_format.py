"""How a base's frozen weights are kept in memory (`--base_format`): dense, as they are stored, or packed to a format.

    dense    in the dtype of the arithmetic: the fastest
    stored   as in the file: GGUF blocks, or 16 bits while the arithmetic is float32
    q8_0, …  packed to this format when they are loaded
    auto     dense if that takes at most `SHARE` of the free memory, else stored; for inference on a CPU in float32,
             with a C++ compiler: stored, since a step of decoding takes as long as reading the weights does

The weights' values are the same, so `stored` computes what `dense` computes, up to rounding. Norms, biases, learned
positions and routers are always dense.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.files import formats
from graftlm.files.assets import model_config
from graftlm.files.memory import free_mb
from graftlm.models.base import CausalLM
from graftlm.models.config import (
    ModelConfig,
    TensorMapping,
    read_model_config,
    stored_format,
    stored_name,
    tensor_mapping,
)
from graftlm.models.packed import FORMATS, HasWeight, PackedWeight, has_kernels, packed_weights

SHARE = 0.5
"""Of the free memory, that dense weights may take where the format is chosen by itself."""
SIXTEEN_BITS = {"F16": "f16", "BF16": "bf16"}
"""safetensors' name of a dtype -> our format."""


def choose_format(flag: str, name: str, device: torch.device, dtype: torch.dtype, inference: bool = False) -> str:
    """The format that a flag asks for; of auto, the quick one or what fits the memory. No weights are read."""
    if flag != "auto":
        return flag
    if inference and device.type == "cpu" and dtype == torch.float32 and has_kernels():
        return "stored"
    with torch.device("meta"):
        model = CausalLM(read_model_config(*model_config(name)))
    size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return "dense" if size <= SHARE * 1e6 * free_mb(device) else "stored"


def stored_parameters(
    model: CausalLM, stored: formats.LazyTensors, folder: Path, names: list[str]
) -> Iterator[tuple[str, Tensor, TensorMapping, str]]:
    """(our name, parameter, how it is stored, the stored name) of these parameters, if the folder should have them.

    Raises InputError for one that is missing or has another shape.
    """
    mapping = tensor_mapping(model.config)
    for name in (name for name in names if name in mapping):
        p, source = model.get_parameter(name), mapping[name]
        key = stored_name(source.name, stored)
        if key is None:
            raise InputError(f"{folder}: the tensor {source.name} is missing: fetch it again")
        shape = _shape(source, stored, key)
        if shape != p.shape:
            raise InputError(f"{folder}: {key} gives shape {list(shape)}, the config wants {list(p.shape)}")
        yield name, p, source, key


def _shape(source: TensorMapping, stored: formats.LazyTensors, key: str) -> torch.Size:
    """Our parameter's shape, from the file's header."""
    if (kind := stored_format(key)) is None:
        return source.read(torch.empty(stored.shape(key), device="meta")).shape
    blocks = TensorMapping(source.name, False, source.rows, source.index).read(
        torch.empty(stored.shape(key), dtype=torch.uint8, device="meta")
    )
    return PackedWeight(blocks, kind).shape


def packed_format(name: str, stored: str, base_format: str, dtype: torch.dtype) -> str | None:
    """The format in which our parameter of this name is kept; None: dense.

    stored: safetensors' dtype of the tensor, or the format of packed blocks. dtype: of the arithmetic.
    """
    module, _, attribute = name.rpartition(".")
    if base_format == "dense" or attribute != "weight" or module == "positions" or module.endswith("router"):
        return None
    kind = SIXTEEN_BITS.get(stored, stored) if base_format == "stored" else base_format
    if base_format != "stored" and kind[:2] in ("q4", "q5") and module in ("embed", "head"):
        kind = "q8_0"  # as llama.cpp, whose files have more bits for these two
    return kind if kind in FORMATS and FORMATS[kind].dtype != dtype else None


def packed_plan(model: CausalLM, folder: Path, base_format: str, names: list[str]) -> dict[str, str]:
    """Our parameter -> the format in which it is kept, for those of `names` that are to be packed."""
    if base_format == "dense":
        return {}
    stored, plan = formats.read_weights(folder), dict[str, str]()
    for name, p, _, key in stored_parameters(model, stored, folder, names):
        module = model.get_submodule(name.rpartition(".")[0])
        kind = packed_format(name, stored_format(key) or stored.dtype(key), base_format, model.dtype)
        if kind is None or not isinstance(module, HasWeight):
            continue
        if p.shape[1] % FORMATS[kind].block_size:
            raise InputError(
                f"--base_format {base_format}: {name} has rows of {p.shape[1]} values, no multiple of "
                f"{FORMATS[kind].block_size}: use bf16 or stored"
            )
        plan[name] = kind
    return plan


def packed_sizes(config: ModelConfig, base_format: str, dtype: torch.dtype) -> dict[str, int]:
    """Format -> how many weights of such a model are kept in it; no weights are made."""
    with torch.device("meta"):
        model, sizes = CausalLM(config), Counter[str]()
    for name, module in model.named_modules():
        if isinstance(module, HasWeight) and (kind := packed_format(f"{name}.weight", "", base_format, dtype)):
            sizes[kind] += module.weight.numel()
    return dict(sizes)


def load_packed(model: CausalLM, folder: Path, plan: dict[str, str], device: torch.device) -> None:
    """Replace the parameters of a plan, which are on the meta device, by packed weights of the folder's values."""
    stored = formats.read_weights(folder)
    for name, _, source, key in list(stored_parameters(model, stored, folder, list(plan))):
        if stored_format(key) == plan[name]:
            weight = source.load_packed(stored, key, model.dtype)
        else:
            values = read_dense(source, stored, key)
            weight = PackedWeight.pack(values, plan[name], model.dtype)
        _set(model, name, weight.to(device))


def read_dense(source: TensorMapping, stored: formats.LazyTensors, key: str) -> Tensor:
    """Our parameter's values, dequantised if the folder has blocks."""
    if stored_format(key) is None:
        return source.load(stored, key)
    return source.load_packed(stored, key, torch.float32).dequantize()


def fill_packed(model: CausalLM, plan: dict[str, str], row: Tensor, device: torch.device) -> None:
    """The same with random weights: `row` has values for the widest row, which all rows repeat."""
    for name, kind in plan.items():
        rows, columns = model.get_parameter(name).shape
        one = PackedWeight.pack(row[None, :columns].float(), kind, model.dtype)
        _set(model, name, PackedWeight(one.data.to(device).repeat(rows, 1), kind, model.dtype))


def _set(model: CausalLM, name: str, weight: PackedWeight) -> None:
    module = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(module, HasWeight)
    module.set_weight(weight)


def dequantize_base(model: CausalLM) -> None:
    """Replace all packed weights by dense ones of the same values."""
    for module in model.modules():
        if isinstance(module, HasWeight) and (packed := module.packed) is not None:
            module.set_weight(nn.Parameter(packed.dequantize().to(packed.dtype), requires_grad=False))


def dense_hash(folder: Path) -> str | None:
    """What `base_hash` gives of the folder in which the same file was dequantised; None if no weights are packed."""
    stamps = tuple((path, path.stat().st_mtime_ns) for path in formats.weight_files(folder))
    return _dense_hash(folder, stamps)


@cache  # several adapters are compared with one base
def _dense_hash(folder: Path, stamps: tuple[tuple[Path, int], ...]) -> str | None:
    stored = formats.read_weights(folder)
    if not any(map(stored_format, stored)):
        return None
    config = read_model_config(formats.read_json(folder / "config.json"), str(folder / "config.json"))
    transposed = {stored_name(m.name, stored) for m in tensor_mapping(config).values() if m.transposed}
    return formats.tensors_sha256(_Dequantized(stored, transposed))


class _Dequantized(Mapping[str, Tensor]):
    """The tensors of a packed folder as those of the dequantised one, each when it is read."""

    def __init__(self, stored: formats.LazyTensors, transposed: set[str | None]) -> None:
        self._stored, self._transposed = stored, transposed
        self._keys = {key.removesuffix(f".{stored_format(key)}"): key for key in stored}

    def __getitem__(self, name: str) -> Tensor:
        key = self._keys[name]
        if (kind := stored_format(key)) is None:
            return self._stored[key]
        values = PackedWeight(self._stored[key], kind).dequantize()
        return values.T if key in self._transposed else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def format_note(model: CausalLM) -> list[str]:
    """One line on what is packed and what it takes; none if nothing is."""
    packed = packed_weights(model)
    if not packed:
        return []
    count, dtype = Counter(weight.format for weight in packed), packed[0].dtype
    size, dense = (sum(weight.data.nbytes for weight in packed), sum(weight.numel() for weight in packed))
    kinds = ", ".join(f"{n} {kind}" for kind, n in count.most_common())
    return [
        f"base: matrices stay packed ({kinds}): {size / 1e6:,.0f} MB instead of "
        f"{dense * dtype.itemsize / 1e6:,.0f} MB in {str(dtype).removeprefix('torch.')}"
    ]
