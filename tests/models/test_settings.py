"""Each setting of a config.json with each odd value: a model equal to transformers', or one line."""

import contextlib
import itertools
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from graftlm.errors import InputError
from graftlm.exchange.huggingface import load_model
from graftlm.models.config import FAMILIES, read_model_config
from graftlm.models.nearest import NEAREST
from tiny import config_json, shape_of

CONTEXT, WINDOW = 24, 6
MISSING = object()
ODD: list[Any] = [MISSING, None, "1", "false", [1], {}, True, 0, 2, -1, 0.5, 1e30]
ROPE = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 12
SHARED = ("vocab_size", "tie_word_embeddings", "model_type")
LLAMA = (
    *(
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "intermediate_size",
        "head_dim",
    ),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta", "hidden_act", "rope_scaling", "rope_parameters"),
    *("partial_rotary_factor", *(f"rope_scaling.{key}" for key in (*ROPE, "partial_rotary_factor", "rope_theta"))),
)
KEYS = {
    "gpt2": (
        *(
            "n_layer",
            "n_head",
            "n_embd",
            "n_inner",
            "n_positions",
            "n_ctx",
            "layer_norm_epsilon",
            "activation_function",
        ),
        *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    ),
    "neox": (
        *("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "max_position_embeddings"),
        *("layer_norm_eps", "hidden_act", "rotary_pct", "rotary_emb_base", "use_parallel_residual", "attention_bias"),
        *("rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor", "rope_parameters.rope_type"),
        *("rope_parameters.rope_theta", "rope_parameters.partial_rotary_factor"),
    ),
    "llama": (*LLAMA, "attention_bias", "mlp_bias"),
    "mistral": ("num_key_value_heads", "head_dim", "sliding_window"),
    "qwen2": (
        *(
            "num_key_value_heads",
            "head_dim",
            "sliding_window",
            "use_sliding_window",
            "max_window_layers",
            "layer_types",
        ),
    ),
    "gemma2": (
        *("hidden_activation", "head_dim", "sliding_window", "layer_types", "query_pre_attn_scalar", "attention_bias"),
        *("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"),
    ),
    "gemma3_text": (
        *("sliding_window", "sliding_window_pattern", "layer_types", "attn_logit_softcapping", "rope_theta"),
        *("rope_local_base_freq", "rope_scaling", "rope_scaling.rope_type", "rope_scaling.factor", "rope_parameters"),
        *("rope_parameters.full_attention", "rope_parameters.sliding_attention"),
    ),
}
SIZES: dict[str, Any] = {
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32},
    **{"intermediate_size": 24, "max_position_embeddings": CONTEXT, "vocab_size": 40},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None},
}
LARGE = {"num_hidden_layers": 8, "num_attention_heads": 320, "hidden_size": 40960, "max_position_embeddings": 8192}
"""Sizes that every default of the others fits."""
FILES: dict[str, dict[str, Any]] = {  # config.json of families that have no shape in `tiny.py`, as in their old files
    "exaone4": {"rope_theta": 800.0, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "rope_theta": 800.0},
    "internlm3": {"head_dim": 8, "qkv_bias": True, "bias": True, "rope_theta": 800.0},
    "ministral": {"head_dim": 8, "sliding_window": WINDOW, "rope_theta": 800.0},
    "olmo2": {"rope_theta": 800.0},
    "olmo3": {
        **{"rope_theta": 500000, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 12, "beta_fast": 32},
    },
    "seed_oss": {"head_dim": 8, "attention_bias": True, "rope_theta": 800.0, "residual_dropout": 0.1},
    "smollm3": {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": WINDOW, "rope_theta": 800.0},
    "cohere": {"rope_theta": 800.0, "logit_scale": 0.5, "attention_bias": True, "use_qk_norm": False},
    "cohere2": {
        **{"head_dim": 8, "rope_theta": 500.0, "logit_scale": 0.5, "sliding_window": WINDOW},
        **{"sliding_window_pattern": 2, "rotary_pct": 1.0, "cache_implementation": "hybrid"},
    },
    "ernie4_5": {"head_dim": 8, "rope_theta": 800.0, "use_bias": True},
    "glm": {"head_dim": 8, "rope_theta": 800.0},
    "glm4": {"head_dim": 8, "rope_theta": 800.0, "partial_rotary_factor": 0.25, "attention_bias": False},
    "helium": {"head_dim": 8, "rope_theta": 800.0, "mlp_bias": True},
    "phi": {"partial_rotary_factor": 0.75, "rope_theta": 800.0, "rope_scaling": None, "qk_layernorm": False},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": WINDOW},
    "gemma3_text": {"head_dim": 8, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "phi3": {
        **{"original_max_position_embeddings": 16, "rope_theta": 500.0, "sliding_window": WINDOW},
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]},
    },
}
FILES |= {
    "stablelm": {"partial_rotary_factor": 0.5, "rope_theta": 800, "use_qkv_bias": True, "use_parallel_residual": True},
    "starcoder2": {"sliding_window": WINDOW, "rope_theta": 800.0, "use_bias": False, "norm_type": "layer_norm"},
}
KEYS |= {
    "exaone4": ("sliding_window", "sliding_window_pattern", "layer_types", "num_key_value_heads"),
    "granite": (
        *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling", "attention_bias"),
        "mlp_bias",
    ),
    "internlm3": ("qkv_bias", "bias", "attention_bias", "head_dim", "hidden_size", "num_key_value_heads"),
    "ministral": ("sliding_window", "layer_types", "head_dim", "num_key_value_heads"),
    "olmo2": ("attention_bias", "head_dim", "num_key_value_heads"),
    "olmo3": (
        "sliding_window",
        "layer_types",
        "rope_theta",
        "rope_scaling",
        "rope_scaling.rope_type",
        "rope_parameters",
    ),
    "seed_oss": ("attention_bias", "attention_out_bias", "mlp_bias", "head_dim", "num_key_value_heads"),
    "smollm3": (
        *("no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window", "layer_types"),
        *("attention_bias", "mlp_bias"),
    ),
    "cohere": ("use_qk_norm", "attention_bias", "tie_word_embeddings"),
    "cohere2": ("head_dim", "sliding_window", "sliding_window_pattern", "layer_types"),
    "ernie4_5": ("head_dim", "use_bias"),
    "glm4": ("head_dim", "partial_rotary_factor", "attention_bias"),
    "phi": ("hidden_act", "qk_layernorm", "tie_word_embeddings", "partial_rotary_factor"),
    "phi3": (
        *("num_key_value_heads", "head_dim", "sliding_window", "partial_rotary_factor", "rope_scaling.type"),
        *("original_max_position_embeddings", "rope_scaling.original_max_position_embeddings"),
    ),
    "stablelm": ("head_dim", "hidden_size", "qk_layernorm", "use_parallel_residual"),
    "starcoder2": ("head_dim", "use_bias", "sliding_window"),
}
UNDERSTOOD: list[tuple[str, dict[str, Any]]] = [  # what must not be refused
    ("llama", {"pretraining_tp": 2}),
    ("llama", {"pretraining_tp": None}),
    ("llama", {"partial_rotary_factor": 1.0}),
    ("llama", {"partial_rotary_factor": None}),
    ("llama", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 1.0}}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    (
        "llama",
        {"rope_scaling": {key: value for key, value in ROPE.items() if key != "original_max_position_embeddings"}},
    ),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 500.0}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("llama", {"sliding_window": WINDOW}),
    *(("llama", {"hidden_act": name}) for name in ("swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")),
    *(
        ("gpt2", {"activation_function": name})
        for name in ("gelu", "swish", "gelu_fast", "gelu_accurate", "gelu_python")
    ),
    ("neox", {"hidden_act": "gelu_new"}),
    ("neox", {"rope_scaling": {"type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": CONTEXT}),
    ("mistral", {"sliding_window": WINDOW}),
    ("mistral", {"attention_bias": True}),
    ("mistral", {"num_attention_heads": 8, "num_key_value_heads": MISSING}),
    ("qwen2", {"sliding_window": WINDOW}),
    ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen2", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}),
    (
        "qwen2",
        {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    ("exaone4", {"sliding_window_pattern": "LLLG", "layer_types": ["sliding_attention", "full_attention"]}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention", "full_attention"]}),
    ("exaone4", {"sliding_window": CONTEXT}),  # changes nothing, but full attention does not rotate
    ("internlm3", {"qkv_bias": MISSING, "bias": MISSING, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}),
    ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_theta": 800.0}}, "rope_scaling": MISSING}),
    ("smollm3", {"no_rope_layers": [1, 0, 1], "max_window_layers": 28}),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
    ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 50}),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
]
LENIENT = [
    *((kind, "num_key_value_heads", None) for kind in ("exaone4", "ministral", "mistral")),
    *((kind, "head_dim", None) for kind in ("qwen2", "gemma2", "phi3", "glm4", "ministral", "olmo2")),
    *((kind, "sliding_window", None) for kind in ("exaone4", "gemma2", "gemma3_text", "ministral", "olmo3")),
    ("ministral", "head_dim", MISSING),
    ("olmo3", "rope_parameters", {}),
]
"""What we read and transformers 5 does not: as transformers 4 did."""


def config_of(kind: str) -> dict[str, Any]:
    if kind in FILES:
        return {"model_type": kind, **SIZES, **FILES[kind]}
    family = kind if kind in KEYS and kind not in ("mistral", "qwen2") else "llama"
    config = config_json(shape_of(family, context=CONTEXT), family)
    return config | ({} if kind == family else {"model_type": kind})


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The configuration with another value of a setting, or of one within an object (a.b)."""
    outer, _, inner = key.partition(".")
    if inner:
        value = changed(
            dict(ROPE) if inner in ROPE and outer == "rope_scaling" else {"rope_type": "default"}, inner, value
        )
    config = {**config, outer: value}
    return {name: one for name, one in config.items() if one is not MISSING}


def outputs(config: dict[str, Any], folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of transformers' model of this config.json, with random weights, and of ours from the files it writes."""
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder, torch.device("cpu"), torch.float32)
    ids = torch.randint(0, theirs.config.vocab_size, (2, min(CONTEXT, model.config.max_positions)))
    with torch.no_grad():
        return theirs(ids).logits, model(ids)


