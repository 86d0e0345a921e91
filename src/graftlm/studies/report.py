"""`graft report`: run folders -> one page of HTML that needs nothing else, neither network nor server.

What is unusual here:
- Every figure stands in the page as plain HTML, made here, so that it can be read without scripts, by a screen reader
  and on paper. `report.js` adds what moves: the charts, sorting, the filter.
- A name or a review may hold markup. All text is escaped on its way into the page, the charts' data too; the script
  only ever sets text; and the page's Content-Security-Policy lets nothing run but that script, by its hash.

The same folders make the same bytes on the same day.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from datetime import date
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from graftlm.config import ReportConfig
from graftlm.errors import InputError
from graftlm.files.atomic import write_text
from graftlm.studies.report_data import Predictions, Run, all_predictions, read_folders, run_name
from graftlm.studies.report_stats import CURVES, calibration, charts, disagreements, downsample

MAX_EXAMPLES = 50  # in the list of those that runs disagree on
MAX_TABLE_ROWS = 40  # of a curve's table
COLUMNS = (
    *("run", "accuracy", "95% interval", "garbage", "validation loss", "trained", "steps", "minutes (planned)"),
    *("examples/s", "peak MB"),
)
NONE = "–"
POLICY = "img-src data:; base-uri 'none'; form-action 'none'"


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page; returns its path, the number of runs and its size in bytes.

    Raises InputError, before anything is written, for a folder that holds no run and for a file that is broken.
    """
    out = Path(config.out)
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}: make it first, or name another")
    runs = read_folders(config.folders)
    page = make_page(runs, config.title, date.today())
    write_text(out, page)
    return {"path": str(out), "runs": len(runs), "bytes": len(page.encode("utf-8"))}


def make_page(runs: Sequence[Run], title: str, today: date) -> str:
    """The whole page."""
    style = _part("report_base.css") + _part("report.css")
    script = _part("report_parts.js") + _part("report_chart.js") + _part("report.js")
    parts = {
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; {POLICY}",
        "title": text(title),
        "style": style,
        "script": script,
        "intro": text(_intro(runs, today)),
        "results": _results(runs),
        "missing": _missing(runs),
        **{f"{name}_table": _curve_table(name, heading, runs) for name, heading in CURVES.items()},
        "confusion": _confusion(runs),
        "reviews": _reviews(runs),
        "calibration": _calibration(runs),
        "data": _json(charts(runs)),
    }
    # One pass: what is filled in may hold what looks like a place to fill.
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _part("report.html"))
    return page.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text


