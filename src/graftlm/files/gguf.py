"""A .gguf file -> a model folder in the Hugging Face layout: config, float32 weights, tokenizer.

The `gguf` package reads the container and dequantises; this module maps names, settings and the tokenizer.

- Every tensor of the file must be one of a plain Llama, in the shape that the file's settings imply. Any other
  architecture, tokenizer, RoPE scaling or tensor is an error that names it.
- Weights are streamed: a slice of rows is dequantised and written at a time, so the peak memory is a few tens of MB for
  a model of any size. torch is not needed.
- llama.cpp stores the rows of q and k in pairs (x0, x_half, x1, …) for its RoPE; `unpermute` restores their order. Rows
  are quantised separately, so this is done on the quantised bytes.
- The tokenizer is rebuilt from `tokenizer.ggml.pre`: "smollm" splits off single digits *before* the byte-level rule.
  transformers' own conversion drops that rule and encodes ½ differently; the file is right.

Letters: d width, H heads, K key/value heads, h head width, f feed-forward width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.errors import InputError
from graftlm.files.atomic import write_json, write_text
from graftlm.files.formats import write_safetensors

if TYPE_CHECKING:
    import gguf
    import numpy as np

ROWS = 2048  # rows dequantised at a time: 2048 x 576 values are 5 MB
BROKEN = (ValueError, IndexError, KeyError, OverflowError, TypeError, struct.error, EOFError)
CONTROL, USER_DEFINED = 3, 4  # token types of gguf
PRE_TOKENIZERS = ("smollm", "gpt-2")

# llama.cpp's names of a block's tensors -> Hugging Face's, with the shape in letters.
BLOCK = {
    "attn_norm": ("input_layernorm", "d"),
    "attn_q": ("self_attn.q_proj", "Hd"),
    "attn_k": ("self_attn.k_proj", "Kd"),
    "attn_v": ("self_attn.v_proj", "Kd"),
    "attn_output": ("self_attn.o_proj", "dH"),
    "ffn_norm": ("post_attention_layernorm", "d"),
    "ffn_gate": ("mlp.gate_proj", "fd"),
    "ffn_up": ("mlp.up_proj", "fd"),
    "ffn_down": ("mlp.down_proj", "df"),
}


def gguf_to_folder(path: Path, folder: Path) -> None:
    """Convert a Llama .gguf file into `folder`: config.json, model.safetensors (float32) and the tokenizer's files.

    Raises InputError for a corrupted or truncated file and for anything but a plain Llama.
    """
    with _one_line(path):
        reader = _open(path)
        config = _config(path, reader)
        _write_weights(path, reader, config, folder / "model.safetensors")
        _write_tokenizer(path, reader, folder)
    write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    write_json(folder / "generation_config.json", ids)


def gguf_config(path: Path) -> dict[str, Any]:
    """The config.json of a .gguf file, from its header. The weights are not read."""
    with _one_line(path):
        return _config(path, _open(path))


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn any error of reading a damaged file into one line."""
    try:
        yield
    except BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: corrupted or truncated gguf file ({reason[:120]}): fetch it again") from error


def _open(path: Path) -> gguf.GGUFReader:
    """Read the file's header. Unlike the package's reader, this one raises an error at the end of a truncated file."""
    from gguf import GGUFReader

    class BoundedReader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            part = super()._get(offset, dtype, count, override_order)
            if len(part) != int(count):
                raise ValueError(f"the file ends at byte {len(self.data)}, before the end of its header")
            return part

    try:
        reader = BoundedReader(path)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror or error}") from error
    if reader.byte_order != "I":
        raise InputError(f"{path}: is a big-endian gguf file: convert it to little-endian")
    return reader


