"""The files' names <-> ours: config.json to a Shape, a file's tensors to our parameters, and back.

The only place that knows what checkpoints call things. GPT-2's files hold each linear transposed and q, k, v fused
into one c_attn [d, 3d]; ours are plain linears [out, in], one a role. A setting that changes the arithmetic and is
not understood is an error, never ignored.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.models.base import Shape

LLAMA_FAMILY = ("llama", "mistral", "qwen2")
_GPT2_LINEARS = {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
_LLAMA_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_GPT2_NORMS = {"norm1": "ln_1", "norm2": "ln_2"}
_LLAMA_NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
_SIZES = (
    *("n_embd", "n_head", "n_layer", "n_inner", "n_positions", "vocab_size", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "head_dim"),
)
MOST_LAYERS, LARGEST = 10_000, 2**24
"""Sizes beyond these are no model's: a few bytes of config.json would ask for all memory there is."""
_MAYBE_NULL = ("n_inner", "num_key_value_heads", "head_dim")
# Buffers that old files carry: causal masks and rotary frequencies, computed here.
_BUFFERS = re.compile(r"(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


def module_of(role: str) -> str:
    """Our module that holds the role's linear, inside a block: `attn.q`, `mlp.up`."""
    return f"{'attn' if role in 'qkvo' else 'mlp'}.{role}"


def file_module(family: str, role: str) -> str:
    """The file's module that holds the role's linear, inside a layer: `self_attn.q_proj`, `attn.c_attn`."""
    if family == "llama":
        return _LLAMA_LINEARS[role]
    return _GPT2_LINEARS.get(role, "attn.c_attn")


def layer_prefix(family: str) -> str:
    """What stands before a layer's number in transformers' names."""
    return "model.layers." if family == "llama" else "transformer.h."


# ---- config.json -> Shape ------------------------------------------------------------------------------------------


def read_shape(config: Mapping[str, Any], where: str) -> Shape:
    """The shape a config.json describes; `where` names the file in errors."""
    if not isinstance(config, dict):
        raise InputError(f"{where}: is no JSON object: fetch it again")
    kind = config.get("model_type")
    _check_sizes(config, where)
    try:
        if kind == "gpt2":
            return _gpt2_shape(config, where)
        if kind in LLAMA_FAMILY:
            return _llama_shape(config, where)
    except KeyError as e:
        raise InputError(f"{where}: the setting {e.args[0]!r} is missing") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InputError(f"{where}: a setting has a value that it cannot have ({e}): fetch the file again") from None
    raise InputError(f"{where}: model_type {kind!r} is not supported; supported are gpt2, {', '.join(LLAMA_FAMILY)}")


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Every size that is given is a whole number above 0 (null where a default takes its place)."""
    for key in _SIZES:
        value = config.get(key)
        if not (value is None and (key not in config or key in _MAYBE_NULL)) and (type(value) is not int or value < 1):
            raise InputError(f"{where}: {key} = {value!r} is no size; it must be a whole number above 0")
        if value is not None and value > (MOST_LAYERS if key in ("n_layer", "num_hidden_layers") else LARGEST):
            raise InputError(f"{where}: {key} = {value} is more than any model has: fetch the file again")


def _only(config: Mapping[str, Any], where: str, **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise InputError(
                f"{where}: {key} = {config[key]!r} is not understood; understood: {', '.join(map(repr, values))}"
            )


def _gpt2_shape(config: Mapping[str, Any], where: str) -> Shape:
    _only(
        config,
        where,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    d, heads = config["n_embd"], config["n_head"]
    if d % heads:
        raise InputError(f"{where}: n_embd {d} is not a multiple of n_head {heads}")
    return Shape(
        family="gpt2",
        layers=config["n_layer"],
        heads=heads,
        kv_heads=heads,
        d_model=d,
        head_dim=d // heads,
        d_ff=config.get("n_inner") or 4 * d,
        vocab=config["vocab_size"],
        context=config.get("n_positions", config.get("n_ctx", 1024)),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tied=config.get("tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _llama_shape(config: Mapping[str, Any], where: str) -> Shape:
    _only(config, where, hidden_act=("silu",), pretraining_tp=(1,), use_sliding_window=(False, None))
    context = config["max_position_embeddings"]
    window = config.get("sliding_window")
    if window is not None and window < context and config.get("use_sliding_window") is not False:
        raise InputError(f"{where}: sliding_window = {window} below the context of {context} is not supported")
    rope = config.get("rope_parameters") or {}
    scaling = dict(config.get("rope_scaling") or rope)
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or rope.get("rope_theta") or 10000.0
    understood = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    }
    if kind not in understood:
        raise InputError(f"{where}: rope_type = {kind!r} is not understood; understood: {', '.join(understood)}")
    if strange := sorted(set(scaling) - set(understood[kind])):
        raise InputError(f"{where}: the rope setting {strange[0]!r} is not understood for rope_type {kind!r}")
    heads, d = config["num_attention_heads"], config["hidden_size"]
    biased = config["model_type"] == "qwen2" or bool(config.get("attention_bias", False))
    return Shape(
        family="llama",
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        d_model=d,
        head_dim=config.get("head_dim") or d // heads,
        d_ff=config["intermediate_size"],
        vocab=config["vocab_size"],
        context=context,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=biased,
        out_bias=biased and config["model_type"] != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        rope_theta=float(theta),
        rope_scaling=() if kind == "default" else tuple(sorted([("rope_type", kind), *scaling.items()])),
    )


# ---- Shape -> config.json: the biases ------------------------------------------------------------------------------

# Settings of Mistral and Qwen2 that Llama lacks; `read_shape` has seen to it that they change nothing.
_NOT_LLAMAS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


def with_biases(config: Mapping[str, Any], shape: Shape, where: str) -> dict[str, Any]:
    """The base's config.json, changed to say the biases that `shape` has: the inverse of how `read_shape` reads them.

    Mistral's and Qwen2's configs cannot say that every linear has one; Llama's can, and is the same model otherwise.
    """
    base = read_shape(config, where)
    if base == shape:
        return dict(config)
    same = replace(base, qkv_bias=shape.qkv_bias, out_bias=shape.out_bias, mlp_bias=shape.mlp_bias)
    assert shape == same and shape.family == "llama" and shape.qkv_bias == shape.out_bias
    return {
        **{key: value for key, value in config.items() if key not in _NOT_LLAMAS},
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": shape.qkv_bias,
        "mlp_bias": shape.mlp_bias,
        # The defaults of the three differ.
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
    }


# ---- tensors: file -> ours -----------------------------------------------------------------------------------------


def file_names(shape: Shape) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Our parameter name -> (the file's tensor name, how to read ours out of it), for every parameter of the shape."""
    return dict(_gpt2_names(shape) if shape.family == "gpt2" else _llama_names(shape))


def _same(t: Tensor) -> Tensor:
    return t


def _transposed(t: Tensor) -> Tensor:
    return t.t()


def _third(i: int) -> Callable[[Tensor], Tensor]:
    """q, k or v out of the fused c_attn: weight [d, 3d] -> [d, d] (out, in); bias [3d] -> [d]."""

    def read(t: Tensor) -> Tensor:
        return t.chunk(3, dim=-1)[i].t() if t.dim() == 2 else t.chunk(3, dim=-1)[i]

    return read


def _gpt2_names(shape: Shape) -> Iterator[tuple[str, tuple[str, Callable[[Tensor], Tensor]]]]:
    yield "embed.weight", ("transformer.wte.weight", _same)
    yield "positions.weight", ("transformer.wpe.weight", _same)
    for i in range(shape.layers):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        for norm, name in _GPT2_NORMS.items():
            for kind in ("weight", "bias"):
                yield f"{ours}.{norm}.{kind}", (f"{theirs}.{name}.{kind}", _same)
        for part, role in enumerate("qkv"):
            for kind in ("weight", "bias"):
                yield f"{ours}.attn.{role}.{kind}", (f"{theirs}.attn.c_attn.{kind}", _third(part))
        for role, name in _GPT2_LINEARS.items():
            yield f"{ours}.{module_of(role)}.weight", (f"{theirs}.{name}.weight", _transposed)
            yield f"{ours}.{module_of(role)}.bias", (f"{theirs}.{name}.bias", _same)
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", (f"transformer.ln_f.{kind}", _same)
    if not shape.tied:
        yield "head.weight", ("lm_head.weight", _same)


def _llama_names(shape: Shape) -> Iterator[tuple[str, tuple[str, Callable[[Tensor], Tensor]]]]:
    yield "embed.weight", ("model.embed_tokens.weight", _same)
    for i in range(shape.layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for norm, name in _LLAMA_NORMS.items():
            yield f"{ours}.{norm}.weight", (f"{theirs}.{name}.weight", _same)
        for role, name in _LLAMA_LINEARS.items():
            yield f"{ours}.{module_of(role)}.weight", (f"{theirs}.{name}.weight", _same)
            biased = shape.qkv_bias if role in "qkv" else shape.out_bias if role == "o" else shape.mlp_bias
            if biased:
                yield f"{ours}.{module_of(role)}.bias", (f"{theirs}.{name}.bias", _same)
    yield "norm.weight", ("model.norm.weight", _same)
    if not shape.tied:
        yield "head.weight", ("lm_head.weight", _same)


def stored_name(name: str, stored: Iterable[str]) -> str | None:
    """The file's tensor called `name`, with or without transformers' outer prefix (GPT-2's on the hub lack it)."""
    bare = name.removeprefix("transformer.").removeprefix("model.")
    return next((n for n in (name, bare) if n in stored), None)


def check_names(shape: Shape, stored: Iterable[str], where: str) -> None:
    """Every tensor is there, and no other; else an error that names the first."""
    present = set(stored)
    expected = {stored_name(theirs, present) or theirs for theirs, _ in file_names(shape).values()}
    if missing := sorted(expected - present):
        raise InputError(f"{where}: the tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)")
    spare = {n for n in present - expected if not _BUFFERS.search(n) and not (shape.tied and n == "lm_head.weight")}
    if spare:
        raise InputError(f"{where}: the tensor {min(spare)} belongs to no part of this {shape.family} model")


# ---- tensors: ours -> file -----------------------------------------------------------------------------------------


def to_file(shape: Shape, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All our parameters -> the tensors of a Hugging Face folder, q, k and v fused again for GPT-2."""
    out: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor]] = {}
    for name, (theirs, read) in file_names(shape).items():
        tensor = ours[name]
        if ".c_attn." in theirs:
            thirds.setdefault(theirs, []).append(tensor.t() if tensor.dim() == 2 else tensor)
        else:
            out[theirs] = (tensor.t() if read is _transposed else tensor).contiguous()
    out |= {theirs: torch.cat(parts, dim=-1).contiguous() for theirs, parts in thirds.items()}
    return out
