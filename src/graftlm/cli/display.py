"""Prints results as tables on stdout, and notes and progress on stderr.

rich is imported where it is used, so that `graft --help` does not wait for it.
"""

import shlex
import sys
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


def notes_console() -> "Console":
    """The console for what the library's functions print: standard error, or a notebook's output."""
    from importlib.util import find_spec

    from rich.console import Console

    console = stderr_console()
    if console.is_jupyter and find_spec("ipywidgets") is None:  # without it rich has no bars there, and warns
        return Console(file=sys.stdout, force_jupyter=False, force_terminal=False, highlight=False, soft_wrap=True)
    return console


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
    """A progress bar that disappears at the end; yields a function to call with the number of items just finished."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as line:
        task = line.add_task(what, total=total)
        yield lambda done: line.advance(task, done)


def train(out: "Console", result: Result) -> None:
    """The best and last checkpoint, and time and memory of the run; with --plan the estimate."""
    if "best" not in result:
        _facts(out, _estimate_facts(result))
        return
    rows = [
        [name, str(point["step"]), f"{point['val_loss']:.4f}", _percent(point["val_accuracy"])]
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
    run = shlex.quote(result["out_dir"])
    talk = f"chat {run}" if result["chat"] else f"generate {run} --prompt '…'"
    commands = [talk, f"report {run} --open", f"export {run} --to {run}-export"]
    labelled = result["objective"] == "sft" and (result["last"] or {}).get("val_accuracy") is not None
    if labelled or result["documents"]:
        split = " --split validation" if result["eval_split"] == "validation" else ""
        commands.insert(0, f"evaluate {run}{split}")
    _verbatim(out, "\nnext:")
    for command in commands:
        _verbatim(out, f"  graft {command}")


def _trained(result: Result) -> str:
    fraction = _percent(result["trainable"] / result["total"], 2)
    return f"{result['trainable']:,} of {result['total']:,} parameters ({fraction})"


def _estimate_facts(plan: Result) -> dict[str, str]:
    return {
        "trained": _trained(plan),
        "steps": f"{plan['steps']:,} ({plan['examples']:,} examples)",
        "model FLOPs": f"{plan['model_tflop']:,.1f} TFLOP in the layers' matrix products",
        "speed": f"{plan['examples_per_s']:.1f} examples/s",
        "minutes": f"{plan['minutes']:.1f} ({plan['train_seconds']:.0f} s of steps, "
        f"{plan['validation_seconds']:.0f} s of validation, {plan['startup_seconds']:.0f} s start-up)",
        "peak memory": f"{plan['peak_rss_mb']:,.0f} MB",
    }


def _facts(out: "Console", facts: dict[str, str]) -> None:
    for name, value in facts.items():
        out.print(f"{name:<12} {value}", markup=False, soft_wrap=True)


def evaluate(out: "Console", result: Result) -> None:
    """Accuracy or loss, and where they are saved for `graft report`."""
    if "perplexity" in result:
        counts = [f"{result[name]:,}" for name in ("n", "windows", "tokens")]
        row = [*counts, f"{result['loss']:.4f}", f"{result['perplexity']:.4g}", f"{result['tokens_per_s']:,.0f}"]
        _table(out, ["documents", "windows", "predicted tokens", "loss per token", "perplexity", "tokens/s"], [row])
    else:
        _classification(out, result)
    if "saved" in result:
        _facts(out, {"saved": result["saved"]})


def _classification(out: "Console", result: Result) -> None:
    """One row per mode, and the confusion matrix of the main one."""
    modes = [result[name] for name in ("score", "generate") if name in result] or [result]
    columns = ["mode", "accuracy", "95% interval", "macro F1", "garbage", "examples/s"]
    rows = [
        [
            "label scores" if metrics["mode"] == "score" else "generated text",
            _percent(metrics["accuracy"]),
            _interval(metrics),
            f"{metrics['macro_f1']:.3f}",
            _percent(metrics["garbage_rate"]) if metrics["mode"] == "generate" else "-",
            f"{metrics['examples_per_s']:.1f}",
        ]
        for metrics in modes
    ]
    _table(out, columns, rows, title=f"{result['n']:,} examples")
    _confusion(out, result["labels"], result["confusion"])


def _confusion(out: "Console", labels: Sequence[str], table: Sequence[Sequence[int]]) -> None:
    """The confusion matrix; of many labels, or in a window too narrow for it, the most frequent mistakes."""
    from graftlm.inference.metrics import MAX_MATRIX, most_confused

    names = [*labels, "garbage"]
    columns = ["true \\ predicted", *names]
    rows = [[label, *map(str, row)] for label, row in zip(labels, table, strict=True)]
    width = 1 + sum(3 + max(map(len, column)) for column in zip(columns, *rows, strict=True))
    if len(labels) <= MAX_MATRIX and (width <= out.width or not out.is_terminal):
        _table(out, columns, rows)
    elif mistakes := most_confused(table):
        rows = [[names[t], names[p], str(n), _percent(n / sum(table[t]))] for t, p, n in mistakes]
        title = "the most frequent mistakes, and their fraction of the true label's examples"
        _table(out, ["true", "predicted", "examples", "fraction"], rows, title=title, left=("predicted",))


def _interval(metrics: Result) -> str:
    return f"{_percent(metrics['ci_low'])} to {_percent(metrics['ci_high'])}"


def generate(out: "Console", result: Result) -> None:
    """The texts; without --prompt the metrics of classifying by generation."""
    if "texts" not in result:
        evaluate(out, result)
        return
    for number, text in enumerate(result["texts"]):
        if number:
            out.rule()
        _verbatim(out, text)


def chat(out: "Console", result: Result) -> None:
    """Nothing: the conversation is on the screen already."""


def _verbatim(out: "Console", text: str) -> None:
    out.print(text, markup=False, emoji=False, soft_wrap=True)


def pairs(out: "Console", result: Result) -> None:
    """The number of pairs and of completions, the reasons why others made no pair, and the file."""
    unpaired = {"ties": "ties", "duplicates": "duplicates", "empty": "empty"}
    unpaired |= {"unfinished": "not finished"} if result["chat"] else {}
    facts = {
        "pairs": f"{result['pairs']:,} from {result['answers']:,} completions of {result['prompts']:,} prompts",
        "not paired": ", ".join(f"{result[key]:,} {what}" for key, what in unpaired.items()),
        "completions": f"in the pairs {result['truncated']:,} are truncated, {result['retokenized']:,} are tokenized "
        "differently in training",
        "mean reward": f"{result['mean_reward']:.4f}",
        "time": f"{result['seconds']:.0f} s",
        "file": result["out"],
    }
    _facts(out, facts)


def prompt(out: "Console", result: Result) -> None:
    """With few questions each style's prompts and answers; then a row per style."""
    for style, texts in result.get("prompts", {}).items():
        for text in texts:
            out.rule(style)
            _verbatim(out, text)
    for row in result.get("answers", ()):
        out.rule(f"{row['style']}: the prompt")
        _verbatim(out, row["prompt"])
        out.rule(f"{row['style']}: the answer")
        for text in row["texts"]:
            _verbatim(out, text.strip())
        verdict = "correct" if row["correct"] else f"wrong: it is {row['answer']}"
        _verbatim(out, f"[answer: {'none' if row['prediction'] is None else row['prediction']}: {verdict}]")
    if "styles" in result:
        _styles_table(out, result)


