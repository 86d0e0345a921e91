"""The handlers of `graft evaluate` and `graft generate`: load what the flags name, read the data, run it."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.cli import display
from graftlm.config import EvaluateConfig, GenerateConfig, TrainConfig
from graftlm.config.inference import RayFlags
from graftlm.errors import GraftError, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from graftlm.config.flags import ParsedArgs
    from graftlm.exchange.load import ModelBundle
    from graftlm.exchange.runs import RunCheckpoint
    from graftlm.inference.evaluate import EvaluationOptions, Predictor
    from graftlm.inference.metrics import MetricFunctions
    from graftlm.text.bad_rows import BadRowsFlag
    from graftlm.text.collate import Example
    from graftlm.text.fields import Columns
    from graftlm.text.records import Document, Record
    from graftlm.text.template import Template

Result = dict[str, Any]
Source = tuple[str, str, str, "Columns"]
"""data, val, test and columns of `load_dataset`."""
Read = tuple["Template", "Sequence[Record]", "Sequence[Record]"]
"""A template, the rows to evaluate, and the train split."""
LABEL_FLAGS = ("mode", "shots", "demo_selection", "seed", "calibrate", "predictions", "template", "labels", "ray")
"""Flags that evaluate labels, and not documents."""
DATA_FLAGS = ("data", "val_data", "test_data", "bad_rows")
NOT_SETTINGS = {"init_from", "out_dir", "batch_size", "device", "predictions", *(f.name for f in fields(RayFlags))}
"""Flags of `graft evaluate` that do not change its result."""


def evaluate(
    parsed: "ParsedArgs", notes: "Console", model: "ModelBundle | None" = None, metrics: "MetricFunctions | None" = None
) -> Result:
    """`graft evaluate`, with --ray by copies of the model on a cluster.

    model: a loaded one, instead of the one that the flags name; its results are not saved, as it may have changed since
    it was loaded. metrics: see EvaluationOptions.
    """
    from graftlm.inference.evaluate import EvaluationOptions

    options = EvaluationOptions(metrics=metrics or {})
    if model is not None:
        return _evaluate(model, options, parsed, notes)[0]
    check_run_flags(parsed, notes)
    with _cluster(parsed) as predictor_of:
        loaded = _load(parsed.config)
        if predictor_of is not None:
            options = replace(options, predictor=predictor_of(loaded))
        result, rows = _evaluate(loaded, options, parsed, notes)
    return result | _save(loaded, parsed.config, (result, rows), notes)


@contextmanager
def _cluster(parsed: "ParsedArgs") -> Iterator[Callable[["ModelBundle"], "Predictor"] | None]:
    """Makes a predictor of a model's copies on a cluster; None without --ray."""
    if not parsed.config.ray:
        yield None
        return
    from graftlm.studies.ray_cluster import connected, ray_predictor

    with connected(parsed.config, ray_log_level(parsed)) as cluster:
        yield lambda loaded: ray_predictor(cluster, parsed.config, loaded)


def _load(config: EvaluateConfig | GenerateConfig) -> "ModelBundle":
    """The model that the flags name."""
    from graftlm.exchange.load import load

    return load(config.init_from, config.out_dir, config.checkpoint, config.device, config.dtype, config.base_format)


def check_run_flags(parsed: "ParsedArgs", notes: "Console") -> Any:
    """The config, in which --out_dir alone names the run to read, for any default of --init_from.

    Prints a note for flags of a run that are not read. Raises InputError for two runs.
    """
    from graftlm.exchange.runs import RESUME, find_run

    if "out_dir" in parsed.explicit and "init_from" not in parsed.explicit:
        return replace(parsed.config, init_from=RESUME)
    init_from, out_dir = parsed.config.init_from, parsed.config.out_dir
    run = find_run(init_from, out_dir, parsed.config.checkpoint)
    given = parsed.explicit.intersection(("out_dir", "checkpoint")) if init_from != RESUME else frozenset()
    if run is not None:
        if "out_dir" in given and Path(out_dir).resolve() != run.folder.resolve():
            raise InputError(f"--init_from {init_from} and --out_dir {out_dir}: name two runs: leave one of them out")
        is_checkpoint = Path(init_from).absolute() != run.folder.absolute()
        given = given.intersection(("checkpoint",) if is_checkpoint else ())
    for flag in sorted(given):
        line = f"--{flag} {getattr(parsed.config, flag)}: is not read, as --init_from is {init_from}"
        notes.print(line, markup=False)
    return parsed.config


