"""A .gguf file's settings -> config.json, and its tensors -> those of the checkpoint.

`gguf_architectures.py` has what is particular to an architecture. A setting of the file that is not read, and is not
known to change nothing, is an error; so is a tensor that is no part of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graftlm.errors import InputError
from graftlm.files.gguf_architectures import ARCHITECTURES, Architecture, Config, Target
from graftlm.files.gguf_file import GGUFFile

if TYPE_CHECKING:
    import numpy as np

HINT = "use the model's Hugging Face folder"

# Settings -------------------------------------------------------------------------------------------------------------

HARMLESS = (
    *("vocab_size", "tensor_data_layout", "expert_used_count", "rope.scaling.finetuned", "pooling_type"),
    *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "use_parallel_residual"),
    *("embedding_length_out", "classifier.output_labels"),
)
"""Settings that change nothing in what is read: those of other programs, or said by the tensors too."""


def read_config(file: GGUFFile) -> Config:
    """The settings of a file's model, with Llama's names of sizes.

    InputError for an architecture or a setting that is not supported.
    """
    kind = _architecture(file)
    width, heads = _size(file, ".embedding_length"), _size(file, ".attention.head_count")
    if (layers := _size(file, ".block_count")) > len(file.tensors):
        raise InputError(f"{file.path}: holds {len(file.tensors)} tensors for {layers} layers: fetch it again")
    head_dim = _size(file, ".attention.key_length", width // max(heads, 1))
    if file.get(".attention.value_length", head_dim) != head_dim:
        raise InputError(f"{file.path}: keys and values of different widths are not supported: {HINT}")
    config: Config = {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "vocab_size": file.length("tokenizer.ggml.tokens"),
        "hidden_size": width,
        "intermediate_size": _size(file, ".feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _size(file, ".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _size(file, ".context_length"),
        **{name: file.number(key) for name, key in kind.numbers.items()},
        "pad_token_id": None,  # if the file has none: not transformers' default, which may be outside of the vocabulary
    }
    config |= _rope(file, config, kind.partial_rotary) | dict(kind.fixed)
    config |= {"tie_word_embeddings": "output.weight" not in file.tensors, "torch_dtype": "float32"}
    config |= kind.more(file, config)
    for key, value in file.ignored(f"{file.architecture}.").items():
        if key.endswith(".rope.freq_base_swa") and value == file.get(".rope.freq_base"):
            continue  # layers with a window rotate as the others do
        if value and value != "none" and key.removeprefix(f"{file.architecture}.") not in HARMLESS:
            raise InputError(f"{file.path}: the setting {key} = {value!r:.60} is not supported: {HINT}")
    return config


def _size(file: GGUFFile, key: str, default: int | None = None) -> int:
    """A size; of a list, one for each layer, its only number but 0 (LFM2's layers without attention)."""
    given = file.require(key) if default is None else file.get(key, default)
    if not isinstance(given, list):
        return int(given)
    if len(numbers := {*given} - {0}) != 1 or (0 in given and file.architecture != "lfm2"):
        raise InputError(f"{file.path}: layers that differ in their {key[1:]} are not supported: {HINT}")
    return int(numbers.pop())


def config_json(file: GGUFFile, config: Config) -> Config:
    """The settings by the names of the model's own config.json."""
    names = ARCHITECTURES[file.architecture].renamed
    return {new: value for key, value in config.items() if (new := names.get(key, key)) is not None}


def _architecture(file: GGUFFile) -> Architecture:
    if file.architecture == "clip" or file.get("general.type") == "mmproj":
        raise InputError(f"{file.path}: is the image part of a model (mmproj): name the file of its language model")
    if file.get("general.type") == "adapter":
        raise InputError(f"{file.path}: is an adapter: name the file of its model")
    if file.get(".expert_count", 0):
        raise InputError(f"{file.path}: {file.get('.expert_count')} experts are not supported in a gguf file: {HINT}")
    if file.architecture not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {file.architecture!r} is not supported in a gguf file; supported are "
            f"{', '.join(ARCHITECTURES)}: {HINT}"
        )
    return ARCHITECTURES[file.architecture]


