"""The verbs of `graft`: for each its flags, the one call it makes, and how its result is shown to people.

Each handler reads its config, writes notes and progress to the given console (standard error) and returns its JSON
object. What is unusual here: everything heavy is imported inside the handler that needs it, so that `graft --help`
answers before torch could even be found on the disk. A verb whose result is there before its work is done (`serve`)
yields it.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftlm import process, render
from graftlm.config import (
    AccountConfig,
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    FetchConfig,
    GenerateConfig,
    ImportConfig,
    PreferConfig,
    PromptConfig,
    ReportConfig,
    ServeConfig,
    TrainConfig,
)
from graftlm.errors import InputError
from graftlm.flags import Parsed

if TYPE_CHECKING:
    from rich.console import Console

    from graftlm.exchange.load import Loaded
    from graftlm.inference.evaluate import Reader
    from graftlm.text.data import Example
    from graftlm.text.template import Template

Result = dict[str, Any]


def _train(parsed: Parsed, notes: "Console") -> Result:
    from graftlm.training.train import train

    return train(parsed.config, given=parsed.given, console=notes, started=process.BEGAN)


def _evaluate(parsed: Parsed, notes: "Console") -> Result:
    if not parsed.config.ray:
        return _evaluate_by(None, parsed.config, notes)
    from graftlm.studies.cluster import connected
    from graftlm.studies.cluster_copies import copies

    with connected(parsed.config, parsed.every.debug) as cluster:
        return _evaluate_by(lambda loaded: copies(cluster, parsed.config, loaded), parsed.config, notes)


def _evaluate_by(reader_of: Callable[["Loaded"], "Reader"] | None, config: EvaluateConfig, notes: "Console") -> Result:
    """The evaluation by what is loaded here, or by a reader made of it, such as its copies on a cluster."""
    from graftlm.exchange.load import load
    from graftlm.inference.evaluate import evaluate, write_predictions
    from graftlm.text.data import common_prefix

    loaded = load(config.init_from, config.out_dir, config.checkpoint, config.device, config.dtype)
    template, examples, content_free = _examples(loaded, config, notes)
    readings = 2 if config.read == "both" else 1
    with render.progress(notes, "evaluate", readings * len(examples)) as progress:
        evaluation = evaluate(
            loaded.model,
            loaded.tokenizer,
            template,
            examples,
            read=config.read,
            batch_size=config.batch_size,
            content_free=content_free,
            reader=reader_of(loaded) if reader_of else None,
            progress=progress,
        )
    if config.predictions:
        write_predictions(config.predictions, evaluation)
    prompts = [example.prompt_ids for example in examples]
    return {
        **evaluation.to_json(),
        "labels": list(template.labels),
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "shared_prompt_tokens": common_prefix(prompts) if len(prompts) > 1 else 0,
    }


def _generate(parsed: Parsed, notes: "Console") -> Result:
    from graftlm.exchange.load import load

    config: GenerateConfig = parsed.config
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    loaded = load(config.init_from, config.out_dir, config.checkpoint, config.device, config.dtype)
    return _classify(loaded, config, notes) if prompt is None else _continue(loaded, config, prompt)


def _continue(loaded: "Loaded", config: GenerateConfig, prompt: str) -> Result:
    from graftlm.inference.generate import generate
    from graftlm.text.chat import Chat

    learned_chat = bool((loaded.run or {}).get("data", {}).get("chat"))
    speaks = config.chat == "on" or (config.chat == "auto" and learned_chat)
    if speaks and loaded.tokenizer.chat_template is None:
        raise InputError(f"--chat {config.chat}: {loaded.name} has no chat template; use --chat off")
    texts = generate(
        loaded.model,
        loaded.tokenizer,
        [prompt] * config.num_samples,
        chat=Chat(loaded.tokenizer) if speaks else None,
        max_new_tokens=config.max_new_tokens or 64,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    return {"prompt": prompt, "texts": texts}


def _classify(loaded: "Loaded", config: GenerateConfig, notes: "Console") -> Result:
    """What the course handout's generate.py does: the test split by generation, with the given sampling."""
    import time

    from graftlm.inference.evaluate import answer_length, read_label
    from graftlm.inference.generate import generate_ids
    from graftlm.inference.statistics import Reading

    template, examples, _ = _examples(loaded, EvaluateConfig(data=config.data, limit=config.limit), notes)
    start = time.perf_counter()
    with render.progress(notes, "classify", len(examples)) as progress:
        new = generate_ids(
            loaded.model,
            [example.prompt_ids for example in examples],
            max_new_tokens=config.max_new_tokens or answer_length(template, loaded.tokenizer),
            eot=loaded.tokenizer.eot,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            batch_size=config.batch_size,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    predicted = [read_label(loaded.tokenizer.decode(ids), template.labels) for ids in new]
    true = [example.label for example in examples if example.label is not None]
    if len(true) < len(predicted):
        raise InputError("--data: a row has no label, so there is no accuracy; give --prompt to generate text")
    reading = Reading.make("generate", true, predicted, len(template.labels), seconds)
    return {**reading.to_json(), "labels": list(template.labels)}


def _examples(
    loaded: "Loaded", config: EvaluateConfig, notes: "Console"
) -> tuple["Template", list["Example"], list[list["Example"]]]:
    """What to read, as the flags say, else as the run says that is being read, else the defaults.

    Template, examples, and the inputs without content that calibrate them (none unless asked for).
    """
    from graftlm.inference.demonstrations import few_shot
    from graftlm.text.data import load_dataset, sample
    from graftlm.text.template import load_template

    run: Result = (loaded.run or {}).get("config", {})
    template = loaded.template
    if template is None or config.template or config.labels:
        template = load_template(
            config.template or run.get("template", TrainConfig.template),
            config.labels or run.get("labels", TrainConfig.labels),
        )
    names = ("data", "val", "test", "text_field", "label_field")
    source = {name: getattr(config, name) for name in names}
    if not config.data:
        source |= {name: run.get(name, getattr(TrainConfig, name)) for name in names}
    dataset = load_dataset(**source, labels=template.labels)
    for note in dataset.notes:
        notes.print(note, soft_wrap=True)
    rows = dataset.splits.get(config.split, [])
    if not rows:
        raise InputError(
            f"--split {config.split}: {dataset.name} has no such split; it has {', '.join(dataset.splits)}"
        )
    # A run's own length holds for its prompts, which have no demonstrations before them.
    max_length = config.max_length or (0 if config.shots else run.get("max_length")) or loaded.model.room
    asked = few_shot(
        loaded.model,
        loaded.tokenizer,
        template,
        sample(rows, config.limit),
        dataset.splits.get("train", []) if config.shots else [],
        shots=config.shots,
        how=config.choose,
        seed=config.seed,
        max_length=max_length,
        calibrate=config.calibrate,
        batch_size=config.batch_size,
    )
    if asked.cut:
        notes.print(f"{asked.cut} of {len(asked.examples)} texts were cut to fit {max_length} tokens", soft_wrap=True)
    return template, asked.examples, asked.content_free


def _prompt(parsed: Parsed, notes: "Console") -> Result:
    from graftlm.studies.styles import prompt

    return prompt(
        parsed.config, lambda line: notes.print(line, markup=False), lambda what, n: render.progress(notes, what, n)
    )


def _prefer(parsed: Parsed, notes: "Console") -> Result:
    from graftlm.inference.prefer import prefer

    return prefer(
        parsed.config,
        lambda line: notes.print(line, markup=False),
        lambda what, total: render.progress(notes, what, total),
    )


def _compare(parsed: Parsed, notes: "Console") -> Result:
    from graftlm.studies.compare import compare

    return compare(parsed.config, parsed.every.config, notes, parsed.every.debug)


def _report(parsed: Parsed, notes: "Console") -> Result:
    from graftlm.studies.report import report

    return report(parsed.config)


def _account(parsed: Parsed, notes: "Console") -> Result:
    from graftlm.studies.account import account

    return account(parsed.config, parsed.given)


def _export(parsed: Parsed, notes: "Console") -> Result:
    from graftlm.exchange.exporting import export

    return export(parsed.config, lambda line: notes.print(line, markup=False))


def _import(parsed: Parsed, notes: "Console") -> Result:
    from graftlm.exchange.importing import import_adapter

    return import_adapter(parsed.config, lambda line: notes.print(line, markup=False))


def _serve(parsed: Parsed, notes: "Console") -> Iterator[Result]:
    from graftlm.serving.server import serve

    return serve(parsed.config, lambda line: notes.print(line, markup=False))


def _fetch(parsed: Parsed, notes: "Console") -> Result:
    from graftlm.files.assets import fetch

    return {"name": parsed.config.name, "path": str(fetch(parsed.config.name))}


@dataclass(frozen=True)
class Verb:
    """One row of the table: what its flags are, what it calls, and how its result is shown to people."""

    config: type
    run: Callable[[Parsed, "Console"], Result | Iterator[Result]]
    show: Callable[["Console", Result], None]
    positional: str = ""
    """The field that may be given as a word without dashes, or as several where it takes several."""
    computes: bool = True
    """Whether it will work with large tensors."""

    @property
    def summary(self) -> str:
        """The first line of the config's docstring."""
        return (self.config.__doc__ or "").partition("\n")[0]


VERBS = {
    "train": Verb(TrainConfig, _train, render.train),
    "generate": Verb(GenerateConfig, _generate, render.generate),
    "evaluate": Verb(EvaluateConfig, _evaluate, render.evaluate),
    "prompt": Verb(PromptConfig, _prompt, render.prompt),
    "prefer": Verb(PreferConfig, _prefer, render.prefer, positional="prompts"),
    "compare": Verb(CompareConfig, _compare, render.compare, computes=False),
    "report": Verb(ReportConfig, _report, render.report, positional="folders", computes=False),
    "serve": Verb(ServeConfig, _serve, render.serve, positional="adapters"),
    "account": Verb(AccountConfig, _account, render.account, computes=False),
    "export": Verb(ExportConfig, _export, render.exchanged),
    "import": Verb(ImportConfig, _import, render.exchanged, positional="folder"),
    "fetch": Verb(FetchConfig, _fetch, render.fetch, positional="name", computes=False),
}
