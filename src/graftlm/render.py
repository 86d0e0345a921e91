"""Results as people read them: tables on the standard output; notes and progress on the standard error.

Beside `cli.py` the only file that prints. rich is imported where it is used, so that `graft --help` need not wait.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]


def screen() -> "Console":
    """The standard output, for results."""
    from rich.console import Console

    return Console(highlight=False)


def notes() -> "Console":
    """The standard error, for everything else; a note is one line, however narrow the log."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def library_notes() -> Iterator[None]:
    """Show what the library has to say meanwhile (its log, such as a download that begins) on the standard error."""
    import logging

    logger, handler = logging.getLogger("graftlm"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("graft: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def progress(console: "Console", what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress line that is gone when the work is done; yields what to call with the number just finished."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as line:
        task = line.add_task(what, total=total)
        yield lambda done: line.advance(task, done)


def train(out: "Console", result: Result) -> None:
    """Best and last checkpoint, and what the run cost; of --plan, what it would cost."""
    if "best" not in result:
        _facts(out, _planned(result))
        return
    rows = [
        [name, str(point["step"]), f"{point['val_loss']:.4f}", _share(point["val_accuracy"])]
        for name in ("best", "last")
        if (point := result[name]) is not None
    ]
    _table(out, ["checkpoint", "step", "validation loss", "validation accuracy"], rows)
    memory = "peak_cuda_mb" if result.get("peak_cuda_mb") else "peak_rss_mb"
    facts = {
        "trained": _trained(result),
        "steps": f"{result['steps']:,} ({result['examples']:,} examples in {result['seconds']:.0f} s)",
        "speed": f"{result['examples_per_s']:.1f} examples/s",
        "peak memory": f"{result[memory]:,.0f} MB",
        "run folder": result["out_dir"],
    }
    _facts(out, facts)


def _trained(result: Result) -> str:
    return f"{result['trainable']:,} of {result['total']:,} parameters ({_share(result['share_trained'], 2)})"


def _planned(plan: Result) -> dict[str, str]:
    return {
        "trained": _trained(plan),
        "steps": f"{plan['steps']:,} ({plan['examples']:,} examples)",
        "needed work": f"{plan['needed_tflop']:,.1f} TFLOP in the layers' matrices",
        "speed": f"{plan['examples_per_s']:.1f} examples/s",
        "minutes": f"{plan['minutes']:.1f} ({plan['train_seconds']:.0f} s of steps, "
        f"{plan['validation_seconds']:.0f} s of validation, {plan['startup_seconds']:.0f} s before)",
        "peak memory": f"{plan['peak_rss_mb']:,.0f} MB",
    }


def _facts(out: "Console", facts: dict[str, str]) -> None:
    for name, value in facts.items():
        out.print(f"{name:<12} {value}", markup=False, soft_wrap=True)


def evaluate(out: "Console", result: Result) -> None:
    """One line for each reading, and the confusion table of the main one."""
    readings = [result[name] for name in ("score", "generate") if name in result] or [result]
    columns = ["read by", "accuracy", "95% interval", "macro F1", "garbage", "examples/s"]
    rows = [
        [
            "label scores" if reading["read"] == "score" else "generated text",
            _share(reading["accuracy"]),
            f"{_share(reading['low'])} to {_share(reading['high'])}",
            f"{reading['macro_f1']:.3f}",
            _share(reading["garbage_rate"]) if reading["read"] == "generate" else "-",
            f"{reading['examples_per_s']:.1f}",
        ]
        for reading in readings
    ]
    _table(out, columns, rows, title=f"{result['n']:,} examples")
    labels = result["labels"]
    rows = [[label, *map(str, row)] for label, row in zip(labels, result["confusion"], strict=True)]
    _table(out, ["truly \\ read as", *labels, "garbage"], rows)


def generate(out: "Console", result: Result) -> None:
    """The texts, as they are; or what classifying by generation gave."""
    if "texts" not in result:
        evaluate(out, result)
        return
    for number, text in enumerate(result["texts"]):
        if number:
            out.rule()
        out.print(text, markup=False, emoji=False, soft_wrap=True)


def compare(out: "Console", result: Result) -> None:
    """The table, what failed, and where all of it is."""
    from graftlm.studies.table import COLUMNS, failures, words

    several = len({row["checkpoint"] for row in result["rows"] if row["checkpoint"]}) > 1
    _table(out, COLUMNS, [words(row, several) for row in result["rows"]])
    for line in dict.fromkeys(failures(result["rows"])):
        out.print(f"failed: {line}", markup=False, soft_wrap=True)
    _facts(out, {"table": f"{result['out_dir']}/table.md"})


def report(out: "Console", result: Result) -> None:
    """The page, alone on its line."""
    out.print(result["path"], markup=False, emoji=False, soft_wrap=True)


def fetch(out: "Console", result: Result) -> None:
    """The folder, alone on its line."""
    out.print(result["path"], markup=False, emoji=False, soft_wrap=True)


def _share(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def _table(out: "Console", columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(escape(name), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    # Never cut: in a narrow window, or a log, long lines go on in the next. A console makes nothing wider than itself.
    wide = Measurement.get(out, out.options.update(width=10_000), table).maximum
    Console(file=out.file, highlight=False, width=max(out.width, wide)).print(table, crop=False)
