"""Questions answered by prompting alone: few-shot, few-shot chain of thought, zero-shot chain of thought.

    few-shot         demonstrations with their answers, then the question         Brown et al. 2020
    few-shot-cot     … with worked reasoning before each answer                   Wei et al. 2022
    zero-shot-cot    "Let's think step by step."; a second call behind what that
                     gave, "Therefore, the answer is", extracts the answer        Kojima et al. 2022
    zero-shot        the question alone

Each works on any task (`text/tasks.py`), in plain text or in the model's chat template, with one answer a question or
with the majority of several sampled ones (self-consistency, Wang et al. 2022).

What is unusual here:
- Demonstrations that are the same for all questions are run once for all of them (`generate.prefill_shared_prefix`).
- Where a task names its labels, the styles without reasoning take the label whose tokens are likeliest, and may be
  calibrated; all others read the generated text by the task's pattern. Text without an answer is wrong, and counted.
- Accuracy is never one number of one order: every order and seed asked for is a run, and all are reported.

Letters: N questions, L labels, S samples a question.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.config import DemoSelection, Style
from graftlm.errors import InputError
from graftlm.inference.fewshot import CONTENT_FREE, Embed, permute, select_demonstrations
from graftlm.inference.generate import ProgressCallback, generate_ids
from graftlm.inference.metrics import calibrated
from graftlm.inference.scoring import score
from graftlm.models import CausalLM
from graftlm.text.chat import Chat, Message
from graftlm.text.collate import Example, common_prefix_length, label_ids
from graftlm.text.tasks import ANSWER, QUESTION, Problem, Task, normalize_answer
from graftlm.text.template import FIELD, Template
from graftlm.text.tokenizer import Tokenizer

STEP_BY_STEP = "Let's think step by step."
"""Kojima et al. (2022), the best of their triggers."""
REASONING, SHORT = 256, 24
"""New tokens of a worked answer and of a bare one, unless told otherwise."""
STOP_WINDOW = 8
"""A stop is looked for in the text of the last so many tokens."""


@dataclass(frozen=True)
class Prompt:
    """What is shown and asked; how that is written is the writer's."""

    demonstrations: tuple[tuple[str, str], ...]
    """Demonstrations: what was asked and what was answered."""
    asked: str
    answer_prefix: str = ""
    """What the answer begins with."""


class PromptBuilder:
    """Prompts as text and tokens: plain, or in a chat template, where each demonstration is a turn of its own."""

    def __init__(self, task: Task, tokenizer: Tokenizer, chat: bool) -> None:
        self._task, self._tokenizer = task, tokenizer
        self.chat = Chat(tokenizer) if chat else None

    def text(self, prompt: Prompt) -> str:
        """Exactly what the model reads."""
        if self.chat is not None:
            return self.chat.render(self._messages(prompt), prompt.answer_prefix)
        parts = [self._task.instruction] if self._task.instruction else []
        parts += [self._plain(asked, answered) for asked, answered in prompt.demonstrations]
        return "\n\n".join([*parts, self._plain(prompt.asked, prompt.answer_prefix)])

    def ids(self, prompt: Prompt) -> list[int]:
        """The same as tokens."""
        if self.chat is not None:
            return self.chat.encode(self._messages(prompt), prompt.answer_prefix)
        return self._tokenizer.encode(self.text(prompt), bos=True)

    def label_ids(self, prompt: Prompt) -> list[list[int]]:
        """The tokens of each label behind this prompt: behind an answer in chat, which nothing begins, no space."""
        space = self.chat is None or bool(prompt.answer_prefix)
        return label_ids(Template("task", FIELD if space else FIELD + "\n", self._task.labels), self._tokenizer)

    def stops(self, prompt: Prompt) -> tuple[str, ...]:
        """Where plain text goes on beyond the answer: with the next demonstration, or another question."""
        if self.chat is not None:
            return ()
        head = self._task.question.partition(QUESTION)[0].strip()
        return (*(["\n\n"] if prompt.demonstrations else []), *([f"\n{head}"] if head else []))

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that an answer is over at."""
        return frozenset({self._tokenizer.eot}) if self.chat is None else self.chat.stop_tokens

    def _asked(self, question: str) -> str:
        return self._task.question.replace(QUESTION, question)

    def _plain(self, asked: str, answered: str) -> str:
        return f"{self._asked(asked)}\n{self._task.answer} {answered}".strip(" ")

    def _messages(self, prompt: Prompt) -> list[Message]:
        messages: list[Message] = []
        for asked, answered in (*prompt.demonstrations, (prompt.asked, "")):
            first = f"{self._task.instruction}\n\n" if self._task.instruction and not messages else ""
            messages += [("user", first + self._asked(asked)), ("assistant", answered)]
        return messages[:-1]


@dataclass(frozen=True)
class QuestionResult:
    """One question's answer, and how it came about."""

    question: str
    answer: str
    """The right one."""
    prediction: str | None
    """The one that was read; None where the text has none."""
    correct: bool
    prompt: str
    texts: list[str]
    """What the model wrote, a text for each sample; where labels were scored, the likeliest."""
    samples: list[str | None]
    """What was read in each text."""


