"""Modelfiles for Ollama, read as Ollama's parser reads them, and their Go templates, run for conversations."""

import json
import re
from pathlib import Path

import pytest

from exchange.runs import run_of
from graftlm.config import ExportConfig
from graftlm.errors import InputError
from graftlm.exchange.export import export
from graftlm.exchange.load import ModelBundle, load
from graftlm.exchange.modelfile import Turns, modelfile
from graftlm.files.formats import read_json
from graftlm.text.chat import Chat, Message
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer
from real_tokenizers import tokenizer_folder
from tiny import chat_model_folder, data_folder, merging_tokenizer, model_folder

SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system, messages = messages[0].content, messages[1:] %}{% endif %}"
)
TEMPLATES = {
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "mistral": SYSTEM + "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.first and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
    "llama 2": SYSTEM + "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] "
    "{% if loop.first and system is defined %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
    "gemma 2": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "default system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe nice.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "braces and wide spaces": "{% for m in messages %}{{ '{{' }}{{ m.role }}\u3000{{ '}}' }}"
    "{{ m.content }}\u200b|{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{' }}assistant\u3000{{ '}}' }}{% endif %}",
}
"""Chat templates as models have them, shortened."""


class Modelfile:
    """Ollama's parser (parser/parser.go): states, one character at a time."""

    def __init__(self, text: str) -> None:
        self.commands: list[tuple[str, str]] = []
        state, name, value = "nil", "", ""
        for r in text:
            if state == "nil":
                if r not in " \t\r\n":
                    state, name, value = "name", r, ""
            elif state in ("name", "parameter"):
                if r in " \t" and name == "PARAMETER":
                    state, name = "parameter", ""
                elif r in " \t":
                    assert state == "parameter" or name in ("FROM", "TEMPLATE", "ADAPTER", "SYSTEM"), name
                    state = "value"
                else:
                    assert r.isalpha() or (state == "parameter" and r == "_"), r
                    name += r
            elif r in " \t\r\n" and r not in " \t" and self.unquoted(value.strip()) is not None:
                self.add(name, value)
                state = "nil"
            elif r.isprintable() or r in " \t\r\n":
                value += r
        if state == "value":
            self.add(name, value)
        assert state in ("nil", "value"), "the file ends within a command"

    def add(self, name: str, value: str) -> None:
        unquoted = self.unquoted(value.strip())
        assert unquoted is not None, "the file ends within a quoted text"
        self.commands.append((name, unquoted))

    @staticmethod
    def unquoted(text: str) -> str | None:
        """The text without its quotation marks; None: its end has not come yet."""
        for mark in ('"""', '"'):
            if text.startswith(mark):
                whole = len(text) >= 2 * len(mark) and text.endswith(mark)
                return text[len(mark) : -len(mark)] if whole else None
        return text

    def of(self, name: str) -> list[str]:
        """The values of a command or parameter."""
        return [value for key, value in self.commands if key == name]


def run_go(template: str, messages: list[Message]) -> str:
    """The Go template of a Modelfile, run: literals, range, if, else if, eq and fields."""
    tokens = re.split(r"(\{\{ .*? \}\})", template)
    system = "".join(content for role, content, *_ in messages if role == "system")

    def block(at: int, scope: dict[str, str], shown: bool) -> tuple[str, int, str]:
        out = ""
        while at < len(tokens):
            token, at = tokens[at], at + 1
            word = token[3:-3] if token.startswith("{{ ") else None
            if word is None:
                out += token if shown else ""
            elif word == "end" or word.startswith("else"):
                return out, at, word
            elif word.startswith('"'):
                out += json.loads(word) if shown else ""
            elif word.startswith("."):
                out += scope[word[1:]] if shown else ""
            elif word == "range .Messages":
                start = at
                for role, content, *_ in messages or [("", "")]:
                    part, at, _ = block(start, {"Role": role, "Content": content, "System": system}, shown)
                    out += part
            else:
                condition, done = word.removeprefix("if "), False
                while True:
                    holds = not done and true(condition, scope)
                    part, at, end = block(at, scope, shown and holds)
                    out, done = out + part, done or holds
                    if end == "end":
                        break
                    condition = end.removeprefix("else if ")
        return out, at, ""

    def true(condition: str, scope: dict[str, str]) -> bool:
        if match := re.fullmatch(r'eq \.Role "(\w+)"', condition):
            return scope["Role"] == match[1]
        assert condition == "not .System", condition
        return not scope["System"]

    return block(0, {"System": system}, True)[0]


