"""A folder of recipes -> a dated result, and the tables and curves of its page: the course handout's, and all methods'.

    python benchmarks/handout.py [--study methods] [--budget_steps 128] [--jobs 2] [--json-out FILE]
    python benchmarks/handout.py [--study methods] --page FILE

Runs `graft compare` on each recipe of recipes/handout (or recipes/methods), so that a run which stands in two recipes
is made once; killed and given again it goes on. With --page only docs/STUDY.md is made anew from a result: what stands
between `<!-- NAME -->` and `<!-- end -->` there is replaced, the words around it are written by hand.
One JSON object goes to the last line of stdout.
"""

import argparse
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from _machine import describe
from page import machine
from train_vs_peers import ROOT, BenchmarkError, git_state

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Study:
    """A folder of recipes and its page."""

    name: str
    compared: tuple[str, ...]
    """Recipes of `graft compare`."""
    share: bool
    """Whether share.toml, a recipe of `graft train`, is run for the share of the parameters that it trains."""

    @property
    def recipes(self) -> Path:
        """Their folder."""
        return ROOT / "recipes" / self.name

    @property
    def page(self) -> Path:
        """The page that shows them."""
        return ROOT / "docs" / f"{self.name}.md"

    def recipe(self, name: str) -> dict[str, Any]:
        """What stands in one of them."""
        return tomllib.loads((self.recipes / f"{name}.toml").read_text(encoding="utf-8"))

    @property
    def batch_size(self) -> int:
        """Reviews in a step, the same in every recipe."""
        (size,) = {self.recipe(name)["train"].get("batch_size", 16) for name in self.compared}
        return size


STUDIES = {
    "handout": Study("handout", ("zero_shot", "ranks", "alpha", "alpha_or_lr", "templates"), share=True),
    "methods": Study("methods", ("all", "search"), share=False),
}


def graft(*words: str) -> Any:
    """The JSON object of a graft command; its notes go to the standard error as they come."""
    command = [sys.executable, "-m", "graftlm", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(words)} failed with status {done.returncode}")
    return json.loads(done.stdout)


def curves(out_dir: Path) -> dict[str, Curve]:
    """Row -> its validations, of every run of the comparison that stands in the folder now."""
    found: dict[str, Curve] = {}
    for cell in json.loads((out_dir / "sweep.json").read_text(encoding="utf-8"))["cells"]:
        metrics = out_dir / cell["folder"] / "run" / "metrics.jsonl"
        if metrics.is_file():
            rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
            kept = ("step", "val_loss", "val_accuracy")
            found[cell["row"]] = [{k: row[k] for k in kept} for row in rows if row["val_loss"] is not None]
    return found


def run_all(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Every recipe's table and curves."""
    tables, drawn, found = {}, {}, {}
    if study.share:
        out_dir = f"runs/{study.name}-share"
        found["share"] = graft("train", "--config", str(study.recipes / "share.toml"), "--out_dir", out_dir)
    for name in study.compared:
        print(f"{name}:", file=sys.stderr)
        words = ["--config", str(study.recipes / f"{name}.toml"), "--jobs", str(args.jobs)]
        words += [f"--budget_steps={args.budget_steps}"] if args.budget_steps and name != "search" else []
        tables[name] = graft("compare", *words)["rows"]
        drawn[name] = curves(ROOT / study.recipe(name)["out_dir"])
    return {**found, "tables": tables, "curves": drawn}


# ---------------------------------------------------------------------------------------------------------- the page


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a5548b", "#56b4e9", "#7f7f7f")  # Okabe and Ito's, a little darker
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "none", "7 3")


