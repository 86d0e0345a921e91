"""What the pages made from results share: tables, line charts as SVG, marked parts of a page, the machine in a line.

A result's file is called DATE-KIND.json or DATE-KIND.MACHINE.json.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from harness import ROOT, BenchmarkError

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a5548b", "#56b4e9", "#7f7f7f")  # Okabe and Ito's, a little darker
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "none", "7 3")
WORDS = {True: "holds", False: "does **not** hold", None: "was not measured"}
RENAMED_KEYS = {
    "low": "ci_low",
    "high": "ci_high",
    "share_trained": "trainable_fraction",
    "planned": "predicted",
    "cut": "truncated",
    "read": "mode",
    "difference": "delta_vs_baseline",
    "accuracies": "accuracy_per_seed",
    "needed_tflop": "model_tflop",
    "needed_gflops": "model_gflops_per_s",
    "matrix_peak_gflops": "peak_gflops",
    "share_of_peak": "mfu",
    "no_answer_rate": "unparsed_rate",
    "right": "correct",
    "said": "prediction",
}
"""Key of a result written by an earlier version -> its name today."""


def renamed(value: Any) -> Any:
    """A JSON value with today's keys."""
    if isinstance(value, dict):
        return {RENAMED_KEYS.get(key, key): renamed(each) for key, each in value.items()}
    return [renamed(each) for each in value] if isinstance(value, list) else value


def read_result(path: Path) -> dict[str, Any]:
    """A result under today's keys, with its date."""
    return {**renamed(json.loads(path.read_text(encoding="utf-8"))), "date": path.name[:10], "file": path.name}


def all_results(kind: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every result of a kind, oldest first."""
    paths = sorted(folder.glob("????-??-??-*.json"))
    return [read_result(path) for path in paths if path.stem[11:].partition(".")[0] == kind]


def results(kind: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The newest result of a kind on each processor, newest first."""
    found = {result["machine"]["family_model_stepping"]: result for result in all_results(kind, folder)}
    return sorted(found.values(), key=lambda result: str(result["file"]), reverse=True)


def newest(kind: str) -> dict[str, Any]:
    """The newest result of a kind."""
    return read_result(max(RESULTS.glob(f"*-{kind}*.json")))


def machine(result: Mapping[str, Any]) -> str:
    """The machine in a line."""
    about = result["machine"]
    flags = [flag for flag in about["flags"] if flag in ("avx2", "avx512_bf16", "amx_bf16")]
    return (
        f"{about['cores']} cores of {about['cpu']} (family/model/stepping {about['family_model_stepping']}, "
        f"{', '.join(flags)}), {about['memory_gb']:.0f} GB, torch {about['torch']}; graftlm at {result['graftlm']}."
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; all but the first `left` columns are aligned on the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def number(value: float) -> str:
    """Three significant digits; whole numbers from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def fill(text: str, found: Mapping[str, str]) -> str:
    """The page with each part between `<!-- NAME -->` and `<!-- end -->` replaced; names must match."""
    marks = [mark for mark in re.findall(r"<!-- (\w+) -->\n", text) if mark != "end"]
    if sorted(marks) != sorted(found):
        raise BenchmarkError(f"the page marks {', '.join(marks)}; the result has {', '.join(found)}")
    for name, block in found.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        text = before + mark + block + "\n" + rest[rest.index("<!-- end -->") :]
    return text


Line = Sequence[tuple[float, float]]
Band = Sequence[tuple[float, float, float]]


def chart(
    lines: Mapping[str, Line],
    title: str,
    x_label: str,
    ticks: Sequence[float],
    root: bool = False,
    log: bool = False,
    bands: Mapping[str, Band] | None = None,
) -> str:
    """Lines through (x, y) points that colour and dashes distinguish, on a light or dark page.

    bands: the (x, low, high) of an area around a line, by the line's name.
    root: x on a square-root scale, on which rewards rise about linearly with the KL at first (Gao et al. 2022).
    log: x on a logarithmic scale.
    """
    left, top, width, height = 56, 12, 580, 260
    points = [point for line in lines.values() for point in line]
    bands = bands or {}
    values = [y for _, y in points] + [y for band in bands.values() for _, *ends in band for y in ends]
    near, far = min(x for x, _ in points), max([x for x, _ in points] + [1e-9])
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.sqrt(max(x, 0.0) / far) if root else math.log(x / near, far / near) if log else x / far
        return left + width * share, top + height * (high - y) / (high - low)

    body = []
    for i in range(5):
        value = low + (high - low) * i / 4
        _, y = place(far, value)
        body.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#999" stroke-opacity=".35"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
    for tick in (tick for tick in ticks if tick <= far):
        body.append(f'<text x="{place(tick, 0.0)[0]:.1f}" y="{top + height + 18}" text-anchor="middle">{tick:g}</text>')
    body.append(f'<text x="{left + width / 2}" y="{top + height + 36}" text-anchor="middle">{escape(x_label)}</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour, y = COLOURS[i % 6], top + height + 62 + 18 * i
        look = f'stroke="{colour}" stroke-dasharray="{DASHES[i % 6]}" stroke-width="2"'
        placed = [place(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        if band := bands.get(name):
            edge = [place(x, y) for x, y, _ in band] + [place(x, y) for x, _, y in reversed(band)]
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
            body.append(f'<polygon points="{corners}" fill="{colour}" fill-opacity=".15"/>')
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed)
        body.append(
            f'<polyline points="{path}" fill="none" {look}/>{dots}'
            f'<line x1="{left}" x2="{left + 40}" y1="{y - 4}" y2="{y - 4}" {look}/>'
            f'<text x="{left + 48}" y="{y}">{escape(name)}</text>'
        )
    size = f"{left + width + 24} {top + height + 62 + 18 * len(lines)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" '
        f'font-family="sans-serif" font-size="13" fill="#777"><title>{escape(title)}</title>'
        f"{''.join(body)}</svg>\n"
    )
