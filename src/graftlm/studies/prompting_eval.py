"""One task in several styles of prompting beside each other, each in every order and seed asked for: `graft prompt`.

What is unusual here: a style's accuracy is its first run's, with the interval over questions; the mean, the least and
the largest over all orders and seeds stand beside it, so that no lucky order of demonstrations passes for the method.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graftlm.config import PromptConfig, Style
from graftlm.errors import InputError
from graftlm.exchange.load import load
from graftlm.files.atomic import write_text
from graftlm.inference.generate import ProgressCallback
from graftlm.inference.metrics import wilson
from graftlm.inference.prompting import (
    PromptBuilder,
    Prompter,
    PromptingConfig,
    PromptingResult,
    PromptingRun,
    extraction_prompt,
)
from graftlm.inference.sampling import SamplingParams
from graftlm.text.tasks import Task, load_task
from graftlm.text.tokenizer import Tokenizer

STYLES: tuple[Style, ...] = ("few-shot", "few-shot-cot", "zero-shot-cot")
"""What `--style all` means."""
SHOWN = 3
"""So many questions are answered in full on the screen; of more there is only the table."""

Run = tuple[int, int, PromptingResult]
"""(seed, order, what came of it)."""


def prompt(
    config: PromptConfig,
    note: Callable[[str], object],
    progress: Callable[[str, int], AbstractContextManager[ProgressCallback]],
) -> dict[str, Any]:
    """Ask a task's questions in each style; the JSON object of `graft prompt`.

    note is called with lines for people; progress(what, total) gives what to call with the number just finished.
    Raises InputError for wrong flags, tasks and files; see `prompting.ask` for the rest.
    """
    task, about = load_task(config.task, config.task_seed)
    _check(config, task)
    for line in about:
        note(line)
    problems = task.questions[: config.limit or len(task.questions)]
    loaded = load(config.init_from, config.out_dir, config.checkpoint, config.device, config.dtype)
    writer = PromptBuilder(task, loaded.tokenizer, _in_chat(config, loaded.tokenizer, loaded.run is not None))
    how = PromptingConfig(
        shots=config.shots,
        demo_selection=config.demo_selection,
        num_samples=config.num_samples,
        params=SamplingParams.from_flags(config),
        calibrate=config.calibrate,
        batch_size=config.batch_size,
    )
    prompter = Prompter(loaded.model, writer, how)
    styles = STYLES if config.style == "all" else (config.style,)
    result: dict[str, Any] = {
        "task": task.name,
        "model": loaded.name,
        "chat": writer.chat is not None,
        "shots": config.shots,
        "choose": config.demo_selection,
        "samples": config.num_samples,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    if config.show_prompts:
        shown = {}
        for style in styles:
            found = prompter.prompts(problems, PromptingRun(style, config.seed))
            if style == "zero-shot-cot":
                found += [extraction_prompt(task, each, "[what the first call gives]") for each in found]
            shown[style] = [writer.text(each) for each in found]
        return {**result, "prompts": shown}
    result["styles"], rows = {}, []
    for style in styles:
        runs: list[Run] = []
        for seed, order in runs_of(style, how, config.seed, config.seeds, config.num_permutations):
            with progress(style, how.num_samples * len(problems)) as done:
                outcome = prompter.ask(problems, PromptingRun(style, seed, order), done)
            runs.append((seed, order, outcome))
        result["styles"][style] = summary(runs)
        rows += prediction_rows(style, runs)
    if config.predictions:
        write_text(Path(config.predictions), "".join(json.dumps(row) + "\n" for row in rows))
    if len(problems) <= SHOWN:
        result["answers"] = [row for row in rows if (row["seed"], row["order"]) == (config.seed, 0)]
    return result


def _check(config: PromptConfig, task: Task) -> None:
    if config.calibrate and not task.labels:
        raise InputError(f"--calibrate: task {task.name} names no labels whose scores could be calibrated")
    if config.limit > len(task.questions):
        raise InputError(f"--limit {config.limit}: task {task.name} has {len(task.questions)} questions")


def _in_chat(config: PromptConfig, tokenizer: Tokenizer, run: bool) -> bool:
    """auto: where the model has a chat template, and was not since adapted to prompts of plain text."""
    if config.chat == "on" and tokenizer.chat_template is None:
        raise InputError(f"--chat on: {config.init_from} has no chat template; use --chat off")
    return config.chat == "on" or (config.chat == "auto" and tokenizer.chat_template is not None and not run)


def runs_of(style: Style, how: PromptingConfig, seed: int, seeds: int, orders: int) -> list[tuple[int, int]]:
    """(seed, order) of each run that can differ from the others: a seed changes nothing where nothing is drawn."""
    drawn = how.params.temperature > 0 or (
        style.startswith("few-shot") and how.demo_selection in ("random", "balanced")
    )
    ordered = style.startswith("few-shot") and how.shots > 1
    return [(seed + s, o) for s in range(seeds if drawn else 1) for o in range(orders if ordered else 1)]


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The JSON object of a style: the first run's accuracy with its 95% Wilson interval, and every run's beside it."""
    first = runs[0][2]
    n = len(first.answers)
    right = sum(answer.correct for answer in first.answers)
    low, high = wilson(right, n)
    every = [sum(answer.correct for answer in outcome.answers) / n for _, _, outcome in runs]
    return {
        "n": n,
        "accuracy": right / n,
        "ci_low": low,
        "ci_high": high,
        "unparsed_rate": sum(answer.prediction is None for answer in first.answers) / n,
        "prompt_tokens": first.prompt_tokens / n,
        "shared_prompt_tokens": first.shared_tokens,
        "new_tokens": first.new_tokens / n,
        "seconds_per_answer": first.seconds / n,
        "mean": sum(every) / len(every),
        "min": min(every),
        "max": max(every),
        "runs": [{"seed": s, "order": o, "accuracy": a} for (s, o, _), a in zip(runs, every, strict=True)],
    }


def prediction_rows(style: Style, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What `--predictions` writes: a row for each answer of each run."""
    return [{"style": style, "seed": s, "order": o, **asdict(a)} for s, o, outcome in runs for a in outcome.answers]
