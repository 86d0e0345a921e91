"""`graft chat`, and --chat auto: who is asked in the chat template, and what is said when nothing comes back."""

import fcntl
import io
import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import child_environment
from exchange.runs import run_of
from graftlm import cli, load
from graftlm.cli import chat as chat_module
from graftlm.inference.generate import generate_ids
from graftlm.inference.sampling import SamplingParams
from graftlm.models.config import to_file
from graftlm.text.chat import Chat
from tiny import byte_tokenizer, chat_model_folder, config_json, data_folder, model_folder, model_of

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}END{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TUNED, UNTUNED = TEMPLATE.replace("END", "<|endoftext|>"), TEMPLATE.replace("END", "<|turn|>")
CPU = ("--device=cpu", "--dtype=float32")
Command = Callable[..., tuple[int, Any, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that is tuned for chat, one with a template only, one without, and runs on the first."""
    folder = tmp_path_factory.mktemp("chat")
    chat_model_folder(folder / "tuned", TUNED)
    (folder / "untuned").mkdir()
    vocab = byte_tokenizer(folder / "untuned", "<|turn|>")  # ends turns, and is no end of the base's texts
    model = model_of("llama", 0, torch.float32, vocab=vocab)
    save_file(to_file(model.config, dict(model.named_parameters())), folder / "untuned" / "model.safetensors")
    (folder / "untuned" / "config.json").write_text(json.dumps(config_json(model.config, "llama")))
    (folder / "untuned" / "chat_template.jinja").write_text(UNTUNED)
    model_folder(folder / "plain")
    data_folder(folder / "data")
    for name in ("lora", "full"):
        run_of(folder / name, folder / "tuned", folder / "data", name)
    return folder


@pytest.fixture
def graft(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command next to the models, with text for its standard input: exit status, JSON object and the rest."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)

    def run(*words: str, typed: str = "") -> tuple[int, Any, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = cli.run([*words, *CPU, "--json"])
        out, notes = capsys.readouterr()
        return status, json.loads(out) if status == 0 else None, notes

    return run


def test_a_prompt_is_a_message_where_the_model_was_tuned_on_its_template(graft: Command) -> None:
    def texts(*words: str) -> list[str]:
        return graft("generate", "--prompt=hi", "--max_new_tokens=6", *words)[1]["texts"]

    for model, like in (("tuned", "on"), ("untuned", "off"), ("lora", "off"), ("full", "off")):
        asked = {flag: texts(f"--init_from={model}", f"--chat={flag}") for flag in ("auto", "on", "off")}
        assert asked["on"] != asked["off"] and asked["auto"] == asked[like], model
    assert texts("--init_from=plain") == texts("--init_from=plain", "--chat=off")
    run = json.loads(Path("lora", "run.json").read_text())
    Path("lora", "run.json").write_text(json.dumps({**run, "data": {**run["data"], "chat": True}}))
    assert texts("lora") == texts("lora", "--chat=on")
    Path("lora", "run.json").write_text(json.dumps(run))
    Path("task.jsonl").write_text('{"question": "One?", "answer": "1"}\n')
    for model, chat in (("tuned", True), ("untuned", False), ("lora", False)):
        shown = graft("prompt", f"--init_from={model}", "--task=task.jsonl", "--style=zero-shot", "--show_prompts")[1]
        assert shown["chat"] is chat


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--init_from=tuned", "--chat off, or --temperature 0.7"),
        ("--init_from=lora", "--chat on, or --temperature 0.7"),
        ("--init_from=plain", "try --temperature 0.7"),
    ],
)
def test_an_empty_answer_is_said(words: str, advice: str, graft: Command) -> None:
    status, result, notes = graft("generate", "--prompt=hi", "--logit_bias=0=100", words)
    assert (status, result["texts"]) == (0, [""])
    assert "nothing came back: the model ended the text at once" in notes and advice in notes
    assert "nothing came back" not in graft("generate", "--prompt=hi", "--max_new_tokens=2", words)[2]


def expected(model: str, messages: list[dict[str, str]], limit: int, **more: Any) -> str:
    """The answer to messages, computed anew from the first token."""
    loaded = load(model, device="cpu", dtype="float32", **more)
    chat = Chat(loaded.tokenizer)
    ids = chat.encode([(each["role"], each["content"]) for each in messages])
    params = SamplingParams(max_new_tokens=limit, stop_token_ids=chat.stop_tokens)
    return loaded.tokenizer.decode(generate_ids(loaded.model, [ids], params)[0], ids).strip()


def test_answers_are_those_to_all_messages_so_far(graft: Command) -> None:
    status, result, notes = graft(
        *("chat", "--init_from=tuned", "--max_new_tokens=3", "--system=S"), typed="one\n\ntwo\nthree\n/quit\nfour\n"
    )
    assert status == 0 and (result["model"], result["system"]) == ("base", "S")
    assert [each["content"] for each in result["messages"][::2]] == ["one", "two", "three"]
    system = [{"role": "system", "content": "S"}]
    for number in (1, 3, 5):
        before = [*system, *result["messages"][:number]]
        assert result["messages"][number]["content"] == expected("tuned", before, 3)
        assert result["messages"][number]["content"] in notes  # with --json on stderr
    _, again, _ = graft("chat", "--init_from=tuned", "--max_new_tokens=3", typed="/system S\none\n/reset\none\n")
    assert again["messages"] == result["messages"][:2]


def test_several_models_answer_in_turn_and_together(graft: Command) -> None:
    typed = "one\n/adapter full\ntwo\n/compare three\n/compare\n/adapter\n/adapter base\n/adapter nope\n"
    status, result, notes = graft("chat", "lora", "full", "--max_new_tokens=3", typed=typed)
    assert status == 0 and result["model"] == "base"
    messages = result["messages"]
    assert [each["content"] for each in messages[::2]] == ["one", "two", "three"]
    assert messages[1]["content"] == expected("lora", messages[:1], 3)
    for number in (3, 5):
        assert messages[number]["content"] == expected("full", messages[:number], 3)
    assert notes.count(f"[base]\n{expected('tuned', messages[:5], 3)}") == 2
    assert notes.count(f"[lora]\n{expected('lora', messages[:5], 3)}") == 2
    assert "base, lora, full (answers)" in notes and "unknown model 'nope': known are base, lora, full" in notes
    assert "lora was not tuned on conversations" in notes


def test_what_does_not_fit_or_goes_wrong_is_a_line_and_the_chat_continues(graft: Command) -> None:
    typed = f"{'x' * 30}\n{'y' * 30}\n{'z' * 200}\n/what\n/compare\nlast\n"
    status, result, notes = graft("chat", "--init_from=tuned", "--max_new_tokens=30", typed=typed)
    assert status == 0
    assert "the oldest 2 messages do not fit into 96 tokens and are left out" in notes
    assert "the prompt has 205 tokens" in notes and "shorten it" in notes
    assert "unknown command '/what': known are /system, /adapter, " in notes
    assert result["messages"][-2]["content"] == "last" and len(result["messages"]) <= 4
    _, result, notes = graft("chat", "--init_from=tuned", "--logit_bias=0=100", typed="/compare\nhi\n")
    assert "/compare: there is no message yet" in notes and "(nothing came back" in notes
    assert result["messages"] == []


def test_ctrl_c_ends_an_answer_and_not_the_chat(graft: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(SimpleQueue[Any]):
        count = 0

        def get(self, *_: Any, **__: Any) -> Any:
            Interrupted.count += 1
            if Interrupted.count == 3:
                raise KeyboardInterrupt
            return super().get()

    monkeypatch.setattr(chat_module, "SimpleQueue", Interrupted)
    status, result, notes = graft("chat", "--init_from=tuned", "--max_new_tokens=9", typed="one\ntwo\n")
    assert status == 0 and "(stopped)" in notes
    assert [each["content"] for each in result["messages"][::2]] == ["one", "two"]
    assert expected("tuned", result["messages"][:1], 2) == result["messages"][1]["content"]


def test_models_that_cannot_chat_are_refused(graft: Command) -> None:
    for words, line in (
        (["--init_from=plain"], "plain: has no chat template, so there is no chat: use graft generate"),
        (["lora", "--init_from=tuned"], "--init_from tuned: name runs or a model, not both: leave one of them out"),
        ([], "graft-run: holds no run (no run.json)"),
        (["tuned"], "tuned: holds no run (no run.json)"),
    ):
        status, _, notes = graft("chat", *words)
        assert status == 2 and notes.startswith(f"graft: {line}") and notes.count("\n") == 1


def test_five_turns_in_a_terminal(place: Path) -> None:
    master, terminal = pty.openpty()
    words = ["chat", "--init_from=tuned", "--max_new_tokens=3", *CPU]
    child = subprocess.Popen(
        [sys.executable, "-m", "graftlm", *words],
        cwd=place,
        env=child_environment(TERM="dumb"),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    screen = ""

    def read_until_prompt() -> str:
        nonlocal screen
        start, end = len(screen), time.monotonic() + 120
        while not screen[start:].endswith("> ") and time.monotonic() < end:
            screen += os.read(master, 4096).decode("utf-8", "replace")
        return screen[start:].replace("\r\n", "\n")

    assert "tuned answers; /help lists the commands" in read_until_prompt()
    messages: list[dict[str, str]] = []
    for text in ("one", "two", "three", "four", "five"):
        os.write(master, f"{text}\n".encode())
        messages.append({"role": "user", "content": text})
        answer = expected(str(place / "tuned"), messages, 3)
        assert answer in read_until_prompt()
        messages.append({"role": "assistant", "content": answer})
    os.write(master, b"\x03")
    assert "/quit or Ctrl-D ends the chat" in read_until_prompt()
    os.write(master, b"\x04")
    assert child.wait(60) == 0
    os.close(master)
