"""The course handout's experiments, or all methods: recipes -> dated results -> docs/handout.md, docs/methods.md.

    python benchmarks/handout.py --json-out FILE [--study methods] [--out_dir DIR] [--jobs 2]     train what is missing
    python benchmarks/handout.py --json-out FILE --collect [--study methods] [--out_dir DIR]      train nothing

A trial is one run of a recipe of recipes/handout or recipes/methods with one seed. FILE gets what the page needs of
each finished trial, and keeps what it has. A trial in FILE or in a result of benchmarks/results is not trained again,
so the trials may be spread over sittings and machines. `--collect` takes the finished ones from a folder of
`graft compare`, also while it is at work there. Of the runs of recipes/methods/all.toml that are still in the folder,
forgetting.py measures the forgetting, also later than the accuracy. `page.py` makes tables and curves from all results.
"""

import argparse
import hashlib
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import mean, median_low
from typing import Any

import forgetting
import harness
from harness import ROOT
from render import DOCS, all_results, chart, fill, machine

from graftlm.config import CompareConfig
from graftlm.config.flags import parse
from graftlm.studies.results_table import COSTS, TrialResult, make_rows, markdown, read_test
from graftlm.studies.sweep import Trial, read_sweep

STUDIES = {
    "handout": ("zero_shot", "ranks", "alpha", "alpha_or_lr", "templates"),
    "methods": ("all", "search"),
    "lora_without_regret": ("ranks", "targets", "batch_size"),
}
"""A folder of recipes, which names the page and the results -> its recipes of `graft compare`."""
PAGES = ("handout", "methods")
"""The studies whose pages this file makes."""
FORGETTING = {"methods": ("all",)}
"""A study -> the recipes whose runs are measured for forgetting."""
CURVES = ("val_loss", "val_accuracy")
PLAN = ("train_seconds", "validation_seconds", "peak_rss_mb")
Saved = dict[str, Any]
"""A trial in a result: id, row, seed; date, machine, graftlm, jobs, other_work; tests; of a run also dtype, run, curve
and, once measured, forgetting: date, graftlm, and by checkpoint what `forgetting.compared` says."""
Trials = dict[str, Saved]  # by id
Curve = Mapping[str, Sequence[float]]  # of "step" and of CURVES: the values of all validations


@dataclass(frozen=True)
class Recipe:
    """A recipe of `graft compare`."""

    file: Path

    @cached_property
    def config(self) -> CompareConfig:
        """Its flags."""
        return parse("compare", CompareConfig, ["--config", str(self.file)]).config

    @cached_property
    def trials(self) -> list[Trial]:
        """Its trials, row by row."""
        return read_sweep(str(self.file), {}, {})

    def checkpoints(self, trial: Trial) -> tuple[str, ...]:
        """The checkpoints that its table shows of a trial."""
        if not trial.trains:
            return ("",)
        return ("best", "last") if self.config.checkpoint == "both" else (self.config.checkpoint,)

    def is_done(self, trial: Trial, tests: Mapping[str, Any]) -> bool:
        """Whether its table has all it needs of a trial; tests: checkpoint -> the trial's test-*.json."""
        wanted = {"mode": self.config.mode, "limit": self.config.limit}
        return all(tests.get(name, {}).get("eval_config") == wanted for name in self.checkpoints(trial))

    def missing(self, trials: Trials) -> list[Trial]:
        """Those of its trials that are not among `trials`."""
        return [each for each in self.trials if not self.is_done(each, trials.get(each.id, {}).get("tests", {}))]

    def write(self, trials: Sequence[Trial], file: Path) -> Path:
        """A sweep file of some of its trials, which have the same ids in it."""
        tables = tomllib.loads(self.file.read_text(encoding="utf-8"))
        flags = {key: value for key, value in tables.items() if not isinstance(value, dict | list)}
        rows = [{"name": trial.row, **trial.flags} for trial in trials]
        texts = ["".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()) for table in (flags, *rows)]
        file.write_text("\n[[rows]]\n".join(texts), encoding="utf-8")
        return file


