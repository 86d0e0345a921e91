"""Prompting compared with fine-tuning on the same test reviews, and the electricity problem: makes docs/prompting.md.

    python benchmarks/prompting.py --json-out benchmarks/results/DATE-prompting.json [--limit 200] [--seeds 5]

Each piece is one `graft` command. Pieces that are in the file are not run again, so a killed run continues. `page.py`
makes the page's tables from the newest result.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from harness import DATA, MODEL, BenchmarkError
from render import DOCS, fill, machine, markdown, newest

PAGE = DOCS / "prompting.md"
STYLES = {
    "few-shot": "few-shot",
    "few-shot-cot": "few-shot, chain of thought",
    "zero-shot-cot": "zero-shot, chain of thought",
}
SEEDED = ("8-shot, balanced", "8-shot, balanced, calibrated")


def pieces(limit: int, seeds: int, run: str) -> dict[str, list[str]]:
    """Name -> the words of a graft command."""
    electricity = ["prompt", "--init_from", MODEL, "--task", "electricity"]
    reviews = ["prompt", "--init_from", MODEL, "--task", "rotten-tomatoes", "--limit", str(limit)]
    score = ["evaluate", "--mode", "score", "--limit", str(limit)]
    base = [*score, "--init_from", MODEL, "--data", DATA]
    few = [*base, "--shots", "8"]
    found = {
        "shown": [*electricity, "--show_prompts", "--shots", "2", "--chat", "off"],
        "shown in chat": [*electricity, "--show_prompts", "--shots", "1"],
        "answered": electricity,
        "electricity": [*electricity, "--limit", str(limit)],
        "zero-shot": base,
        "zero-shot, calibrated": [*base, "--calibrate"],
        "8-shot, nearest by BM25": [*few, "--demo_selection", "bm25"],
        "fine-tuned": [*score, "--init_from", "resume", "--out_dir", run],
        "chain of thought": [*reviews, "--style", "few-shot-cot"],
        "zero-shot chain of thought": [*reviews, "--style", "zero-shot-cot"],
    }
    for seed in range(seeds):
        own = [*few, "--demo_selection", "balanced", "--seed", str(seed)]
        found |= {f"{SEEDED[0]}, seed {seed}": own, f"{SEEDED[1]}, seed {seed}": [*own, "--calibrate"]}
    return found


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All pieces that are not in --json-out yet; it is written after each."""
    config = {"limit": args.limit, "seeds": args.seeds, "threads": args.threads}
    report: dict[str, Any] = {"machine": harness.describe(), "graftlm": harness.git_commit(), "config": config}
    if args.json_out and args.json_out.is_file():
        before = json.loads(args.json_out.read_text(encoding="utf-8"))
        if before["config"] != config:
            raise BenchmarkError(f"{args.json_out} was measured with {before['config']}: name another file")
        report |= {key: before[key] for key in ("found", "train") if key in before}
    found, todo = report.setdefault("found", {}), pieces(args.limit, args.seeds, args.run)
    names = [name for name in (args.only.split("; ") if args.only else todo) if name not in found]
    if "fine-tuned" in names and not (harness.ROOT / args.run / "run.json").is_file():
        harness.note("training")
        train = harness.graft("train", "--config", "recipes/demo.toml", "--out_dir", args.run)
        report["train"] = {
            key: train[key] for key in ("steps", "examples", "seconds", "trainable", "trainable_fraction")
        }
    for name in names:
        harness.note(name)
        found[name] = harness.graft(*todo[name])
        if args.json_out:
            harness.write_json(args.json_out, report)
    return report


# ---------------------------------------------------------------------------------------------------------- the page


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}%"


def interval(result: Mapping[str, Any]) -> str:
    """A 95% interval in percent."""
    return f"{100 * result['ci_low']:.1f} to {100 * result['ci_high']:.1f}"


def computed(result: Mapping[str, Any]) -> float:
    """Tokens computed per answer: what all prompts share is counted once for all of them; new tokens are counted."""
    shared = float(result["shared_prompt_tokens"])
    return result["prompt_tokens"] - shared + shared / result["n"] + result.get("new_tokens", 0)


