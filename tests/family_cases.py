"""Tiny models of transformers: every family that is read, with each option that real files use.

A case is a class of transformers and the settings in which it differs from `SIZES`. A new family adds its cases here;
the tests of this folder and of `exchange` then hold for it.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tiny import byte_tokenizer

VOCAB = 259
"""Two more than the byte-level tokenizer has: real files pad their vocabulary."""
WINDOW = 5
"""Shorter than the texts of the tests, so that its edge is tested."""
SIZES: dict[str, Any] = {
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 24, "head_dim": 8},
    **{"vocab_size": VOCAB, "intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": None},
    **{"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.4, "tie_word_embeddings": False},
    **{"rms_norm_eps": 1e-5},
}


def theta(value: float = 1e4, **scaling: Any) -> dict[str, Any]:
    """Settings of a rotation, as transformers 5 writes them."""
    return {"rope_type": "default", "rope_theta": value, **scaling}


YARN = theta(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA_3 = theta(rope_type="llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA_3 |= {"original_max_position_embeddings": 12}

LONG_ROPE = theta(rope_type="longrope", short_factor=[1.0, 1.1, 1.5], long_factor=[1.0, 4.0, 9.0])

ONE_KEY_HEAD = {"num_key_value_heads": 1, "head_dim": 6}  # for PEFT; GPT-BigCode itself does not read them
WINDOW_IN_TURN = {"sliding_window": WINDOW, "sliding_window_pattern": 2}
WINDOW_ONLY = {"sliding_window": WINDOW}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GEMMA_4B = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": theta(500.0, rope_type="linear", factor=2.0),
        "sliding_attention": theta(50.0),
    },
}
WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW}

MOE = {
    "experts_implementation": "eager",
    "num_local_experts": 5,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}

MULTIPLIERS = {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.6}
HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
OLMO_3 = {"full_attention": {**YARN, "rope_theta": 500.0}, "sliding_attention": theta(500.0)}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("Cohere", {"attention_bias": True, "logit_scale": 0.3}),
    "cohere2": (
        "Cohere2",
        {"hidden_size": 32, "logit_scale": 0.5, **WINDOW_IN_TURN, "tie_word_embeddings": True},
    ),
    "cohere2 in its window": (
        "Cohere2",
        {
            **{"hidden_size": 32, "logit_scale": 0.5, "sliding_window": 64},
            "layer_types": ["full_attention", *3 * ["sliding_attention"]],
        },
    ),
    "ernie4_5": ("Ernie4_5", {"tie_word_embeddings": True}),
    "ernie4_5 biased": ("Ernie4_5", {"use_bias": True, "rope_parameters": YARN}),
    "exaone4": ("Exaone4", {**WINDOW_ONLY, "sliding_window_pattern": 2, "rope_parameters": LLAMA_3}),
    "exaone4 full": (
        "Exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 4, "tie_word_embeddings": True},
    ),
    "gemma": ("Gemma", {"attention_bias": True}),
    "gemma2": ("Gemma2", {**WINDOW_ONLY, **CAPS, "query_pre_attn_scalar": 11, "tie_word_embeddings": True}),
    "gemma2 uncapped": (
        "Gemma2",
        {
            **WINDOW_ONLY,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_parameters": theta(500.0),
        },
    ),
    "gemma3": ("Gemma3Text", {**WINDOW_ONLY, "sliding_window_pattern": 3, "tie_word_embeddings": True}),
    "gemma3 capped": (
        "Gemma3Text",
        {**WINDOW_ONLY, **GEMMA_4B, "attention_bias": True, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 3},
    ),
    "glm": ("Glm", {"tie_word_embeddings": True}),
    "glm4": ("Glm4", {}),
    "glm4 unbiased": ("Glm4", {"attention_bias": False, "rope_parameters": theta(500.0, partial_rotary_factor=1.0)}),
    "gpt-oss": ("GptOss", MOE | {"sliding_window": WINDOW}),
    "gpt-oss plain": ("GptOss", MOE | {"attention_bias": False, "rope_parameters": theta(), "num_experts_per_tok": 5}),
    "gpt_bigcode": ("GPTBigCode", {**ONE_KEY_HEAD, "n_inner": 40, "tie_word_embeddings": True}),
    "gpt_bigcode wide": ("GPTBigCode", {**ONE_KEY_HEAD, "activation_function": "gelu"}),
    "gpt2": ("GPT2", {"n_inner": 40, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoX", {"hidden_size": 32}),
    "gpt_neox sequential": (
        "GPTNeoX",
        {"hidden_size": 32, "use_parallel_residual": False, "rope_parameters": theta(partial_rotary_factor=1.0)},
    ),
    "gpt_neo": (
        "GPTNeo",
        {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW, "tie_word_embeddings": True},
    ),
    "gpt_neo global": (
        "GPTNeo",
        {"attention_types": [[["local"], 4]], "attention_layers": ["global"] * 4, "intermediate_size": None},
    ),
    "gptj": ("GPTJ", {"hidden_size": 32, "rotary_dim": 4, "n_inner": 40}),
    "gptj all rotate": ("GPTJ", {"rotary_dim": 6}),
    "granite": ("Granite", {**MULTIPLIERS, "attention_multiplier": 0.2, "tie_word_embeddings": True}),
    "granite biased": ("Granite", {"attention_bias": True, "mlp_bias": True}),
    "lfm2": (
        "Lfm2",
        {
            **{"tie_word_embeddings": True, "full_attn_idxs": [2], "conv_L_cache": 3, "block_multiple_of": 8},
            **{"norm_eps": 1e-5, "block_ffn_dim_multiplier": 1.2},
        },
    ),
    "lfm2 last attention": (
        "Lfm2",
        {
            **{"layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_L_cache": 4},
            **{"block_auto_adjust_ff_dim": False},
        },
    ),
    "helium": ("Helium", {"head_dim": 6, "tie_word_embeddings": True}),
    "helium biased": ("Helium", {"head_dim": 6, "attention_bias": True, "mlp_bias": True}),
    "llama": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama 3": ("Llama", {"hidden_size": 32, "rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "internlm3": (
        "InternLM3",
        {"qkv_bias": True, "bias": True, "rope_parameters": theta(500.0, rope_type="dynamic", factor=6.0)},
    ),
    "llama linear": ("Llama", {"hidden_size": 32, "rope_parameters": theta(rope_type="linear", factor=2.0)}),
    "ministral": ("Ministral", {**WINDOW_ONLY, "layer_types": HYBRID}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral yarn": ("Mistral", {"sliding_window": None, "rope_parameters": YARN}),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "olmo3": ("Olmo3", {**WINDOW_ONLY, "rope_parameters": OLMO_3}),
    "olmo3 hybrid": ("Olmo3", {**WINDOW_ONLY, "layer_types": HYBRID, "tie_word_embeddings": True}),
    "opt": ("OPT", {"ffn_dim": 40, "tie_word_embeddings": True}),
    "opt without biases": ("OPT", {"ffn_dim": 40, "enable_bias": False, "activation_function": "gelu"}),
    "phi": ("Phi", {"partial_rotary_factor": 0.75}),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "phi3 longrope": (
        "Phi3",
        {
            **{"rope_parameters": {**LONG_ROPE, "partial_rotary_factor": 0.75}, "tie_word_embeddings": True},
            **{"original_max_position_embeddings": 32, "max_position_embeddings": 128, "hidden_size": 32},
        },
    ),
    "qwen2": ("Qwen2", WINDOWS | {"max_window_layers": 2, "hidden_size": 32}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3 biased": (
        "Qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3 moe": ("Qwen3Moe", MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    "qwen3 moe unnormalized": ("Qwen3Moe", MOE | WINDOWS | {"mlp_only_layers": [1], "attention_bias": True}),
    "qwen3 yarn": (
        "Qwen3",
        {"rope_parameters": YARN | {"attention_factor": 0.9, "beta_fast": 16.0, "truncate": False}},
    ),
    "seed_oss": ("SeedOss", {}),
    "seed_oss biased": ("SeedOss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 1], "tie_word_embeddings": True}),
    "smollm3 windows": (
        "SmolLM3",
        {**WINDOWS, "no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True, "rope_parameters": YARN},
    ),
    "stablelm": ("StableLm", {"hidden_size": 32, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm parallel": ("StableLm", {"hidden_size": 32, "use_parallel_residual": True, "tie_word_embeddings": True}),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW, "tie_word_embeddings": True}),
    "starcoder2 unbiased": ("Starcoder2", {"use_bias": False}),
}


@cache
def config_of(name: str) -> transformers.PretrainedConfig:
    """The configuration of this case."""
    kind, settings = CASES[name]
    made = getattr(transformers, f"{kind}Config")
    unknown = {"num_key_value_heads"} - set(dir(made()))  # would be written to config.json, where PEFT believes it
    sizes = {key: value for key, value in SIZES.items() if key not in unknown}
    found: transformers.PretrainedConfig = made(**{**sizes, "attn_implementation": "eager", **settings})
    return found


def reference(name: str, dtype: torch.dtype) -> nn.Module:
    """The case's model of transformers with random weights; large ones, so that every setting shows."""
    torch.manual_seed(0)
    model: nn.Module = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config_of(name))](config_of(name)).eval()
    for parameter, p in model.named_parameters():
        if "norm" in parameter or parameter.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    angles = {buffer: b for buffer, b in model.named_buffers() if "inv_freq" in buffer}
    model.to(dtype)
    for buffer, b in angles.items():  # as in float32, where transformers computes angles
        module, attribute = buffer.rsplit(".", 1)
        setattr(model.get_submodule(module), attribute, b)
    for scaled in (module for module in model.modules() if hasattr(module, "scalar_embed_scale")):
        scaled.embed_scale = torch.tensor(scaled.scalar_embed_scale, dtype=dtype)  # Gemma keeps it in float32
    return model


def stored_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters or gradients of transformers' model by the names that its files have: of each expert on its own."""
    if isinstance(model, transformers.GPTNeoXForCausalLM):
        return {name.replace("lm_head", "embed_out"): tensor for name, tensor in tensors.items()}
    if not isinstance(model, transformers.Qwen3MoeForCausalLM):
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, experts, kind = name.partition("mlp.experts.")
        if not experts:
            found[name] = tensor
            continue
        for i, of_expert in enumerate(tensor):
            parts = {"down_proj": of_expert} if kind == "down_proj" else {}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), of_expert.chunk(2), strict=True))
            found |= {f"{layer}mlp.experts.{i}.{part}.weight": t for part, t in parts.items()}
    return found


def base_folder(folder: Path, name: str) -> Path:
    """The case's model, as transformers writes it in float32, with a byte-level tokenizer."""
    model = reference(name, torch.float32)
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return folder