def _value(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _require(path: Path, reader: gguf.GGUFReader, key: str) -> Any:
    value = _value(reader, key)
    if value is None:
        raise InputError(f"{path}: has no {key}: not a complete gguf file, fetch or convert it again")
    return value


# ------------------------------------------------------------------------------------------------------- config


def _config(path: Path, reader: gguf.GGUFReader) -> dict[str, Any]:
    """The file's settings with the keys of Hugging Face's LlamaConfig."""
    architecture = _require(path, reader, "general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: architecture {architecture!r} is not supported in a gguf file: only llama is")
    experts = _value(reader, "llama.expert_count", 0)
    scaling = _value(reader, "llama.rope.scaling.type", "none")
    if experts or scaling != "none" or _value(reader, "llama.rope.scale_linear", 1.0) != 1.0:
        what = f"{experts} experts" if experts else f"rope scaling {scaling!r}"
        raise InputError(f"{path}: {what} is not supported in a gguf file: only a plain llama is")
    width, heads = (int(_require(path, reader, f"llama.{key}")) for key in ("embedding_length", "attention.head_count"))
    head_dim = int(_value(reader, "llama.attention.key_length", width // max(heads, 1)))
    if int(_value(reader, "llama.rope.dimension_count", head_dim)) != head_dim:
        raise InputError(f"{path}: partial RoPE is not supported: only a plain llama is")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(_require(path, reader, "tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": int(_require(path, reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(_require(path, reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_value(reader, "llama.attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(_require(path, reader, "llama.context_length")),
        "rms_norm_eps": _shortest_decimal(_require(path, reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest_decimal(_value(reader, "llama.rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "torch_dtype": "float32",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := _value(reader, f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = int(token)
    ends = [_value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]  # llama.cpp's
    if len(ids := list(dict.fromkeys(int(token) for token in ends if token is not None))) > 1:
        config["eos_token_id"] = ids
    return config


def _shortest_decimal(value: float) -> float:
    """The shortest decimal of the same float32: 9.999999747378752e-06 in a file was written as 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


# ------------------------------------------------------------------------------------------------------ weights


def _names(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """llama.cpp's name -> (Hugging Face's name, shape) of every tensor of this config."""
    sides = {
        "d": config["hidden_size"],
        "H": config["num_attention_heads"] * config["head_dim"],
        "K": config["num_key_value_heads"] * config["head_dim"],
        "f": config["intermediate_size"],
        "V": config["vocab_size"],
    }
    letters = {"token_embd": ("model.embed_tokens", "Vd"), "output_norm": ("model.norm", "d")}
    if not config["tie_word_embeddings"]:
        letters["output"] = ("lm_head", "Vd")
    for layer in range(config["num_hidden_layers"]):
        for gguf_name, (hf_name, shape) in BLOCK.items():
            letters[f"blk.{layer}.{gguf_name}"] = (f"model.layers.{layer}.{hf_name}", shape)
    return {
        f"{gguf_name}.weight": (f"{hf_name}.weight", tuple(sides[side] for side in shape))
        for gguf_name, (hf_name, shape) in letters.items()
    }


def _write_weights(path: Path, reader: gguf.GGUFReader, config: dict[str, Any], target: Path) -> None:
    names, found = _names(config), {tensor.name: tensor for tensor in reader.tensors}
    if missing := [name for name in names if name not in found]:
        raise InputError(f"{path}: has no tensor {missing[0]} ({len(missing)} missing): fetch or convert it again")
    if extra := [name for name in found if name not in names]:
        raise InputError(f"{path}: tensor {extra[0]} is not part of a plain llama: this variant is not supported")
    entries = []
    for gguf_name, (hf_name, shape) in names.items():
        tensor = found[gguf_name]
        given = tuple(int(side) for side in reversed(tensor.shape.tolist()))
        if given != shape:
            raise InputError(
                f"{path}: tensor {gguf_name} has shape {given}, its settings imply {shape}: fetch it again"
            )
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        entries.append((hf_name, "F32", shape, _float32(path, tensor, heads.get(gguf_name.split(".")[-2]))))
    write_safetensors(target, entries)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q and k rows [heads * h, …]: (x0, x_half, x1, …) in each head -> (x0, x1, …)."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _float32(path: Path, tensor: gguf.ReaderTensor, heads: int | None) -> Iterator[memoryview]:
    """The values as float32 in row-major order, a slice of rows at a time."""
    import numpy as np
    from gguf import dequantize

    data = tensor.data if heads is None else unpermute(tensor.data, heads)
    for start in range(0, data.shape[0], ROWS):
        try:
            with np.errstate(all="ignore"):  # a corrupted scale gives values that are not finite: checked below
                values = dequantize(data[start : start + ROWS], tensor.tensor_type)
        except NotImplementedError as error:
            raise InputError(f"{path}: quantisation {tensor.tensor_type.name} is not supported") from error
        if not np.isfinite(values).all():
            raise InputError(f"{path}: tensor {tensor.name} holds infinite values: corrupted, fetch it again")
        yield np.ascontiguousarray(values, dtype="<f4").data.cast("B")


# ---------------------------------------------------------------------------------------------------- tokenizer


def _write_tokenizer(path: Path, reader: gguf.GGUFReader, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json from the vocabulary, merges and special tokens of the file."""
    kind, pre = _require(path, reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported: known are "
            f"{', '.join(PRE_TOKENIZERS)} (byte-level BPE): use the model's Hugging Face folder instead"
        )
    tokens = _require(path, reader, "tokenizer.ggml.tokens")
    special = {
        name: tokens[int(index)]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := _value(reader, f"tokenizer.ggml.{key}_token_id")) is not None
    }
    merges = [tuple(merge.split(" ")) for merge in _require(path, reader, "tokenizer.ggml.merges")]
    kinds = _value(reader, "tokenizer.ggml.token_type", [])
    bos = special.get("bos") if _value(reader, "tokenizer.ggml.add_bos_token", False) else None
    write_text(folder / "tokenizer.json", _tokenizer_json(tokens, merges, kinds, pre, bos))
    settings: dict[str, Any] = {f"{name}_token": token for name, token in special.items()}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(_require(path, reader, "llama.context_length")),
    }
    if (template := _value(reader, "tokenizer.chat_template")) is not None:
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings)


def _tokenizer_json(tokens: list[str], merges: list[Any], kinds: list[int], pre: str, bos: str | None) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError("its vocabulary contains a token twice")
    for merge in merges:
        if len(merge) != 2 or not {merge[0], merge[1], merge[0] + merge[1]} <= vocab.keys():
            raise ValueError(f"its merge {' '.join(merge)!r} is not made of its tokens")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_]) if pre == "smollm" else bytes_
    tokenizer.decoder = decoders.ByteLevel()
    for index, kind in enumerate(kinds):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(tokens[index], special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(tokens[index], special=False, normalized=False)])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer.to_str(pretty=True)
