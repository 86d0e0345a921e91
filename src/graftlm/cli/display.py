"""Prints results as tables on stdout, and notes and progress on stderr.

rich is imported where it is used, so that `graft --help` does not wait for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]


def stdout_console() -> "Console":
    """The console for results."""
    from rich.console import Console

    return Console(highlight=False)


def stderr_console() -> "Console":
    """The console for everything else; a note is one line, however narrow the window."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Print the library's log (for example that a download begins) to stderr."""
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
    share = result["trainable"] / result["total"]
    return f"{result['trainable']:,} of {result['total']:,} parameters ({_share(share, 2)})"


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


def prefer(out: "Console", result: Result) -> None:
    """How many pairs came of how many answers, why not more, and where they are."""
    refused = {"ties": "ties", "duplicates": "answers equal to another", "empty": "empty"}
    facts = {
        "pairs": f"{result['pairs']:,} of {result['answers']:,} answers to {result['prompts']:,} prompts",
        "refused": ", ".join(f"{result[key]:,} {what}" for key, what in refused.items()),
        "answers": f"of the pairs {result['cut']:,} did not end, {result['retokenised']:,} are tokenised otherwise",
        "mean reward": f"{result['mean_reward']:.4f}",
        "time": f"{result['seconds']:.0f} s",
        "file": result["out"],
    }
    _facts(out, facts)


def prompt(out: "Console", result: Result) -> None:
    """Of few questions each style's prompt and what came of it; then a line a style. Of --show the prompts alone."""

    def whole(text: str) -> None:
        out.print(text, markup=False, emoji=False, soft_wrap=True)

    for style, texts in result.get("prompts", {}).items():
        for text in texts:
            out.rule(style)
            whole(text)
    for row in result.get("answers", ()):
        out.rule(f"{row['style']}: the prompt")
        whole(row["prompt"])
        out.rule(f"{row['style']}: the answer")
        for text in row["texts"]:
            whole(text.strip())
        right = "right" if row["right"] else f"wrong: it is {row['answer']}"
        whole(f"[read as {'no answer' if row['said'] is None else row['said']}: {right}]")
    if "styles" not in result:
        return
    columns = ["style", "accuracy", "95% interval", "no answer", "prompt tokens", "shared", "new tokens", "s/answer"]
    several = any(len(each["runs"]) > 1 for each in result["styles"].values())
    rows = []
    for style, each in result["styles"].items():
        row = [style, _share(each["accuracy"]), f"{_share(each['low'])} to {_share(each['high'])}"]
        row += [_share(each["no_answer_rate"]), f"{each['prompt_tokens']:.0f}", str(each["shared_prompt_tokens"])]
        row += [f"{each['new_tokens']:.0f}", f"{each['seconds_per_answer']:.2f}"]
        if several:
            row += [f"{_share(each['mean'])} ({_share(each['min'])} to {_share(each['max'])})", str(len(each["runs"]))]
        rows.append(row)
    several_columns = ["mean (least to most)", "runs"] if several else []
    n = next(iter(result["styles"].values()))["n"]
    title = f"{n:,} question{'s' * (n > 1)} of {result['task']}, {result['model']}{', in chat' * result['chat']}"
    _table(out, [*columns, *several_columns], rows, title=title)


def compare(out: "Console", result: Result) -> None:
    """The table, what failed, and where all of it is."""
    from graftlm.studies.results_table import COLUMNS, failures, format_row

    several = len({row["checkpoint"] for row in result["rows"] if row["checkpoint"]}) > 1
    _table(out, COLUMNS, [format_row(row, several) for row in result["rows"]])
    for line in dict.fromkeys(failures(result["rows"])):
        out.print(f"failed: {line}", markup=False, soft_wrap=True)
    _facts(out, {"table": f"{result['out_dir']}/table.md"})


def report(out: "Console", result: Result) -> None:
    """The page, alone on its line."""
    out.print(result["path"], markup=False, emoji=False, soft_wrap=True)


