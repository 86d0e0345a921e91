"""GPT-Neo (Black et al. 2021; TinyStories, Eldan & Li 2023): GPT-2 with local attention in every second layer.

Scores are not divided by the square root of the head's width.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig, ModelFamily
from graftlm.models.llama import with_windows
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a GPT-Neo's config.json describes."""
    settings = Settings(config, where)
    d, heads, context = (settings.size(key) for key in ("hidden_size", "num_heads", "max_position_embeddings"))
    if d % heads:
        raise InputError(f"{where}: hidden_size {d} is not divided by {heads} heads")
    layer = replace(FAMILY.layer, activation=settings.activation("activation_function", "gelu_new"))
    return ModelConfig(
        family="gpt_neo",
        num_layers=settings.size("num_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        hidden_size=d,
        head_dim=d // heads,
        intermediate_size=config.get("intermediate_size") or 4 * d,
        vocab_size=settings.size("vocab_size"),
        max_positions=context,
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        layers=with_windows(layer, _windows(settings, context)),
        tie_embeddings=settings.flag("tie_word_embeddings", True),
        out_bias=True,
        mlp_bias=True,
    )


def _windows(settings: Settings, context: int) -> list[int | None]:
    """The window of each layer: `window_size` in local ones; attention_layers counts more than attention_types."""
    config, window = settings.values, settings.values.get("window_size", 256)
    types = config.get("attention_types") or [[["global", "local"], 12]]
    try:
        kinds = config.get("attention_layers") or [kind for group, n in types for _ in range(n) for kind in group]
    except (TypeError, ValueError):
        raise InputError(f"{settings.where}: attention_types = {types!r:.80} is not understood") from None
    if not isinstance(kinds, list) or len(kinds) != config["num_layers"] or not {*kinds} <= {"global", "local"}:
        raise InputError(f"{settings.where}: attention_layers = {kinds!r:.80} is not understood")
    return [window if kind == "local" and window < context else None for kind in kinds]


FAMILY = ModelFamily(
    name="gpt_neo",
    model_types=("gpt_neo",),
    read=read,
    layer=LayerConfig(rope=None, attention_scale=1.0, norm="layer", activation="gelu_tanh", gated=False),
    embed="transformer.wte",
    positions="transformer.wpe",
    last_norm="transformer.ln_f",
    head="lm_head",
    layers="transformer.h.",
    linears={
        **{role: f"attn.attention.{role}_proj" for role in "qkv"},
        **{"o": "attn.attention.out_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    },
    norms={"norm1": "ln_1", "norm2": "ln_2"},
    ignored=r"\.attention\.(bias|masked_bias)$",  # causal masks
)