def ray_log_level(parsed: "ParsedArgs") -> str:
    """How much a Ray cluster prints."""
    return "INFO" if parsed.common.debug else "ERROR"


def _evaluate(
    loaded: "ModelBundle", options: "EvaluationOptions", parsed: "ParsedArgs", notes: "Console"
) -> tuple[Result, list[Result]]:
    """The result of a loaded model, and a row for each example; writes --predictions."""
    from graftlm.inference.evaluate import evaluate
    from graftlm.inference.saved_evaluations import write_predictions
    from graftlm.text.collate import common_prefix_length
    from graftlm.text.records import Document

    config: EvaluateConfig = parsed.config
    template, rows, pool = _rows(loaded, config, notes)
    if documents := [row for row in rows if isinstance(row, Document)]:
        return _evaluate_documents(loaded, (template, documents), parsed, notes), []
    examples, content_free = _examples(loaded, (template, rows, pool), config, notes)
    readings = 2 if config.mode == "both" else 1
    with display.progress(notes, "evaluate", readings * len(examples)) as progress:
        evaluation = evaluate(
            loaded.model,
            loaded.tokenizer,
            template,
            examples,
            options,
            mode=config.mode,
            batch_size=config.batch_size,
            content_free=content_free,
            progress=progress,
        )
    if config.predictions:
        write_predictions(config.predictions, evaluation.rows)
    prompts = [example.prompt_ids for example in examples]
    result = {
        **evaluation.to_json(),
        "labels": list(template.labels),
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "shared_prompt_tokens": common_prefix_length(prompts) if len(prompts) > 1 else 0,
    }
    return result, evaluation.rows


def _save(
    loaded: "ModelBundle", config: EvaluateConfig, found: tuple[Result, list[Result]], notes: "Console"
) -> Result:
    """Save what was found in the run folder, unless --predictions names a file: {"saved": the file}.

    A run folder that cannot be written to is a note: the result is printed all the same.
    """
    from graftlm.inference.saved_evaluations import save_evaluation

    source = loaded.source
    if config.predictions or source is None:
        return {}
    if "/" in source.checkpoint:
        notes.print(f"the results of {source.path} are not saved: only those of best, last and base are", markup=False)
        return {}
    try:
        return {"saved": str(save_evaluation(source.folder, _settings(source, config), source.step, *found))}
    except GraftError as error:
        notes.print(f"the results are not saved: {error}", markup=False)
        return {}


def _settings(source: "RunCheckpoint", config: EvaluateConfig) -> Result:
    """What an evaluation in a run folder is identified by: see `SavedEvaluation.settings`."""
    flags = [f for f in fields(config) if f.name not in NOT_SETTINGS]
    given = {f.name: value for f in flags if (value := getattr(config, f.name)) != f.default}
    split = config.split or ("all" if _reads_one_file(config) else "test")
    data = config.data or source.record["config"].get("data", TrainConfig.data)
    return {**given, "checkpoint": source.checkpoint, "data": data, "split": split}


def _reads_one_file(config: EvaluateConfig) -> bool:
    """Whether --data names one file, to be read whole."""
    return Path(config.data).is_file() and not (config.split or config.val_data or config.test_data)