def serve(out: "Console", result: Result) -> None:
    """Where it is served, and what."""
    _facts(out, {"page and API": result["url"], "models": ", ".join(result["models"]), "to stop": "Ctrl-C"})


def account(out: "Console", result: Result) -> None:
    """What is counted, how many, by which formula; then the shares, the times and what a paper says."""
    each = "an example" if "units" in result else "a token"
    titles = {
        "model": f"parameters of {result['model']}",
        "trained": f"trained by {result['method']['method']}",
        "forward": f"operations {each}, forward",
        "training": f"operations {each}, training",
        "bytes": "bytes held in training",
    }
    sums = {"trained": result["trainable"], "bytes": result["bytes"]["total"]}
    if several := result.get("processes"):
        titles |= {"each": f"bytes held by each of {several['number']} processes", "sent": "bytes each sends in a step"}
        sums |= {"each": several["bytes"]["total"], "sent": several["sent_per_step"]["total"]}
    sums |= {way: counts["total"] for way, counts in result["flops_per_token"].items()}
    for name, title in titles.items():
        lines = result["formulas"][name]
        rows = [[line["what"], f"{line['count']:,}", line["formula"]] for line in lines]
        rows.append(["sum", f"{sums.get(name, sum(line['count'] for line in lines)):,}", ""])
        _table(out, ["what", "count", "formula"], rows, title=title, left=("formula",))
    facts = {"trained": f"{_trained(result)}, {_share(result['share_of_base'], 2)} of the {result['base']:,} before"}
    if "units" in result:
        facts["units"] = "{hidden:,} hidden, {hidden_and_output:,} hidden and output".format(**result["units"])
    if "tokens" in result:
        facts["text"] = f"{result['tokens']:,} tokens"
    memory = f"{sums['bytes'] / 1e9:.3g} GB with frozen weights in {result['dtype']}, activations apart"
    facts["memory"] = memory
    if "gflops" in result:
        times = " and ".join(f"{s:,.3g} s {way}" for way, s in result["seconds_per_million_tokens"].items())
        facts["time"] = f"{times} for a million of them, at {result['gflops']:g} GFLOP/s"
    if step := result.get("step"):
        facts["a step"] = f"{step['tokens']:,} tokens, {step['flops'] / 1e12:,.4g} TFLOP" + "".join(
            f", {step[f'{what}_seconds']:.3g} s {name}"
            for what, name in (("compute", "computing"), ("link", "sending"))
            if f"{what}_seconds" in step
        )
        kept = f"{step['activation_bytes'] / 1e9:.3g} GB"
        facts["activations"] = f"{kept} kept for the backward pass, of {step['rows_of_each']} texts"
    if result.get("paper"):
        facts["paper"] = result["paper"]["note"]
    _facts(out, facts)


def export(out: "Console", result: Result) -> None:
    """Where the folder is, what it is, and how far its model's logits lie from the run's or the adapter's."""
    formats = {"peft": "an adapter that PEFT loads", "graft": "an adapter in graftlm's own format"}
    facts = {
        "folder": result["path"],
        "format": formats.get(result["format"], "a model that transformers loads"),
        "proof": f"read back, the largest difference of a logit is {result['max_abs_logit_diff']:.1e}",
    }
    _facts(out, facts)


def fetch(out: "Console", result: Result) -> None:
    """The folder, alone on its line."""
    out.print(result["path"], markup=False, emoji=False, soft_wrap=True)


def _share(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def _table(
    out: "Console", columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", left: Sequence[str] = ()
) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(escape(name), justify="right" if number and name not in left else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    # Never cut: in a narrow window, or a log, long lines go on in the next. A console makes nothing wider than itself.
    wide = Measurement.get(out, out.options.update(width=10_000), table).maximum
    Console(file=out.file, highlight=False, width=max(out.width, wide)).print(table, crop=False)
