"""`graft prompt`: questions answered by prompting alone: zero-shot, few-shot, and chain of thought.

    few-shot         demonstrations with their answers, then the question                      Brown et al. 2020
    few-shot-cot     the same with worked reasoning before each answer                         Wei et al. 2022
    zero-shot-cot    "Let's think step by step."; a second call, given that reasoning and
                     "Therefore, the answer is", extracts the answer                           Kojima et al. 2022
    zero-shot        the question only

Each style works on any task (`text/tasks.py`), in plain text or in the model's chat template, with one answer per
question or the majority of several sampled ones (self-consistency, Wang et al. 2022). If a task names its labels, the
styles without reasoning take the most likely label, optionally calibrated; the others parse the generated text by the
task's pattern. Text without an answer counts as wrong. Demonstrations that are the same for all questions are computed
once (`decoder.prefill_shared_prefix`).

A style's accuracy, with its interval over questions, is that of its first run. The mean, the minimum and the maximum
over all runs are reported with it, since a single order of demonstrations can be lucky.

Letters: N questions, L labels, S samples per question.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from graftlm.config import PromptConfig
from graftlm.config.inference import Style
from graftlm.errors import InputError
from graftlm.exchange.load import load
from graftlm.files.atomic import write_text
from graftlm.inference.fewshot import CONTENT_FREE, FewShotConfig, embedder, select_demonstrations
from graftlm.inference.generate import Batching, ProgressCallback, generate_ids, truncate_at_stop
from graftlm.inference.metrics import calibrated, wilson
from graftlm.inference.sampling import SamplingParams
from graftlm.inference.scoring import score_labels
from graftlm.models import CausalLM
from graftlm.text.boundary import scored_labels, split_tokens
from graftlm.text.chat import Chat, Message
from graftlm.text.collate import Example, common_prefix_length
from graftlm.text.stream import TextStream
from graftlm.text.tasks import ANSWER, QUESTION, Problem, Task, load_task, normalize_answer
from graftlm.text.template import answer_space
from graftlm.text.tokenizer import Tokenizer

STEP_BY_STEP = "Let's think step by step."
"""The best trigger of Kojima et al. (2022)."""
REASONING_TOKENS, ANSWER_TOKENS = 256, 24
"""Default max_new_tokens of an answer with reasoning and of one without."""
STYLES: tuple[Style, ...] = ("few-shot", "few-shot-cot", "zero-shot-cot")
"""The styles of `--style all`."""
MAX_SHOWN = 3
"""Up to this many questions are shown with their answers."""


# The text of prompts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """The content of a prompt; a PromptBuilder writes it as text."""

    demonstrations: tuple[tuple[str, str], ...]
    """Questions with their answers."""
    question: str
    answer_prefix: str = ""
    """What the answer begins with."""


class PromptBuilder:
    """Prompts as text and tokens: plain, or in a chat template with a turn for each demonstration."""

    def __init__(self, task: Task, tokenizer: Tokenizer, chat: bool) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.chat = Chat(tokenizer) if chat else None

    def text(self, prompt: Prompt) -> str:
        """The exact text of the prompt."""
        if self.chat is not None:
            return self.chat.render(self._messages(prompt), prompt.answer_prefix)
        parts = [self.task.instruction] if self.task.instruction else []
        parts += [self._plain(question, answer) for question, answer in prompt.demonstrations]
        return "\n\n".join([*parts, self._plain(prompt.question, prompt.answer_prefix)])

    def ids(self, prompt: Prompt, answer: str = "") -> list[int]:
        """The prompt's tokens, or those of the prompt and the beginning of its answer."""
        if self.chat is not None:
            return self.chat.encode(self._messages(prompt), prompt.answer_prefix + answer)
        return self.tokenizer.encode_prompt(self.text(prompt) + answer)

    def example(self, prompt: Prompt) -> Example:
        """The prompt with the tokens of each label after it."""
        before = prompt.answer_prefix or (self.task.answer if self.chat is None else "")
        answers = [answer_space(before, label) + label for label in self.task.labels]
        split = split_tokens(self.ids(prompt), [self.ids(prompt, answer) for answer in answers])
        labels = scored_labels(split.answers, self.tokenizer.eot)
        source = "a question"
        return Example(split.prompt, (), None, "", "", source, label_ids=labels, rest=split.rest, skip=split.skip)

    def stop(self, prompt: Prompt) -> tuple[str, ...]:
        """Texts that end an answer in plain text: the beginning of another demonstration or question."""
        if self.chat is not None:
            return ()
        head = self.task.question.partition(QUESTION)[0].strip()
        return (*(["\n\n"] if prompt.demonstrations else []), *([f"\n{head}"] if head else []))

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return (self.chat or self.tokenizer).stop_tokens

    def _question(self, question: str) -> str:
        return self.task.question.replace(QUESTION, question)

    def _plain(self, question: str, answer: str) -> str:
        before = self.task.answer
        return f"{self._question(question)}\n{before}{answer_space(before, answer)}{answer}"

    def _messages(self, prompt: Prompt) -> list[Message]:
        messages: list[Message] = []
        for question, answer in (*prompt.demonstrations, (prompt.question, "")):
            first = f"{self.task.instruction}\n\n" if self.task.instruction and not messages else ""
            messages += [("user", first + self._question(question)), ("assistant", answer)]
        return messages[:-1]