def cost(result: Mapping[str, Any]) -> list[str]:
    """Cells: prompt tokens, computed tokens, seconds per answer."""
    seconds = result.get("seconds_per_answer") or 1 / result["examples_per_s"]
    return [f"{result['prompt_tokens']:.0f}", f"{computed(result):.0f}", f"{seconds:.2f}"]


def reviews(found: Mapping[str, Any], seeds: int) -> str:
    """The table of reviews: every kind of prompt that was run, and the fine-tuned model, on the same examples."""
    rows = {name: found[name] for name in ("zero-shot", "zero-shot, calibrated")}
    rows |= {name: found[f"{name}, seed 0"] for name in SEEDED}
    rows |= {name: found[name] for name in ("8-shot, nearest by BM25",) if name in found}
    for name in ("chain of thought", "zero-shot chain of thought"):
        if name in found:
            (rows[f"8-shot {name}" if name[0] == "c" else name],) = found[name]["styles"].values()
    rows["fine-tuned"] = found["fine-tuned"]
    over = dict.fromkeys(rows, "")
    for name in SEEDED:
        each = [found[f"{name}, seed {seed}"]["accuracy"] for seed in range(seeds)]
        over[name] = f"{percent(sum(each) / len(each))} ({percent(min(each))} to {percent(max(each))})"
    head = (
        "way",
        "accuracy",
        "95% interval",
        "over seeds: mean (range)",
        "prompt tokens",
        "computed tokens",
        "s/answer",
    )
    cells = [[name, percent(r["accuracy"]), interval(r), over[name], *cost(r)] for name, r in rows.items()]
    return markdown(head, cells)


def electricity(result: Mapping[str, Any]) -> str:
    """The table of the word problems."""
    head = ("style", "right", "95% interval", "no answer", "prompt tokens", "computed tokens", "s/answer")
    rows = [
        [STYLES[style], percent(r["accuracy"]), interval(r), percent(r["unparsed_rate"]), *cost(r)]
        for style, r in result["styles"].items()
    ]
    return markdown(head, rows)


def texts(prompts: Mapping[str, Sequence[str]]) -> str:
    """Prompts as they are, in fences."""
    return "\n\n".join(
        f"{STYLES[style]}{', the second call' * bool(number)}:\n\n```text\n{text}\n```"
        for style, every in prompts.items()
        for number, text in enumerate(every)
    )


def answered(rows: Sequence[Mapping[str, Any]]) -> str:
    """The model's text in each style."""
    parts = []
    for each in rows:
        verdict = "right" if each["correct"] else f"wrong: it is {each['answer']}"
        (text,) = each["texts"]
        parts.append(
            f"{STYLES[each['style']]}, read as {each['prediction']} ({verdict}):\n\n```text\n{text.strip()}\n```"
        )
    return "\n\n".join(parts)


def pages() -> dict[Path, str]:
    """The page that the newest result gives."""
    report = newest("prompting")
    found, config, train = report["found"], report["config"], report["train"]
    tuned = (
        f"{train['steps']} steps, {train['examples']:,} reviews, {train['seconds'] / 60:.1f} minutes, "
        f"{100 * train['trainable_fraction']:.2f}% of the weights"
    )
    blocks = {
        "machine": f"{report['date']}, {config['threads']}. {machine(report)}",
        "shown": texts(found["shown"]["prompts"]),
        "chat": texts({"few-shot": found["shown in chat"]["prompts"]["few-shot"]}),
        "answered": answered(found["answered"]["answers"]),
        "electricity": electricity(found["electricity"]),
        "reviews": reviews(found, config["seeds"]) + f"\n\nThe fine-tuned model's training: {tuned}.",
    }
    return {PAGE: fill(PAGE.read_text(encoding="utf-8"), blocks)}


FLAGS: dict[str, dict[str, Any]] = {
    "limit": {"type": int, "default": 200, "help": "questions, and reviews (default 200)"},
    "seeds": {"type": int, "default": 5, "help": "choices of demonstrations (default 5)"},
    "run": {
        "default": "runs/prompting",
        "help": "the fine-tuned run; trained by recipes/demo.toml if it does not exist",
    },
    "only": {"default": "", "help": "these pieces only, separated by '; '"},
    "threads": {"default": "all cores", "help": "what the page says of threads and other work"},
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS))
