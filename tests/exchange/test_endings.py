"""What a run learned about ending is in its artefacts: transformers stops where `graft generate` stops."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from graftlm.config import ExportConfig, ImportConfig, TrainConfig
from graftlm.exchange.export import export
from graftlm.exchange.import_adapter import import_adapter
from graftlm.exchange.load import learned_chat, load
from graftlm.files.formats import read_json
from graftlm.inference.generate import generate
from graftlm.models.config import to_file
from graftlm.text.chat import Chat
from graftlm.training.train import train
from tiny import TEMPLATE, byte_tokenizer, config_json, data_folder, model_of

TEMPLATES = {
    "chat": "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}",
    "chat with eos": "{{ eos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}",
}
GENERATION = {"eos_token_id": 0, "top_k": 7}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases that end texts with token 0 and turns with <|eot|>, conversations and reviews."""
    folder = tmp_path_factory.mktemp("endings")
    for name, template in TEMPLATES.items():
        base = folder / name
        base.mkdir()
        vocab = byte_tokenizer(base, "<|turn|>", "<|eot|>")
        model = model_of("llama", 0, torch.float32, vocab=vocab)
        (base / "config.json").write_text(json.dumps(config_json(model.config, "llama")))
        (base / "generation_config.json").write_text(json.dumps(GENERATION))
        eos = {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}
        question = "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
        settings = {"eos_token": eos, "chat_template": template + question}
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
        (base / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
        tensors = to_file(model.config, dict(model.named_parameters()))
        save_file({n: t.detach().clone() for n, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    talks = [[{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Ahoy"}] for n in range(60)]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    data_folder(folder / "reviews")
    return folder


def a_run(place: Path, base: str, data: str, steps: int = 2, **settings: Any) -> Path:
    run = place / f"run {base} {data} {steps} {settings.get('rank')}"
    if not run.exists():
        config = {"lr": 5e-3, "max_iters": steps, "eval_every": steps, "dtype": "float32", "device": "cpu", **settings}
        config |= {"init_from": str(place / base), "data": str(place / data), "out_dir": str(run), "template": TEMPLATE}
        train(TrainConfig(kernels="torch", **config))
    return run


def exported(run: Path, to: Path, **settings: Any) -> dict[str, Any]:
    """The generation_config.json of an export."""
    export(ExportConfig(out_dir=str(run), to=str(to), **settings))
    return read_json(to / "generation_config.json")


def test_transformers_ends_an_answer_where_generate_does(place: Path, tmp_path: Path) -> None:
    run = a_run(place, "chat", "talks.jsonl", steps=100, rank=0)
    assert exported(run, tmp_path / "out") == {"eos_token_id": [258, 0], "top_k": 7}
    ours = load("resume", run, device="cpu", dtype="float32")
    [answer] = generate(ours.model, ours.tokenizer, ["Hi 5"], max_new_tokens=30, chat=Chat(ours.tokenizer))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "Hi 5"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0][inputs.input_ids.shape[1] :]
    assert answer == "Ahoy" and tokenizer.decode(new) == "Ahoy<|eot|>"
    assert tokenizer.eos_token == "<|eot|>" and tokenizer.eos_token_id == 258
    assert ours.tokenizer.stop_tokens == {258, 0}  # plain text ends there too
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "It ends its answers with `<|eot|>`",
        "`eos_token_id` is [258, 0]",
        "apply_chat_template",
        "conversations",
    ):
        assert part in card, part
    assert "Review:" not in card


@pytest.mark.parametrize("base", TEMPLATES)
def test_a_checkpoint_of_full_fine_tuning_says_what_its_export_says(base: str, place: Path, tmp_path: Path) -> None:
    run = a_run(place, base, "talks.jsonl", steps=100 if base == "chat" else 2, rank=0)
    assert exported(run, tmp_path / "out")["eos_token_id"] == [258, 0]
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        assert (run / "best" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_only_what_must_change_changes(place: Path, tmp_path: Path) -> None:
    """Without conversations nothing does; and a template that writes eos_token would write another one."""
    base = place / "chat"
    assert exported(a_run(place, "chat", "reviews", rank=2), tmp_path / "plain", format="merged") == GENERATION
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (base / name).read_bytes()
    assert "It ends its answers with `<|endoftext|>`" in (tmp_path / "plain" / "README.md").read_text()
    run = a_run(place, "chat with eos", "talks.jsonl", rank=2)
    assert exported(run, tmp_path / "talks", format="merged")["eos_token_id"] == [258, 0]
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "talks" / name).read_bytes() == (place / "chat with eos" / name).read_bytes()


def test_an_adapters_folder_says_it_and_so_does_its_import(place: Path, tmp_path: Path) -> None:
    run = a_run(place, "chat", "talks.jsonl", rank=2)
    assert exported(run, tmp_path / "adapter") == {"eos_token_id": [258, 0], "top_k": 7}
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "adapter").eos_token_id == [258, 0]
    import_adapter(ImportConfig(folder=str(tmp_path / "adapter"), out_dir=str(tmp_path / "run"), template=TEMPLATE))
    assert load("resume", tmp_path / "run", device="cpu", dtype="float32").learned_chat
    assert exported(tmp_path / "run", tmp_path / "merged", format="merged")["eos_token_id"] == [258, 0]
    record = read_json(tmp_path / "adapter" / "export.json")
    assert (record["eos_token_id"], record["ends_with"], record["data"]["chat"]) == ([258, 0], "<|eot|>", True)


def test_an_adapter_of_other_origin_is_recognised_by_its_own_tokenizer(place: Path, tmp_path: Path) -> None:
    """As TRL writes it: next to the adapter lies the tokenizer, whose eos_token ends turns."""
    tokenizer = load(str(place / "chat"), device="cpu", dtype="float32").tokenizer
    assert not learned_chat(tmp_path, tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "chat" / name, tmp_path)
    assert not learned_chat(tmp_path, tokenizer)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    assert learned_chat(tmp_path, tokenizer)