def _rope(file: GGUFFile, config: Config, partial: bool) -> Config:
    """rope_theta, and rope_scaling and partial_rotary_factor where the file has them."""
    head_dim, theta = config["head_dim"], file.number(".rope.freq_base", 10000.0)
    dim = int(file.get(".rope.dimension_count", head_dim))
    if not partial and dim != head_dim:
        raise InputError(f"{file.path}: RoPE of {dim} of {head_dim} dimensions is not supported: {HINT}")
    share = dim / head_dim
    share = share if int(head_dim * share) == dim else math.nextafter(share, 1.0)  # readers round down
    found: Config = {"rope_theta": theta, **({"partial_rotary_factor": share} if partial else {})}
    if scaling := _rope_scaling(file, config["max_position_embeddings"], dim, theta):
        found["rope_scaling"] = scaling
    return found


def _rope_scaling(file: GGUFFile, context: int, dim: int, theta: float) -> Config:
    """The settings of a scaled RoPE; empty if it is not."""
    kind = file.get(".rope.scaling.type", "linear")
    factor = file.number(".rope.scaling.factor", file.number(".rope.scale_linear", 1.0))
    original = int(file.get(".rope.scaling.original_context_length", context))
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, dim, theta)
    if "rope_factors_short.weight" in file.tensors:
        return _longrope_scaling(file, context / original, original)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {}
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    if kind != "yarn":
        raise InputError(f"{file.path}: RoPE scaling {kind!r} is not supported: {HINT}")
    if file.number(".rope.scaling.yarn_ext_factor", 1.0) != 1:
        raise InputError(f"{file.path}: YaRN with another extrapolation factor than 1 is not supported: {HINT}")
    optional = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    given = {name: file.number(f".rope.scaling.{key}", 0.0) for name, key in optional.items()}
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": original,
        **{name: value for name, value in given.items() if value},
    }


