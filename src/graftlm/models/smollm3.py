"""SmolLM3 (Bakouch et al. 2025): Llama without a rotation in every fourth layer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a SmolLM3's config.json describes."""
    settings = Settings(config, where)
    sizes, bias = read_sizes(settings, kv_heads=4, tied=True), settings.flag("attention_bias", False)
    rope = read_rope(settings, sizes["head_dim"], theta=2e6)
    layer, rotated = LayerConfig(activation=settings.activation("hidden_act", "silu")), _rotated(settings)
    window = settings.window()
    windowed = settings.flag("use_sliding_window", False) and config.get("sliding_window") is not None
    kinds = settings.layer_types(["sliding_attention" if windowed and not on else "full_attention" for on in rotated])
    if "sliding_attention" in kinds and not windowed:
        raise InputError(f"{where}: layer_types has a window, but use_sliding_window or sliding_window turns it off")
    return ModelConfig(
        family="smollm3",
        **sizes,
        layers=tuple(
            replace(layer, rope=rope if on else None, window=window if kind == "sliding_attention" else None)
            for on, kind in zip(rotated, kinds, strict=True)
        ),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=settings.flag("mlp_bias", False),
    )


def _rotated(settings: Settings) -> list[bool]:
    """Which layers rotate: those with a 1 in no_rope_layers, despite its name; or all but every n-th."""
    given, count = settings.values.get("no_rope_layers"), settings.size("num_hidden_layers")
    every = settings.size("no_rope_layer_interval", 4)
    if given is None:
        return [(i + 1) % every != 0 for i in range(count)]
    if not isinstance(given, list) or len(given) < count or not all(type(on) is int and on in (0, 1) for on in given):
        raise InputError(f"{settings.where}: no_rope_layers = {given!r:.80} is not understood; understood: 0 or 1 each")
    return [on == 1 for on in given[:count]]


FAMILY = replace(LLAMA, name="smollm3", model_types=("smollm3",), read=read, with_biases=None)