# Answers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptingRun:
    """One run over all questions: a style, the seed of demonstrations and samples, the order of demonstrations."""

    style: Style
    seed: int = 0
    permutation: int = 0

    @property
    def ids(self) -> dict[str, int]:
        """What tells it from the other runs of its style, in the JSON."""
        return {"seed": self.seed, "order": self.permutation}

    @property
    def few_shot(self) -> bool:
        """Whether demonstrations are shown."""
        return self.style.startswith("few-shot")

    @property
    def reasoning(self) -> bool:
        """Whether the answer has reasoning before it."""
        return self.style.endswith("-cot")


@dataclass(frozen=True)
class QuestionResult:
    """The answer to one question."""

    question: str
    answer: str
    """The right one."""
    prediction: str | None
    """The parsed one; None if the text has none."""
    correct: bool
    prompt: str
    texts: list[str]
    """The generated text of each sample; where labels are scored, the most likely label."""
    samples: list[str | None]
    """The answer parsed from each text."""


@dataclass(frozen=True)
class PromptingResult:
    """The result of one run."""

    run: PromptingRun
    answers: list[QuestionResult]
    prompt_tokens: int
    """Of all prompts: of each sample and of the second calls."""
    shared_tokens: int
    """The common prefix of all prompts of the first call, which is computed once."""
    new_tokens: int
    seconds: float


def extraction_prompt(task: Task, prompt: Prompt, reasoning: str) -> Prompt:
    """The second call of zero-shot-cot: the first prompt, its reasoning, and the request for the answer."""
    prefix = f"{prompt.answer_prefix} {reasoning.strip()}\nTherefore, {task.trigger}"
    return replace(prompt, answer_prefix=prefix)


def majority(samples: Sequence[str | None]) -> str | None:
    """The most frequent answer, of ties the first one. None is no answer and has no vote."""
    counts = Counter(sample for sample in samples if sample is not None)
    return counts.most_common(1)[0][0] if counts else None  # ties are in the order of their first occurrence


