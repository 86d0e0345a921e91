"""The comparison with transformers itself, on few texts; `same_tokens.py` is run by hand on real tokenizers."""

import json
from pathlib import Path

import pytest

from graftlm.files.assets import model_folder
from graftlm.text.chat import Chat
from graftlm.text.tokenizer import Tokenizer
from soak.same_tokens import main
from tiny import piece_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|role|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)
FEW = ["--texts", "60", "--talks", "8", "--scored", "0", "--served", "0"]


def test_a_few_texts_and_conversations_have_the_tokens_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piece_tokenizer(tmp_path, "legacy", ["Review: a film", "Sentiment: positive"], "<|role|>")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    folders = [str(model_folder("smollm2-135m")), str(tmp_path)]
    assert main([folders[1], "--texts", "3", "--talks", "2", "--scored", "0", "--served", "2"]) == 0
    assert "serve: 0 of 3 + 2 answers differ, 0 streams" in capsys.readouterr().out
    assert main([*folders, *FEW]) == 0
    assert capsys.readouterr().out.count(": 0 of 60 texts and 0 of 8 conversations differ") == 2
    with monkeypatch.context() as patched:
        patched.setattr(Chat, "_escaped", lambda self, content: content.strip() if content else content)
        assert main([folders[0], *FEW]) == 1
    assert "and 0 of 8 conversations differ" not in capsys.readouterr().out
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, prompt=(): self._backend.decode(list(ids)))
    assert main([folders[1], *FEW]) == 1
