"""The architectures of .gguf files: which tensors and settings llama.cpp's converter writes for a model.

An architecture is one entry of `ARCHITECTURES`: where a tensor goes in the checkpoint, and what the converter
(convert_hf_to_gguf.py) did to it; and which settings of config.json the file has by which name. What is in llama.cpp's
code instead of the file is in the functions here.

Letters of shapes: d width, H heads, K key/value heads, D head width (HD and KD: their products), f feed-forward width,
V vocabulary, P positions, Q rows of q, k and v together, L length of a convolution, digits the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from graftlm.files.gguf_file import GGUFFile

if TYPE_CHECKING:
    import numpy as np

Config = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Where a tensor goes: its module in the checkpoint and its shape, rows first."""

    name: str
    shape: str
    """Sides, separated by spaces: a product of letters each (`HD d`); a bias has the first."""
    order: Callable[[np.ndarray, Config], np.ndarray] | None = None
    """The rows as the file has them, and config.json -> the checkpoint's rows."""
    transposed: bool = False
    """Whether the checkpoint has the matrix [in, out]. The shape is the file's, [out, in]."""
    checkpoint: str | None = None
    """The checkpoint's shape if it has a side of 1 more."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What an architecture's files hold, and the config.json of the same model."""

    model_type: str
    class_name: str
    block: Mapping[str, Target]
    """llama.cpp's names of a layer's tensors."""
    biases: tuple[str, ...] = ()
    """Those that may have a bias."""
    optional: tuple[str, ...] = ()
    """Those that may be missing, in one layer or all."""
    outer: Mapping[str, Target]
    """Tensors outside the layers."""
    layers: str = "model.layers."
    """What comes before a layer's number in the checkpoint."""
    numbers: Mapping[str, str] = field(default_factory=lambda: {"rms_norm_eps": ".attention.layer_norm_rms_epsilon"})
    """Settings of config.json that are a number of the file."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of config.json that all models have."""
    more: Callable[[GGUFFile, Config], Config] = lambda file, config: {}
    """Further settings of config.json."""
    renamed: Mapping[str, str | None] = field(default_factory=dict)
    """Settings that config.json has by another name than Llama's, or not at all (None)."""
    norm_offset: float = 0.0
    """Added to what the checkpoint holds for norms."""
    partial_rotary: bool = False
    """Whether only a part of each head rotates in some models: config.json then has `partial_rotary_factor`."""


# Rows -----------------------------------------------------------------------------------------------------------------


def from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q and k rows [heads * D, …]: (x0, x_half, x1, …) in each head -> (x0, x1, …)."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _query_pairs(rows: np.ndarray, config: Config) -> np.ndarray:
    return from_pairs(rows, config["num_attention_heads"])


def _key_pairs(rows: np.ndarray, config: Config) -> np.ndarray:
    return from_pairs(rows, config["num_key_value_heads"])


