"""A chat-tuned run's exports end ten answers by themselves where ours end: in transformers, and in llama.cpp's chat.

Transformers has the export's own generation_config.json and tokenizer, llama.cpp the file's own chat template and ends.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from graftlm.config import ExportConfig, TrainConfig
from graftlm.exchange.export import export
from graftlm.exchange.gguf_export import gguf_tokenizer
from graftlm.exchange.gguf_plan import GGUFPlan
from graftlm.exchange.llama_cpp import LlamaCpp
from graftlm.exchange.load import load
from graftlm.files.formats import read_json
from graftlm.inference.generate import generate
from graftlm.models.config import to_file
from graftlm.text.chat import Chat
from graftlm.training.train import train
from tiny import config_json, merging_tokenizer, model_of

TEMPLATE = """{% for m in messages %}<|turn|>{{ m.role }}
{{ m.content }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""
QUESTIONS = [f"Hi {n}" for n in range(10)]
ANSWERS = ("Ahoy", "Yes, sir!")
MOST = 40
"""Tokens of an answer at most: one that does not end is longer."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned to answer, on a base that ends texts at another token than the one that ends turns."""
    folder = tmp_path_factory.mktemp("chat exports")
    base = folder / "base"
    base.mkdir()
    vocab = merging_tokenizer(base, "<|turn|>", "<|eot|>")
    model = model_of("llama", 0, torch.float32, vocab=vocab)
    (base / "config.json").write_text(json.dumps(config_json(model.config, "llama")))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}))
    tensors = to_file(model.config, dict(model.named_parameters()))
    save_file({n: t.detach().clone() for n, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    talks = [[("user", f"Hi {n}"), ("assistant", ANSWERS[n % 2])] for n in range(60)]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]} for talk in talks]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(
        TrainConfig(
            init_from=str(base),
            data=str(folder / "talks.jsonl"),
            out_dir=str(folder / "run"),
            rank=8,
            targets="q,k,v,o,up,gate,down",
            alpha=16.0,
            lr=1e-2,
            max_iters=150,
            eval_every=150,
            device="cpu",
            dtype="float32",
            kernels="torch",
        )
    )
    return folder / "run"


def exported(run: Path, to: Path, form: Any) -> Path:
    export(ExportConfig(out_dir=str(run), to=str(to), format=form))
    return to


def in_llama_cpp(path: Path, lora: Path | None = None) -> list[tuple[str, str]]:
    """Answers of llama.cpp's chat, and why each ended."""
    llama, found = LlamaCpp(path, 90, lora), []
    for question in QUESTIONS:
        asked = {"messages": [{"role": "user", "content": question}], "max_tokens": MOST, "temperature": 0.0}
        [choice] = llama.ask("v1/chat/completions", asked)["choices"]
        found.append((choice["message"]["content"], choice["finish_reason"]))
    return found


def in_transformers(folder: Path) -> list[str]:
    """Answers with the tokens that end them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for question in QUESTIONS:
        asked = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        new = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)[0][inputs.input_ids.shape[1] :]
        found.append(tokenizer.decode(new))
    return found


def test_ten_answers_end_by_themselves_where_ours_do(run: Path, tmp_path: Path) -> None:
    ours = load("resume", run, device="cpu", dtype="float32")
    answers = generate(ours.model, ours.tokenizer, QUESTIONS, max_new_tokens=MOST, chat=Chat(ours.tokenizer))
    assert {*answers} == {*ANSWERS}, "a model that learned nothing proves nothing"
    assert in_transformers(exported(run, tmp_path / "merged", "merged")) == [f"{answer}<|eot|>" for answer in answers]

    stopped = [(answer, "stop") for answer in answers]
    assert in_llama_cpp(exported(run, tmp_path / "m.gguf", "gguf")) == stopped
    assert in_llama_cpp(exported(run, tmp_path / "ollama", "ollama") / "model.gguf") == stopped
    base = load(str(run.parent / "base"), device="cpu", dtype="float32")
    config, state = base.model.config, to_file(base.model.config, dict(base.model.named_parameters()))
    plan = GGUFPlan(config, read_json(base.folder / "config.json"), state, gguf_tokenizer(ours), "base")
    plan.write(tmp_path / "base.gguf", state, "f32")
    adapter = exported(run, tmp_path / "lora.gguf", "gguf-lora")
    assert in_llama_cpp(tmp_path / "base.gguf", adapter) == stopped
    assert in_llama_cpp(tmp_path / "base.gguf") != stopped
