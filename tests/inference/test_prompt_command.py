"""`graft prompt` through the real command on a tiny model: keys, orders and seeds, exact prompts, and each refusal."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm import cli
from graftlm.config import PromptConfig
from graftlm.inference.metrics import wilson
from graftlm.inference.prompting import (
    PromptingResult,
    PromptingRun,
    QuestionResult,
    distinct_runs,
    prediction_rows,
    summary,
)
from tiny import TEMPLATE, byte_tokenizer, data_folder, model_folder

TASK = """
instruction = "Add."
demonstrations = [
  {question = "1 + 1", reasoning = "One and one.", answer = "2"},
  {question = "1 + 2", reasoning = "One and two.", answer = "3"},
  {question = "2 + 1", reasoning = "Two and one.", answer = "3"},
]
questions = [{question = "2 + 2", answer = "4"}, {question = "0 + 1", answer = "1"}]
"""
MOODS = """
labels = ["bad", "good"]
demonstrations = [{question = "fun", answer = "good"}, {question = "dull", answer = "bad"}]
questions = [{question = "fine", answer = "good"}, {question = "weak", answer = "bad"}]
"""
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = model_folder(tmp_path_factory.mktemp("models") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 900}))
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)
    Path("sums.toml").write_text(TASK)
    Path("moods.toml").write_text(MOODS)
    torch.set_num_threads(1)


@pytest.fixture
def prompt(model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def run(*words: str, task: str = "sums.toml", json_: bool = True) -> Any:
        capsys.readouterr()
        base = ["prompt", f"--init_from={model}", f"--task={task}", "--device=cpu", "--dtype=float32", "--shots=2"]
        status = cli.run([*base, *words, *["--json"] * json_])
        out, err = capsys.readouterr()
        if status:
            assert status == 2 and out == "" and err.startswith("graft: ") and err.count("\n") == 1, err
            return err.removeprefix("graft: ").rstrip("\n")
        return json.loads(out) if json_ else out

    return run


def test_the_json_object_has_the_promised_keys(prompt: Callable[..., Any]) -> None:
    result = prompt("--limit=0", "--max_new_tokens=6")
    assert list(result["styles"]) == ["few-shot", "few-shot-cot", "zero-shot-cot"]
    for style in result["styles"].values():
        keys = (
            "n accuracy ci_low ci_high unparsed_rate prompt_tokens shared_prompt_tokens new_tokens seconds_per_answer "
        )
        assert set(style) == {*keys.split(), "mean", "min", "max", "runs"}
        assert style["n"] == 2 and 0 <= style["ci_low"] <= style["accuracy"] <= style["ci_high"] <= 1
    assert len(result["answers"]) == 6 and result["chat"] is False
    few = result["answers"][0]
    assert few["prompt"] == "Add.\n\nQ: 1 + 1\nA: 2\n\nQ: 1 + 2\nA: 3\n\nQ: 2 + 2\nA:"
    assert result["styles"]["few-shot"]["prompt_tokens"] == len(few["prompt"])


def test_every_order_is_run_and_reported(prompt: Callable[..., Any]) -> None:
    style = prompt("--limit=0", "--style=few-shot", "--num_permutations=3", "--predictions=p.jsonl", task="moods.toml")
    few = style["styles"]["few-shot"]
    assert [(run["seed"], run["order"]) for run in few["runs"]] == [(0, 0), (0, 1), (0, 2)]
    every = [run["accuracy"] for run in few["runs"]]
    assert (few["mean"], few["min"], few["max"]) == (pytest.approx(sum(every) / 3), min(every), max(every))
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().split("\n") if line]
    assert [(row["order"], row["question"]) for row in rows] == [(o, q) for o in range(3) for q in ("fine", "weak")]
    assert all(row["prediction"] in ("bad", "good") for row in rows)


def test_what_cannot_differ_is_not_run_again() -> None:
    def runs(style: Any, **flags: Any) -> list[tuple[int, int]]:
        config = PromptConfig(seed=5, **flags)
        return [(run.seed, run.permutation) for run in distinct_runs(style, config)]

    assert runs("few-shot", seeds=3, num_permutations=2) == [(5, 0), (5, 1)]
    both = [(5, 0), (5, 1), (6, 0), (6, 1)]
    assert runs("few-shot", demo_selection="random", seeds=2, num_permutations=2) == both
    assert runs("zero-shot-cot", seeds=3, num_permutations=2) == [(5, 0)]
    assert runs("zero-shot-cot", temperature=0.7, seeds=2, num_permutations=2) == [(5, 0), (6, 0)]


def test_the_summary_counts_by_hand() -> None:
    def run(order: int, *said: str | None) -> PromptingResult:
        answers = [QuestionResult("q", "4", each, each == "4", "p", ["t"], [each]) for each in said]
        run = PromptingRun("few-shot", 0, order)
        return PromptingResult(run, answers, prompt_tokens=40, shared_tokens=7, new_tokens=8, seconds=2.0)

    runs = [run(0, "4", None, "4", "5"), run(1, "4", "4", "4", "4"), run(2, None, None, "4", "3")]
    found = summary(runs)
    assert (found["accuracy"], found["unparsed_rate"]) == (0.5, 0.25)
    assert (found["ci_low"], found["ci_high"]) == wilson(2, 4)
    assert (found["prompt_tokens"], found["new_tokens"], found["seconds_per_answer"]) == (10, 2, 0.5)
    assert (found["mean"], found["min"], found["max"]) == (pytest.approx(1.75 / 3), 0.25, 1.0)
    assert len(prediction_rows(runs)) == 12


def test_show_prints_the_exact_prompts_and_asks_nothing(
    prompt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlm.inference.prompting.Prompter.ask", lambda *_, **__: pytest.fail("it asked"))
    shown = prompt("--show_prompts")["prompts"]
    assert shown["zero-shot-cot"] == [
        "Add.\n\nQ: 2 + 2\nA: Let's think step by step.",
        "Add.\n\nQ: 2 + 2\nA: Let's think step by step. [output of the first call]\nTherefore, the answer is",
    ]
    text = prompt("--show_prompts", json_=False)
    for style in shown.values():
        assert all(one in text for one in style)


def test_a_few_questions_are_shown_in_full_with_a_table(prompt: Callable[..., Any]) -> None:
    text = prompt("--style=few-shot", "--num_permutations=2", task="moods.toml", json_=False)
    assert "Q: fun\nA: good\n\nQ: dull\nA: bad\n\nQ: fine\nA:" in text
    assert "[answer: " in text and "mean (min to max)" in text and "1 question of moods.toml" in text


def test_a_chat_model_gets_its_template_unless_told_otherwise(prompt: Callable[..., Any], model: Path) -> None:

    shutil.copytree(model, "chatty")
    byte_tokenizer(Path("chatty"))
    settings = {"eos_token": "<|endoftext|>", "chat_template": CHAT}
    Path("chatty", "tokenizer_config.json").write_text(json.dumps(settings))
    words = ("--show_prompts", "--style=few-shot", f"--init_from={os.getcwd()}/chatty")
    result = prompt(*words)
    assert result["chat"] is True
    assert result["prompts"]["few-shot"] == [
        "[user]Add.\n\nQ: 1 + 1[assistant]2[user]Q: 1 + 2[assistant]3[user]Q: 2 + 2[bot]"
    ]
    assert prompt(*words, "--chat=off")["prompts"]["few-shot"][0].startswith("Add.\n\nQ: 1 + 1\nA: 2")


@pytest.mark.parametrize(
    ("words", "task", "line"),
    [
        (["--shots=4"], "sums.toml", "--shots 4: task sums.toml has 3 demonstrations: ask for fewer, or add some"),
        (["--style=few-shot-cot"], "moods.toml", "--shots 2: task moods.toml has 0 demonstrations with reasoning: "),
        (["--calibrate"], "sums.toml", "--calibrate: task sums.toml names no labels whose scores could be calibrated"),
        (["--limit=3"], "sums.toml", "--limit 3: task sums.toml has 2 questions"),
        (["--chat=on"], "sums.toml", "--chat on: "),
        (
            ["--num_samples=3"],
            "sums.toml",
            "--num_samples 3: greedy answers are all equal; set --temperature",
        ),
        (["--style=few-shot", "--shots=0"], "sums.toml", "--shots 0: style few-shot shows demonstrations; use zero-"),
        (["--num_permutations=0"], "sums.toml", "--num_permutations 0: must be 1 or more"),
        (["--temperature=-1"], "sums.toml", "--temperature -1.0: must be 0 or more"),
        (["--max_new_tokens=0"], "sums.toml", "--max_new_tokens 0: must be 1 or more"),
        (["--style=cot"], "sums.toml", "--style cot: not one of all, zero-shot, few-shot, few-shot-cot, zero-shot-cot"),
        (
            [],
            "electrcity",
            "unknown task 'electrcity': did you mean 'electricity'? known are electricity, ari",
        ),
        ([], "none.toml", "--task none.toml: no such file"),
        (["--shots=8"], "electricity", "--shots 8: the longest few-shot prompt takes "),
        (["--max_new_tokens=900"], "sums.toml", "--shots 2: the longest few-shot prompt takes "),
    ],
)
def test_what_cannot_be_asked_is_one_line(words: list[str], task: str, line: str, prompt: Callable[..., Any]) -> None:
    before = sorted(os.listdir())
    assert prompt(*words, "--predictions=p.jsonl", task=task).startswith(line)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("choose", ["fixed", "random", "balanced", "bm25", "embedding"])
def test_evaluate_takes_demonstrations_from_the_train_split(
    choose: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_folder(Path("data"))
    words = [f"--init_from={model}", "--data=data", f"--template={TEMPLATE}", "--labels=bad,good", "--device=cpu"]
    words += [
        "--dtype=float32",
        "--limit=5",
        "--shots=4",
        f"--demo_selection={choose}",
        "--predictions=p.jsonl",
        "--json",
    ]
    found = {}
    for calibrate in ("true", "false"):
        assert cli.run(["evaluate", *words, f"--calibrate={calibrate}"]) == 0
        found[calibrate] = json.loads(capsys.readouterr().out)
        assert found[calibrate]["n"] == 5 and {"score", "generate"} <= set(found[calibrate])
    scores = [json.loads(line)["scores"] for line in Path("p.jsonl").read_text().split("\n") if line]
    assert len(scores) == 5 and all(sum(map(math.exp, each.values())) < 1 for each in scores)
    one = len("Review: good x2000\nIs it: good\n\n")
    assert 4 * one * 0.8 < found["true"]["prompt_tokens"] < 5 * one * 1.3
    shared = found["true"]["shared_prompt_tokens"]
    assert shared < one if choose in ("bm25", "embedding") else shared > 3 * one