def check_go_template(tokenizer: Tokenizer, has_system: bool = True) -> None:
    chat, before = Chat(tokenizer), tokenizer.decode_with_special(tokenizer.encode_prompt(""))
    template = Turns.of(chat, before).go_template()
    talk: list[Message] = [("user", "Hi {{ x }}"), ("assistant", "Yes?"), ("user", "2 + 2?")]
    for messages in (talk, talk[:1], *([[("system", "Be brief."), *talk]] if has_system else [])):
        assert run_go(template, messages) == chat.render(messages).removeprefix(before)
    text = f'FROM ./m\nTEMPLATE """{template}"""\n'
    assert run_go(Modelfile(text).of("TEMPLATE")[0], talk) == chat.render(talk).removeprefix(before)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3"])
def test_a_go_template_writes_what_the_chat_template_writes(name: str) -> None:
    tokenizer = Tokenizer.from_folder(tokenizer_folder(name))
    if name == "llama3_1":  # writes the date
        tokenizer.date = "2026-11-29"
    check_go_template(tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_templates_of_other_models(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(chat_model_folder(tmp_path / "m", TEMPLATES[name]))
    check_go_template(tokenizer, has_system=name != "gemma 2")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("[{{ loop.index }} {{ m.role }}] {{ m.content }}", "a turn in ways"),
        ("[{{ m.role }}] {{ m.content | upper }}", "messages as they are"),
    ],
)
def test_a_chat_template_without_a_go_template_is_one_line(message: str, line: str, tmp_path: Path) -> None:
    whole = "{% for m in messages %}" + message + "\n{% endfor %}[assistant]"
    tokenizer = Tokenizer.from_folder(chat_model_folder(tmp_path / "m", whole))
    with pytest.raises(InputError, match=f"^--format ollama: .*{line}.*: use --format gguf"):
        Turns.of(Chat(tokenizer), "")


def bundle(folder: Path, template: Template, chat: bool, accuracy: float | None) -> ModelBundle:
    """As a run that ended leaves it."""
    loaded = load(str(folder), device="cpu", dtype="float32")
    loaded.template = template
    loaded.run = {"data": {"chat": chat}, "results": {"best": {"val_accuracy": accuracy}}}
    return loaded


def test_a_modelfile_is_read_by_ollamas_parser(tmp_path: Path) -> None:
    folder = chat_model_folder(tmp_path / "m", TEMPLATES["zephyr"])
    quoted = Template("q", 'Say "a" of \n\n"{text}"', ("x", "y"))
    loaded = bundle(folder, quoted, chat=False, accuracy=0.5)
    loaded.tokenizer.stop_tokens |= {7}  # a token with a quotation mark
    stops = [loaded.tokenizer.token(index) for index in loaded.eos_token_ids]
    read = Modelfile(modelfile(loaded))
    assert read.of("FROM") == ["./model.gguf"] and read.of("temperature") == ["0"]
    assert read.of("TEMPLATE") == ['Say "a" of \n\n"{{ .Prompt }}"'] and read.of("stop") == stops
    assert len(stops) > 1

    texts = modelfile(bundle(folder, quoted, chat=False, accuracy=None))
    assert Modelfile(texts).of("TEMPLATE") == ["{{ .Prompt }}"], "a run on texts without labels has no prompt template"
    labels = bundle(folder, Template("q", "Good? {text}", ("x", "y"), chat=True), chat=True, accuracy=0.5)
    assert Modelfile(modelfile(labels)).of("TEMPLATE") == ["<|user|>\nGood? {{ .Prompt }}</s>\n<|assistant|>\n"]
    with pytest.raises(InputError, match="the template holds"):
        modelfile(bundle(folder, Template("q", '"""{text}', ("x", "y")), chat=False, accuracy=0.5))


def test_a_modelfile_for_labelled_texts_holds_the_prompt_template(tmp_path: Path) -> None:
    merging_tokenizer(model_folder(tmp_path / "m", "gpt2"))
    run = run_of(tmp_path / "run", tmp_path / "m", data_folder(tmp_path / "data"), "lora")
    result = export(ExportConfig(out_dir=str(run), to=str(tmp_path / "o"), format="ollama", quantization="f32"))
    assert result["llama_cpp"]["equal_texts"] == 8
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"model.gguf", "Modelfile", "export.json"}
    read = Modelfile((tmp_path / "o" / "Modelfile").read_text())
    template = read_json(run / "run.json")["template"]["text"]
    assert read.of("TEMPLATE") == [template.rstrip(" ").replace("{text}", "{{ .Prompt }}")]
    assert read.of("FROM") == ["./model.gguf"] and read.of("stop") == ["<|endoftext|>"]