@dataclass(frozen=True)
class PromptingResult:
    """One run over all questions."""

    answers: list[QuestionResult]
    prompt_tokens: int
    """Of all prompts: of each sample, and of the second calls."""
    shared_tokens: int
    """So many tokens all prompts of the first call begin with; they were run once."""
    new_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PromptingConfig:
    """How questions are asked; `PromptConfig` explains the fields."""

    shots: int = 8
    demo_selection: DemoSelection = "fixed"
    num_samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int | None = None
    calibrate: bool = False
    batch_size: int = 32


# Prompts --------------------------------------------------------------------------------------------------------------


def prompts(
    task: Task,
    problems: Sequence[Problem],
    style: Style,
    how: PromptingConfig,
    seed: int = 0,
    order: int = 0,
    embed: Embed | None = None,
) -> list[Prompt]:
    """The prompt of each question (of zero-shot-cot the first call's).

    Raises InputError where the task has too few demonstrations, or for few-shot-cot too few with reasoning.
    """
    chosen = _demonstrations(task, problems, style, how, seed, order, embed) if style.startswith("few-shot") else [[]]
    turns = [
        tuple((d.question, _worked(task, d) if style == "few-shot-cot" else d.answer) for d in each) for each in chosen
    ]
    begun = ""
    if style == "zero-shot-cot":
        begun = STEP_BY_STEP
    elif style == "zero-shot" and not task.labels:
        begun = task.trigger[:1].upper() + task.trigger[1:]
    shared = len(turns) == 1
    return [Prompt(turns[0 if shared else n], p.question, begun) for n, p in enumerate(problems)]


def extraction_prompt(task: Task, prompt: Prompt, reasoning: str) -> Prompt:
    """The second call of zero-shot-cot: all of the first with what it gave, and the question for the answer."""
    return Prompt(
        prompt.demonstrations, prompt.asked, f"{prompt.answer_prefix} {reasoning.strip()}\nTherefore, {task.trigger}"
    )


def _worked(task: Task, demo: Problem) -> str:
    return f"{demo.reasoning} {task.conclusion.replace(ANSWER, demo.answer)}"


def _demonstrations(
    task: Task,
    problems: Sequence[Problem],
    style: Style,
    how: PromptingConfig,
    seed: int,
    order: int,
    embed: Embed | None,
) -> list[list[Problem]]:
    pool = [demo for demo in task.demonstrations if demo.reasoning or style == "few-shot"]
    if len(pool) < how.shots:
        what = "demonstrations" if style == "few-shot" else "demonstrations with reasoning"
        raise InputError(f"--shots {how.shots}: task {task.name} has {len(pool)} {what}: ask for fewer, or add some")
    chosen = select_demonstrations(
        [demo.question for demo in pool],
        [normalize_answer(demo.answer) for demo in pool],
        [problem.question for problem in problems],
        shots=how.shots,
        how=how.demo_selection,
        seed=seed,
        embed=embed,
    )
    return [[pool[place] for place in permute(places, order)] for places in chosen]


# Runs -----------------------------------------------------------------------------------------------------------------


def ask(
    model: CausalLM,
    tokenizer: Tokenizer,
    writer: PromptBuilder,
    task: Task,
    problems: Sequence[Problem],
    style: Style,
    how: PromptingConfig,
    seed: int = 0,
    order: int = 0,
    embed: Embed | None = None,
    progress: ProgressCallback | None = None,
) -> PromptingResult:
    """Ask all questions in one style, once. `seed` decides the choice of demonstrations and the samples.

    Raises InputError for a prompt that leaves no room for an answer in the model's context.
    """
    asked = prompts(task, problems, style, how, seed, order, embed)
    ids = [writer.ids(prompt) for prompt in asked]
    scored = bool(task.labels) and not style.endswith("-cot")
    samples: list[list[str | None]]
    _check(ids, 1 if scored else _room(task, tokenizer, style, how), model.max_seq_len, style, how)
    began = time.perf_counter()
    if scored:
        texts = _likeliest(model, writer, task, asked, ids, how, progress)
        prompt_tokens, new_tokens, samples = sum(map(len, ids)), 0, [[normalize_answer(text)] for [text] in texts]
    else:
        texts, samples, prompt_tokens, new_tokens = _written(
            model, tokenizer, writer, task, asked, ids, style, how, seed, progress
        )
    seconds = time.perf_counter() - began
    answers = []
    for problem, prompt, own, said in zip(problems, asked, texts, samples, strict=True):
        voted, true = majority(said), normalize_answer(problem.answer)
        answers.append(QuestionResult(problem.question, true, voted, voted == true, writer.text(prompt), own, said))
    return PromptingResult(
        answers, prompt_tokens, common_prefix_length(ids) if len(ids) > 1 else 0, new_tokens, seconds
    )


