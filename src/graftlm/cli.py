"""The command `graft`: verbs -> one call each. The only place that exits; with `render.py` the only one that prints.

What is unusual here: the verbs are a table and are dispatched by hand, and everything heavy is imported inside the
handler that needs it, so that `graft --help` answers before torch could even be found on the disk. A verb whose result
is there before its work is done (`serve`) yields it.

Exit status: 0 done, 1 a run failed, 2 wrong input, 130 interrupted. A mistake is one line on the standard error.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from graftlm import process, render
from graftlm.catalogue import overview
from graftlm.config import (
    AccountConfig,
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    FetchConfig,
    GenerateConfig,
    ImportConfig,
    MethodFlags,
    PreferConfig,
    PromptConfig,
    ReportConfig,
    ServeConfig,
    TrainConfig,
)
from graftlm.errors import GraftError, InputError, unknown
from graftlm.files.atomic import DISK_FULL, FAILING
from graftlm.flags import Parsed, parse, show_help, wants_debug, wants_help

if TYPE_CHECKING:
    from rich.console import Console

    from graftlm.exchange.load import Loaded
    from graftlm.inference.evaluate import Reader
    from graftlm.text.data import Example
    from graftlm.text.template import Template

Result = dict[str, Any]


# Verbs ----------------------------------------------------------------------------------------------------------------
# Each reads its config, writes notes and progress to the given console (standard error) and returns its JSON object.


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


# The command ----------------------------------------------------------------------------------------------------------


def run(words: Sequence[str]) -> int:
    """Do what the words behind `graft` say; the exit status. Whatever is no GraftError passes through."""
    try:
        status = _dispatch(list(words))
        sys.stdout.flush()  # here, so that a closed pipe is met here
        return status
    except GraftError as error:
        return error.exit_status if error.told else _fail(words, str(error), error.exit_status)
    except KeyboardInterrupt:
        return _fail(words, "interrupted", 130)
    except BrokenPipeError:  # the reader has left, as in `graft --help | head -1`: no one to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in DISK_FULL:
            return _fail(words, f"disk full: {error.filename or 'the output'} could not be written", 2)
        if error.filename is None and error.errno not in FAILING:
            raise
        place, what = error.filename or "a file", (error.strerror or str(error)).lower()
        return _fail(words, f"{place}: {what}", 1 if error.errno in FAILING else 2)


def _dispatch(words: list[str]) -> int:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(_help())
        return 0
    if name == "--version":
        from graftlm import __version__

        print(f"graft {__version__}")
        return 0
    if name.startswith("-"):
        raise InputError(f"{name}: a verb comes first: graft {' | '.join(VERBS)} (see graft --help)")
    if name not in VERBS:
        raise unknown("verb", name, VERBS)
    verb = VERBS[name]
    if wants_help(rest):
        show_help(name, verb.config, overview() if issubclass(verb.config, MethodFlags) else "")
        return 0
    if name != "train" and process.processes() > 1:
        raise _once(InputError(f"graft {name}: only graft train runs in several processes: start it without torchrun"))
    try:
        parsed = parse(name, verb.config, rest, verb.positional)
    except InputError as error:
        raise _once(error) from None
    _run_verb(verb, parsed)
    return 0


def _once(error: GraftError) -> GraftError:
    """An error that every process of a run meets, for one to print."""
    error.told = not process.speaks()
    return error


def _cuts_weights(config: Any) -> bool:
    """Whether this is one of several processes over which a model's weights are cut."""
    if process.processes() == 1:
        return False
    said = {"shard": config.shard, "rank": config.rank, "method": config.method}
    if config.resume:
        from graftlm.exchange.load import read_run

        try:
            recorded = read_run(Path(config.out_dir))["config"]
            said = {key: recorded.get(key) or value for key, value in said.items()}
        except InputError:  # `train` tells it
            return False
    return bool(said["shard"]) or said["rank"] == 0 or said["method"] == "full"


def _run_verb(verb: Verb, parsed: Parsed) -> None:
    if verb.computes and _cuts_weights(parsed.config):
        process.give_back_large()
    elif verb.computes:
        process.keep_memory()
    with _libraries(parsed):
        found = verb.run(parsed, render.notes())
        result = next(found) if isinstance(found, Iterator) else found
    if not process.speaks():
        return
    if parsed.every.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        verb.show(render.screen(), result)
    if isinstance(found, Iterator):
        sys.stdout.flush()  # whoever started it waits for this
        with _libraries(parsed):
            for _ in found:
                raise AssertionError("a verb has one result")


@contextmanager
def _libraries(parsed: Parsed) -> Iterator[None]:
    """While a verb works. With --json the standard output is one object, whatever a library down the line may print."""
    with redirect_stdout(sys.stderr) if parsed.every.json else nullcontext(), render.library_notes():
        yield


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: graft VERB [--flag value]...\n\n"
        "Adapt a pretrained language model, measure it, and talk to it.\n\n"
        f"{verbs}\n\n"
        "graft VERB --help lists a verb's flags. Every verb also takes --config recipe.toml (keys are flags; flags\n"
        "given beside it win), --json (one JSON object on the standard output) and --debug (tracebacks).\n"
        "graft --version prints the version."
    )


def _fail(words: Sequence[str], line: str, status: int) -> int:
    if wants_debug(words):
        traceback.print_exc()
    print(f"graft: {' '.join(line.split())}", file=sys.stderr)
    return status


def internal_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The process's last word on an exception nobody expected, instead of a traceback (see `__main__.py`)."""
    if issubclass(kind, KeyboardInterrupt):  # so early or so late that `run` was not there to see it
        print("graft: interrupted", file=sys.stderr)
        return
    what = " ".join(f"{kind.__name__}: {error}".split())
    print(f"graft: internal error: {what} (run again with --debug for the traceback)", file=sys.stderr)
