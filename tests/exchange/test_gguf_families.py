"""Runs of every family that llama.cpp has, as files for it: it gives the answers of the model that is read back.

Of each a LoRA on all linears: as an adapter, and merged, in float32 and in q8_0. The export itself compares tokens,
likely next tokens and greedy texts of a few prompts; here are ten prompts more, and the label scores of 100 reviews.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gguf_files import CASES, TOKENS, tiny_model
from graftlm.errors import InputError
from graftlm.exchange.gguf_export import GGUFExport, gguf_tokenizer
from graftlm.exchange.gguf_plan import GGUFPlan
from graftlm.exchange.huggingface import load_model
from graftlm.exchange.llama_cpp import LlamaCpp, compare, logprob_tolerance
from graftlm.exchange.load import ModelBundle, load
from graftlm.exchange.verify import ReferenceLogits
from graftlm.files.formats import read_json
from graftlm.files.gguf import gguf_to_folder
from graftlm.methods import LoRA
from graftlm.methods.base import mergeable_linears, trainable
from graftlm.models import CausalLM
from graftlm.models.config import FAMILIES, to_file
from graftlm.text.template import Template
from tiny import merging_tokenizer

WIDE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.3}
"""Rows of whole blocks, so that q8_0 is used."""
GPT2 = {"hidden_size": 32, "initializer_range": 0.2}
OTHER: dict[str, dict[str, Any]] = {
    **{"llama": {}, "gpt2": GPT2, "gpt_bigcode": GPT2, "phi": GPT2},
    "phi3": {**WIDE, "sliding_window": None},
    "gemma": {**WIDE, "initializer_range": 0.2},
    "gemma2": {**WIDE, "initializer_range": 0.1},
    **{key: {**WIDE, "sliding_window": 40} for key in ("mistral", "ministral")},
}
REFUSED = {
    "qwen3 biased": (WIDE, "qwen3: llama.cpp has no biases in it"),
    "exaone4 windows": (WIDE, "exaone4: llama.cpp has no sliding windows, unless it has 64 layers, in it"),
    "exaone4": ({}, "exaone4: llama.cpp has no heads of another width than the model's in it"),
    "olmo2": ({}, "olmo2: llama.cpp has no heads of another width than the model's in it"),
}
RUNS = [name for name in CASES if REFUSED.get(name, ({},))[0] != WIDE]
RUNS += ["internlm3", "mistral", "ministral", "seed_oss"]
NOT_IN_LLAMA_CPP = {"gpt_neo", "gptj", "opt", "helium"} | {"qwen3_moe", "gpt_oss"}
GELU = ("gemma", "gpt2", "gpt_bigcode", "gpt_neox", "phi", "starcoder2")
"""llama.cpp takes GELU from a table in float16."""
PROMPTS = [tuple(ids) for ids in torch.randint(1, 257, (10, 16), generator=torch.Generator().manual_seed(3)).tolist()]
LABELS = [TOKENS.index("n"), TOKENS.index("p")]


def a_run(folder: Path, name: str, settings: dict[str, Any]) -> ModelBundle:
    """A tiny model with LoRA on all linears; its base is also in `base.gguf`."""
    tiny_model(name, **settings).save_pretrained(folder)
    merging_tokenizer(folder)
    run = load(str(folder), device="cpu", dtype="float32")
    model, raw, tokenizer = run.model, read_json(folder / "config.json"), gguf_tokenizer(run)
    state = to_file(model.config, dict(model.named_parameters()))
    GGUFPlan(model.config, raw, state, tokenizer, name).write(folder / "base.gguf", state, "f32")
    method, rng = LoRA(rank=2, alpha=4.0, targets=model.config.roles), torch.Generator().manual_seed(1)
    method.install(model, rng)
    with torch.no_grad():
        for p in trainable(model).values():
            p.normal_(std=0.05, generator=rng)
    for linear in mergeable_linears(model):
        linear.merge_on_eval = False
    model.eval()
    run.template, run.run = Template("reviews", "{text}. Is it:", ("n", "p")), {"method": method.to_json(), "data": {}}
    return run


def read_back(path: Path, folder: Path) -> CausalLM:
    folder.mkdir()
    gguf_to_folder(path, folder)
    return load_model(folder, torch.device("cpu"), torch.float32)


def reviews(run: ModelBundle) -> list[tuple[int, ...]]:
    """The prompts of 100 reviews, of the same length."""
    assert run.template is not None
    texts = [f"{('bad', 'fun', 'fine')[i % 3]:4} {i * 37 % 100:02}" for i in range(100)]
    return [tuple(run.tokenizer.encode(run.template.prompt(text))) for text in texts]


@torch.no_grad()
def label_odds(model: CausalLM, prompts: list[tuple[int, ...]]) -> Tensor:
    """log p(second label) - log p(first)."""
    first, second = model(torch.tensor(prompts))[:, -1, LABELS].T
    return second - first


def label_odds_in_llama_cpp(llama: LlamaCpp, prompts: list[tuple[int, ...]]) -> Tensor:
    question = {"n_predict": 1, "n_probs": 2, "post_sampling_probs": True, "samplers": ["temperature"]}
    question |= {"temperature": 1.0, "logit_bias": [[label, 100.0] for label in LABELS]}
    found = [answer["completion_probabilities"][0]["top_probs"] for answer in llama.complete(prompts, question)]
    p = [{entry["id"]: entry["prob"] for entry in entries} for entries in found]
    first, second = torch.tensor([[of_label[label] for label in LABELS] for of_label in p]).log().T
    return second - first


def check(llama: LlamaCpp, model: CausalLM, run: ModelBundle, tolerance: float) -> None:
    """Compare ten greedy texts, which must be the same, and the label scores of 100 reviews."""
    prompts = reviews(run)
    ours, theirs = label_odds(model, prompts), label_odds_in_llama_cpp(llama, prompts)
    assert ours.std() > 8 * tolerance, "scores that do not differ prove nothing"
    assert (theirs - ours).abs().max() <= 2 * tolerance
    assert compare(llama, model, run, PROMPTS, tolerance).equal_texts == len(PROMPTS)


@pytest.mark.parametrize("name", RUNS)
def test_every_family_is_the_same_in_llama_cpp(name: str, tmp_path: Path) -> None:
    run = a_run(tmp_path / "m", name, OTHER.get(name, WIDE))
    longest = 40 if name in ("mistral", "ministral") else run.model.max_seq_len
    reference, said = ReferenceLogits(run, {"max_length": longest}), list[str]()
    tolerance = logprob_tolerance("f32", reference.largest) if name.startswith(GELU) else 1e-5

    export = GGUFExport(run, "gguf-lora", "f16")
    record = export.write(tmp_path / "lora.gguf", reference, {}, said.append)
    assert record["verification"]["max_abs_logit_diff"] <= 1e-4 and export.context == longest
    assert any("its context is one window, 40 tokens" in line for line in said) == (longest == 40)
    check(LlamaCpp(tmp_path / "m" / "base.gguf", 64, tmp_path / "lora.gguf"), run.model, run, tolerance)

    record = GGUFExport(run, "gguf", "f32").write(tmp_path / "m.gguf", reference, {}, said.append)
    assert record["verification"]["max_abs_logit_diff"] <= 1e-4
    check(LlamaCpp(tmp_path / "m.gguf", 64), read_back(tmp_path / "m.gguf", tmp_path / "back"), run, tolerance)

    record = GGUFExport(run, "gguf", "q8_0").write(tmp_path / "small.gguf", reference, {}, said.append)
    assert record["llama_cpp"]["max_abs_logprob_diff"] <= record["llama_cpp"]["tolerance"]
    assert record["verification"]["max_abs_logit_diff"] > 1e-4 or name == "llama"  # whose rows are no whole blocks


def test_no_family_is_forgotten() -> None:
    types = {kind.removesuffix("_text") for family in FAMILIES.values() for kind in family.model_types}
    assert types == {name.split()[0] for name in RUNS} | NOT_IN_LLAMA_CPP


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_llama_cpp_does_not_have_is_one_line(name: str, tmp_path: Path) -> None:
    settings, line = REFUSED[name]
    with pytest.raises(InputError, match="no .gguf file is written for this .*" + re.escape(f"({line}")):
        a_run(tmp_path / "m", name, settings)