def majority(samples: Sequence[str | None]) -> str | None:
    """The answer that most samples gave; of equally many the one that came first. None is no answer and has no vote."""
    counts = Counter(sample for sample in samples if sample is not None)
    return counts.most_common(1)[0][0] if counts else None  # equals in the order of their coming


def _room(task: Task, tokenizer: Tokenizer, style: Style, how: PromptingConfig) -> int:
    """The tokens that may follow the longest prompt, in both calls."""
    first = how.max_new_tokens or (REASONING if style.endswith("-cot") else SHORT)
    if style != "zero-shot-cot":
        return first
    return first + len(tokenizer.encode(f"\nTherefore, {task.trigger}")) + SHORT


def _check(ids: Sequence[Sequence[int]], room: int, context: int, style: Style, how: PromptingConfig) -> None:
    longest = max(map(len, ids))
    if longest + room <= context:
        return
    shown = f"--shots {how.shots}: " if style.startswith("few-shot") else ""
    raise InputError(
        f"{shown}the longest {style} prompt takes {longest:,} tokens and its answer may take {room}, but the model "
        f"reads at most {context:,}: use fewer or shorter {'demonstrations' if shown else 'questions'}, or less "
        "--max_new_tokens"
    )


def _likeliest(
    model: CausalLM,
    writer: PromptBuilder,
    task: Task,
    asked: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    how: PromptingConfig,
    progress: ProgressCallback | None,
) -> list[list[str]]:
    """The likeliest label of each question, calibrated where asked for; the demonstrations run once for all."""
    free: list[list[list[int]]] = []
    if how.calibrate:
        groups = asked if len({prompt.demonstrations for prompt in asked}) > 1 else asked[:1]
        free = [
            [writer.ids(Prompt(prompt.demonstrations, text, prompt.answer_prefix)) for text in CONTENT_FREE]
            for prompt in groups
        ]
    everything = [Example(tuple(row), (), None, "", "", "a question") for row in (*ids, *(x for g in free for x in g))]
    labels = writer.label_ids(asked[0])
    found = score(
        model, everything, labels, batch_size=how.batch_size, completions=False, progress=progress
    ).labels.tolist()
    scores = found[: len(ids)]
    if free:
        rest = found[len(ids) :]
        each = len(CONTENT_FREE)
        scores = calibrated(scores, [rest[n * each : (n + 1) * each] for n in range(len(free))]).tolist()
    return [[task.labels[row.index(max(row))]] for row in scores]


def _written(
    model: CausalLM,
    tokenizer: Tokenizer,
    writer: PromptBuilder,
    task: Task,
    asked: Sequence[Prompt],
    ids: Sequence[list[int]],
    style: Style,
    how: PromptingConfig,
    seed: int,
    progress: ProgressCallback | None,
) -> tuple[list[list[str]], list[list[str | None]], int, int]:
    """Texts and the answers read in them, [N][S] each, and the tokens of all prompts and of all new text."""
    each = range(how.num_samples)
    rows, owners = [row for row in ids for _ in each], [prompt for prompt in asked for _ in each]
    stops = writer.stops(asked[0])
    new = generate_ids(
        model,
        rows,
        max_new_tokens=how.max_new_tokens or (REASONING if style.endswith("-cot") else SHORT),
        eot=writer.stop_tokens,
        temperature=how.temperature,
        seed=seed,
        batch_size=how.batch_size,
        stop=lambda tokens: any(stop in tokenizer.decode(tokens[-STOP_WINDOW:]) for stop in stops),
        progress=progress,
    )
    texts = [_until(tokenizer.decode(tokens), stops) for tokens in new]
    prompt_tokens, new_tokens = sum(map(len, rows)), sum(map(len, new))
    if style == "few-shot-cot":
        said = [task.parse_final_answer(text) for text in texts]
    elif style == "zero-shot-cot":
        second = [extraction_prompt(task, prompt, text) for prompt, text in zip(owners, texts, strict=True)]
        rows = [writer.ids(prompt) for prompt in second]
        new = generate_ids(model, rows, max_new_tokens=SHORT, eot=writer.stop_tokens, batch_size=how.batch_size)
        ends = [_until(tokenizer.decode(tokens), ("\n",)) for tokens in new]
        said = [task.first(end) for end in ends]
        texts = [f"{text.rstrip()}\nTherefore, {task.trigger}{end}" for text, end in zip(texts, ends, strict=True)]
        prompt_tokens, new_tokens = prompt_tokens + sum(map(len, rows)), new_tokens + sum(map(len, new))
    else:
        said = [task.first(text) for text in texts]

    def grouped(things: Sequence[Any]) -> list[list[Any]]:
        return [list(things[n : n + how.num_samples]) for n in range(0, len(things), how.num_samples)]

    return grouped(texts), grouped(said), prompt_tokens, new_tokens


def _until(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
