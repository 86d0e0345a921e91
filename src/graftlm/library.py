"""The functions of `import graftlm`: each is a subcommand, with its flags as keyword arguments.

    graftlm.train(data=[{"text": …, "label": …}], rank=16, out_dir=Path("runs/mine"))
    graftlm.evaluate("runs/mine", data=frame)

A flag of a data file takes rows, too (`files/in_memory.py`). A result is what the subcommand prints with --json: a dict
whose keys are also attributes; a notebook shows it as the terminal shows the subcommand's. Progress and notes go to
standard error. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from graftlm.cli import COMMANDS, display
from graftlm.config.flags import CommonFlags, ParsedArgs
from graftlm.config.keywords import config_from, signature_of
from graftlm.config.values import ROWS, short
from graftlm.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from graftlm.config import (
        CompareConfig,
        EstimateConfig,
        EvaluateConfig,
        ExportConfig,
        GenerateConfig,
        ReportConfig,
        TrainConfig,
    )
    from graftlm.exchange.load import ModelBundle
    from graftlm.inference.evaluate import Evaluation, EvaluationOptions
    from graftlm.inference.sampling import SamplingParams
    from graftlm.models import CausalLM
    from graftlm.text.chat import Chat
    from graftlm.text.collate import Example
    from graftlm.text.template import Template
    from graftlm.text.tokenizer import Tokenizer
    from graftlm.training.setup import RunContext

Json = dict[str, Any]
Name = str | Path


# Results --------------------------------------------------------------------------------------------------------------


class Result(dict[str, Any]):
    """What a subcommand prints with --json. `result["best"]` and `result.best` are the same."""

    command: ClassVar[str]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(self)}") from None

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        COMMANDS[self.command].print_result(Console(file=text, force_jupyter=False, highlight=False, width=100), self)
        return text.getvalue()

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"<pre>{html.escape(str(self))}</pre>"


class TrainResult(Result):
    """A run that ended, or with plan=True the estimate of one."""

    command = "train"
    out_dir: str
    steps: int
    seconds: float
    best: Json
    """step, val_loss and val_accuracy of the validation with the lowest loss, and the metrics passed to `train`."""
    last: Json
    """The same of the last validation."""
    trainable: int
    total: int


class EvaluateResult(Result):
    """The metrics of the main mode, and with mode="both" of each under its name; of documents loss and perplexity."""

    command = "evaluate"
    n: int
    accuracy: float
    ci_low: float
    ci_high: float
    macro_f1: float
    confusion: list[list[int]]
    labels: list[str]


class GenerateResult(Result):
    """The continuations of a prompt; without one the metrics of classification by generation."""

    command = "generate"
    prompt: str
    texts: list[str]


class CompareResult(Result):
    """The table of a comparison: its rows, each a dict."""

    command = "compare"
    rows: list[Json]
    failed: int
    out_dir: str


class EstimateResult(Result):
    """Parameters, FLOPs and bytes of a method, with the formulas."""

    command = "estimate"
    trainable: int
    total: int
    bytes: Json
    flops_per_token: Json


class ReportResult(Result):
    """The page that was written."""

    command = "report"
    path: str
    runs: int


class ExportResult(Result):
    """The folder or file that was written, and how far its logits are from the run's."""

    command = "export"
    path: str
    format: str
    max_abs_logit_diff: float


Function = TypeVar("Function", bound=Callable[..., Any])


# Functions ------------------------------------------------------------------------------------------------------------


def _flags_of(command: str) -> Callable[[Function], Function]:
    """Let `help` and a notebook's completion list the flags of a subcommand, with types and defaults."""

    def decorate(function: Function) -> Function:
        vars(function)["__signature__"] = signature_of(function, COMMANDS[command].config)
        return function

    return decorate


@contextmanager
def _parsed(command: str, first: Any, flags: Mapping[str, Any]) -> Iterator[ParsedArgs]:
    """The flags of a call, with rows as files. first: a config, or the value of the subcommand's positional argument.

    Within it, errors about a file of rows name the argument. Raises InputError.
    """
    from graftlm.files.in_memory import is_rows, rows_by_name, rows_file

    kind, positional = COMMANDS[command].config, COMMANDS[command].positional
    given = dict(flags)
    if positional and isinstance(first, str | Path | list | tuple):
        if positional in given:
            raise InputError(f"graftlm.{command}: {short(first)}: is the {positional}, which is given twice")
        given[positional], first = first, None
    files = {name: rows_file(name, given[name]) for name in ROWS & given.keys() if is_rows(given[name])}
    with rows_by_name(files), display.log_to_stderr():
        config, explicit = config_from(kind, first, {**given, **files}, command)
        yield ParsedArgs(config, CommonFlags(), explicit)


