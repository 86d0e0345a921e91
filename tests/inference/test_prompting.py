"""Prompts are written as documented; what is read, counted and voted is checked against the plain way."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.config import PromptConfig
from graftlm.errors import InputError
from graftlm.inference import prompting
from graftlm.inference.generate import Batching, generate_ids
from graftlm.inference.prompting import (
    Prompt,
    PromptBuilder,
    Prompter,
    PromptingRun,
    extraction_prompt,
    majority,
)
from graftlm.inference.sampling import SamplingParams
from graftlm.models import CausalLM
from graftlm.text.stream import TextStream
from graftlm.text.tasks import Problem, Task
from graftlm.text.tokenizer import Tokenizer
from inference.tiny import full_logits, stopping, tiny, words
from tiny import byte_tokenizer, model_of

SUMS = Task(
    "sums",
    questions=(Problem("2 + 2", "4"), Problem("2 + 3", "5")),
    demonstrations=(
        Problem("1 + 1", "2", "One and one."),
        Problem("1 + 2", "3", "One and two."),
        Problem("0 + 1", "1"),
    ),
    instruction="Add.",
    trigger="the sum is",
)
MOODS = Task(
    "moods",
    questions=(Problem("so good", "good"), Problem("so weak film", "bad"), Problem("a fine fine fun", "good")),
    demonstrations=(Problem("a dull film", "bad"), Problem("good fun", "good"), Problem("weak", "bad")),
    question="Review: {question}",
    answer="Is it:",
    labels=("bad", "good"),
)
KNOWN = [
    "Review:",
    "Is",
    "it:",
    "bad",
    "good",
    "a",
    "dull",
    "film",
    "fine",
    "fun",
    "weak",
    "and",
    "so",
    "The",
    "answer",
    "is",
    "N/A",
]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level(folder: Path, template: str = CHAT) -> Tokenizer:
    byte_tokenizer(folder)
    settings = {"eos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_folder(folder)


# Prompts


def prompts(task: Task, style: Any, **settings: Any) -> list[Prompt]:
    builder, config = PromptBuilder(task, words(), chat=False), PromptConfig(**settings)
    return Prompter(tiny("llama"), builder, config).prompts(task.questions, PromptingRun(style))


def written(style: str, shots: int = 2) -> str:
    writer = PromptBuilder(SUMS, words(), chat=False)
    return writer.text(prompts(SUMS, style, shots=shots)[0])


def test_the_styles_in_plain_text() -> None:
    shown = "Add.\n\nQ: 1 + 1\nA: {}\n\nQ: 1 + 2\nA: {}\n\nQ: 2 + 2\nA:"
    assert written("few-shot") == shown.format("2", "3")
    worked = "One and one. The answer is 2.", "One and two. The answer is 3."
    assert written("few-shot-cot") == shown.format(*worked)
    assert written("zero-shot-cot") == "Add.\n\nQ: 2 + 2\nA: Let's think step by step."
    assert written("zero-shot") == "Add.\n\nQ: 2 + 2\nA: The sum is"


def test_the_second_call_holds_the_reasoning_and_asks_for_the_answer() -> None:
    writer = PromptBuilder(SUMS, words(), chat=False)
    first = prompts(SUMS, "zero-shot-cot")[1]
    assert writer.text(extraction_prompt(SUMS, first, " Two and\nthree. ")) == (
        "Add.\n\nQ: 2 + 3\nA: Let's think step by step. Two and\nthree.\nTherefore, the sum is"
    )


def test_the_styles_in_chat_give_each_demonstration_a_turn(tmp_path: Path) -> None:
    writer = PromptBuilder(SUMS, byte_level(tmp_path), chat=True)
    few = prompts(SUMS, "few-shot", shots=1)[0]
    assert writer.text(few) == (
        "<user>Add.\n\nQ: 1 + 1<|endoftext|><assistant>2<|endoftext|><user>Q: 2 + 2<|endoftext|><assistant>"
    )
    zero = prompts(SUMS, "zero-shot-cot")[0]
    assert writer.text(zero) == "<user>Add.\n\nQ: 2 + 2<|endoftext|><assistant>Let's think step by step."


def test_labels_have_a_space_before_them_but_not_at_the_beginning_of_a_chats_answer(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    prompt = prompts(MOODS, "few-shot", shots=1)[0]
    plain, chat = (PromptBuilder(MOODS, tokenizer, chat=chat).example(prompt) for chat in (False, True))
    assert [tokenizer.decode(ids) for ids in plain.label_ids] == [" bad", " good"]
    assert [tokenizer.decode(ids) for ids in chat.label_ids] == ["bad", "good"]


def test_chain_of_thought_shows_only_demonstrations_with_reasoning() -> None:
    with pytest.raises(InputError, match="--shots 3: task sums has 2 demonstrations with reasoning"):
        prompts(SUMS, "few-shot-cot", shots=3)
    assert len(prompts(SUMS, "few-shot", shots=3)[0].demonstrations) == 3


def test_nearest_demonstrations_differ_from_question_to_question() -> None:
    near = prompts(MOODS, "few-shot", shots=1, demo_selection="bm25")
    assert [prompt.demonstrations[0][0] for prompt in near] == ["good fun", "weak", "good fun"]


# Answers


def ran(
    model: CausalLM, tokenizer: Tokenizer, task: Task, style: Any, config: PromptConfig, seed: int = 0
) -> prompting.PromptingResult:
    prompter = Prompter(model, PromptBuilder(task, tokenizer, chat=False), config)
    return prompter.ask(task.questions, PromptingRun(style, seed))


@pytest.mark.parametrize("choose", ["fixed", "bm25"])
@pytest.mark.parametrize("calibrate", [False, True])
def test_labels_are_scored_as_by_whole_prompts(choose: Any, calibrate: bool) -> None:
    model, tokenizer = tiny("llama"), words(*KNOWN)
    how = PromptConfig(shots=2, demo_selection=choose, calibrate=calibrate, batch_size=2)
    outcome = ran(model, tokenizer, MOODS, "few-shot", how)
    writer = PromptBuilder(MOODS, tokenizer, chat=False)
    ids = [tokenizer.encode(" bad")[0], tokenizer.encode(" good")[0]]

    def share(prompt: prompting.Prompt) -> torch.Tensor:
        return full_logits(model, tokenizer.encode(writer.text(prompt)))[-1].log_softmax(-1)[ids].softmax(-1)

    for prompt, answer in zip(prompts(MOODS, "few-shot", shots=2, demo_selection=choose), outcome.answers, strict=True):
        p = share(prompt)
        if calibrate:
            free = [share(prompting.Prompt(prompt.demonstrations, text)) for text in ("N/A", "[MASK]", "")]
            p = p / torch.stack(free).mean(0)
        assert answer.prediction == MOODS.labels[int(p.argmax())]
        assert answer.correct == (answer.prediction == answer.answer)
    assert outcome.new_tokens == 0
    assert outcome.prompt_tokens == sum(len(tokenizer.encode(answer.prompt)) for answer in outcome.answers)


def scripted(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, say: Callable[[str], list[str]]) -> list[list[str]]:
    """Let the model say what `say` makes of each prompt (one text for each of its samples); returns the calls."""
    calls: list[list[str]] = []

    def fake(model: object, rows: Sequence[Sequence[int]], params: SamplingParams, **more: Any) -> list[list[int]]:
        texts = [tokenizer.decode(row) for row in rows]
        calls.append(texts)
        seen: dict[str, int] = {}
        said = []
        for text in texts:
            number = seen[text] = seen.get(text, -1) + 1
            said.append(say(text)[number])
        return [tokenizer.encode(text) for text in said]

    monkeypatch.setattr(prompting, "generate_ids", fake)
    return calls


@pytest.fixture
def plain(tmp_path: Path) -> tuple[CausalLM, Tokenizer]:
    return model_of("llama", vocab=257, context=800), byte_level(tmp_path)


def test_zero_shot_chain_of_thought_takes_two_calls(
    plain: tuple[CausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(prompt: str) -> list[str]:
        if prompt.endswith("the sum is"):
            return [" 4. Or 7?\nQ: more" if "2 + 2" in prompt else " none"]
        return [" We add 9 and 9.\nQ: 9 + 9"]

    calls = scripted(monkeypatch, plain[1], say)
    outcome = ran(*plain, SUMS, "zero-shot-cot", PromptConfig())
    assert calls[1][0] == "Add.\n\nQ: 2 + 2\nA: Let's think step by step. We add 9 and 9.\nTherefore, the sum is"
    assert [answer.prediction for answer in outcome.answers] == ["4", None]
    assert [answer.correct for answer in outcome.answers] == [True, False]
    assert outcome.answers[0].texts == [" We add 9 and 9.\nTherefore, the sum is 4. Or 7?"]
    assert outcome.prompt_tokens == sum(len(text) for call in calls for text in call)  # tokens are bytes here


def test_few_shot_answers_end_where_the_next_question_would_begin(
    plain: tuple[CausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(
        monkeypatch, plain[1], lambda prompt: [" Two and 9. The answer is 4.\n\nQ: 7 + 7\nA: 14. The answer is 14."]
    )
    outcome = ran(*plain, SUMS, "few-shot-cot", PromptConfig(shots=2))
    assert [answer.prediction for answer in outcome.answers] == ["4", "4"]
    scripted(monkeypatch, plain[1], lambda prompt: [" 5\n\nQ: 7 + 7\nA: 14"])
    outcome = ran(*plain, SUMS, "few-shot", PromptConfig(shots=2))
    assert [(answer.prediction, answer.correct) for answer in outcome.answers] == [("5", False), ("5", True)]
    assert outcome.shared_tokens == len("Add.\n\nQ: 1 + 1\nA: 2\n\nQ: 1 + 2\nA: 3\n\nQ: 2 + ")


@pytest.mark.parametrize("style", ["few-shot", "few-shot-cot", "zero-shot-cot"])
def test_an_answer_in_chat_ends_with_its_turn(style: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_tokenizer(tmp_path, "<|end|>")
    template = CHAT.replace("<|endoftext|>", "<|end|>")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "chat_template": template})
    )
    tokenizer, model = Tokenizer.from_folder(tmp_path), model_of("llama", vocab=258, context=800)
    ends: list[Any] = []

    def fake(model: object, rows: Sequence[Sequence[int]], params: SamplingParams, **more: Any) -> list[list[int]]:
        ends.append(set(params.stop_token_ids))
        return [tokenizer.encode(" 4") for _ in rows]

    monkeypatch.setattr(prompting, "generate_ids", fake)
    for chat, expected in ((True, {0, 257}), (False, {0})):
        writer = PromptBuilder(SUMS, tokenizer, chat=chat)
        Prompter(model, writer, PromptConfig(shots=1)).ask(SUMS.questions, PromptingRun(style))
        assert ends == [expected] * (2 if style == "zero-shot-cot" else 1)
        ends.clear()


def test_self_consistency_takes_the_majority_and_of_equals_the_first() -> None:
    assert majority(["3", "4", "4"]) == "4"
    assert majority(["3", "4", "4", "3"]) == "3"
    assert majority([None, None, "7"]) == "7"
    assert majority([None, None]) is None


def test_each_questions_samples_vote_for_it_alone(
    plain: tuple[CausalLM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(prompt: str) -> list[str]:
        return [" 4", " 9", " 4"] if prompt.rstrip().endswith("2 + 2\nA:") else [" 6", " 5", " no"]

    calls = scripted(monkeypatch, plain[1], say)
    outcome = ran(*plain, SUMS, "few-shot", PromptConfig(shots=1, num_samples=3, temperature=1.0))
    assert [answer.samples for answer in outcome.answers] == [["4", "9", "4"], ["6", "5", None]]
    assert [answer.prediction for answer in outcome.answers] == ["4", "6"]
    assert len(calls[0]) == 6


def test_samples_differ_and_are_decided_by_the_seed(plain: tuple[CausalLM, Tokenizer]) -> None:
    how = PromptConfig(shots=1, num_samples=4, temperature=1.0, max_new_tokens=6)
    first, again, other = (ran(*plain, SUMS, "few-shot", how, seed=seed) for seed in (1, 1, 2))
    assert [a.texts for a in first.answers] == [a.texts for a in again.answers]
    assert [a.texts for a in first.answers] != [a.texts for a in other.answers]
    assert len(set(first.answers[0].texts)) > 1


def test_a_stop_ends_a_row_and_changes_no_other() -> None:
    model = tiny("llama")
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    free = generate_ids(model, rows, stopping(12, -1), batching=Batching(2))
    end = free[0][4]
    tokenizer = words(*[f"w{n}" for n in range(1, 48)])
    stop = (tokenizer.decode([end]),)
    assert stop[0].strip()
    streams = [TextStream(tokenizer, row, stop) for row in rows]
    stopped = generate_ids(model, rows, stopping(12, -1, stop=stop), streams=streams, batching=Batching(2))
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert len(stopped[0]) <= 5


def test_prompts_that_leave_no_room_are_refused() -> None:
    model, tokenizer = tiny("llama"), words(*KNOWN)
    with pytest.raises(
        InputError, match=r"--shots 3: the longest few-shot prompt takes \d+ tokens .* at most 40: use fewer"
    ):
        ran(
            model,
            tokenizer,
            Task(**{**vars_of(MOODS), "instruction": "so " * 30}),
            "few-shot",
            PromptConfig(shots=3),
        )
    with pytest.raises(
        InputError, match=r"the longest zero-shot-cot prompt takes \d+ tokens and its answer may take 2\d\d"
    ):
        ran(model, tokenizer, SUMS, "zero-shot-cot", PromptConfig())


def vars_of(task: Task) -> dict[str, Any]:
    return {name: getattr(task, name) for name in Task.__dataclass_fields__}
