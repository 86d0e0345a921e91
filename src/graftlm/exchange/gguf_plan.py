"""A model -> a .gguf file that llama.cpp reads: the inverse of `files/gguf.py`.

Settings are written from `ModelConfig`, and read back by our own reader before anything is written: they must give the
same `ModelConfig`. What the format cannot express is an error, not a file of another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.files.gguf_architectures import ARCHITECTURES, Architecture
from graftlm.files.gguf_models import Entry, config_json, read_config, tensor_entries
from graftlm.files.gguf_writer import Planned, planned_file, write_gguf
from graftlm.models.config import FAMILIES, ModelConfig, read_model_config
from graftlm.models.rope import RopeConfig, inverse_frequencies

if TYPE_CHECKING:
    import numpy as np

Settings = dict[str, Any]


class GGUFPlan:
    """What the .gguf file of a model will hold.

    config: the model. raw: the config.json that it was read from. state: its tensors by the checkpoint's names; only
    their shapes are used, so they may be on the meta device. tokenizer: the settings `tokenizer.*`.

    Raises InputError if llama.cpp has no architecture for the model.
    """

    def __init__(
        self, config: ModelConfig, raw: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Settings, where: str
    ) -> None:
        refused: dict[str, str] = {}
        for self.config, self.architecture in product(_expressible(config), _candidates(config, raw)):
            if not (reason := self._refusal(raw, state, tokenizer, where)):
                return
            refused.setdefault(self.architecture, reason)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "llama.cpp's name is not known"
        raise InputError(f"{where}: no .gguf file is written for this {raw.get('model_type')} model ({reasons})")

    def _refusal(self, raw: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Settings, where: str) -> str:
        """Plan the file; why it is not one of this model, or empty."""
        kind = ARCHITECTURES[self.architecture]
        for what, is_used in _LACKS.get(self.architecture, ()):
            if is_used(self.config):
                return f"llama.cpp has no {what} in it"
        self._extra = _rope_tensors(self.config, raw)
        self.settings = _settings(self.architecture, kind, self.config, raw) | tokenizer
        file = planned_file(Path(where), self.settings, [*_planned(kind, state, self.config.num_layers), *self._extra])
        try:
            read = read_config(file)
            self.entries = {entry.name: entry for entry in tensor_entries(file, read)}
            found = read_model_config(config_json(file, read), where)
        except InputError as error:
            return str(error).removeprefix(f"{where}: ")
        if lost := {*state} - {*self.entries}:
            return f"it has no place for {min(lost)}"
        difference = _difference(self.config, found)
        return f"it cannot express {difference}" if difference else ""

    def write(self, path: Path, state: Mapping[str, Tensor], kind: str) -> None:
        """Write the file with these tensors, by the checkpoint's names, as `kind` (`gguf_writer.TYPES`)."""
        tensors = [
            Planned(entry.source, entry.stored, partial(self._values, entry, state[name]))
            for name, entry in self.entries.items()
        ]
        write_gguf(path, self.architecture, self.settings, [*tensors, *self._extra], kind)

    def _values(self, entry: Entry, tensor: Tensor) -> np.ndarray:
        """A tensor as the file has it."""
        values = tensor.detach().float()
        values = (values.t() if entry.transposed else values).reshape(entry.stored)
        return self.file_rows(entry, values - entry.offset if entry.offset else values).numpy()

    def file_rows(self, entry: Entry, rows: Tensor) -> Tensor:
        """A checkpoint's rows in the file's order: the inverse of `Entry.order`."""
        if entry.order is None:
            return rows
        stored = torch.empty_like(rows)
        stored[torch.from_numpy(entry.order(torch.arange(len(rows))[:, None].numpy())[:, 0])] = rows
        return stored


def _expressible(config: ModelConfig) -> Iterator[ModelConfig]:
    """The model; and the same without windows, which are all that the text of one window sees."""
    yield config
    layers = [config.layer(i) for i in range(config.num_layers)]
    if windows := [layer.window for layer in layers if layer.window is not None]:
        plain = tuple(replace(layer, window=None) for layer in layers)
        yield replace(config, layers=plain, max_positions=min(windows))


def _candidates(config: ModelConfig, raw: Mapping[str, Any]) -> list[str]:
    """The architectures of the model's family: that of its model_type first."""
    types = FAMILIES[config.family].model_types
    names = [name for name, kind in ARCHITECTURES.items() if kind.model_type in types]
    return sorted(names, key=lambda name: ARCHITECTURES[name].model_type != raw.get("model_type"))


def _difference(config: ModelConfig, found: ModelConfig) -> str:
    """The first setting that differs; empty: none does."""
    for layer in range(config.num_layers):
        if (ours := config.layer(layer)) != (theirs := found.layer(layer)):
            names = [f.name for f in fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)]
            return f"{names[0]} = {getattr(ours, names[0])} of layer {layer}"
    found = replace(found, layers=config.layers, family=config.family)
    names = [f.name for f in fields(config) if getattr(config, f.name) != getattr(found, f.name)]
    return f"{names[0]} = {getattr(config, names[0])}" if names else ""


def _planned(kind: Architecture, state: Mapping[str, Tensor], layers: int) -> Iterator[Planned]:
    """The file's tensors for those of the checkpoint that the architecture has, without values."""
    for layer in range(-1, layers):
        before, after = ("", "") if layer < 0 else (f"blk.{layer}.", f"{kind.layers}{layer}.")
        for short, target in (kind.outer if layer < 0 else kind.block).items():
            for part in ("weight", "bias"):
                if (tensor := state.get(f"{after}{target.name}.{part}")) is None:
                    continue
                shape = tuple(tensor.shape)
                shape = shape[::-1] if target.transposed else shape
                shape = (shape[0], *shape[2:]) if target.checkpoint else shape
                yield Planned(f"{before}{short}.{part}", shape, _no_values)