def picture(series: Mapping[str, Curve], what: str) -> str:
    """Lines of `what` against the step, one a row, told apart by colour and dashes; for light and dark surroundings."""
    left, top, width, height = 56, 12, 560, 240
    steps = [point["step"] for curve in series.values() for point in curve]
    values = [point[what] for curve in series.values() for point in curve]
    low, high = min(values), max(values)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)

    def x(step: float) -> float:
        return left + width * step / max(steps)

    def y(value: float) -> float:
        return top + height * (high - value) / (high - low)

    body = []
    for i in range(5):
        value = low + (high - low) * i / 4
        body.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#999" '
            f'stroke-opacity=".35"/><text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
    for step in sorted({0, max(steps) // 2, max(steps)}):
        body.append(f'<text x="{x(step):.1f}" y="{top + height + 18}" text-anchor="middle">{step:g}</text>')
    for i, (name, curve) in enumerate(series.items()):
        points = " ".join(f"{x(p['step']):.1f},{y(p[what]):.1f}" for p in curve)
        look = f'stroke="{COLOURS[i % 6]}" stroke-dasharray="{DASHES[i % 6]}" stroke-width="2"'
        below = top + height + 44 + 18 * i
        body.append(
            f'<polyline points="{points}" fill="none" {look}/>'
            f'<line x1="{left}" x2="{left + 40}" y1="{below - 4}" y2="{below - 4}" {look}/>'
            f'<text x="{left + 48}" y="{below}">{escape(name)}</text>'
        )
    whole = top + height + 44 + 18 * len(series)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 24} {whole}" role="img" '
        f'font-family="sans-serif" font-size="13" fill="#777"><title>{escape(what)} against the step</title>'
        f"{''.join(body)}</svg>\n"
    )


def blocks(study: Study, result: Mapping[str, Any], date: str) -> tuple[dict[str, str], dict[str, str]]:
    """What belongs between the page's marks, and the pictures: file name -> SVG."""
    from graftlm.studies.results_table import markdown

    steps = result["config"]["budget_steps"]
    size = study.batch_size
    budget = f"{steps} steps of {size} reviews a run" if steps else f"two epochs a run in batches of {size}"
    jobs = f"{result['config']['jobs']} at a time" if result["config"]["jobs"] > 1 else "one after the other"
    found = {"machine": f"{date}, {budget}, {jobs}. {machine(result)}"}
    if share := result.get("share"):
        found["share"] = f"{share['trainable']:,} of {share['total']:,} parameters: **{share['share_trained']:.2%}**."
    pictures = {}
    for name, rows in result["tables"].items():
        parts = [markdown(rows).rstrip("\n")]
        for what in ("val_loss", "val_accuracy"):
            if result["curves"][name] and name != "search":  # whose runs are judged at their end only
                pictures[f"{name}-{what}.svg"] = picture(result["curves"][name], what)
                words = what.replace("val_", "validation ")
                parts.append(f"![{words} against the step]({study.name}/{name}-{what}.svg)")
        found[name] = "\n\n".join(parts)
    return found, pictures


def fill(text: str, found: Mapping[str, str]) -> str:
    """The page with each marked part replaced; a mark that is missing or unknown is an error."""
    marks = re.findall(r"<!-- (\w+) -->\n", text)
    if sorted(m for m in marks if m != "end") != sorted(found):
        raise BenchmarkError(f"the page marks {', '.join(marks)}; the result has {', '.join(found)}")
    for name, block in found.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        text = before + mark + block + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def write_page(study: Study, file: Path) -> None:
    """The study's page and its pictures from a result's file."""
    found, pictures = blocks(study, json.loads(file.read_text(encoding="utf-8")), file.stem[:10])
    study.page.write_text(fill(study.page.read_text(encoding="utf-8"), found), encoding="utf-8")
    folder = study.page.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, svg in pictures.items():
        (folder / name).write_text(svg, encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    """Run the experiments, or make the page; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=tuple(STUDIES), default="handout", help="the folder of recipes")
    parser.add_argument("--budget_steps", type=int, default=0, help="steps of each run (default: two epochs)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default 1)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--page", type=Path, help="only make the study's page from this result")
    args = parser.parse_args(words)
    study = STUDIES[args.study]
    sys.path.insert(0, str(ROOT / "src"))
    try:
        if args.page:
            write_page(study, args.page)
            return 0
        config = {"budget_steps": args.budget_steps, "jobs": args.jobs}
        report = {"machine": describe(), "graftlm": git_state(), "config": config, **run_all(study, args)}
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