def _llama3_scaling(file: GGUFFile, dim: int, theta: float) -> Config:
    """Llama 3.1's settings, from its divisors of the frequencies. They are always made with these three numbers."""
    import numpy as np

    low, high, original = 1.0, 4.0, 8192
    divisors = file.values("rope_freqs.weight").astype(np.float64)
    factor = float(divisors.max(initial=1.0))
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    if divisors.shape != (dim // 2,) or not np.allclose(divisors, 1 / ((1 - kept) / factor + kept), rtol=1e-4):
        raise InputError(f"{file.path}: rope_freqs.weight is not Llama 3.1's: this RoPE is not supported: {HINT}")
    settings = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return {**settings, "original_max_position_embeddings": original} if factor > 1 else {}


def _longrope_scaling(file: GGUFFile, factor: float, original: int) -> Config:
    """Two divisors for each frequency. The attention factor is written where it is not the usual one."""
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention = file.number(".rope.scaling.attn_factor", usual)
    shorter, longer = (
        [float(str(value)) for value in file.values(f"rope_factors_{name}.weight")] for name in ("short", "long")
    )
    found: Config = {"rope_type": "longrope", "short_factor": shorter, "long_factor": longer}
    return found if math.isclose(attention, usual, rel_tol=1e-6) else {**found, "attention_factor": attention}


# Tensors --------------------------------------------------------------------------------------------------------------

READ_AS_SETTINGS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


@dataclass(frozen=True)
class Entry:
    """A tensor of the file, and the one of the checkpoint that it becomes."""

    source: str
    stored: tuple[int, ...]
    """The file's shape."""
    name: str
    shape: tuple[int, ...]
    """The checkpoint's."""
    order: Callable[[np.ndarray], np.ndarray] | None
    offset: float
    transposed: bool

    def values(self, file: GGUFFile) -> Iterator[memoryview]:
        """The checkpoint's values as float32, a part at a time."""
        if self.transposed:
            return file.transposed(self.source)
        return file.float32(self.source, self.order, self.offset)

    def written(self, file: GGUFFile, packed: bool) -> tuple[str, str, tuple[int, ...], Iterator[memoryview]]:
        """Name, dtype, shape and content of the tensor as `write_safetensors` takes it.

        packed: a matrix keeps its blocks, [out, bytes] also where the checkpoint has it transposed, and the name ends
        with their format; what cannot stay packed is float32.
        """
        kind = file.kept_format(self.source) if packed and len(self.shape) == 2 else ""
        if not kind:
            return self.name, "F32", self.shape, self.values(file)
        block_bytes = (data.nbytes // data.shape[0] for data in [file.tensors[self.source].data])
        shape = (self.stored[0], next(block_bytes))
        return f"{self.name}.{kind}", "U8", shape, (file.blocks(self.source, self.order).data for _ in range(1))


def tensor_entries(file: GGUFFile, config: Config) -> list[Entry]:
    """Every tensor of a model. InputError if one is missing, has another shape, or is no part of it."""
    kind, entries = ARCHITECTURES[file.architecture], []
    for layer in range(-1, config["num_hidden_layers"]):
        before, after = ("", "") if layer < 0 else (f"blk.{layer}.", f"{kind.layers}{layer}.")
        for short, target in (kind.outer if layer < 0 else kind.block).items():
            for part in _parts(file, kind, short, before):
                source = f"{before}{short}.{part}"
                entries.append(_entry(config, kind, source, replace(target, name=f"{after}{target.name}.{part}")))
    _check(file, entries)
    return entries


def _parts(file: GGUFFile, kind: Architecture, short: str, before: str) -> list[str]:
    """weight, and bias where the file has one."""
    optional = short in kind.optional or short == "output"
    weight = ["weight"] if not optional or f"{before}{short}.weight" in file.tensors else []
    return [*weight, "bias"] if short in kind.biases and file.has(short, "bias") else weight


def _entry(config: Config, kind: Architecture, source: str, target: Target) -> Entry:
    letters = {
        "d": config["hidden_size"],
        "H": config["num_attention_heads"],
        "K": config["num_key_value_heads"],
        "D": config["head_dim"],
        "f": config["intermediate_size"],
        "V": config["vocab_size"],
        "Q": (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * config["head_dim"],
        "1": 1,
        "2": 2,
        "3": 3,
        "L": config.get("conv_L_cache", 0),
        "P": config["max_position_embeddings"],
    }
    stored, shape = (
        tuple(math.prod(letters[letter] for letter in side) for side in sides.split())
        for sides in (target.shape, target.checkpoint or target.shape)
    )
    if source.endswith(".bias"):
        stored = shape = stored[:1]
    order, transposed = target.order, target.transposed and len(stored) == 2
    return Entry(
        source,
        stored,
        target.name,
        shape[::-1] if transposed else shape,
        None if order is None else lambda rows: order(rows, config),
        -kind.norm_offset if "norm." in source else 0.0,
        transposed,
    )


def _check(file: GGUFFile, entries: list[Entry]) -> None:
    known = {entry.source for entry in entries}
    if missing := [entry.source for entry in entries if entry.source not in file.tensors]:
        raise InputError(f"{file.path}: has no tensor {missing[0]} ({len(missing)} missing): fetch or convert it again")
    if extra := [name for name in file.tensors if name not in known and name not in READ_AS_SETTINGS]:
        raise InputError(
            f"{file.path}: tensor {extra[0]} is not part of a plain {file.architecture}: this variant is not "
            f"supported: {HINT}"
        )
    for entry in entries:
        if (given := file.shape(entry.source)) != entry.stored:
            implied = f"its settings imply {entry.stored}"
            raise InputError(f"{file.path}: tensor {entry.source} has shape {given}, {implied}: fetch it again")