def _part(name: str) -> str:
    return (files("graftlm.studies") / name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def text(value: object) -> str:
    """Any text as HTML that shows it and does nothing."""
    return escape(str(value))


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in; in ASCII, so without U+2028 and U+2029 too."""
    found = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return found.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# Tables ---------------------------------------------------------------------------------------------------------------


def _cell(shown: object, value: float | None = None, kind: str = "") -> str:
    """A cell; `value` is what it is sorted by, if not by its text."""
    number = "" if value is None else f' data-value="{value!r}"'
    return f'<td class="{kind}"{number}>{text(shown)}</td>' if kind else f"<td{number}>{text(shown)}</td>"


def _head(shown: object, scope: str = "row", unseen: str = "") -> str:
    """A heading cell; `unseen` words are read aloud before it."""
    before = f'<span class="unseen">{text(unseen)}</span>' if unseen else ""
    return f'<th scope="{scope}">{before}{text(shown)}</th>'


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", of: str = "") -> str:
    """A table of cells in a region of its own that scrolls, by keyboard too, so that the page never does sideways.

    of: words that, before the caption, tell the region from others.
    """
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(of + caption)}">'
        f'<table class="{kind}"><caption><span>{text(caption)}</span></caption>\n'
        f"<thead><tr>{''.join(columns)}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _columns(*names: str) -> list[str]:
    return [_head(name, "col") for name in names]


def _fold(summary: str, inside: str) -> str:
    return f"<details><summary>{text(summary)}</summary>\n{inside}\n</details>"


def _format(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _intro(runs: Sequence[Run], today: date) -> str:
    """What was run, where and with what: each fact once where all agree."""
    records = [run.record for run in runs if run.record]
    facts = (
        ("", [record["base"].get("name") for record in records]),
        ("on ", [record["data"].get("name") for record in records]),
        ("computed in ", [f"{record.get('dtype')} on {record.get('device')}" for record in records]),
        *(
            (name and f"{name} ", [(record.get("versions") or {}).get(key) for record in records])
            for name, key in (("graft", "graftlm"), ("torch", "torch"), ("Python", "python"), ("", "platform"))
        ),
    )
    said = [before + " and ".join(dict.fromkeys(map(str, filter(None, values)))) for before, values in facts]
    told = [words for words, (before, _) in zip(said, facts, strict=True) if words != before]
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{count}{': ' if told else ''}{', '.join(told)}. Made on {today} by graft {version('graftlm')}."


def _results(runs: Sequence[Run]) -> str:
    rows = [_result(run, answers) for run in runs for answers in run.answers or (None,)]
    sizes = sorted({len(answers.true) for _, _, answers in all_predictions(runs)})
    read = f" on {' or '.join(f'{n:,}' for n in sizes)} test examples" if sizes else ""
    return _table(f"Results{read}", _columns(*COLUMNS), rows, "results")


def _result(run: Run, answers: Predictions | None) -> list[str]:
    took = run.figures
    accuracy, garbage = (answers.accuracy, answers.garbage_rate) if answers else (None, None)
    low, high = answers.interval if answers else (None, None)
    loss = run.val_loss(answers.checkpoint if answers else "best")
    note = f'<br><span class="note">{text(run.note)}</span>' if run.note else ""
    trained = _format(took["trainable"], ",") + ("" if took["share"] is None else f" ({took['share']:.2%})")
    minutes, planned = (took[name] if took[name] is None else took[name] / 60 for name in ("seconds", "planned"))
    lasted = _format(minutes, ".1f") + ("" if planned is None else f" ({planned:.1f})")
    return [
        f'<th scope="row">{text(run_name(run, answers))}{note}</th>',
        _cell(_format(accuracy, ".1%"), accuracy),
        _cell(NONE if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}", low),
        _cell(_format(garbage, ".1%"), garbage),
        _cell(_format(loss, ".3f"), loss),
        _cell(trained, took["trainable"]),
        _cell(_format(took["steps"], ","), took["steps"]),
        _cell(lasted, minutes),
        _cell(_format(took["examples_per_s"], ".1f"), took["examples_per_s"]),
        _cell(_format(took["peak_mb"], ",.0f"), took["peak_mb"]),
    ]


def _missing(runs: Sequence[Run]) -> str:
    """For each run without predictions, the command that makes them."""
    lines = [
        f"<li><strong>{text(run.name)}</strong>: <code>{text(run.command)}</code></li>" for run in runs if run.command
    ]
    said = "No predictions were found for these runs. What makes them, before the report is made again:"
    return f'<p>{said}</p>\n<ul class="commands">{"".join(lines)}</ul>' if lines else ""


def _curve_table(name: str, heading: str, runs: Sequence[Run]) -> str:
    """A curve's values as a table, at most MOST_ROWS steps of them."""
    curves = [dict(run.curve(name)) for run in runs]
    steps = sorted({step for curve in curves for step in curve})
    if not steps:
        return "<p>It was not measured.</p>"
    shown = [steps[i] for i in downsample(len(steps), MAX_TABLE_ROWS)]
    form = ".1%" if name == "val_accuracy" else ".4f"
    rows = [[_head(f"{step:,}"), *(_cell(_format(curve.get(step), form)) for curve in curves)] for step in shown]
    some = f", {len(shown)} of {len(steps):,} steps" if len(shown) < len(steps) else ""
    return _fold("As a table", _table(f"{heading}{some}", _columns("step", *(run.name for run in runs)), rows))


def _confusion(runs: Sequence[Run]) -> str:
    made = []
    for _, name, answers in all_predictions(runs):
        rows = [
            [_head(label, unseen="truly "), *(_cell(f"{n:,}", kind=f"shade-{_tenth(n, sum(row))}") for n in row)]
            for label, row in zip(answers.labels, answers.confusion, strict=True)
        ]
        heads = ["<td>truly ↓ read as →</td>", *(_head(w, "col", "read as ") for w in (*answers.labels, "garbage"))]
        made.append(_table(name, heads, rows, "confusion", of="Confusion of "))
    return f'<div class="tiles">{"".join(made)}</div>' if made else "<p>There are no predictions to count.</p>"


def _tenth(n: int, of: int) -> int:
    return round(10 * n / of) if of else 0


def _reviews(runs: Sequence[Run]) -> str:
    """What answers differ on."""
    answered = all_predictions(runs)
    if len(answered) < 2:
        return "<p>It takes the predictions of two runs to disagree.</p>"
    found = disagreements([answers for _, _, answers in answered])
    rows = []
    for review in found[:MAX_EXAMPLES]:
        said = [_cell(NONE) if word is None else _verdict(*word) for word in review.predictions]
        rows.append([_head(review.text), _cell(review.true), *said])
    if not rows:
        return "<p>All runs say the same of every review.</p>"
    count = f"{len(rows):,} of {len(found):,} reviews" if len(rows) < len(found) else f"{len(rows):,} reviews"
    columns = _columns("review", "truly", *(name for _, name, _ in answered))
    return _table(f"What runs disagree on: {count}, the most evenly divided first", columns, rows, "reviews")


def _verdict(word: str, right: bool) -> str:
    mark, said = ("✓", "right") if right else ("✗", "wrong")
    seen = f'<span aria-hidden="true">{mark} </span>{text(word)}'
    return f'<td class="{said}">{seen}<span class="unseen"> {said}</span></td>'


def _calibration(runs: Sequence[Run]) -> str:
    """A table of bins for each run that scored labels."""
    made, errors = [], []
    for _, name, answers in all_predictions(runs):
        if (found := calibration(answers)) is None:
            continue
        bins, error = found
        errors.append([_head(name), _cell(f"{error:.4f}", error)])
        rows = [
            [
                _head(f"{b.low:.1f} to {b.high:.1f}"),
                *map(_cell, (f"{b.n:,}", f"{b.confidence:.3f}", f"{b.accuracy:.3f}")),
            ]
            for b in bins
            if b.n
        ]
        made.append(
            _table(
                name, _columns("probability", "examples", "mean probability", "accuracy"), rows, of="Calibration of "
            )
        )
    if not made:
        return "<p>No labels were scored, so there are no probabilities to hold against accuracy.</p>"
    summary = _table("Expected calibration error", _columns("run", "error"), errors, "results")
    return summary + _fold("The bins as tables", f'<div class="tiles">{"".join(made)}</div>')
