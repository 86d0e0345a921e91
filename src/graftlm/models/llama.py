"""The Llama family (Touvron et al. 2023; SmolLM2, Mistral, Qwen2): rotary positions, RMS norm, gated SiLU."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import ROLES, LayerConfig, ModelConfig, ModelFamily, RopeConfig, common_sizes, require_values

ROPE_SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that the config.json of a Llama, Mistral or Qwen2 describes."""
    require_values(config, where, hidden_act=("silu",), pretraining_tp=(1,), use_sliding_window=(False, None))
    context, window = config["max_position_embeddings"], config.get("sliding_window")
    if window is not None and window < context and config.get("use_sliding_window") is not False:
        raise InputError(f"{where}: sliding_window = {window} below the context of {context} is not supported")
    sizes = common_sizes(config)
    biased = config["model_type"] == "qwen2" or bool(config.get("attention_bias", False))
    return ModelConfig(
        family="llama",
        **sizes,
        num_kv_heads=config.get("num_key_value_heads") or sizes["num_heads"],
        head_dim=config.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        layers=(LayerConfig(rope=read_rope(config, where)),),
        qkv_bias=biased,
        out_bias=biased and config["model_type"] != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def read_rope(config: Mapping[str, Any], where: str) -> RopeConfig:
    """The RoPE settings of a config.json: rope_scaling and rope_theta, or transformers 5's rope_parameters."""
    rope = config.get("rope_parameters") or {}
    scaling = dict(config.get("rope_scaling") or rope)
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or rope.get("rope_theta") or 10000.0
    if kind not in ROPE_SETTINGS:
        raise InputError(f"{where}: rope_type = {kind!r} is not understood; understood: {', '.join(ROPE_SETTINGS)}")
    if unsupported := sorted(set(scaling) - set(ROPE_SETTINGS[kind])):
        raise InputError(f"{where}: the rope setting {unsupported[0]!r} is not understood for rope_type {kind!r}")
    settings = () if kind == "default" else tuple(sorted([("rope_type", kind), *scaling.items()]))
    return RopeConfig(theta=float(theta), scaling=settings)


def _with_biases(config: Mapping[str, Any], base: ModelConfig, changed: ModelConfig) -> dict[str, Any]:
    """A config.json with the biases of `changed`: the inverse of `read`.

    Mistral's and Qwen2's configurations cannot say that every linear has a bias; Llama's can, and is otherwise the same
    model. The settings it lacks are those that `read` accepts only where they change nothing.
    """
    same = replace(base, qkv_bias=changed.qkv_bias, out_bias=changed.out_bias, mlp_bias=changed.mlp_bias)
    assert changed == same and changed.qkv_bias == changed.out_bias
    not_llamas = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    return {
        **{key: value for key, value in config.items() if key not in not_llamas},
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": changed.qkv_bias,
        "mlp_bias": changed.mlp_bias,
        # The three model types have different defaults for these.
        "num_key_value_heads": changed.num_kv_heads,
        "head_dim": changed.head_dim,
        "rms_norm_eps": changed.norm_eps,
        "tie_word_embeddings": changed.tie_embeddings,
    }


FAMILY = ModelFamily(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
    read=read,
    layer=LayerConfig(),
    embed="model.embed_tokens",
    last_norm="model.norm",
    head="lm_head",
    layers="model.layers.",
    linears={role: f"{'self_attn' if role in 'qkvo' else 'mlp'}.{role}_proj" for role in ROLES},
    norms={"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
    ignored=r"rotary_emb\.inv_freq$",
    with_biases=_with_biases,
)