def _styles_table(out: "Console", result: Result) -> None:
    columns = ["style", "accuracy", "95% interval", "unparsed", "prompt tokens", "shared", "new tokens", "s/answer"]
    repeated = any(len(style["runs"]) > 1 for style in result["styles"].values())
    rows = []
    for name, style in result["styles"].items():
        row = [name, _percent(style["accuracy"]), _interval(style), _percent(style["unparsed_rate"])]
        row += [f"{style['prompt_tokens']:.0f}", str(style["shared_prompt_tokens"]), f"{style['new_tokens']:.0f}"]
        row.append(f"{style['seconds_per_answer']:.2f}")
        if repeated:
            spread = f"{_percent(style['min'])} to {_percent(style['max'])}"
            row += [f"{_percent(style['mean'])} ({spread})", str(len(style["runs"]))]
        rows.append(row)
    n = next(iter(result["styles"].values()))["n"]
    title = f"{n:,} question{'s' * (n > 1)} of {result['task']}, {result['model']}{', in chat' * result['chat']}"
    _table(out, [*columns, *(["mean (min to max)", "runs"] if repeated else [])], rows, title=title, drop=STYLES_DROP)


def compare(out: "Console", result: Result) -> None:
    """The table, the failures, and the file that holds them."""
    from graftlm.studies.results_table import COLUMNS, DROP, failures, format_rows

    _table(out, COLUMNS, format_rows(result["rows"]), drop=DROP)
    for line in failures(result["rows"]):
        out.print(f"failed: {line}", markup=False, soft_wrap=True)
    _facts(out, {"table": f"{result['out_dir']}/table.md"})


