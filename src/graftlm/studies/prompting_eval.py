"""`graft prompt`: accuracy of prompting styles on a task, over orders of the demonstrations and seeds.

A style's accuracy, with its interval over questions, is that of its first run. The mean, the minimum and the maximum
over all runs are reported with it, since a single order of demonstrations can be lucky.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graftlm.config import PromptConfig, Style
from graftlm.errors import InputError
from graftlm.exchange.load import ModelBundle, load
from graftlm.files.atomic import write_text
from graftlm.inference.generate import ProgressCallback
from graftlm.inference.metrics import wilson
from graftlm.inference.prompting import (
    PromptBuilder,
    Prompter,
    PromptingResult,
    PromptingRun,
    extraction_prompt,
)
from graftlm.text.tasks import Problem, load_task

STYLES: tuple[Style, ...] = ("few-shot", "few-shot-cot", "zero-shot-cot")
"""The styles of `--style all`."""
MAX_SHOWN = 3
"""Up to this many questions are shown with their answers."""

Runs = Sequence[tuple[PromptingRun, PromptingResult]]


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
    loaded = load(config.init_from, config.out_dir, config.checkpoint, config.device, config.dtype)
    builder = PromptBuilder(task, loaded.tokenizer, _use_chat(config, loaded))
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
                runs.append((run, prompter.ask(problems, run, done)))
        result["styles"][style] = summary(runs)
        rows += prediction_rows(runs)
    if config.predictions:
        write_text(Path(config.predictions), "".join(json.dumps(row) + "\n" for row in rows))
    if len(problems) <= MAX_SHOWN:
        result["answers"] = [row for row in rows if (row["seed"], row["order"]) == (config.seed, 0)]
    return result


def _use_chat(config: PromptConfig, loaded: ModelBundle) -> bool:
    """auto: if the model has a chat template and was not fine-tuned on plain text since."""
    has_template = loaded.tokenizer.chat_template is not None
    if config.chat == "on" and not has_template:
        raise InputError(f"--chat on: {config.init_from} has no chat template; use --chat off")
    return config.chat == "on" or (config.chat == "auto" and has_template and loaded.run is None)


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


def summary(runs: Runs) -> dict[str, Any]:
    """The JSON object of a style: the first run's accuracy with its 95% Wilson interval, and those of all runs."""
    first = runs[0][1]
    n = len(first.answers)
    correct = [sum(answer.correct for answer in result.answers) for _, result in runs]
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
        "runs": [{**_ids(run), "accuracy": a} for (run, _), a in zip(runs, accuracies, strict=True)],
    }


def _ids(run: PromptingRun) -> dict[str, int]:
    return {"seed": run.seed, "order": run.permutation}


def prediction_rows(runs: Runs) -> list[dict[str, Any]]:
    """The rows of `--predictions`: one per answer of each run."""
    return [{"style": run.style, **_ids(run), **asdict(a)} for run, result in runs for a in result.answers]
