"""benchmarks/results/*.json -> docs/benchmarks.md: each kind's newest result on each processor: table, claims, picture.

    python benchmarks/page.py

A result's file is called DATE-KIND.json, or DATE-KIND.MACHINE.json, and holds "machine", "graftlm", "claims" and either
"medians" (contender -> figures) or "found" (run -> figures); and maybe "curves" (figure -> contender -> [x, y] points).
The same results always give the same page. Pictures are plain SVG.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
KINDS = {  # kind -> (title, script and flags, the figure that is drawn)
    "train": ("Training, loss on the completion", "train_vs_peers.py", "examples_per_s"),
    "train-all": ("Training, loss on every token", "train_vs_peers.py --loss_on all", "examples_per_s"),
    "speeds": ("All methods", "methods.py", "examples_per_s"),
    "dpo": ("Training on preferences", "dpo_vs_trl.py", "pairs_per_s"),
    "evaluate": ("Reading labels", "evaluate_vs_peers.py", "examples_per_s"),
    "few-shot": ("Few-shot classification", "fewshot_vs_peers.py", "examples_per_s"),
    "train-layers": ("Upper layers only, the lower ones computed once", "train_layers.py", "later_epochs"),
    "startup": ("Start-up", "startup.py", "cpu_seconds"),
    "serve": ("Serving", "serve_load.py", ""),
    "processes": ("One process and two", "processes.py", "examples_per_s"),
    "plan": ("What the plan says, and what comes", "plan_vs_run.py", ""),
    "before": ("Today's checkout and an earlier one", "before_and_now.py", ""),
    "before-again": ("The same again, where it was slower", "before_and_now.py --only few-shot,help", ""),
}


def newest(folder: Path, kind: str) -> dict[str, dict[str, Any]]:
    """File name without .json -> result: the newest of a kind on each processor."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("????-??-??-*.json")):
        if path.stem[11:].partition(".")[0] == kind:
            result = json.loads(path.read_text(encoding="utf-8"))
            found[result["machine"]["family_model_stepping"]] = (path.stem, result)
    return dict(sorted(found.values(), reverse=True))


def page(folder: Path) -> tuple[str, dict[str, str]]:
    """The page's text, and its pictures: file name -> SVG."""
    parts, pictures = [INTRODUCTION], {}
    for kind, (title, script, drawn) in KINDS.items():
        results = newest(folder, kind)
        parts += [f"## {title}", f"`python benchmarks/{script}`"] if results else []
        for name, result in results.items():
            rows = result.get("medians") or {name: _flat(run) for name, run in result["found"].items()}
            parts += [f"{name[:10]}. {machine(result)}", table(rows)]
            if drawn:
                figures = {row: each[drawn] for row, each in rows.items() if drawn in each}
                pictures[f"{name}.svg"] = bars(figures, drawn)
                parts.append(f"![{escape(drawn)} of each](benchmarks/{name}.svg)")
            for figure, curves in result.get("curves", {}).items():
                pictures[f"{name}-{figure}.svg"] = lines(curves, figure, "clients")
                parts.append(f"![{escape(figure)} by clients](benchmarks/{name}-{figure}.svg)")
            parts += _judged(result)
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n", pictures


def _judged(result: Mapping[str, Any]) -> list[str]:
    """Ratios and claims, a line each."""
    lines = []
    for name, ratio in result.get("ratios", {}).items():
        each = ", ".join(f"{x:.2f}" for x in ratio["rounds"])
        lines.append(f"- {name}: **{ratio['median']:.2f}** (rounds: {each})")
    words = {True: "holds", False: "does **not** hold", None: "was not measured"}
    return lines + [f"- *{claim}*: {words[holds]}" for claim, holds in result["claims"].items()]


INTRODUCTION = """# Benchmarks

Made by `python benchmarks/page.py` from the dated files under `benchmarks/results/`; `make bench` measures anew.
Ratios are formed within a round, side by side in one run; a line of figures without its machine says little."""


