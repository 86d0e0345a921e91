"""The Llama family (Touvron et al. 2023; SmolLM2, Mistral, Qwen2, …): rotary positions, RMS norm, gated SiLU."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import ROLES, LayerConfig, ModelConfig, ModelFamily
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings, common_sizes

DEFAULTS: dict[str, dict[str, Any]] = {
    "internlm3": {"kv_heads": 2, "head_dim": 128, "eps": ("rms_norm_eps", 1e-5)},
    "ministral": {"kv_heads": 8},
    "mistral": {"kv_heads": 8},
    "qwen2": {"kv_heads": 32},
    "seed_oss": {"kv_heads": 8, "head_dim": 128},
}
"""Model type -> defaults of its sizes, where they are not Llama's."""


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that the config.json of one of `FAMILY.model_types` describes."""
    settings, kind = Settings(config, where), config["model_type"]
    sizes = read_sizes(settings, **DEFAULTS.get(kind, {}))
    if kind in ("llama", "internlm3") and sizes["hidden_size"] % sizes["num_heads"]:
        raise InputError(f"{where}: hidden_size {sizes['hidden_size']} is not divided by {sizes['num_heads']} heads")
    layer = LayerConfig(
        rope=read_rope(settings, sizes["head_dim"]), activation=settings.activation("hidden_act", "silu")
    )
    read_windows = {"mistral": _mistral_windows, "ministral": _ministral_windows, "qwen2": qwen2_windows}.get(kind)
    layers = with_windows(layer, read_windows(settings) if read_windows else [None])
    return ModelConfig(family="llama", **sizes, layers=layers, **_biases(settings, kind))


def _biases(settings: Settings, kind: str) -> dict[str, bool]:
    """Which linears of a model type have biases."""
    if kind in ("mistral", "ministral"):
        return {}
    if kind == "qwen2":
        return {"qkv_bias": True}
    qkv, mlp = settings.flag("attention_bias", kind == "seed_oss"), settings.flag("mlp_bias", False)
    if kind == "internlm3":  # its own files have other names
        qkv, mlp = settings.flag("qkv_bias", qkv), settings.flag("bias", mlp)
        settings.require(attention_bias=(qkv,), mlp_bias=(mlp,))
        if qkv != mlp:
            raise InputError(
                f"{settings.where}: qkv_bias = {qkv} and bias = {mlp} is not understood; they must be equal"
            )
    out = settings.flag("attention_out_bias", False) if kind == "seed_oss" else qkv
    return {"qkv_bias": qkv, "out_bias": out, "mlp_bias": mlp}


def read_sizes(
    settings: Settings,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
) -> dict[str, Any]:
    """Sizes, norm_eps and tie_embeddings of a `ModelConfig`, from settings with Llama's names.

    The keywords are a family's defaults; eps: of which setting, and its default.
    """
    config, sizes = settings.values, common_sizes(settings)
    heads, d = sizes["num_heads"], sizes["hidden_size"]
    kv_heads = config.get("num_key_value_heads", kv_heads) or heads
    head_dim = config.get("head_dim", head_dim) or d // heads
    if heads % kv_heads or head_dim % 2 or head_dim == 0:
        raise InputError(
            f"{settings.where}: {heads} heads, {kv_heads} of keys, do not divide hidden_size {d} and its rotation"
        )
    return {
        **sizes,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "norm_eps": settings.number(*eps),
        "tie_embeddings": settings.flag("tie_word_embeddings", tied),
    }


def with_windows(layer: LayerConfig, windows: Sequence[int | None]) -> tuple[LayerConfig, ...]:
    """The layer with the window of each, or one for all."""
    return tuple(replace(layer, window=window) for window in (windows if len(set(windows)) > 1 else windows[:1]))


def _mistral_windows(settings: Settings) -> list[int | None]:
    """One for all layers; transformers' default is 4,096."""
    return [settings.window(4096)]


def _ministral_windows(settings: Settings) -> list[int | None]:
    """In all layers, or in those of layer_types."""
    window, count = settings.window(4096), settings.size("num_hidden_layers")
    return [
        window if kind == "sliding_attention" else None for kind in settings.layer_types(["sliding_attention"] * count)
    ]


def qwen2_windows(settings: Settings) -> list[int | None]:
    """The window of each layer: only where `use_sliding_window` says so, from layer `max_window_layers` on."""
    first, window = settings.values.get("max_window_layers", 28), settings.window(4096)
    window = window if settings.flag("use_sliding_window", False) else None
    if type(first) is not int:
        raise InputError(f"{settings.where}: max_window_layers = {first!r} is not understood; it must be a number")
    kinds = [
        "sliding_attention" if i >= first else "full_attention" for i in range(settings.values["num_hidden_layers"])
    ]
    return [window if kind == "sliding_attention" else None for kind in settings.layer_types(kinds)]


def _with_biases(config: Mapping[str, Any], base: ModelConfig, changed: ModelConfig) -> dict[str, Any] | None:
    """A config.json with the biases of `changed`: the inverse of `read`.

    Most other configurations cannot say that every linear has a bias; Llama's can, and is otherwise the same model. The
    settings it lacks are those that `read` accepts only where they change nothing.
    """
    same = replace(base, qkv_bias=changed.qkv_bias, out_bias=changed.out_bias, mlp_bias=changed.mlp_bias)
    assert changed == same and changed.qkv_bias == changed.out_bias
    if any(layer.window for layer in base.layers):
        return None  # Llama has no windows
    not_llamas = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    not_llamas |= {"qkv_bias", "bias", "attention_out_bias"}
    return {
        **{key: value for key, value in config.items() if key not in not_llamas},
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": changed.qkv_bias,
        "mlp_bias": changed.mlp_bias,
        # The model types have different defaults for these.
        "num_key_value_heads": changed.num_kv_heads,
        "head_dim": changed.head_dim,
        "rms_norm_eps": changed.norm_eps,
        "tie_word_embeddings": changed.tie_embeddings,
    }


FAMILY = ModelFamily(
    name="llama",
    model_types=("llama", "internlm3", "ministral", "mistral", "qwen2", "seed_oss"),
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
QK_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
"""Further names of `ModelFamily.norms` in families that normalise queries and keys."""