def recipes(study: str) -> dict[str, Recipe]:
    """The recipes of a study by name."""
    return {name: Recipe(ROOT / "recipes" / study / f"{name}.toml") for name in STUDIES[study]}


# -------------------------------------------------------------------------------------------------------- the trials


def collect(recipe: Recipe, out_dir: Path, known: Trials, about: Mapping[str, Any]) -> Trials:
    """The finished trials in a folder of `graft compare` that are not known; the folder is only read.

    about: what the run folders do not say: machine, jobs, other_work, and graftlm of a trial that does not train.
    """
    found = {}
    for trial in recipe.missing(known):
        names = ("best", "last") if trial.trains else ("",)
        files = {name: out_dir / trial.folder / f"test-{name}.json" for name in names}
        tests = {name: read_test(file) for name, file in files.items() if file.is_file()}
        if recipe.is_done(trial, tests):
            written = max(files[name].stat().st_mtime for name in tests)
            date = datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d")
            found[trial.id] = save(trial, out_dir / trial.folder, tests, {**about, "date": date})
    return found


def save(trial: Trial, folder: Path, tests: Mapping[str, Any], origin: Mapping[str, Any]) -> Saved:
    """What a result has of a trial; of each test example one bit says whether its predicted label is correct."""
    saved: Saved = {"id": trial.id, "row": trial.row, "seed": trial.seed, **origin, "tests": {}}
    for checkpoint, test in tests.items():
        correct = TrialResult(trial, checkpoint, folder).correct
        texts = hashlib.sha256("\n".join(text for text, _ in correct).encode()).hexdigest()
        bits = "".join("01"[each] for _, each in correct)
        saved["tests"][checkpoint] = {**test, "examples": texts, "correct": f"{int(bits, 2):x}"}
    if trial.trains:
        run = TrialResult(trial, "", folder).run
        saved |= {"date": run["date"], "graftlm": run["git"] or origin["graftlm"], "dtype": run["dtype"]}
        results = {key: run["results"][key] for key in (*COSTS, *tests)}
        saved["run"] = {"results": results, "plan": {key: run["plan"][key] for key in PLAN}}
        rows = [row for row in harness.read_rows(folder / "run" / "metrics.jsonl") if row["val_loss"] is not None]
        saved["curve"] = {key: [row[key] for row in rows] for key in ("step", *CURVES)}
    return saved


def measure_forgetting(recipe: Recipe, out_dir: Path, known: Trials, work: Path) -> Trials:
    """Those of a recipe's known trials that have no forgetting yet and whose runs are in the folder, with it."""
    found, bases = Trials(), dict[str, Any]()
    for trial in (trial for trial in recipe.trials if trial.trains and trial not in recipe.missing(known)):
        saved, folder = known[trial.id], out_dir / trial.folder / "run"
        if "forgetting" in saved or not (folder / "run.json").is_file():
            continue
        run = TrialResult(trial, "", folder.parent).run
        if run["results"] is None or any(run["results"][key] != x for key, x in saved["run"]["results"].items()):
            harness.note(f"{trial.row} (seed {trial.seed}): {folder} has another run than the result")
            continue
        base = run["base"]["name"]
        if base not in bases:
            bases[base] = forgetting.measure(folder, "base", work / f"base-{len(bases)}")
        measured = {
            name: forgetting.compared(bases[base], forgetting.measure(folder, name, work / f"{trial.id}-{name}"))
            for name in recipe.checkpoints(trial)
        }
        harness.note("; ".join(f"{trial.row}: {forgetting.cell(each)}" for each in measured.values()))
        origin = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "graftlm": harness.git_commit()}
        found[trial.id] = {**saved, "forgetting": {**origin, "checkpoints": measured}}
    return found


def merge(*groups: Iterable[Saved]) -> Trials:
    """All trials; of two with the same id the one with more checkpoints, then with forgetting, or else the first."""
    found: Trials = {}
    for trial in (trial for group in groups for trial in group):
        if trial["id"] not in found or completeness(trial) > completeness(found[trial["id"]]):
            found[trial["id"]] = trial
    return found