def machine(result: Mapping[str, Any]) -> str:
    """The machine in a line."""
    about = result["machine"]
    flags = [flag for flag in about["flags"] if flag in ("avx2", "avx512_bf16", "amx_bf16")]
    earlier = result.get("config", {}).get("before")
    before = f", before it at {earlier}" if earlier else ""
    return (
        f"{about['cores']} cores of {about['cpu']} (family/model/stepping {about['family_model_stepping']}, "
        f"{', '.join(flags)}), {about['memory_gb']:.0f} GB, torch {about['torch']}; "
        f"graftlm at {result['graftlm']}{before}."
    )


def _flat(run: Mapping[str, Any]) -> dict[str, float]:
    """{"seconds": {"planned": 1, …}} -> {"seconds planned": 1, …}."""
    pairs = {key: value for key, value in run.items() if isinstance(value, dict)}
    return {f"{key} {side}": figure for key, pair in pairs.items() for side, figure in pair.items()}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: a line for each contender, a column for each figure that any of them has."""
    columns = list(dict.fromkeys(key for figures in rows.values() for key in figures))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, figures in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(figures.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def bars(values: Mapping[str, float], what: str) -> str:
    """Horizontal bars from zero, each with its name and value; readable in light and dark surroundings."""
    left, width, line = 220, 420, 26
    height, most = line * (len(values) + 1) + 8, max(values.values())
    body = []
    for i, (name, value) in enumerate(values.items()):
        y = line * (i + 1)
        colour = "#c2571a" if name.startswith(("graft", "upper")) else "#6b7f99"
        body.append(
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left}" y="{y + 3}" width="{width * value / most:.1f}" height="{line - 8}" fill="{colour}"/>'
            f'<text x="{left + width * value / most + 6:.1f}" y="{y + 16}">{value:.3g}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 70} {height}" role="img" '
        f'font-family="sans-serif" font-size="13" fill="#777"><title>{escape(what)}</title>'
        f'<text x="{left}" y="17">{escape(what)}</text>{"".join(body)}</svg>\n'
    )


COLOURS = ("#c2571a", "#b08400", "#6b7f99")
DASHES = ("", "6 4", "2 3")


def lines(curves: Mapping[str, Sequence[Sequence[float]]], what: str, along: str) -> str:
    """A line for each contender from zero up, over x in even steps; its name and last value stand at its end."""
    left, width, top, height = 60, 420, 34, 240
    xs = sorted({x for points in curves.values() for x, _ in points})
    most = max(y for points in curves.values() for _, y in points)
    place = {x: left + width * number / max(1, len(xs) - 1) for number, x in enumerate(xs)}
    down = {y: top + height * (1 - y / most) for points in curves.values() for _, y in points}
    body = [f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#999"/>']
    body += [f'<text x="{place[x]:.1f}" y="{top + height + 18}" text-anchor="middle">{x:g}</text>' for x in xs]
    ends: list[float] = []  # of the names that are written, so that none covers another
    for number, (name, points) in enumerate(sorted(curves.items(), key=lambda curve: -curve[1][-1][1])):
        path = "L".join(f"{place[x]:.1f} {down[y]:.1f}" for x, y in points)
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        x, y = points[-1]
        ends.append(max(down[y] + 4, ends[-1] + 15 if ends else 0))
        body.append(
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
            f'<text x="{place[x] + 6:.1f}" y="{ends[-1]:.1f}">{escape(name)}: {y:.3g}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 170} {top + height + 44}" role="img" '
        f'font-family="sans-serif" font-size="13" fill="#777"><title>{escape(what)}</title>'
        f'<text x="8" y="17">{escape(what)}</text>{"".join(body)}'
        f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">{escape(along)}</text></svg>\n'
    )


def main(words: Sequence[str] | None = None) -> int:
    """Write the page and its pictures under docs/."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(words)
    text, pictures = page(ROOT / "benchmarks" / "results")
    (ROOT / "docs" / "benchmarks").mkdir(parents=True, exist_ok=True)
    (ROOT / "docs" / "benchmarks.md").write_text(text, encoding="utf-8")
    for name, svg in pictures.items():
        (ROOT / "docs" / "benchmarks" / name).write_text(svg, encoding="utf-8")
    print(f"docs/benchmarks.md: {len(pictures)} pictures", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
