"""A gguf file's tensors, config and tokenizer against transformers opening the same file; and files that lie.

Small files are written here with the `gguf` package, so that every setting and every kind of damage can be tried.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize
from tokenizers import Tokenizer

from graftlm.errors import InputError
from graftlm.files.assets import model_folder
from graftlm.files.formats import load_safetensors, read_json, read_weights
from graftlm.files.gguf import gguf_to_folder
from graftlm.files.gguf_architectures import LLAMA
from graftlm.text.tokenizer import Tokenizer as TextTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = ["<s>", "</s>", "<|x|>", "a", "b", "c", "1", "2", "12", "ab", "abc", "Ġ", "Ġa"]
D, HEADS, KV, H, F, LAYERS = 32, 4, 2, 8, 64, 2

Change = Callable[[GGUFWriter, dict[str, Any]], None]


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own conversion, from its convert_hf_to_gguf.py: LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def tiny(path: Path, change: Change | None = None, seed: int = 0, **settings: Any) -> dict[str, np.ndarray]:
    """Write a two-layer llama to `path` and return its weights under Hugging Face's names, as float32."""
    rng = np.random.default_rng(seed)
    given = {"architecture": "llama", "pre": "gpt-2", "tied": True, "quantised": GGMLQuantizationType.Q8_0, **settings}
    writer = GGUFWriter(path, given["architecture"])
    for name, value in {
        "block_count": given.get("layers", LAYERS), "context_length": 128, "embedding_length": D,
        "feed_forward_length": given.get("feed_forward", F), "head_count": HEADS, "head_count_kv": KV,
        "layer_norm_rms_eps": 1e-5, "rope_freq_base": 5e5, "rope_dimension_count": H,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(given["pre"])
    writer.add_token_list(given.get("tokens", TOKENS))
    writer.add_token_types([3, 3, 4] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(given.get("merges", ["1 2", "a b", "ab c", "Ġ a"]))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    weights, kept = {}, {}
    sides = {"d": D, "HD": HEADS * H, "KD": KV * H, "f": F, "V": len(TOKENS)}
    shapes = {f"{theirs}": (target.name, target.shape) for theirs, target in LLAMA.outer.items()}
    if given["tied"]:
        del shapes["output"]
    for layer in range(LAYERS):
        for theirs, target in LLAMA.block.items():
            shapes[f"blk.{layer}.{theirs}"] = (f"model.layers.{layer}.{target.name}", target.shape)
    for theirs, (name, shape) in shapes.items():
        weight = rng.standard_normal([sides[side] for side in shape.split()], dtype=np.float32)
        kept[theirs] = weight
        if weight.ndim == 2:  # rounded first, so that what is quantised below is exactly this
            weight = dequantize(quantize(weight, given["quantised"]), given["quantised"]).astype(np.float32)
        weights[f"{name}.weight"] = weight
    if change is not None:
        change(writer, kept)
    for theirs, weight in kept.items():
        if "attn_q" in theirs or "attn_k" in theirs:
            weight = permuted(weight, HEADS if "attn_q" in theirs else KV)
        kind = given["quantised"] if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(f"{theirs}.weight", quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_comes_out_as_it_went_in(tmp_path: Path, kind: str, tied: bool) -> None:
    weights = tiny(tmp_path / "m.gguf", tied=tied, quantised=GGMLQuantizationType[kind])
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    found = load_safetensors(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(weights) and ("lm_head.weight" in found) is not tied
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and np.array_equal(tensor.numpy(), weights[name]), name


def test_the_settings_of_a_small_file(tmp_path: Path) -> None:
    tiny(tmp_path / "m.gguf", lambda writer, _: writer.add_chat_template("{{ messages }}"))
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json") == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(TOKENS), "hidden_size": D,
        "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "head_dim": H, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }  # fmt: skip
    assert read_json(tmp_path / "out" / "generation_config.json") == {"bos_token_id": 0, "eos_token_id": 1}
    settings = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert settings["chat_template"] == "{{ messages }}" and settings["eos_token"] == "</s>"


def test_every_end_of_text_of_a_file_is_read(tmp_path: Path) -> None:
    """llama.cpp's files name one as the end of text, others as the ends of a turn and of a message."""

    def ends(writer: GGUFWriter, _: Any) -> None:
        writer.add_eot_token_id(2)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 1)

    tiny(tmp_path / "m.gguf", ends)
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    read = TextTokenizer.from_folder(tmp_path / "out")
    assert read.eot == 1 and read.stop_tokens == {1, 2}
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [1, 2]


@pytest.mark.parametrize(("pre", "ids"), [("gpt-2", [8, 12, 9]), ("smollm", [6, 7, 12, 9])])
def test_the_pre_tokenizer_decides_whether_digits_merge(tmp_path: Path, pre: str, ids: list[int]) -> None:
    tiny(tmp_path / "m.gguf", pre=pre)
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("12 a").ids == ids[:-1] and tokenizer.encode("ab").ids == ids[-1:]
    assert tokenizer.encode("a<|x|></s>b").ids == [3, 2, 1, 4]  # a user's token and a control token, each whole


def test_a_token_before_each_text_is_kept(tmp_path: Path) -> None:
    tiny(tmp_path / "m.gguf", lambda writer, _: writer.add_add_bos_token(True))
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a").ids == [0, 3]


REFUSED: dict[str, tuple[Change | None, dict[str, Any], str]] = {
    "architecture": (None, {"architecture": "falcon"}, "architecture 'falcon' is not supported"),
    "image part": (None, {"architecture": "clip"}, "is the image part of a model .* language model"),
    "pre-tokenizer": (
        None,
        {"pre": "bloom"},
        "tokenizer 'gpt2' with pre-tokenizer 'bloom' is not supported .*llama-bpe",
    ),
    "missing": (lambda w, t: t.pop("blk.1.ffn_up"), {}, r"has no tensor blk\.1\.ffn_up\.weight \(1 missing\)"),
    "extra": (
        lambda w, t: t.update({"blk.0.attn_sinks": np.ones(4, np.float32)}),
        {},
        r"tensor blk\.0\.attn_sinks\.weight is not part of a plain llama",
    ),
    "frequencies": (
        lambda w, t: t.update({"rope_freqs": np.array([1, 2, 3, 4], np.float32)}),
        {},
        r"rope_freqs\.weight is not Llama 3\.1's",
    ),
    "setting": (
        lambda w, t: w.add_sliding_window(16),
        {},
        r"the setting llama\.attention\.sliding_window = 16 is not supported",
    ),
    "shape": (
        lambda w, t: t.update({"output_norm": np.ones(5, np.float32)}),
        {},
        r"has shape \(5,\), .* imply \(32,\)",
    ),
    "nan": (lambda w, t: t["blk.0.attn_norm"].fill(np.nan), {}, r"blk\.0\.attn_norm\.weight holds infinite values"),
    "experts": (lambda w, t: w.add_expert_count(8), {}, "8 experts are not supported"),
    "rope": (lambda w, t: w.add_string("llama.rope.scaling.type", "x"), {}, "RoPE scaling 'x' is not supported"),
    "head": (lambda w, t: w.add_key_length(16), {}, "RoPE of 8 of 16 dimensions is not supported"),
    "adapter": (lambda w, t: w.add_type("adapter"), {}, "is an adapter: name the file of its model"),
    "layers": (None, {"layers": 2**32 - 1}, "holds 20 tensors for 4294967295 layers"),
    "widths": (
        None,
        {"feed_forward": [F, 2 * F]},
        r"layers that differ in their feed_forward_length are not supported",
    ),
    "twice": (None, {"tokens": [*TOKENS[:-1], "a"]}, "contains a token twice"),
    "merge": (None, {"merges": ["a zzz"]}, "its merge 'a zzz' is not made of its tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_llama_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, settings, message = REFUSED[case]
    tiny(tmp_path / "m.gguf", change, **settings)
    with pytest.raises(InputError, match=message) as caught:
        gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    assert str(tmp_path / "m.gguf") in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_in_several_files_is_named_by_its_first(tmp_path: Path) -> None:
    whole, parts = tmp_path / "m.gguf", [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    weights = tiny(whole)
    reader = GGUFReader(whole)
    for number, part in enumerate(parts):
        writer = GGUFWriter(part, "llama")
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                kind, *of = field.types
                writer.add_key_value(field.name, field.contents(), kind, of[0] if of else None)
        writer.add_uint16("split.no", number)
        for tensor in reader.tensors[number::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    gguf_to_folder(parts[0], tmp_path / "out")
    found = load_safetensors(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: w.tolist() for n, w in weights.items()}
    with pytest.raises(
        InputError, match=r"m-00002-of-00002\.gguf: is a later file of a model: name the first, .*00001-of"
    ):
        gguf_to_folder(parts[1], tmp_path / "out")
    parts[1].unlink()
    with pytest.raises(InputError, match=r"the model has 2 files; m-00002-of-00002\.gguf is missing: fetch it too"):
        gguf_to_folder(parts[0], tmp_path / "out")


def test_a_truncated_file_is_one_line_wherever_it_ends(tmp_path: Path) -> None:
    tiny(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    cuts = {0, 1, 4, 8, 20, 24, 25, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 40)}
    for cut in sorted(cuts):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"cut\.gguf: corrupted or truncated gguf file") as caught:
            gguf_to_folder(tmp_path / "cut.gguf", tmp_path / "out")
        assert "\n" not in str(caught.value)


def test_flipped_bytes_are_an_error_or_harmless_but_never_a_traceback_or_a_hang(tmp_path: Path) -> None:
    tiny(tmp_path / "m.gguf")
    whole, rng, refused = (tmp_path / "m.gguf").read_bytes(), random.Random(1), 0
    header = whole.index(b"blk.1.ffn_down.weight") + 60
    start = time.process_time()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(header)] = rng.randrange(256)
        (tmp_path / "bad.gguf").write_bytes(damaged)
        try:
            gguf_to_folder(tmp_path / "bad.gguf", tmp_path / "out")
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50 and time.process_time() - start < 30


def test_an_array_that_says_it_is_endless_is_an_error_at_the_end_of_the_file(tmp_path: Path) -> None:
    tiny(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    length = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8  # after two types
    assert whole[length : length + 8] == len(TOKENS).to_bytes(8, "little")
    rest = whole[length + 8 :]  # then whole values, so that only the end of the file can stop the reader
    rest += bytes(-len(rest) % 4)
    (tmp_path / "bad.gguf").write_bytes(whole[:length] + (2**60).to_bytes(8, "little") + rest)
    with pytest.raises(InputError, match="the file ends at byte"):
        gguf_to_folder(tmp_path / "bad.gguf", tmp_path / "out")


def test_no_gguf_at_all(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"<html>" * 100)
    with pytest.raises(InputError, match="GGUF magic invalid"):
        gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(InputError, match="cannot read it"):
        gguf_to_folder(tmp_path / "none.gguf", tmp_path / "out")


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' reading of the same gguf file, which stands in the asset's folder beside its conversion."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder("smollm2-135m"), gguf_file=GGUF, dtype=torch.float32)


def test_smollm2_weights_equal_transformers_bit_for_bit(reference: Any) -> None:
    theirs, found = reference.state_dict(), read_weights(model_folder("smollm2-135m"))
    assert set(theirs) - set(found) == {"lm_head.weight"} and set(found) <= set(theirs)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, theirs[name]), name
    assert theirs["lm_head.weight"].data_ptr() == theirs["model.embed_tokens.weight"].data_ptr()


def test_smollm2_config_means_what_transformers_reads_in_the_file(reference: Any) -> None:
    from transformers import AutoConfig

    found, theirs = AutoConfig.from_pretrained(model_folder("smollm2-135m")).to_dict(), reference.config.to_dict()
    apart = {"rms_norm_eps", "architectures", "dtype"}  # and what names the file itself:
    apart |= {"_model_name_or_path", "_name_or_path", "quantization_config", "unk_token_id"}
    differ = {key for key in found.keys() | theirs.keys() if found.get(key) != theirs.get(key)} - apart
    assert {key: (found.get(key), theirs.get(key)) for key in differ} == {}
    assert np.float32(found["rms_norm_eps"]) == np.float32(theirs["rms_norm_eps"])
