"""The subcommands of `graft`: each is a config (its flags), a handler and a printer for its result.

A handler writes notes and progress to the given console (stderr) and returns its JSON object. A handler whose result is
known before its work is done (`serve`) yields it. Heavy imports are inside the handlers, so that `graft --help` answers
at once.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from graftlm import process
from graftlm.cli import display
from graftlm.cli.parser import ParsedArgs, parse
from graftlm.config import (
    CompareConfig,
    DownloadConfig,
    EstimateConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    PairsConfig,
    PromptConfig,
    ReportConfig,
    ServeConfig,
    TrainConfig,
    parse_columns,
)
from graftlm.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from graftlm.exchange.load import ModelBundle
    from graftlm.inference.evaluate import Predictor
    from graftlm.text.collate import Example
    from graftlm.text.template import Template

Result = dict[str, Any]
DATA_FLAGS = ("data", "val_data", "test_data", "columns")


def _train(parsed: ParsedArgs, notes: "Console") -> Result:
    from graftlm.training.train import train

    return train(parsed.config, given=parsed.explicit, console=notes, started=process.BEGAN)


def _evaluate(parsed: ParsedArgs, notes: "Console") -> Result:
    if not parsed.config.ray:
        return _evaluate_by(None, parsed.config, notes)
    from graftlm.studies.ray_cluster import connected, ray_predictor

    with connected(parsed.config, _ray_log_level(parsed)) as cluster:
        return _evaluate_by(lambda loaded: ray_predictor(cluster, parsed.config, loaded), parsed.config, notes)


def _ray_log_level(parsed: ParsedArgs) -> str:
    return "INFO" if parsed.common.debug else "ERROR"


def _evaluate_by(
    reader_of: Callable[["ModelBundle"], "Predictor"] | None, config: EvaluateConfig, notes: "Console"
) -> Result:
    """The evaluation by what is loaded here, or by a reader made of it, such as its copies on a cluster."""
    from graftlm.exchange.load import load
    from graftlm.inference.evaluate import evaluate, write_predictions
    from graftlm.text.collate import common_prefix_length

    loaded = load(config.init_from, config.out_dir, config.checkpoint, config.device, config.dtype)
    template, examples, content_free = _examples(loaded, config, notes)
    readings = 2 if config.mode == "both" else 1
    with display.progress(notes, "evaluate", readings * len(examples)) as progress:
        evaluation = evaluate(
            loaded.model,
            loaded.tokenizer,
            template,
            examples,
            mode=config.mode,
            batch_size=config.batch_size,
            content_free=content_free,
            predictor=reader_of(loaded) if reader_of else None,
            progress=progress,
        )
    if config.predictions:
        write_predictions(config.predictions, evaluation)
    prompts = [example.prompt_ids for example in examples]
    return {
        **evaluation.to_json(),
        "labels": list(template.labels),
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "shared_prompt_tokens": common_prefix_length(prompts) if len(prompts) > 1 else 0,
    }


def _generate(parsed: ParsedArgs, notes: "Console") -> Result:
    from graftlm.exchange.load import load

    config: GenerateConfig = parsed.config
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    loaded = load(config.init_from, config.out_dir, config.checkpoint, config.device, config.dtype)
    return _classify(loaded, config, notes) if prompt is None else _continue(loaded, config, prompt)


def _continue(loaded: "ModelBundle", config: GenerateConfig, prompt: str) -> Result:
    from graftlm.inference.generate import generate
    from graftlm.inference.sampling import SamplingParams
    from graftlm.text.chat import Chat

    learned_chat = bool((loaded.run or {}).get("data", {}).get("chat"))
    speaks = config.chat == "on" or (config.chat == "auto" and learned_chat)
    if speaks and loaded.tokenizer.chat_template is None:
        raise InputError(f"--chat {config.chat}: {loaded.name} has no chat template; use --chat off")
    texts = generate(
        loaded.model,
        loaded.tokenizer,
        [prompt] * config.num_samples,
        SamplingParams.from_flags(config),
        chat=Chat(loaded.tokenizer) if speaks else None,
        batch_size=config.batch_size,
    )
    return {"prompt": prompt, "texts": texts}


def _classify(loaded: "ModelBundle", config: GenerateConfig, notes: "Console") -> Result:
    """What the course handout's generate.py does: the test split by generation, with the given sampling."""
    from graftlm.inference.evaluate import evaluate
    from graftlm.inference.sampling import SamplingParams

    template, examples, _ = _examples(loaded, EvaluateConfig(data=config.data, limit=config.limit), notes)
    if any(example.label is None for example in examples):
        raise InputError("--data: a row has no label, so there is no accuracy; give --prompt to generate text")
    with display.progress(notes, "classify", len(examples)) as progress:
        evaluation = evaluate(
            loaded.model,
            loaded.tokenizer,
            template,
            examples,
            mode="generate",
            params=SamplingParams.from_flags(config),
            batch_size=config.batch_size,
            progress=progress,
        )
    return {**evaluation.to_json(), "labels": list(template.labels)}


