"""The settings of a config.json, checked one by one. A family's file (`llama.py`) reads them into a `ModelConfig`.

A setting that changes the arithmetic and is not supported is an error, never ignored; a value of the wrong type is an
error, never converted, as in transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftlm.errors import InputError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu"]
ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"),
    "relu": "relu",
}
"""transformers' names of what we compute, up to rounding."""

SIZES = (
    *("n_embd", "n_head", "n_layer", "n_inner", "n_positions", "vocab_size", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "head_dim"),
    *("num_layers", "num_heads", "ffn_dim", "window_size", "rotary_dim", "num_experts", "num_local_experts"),
    *("num_experts_per_tok", "moe_intermediate_size", "original_max_position_embeddings"),
)
MAX_LAYERS, MAX_DIM = 10_000, 2**24
"""Larger sizes are refused: a config.json of a few bytes must not allocate all memory."""
_MAYBE_NULL = ("n_inner", "num_key_value_heads", "head_dim", "intermediate_size", "rotary_dim")


@dataclass(frozen=True)
class Settings:
    """The settings of a config.json, and the file's name for errors."""

    values: Mapping[str, Any]
    where: str

    def require(self, **allowed: tuple[Any, ...]) -> None:
        """InputError for a setting that has another value than the supported ones; the first is its default."""
        for key, supported in allowed.items():
            value = self.values.get(key, supported[0])
            if not any(type(value) is type(one) and value == one for one in supported):
                understood = ", ".join(map(repr, supported))
                raise InputError(f"{self.where}: {key} = {value!r} is not understood; understood: {understood}")

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0; without a default KeyError if it is missing."""
        value = self.values[key] if default is None else self.values.get(key, default)
        if type(value) is not int or value < 1:
            raise InputError(f"{self.where}: {key} = {value!r} is no size; it must be a whole number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A setting that is true or false."""
        self.require(**{key: (default, not default)})
        return bool(self.values.get(key, default))

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0; without a default KeyError if it is missing."""
        value = self.values[key] if default is None else self.values.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e300:
            raise InputError(f"{self.where}: {key} = {value!r} is not understood; it must be a number above 0")
        return float(value)

    def number_or_none(self, key: str, default: float | None) -> float | None:
        """A number above 0, or null for none."""
        return None if self.values.get(key, default) is None else self.number(key, default)

    def activation(self, key: str, default: str) -> Activation:
        """The activation function."""
        self.require(**{key: (default, *ACTIVATIONS)})
        return ACTIVATIONS[self.values.get(key, default)]

    def group(self, *keys: str) -> "Settings":
        """The first of these settings that is not empty; each is an object or null."""
        for key in keys:
            if not isinstance(self.values.get(key), dict | None):
                raise InputError(f"{self.where}: {key} = {self.values[key]!r} is not understood; it must be an object")
        return Settings(next(filter(None, map(self.values.get, keys)), {}), self.where)

    def check_sizes(self) -> None:
        """InputError for a size that is no whole number above 0, or larger than any model's."""
        for key in SIZES:
            value = self.values.get(key)
            if value is not None or (key in self.values and key not in _MAYBE_NULL):
                value = self.size(key)
            if value is not None and value > (MAX_LAYERS if key.endswith(("n_layer", "_layers")) else MAX_DIM):
                raise InputError(f"{self.where}: {key} = {value} is more than any model has: fetch the file again")

    def window(self, default: int | None = None) -> int | None:
        """sliding_window; None where it is as wide as the context, and changes nothing."""
        window = self.values.get("sliding_window", default)
        if window is not None and (type(window) is not int or window < 1):
            raise InputError(f"{self.where}: sliding_window = {window!r} is no size; it must be a whole number above 0")
        return window if window is None or window < self.values["max_position_embeddings"] else None

    def layer_types(self, default: Sequence[str]) -> list[str]:
        """layer_types, the kind of each layer ("full_attention", "sliding_attention"); `default` if it is missing."""
        kinds, known = self.values.get("layer_types"), {"sliding_attention", "full_attention", *default}
        kinds = list(default) if kinds is None else kinds
        count = self.values["num_hidden_layers"]
        if not isinstance(kinds, list) or len(kinds) != count or not all(kind in known for kind in kinds):
            raise InputError(f"{self.where}: layer_types = {kinds!r:.80} is not understood")
        return kinds


def every_nth_full(n: int, count: int) -> list[str]:
    """The kinds of `count` layers: every n-th without a window."""
    return ["full_attention" if (i + 1) % n == 0 else "sliding_attention" for i in range(count)]


def refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    """InputError for a model whose weights are stored in a quantised format."""
    if found := config.get("quantization_config") or config.get("compression_config"):
        found = found if isinstance(found, dict) else {}
        bits = next((f"{n}-bit " for n in (4, 8) if found.get(f"load_in_{n}bit") or found.get("bits") == n), "")
        method = found.get("quant_method") or ("bitsandbytes" if bits else "an unknown method")
        raise InputError(f"{where}: quantised with {bits}{method}: use the unquantised model")


def common_sizes(settings: Settings) -> dict[str, Any]:
    """The fields of `ModelConfig` whose settings have the same names in most families; KeyError for a missing one."""
    return {
        "num_layers": settings.size("num_hidden_layers"),
        "num_heads": settings.size("num_attention_heads"),
        "hidden_size": settings.size("hidden_size"),
        "intermediate_size": settings.size("intermediate_size"),
        "vocab_size": settings.size("vocab_size"),
        "max_positions": settings.size("max_position_embeddings"),
    }