def _head_by_head(rows: np.ndarray, config: Config) -> np.ndarray:
    """q of all heads, then k, then v -> q, k, v of the first head, then of the next."""
    heads = config["num_attention_heads"]
    return rows.reshape(3, heads, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


# Settings -------------------------------------------------------------------------------------------------------------


def _llama_biases(file: GGUFFile, config: Config) -> Config:
    return {"attention_bias": file.has("attn_q", "bias"), "mlp_bias": file.has("ffn_up", "bias")}


def _attention_bias(file: GGUFFile, config: Config) -> Config:
    return {"attention_bias": file.has("attn_q", "bias")}


def _granite(file: GGUFFile, config: Config) -> Config:
    keys = {"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale"}
    keys |= {"residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}
    return _llama_biases(file, config) | {name: file.number(f".{key}", 1.0) for name, key in keys.items()}


def _smollm3(file: GGUFFile, config: Config) -> Config:
    """Every fourth layer does not rotate; llama.cpp has the number in its code."""
    return _llama_biases(file, config) | {"no_rope_layer_interval": 4, "use_sliding_window": False}


def _olmo2(file: GGUFFile, config: Config) -> Config:
    """A file with windows is an OLMo 3. Its scaled RoPE is that of layers without a window."""
    if not (window := int(file.get(".attention.sliding_window", 0))):
        return _attention_bias(file, config)
    names = {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "sliding_window": window}
    return _attention_bias(file, config) | names | {"layer_types": _layer_types(file, config, every=4)}


def _exaone4(file: GGUFFile, config: Config) -> Config:
    """Without windows (1.2B) all layers rotate, with them (32B) those that have one."""
    window = int(file.get(".attention.sliding_window", 0)) or None
    kinds = _layer_types(file, config, every=4 if window else 1)
    return {"sliding_window": window, "layer_types": kinds, "attention_bias": False}


def _lfm2(file: GGUFFile, config: Config) -> Config:
    """Layers without heads of keys are convolutions. The file's feed-forward width is the rounded one."""
    heads, layers = file.get(".attention.head_count_kv"), config["num_hidden_layers"]
    heads = heads if isinstance(heads, list) else [heads] * layers
    attention = [i for i, count in enumerate(heads) if count]
    return {
        "conv_L_cache": int(file.require(".shortconv.l_cache")),
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": config["intermediate_size"],
        "full_attn_idxs": attention,
        "layer_types": ["full_attention" if i in attention else "conv" for i in range(layers)],
        "tie_embedding": config["tie_word_embeddings"],
    }


def _layer_types(file: GGUFFile, config: Config, every: int) -> list[str]:
    """The kind of each layer: the file's list, or every n-th without a window."""
    given = file.get(".attention.sliding_window_pattern", every)
    layers = range(config["num_hidden_layers"])
    windows = given if isinstance(given, list) else [int(given) > 0 and (i + 1) % int(given) != 0 for i in layers]
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _gemma2(file: GGUFFile, config: Config) -> Config:
    """llama.cpp tells the 27B model, which scales scores in its own way, by its number of layers."""
    large = config["num_hidden_layers"] == 46
    return {
        "attn_logit_softcapping": file.number(".attn_logit_softcapping", 50.0),
        "final_logit_softcapping": file.number(".final_logit_softcapping", 30.0),
        "sliding_window": int(file.get(".attention.sliding_window", 4096)),
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if large
        else config["head_dim"],
    }


def _gemma3(file: GGUFFile, config: Config) -> Config:
    """As `_gemma2`. Every sixth layer has no window, and the others their own theta."""
    large = config["num_hidden_layers"] == 62
    return {
        "final_logit_softcapping": file.number(".final_logit_softcapping", 0.0) or None,
        "sliding_window": int(file.get(".attention.sliding_window", 0)) or config["max_position_embeddings"],
        "layer_types": _layer_types(file, config, every=6),
        "rope_local_base_freq": file.number(".rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if large
        else config["head_dim"],
    }


def _phi3(file: GGUFFile, config: Config) -> Config:
    """The file's context is the long one; the original is another setting."""
    original = int(file.get(".rope.scaling.original_context_length", config["max_position_embeddings"]))
    return {
        "original_max_position_embeddings": original,
        "sliding_window": int(file.get(".attention.sliding_window", 0)) or None,
    }


def _stablelm(file: GGUFFile, config: Config) -> Config:
    """llama.cpp, too, believes the tensors, not the setting `use_parallel_residual`."""
    return {
        "use_parallel_residual": not file.has("ffn_norm", "weight"),
        "use_qkv_bias": file.has("attn_q", "bias"),
        "qk_layernorm": False,
    }


def _use_bias(file: GGUFFile, config: Config) -> Config:
    return {"use_bias": file.has("attn_q", "bias")}


def _command_r(file: GGUFFile, config: Config) -> Config:
    return _attention_bias(file, config) | {"logit_scale": file.number(".logit_scale", 0.0625), "use_qk_norm": False}


def _cohere2(file: GGUFFile, config: Config) -> Config:
    """Every fourth layer has no window and does not rotate."""
    return _command_r(file, config) | {
        "sliding_window": int(file.require(".attention.sliding_window")),
        "sliding_window_pattern": 4,
    }


def _neox(file: GGUFFile, config: Config) -> Config:
    return {"use_parallel_residual": bool(file.get(".use_parallel_residual", True))}


# Tensors --------------------------------------------------------------------------------------------------------------

OUTER = {
    "token_embd": Target("model.embed_tokens", "V d"),
    "output_norm": Target("model.norm", "d"),
    "output": Target("lm_head", "V d"),
}
_ATTENTION = {
    "attn_q": Target("self_attn.q_proj", "HD d"),
    "attn_k": Target("self_attn.k_proj", "KD d"),
    "attn_v": Target("self_attn.v_proj", "KD d"),
    "attn_output": Target("self_attn.o_proj", "d HD"),
}
_MLP = {
    "ffn_gate": Target("mlp.gate_proj", "f d"),
    "ffn_up": Target("mlp.up_proj", "f d"),
    "ffn_down": Target("mlp.down_proj", "d f"),
}
_NORMS = {"attn_norm": Target("input_layernorm", "d"), "ffn_norm": Target("post_attention_layernorm", "d")}
_HEAD_NORMS = {"attn_q_norm": Target("self_attn.q_norm", "D"), "attn_k_norm": Target("self_attn.k_norm", "D")}
_NORMS_AROUND = {
    "attn_norm": Target("input_layernorm", "d"),
    "post_attention_norm": Target("post_attention_layernorm", "d"),
    "ffn_norm": Target("pre_feedforward_layernorm", "d"),
    "post_ffw_norm": Target("post_feedforward_layernorm", "d"),
}
_NORMS_AFTER = {name: target for name, target in _NORMS_AROUND.items() if name.startswith("post_")}
_LFM2_LAYER = {
    "attn_norm": Target("operator_norm", "d"),
    "ffn_norm": Target("ffn_norm", "d"),
    "ffn_gate": Target("feed_forward.w1", "f d"),
    "ffn_up": Target("feed_forward.w3", "f d"),
    "ffn_down": Target("feed_forward.w2", "d f"),
}
_LFM2_ATTENTION = {
    **_ATTENTION,
    "attn_output": Target("self_attn.out_proj", "d HD"),
    "attn_q_norm": Target("self_attn.q_layernorm", "D"),
    "attn_k_norm": Target("self_attn.k_layernorm", "D"),
}
_LFM2_CONVOLUTION = {
    "shortconv.conv": Target("conv.conv", "d L", checkpoint="d 1 L"),
    "shortconv.in_proj": Target("conv.in_proj", "3d d"),
    "shortconv.out_proj": Target("conv.out_proj", "d d"),
}
_PLAIN_MLP = {"ffn_up": Target("mlp.c_fc", "f d"), "ffn_down": Target("mlp.c_proj", "d f")}
_LAYER_NORM = {"layer_norm_eps": ".attention.layer_norm_epsilon"}
_PAIRS = {
    "attn_q": Target("self_attn.q_proj", "HD d", _query_pairs),
    "attn_k": Target("self_attn.k_proj", "KD d", _key_pairs),
}

# The table ------------------------------------------------------------------------------------------------------------

LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    block={**_NORMS, **_ATTENTION, **_PAIRS, **_MLP},
    biases=(*_ATTENTION, *_MLP),
    outer=OUTER,
    fixed={"hidden_act": "silu"},
    more=_llama_biases,
)
_GEMMA = replace(
    LLAMA,
    model_type="gemma",
    class_name="GemmaForCausalLM",
    block={**_NORMS, **_ATTENTION, **_MLP},
    biases=(),
    fixed={"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    more=lambda file, config: {},
    norm_offset=1.0,
)
_QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    block={**_NORMS, **_ATTENTION, **_MLP},
    biases=("attn_q", "attn_k", "attn_v"),
    fixed={"hidden_act": "silu", "use_sliding_window": False},
    more=lambda file, config: {},
)
_GPT2 = Architecture(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    block={
        "attn_norm": Target("ln_1", "d"),
        "ffn_norm": Target("ln_2", "d"),
        "attn_qkv": Target("attn.c_attn", "Q d", transposed=True),
        "attn_output": Target("attn.c_proj", "d HD", transposed=True),
        "ffn_up": Target("mlp.c_fc", "f d", transposed=True),
        "ffn_down": Target("mlp.c_proj", "d f", transposed=True),
    },
    biases=("output_norm", "attn_norm", "ffn_norm", "attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    outer={
        "token_embd": Target("transformer.wte", "V d"),
        "position_embd": Target("transformer.wpe", "P d"),
        "output_norm": Target("transformer.ln_f", "d"),
        "output": Target("lm_head", "V d"),
    },
    layers="transformer.h.",
    numbers={"layer_norm_epsilon": ".attention.layer_norm_epsilon"},
    fixed={"activation_function": "gelu_new"},
    renamed={
        **{"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"},
        **{"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"},
        **dict.fromkeys(("num_key_value_heads", "head_dim", "rope_theta")),
    },
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "qwen2": _QWEN2,
    "qwen3": replace(
        _QWEN2,
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        block={**_NORMS, **_ATTENTION, **_HEAD_NORMS, **_MLP},
        biases=tuple(_ATTENTION),
        more=_attention_bias,
    ),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        model_type="gemma2",
        class_name="Gemma2ForCausalLM",
        block={**_NORMS_AROUND, **_ATTENTION, **_MLP},
        more=_gemma2,
    ),
    "gemma3": replace(
        _GEMMA,
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        block={**_NORMS_AROUND, **_ATTENTION, **_HEAD_NORMS, **_MLP},
        more=_gemma3,
    ),
    "phi3": replace(
        LLAMA,
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        block={
            **_NORMS,
            "attn_qkv": Target("self_attn.qkv_proj", "Q d"),
            "attn_output": _ATTENTION["attn_output"],
            "ffn_up": Target("mlp.gate_up_proj", "2f d"),
            "ffn_down": _MLP["ffn_down"],
        },
        biases=(),
        more=_phi3,
        partial_rotary=True,
    ),
    "granite": replace(LLAMA, model_type="granite", class_name="GraniteForCausalLM", more=_granite),
    "smollm3": replace(LLAMA, model_type="smollm3", class_name="SmolLM3ForCausalLM", more=_smollm3),
    "olmo2": replace(
        LLAMA,
        model_type="olmo2",
        class_name="Olmo2ForCausalLM",
        block={
            **_NORMS_AFTER,
            **_ATTENTION,
            "attn_q_norm": Target("self_attn.q_norm", "HD"),
            "attn_k_norm": Target("self_attn.k_norm", "KD"),
            **_MLP,
        },
        biases=tuple(_ATTENTION),
        more=_olmo2,
    ),
    "exaone4": replace(
        LLAMA,
        model_type="exaone4",
        class_name="Exaone4ForCausalLM",
        block={**_NORMS_AFTER, **_ATTENTION, **_HEAD_NORMS, **_MLP},
        biases=(),
        more=_exaone4,
    ),
    "lfm2": replace(
        LLAMA,
        model_type="lfm2",
        class_name="Lfm2ForCausalLM",
        block={**_LFM2_LAYER, **_LFM2_ATTENTION, **_LFM2_CONVOLUTION},
        biases=(),
        optional=(*_LFM2_ATTENTION, *_LFM2_CONVOLUTION),
        outer={
            "token_embd": OUTER["token_embd"],
            "token_embd_norm": Target("model.embedding_norm", "d"),
            "output": OUTER["output"],
        },
        numbers={"norm_eps": ".attention.layer_norm_rms_epsilon"},
        fixed={},
        more=_lfm2,
    ),
    "starcoder2": replace(
        LLAMA,
        model_type="starcoder2",
        class_name="Starcoder2ForCausalLM",
        block={**_NORMS, **_ATTENTION, **_PLAIN_MLP},
        biases=("output_norm", *_NORMS, *_ATTENTION, *_PLAIN_MLP),
        numbers={"norm_epsilon": ".attention.layer_norm_epsilon"},
        fixed={"hidden_act": "gelu_pytorch_tanh", "sliding_window": None},
        more=_use_bias,
    ),
    "stablelm": replace(
        LLAMA,
        model_type="stablelm",
        class_name="StableLmForCausalLM",
        block={**_NORMS, **_ATTENTION, **_MLP},
        biases=("output_norm", *_NORMS, "attn_q", "attn_k", "attn_v"),
        optional=("ffn_norm",),
        numbers=_LAYER_NORM,
        more=_stablelm,
        partial_rotary=True,
    ),
    "ernie4_5": replace(
        LLAMA,
        model_type="ernie4_5",
        class_name="Ernie4_5ForCausalLM",
        block={**_NORMS, **_ATTENTION, **_MLP},
        more=_use_bias,
    ),
    "chatglm": replace(
        LLAMA,
        model_type="glm",
        class_name="GlmForCausalLM",
        block={**_NORMS, **_ATTENTION, "ffn_up": Target("mlp.gate_up_proj", "2f d"), "ffn_down": _MLP["ffn_down"]},
        biases=("attn_q", "attn_k", "attn_v"),
        more=_attention_bias,
        partial_rotary=True,
    ),
    "glm4": replace(
        LLAMA,
        model_type="glm4",
        class_name="Glm4ForCausalLM",
        block={
            "attn_norm": Target("input_layernorm", "d"),
            "post_attention_norm": Target("post_self_attn_layernorm", "d"),
            "ffn_norm": Target("post_attention_layernorm", "d"),
            "post_ffw_norm": Target("post_mlp_layernorm", "d"),
            **_ATTENTION,
            "ffn_up": Target("mlp.gate_up_proj", "2f d"),
            "ffn_down": _MLP["ffn_down"],
        },
        biases=("attn_q", "attn_k", "attn_v"),
        more=_attention_bias,
        partial_rotary=True,
    ),
    "command-r": replace(
        LLAMA,
        model_type="cohere",
        class_name="CohereForCausalLM",
        block={"attn_norm": _NORMS["attn_norm"], **_ATTENTION, **_MLP},
        biases=tuple(_ATTENTION),
        numbers=_LAYER_NORM,
        more=_command_r,
    ),
    "cohere2": replace(
        LLAMA,
        model_type="cohere2",
        class_name="Cohere2ForCausalLM",
        block={"attn_norm": _NORMS["attn_norm"], **_ATTENTION, **_MLP},
        biases=tuple(_ATTENTION),
        numbers=_LAYER_NORM,
        more=_cohere2,
    ),
    "phi2": replace(
        LLAMA,
        model_type="phi",
        class_name="PhiForCausalLM",
        block={
            "attn_norm": _NORMS["attn_norm"],
            **_ATTENTION,
            "attn_output": Target("self_attn.dense", "d HD"),
            "ffn_up": Target("mlp.fc1", "f d"),
            "ffn_down": Target("mlp.fc2", "d f"),
        },
        biases=("output_norm", "output", "attn_norm", *_ATTENTION, "ffn_up", "ffn_down"),
        outer={**OUTER, "output_norm": Target("model.final_layernorm", "d")},
        numbers=_LAYER_NORM,
        fixed={"hidden_act": "gelu_new", "qk_layernorm": False},
        more=lambda file, config: {},
        partial_rotary=True,
    ),
    "gpt2": _GPT2,
    "starcoder": replace(
        _GPT2,
        model_type="gpt_bigcode",
        class_name="GPTBigCodeForCausalLM",
        block={name: replace(target, transposed=False) for name, target in _GPT2.block.items()},
        fixed={**_GPT2.fixed, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
    ),
    "gptneox": replace(
        LLAMA,
        model_type="gpt_neox",
        class_name="GPTNeoXForCausalLM",
        block={
            "attn_norm": Target("input_layernorm", "d"),
            "ffn_norm": Target("post_attention_layernorm", "d"),
            "attn_qkv": Target("attention.query_key_value", "Q d", _head_by_head),
            "attn_output": Target("attention.dense", "d HD"),
            "ffn_up": Target("mlp.dense_h_to_4h", "f d"),
            "ffn_down": Target("mlp.dense_4h_to_h", "d f"),
        },
        biases=("output_norm", "attn_norm", "ffn_norm", "attn_qkv", "attn_output", "ffn_up", "ffn_down"),
        outer={
            "token_embd": Target("gpt_neox.embed_in", "V d"),
            "output_norm": Target("gpt_neox.final_layer_norm", "d"),
            "output": Target("embed_out", "V d"),
        },
        layers="gpt_neox.layers.",
        numbers=_LAYER_NORM,
        fixed={"hidden_act": "gelu", "attention_bias": True},
        more=_neox,
        renamed={
            **{"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
            **dict.fromkeys(("num_key_value_heads", "head_dim")),
        },
        partial_rotary=True,
    ),
}
"""llama.cpp's name of an architecture -> its entry. Only those that `models/` reads."""