def _no_values() -> np.ndarray:
    raise AssertionError("a planned tensor has no values")


# Settings -------------------------------------------------------------------------------------------------------------


def _settings(name: str, kind: Architecture, config: ModelConfig, raw: Mapping[str, Any]) -> Settings:
    """The settings of an architecture, as llama.cpp's converter writes them. None: not written."""
    layers = [config.layer(i) for i in range(config.num_layers)]
    own: Settings = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
        **{key.removeprefix("."): float(config.norm_eps) for key in kind.numbers.values()},
    }
    ropes = [layer.rope for layer in layers if layer.rope is not None and layer.window is None]
    windowed = [layer.rope for layer in layers if layer.rope is not None and layer.window is not None]
    if rope := next(iter([*ropes, *windowed]), None):
        own |= _rope_settings(rope, config, raw)
    if ropes and windowed and windowed[0].theta != ropes[0].theta:
        own["rope.freq_base_swa"] = windowed[0].theta
    if windows := [layer.window for layer in layers if layer.window is not None]:
        own["attention.sliding_window"] = windows[0]
        if name in ("olmo2", "exaone4"):
            own["attention.sliding_window_pattern"] = [layer.window is not None for layer in layers]
    own |= _MORE[name](config) if name in _MORE else {}
    prefixed = {f"{name}.{key}": value for key, value in own.items()}
    return {"general.architecture": name, "general.type": "model", "general.quantization_version": 2, **prefixed}


def _rope_settings(rope: RopeConfig, config: ModelConfig, raw: Mapping[str, Any]) -> Settings:
    scaling = dict(rope.scaling)
    own: Settings = {"rope.freq_base": rope.theta, "rope.dimension_count": rope.dim or config.head_dim}
    match scaling.get("rope_type"):
        case "linear":
            own |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
        case "yarn":
            original = int(scaling["original_max_position_embeddings"])
            own |= {"rope.scaling.type": "yarn", "rope.scaling.factor": scaling["factor"]}
            own |= {"rope.scaling.original_context_length": original}
            betas = {key: scaling[key] for key, usual in (("beta_fast", 32), ("beta_slow", 1)) if scaling[key] != usual}
            own |= {f"rope.scaling.yarn_{key}": float(value) for key, value in betas.items()}
        case "longrope":
            original = config.max_positions  # it is read as a model of its original context (`phi3.py`)
            own |= {"context_length": int(raw["max_position_embeddings"])}
            own |= {"rope.scaling.original_context_length": original}
            own |= {"rope.scaling.attn_factor": float(scaling["attention_factor"])}
    return own


def _rope_tensors(config: ModelConfig, raw: Mapping[str, Any]) -> list[Planned]:
    """Divisors of the frequencies: Llama 3.1's, and LongRoPE's two sets."""
    ropes = [layer.rope for layer in map(config.layer, range(config.num_layers)) if layer.rope is not None]
    rope = next((rope for rope in ropes if rope.scaling), None)
    if rope is None:
        return []
    if dict(rope.scaling)["rope_type"] == "llama3":
        plain = inverse_frequencies(config.head_dim, replace(rope, scaling=()))
        return [_vector("rope_freqs.weight", plain / inverse_frequencies(config.head_dim, rope))]
    if dict(rope.scaling)["rope_type"] != "longrope":
        return []
    given = raw.get("rope_parameters") or raw["rope_scaling"]
    return [_vector(f"rope_factors_{n}.weight", torch.tensor(given[f"{n}_factor"])) for n in ("long", "short")]


def _vector(name: str, values: Tensor) -> Planned:
    return Planned(name, tuple(values.shape), values.float().numpy)


def _granite(config: ModelConfig) -> Settings:
    return {
        "attention.scale": config.layer(0).attention_scale,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.layer(0).residual_multiplier,
        "logit_scale": 1 / config.logits_multiplier,
    }


def _gemma(config: ModelConfig) -> Settings:
    return {
        "attn_logit_softcapping": config.layer(0).attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
    }


def _lfm2(config: ModelConfig) -> Settings:
    convolutions = [config.layer(i).conv_length for i in range(config.num_layers)]
    return {
        "attention.head_count_kv": [0 if length else config.num_kv_heads for length in convolutions],
        "shortconv.l_cache": next(length for length in convolutions if length),
    }


def _parallel(config: ModelConfig) -> Settings:
    return {"use_parallel_residual": config.layer(0).parallel}


def _logit_scale(config: ModelConfig) -> Settings:
    return {"logit_scale": config.logits_multiplier}


_MORE = {
    "granite": _granite,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "lfm2": _lfm2,
    "gptneox": _parallel,
    "stablelm": _parallel,
    "command-r": _logit_scale,
    "cohere2": _logit_scale,
}
"""Settings that only some architectures have."""


def _has_windows(config: ModelConfig) -> bool:
    return any(layer.window is not None for layer in config.layers)


def _has_other_width(config: ModelConfig) -> bool:
    return config.num_heads * config.head_dim != config.hidden_size


_LACKS: dict[str, tuple[tuple[str, Callable[[ModelConfig], bool]], ...]] = {
    "qwen3": (("biases", lambda config: config.qkv_bias),),
    "phi3": (("sliding windows", _has_windows),),
    "olmo2": (("heads of another width than the model's", _has_other_width),),
    "exaone4": (
        ("heads of another width than the model's", _has_other_width),
        ("sliding windows, unless it has 64 layers,", lambda config: _has_windows(config) and config.num_layers != 64),
    ),
}
"""What llama.cpp's code cannot do in an architecture, though the format could say it, and whether a model has it."""