class Prompter:
    """A model, a prompt builder and the flags of `graft prompt`: answers a task's questions."""

    def __init__(self, model: CausalLM, builder: PromptBuilder, config: PromptConfig) -> None:
        self._model, self._builder, self._config = model, builder, config
        self._task, self._tokenizer = builder.task, builder.tokenizer

    def prompts(self, problems: Sequence[Problem], run: PromptingRun) -> list[Prompt]:
        """The prompt of each question (in zero-shot-cot, of the first call).

        Raises InputError if the task has too few demonstrations, or for few-shot-cot too few with reasoning.
        """
        selected = self._demonstrations(problems, run) if run.few_shot else [[]]
        demos = [tuple((demo.question, self._answer(demo, run)) for demo in own) for own in selected]
        prefix = ""
        if run.style == "zero-shot-cot":
            prefix = STEP_BY_STEP
        elif run.style == "zero-shot" and not self._task.labels:
            prefix = self._task.trigger[:1].upper() + self._task.trigger[1:]
        return [Prompt(demos[n if len(demos) > 1 else 0], p.question, prefix) for n, p in enumerate(problems)]

    def ask(
        self, problems: Sequence[Problem], run: PromptingRun, progress: ProgressCallback | None = None
    ) -> PromptingResult:
        """Ask all questions once.

        Raises InputError for a prompt that leaves no space for an answer in the model's context.
        """
        prompts = self.prompts(problems, run)
        ids = [self._builder.ids(prompt) for prompt in prompts]
        by_score = bool(self._task.labels) and not run.reasoning
        self._check(ids, run, 1 if by_score else self._max_new_tokens(run))
        batching = Batching(self._config.batch_size, progress=progress)
        start = time.perf_counter()
        if by_score:
            texts = self._most_likely_labels(prompts, batching)
            samples: list[str | None] = [normalize_answer(text) for text in texts]
            prompt_tokens, new_tokens, count = sum(map(len, ids)), 0, 1
        else:
            texts, samples, prompt_tokens, new_tokens = self._generated(prompts, ids, run, batching)
            count = self._config.num_samples
        seconds = time.perf_counter() - start
        answers = []
        for n, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
            own = slice(n * count, (n + 1) * count)
            voted, true = majority(samples[own]), normalize_answer(problem.answer)
            text = self._builder.text(prompt)
            answers.append(QuestionResult(problem.question, true, voted, voted == true, text, texts[own], samples[own]))
        shared = common_prefix_length(ids) if len(ids) > 1 else 0
        return PromptingResult(run, answers, prompt_tokens, shared, new_tokens, seconds)

    def _answer(self, demo: Problem, run: PromptingRun) -> str:
        worked = f"{demo.reasoning} {self._task.conclusion.replace(ANSWER, demo.answer)}"
        return worked if run.reasoning else demo.answer

    def _demonstrations(self, problems: Sequence[Problem], run: PromptingRun) -> list[list[Problem]]:
        """One list for all questions, or one for each."""
        config, task = self._config, self._task
        pool = [demo for demo in task.demonstrations if demo.reasoning or not run.reasoning]
        if len(pool) < config.shots:
            what = "demonstrations with reasoning" if run.reasoning else "demonstrations"
            raise InputError(
                f"--shots {config.shots}: task {task.name} has {len(pool)} {what}: ask for fewer, or add some"
            )
        embed = embedder(self._model, self._tokenizer, config.batch_size)
        selection = FewShotConfig(config.shots, config.demo_selection, run.seed, run.permutation)
        texts, labels = [demo.question for demo in pool], [normalize_answer(demo.answer) for demo in pool]
        selected = select_demonstrations(texts, labels, [each.question for each in problems], selection, embed)
        return [[pool[index] for index in indices] for indices in selected]

    def _max_new_tokens(self, run: PromptingRun) -> int:
        return self._config.max_new_tokens or (REASONING_TOKENS if run.reasoning else ANSWER_TOKENS)

    def _check(self, ids: Sequence[Sequence[int]], run: PromptingRun, new_tokens: int) -> None:
        """An InputError for a prompt that leaves too little space for what may follow it, in both calls."""
        if run.style == "zero-shot-cot":
            new_tokens += len(self._tokenizer.encode(f"\nTherefore, {self._task.trigger}")) + ANSWER_TOKENS
        longest, context = max(map(len, ids)), self._model.max_seq_len
        if longest + new_tokens > context:
            flag = f"--shots {self._config.shots}: " if run.few_shot else ""
            raise InputError(
                f"{flag}the longest {run.style} prompt takes {longest:,} tokens and its answer may take {new_tokens}, "
                f"but the model reads at most {context:,}: use fewer or shorter "
                f"{'demonstrations' if run.few_shot else 'questions'}, or less --max_new_tokens"
            )

    def _most_likely_labels(self, prompts: Sequence[Prompt], batching: Batching) -> list[str]:
        """The most likely label of each question, calibrated if the configuration says so."""
        free: list[Prompt] = []
        if self._config.calibrate:
            groups = prompts if len({prompt.demonstrations for prompt in prompts}) > 1 else prompts[:1]
            free = [replace(prompt, question=text) for prompt in groups for text in CONTENT_FREE]
        examples = [self._builder.example(prompt) for prompt in (*prompts, *free)]
        labels = examples[0].label_ids
        scores = np.array(score_labels(self._model, examples, labels, batching).tolist())
        if free:
            bias = scores[len(prompts) :].reshape(-1, len(CONTENT_FREE), len(labels))
            scores = calibrated(scores[: len(prompts)], bias)
        return [self._task.labels[number] for number in scores.argmax(axis=1)]

    def _generated(
        self, prompts: Sequence[Prompt], ids: Sequence[list[int]], run: PromptingRun, batching: Batching
    ) -> tuple[list[str], list[str | None], int, int]:
        """Texts [N·S], the answers parsed from them [N·S], and the numbers of prompt tokens and of new tokens."""
        task, builder, samples = self._task, self._builder, range(self._config.num_samples)
        rows = [row for row in ids for _ in samples]
        params = SamplingParams.from_flags(
            self._config,
            max_new_tokens=self._max_new_tokens(run),
            seed=run.seed,
            stop=builder.stop(prompts[0]),
            stop_token_ids=builder.stop_tokens,
        )
        decode = self._tokenizer.decode
        streams = [TextStream(self._tokenizer, row, params.stop) for row in rows]
        new = generate_ids(self._model, rows, params, streams=streams, batching=batching)
        texts = [truncate_at_stop(decode(own, row), params.stop) for own, row in zip(new, rows, strict=True)]
        prompt_tokens, new_tokens = sum(map(len, rows)), sum(map(len, new))
        if run.style != "zero-shot-cot":
            parse = task.parse_final_answer if run.reasoning else task.first
            return texts, [parse(text) for text in texts], prompt_tokens, new_tokens
        owners = [prompt for prompt in prompts for _ in samples]
        rows = [builder.ids(extraction_prompt(task, prompt, text)) for prompt, text in zip(owners, texts, strict=True)]
        params = SamplingParams(max_new_tokens=ANSWER_TOKENS, stop_token_ids=builder.stop_tokens)
        new = generate_ids(self._model, rows, params, batching=replace(batching, progress=None))
        ends = [truncate_at_stop(decode(own, row), ("\n",)) for own, row in zip(new, rows, strict=True)]
        texts = [f"{text.rstrip()}\nTherefore, {task.trigger}{end}" for text, end in zip(texts, ends, strict=True)]
        prompt_tokens, new_tokens = prompt_tokens + sum(map(len, rows)), new_tokens + sum(map(len, new))
        return texts, [task.first(end) for end in ends], prompt_tokens, new_tokens


