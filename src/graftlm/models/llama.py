"""The Llama family (Touvron et al. 2023; SmolLM2, Mistral, Qwen2): rotary positions, RMS norm, gated SiLU."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import ROLES, LayerConfig, ModelConfig, ModelFamily, RopeConfig, Settings, common_sizes

ROPE_SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that the config.json of a Llama, Mistral or Qwen2 describes."""
    settings, kind, sizes = Settings(config, where), config["model_type"], common_sizes(config)
    heads, d = sizes["num_heads"], sizes["hidden_size"]
    kv_heads = config.get("num_key_value_heads", {"mistral": 8, "qwen2": 32}.get(kind)) or heads
    head_dim = config.get("head_dim") or d // heads
    if heads % kv_heads or head_dim % 2 or head_dim == 0 or (kind == "llama" and d % heads):
        raise InputError(f"{where}: {heads} heads, {kv_heads} of keys, do not divide hidden_size {d} and its rotation")
    layer = LayerConfig(rope=read_rope(settings), activation=settings.activation("hidden_act", "silu"))
    windows = read_windows(settings) if kind != "llama" else [None]
    own_biases = [kind == "llama" and settings.flag(key, False) for key in ("attention_bias", "mlp_bias")]
    return ModelConfig(
        family="llama",
        **sizes,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=settings.number("rms_norm_eps", 1e-6),
        layers=tuple(replace(layer, window=window) for window in windows),
        tie_embeddings=settings.flag("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2" or own_biases[0],
        out_bias=own_biases[0],
        mlp_bias=own_biases[1],
    )


def read_windows(settings: Settings) -> list[int | None]:
    """The sliding window of each layer, or one for all; None where it is as wide as the context.

    Mistral's default is transformers': 4,096. Qwen2 uses one only where `use_sliding_window` says so.
    """
    config, layers = settings.values, settings.values["num_hidden_layers"]
    window, first = config.get("sliding_window", 4096), config.get("max_window_layers", 28)
    if type(window) is int and window >= config["max_position_embeddings"]:
        window = None
    if window is not None and (type(window) is not int or window < 1):
        raise InputError(f"{settings.where}: sliding_window = {window!r} is no size; it must be a whole number above 0")
    if config["model_type"] == "mistral":
        return [window]
    window = window if settings.flag("use_sliding_window", False) else None
    if type(first) is not int:
        raise InputError(f"{settings.where}: max_window_layers = {first!r} is not understood; it must be a number")
    by_depth = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    kinds = by_depth if config.get("layer_types") is None else config["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise InputError(f"{settings.where}: layer_types = {kinds!r:.80} is not understood")
    found = [window if kind == "sliding_attention" else None for kind in kinds]
    return found if len(set(found)) > 1 else found[:1]


def read_rope(settings: Settings) -> RopeConfig:
    """The RoPE settings of a config.json: rope_scaling and rope_theta, or transformers 5's rope_parameters."""
    config, where, rope = settings.values, settings.where, settings.group("rope_scaling", "rope_parameters")
    scaling = dict(rope.values)
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    theta = rope.number("rope_theta", settings.number("rope_theta", 10000.0))
    settings.require(partial_rotary_factor=(None, 1.0, 1))
    rope.require(partial_rotary_factor=(1.0, 1))
    for key in ("rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
    if not isinstance(kind, str) or kind not in ROPE_SETTINGS:
        raise InputError(f"{where}: rope_type = {kind!r} is not understood; understood: {', '.join(ROPE_SETTINGS)}")
    if unsupported := sorted(set(scaling) - set(ROPE_SETTINGS[kind])):
        raise InputError(f"{where}: the rope setting {unsupported[0]!r} is not understood for rope_type {kind!r}")
    if kind == "llama3":
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    values = {key: Settings(scaling, where).number(key) for key in ROPE_SETTINGS[kind]}
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise InputError(f"{where}: low_freq_factor must be below high_freq_factor")
    if kind in ("default", "dynamic"):  # dynamic scaling begins after the context
        return RopeConfig(theta=theta)
    return RopeConfig(theta=theta, scaling=tuple(sorted([("rope_type", kind), *values.items()])))


def _with_biases(config: Mapping[str, Any], base: ModelConfig, changed: ModelConfig) -> dict[str, Any]:
    """A config.json with the biases of `changed`: the inverse of `read`.

    Mistral's and Qwen2's configurations cannot say that every linear has a bias; Llama's can, and is otherwise the same
    model. The settings it lacks are those that `read` accepts only where they change nothing.
    """
    same = replace(base, qkv_bias=changed.qkv_bias, out_bias=changed.out_bias, mlp_bias=changed.mlp_bias)
    assert changed == same and changed.qkv_bias == changed.out_bias
    if any(layer.window for layer in base.layers):
        raise InputError("no config.json describes added biases and a sliding window: train without --add_biases")
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
