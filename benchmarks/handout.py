"""The course handout's experiments, or all methods: recipes -> a dated result -> docs/handout.md, docs/methods.md.

    python benchmarks/handout.py [--study methods] [--budget_steps 128] [--jobs 2] [--json-out FILE]

Runs `graft compare` on each recipe of recipes/handout or recipes/methods; a run that is in two recipes is made once.
Killed and started again, it continues. `page.py` makes the tables and curves from the newest result.
"""

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import ROOT
from render import DOCS, chart, fill, machine, newest


@dataclass(frozen=True)
class Study:
    """A folder of recipes and its page."""

    name: str
    compared: tuple[str, ...]
    """Recipes of `graft compare`."""

    def recipe(self, name: str) -> dict[str, Any]:
        """A recipe's tables."""
        return tomllib.loads((ROOT / "recipes" / self.name / f"{name}.toml").read_text(encoding="utf-8"))

    @property
    def batch_size(self) -> int:
        """Reviews in a step, the same in every recipe."""
        (size,) = {self.recipe(name)["train"].get("batch_size", 16) for name in self.compared}
        return int(size)


STUDIES = {
    "handout": Study("handout", ("zero_shot", "ranks", "alpha", "alpha_or_lr", "templates")),
    "methods": Study("methods", ("all", "search")),
}
CURVES = ("val_loss", "val_accuracy")


def curves(out_dir: Path) -> dict[str, list[dict[str, float]]]:
    """Row -> its validations, of every run of the comparison in a folder."""
    found = {}
    for cell in json.loads((out_dir / "sweep.json").read_text(encoding="utf-8"))["cells"]:
        metrics = out_dir / cell["folder"] / "run" / "metrics.jsonl"
        if metrics.is_file():
            rows = [row for row in harness.read_rows(metrics) if row["val_loss"] is not None]
            found[cell["row"]] = [{key: row[key] for key in ("step", *CURVES)} for row in rows]
    return found


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every recipe's table and curves; the handout's share of trained parameters is a run of its own."""
    study, found = STUDIES[args.study], dict[str, Any]()
    recipes = f"recipes/{study.name}"
    if study.name == "handout":
        found["share"] = harness.graft("train", "--config", f"{recipes}/share.toml", "--out_dir", "runs/handout-share")
    tables, drawn = {}, {}
    for name in study.compared:
        harness.note(f"{name}:")
        words = ["--config", f"{recipes}/{name}.toml", "--jobs", str(args.jobs)]
        words += [f"--budget_steps={args.budget_steps}"] if args.budget_steps and name != "search" else []
        tables[name] = harness.graft("compare", *words)["rows"]
        drawn[name] = curves(ROOT / study.recipe(name)["out_dir"])
    config = {"budget_steps": args.budget_steps, "jobs": args.jobs}
    return {"config": config, **found, "tables": tables, "curves": drawn}


# ---------------------------------------------------------------------------------------------------------- the page


def blocks(study: Study, result: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """What belongs between the page's marks, and the pictures: file name -> SVG."""
    from graftlm.studies.results_table import markdown

    steps, jobs, size = result["config"]["budget_steps"], result["config"]["jobs"], study.batch_size
    budget = f"{steps} steps a run in batches of {size} reviews" if steps else f"two epochs a run in batches of {size}"
    at_once = f"{jobs} at a time" if jobs > 1 else "one after the other"
    found = {"machine": f"{result['date']}, {budget}, {at_once}. {machine(result)}"}
    if share := result.get("share"):
        found["share"] = (
            f"{share['trainable']:,} of {share['total']:,} parameters: **{share['trainable_fraction']:.2%}**."
        )
    pictures = {}
    for name, rows in result["tables"].items():
        parts = [markdown(rows).rstrip("\n")]
        for key in CURVES if result["curves"][name] and name != "search" else ():  # search validates at the end only
            lines = {
                row: [(point["step"], point[key]) for point in curve] for row, curve in result["curves"][name].items()
            }
            last = max(x for line in lines.values() for x, _ in line)
            words = f"{key.replace('val_', 'validation ')} against the step"
            pictures[f"{name}-{key}.svg"] = chart(lines, words, "step", sorted({0, last // 2, last}))
            parts.append(f"![{words}]({study.name}/{name}-{key}.svg)")
        found[name] = "\n\n".join(parts)
    return found, pictures


def pages() -> dict[Path, str]:
    """The files that the newest results give."""
    files = {}
    for name, study in STUDIES.items():
        found, pictures = blocks(study, newest(name))
        files[DOCS / f"{name}.md"] = fill((DOCS / f"{name}.md").read_text(encoding="utf-8"), found)
        files |= {DOCS / name / picture: svg for picture, svg in pictures.items()}
    return files


FLAGS: dict[str, dict[str, Any]] = {
    "study": {"choices": tuple(STUDIES), "default": "handout", "help": "the folder of recipes"},
    "budget_steps": {"type": int, "default": 0, "help": "steps of each run (default: two epochs)"},
    "jobs": {"type": int, "default": 1, "help": "runs at the same time (default 1)"},
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS))