def path(out: "Console", result: Result) -> None:
    """The path of what was written, alone on its line."""
    _verbatim(out, result["path"])


def script(out: "Console", result: Result) -> None:
    """A script as it is."""
    out.file.write(result["script"])


def serve(out: "Console", result: Result) -> None:
    """The address and the models."""
    _facts(out, {"page and API": result["url"], "models": ", ".join(result["models"]), "to stop": "Ctrl-C"})


def estimate(out: "Console", result: Result) -> None:
    """Every count with its formula; then fractions, times and the paper's figure."""
    unit = "example" if "units" in result else "token"
    titles = {
        "model": f"parameters of {result['model']}",
        "trained": f"trained by {result['method']['method']}",
        "forward": f"FLOPs per {unit}, forward",
        "training": f"FLOPs per {unit}, training",
        "bytes": "bytes of weights and optimizer state in training",
    }
    sums = {"trained": result["trainable"], "bytes": result["bytes"]["total"]}
    if ranks := result.get("distributed"):
        titles |= {"each": f"bytes per rank, of {ranks['world_size']} ranks", "sent": "bytes sent per rank and step"}
        sums |= {"each": ranks["bytes"]["total"], "sent": ranks["comm_bytes_per_step"]["total"]}
    sums |= {way: counts["total"] for way, counts in result["flops_per_token"].items()}
    for name, title in titles.items():
        lines = result["formulas"][name]
        rows = [[line["what"], f"{line['count']:,}", line["formula"]] for line in lines]
        rows.append(["sum", f"{sums.get(name, sum(line['count'] for line in lines)):,}", ""])
        _table(out, ["what", "count", "formula"], rows, title=title, left=("formula",))
    _facts(out, _cost_facts(result))


def _cost_facts(result: Result) -> dict[str, str]:
    base = f"{_percent(result['trainable_vs_base'], 2)} of the base's {result['base']:,}"
    facts = {"trained": f"{_trained(result)}, {base}"}
    if "units" in result:
        facts["units"] = "{hidden:,} hidden, {hidden_and_output:,} hidden and output".format(**result["units"])
    if "tokens" in result:
        facts["text"] = f"{result['tokens']:,} tokens"
    held = result["bytes"]["total"] / 1e9
    facts["memory"] = (
        f"{held:.3g} GB with frozen weights in {result.get('base_format', result['dtype'])}, without activations"
    )
    if "device_gflops" in result:
        times = " and ".join(f"{s:,.3g} s {way}" for way, s in result["seconds_per_million_tokens"].items())
        facts["time"] = f"{times} per million, at {result['device_gflops']:g} GFLOP/s"
    if step := result.get("step"):
        facts["a step"] = f"{step['tokens']:,} tokens, {step['flops'] / 1e12:,.4g} TFLOP" + "".join(
            f", {step[f'{what}_seconds']:.3g} s {name}"
            for what, name in (("compute", "compute"), ("comm", "communication"))
            if f"{what}_seconds" in step
        )
        saved = f"{step['activation_bytes'] / 1e9:.3g} GB"
        facts["activations"] = f"{saved} saved for the backward pass of {step['per_device_batch_size']} texts"
    if result.get("paper"):
        facts["paper"] = result["paper"]["note"]
    return facts


EXAMPLE_CHARACTERS = 320  # of an example on the screen
DATA_DROP = ("p90", "p50", "tokens lost", "targets")
STYLES_DROP = ("shared", "new tokens", "prompt tokens", "s/answer", "runs", "unparsed")