@pytest.mark.parametrize("kind", KEYS)
def test_each_setting_with_each_odd_value_is_transformers_model_or_one_line(kind: str, tmp_path: Path) -> None:
    read, wrong = 0, []
    for key, value in itertools.product((*(() if kind in FILES else SHARED), *KEYS[kind]), ODD):
        config = changed(config_of(kind), key, value)
        try:
            ours = read_model_config(config, "config.json")
        except InputError as error:
            assert "\n" not in str(error) and str(error).startswith("config.json: ")
            continue
        sizes = (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_layers, ours.head_dim)
        if (
            max(sizes) > 256
            or (kind, key, value) in LENIENT
            or (key.endswith(("eps", "epsilon", "softcapping")) and type(value) is int)
        ):
            continue  # correct, and too large for a test; or more than transformers reads
        read += 1
        try:
            theirs, logits = outputs(config, tmp_path)
            if not torch.allclose(logits, theirs, rtol=1e-4, atol=1e-4, equal_nan=True):
                wrong.append(f"{key} = {value!r:.20}: another model")
        except Exception as error:
            wrong.append(f"{key} = {value!r:.20}: {str(error)[:200]}")
    assert not wrong
    assert read > 3


@pytest.mark.parametrize("kind", FILES)
def test_what_a_file_leaves_out_and_old_spellings_are_read_as_transformers_writes_them_out(kind: str) -> None:
    left_out = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} | LARGE
    for config in (config_of(kind), {"model_type": kind, **left_out}):
        written_out = AutoConfig.for_model(**deepcopy(config)).to_dict()
        assert read_model_config(config, "config.json") == read_model_config(written_out, "config.json")


