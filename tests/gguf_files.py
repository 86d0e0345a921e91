"""Write a model of transformers as a .gguf file, as llama.cpp's convert_hf_to_gguf.py does, with the `gguf` package.

Names come from the package's own map; what the converter changes is written down here a second time, so that reading
is tested against another source than itself.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

from family_cases import CASES as FAMILY_CASES
from family_cases import SIZES, theta

VOCAB = 259
TOKENS = ["<|endoftext|>", *sorted(ByteLevel.alphabet()), "ab", "[PAD258]"]
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
    "starcoder2": MODEL_ARCH.STARCODER2,
    "stablelm": MODEL_ARCH.STABLELM,
    "ernie4_5": MODEL_ARCH.ERNIE4_5,
    "glm": MODEL_ARCH.CHATGLM,
    "glm4": MODEL_ARCH.GLM4,
    "cohere": MODEL_ARCH.COMMAND_R,
    "cohere2": MODEL_ARCH.COHERE2,
    "phi": MODEL_ARCH.PHI2,
    "gpt2": MODEL_ARCH.GPT2,
    "gpt_bigcode": MODEL_ARCH.STARCODER,
    "gpt_neox": MODEL_ARCH.GPTNEOX,
    "granite": MODEL_ARCH.GRANITE,
    "smollm3": MODEL_ARCH.SMOLLM3,
    "olmo2": MODEL_ARCH.OLMO2,
    "olmo3": MODEL_ARCH.OLMO2,
    "exaone4": MODEL_ARCH.EXAONE4,
    "lfm2": MODEL_ARCH.LFM2,
}
BYTE, LOOKS_SPECIAL = re.compile("<0x[0-9A-F]{2}>"), re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<unused.*>")
LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_31 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
LONG = {"max_position_embeddings": 131072}
LONGROPE = {
    "rope_parameters": theta(
        rope_type="longrope",
        short_factor=[1.0, 1.5, 2.0, 2.5],
        long_factor=[2.0, 3.0, 4.0, 5.5],
        original_max_position_embeddings=1024,
        partial_rotary_factor=1.0,
    ),
    **{"max_position_embeddings": 4096, "original_max_position_embeddings": 1024},
}

PERMUTED = ("llama", "granite", "smollm3")
"""Subclasses of llama.cpp's `LlamaModel`."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama linear": ("Llama", {"rope_parameters": theta(rope_type="linear", factor=2.0)}),
    "llama yarn": (
        "Llama",
        {"rope_parameters": theta(5e5, rope_type="yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA_31, **LONG}),
    "qwen2": ("Qwen2", {"hidden_size": 32, "rope_parameters": theta(1e6)}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3 biased": ("Qwen3", {"attention_bias": True}),
    "phi3": ("Phi3", {"hidden_size": 32, "rope_parameters": theta(partial_rotary_factor=0.75), "sliding_window": 5}),
    "phi3 long": ("Phi3", {"hidden_size": 32, **LONGROPE}),
    "granite": (
        "Granite",
        {
            **{"hidden_size": 32, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
            **{"residual_multiplier": 0.3, "tie_word_embeddings": True},
        },
    ),
    "smollm3": ("SmolLM3", {"hidden_size": 32, "num_hidden_layers": 5, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            **{"sliding_window": 5, "num_hidden_layers": 5},
            "rope_parameters": {
                "sliding_attention": theta(5e5),
                "full_attention": theta(5e5, rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
            },
        },
    ),
    "exaone4": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "exaone4 windows": ("Exaone4", {"sliding_window": 5, "rope_parameters": LLAMA_31, **LONG}),
    "lfm2": (
        "Lfm2",
        {
            **{"tie_word_embeddings": True, "full_attn_idxs": [1, 3], "conv_L_cache": 3, "norm_eps": 1e-5},
            **{"block_auto_adjust_ff_dim": False, "hidden_size": 32, "layer_types": None},
        },
    ),
    "starcoder2": ("Starcoder2", {"hidden_size": 32, "tie_word_embeddings": True, "sliding_window": None}),
    "stablelm": ("StableLm", {"hidden_size": 32, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm parallel": ("StableLm", {"hidden_size": 32, "use_parallel_residual": True}),
    "ernie4_5": ("Ernie4_5", {"tie_word_embeddings": True}),
    "glm": ("Glm", {"attention_bias": True}),
    "glm4": ("Glm4", {"attention_bias": True}),
    "cohere": ("Cohere", {"hidden_size": 32, "logit_scale": 0.3, "tie_word_embeddings": True}),
    "cohere2": ("Cohere2", {"hidden_size": 32, "logit_scale": 0.5, "sliding_window": 5, "tie_word_embeddings": True}),
    "phi": (
        "Phi",
        {"hidden_size": 32, "partial_rotary_factor": 0.75, "num_key_value_heads": 4, "intermediate_size": 128},
    ),
    "gpt2": ("GPT2", {"hidden_size": 32, "n_inner": 128, "tie_word_embeddings": True}),
    "gpt_bigcode": (
        "GPTBigCode",
        {"hidden_size": 32, "num_key_value_heads": 1, "n_inner": 128, "tie_word_embeddings": True},
    ),
    "gpt_neox": ("GPTNeoX", {"hidden_size": 32, "rotary_pct": 0.5, "use_parallel_residual": False}),
    "gemma": ("Gemma", {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": ("Gemma2", {"tie_word_embeddings": True, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3Text",
        {
            **{"tie_word_embeddings": True, "num_hidden_layers": 7, "sliding_window": 5, "query_pre_attn_scalar": 8},
            "rope_parameters": {"sliding_attention": theta(1e4), "full_attention": theta(1e6)},
        },
    ),
    "gemma3 linear": (
        "Gemma3Text",
        {
            **{"tie_word_embeddings": True, "num_hidden_layers": 7, "sliding_window": 5, "query_pre_attn_scalar": 8},
            "rope_parameters": {
                "sliding_attention": theta(1e4),
                "full_attention": theta(1e6, rope_type="linear", factor=8.0),
            },
        },
    ),
}


def tiny_model(name: str, width: int | None = None, **others: Any) -> transformers.PreTrainedModel:
    """The case's model with random weights; large ones, so that every setting shows.

    width: of all sides, if given. others: settings in which it differs from the case.
    """
    kind, settings = CASES.get(name) or FAMILY_CASES[name]
    made = getattr(transformers, f"{kind}Config")
    known = {key: value for key, value in SIZES.items() if key != "num_key_value_heads" or hasattr(made(), key)}
    sizes = {**known, "attn_implementation": "eager", **settings, **others}
    if width is not None:
        sizes |= {"hidden_size": width, "intermediate_size": width, "head_dim": width // 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = made(**sizes)
    torch.manual_seed(0)
    model: transformers.PreTrainedModel = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    for parameter, p in model.named_parameters():
        if "norm" in parameter or parameter.endswith("bias"):
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def write_gguf(
    model: transformers.PreTrainedModel,
    path: Path,
    quantised: GGMLQuantizationType = GGMLQuantizationType.F32,
    change: Callable[[GGUFWriter], None] | None = None,
) -> None:
    """Write the model, with a byte-level tokenizer. Matrices are quantised."""
    config = {"rope_parameters": {}, "num_key_value_heads": None, **model.config.to_dict()}
    config |= {key: getattr(model.config, key) for key in SIZES if hasattr(model.config, key)}
    config["intermediate_size"] = config.get("n_inner") or config["intermediate_size"]
    architecture = ARCHITECTURES[config["model_type"]]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    add_settings(writer, config)
    add_tokenizer(writer)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    tied = config["tie_word_embeddings"]
    tensors = {
        name: t.detach().numpy() for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    for name, values in [*tensors.items(), *extra_tensors(config)]:
        stored = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        values = np.ascontiguousarray(converted(config, name, values))
        kind = quantised if values.ndim == 2 and "conv.conv" not in name else GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quantize(values, kind), raw_dtype=kind)
    if change is not None:
        change(writer)
    finish(writer)


def add_tokenizer(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, *[1] * (len(TOKENS) - 2), 5])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)


def write_tokenizer_file(folder: Path, path: Path, architecture: str, pre: str) -> None:
    """Write a file with the tokenizer of a folder and nothing else: `_set_vocab_gpt2` and `_set_vocab_sentencepiece`.

    The latter reads scores from tokenizer.model. Here they are the ranks of merges, which is what SentencePiece's are.
    """
    content, writer = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")),
        GGUFWriter(path, architecture),
    )
    vocab, added = content["model"]["vocab"], {token["id"]: token for token in content["added_tokens"]}
    tokens = {index: (token, 6 if BYTE.fullmatch(token) else 1) for token, index in vocab.items()}
    for index, token in added.items():
        text, special = token["content"], token["special"] or LOOKS_SPECIAL.fullmatch(token["content"])
        tokens[index] = (text, 3) if special else (text.replace("\u2581", " "), 4)
    padded = [tokens.get(index, (f"[PAD{index}]", 5)) for index in range(max(tokens) + 3)]
    writer.add_token_list([token for token, _ in padded])
    writer.add_token_types([kind for _, kind in padded])
    writer.add_tokenizer_pre(pre)
    byte_level = pre != "default"
    gguf.SpecialVocab(folder, load_merges=byte_level).add_to_gguf(writer)
    if byte_level:
        writer.add_tokenizer_model("gpt2")
    else:
        writer.add_tokenizer_model("llama")
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in content["model"]["merges"]]
        ranks = {left + right: -rank for rank, (left, right) in reversed([*enumerate(pairs)])}
        writer.add_token_scores([float(ranks.get(token, -len(pairs) - i)) for i, (token, _) in enumerate(padded)])
        writer.add_add_space_prefix("Prepend" in json.dumps(content["normalizer"]))
    finish(writer)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_settings(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """`TextModel.set_gguf_parameters`, and what its subclasses add."""
    kind, ropes = config["model_type"], config["rope_parameters"]
    rope = {"rope_type": "default", **ropes.get("full_attention", ropes)}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    if kind == "lfm2":
        is_conv = [layer == "conv" for layer in config["layer_types"]]
        config["num_key_value_heads"] = [0 if conv else config["num_key_value_heads"] for conv in is_conv]
        writer.add_shortconv_l_cache(config["conv_L_cache"])
        writer.add_layer_norm_rms_eps(config["norm_eps"])
    if kind == "gpt_bigcode" or config["num_key_value_heads"]:
        writer.add_head_count_kv(config["num_key_value_heads"] or 1)
    eps = [config[key] for key in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon") if key in config]
    if eps:
        writer.add_layer_norm_eps(eps[0])
    elif kind != "lfm2" and "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim") and kind not in ("granite", "lfm2"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if kind not in ("gpt2", "gpt_bigcode", "gpt_neox", "stablelm", "phi"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if kind != "gemma3_text" and "sliding_attention" in ropes:  # older files of Gemma 3 lack it
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if kind in ("stablelm", "phi", "glm", "glm4", "gpt_neox"):
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
    if kind in ("stablelm", "gpt_neox"):
        writer.add_parallel_residual(config["use_parallel_residual"])
    if kind in ("cohere", "cohere2"):
        writer.add_logit_scale(config["logit_scale"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if kind == "cohere2":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind in ("olmo3", "exaone4") and config["sliding_window"]:
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([layer == "sliding_attention" for layer in config["layer_types"]])
    if kind == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if kind in PERMUTED:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    if kind == "phi3":
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        writer.add_sliding_window(config["sliding_window"] or 0)
    if rope["rope_type"] == "longrope":
        original = config["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    if kind in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config["sliding_window"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def converted(config: dict[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    """What `modify_tensors` makes of a tensor."""
    kind = config["model_type"]
    if kind in PERMUTED and name.endswith(("q_proj.weight", "q_proj.bias")):
        return permuted(values, config["num_attention_heads"])
    if kind in PERMUTED and name.endswith(("k_proj.weight", "k_proj.bias")):
        return permuted(values, config["num_key_value_heads"])
    if name.endswith("conv.conv.weight"):
        return values.squeeze(1)
    if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return values.T
    if kind == "gpt_neox" and "query_key_value" in name:
        parts = values.reshape(config["num_attention_heads"], 3, -1, *values.shape[1:])
        return np.concatenate([parts[:, i].reshape(-1, *values.shape[1:]) for i in range(3)])
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    return values


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute`."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def extra_tensors(config: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """`generate_extra_tensors`: Llama 3.1's divisors of the frequencies, and LongRoPE's."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") == "longrope":
        return [(f"rope_factors_{n}.weight", np.array(rope[f"{n}_factor"], np.float32)) for n in ("long", "short")]
    if rope.get("rope_type") != "llama3":
        return []
    base, dim, factor = rope["rope_theta"], config["head_dim"], rope["factor"]
    low, high, divisors = 8192 / rope["low_freq_factor"], 8192 / rope["high_freq_factor"], []
    for frequency in 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        length = 2 * math.pi / float(frequency)
        smooth = (8192 / length - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        ramp = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if length < high else factor if length > low else ramp)
    return [("rope_freqs.weight", np.array(divisors, np.float32))]