def data(out: "Console", result: Result) -> None:
    """Layout, a row per split, what is truncated and what is in two splits, and examples with targets in ⟦brackets⟧."""
    facts = {
        "data": result["data"],
        "layout": " and ".join(result["layouts"]),
        "not read": f"columns {unused}" if (unused := ", ".join(result["unused_columns"])) else "no column",
        "train with": f"--objective {result['objective']}",
        "tokenizer": f"{result['tokenizer']}, examples of at most {result['max_length']:,} tokens",
    }
    _facts(out, facts)
    columns = ["split", "rows", "examples", "p50", "p90", "p99", "max", "targets", "truncated", "tokens lost"]
    rows = [_split_row(name, split) for name, split in result["splits"].items()]
    _table(out, columns, rows, title="lengths in tokens of prompt and completion, before truncation", drop=DATA_DROP)
    common = {names.replace("_", " and "): count for names, count in result["duplicates"].items() if count}
    shared = "; ".join(f"{count:,} in {names}" for names, count in common.items())
    _facts(out, {"duplicates": f"{shared or 'no text is in two splits'} (without case and white space)"})
    for example in result["examples"]:
        text, rest = example["text"][:EXAMPLE_CHARACTERS], len(example["text"]) - EXAMPLE_CHARACTERS
        _verbatim(out, f"\n{example['source']}\n  {text}" + f" … {rest:,} more characters" * (rest > 0))


def _split_row(name: str, split: Result) -> list[str]:
    if "tokens" not in split:  # it cannot be tokenized
        return [name, f"{split['rows']:,}", *["-"] * 8]
    lengths = [split["tokens"][key] for key in ("p50", "p90", "p99", "max")]
    numbers = [split["rows"], split["examples"], *lengths, split["targets"], split["truncated"]["rows"]]
    return [name, *(f"{number:,}" for number in (*numbers, split["truncated"]["tokens"]))]


def export(out: "Console", result: Result) -> None:
    """The folder, its format, and how much its model's logits differ from the run's or the adapter's."""
    formats = {
        "peft": "an adapter that PEFT loads",
        "graft": "an adapter in graftlm's own format",
        "gguf": "a model that llama.cpp loads",
        "gguf-lora": "an adapter that llama.cpp loads (llama-server --lora)",
        "ollama": "a folder for ollama create -f Modelfile",
    }
    facts = {
        "file" if result["format"] in ("gguf", "gguf-lora") else "folder": result["path"],
        "format": formats.get(result["format"], "a model that transformers loads"),
        "verified": f"after reloading, the largest difference of a logit is {result['max_abs_logit_diff']:.1e}",
    }
    if llama := result.get("llama_cpp"):
        facts["llama.cpp"] = (
            f"log-probabilities within {llama['max_abs_logprob_diff']:.1e}, {llama['equal_texts']} of {llama['texts']} "
            "greedy texts the same"
        )
    _facts(out, facts)


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def _table(
    out: "Console",
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    left: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> None:
    """A table; in a window too narrow for it headers take several lines, then columns are left out as `drop` says.

    A log or a pipe gets all columns.
    """
    from textwrap import fill

    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    narrower = [(True, drop[:count]) for count in range(len(drop) + 1)] if out.is_terminal else []
    for wrapped, dropped in ((False, drop[:0]), *narrower):
        table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
        shown = [number for number, name in enumerate(columns) if name not in dropped]
        for number in shown:
            name, is_left = columns[number], not number or columns[number] in left
            if wrapped and number:
                longest = max(len(text) for text in (*name.split(), *(row[number] for row in rows)))
                name = fill(name, longest, break_long_words=False, break_on_hyphens=False)
            table.add_column(escape(name), justify="left" if is_left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(escape(row[number]) for number in shown))
        wide = Measurement.get(out, out.options.update(width=10_000), table).maximum
        if wide <= out.width:
            break
    # Never truncated: if nothing helps, long lines wrap. A console prints nothing wider than itself.
    console = Console(file=out.file, force_jupyter=out.is_jupyter, highlight=False, width=max(out.width, wide))
    console.print(table, crop=False)
    if dropped:
        out.print(f"not shown here: {', '.join(name for name in columns if name in dropped)}", markup=False)