def _examples(
    loaded: "ModelBundle", config: EvaluateConfig, notes: "Console"
) -> tuple["Template", list["Example"], list[list["Example"]]]:
    """What to read, as the flags say, else as the run says that is being read, else the defaults.

    Template, examples, and the inputs without content that calibrate them (none unless asked for).
    """
    from graftlm.inference.fewshot import FewShotConfig, build_fewshot
    from graftlm.text.collate import subset
    from graftlm.text.dataset import load_dataset
    from graftlm.text.template import load_template

    run: Result = (loaded.run or {}).get("config", {})
    template = loaded.template
    if template is None or config.template or config.labels:
        template = load_template(
            config.template or run.get("template", TrainConfig.template),
            config.labels or run.get("labels", TrainConfig.labels),
        )
    source = config if config.data else TrainConfig(**{f: run[f] for f in DATA_FLAGS if f in run})
    dataset = load_dataset(
        source.data, source.val_data, source.test_data, parse_columns(source.columns), template.labels
    )
    for note in dataset.notes:
        notes.print(note, soft_wrap=True)
    rows = dataset.splits.get(config.split, [])
    if not rows:
        raise InputError(
            f"--split {config.split}: {dataset.name} has no such split; it has {', '.join(dataset.splits)}"
        )
    # A run's own length holds for its prompts, which have no demonstrations before them.
    max_length = config.max_length or (0 if config.shots else run.get("max_length")) or loaded.model.max_seq_len
    asked = build_fewshot(
        loaded.model,
        loaded.tokenizer,
        template,
        subset(rows, config.limit),
        dataset.splits.get("train", []) if config.shots else [],
        FewShotConfig(
            shots=config.shots,
            selection=config.demo_selection,
            seed=config.seed,
            max_length=max_length,
            calibrate=config.calibrate,
            batch_size=config.batch_size,
        ),
    )
    if asked.truncated:
        notes.print(
            f"{asked.truncated} of {len(asked.examples)} texts were cut to fit {max_length} tokens", soft_wrap=True
        )
    return template, asked.examples, asked.content_free


def _prompt(parsed: ParsedArgs, notes: "Console") -> Result:
    from graftlm.inference.prompting import prompt

    return prompt(
        parsed.config, lambda line: notes.print(line, markup=False), lambda what, n: display.progress(notes, what, n)
    )


def _pairs(parsed: ParsedArgs, notes: "Console") -> Result:
    from graftlm.inference.pairs import make_preferences

    return make_preferences(
        parsed.config,
        lambda line: notes.print(line, markup=False),
        lambda what, total: display.progress(notes, what, total),
    )


def _compare(parsed: ParsedArgs, notes: "Console") -> Result:
    from graftlm.studies.compare import compare

    return compare(parsed.config, parsed.common.config, notes, _ray_log_level(parsed))