@pytest.mark.parametrize(("kind", "change"), UNDERSTOOD)
def test_what_changes_nothing_or_is_supported_is_not_refused(kind: str, change: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(kind)
    for key, value in change.items():
        config = changed(config, key, value)
    theirs, logits = outputs(config, tmp_path)
    assert torch.allclose(logits, theirs, rtol=1e-4, atol=1e-4)


HYBRID = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("smollm3", {"use_sliding_window": False, "layer_types": HYBRID}, "layer_types has a window, but "),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers = [1] is not understood; understood: 0 or 1 each"),
        ("exaone4", {"sliding_window": None, "layer_types": HYBRID}, "layer_types has a sliding window, and "),
        ("internlm3", {"bias": False}, "qkv_bias = True and bias = False is not understood; they must be equal"),
        ("olmo3", {"rope_theta": 1e6}, "rope_theta = 1000000.0 is not understood; understood: 500000.0, 500000"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "the rope setting 'rope_theta' is not understood"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "the rope setting 'type' is not "),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not understood"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not understood"),
    ],
)
def test_settings_that_contradict_each_other_or_are_read_otherwise_are_refused(
    kind: str, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_model_config(config_of(kind) | change, "config.json")
    assert str(caught.value).startswith(f"config.json: {said}")


def test_mistral_without_a_window_has_transformers_window() -> None:
    config = config_of("mistral") | {"max_position_embeddings": 8192}
    assert read_model_config(config, "config.json").layer(0).window == 4096
    assert read_model_config(config | {"sliding_window": 8192}, "config.json").layer(0).window is None


@pytest.mark.parametrize("name", ["gpt_neox_japanese", "gemma3n", "mamba", None, ["llama"]])
def test_the_model_type_is_checked_before_its_sizes(name: Any) -> None:
    with pytest.raises(InputError, match=r"config\.json: model_type .* is not supported"):
        read_model_config({"model_type": name, "num_layers": "x", "vocab_size": {}, "hidden_size": [1]}, "config.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mixtral", "; the nearest that is: mistral (docs/models.md lists all)"),
        ("gemma3n", "; the nearest that is: gemma3_text (docs/models.md lists all)"),
        ("llama3", "; the nearest that is: llama (docs/models.md lists all)"),
        ("mamba", ", and none that is comes near: it has recurrent layers (docs/models.md lists all)"),
        ("bert", "; docs/models.md lists all that are"),
        (["llama"], "; docs/models.md lists all that are"),
    ],
)
def test_a_model_type_that_is_not_read_is_refused_with_the_nearest_that_is(name: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_model_config({"model_type": name}, "config.json")
    assert str(caught.value) == f"config.json: model_type {name!r} is not supported{said}"


def test_model_types_that_others_are_near_to_are_supported() -> None:
    assert {*NEAREST} <= {name for family in FAMILIES.values() for name in family.model_types}


def test_a_model_of_images_says_how_to_save_its_language_model(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}
    text = {**sizes, "head_dim": 8, "intermediate_size": 24, "vocab_size": 40, "max_position_embeddings": CONTEXT}
    vision = {**sizes, "num_hidden_layers": 1, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    theirs = Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "gemma-3-4b")
    with pytest.raises(InputError, match=r"model_type 'gemma3' .*; docs/models\.md says how to save its"):
        load_model(tmp_path / "gemma-3-4b", torch.device("cpu"), torch.float32)
    code = (Path(__file__).parents[2] / "docs" / "models.md").read_text().split("```python\n")[1].split("```")[0]
    with contextlib.chdir(tmp_path):
        exec(code)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = load_model(tmp_path / "gemma-3-4b-text", torch.device("cpu"), torch.float32)
        assert torch.allclose(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


# Heads and quantised weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("equal", [True, False])
def test_a_head_in_the_file_of_a_tied_model_is_compared_with_the_embedding(
    kind: str, equal: bool, tmp_path: Path
) -> None:
    config = config_of(kind) | {"tie_word_embeddings": True}
    outputs(config, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    embed = next(name for name in state if name.endswith(("wte.weight", "embed_tokens.weight", "embed_in.weight")))
    head = "embed_out.weight" if kind == "neox" else "lm_head.weight"
    state[head] = state[embed].clone() if equal else torch.randn_like(state[embed])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(10)[None]
    model = load_model(tmp_path, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
        assert torch.allclose(model(ids), theirs, rtol=1e-4, atol=1e-4)
    assert model.config.tie_embeddings is equal


QUANTIZED = [
    ({"load_in_8bit": True}, "8-bit bitsandbytes"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4-bit bitsandbytes"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "4-bit gptq"),
    ({"quant_method": "awq", "bits": 4}, "4-bit awq"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    ("yes", "an unknown method"),
]


@pytest.mark.parametrize(("quantization", "name"), QUANTIZED)
def test_a_quantised_model_is_refused_by_its_method(quantization: Any, name: str, tmp_path: Path) -> None:
    config = config_of("llama") | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))  # there are no weights: none are looked for
    with pytest.raises(InputError, match=rf"config\.json: quantised with {name}: use the unquantised model"):
        load_model(tmp_path, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_quantised_weights_without_a_word_about_it_are_refused_by_their_dtype(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    outputs(config_of(kind), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if "down_proj" in name or "mlp.c_proj" in name)
    save_file({**state, name: state[name].to(dtype)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} holds \w+ values: quantised weights; use the unquantised model"):
        load_model(tmp_path, torch.device("cpu"), torch.float32)


def test_the_causal_masks_of_old_files_are_no_quantised_weights(tmp_path: Path) -> None:
    outputs(config_of("gpt2"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT, dtype=torch.uint8).tril()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_model(tmp_path, torch.device("cpu"), torch.float32).config.family == "gpt2"