# The subcommand -------------------------------------------------------------------------------------------------------


def prompt(
    config: PromptConfig,
    note: Callable[[str], object],
    progress: Callable[[str, int], AbstractContextManager[ProgressCallback]],
) -> dict[str, Any]:
    """Ask a task's questions in each style; returns the JSON object of `graft prompt`.

    Args:
        config: the flags.
        note: prints a line for the user.
        progress: a progress bar, given its title and total; yields a function to call with the number just finished.

    Raises InputError for wrong flags, tasks and files, and see `Prompter.ask`.
    """
    task, notes = load_task(config.task, config.task_seed)
    if config.calibrate and not task.labels:
        raise InputError(f"--calibrate: task {task.name} names no labels whose scores could be calibrated")
    if config.limit > len(task.questions):
        raise InputError(f"--limit {config.limit}: task {task.name} has {len(task.questions)} questions")
    for line in notes:
        note(line)
    problems = task.questions[: config.limit or len(task.questions)]
    loaded = load(config.init_from, config.out_dir, config.checkpoint, config.device, config.dtype, config.base_format)
    builder = PromptBuilder(task, loaded.tokenizer, loaded.chat(config.chat) is not None)
    prompter = Prompter(loaded.model, builder, config)
    styles = STYLES if config.style == "all" else (config.style,)
    result: dict[str, Any] = {
        "task": task.name,
        "model": loaded.name,
        "chat": builder.chat is not None,
        "shots": config.shots,
        "demo_selection": config.demo_selection,
        "num_samples": config.num_samples,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    if config.show_prompts:
        return {**result, "prompts": {style: _prompts(prompter, builder, problems, style) for style in styles}}
    result["styles"], rows = {}, []
    for style in styles:
        runs = []
        for run in distinct_runs(style, config):
            with progress(style, config.num_samples * len(problems)) as done:
                runs.append(prompter.ask(problems, run, done))
        result["styles"][style] = summary(runs)
        rows += prediction_rows(runs)
    if config.predictions:
        write_text(Path(config.predictions), "".join(json.dumps(row) + "\n" for row in rows))
    if len(problems) <= MAX_SHOWN:
        result["answers"] = [row for row in rows if (row["seed"], row["order"]) == (config.seed, 0)]
    return result


def _prompts(prompter: Prompter, builder: PromptBuilder, problems: Sequence[Problem], style: Style) -> list[str]:
    """The texts of a style's prompts; of zero-shot-cot those of the second call too."""
    prompts = prompter.prompts(problems, PromptingRun(style, 0))
    if style == "zero-shot-cot":
        prompts += [extraction_prompt(builder.task, first, "[output of the first call]") for first in prompts]
    return [builder.text(each) for each in prompts]


def distinct_runs(style: Style, config: PromptConfig) -> list[PromptingRun]:
    """The runs of --seeds and --num_permutations, without those that would repeat another exactly."""
    few_shot = style.startswith("few-shot")
    random = config.temperature > 0 or (few_shot and config.demo_selection in ("random", "balanced"))
    seeds = range(config.seed, config.seed + (config.seeds if random else 1))
    permutations = range(config.num_permutations if few_shot and config.shots > 1 else 1)
    return [PromptingRun(style, seed, permutation) for seed in seeds for permutation in permutations]


def summary(runs: Sequence[PromptingResult]) -> dict[str, Any]:
    """The JSON object of a style: the first run's accuracy with its 95% Wilson interval, and those of all runs."""
    first = runs[0]
    n = len(first.answers)
    correct = [sum(answer.correct for answer in result.answers) for result in runs]
    accuracies = [count / n for count in correct]
    low, high = wilson(correct[0], n)
    return {
        "n": n,
        "accuracy": accuracies[0],
        "ci_low": low,
        "ci_high": high,
        "unparsed_rate": sum(answer.prediction is None for answer in first.answers) / n,
        "prompt_tokens": first.prompt_tokens / n,
        "shared_prompt_tokens": first.shared_tokens,
        "new_tokens": first.new_tokens / n,
        "seconds_per_answer": first.seconds / n,
        "mean": sum(accuracies) / len(accuracies),
        "min": min(accuracies),
        "max": max(accuracies),
        "runs": [{**result.run.ids, "accuracy": a} for result, a in zip(runs, accuracies, strict=True)],
    }


def prediction_rows(runs: Sequence[PromptingResult]) -> list[dict[str, Any]]:
    """The rows of `--predictions`: one per answer of each run."""
    return [{"style": each.run.style, **each.run.ids, **asdict(a)} for each in runs for a in each.answers]