def _report(parsed: ParsedArgs, notes: "Console") -> Result:
    from graftlm.studies.report import report

    return report(parsed.config)


def _estimate(parsed: ParsedArgs, notes: "Console") -> Result:
    from graftlm.studies.cost_report import estimate

    return estimate(parsed.config, parsed.explicit)


def _export(parsed: ParsedArgs, notes: "Console") -> Result:
    from graftlm.exchange.export import export

    return export(parsed.config, lambda line: notes.print(line, markup=False))


def _import(parsed: ParsedArgs, notes: "Console") -> Result:
    from graftlm.exchange.import_adapter import import_adapter

    return import_adapter(parsed.config, lambda line: notes.print(line, markup=False))


def _serve(parsed: ParsedArgs, notes: "Console") -> Iterator[Result]:
    from graftlm.serving.server import serve

    return serve(parsed.config, lambda line: notes.print(line, markup=False))


def _download(parsed: ParsedArgs, notes: "Console") -> Result:
    from graftlm.files.assets import download

    return {"name": parsed.config.name, "path": str(download(parsed.config.name))}


# The table ------------------------------------------------------------------------------------------------------------


def _methods_help(words: Sequence[str]) -> str:
    """The methods for the help page: with --method its flags and defaults, else a line for each, without torch."""
    with suppress(InputError):
        parsed = parse("train", TrainConfig, [word for word in words if word not in ("-h", "--help")])
        if "method" in parsed.explicit:
            from graftlm.methods import describe

            return describe(parsed.config.method)
    lines = ["methods (graft train --method NAME --help shows one with its defaults):"]
    for file in sorted(Path(__file__).parents[1].glob("methods/*.py")):
        text = file.read_text(encoding="utf-8")
        if "    name: ClassVar[str] = " in text:  # a method's file; its docstring begins with what the method is
            title = text.removeprefix('"""').partition("\n")[0]
            lines.append(fill(f"{file.stem:<8} {title}", 78, initial_indent="  ", subsequent_indent=" " * 11))
    return "\n".join(lines)


@dataclass(frozen=True)
class Command:
    """A subcommand: its flags, what runs it, and how its result is printed."""

    config: type
    run: Callable[[ParsedArgs, "Console"], Result | Iterator[Result]]
    print_result: Callable[["Console", Result], None]
    positional: str = ""
    """The field that a word without dashes sets; several words where the field holds several."""
    uses_tensors: bool = True
    """Whether it works with large tensors, so that the allocator should be tuned for them."""
    epilog: Callable[[Sequence[str]], str] = lambda words: ""
    """The end of its help page, by the words of the command line."""

    @property
    def summary(self) -> str:
        """The first line of the config's docstring."""
        return (self.config.__doc__ or "").partition("\n")[0]


COMMANDS = {
    "train": Command(TrainConfig, _train, display.train, epilog=_methods_help),
    "generate": Command(GenerateConfig, _generate, display.generate, positional="out_dir"),
    "evaluate": Command(EvaluateConfig, _evaluate, display.evaluate, positional="out_dir"),
    "prompt": Command(PromptConfig, _prompt, display.prompt),
    "pairs": Command(PairsConfig, _pairs, display.pairs, positional="prompts"),
    "compare": Command(CompareConfig, _compare, display.compare, uses_tensors=False),
    "report": Command(ReportConfig, _report, display.path, positional="folders", uses_tensors=False),
    "serve": Command(ServeConfig, _serve, display.serve, positional="adapters"),
    "estimate": Command(EstimateConfig, _estimate, display.estimate, uses_tensors=False, epilog=_methods_help),
    "export": Command(ExportConfig, _export, display.export, positional="out_dir"),
    "import": Command(ImportConfig, _import, display.export, positional="folder"),
    "download": Command(DownloadConfig, _download, display.path, positional="name", uses_tensors=False),
}
