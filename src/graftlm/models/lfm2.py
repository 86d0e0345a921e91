"""LFM2 (Amini et al. 2025, arXiv:2511.23404): short convolutions in most layers, in the others attention."""

from collections.abc import Mapping
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig, ModelFamily
from graftlm.models.llama import read_sizes
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that an LFM2's config.json describes, in the spelling of its first files and of transformers 5."""
    settings = Settings({"conv_L_cache": 3, "block_multiple_of": 256, **config}, where)
    settings.require(conv_bias=(False,))
    sizes = read_sizes(Settings({**config, "intermediate_size": _mlp_width(settings)}, where), kv_heads=8)
    length, rope = settings.size("conv_L_cache"), read_rope(settings, sizes["head_dim"], theta=1e6)
    if length < 2:
        raise InputError(f"{where}: conv_L_cache = {length} is not understood; a convolution reads 2 tokens or more")
    kinds = {
        "full_attention": LayerConfig(rope=rope, qk_norm="head"),
        "conv": LayerConfig(rope=None, conv_length=length),
    }
    tied = settings.flag("tie_embedding", settings.flag("tie_word_embeddings", True))
    return ModelConfig(
        family="lfm2",
        **{**sizes, "norm_eps": settings.number("norm_eps", 1e-5), "tie_embeddings": tied},
        layers=tuple(kinds[kind] for kind in _layer_types(settings, sizes["num_layers"])),
    )


def _mlp_width(settings: Settings) -> int:
    """The width of the MLP, which most files round: two thirds, times a factor, up to a multiple."""
    width = settings.size("block_ff_dim" if "block_ff_dim" in settings.values else "intermediate_size")
    if not settings.flag("block_auto_adjust_ff_dim", True):
        return width
    width, multiple = int(2 * width / 3), settings.size("block_multiple_of")
    if settings.values.get("block_ffn_dim_multiplier", 1.0) is None:
        return width
    width = int(settings.number("block_ffn_dim_multiplier", 1.0) * width)
    return -(-width // multiple) * multiple


def _layer_types(settings: Settings, layers: int) -> list[str]:
    """The kind of each layer: layer_types, or attention in those of full_attn_idxs, and in all if neither is given."""
    attention, kinds = settings.values.get("full_attn_idxs"), settings.values.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if attention is None or i in attention else "conv" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not {*kinds} <= {"full_attention", "conv"}:
        raise InputError(f"{settings.where}: layer_types = {kinds!r:.80} is not understood")
    return kinds


FAMILY = ModelFamily(
    name="lfm2",
    model_types=("lfm2",),
    read=read,
    layer=LayerConfig(qk_norm="head"),
    embed="model.embed_tokens",
    last_norm="model.embedding_norm",
    head="lm_head",
    layers="model.layers.",
    linears={
        **{role: f"self_attn.{role}_proj" for role in "qkv"},
        **{"o": "self_attn.out_proj", "conv_in": "conv.in_proj", "conv_out": "conv.out_proj"},
        **{"gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2"},
    },
    norms={
        **{"norm1": "operator_norm", "norm2": "ffn_norm"},
        **{"attn.q_norm": "self_attn.q_layernorm", "attn.k_norm": "self_attn.k_layernorm"},
    },
)