def completeness(trial: Saved) -> tuple[int, bool]:
    """How much a result has of a trial: its checkpoints, and whether it has forgetting."""
    return len(trial["tests"]), "forgetting" in trial


@dataclass(frozen=True)
class SavedResult(TrialResult):
    """A trial's result at one checkpoint, from a result file."""

    saved: Saved = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, Any]:
        """The JSON object of `graft evaluate --json`."""
        return dict(self.saved["tests"][self.checkpoint]["reading"])

    @property
    def correct(self) -> list[tuple[str, bool]]:
        """A name of each example that is the same in all trials, and whether its predicted label is correct."""
        test = self.saved["tests"][self.checkpoint]
        bits = f"{int(test['correct'], 16):0{test['reading']['n']}b}"
        return [(f"{test['examples']} {number}", bit == "1") for number, bit in enumerate(bits)]

    @property
    def run(self) -> dict[str, Any]:
        """What a table needs of run.json; empty for zero-shot."""
        return dict(self.saved.get("run", {}))


# ------------------------------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The trials of FILE, and those that are finished and in no result yet."""
    study, committed = recipes(args.study), all_results(args.study)
    file = json.loads(args.json_out.read_text(encoding="utf-8")) if args.json_out and args.json_out.is_file() else {}
    kept = merge(file.get("trials", ()))
    known = merge(kept.values(), *(result.get("trials", ()) for result in committed))
    here = {key: value for key, value in harness.describe().items() if key != "date"}
    about = {"machine": here, "graftlm": harness.git_commit(), "jobs": args.jobs, "other_work": args.other_work}
    taken: Trials = {}
    folders = {name: args.out_dir or ROOT / recipe.config.out_dir for name, recipe in study.items()}
    for name, recipe in study.items():
        taken |= collect(recipe, folders[name], known | taken, about)
    seeds = sorted({trial.seed for recipe in study.values() for trial in recipe.trials})
    for seed, (name, recipe) in ((seed, each) for seed in seeds if not args.collect for each in study.items()):
        if missing := [trial for trial in recipe.missing(known | taken) if trial.seed == seed]:
            harness.note(f"{name}: {listed((trial.row, trial.seed) for trial in missing)}")
            sweep = recipe.write(missing, work / f"{name}-{seed}.toml")
            harness.graft("compare", f"--config={sweep}", f"--out_dir={folders[name]}", f"--jobs={args.jobs}")
            taken |= collect(recipe, folders[name], known | taken, about)
    for name in FORGETTING.get(args.study, ()):
        taken |= measure_forgetting(study[name], folders[name], merge(taken.values(), known.values()), work)
    for name, recipe in study.items():
        left = listed((trial.row, trial.seed) for trial in recipe.missing(known | taken))
        harness.note(f"{name}: {f'missing are {left}' if left else 'complete'}")
    found: dict[str, Any] = {key: file[key] for key in ("share",) if key in file}
    if args.study == "handout" and not any("share" in result for result in (file, *committed)):
        words = ("--config", "recipes/handout/share.toml", "--out_dir", "runs/handout-share")
        found["share"] = harness.graft("train", *words)
    return {**found, "trials": list(merge(taken.values(), kept.values()).values())}


def listed(pairs: Iterable[tuple[str, int]]) -> str:
    """Rows with their seeds, in words: `a (seeds 0, 1); b (seed 0)`."""
    seeds: dict[str, list[str]] = {}
    for row, seed in pairs:
        seeds.setdefault(row, []).append(str(seed))
    return "; ".join(f"{row} (seed{'s' * (len(each) > 1)} {', '.join(each)})" for row, each in seeds.items())