def generate(parsed: "ParsedArgs", notes: "Console") -> Result:
    """`graft generate`: continue a prompt, or classify the test split."""
    config: GenerateConfig = parsed.config
    check_run_flags(parsed, notes)
    unused = ("chat", "num_samples") if config.prompt is None else ("data", "limit")
    for flag in parsed.explicit.intersection(unused):
        problem = "needs --prompt" if config.prompt is None else "is not read with --prompt"
        raise InputError(f"--{flag} {getattr(config, flag)}: {problem}; without it the test split is classified")
    prompt = sys.stdin.read().removeprefix("\ufeff") if config.prompt == "-" else config.prompt
    loaded = _load(config)
    return _classify(loaded, config, notes) if prompt is None else _continue(loaded, config, prompt, notes)


def _continue(loaded: "ModelBundle", config: GenerateConfig, prompt: str, notes: "Console") -> Result:
    from graftlm.inference.generate import generate
    from graftlm.inference.sampling import SamplingParams

    chat = loaded.chat(config.chat)
    texts = generate(
        loaded.model,
        loaded.tokenizer,
        [prompt] * config.num_samples,
        SamplingParams.from_flags(config),
        chat=chat,
        batch_size=config.batch_size,
    )
    if not any(text.strip() for text in texts):
        other = "on" if chat is None else "off"
        try_ = f"--chat {other}, or " if chat or loaded.tokenizer.chat_template else ""
        notes.print(f"nothing came back: the model ended the text at once: try {try_}--temperature 0.7", markup=False)
    return {"prompt": prompt, "texts": texts}


def _classify(loaded: "ModelBundle", config: GenerateConfig, notes: "Console") -> Result:
    """What the course handout's generate.py does: the test split by generation, with the given sampling."""
    from graftlm.inference.evaluate import evaluate
    from graftlm.inference.sampling import SamplingParams

    flags = EvaluateConfig(data=config.data, limit=config.limit)
    read = _rows(loaded, flags, notes)
    template, (examples, _) = read[0], _examples(loaded, read, flags, notes)
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


def _rows(loaded: "ModelBundle", config: EvaluateConfig, notes: "Console") -> "Read":
    """What to read, as the flags say, else as the run says that is being read, else the defaults.

    Template, the rows to evaluate, and the train split for demonstrations.
    """
    from graftlm.text.collate import subset
    from graftlm.text.dataset import default_labels, load_dataset
    from graftlm.text.labels import taken_from_data
    from graftlm.text.template import AUTO_LABELS, COLUMN_FLAGS, DEFAULT_LABELS, load_template, read_columns

    run: Result = (loaded.run or {}).get("config", {})
    template = loaded.template
    # Flags of the run say how its own data are read; another file has its own columns.
    own = config.data or any(getattr(config, flag) for flag in COLUMN_FLAGS)
    flags = config if own else replace(config, **{flag: run[flag] for flag in COLUMN_FLAGS if flag in run})
    asking = load_template(config.template) if config.template else template or load_template(TrainConfig.template)
    source, train_source = _sources(config, run, read_columns(flags, asking))
    if template is None or config.template or config.labels:
        named = next(filter(None, source[:3]))
        labels = config.labels or run.get("labels") or AUTO_LABELS
        if labels == AUTO_LABELS and (labels := default_labels(named, source[3])) != DEFAULT_LABELS:
            notes.print(taken_from_data(labels.split(",")), soft_wrap=True)
        template = load_template(config.template or run.get("template", TrainConfig.template), labels)
    template = _in_chat(loaded, template, config.chat)
    # What was skipped in training is skipped again, so that the run's own data has the same splits.
    skip = config.bad_rows == "skip" or (not config.data and run.get("bad_rows") == "skip")
    bad_rows: BadRowsFlag = "skip" if skip else "stop"
    dataset = load_dataset(*source, template.label_values, bad_rows)
    train = load_dataset(*train_source, template.label_values, bad_rows).splits if train_source else dataset.splits
    for note in dataset.notes:
        notes.print(note, soft_wrap=True)
    split = config.split or "test"
    rows = dataset.splits.get(split, [])
    if not rows:
        raise InputError(f"--split {split}: {dataset.name} has no such split; it has {', '.join(dataset.splits)}")
    if split != "train" and (both := {row.text for row in train.get("train", [])} & {row.text for row in rows}):
        notes.print(f"{len(both)} of the evaluated texts are in the train split too", soft_wrap=True)
    return template, subset(rows, config.limit), train.get("train", [])