def _run(command: str, first: Any, console: Console | None, flags: Mapping[str, Any]) -> Json:
    """The result of a subcommand."""
    with _parsed(command, first, flags) as parsed:
        result = COMMANDS[command].run(parsed, console or display.notes_console())
        assert isinstance(result, dict)
        return result


@_flags_of("train")
def train(
    config: TrainConfig | None = None,
    *,
    callbacks: Any = None,
    metrics: Any = None,
    console: Console | None = None,
    **flags: Any,
) -> TrainResult:
    """Adapt a model, as `graft train` does, and leave a run folder.

    Args:
        config: flags in one object; keywords replace its fields.
        callbacks: one or several: functions, which get each step's row of metrics.jsonl, or objects with any of the
            methods on_start(run), on_step(row), on_evaluate(row), on_checkpoint(folder) and on_end(). Raising
            StopTraining in one makes the step the run's last.
        metrics: of validations, as in `evaluate`: columns of metrics.jsonl, and in the result's best and last.
        console: where progress and notes go; None: standard error, or a notebook's output. rich's Console(quiet=True)
            is silent.
        flags: any flag of `graft train`. data, val_data and test_data may be rows: a list of dicts, a dict of columns
            or of splits, a DataFrame.

    Raises InputError for wrong input, before anything is written; GraftError when the loss is not a number;
    Interrupted after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    from graftlm.training.callbacks import Callbacks
    from graftlm.training.train import train

    with _parsed("train", config, flags) as parsed:
        console, called = console or display.notes_console(), Callbacks.of(callbacks, metrics)
        return TrainResult(train(parsed.config, given=parsed.explicit, console=console, callbacks=called))


@_flags_of("train")
def prepare(config: TrainConfig | None = None, *, console: Console | None = None, **flags: Any) -> RunContext:
    """What `graft train` sets up before its first step, for a loop of one's own: nothing is written.

    Its parts are `model` (in training mode, with the method installed), `batches()`, `objective`, `method`, `config`
    (with every default decided), `data`, and `loaded`, which `evaluate` and `generate` take. console, flags: as of
    `train`.

    Raises InputError.
    """
    from graftlm.training.setup import prepare

    with _parsed("train", config, flags) as parsed:
        console = console or display.notes_console()
        run = prepare(parsed.config, parsed.explicit, writes=False)
        for note in run.notes:
            console.print(note, markup=False)
        run.objective.setup(run.model, run.data, run.dist, lambda line: console.print(line, markup=False))
        run.model.train()
        return run


@overload
def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    examples: Sequence[Example],
    options: EvaluationOptions | None = None,
    /,
    **settings: Any,
) -> Evaluation: ...
@overload
def evaluate(
    run: EvaluateConfig | ModelBundle | Name | None = None,
    /,
    *,
    metrics: Any = None,
    console: Console | None = None,
    **flags: Any,
) -> EvaluateResult: ...
@_flags_of("evaluate")
def evaluate(
    run: Any = None, /, *parts: Any, metrics: Any = None, console: Console | None = None, **flags: Any
) -> EvaluateResult | Evaluation:
    """Measure a run or a model on labelled texts, as `graft evaluate` does; on documents their loss.

    Args:
        run: a run's folder, a loaded model (`load`), or an EvaluateConfig, whose fields keywords replace.
        metrics: more metrics: a function, several, or a dict of them by name. Each gets the predicted and the true
            label numbers as numpy arrays and returns a number, which is in the result under its name. The predicted
            number is -1 where the generated text names no label.
        console: where progress and notes go; None: standard error, or a notebook's output.
        flags: any flag of `graft evaluate`. data, val_data and test_data may be rows.

    `evaluate(model, tokenizer, template, examples, **settings)` evaluates examples that are encoded already; settings
    are fields of EvaluationOptions, as in mode="score".

    Raises InputError for wrong input, GraftError if the scores or logits are NaN.
    """
    from graftlm.cli.evaluate import evaluate
    from graftlm.inference import evaluate as inference
    from graftlm.inference.metrics import metric_functions

    functions = metric_functions(metrics)
    if parts:
        settings = {**flags, "metrics": functions} if functions else flags
        return inference.evaluate(run, *parts, **settings)
    loaded = _loaded("evaluate", run, flags)
    with _parsed("evaluate", None if loaded else run, flags) as parsed:
        return EvaluateResult(evaluate(parsed, console or display.notes_console(), loaded, functions))


@overload
def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    params: SamplingParams | None = None,
    /,
    *,
    chat: Chat | None = None,
    batch_size: int = 32,
    **settings: Any,
) -> list[str]: ...
@overload
def generate(run: ModelBundle, prompts: str | Sequence[str], /, **settings: Any) -> list[str]: ...
@overload
def generate(
    run: GenerateConfig | Name | None = None, /, *, console: Console | None = None, **flags: Any
) -> GenerateResult: ...
@_flags_of("generate")
def generate(
    run: Any = None, /, *parts: Any, console: Console | None = None, **flags: Any
) -> GenerateResult | list[str]:
    """Continue a prompt, as `graft generate` does, or several by a loaded model.

    Args:
        run: a run's folder, or a GenerateConfig, whose fields keywords replace.
        console: where progress and notes go; None: standard error, or a notebook's output.
        flags: any flag of `graft generate`, as in prompt="The film was".

    `generate(loaded, prompts, **settings)` and `generate(model, tokenizer, prompts, **settings)` return the text that
    follows each prompt, of a single one too a list; settings are fields of SamplingParams, as in max_new_tokens=20. A
    loaded run that learned conversations answers in its chat template.

    Raises InputError for a wrong setting, and for a prompt that is empty or longer than the model's context.
    """
    from graftlm.exchange.load import ModelBundle
    from graftlm.inference import generate as inference
    from graftlm.text.chat import Chat

    if isinstance(run, ModelBundle):
        settings = {"chat": Chat(run.tokenizer), **flags} if run.learned_chat else flags
        return inference.generate(run.model, run.tokenizer, *parts, **settings)
    if parts:
        return inference.generate(run, *parts, **flags)
    return GenerateResult(_run("generate", run, console, flags))


def _loaded(command: str, run: Any, flags: Mapping[str, Any]) -> ModelBundle | None:
    """A loaded model, if the first argument of a call is one. Raises InputError for flags that name another."""
    from graftlm.config.inference import RunFlags
    from graftlm.exchange.load import ModelBundle

    if not isinstance(run, ModelBundle):
        return None
    naming = {*RunFlags.__dataclass_fields__} - {"batch_size"} | {"ray"}
    if given := sorted(naming & flags.keys()):
        raise InputError(f"graftlm.{command}: {given[0]}: the model is loaded already: leave it out")
    return run


def compare(
    sweep: CompareConfig | Name | None = None,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    train: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    console: Console | None = None,
    **flags: Any,
) -> CompareResult:
    """Train and evaluate a sweep of settings under one budget, as `graft compare` does; finished runs are kept.

    Args:
        sweep: a sweep file; or the tables of one as rows, train and grid.
        rows: flags of `graft train` of each row of the result, and its name; method="zero-shot" is the base model.
        train: flags of all rows. Data may be rows from Python.
        grid: lists of values, of which each combination is trained; seeds are one row.
        console: where progress and notes go; None: standard error, or a notebook's output.
        flags: any flag of `graft compare`, as in budget_steps=100.

    Raises InputError for an invalid sweep before anything is written, GraftError if every run failed.
    """
    from graftlm.studies.compare import compare

    tables = {"train": train, "grid": grid, "rows": rows}
    given: Any = {name: _table(f"{name}", table) for name, table in tables.items() if table is not None}
    if isinstance(sweep, str | Path):
        if given:
            raise InputError(f"graftlm.compare: {sweep} is a sweep file, which holds {next(iter(given))}: leave it out")
        sweep, given = None, str(sweep)
    with _parsed("compare", sweep, flags) as parsed:
        return CompareResult(compare(parsed.config, given, console or display.notes_console()))


def _table(name: str, value: Any) -> Any:
    """A table of a sweep as a file has it: paths as texts, tuples as lists, rows from Python as their file."""
    from graftlm.files.in_memory import is_rows, rows_file

    if isinstance(value, Mapping):
        return {
            key: str(rows_file(key, item)) if key in ROWS and is_rows(item) else _table(name, item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_table(name, item) for item in value]
    return str(value) if isinstance(value, Path) else value


@_flags_of("estimate")
def estimate(config: EstimateConfig | None = None, *, console: Console | None = None, **flags: Any) -> EstimateResult:
    """A method's parameters, FLOPs and memory by formula, as `graft estimate` computes them; loads no weights.

    flags: any flag of `graft estimate`. Raises InputError.
    """
    return EstimateResult(_run("estimate", config, console, flags))


@_flags_of("report")
def report(
    folders: ReportConfig | Name | Sequence[Name] | None = None, *, console: Console | None = None, **flags: Any
) -> ReportResult:
    """Write one HTML page of runs, as `graft report` does.

    folders: a run folder or several, or a folder of `compare`. flags: any flag of `graft report`. Raises InputError.
    """
    return ReportResult(_run("report", folders, console, flags))


@_flags_of("export")
def export(run: ExportConfig | Name | None = None, *, console: Console | None = None, **flags: Any) -> ExportResult:
    """Write a run for PEFT, transformers, llama.cpp or Ollama, as `graft export` does, and verify it.

    run: the run's folder. flags: any flag of `graft export`, as in to="my-model". Raises InputError.
    """
    return ExportResult(_run("export", run, console, flags))