# ---------------------------------------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class Table:
    """A recipe's table and curves."""

    rows: list[dict[str, Any]]
    """As `graft compare` has them."""
    curves: Mapping[str, Sequence[Curve]]
    """Row -> the curve of each seed."""
    note: str
    """What is missing, or which runs these are; stands above the table."""
    earlier: bool = False
    """Whether it is of a result that has tables instead of trials."""

    def pictures(self, name: str) -> dict[str, tuple[str, str]]:
        """File name -> (title, SVG); none of one row, or of runs that validate at their end only."""
        if len(self.curves) < 2 or not any(len(curve["step"]) > 1 for each in self.curves.values() for curve in each):
            return {}
        several = any(len(curves) > 1 for curves in self.curves.values())
        found = {}
        for key in CURVES:
            values = {row: at_each_step(curves, key) for row, curves in self.curves.items()}
            lines = {row: [(step, mean(each)) for step, each in at.items()] for row, at in values.items()}
            bands = {row: [(step, min(each), max(each)) for step, each in at.items()] for row, at in values.items()}
            last = max(x for line in lines.values() for x, _ in line)
            words = f"{key.replace('val_', 'validation ')} against the step" + ", mean and range of seeds" * several
            picture = chart(lines, words, "step", sorted({0, last // 2, last}), bands=bands if several else {})
            found[f"{name}-{key}.svg"] = (words, picture)
        return found


def at_each_step(curves: Sequence[Curve], key: str) -> dict[float, list[float]]:
    """Step -> the values of all seeds, for steps at which all were validated."""
    each = [dict(zip(curve["step"], curve[key], strict=True)) for curve in curves]
    return {step: [values[step] for values in each] for step in each[0] if all(step in values for values in each)}


def table_of_trials(recipe: Recipe, trials: Trials) -> Table:
    """The table of those trials of a recipe that are done; times are of trials without other work on the machine."""
    missing = recipe.missing(trials)
    done = [(trial, trials[trial.id]) for trial in recipe.trials if trial not in missing]
    results = [
        SavedResult(trial, name, Path(), saved=each) for trial, each in done for name in recipe.checkpoints(trial)
    ]
    curves: dict[str, list[Curve]] = {}
    for trial, each in done:
        if trial.trains:
            curves.setdefault(trial.row, []).append(each["curve"])
    rows = make_rows(results)
    for row in (row for row in rows if row["steps"] is not None):
        quiet = [each["run"]["results"] for trial, each in done if trial.row == row["name"] and not each["other_work"]]
        row |= {
            key: median_low(each[key] for each in quiet) if quiet else None for key in ("seconds", "examples_per_s")
        }
        if cell := forgetting_of([each for trial, each in done if trial.row == row["name"]], row["checkpoint"]):
            row["forgetting"] = cell
    note = f"Missing: {listed((trial.row, trial.seed) for trial in missing)}." if missing else ""
    return Table(rows, curves, note)


def forgetting_of(seeds: Sequence[Saved], checkpoint: str) -> str:
    """The cell of a row with these trials: each seed's forgetting; empty until all are measured."""
    if not all("forgetting" in each for each in seeds):
        return ""
    return "; ".join(forgetting.cell(each["forgetting"]["checkpoints"][checkpoint]) for each in seeds)


def markdown_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A recipe's table in Markdown, with a column of forgetting if a row has some."""
    cells = [row.get("forgetting", "") for row in rows]
    return markdown(rows, {forgetting.HEAD: cells} if any(cells) else {}).rstrip()


def table_of_earlier(name: str, result: Mapping[str, Any]) -> Table:
    """A recipe's table from a result that has tables instead of trials."""
    rows, steps = result["tables"][name], result["config"]["budget_steps"]
    curves = {
        row: [{key: [point[key] for point in points] for key in ("step", *CURVES)}]
        for row, points in result["curves"][name].items()
    }
    short = any(row["steps"] == steps for row in rows)
    return Table(rows, curves, f"Until then, runs of {steps} steps with one seed:" if short else "", earlier=True)


def tables_of(name: str, recipe: Recipe, trials: Trials, earlier: Mapping[str, Any] | None) -> list[Table]:
    """A recipe's table, and while rows are missing in it the earlier one; or that alone if its runs were as long."""
    table = table_of_trials(recipe, trials)
    if earlier is None or {row["name"] for row in table.rows} == {trial.row for trial in recipe.trials}:
        return [table]
    before = table_of_earlier(name, earlier)
    return [table, before] if table.rows or before.note else [before]


def blocks(study: str, results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """What belongs between the page's marks, and the pictures: file name -> SVG. results: the study's, oldest first."""
    newest = list(reversed(results))
    trials = merge(*(result.get("trials", ()) for result in newest))
    earlier = next((result for result in newest if "tables" in result), None)
    found, pictures, shown, of_earlier = dict[str, str](), dict[str, str](), list[Saved](), list[str]()
    for name, recipe in recipes(study).items():
        shown += [trials[trial.id] for trial in recipe.trials if trial not in recipe.missing(trials)]
        tables = tables_of(name, recipe, trials, earlier)
        of_earlier += [f"`{name}.toml`"] * any(table.earlier for table in tables)
        drawn = next((images for table in tables if (images := table.pictures(name))), {})
        pictures |= {file: svg for file, (_, svg) in drawn.items()}
        parts = [part for table in tables for part in (table.note, markdown_of(table.rows) if table.rows else "")]
        parts += [f"![{title}]({study}/{file})" for file, (title, _) in drawn.items()]
        found[name] = "\n\n".join(filter(None, parts))
    found["machine"] = "\n".join(f"- {line}" for line in [*origins(shown), *earlier_origin(earlier, of_earlier)])
    if share := next((result["share"] for result in newest if "share" in result), None):
        figures = f"{share['trainable']:,} of {share['total']:,} parameters"
        found["share"] = f"{figures}: **{share['trainable_fraction']:.2%}**."
    return found, pictures


def origins(shown: Iterable[Saved]) -> list[str]:
    """Where and when the trials ran: a line for each date, machine and commit."""
    found: dict[str, list[tuple[str, int]]] = {}
    for trial in merge(shown).values():
        dtype = f", {trial['dtype']}" if "dtype" in trial else ""
        how = at_once(trial["jobs"]) + dtype + ", next to other work (times not shown)" * trial["other_work"]
        found.setdefault(f"{trial['date']}, {how}. {machine(trial)}", []).append((trial["row"], trial["seed"]))
    return [f"{origin.removesuffix('.')}: {listed(pairs)}." for origin, pairs in sorted(found.items())]


def earlier_origin(result: Mapping[str, Any] | None, names: Sequence[str]) -> list[str]:
    """The same of a result that has tables instead of trials."""
    if result is None or not names:
        return []
    how = f"{at_once(result['config']['jobs'])}. {machine(result).removesuffix('.')}"
    return [f"{result['date']}, {how}: the tables of {', '.join(names)}."]


def at_once(jobs: int) -> str:
    """How many runs shared the machine, in words."""
    return f"{jobs} at a time" if jobs > 1 else "one after the other"


def pages() -> dict[Path, str]:
    """The files that all results give."""
    files = {}
    for study in PAGES:
        found, pictures = blocks(study, all_results(study))
        files[DOCS / f"{study}.md"] = fill((DOCS / f"{study}.md").read_text(encoding="utf-8"), found)
        files |= {DOCS / study / picture: svg for picture, svg in pictures.items()}
    return files


FLAGS: dict[str, dict[str, Any]] = {
    "study": {"choices": tuple(STUDIES), "default": "handout", "help": "the folder of recipes"},
    "out_dir": {
        "type": lambda text: Path(text).absolute(),
        "help": "the folder of graft compare (default: each recipe's)",
    },
    "collect": {"action": "store_true", "help": "only take finished trials; train nothing"},
    "jobs": {"type": int, "default": 1, "help": "runs at the same time (default 1), also with --collect"},
    "other-work": {
        "action": "store_true",
        "help": "other processes used the machine or paused the runs: show no times",
    },
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS))