def _max_length(loaded: "ModelBundle", config: EvaluateConfig) -> int:
    """Of a prompt or a window. A run's own holds for its prompts, which have no demonstrations before them."""
    run: Result = (loaded.run or {}).get("config", {})
    return config.max_length or (0 if config.shots else run.get("max_length")) or loaded.model.max_seq_len


def _examples(
    loaded: "ModelBundle", read: "Read", config: EvaluateConfig, notes: "Console"
) -> tuple[list["Example"], list[list["Example"]]]:
    """The examples, and the inputs without content that calibrate them (none unless asked for)."""
    from graftlm.inference.fewshot import FewShotConfig, build_fewshot

    (template, rows, pool), max_length = read, _max_length(loaded, config)
    asked = build_fewshot(
        loaded.model,
        loaded.tokenizer,
        template,
        rows,
        pool if config.shots else [],
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
    return asked.examples, asked.content_free


def _evaluate_documents(
    loaded: "ModelBundle", read: tuple["Template", "Sequence[Document]"], parsed: "ParsedArgs", notes: "Console"
) -> Result:
    """Loss per token and perplexity, in windows as in the run's training."""
    from graftlm.inference.perplexity import document_loss
    from graftlm.text.collate import encode_rows

    (template, documents), config = read, parsed.config
    for flag in sorted(parsed.explicit.intersection(LABEL_FLAGS)):
        raise InputError(
            f"--{flag} {getattr(config, flag)}: is for texts with labels, and these are documents: drop it"
        )
    packing = (loaded.run or {}).get("config", {}).get("packing", False)
    examples, _ = encode_rows(documents, template, loaded.tokenizer, _max_length(loaded, config), packing=packing)
    with display.progress(notes, "evaluate", len(examples)) as progress:
        found = document_loss(loaded.model, examples, batch_size=config.batch_size, progress=progress)
    return {"n": sum(bool(row.text.strip()) for row in documents), **found}


def _in_chat(loaded: "ModelBundle", template: "Template", flag: str) -> "Template":
    """The template, in the model's chat template if --chat says so, or by default if the run was trained so."""
    from graftlm.text.chat import Chat

    chat = flag == "on" or (flag == "auto" and loaded.template is not None and loaded.template.chat)
    if chat and loaded.tokenizer.chat_template is None:
        raise InputError(f"--chat {flag}: {loaded.name} has no chat template; use --chat off")
    if chat:
        loaded.tokenizer.stop_tokens |= Chat(loaded.tokenizer).stop_tokens
    return replace(template, chat=chat)


def _sources(config: EvaluateConfig, run: Result, columns: "Columns") -> tuple["Source", "Source | None"]:
    """What to evaluate on, and where the demonstrations are if they are elsewhere, as arguments of `load_dataset`."""
    own = TrainConfig(**{flag: run[flag] for flag in DATA_FLAGS if flag in run})
    split = config.split or "test"
    if config.data:
        if not _reads_one_file(config):
            return (config.data, config.val_data, config.test_data, columns), None
        if config.shots:
            raise InputError(
                f"--shots {config.shots}: {config.data} is read whole, so there is no train split for demonstrations: "
                "add --split test, or name the texts to evaluate with --test_data"
            )
        return ("", "", config.data, columns), None
    everything = (own.data, own.val_data, own.test_data, columns)
    if file := config.test_data if split == "test" else config.val_data:
        source = ("", "", file, columns) if split == "test" else ("", file, "", columns)
        return source, everything if config.shots else None
    return everything, None
