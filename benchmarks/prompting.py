"""Prompting beside fine-tuning on the same test reviews, and the electricity problem in three styles: makes a page.

    python benchmarks/prompting.py --json-out benchmarks/results/DATE-prompting.json [--limit 200] [--seeds 5]
    python benchmarks/prompting.py --page benchmarks/results/DATE-prompting.json

Each piece is one `graft` command; what is in the file already is not run again, so that a run killed halfway goes on.
With --page only docs/prompting.md is made anew: what stands between `<!-- NAME -->` and `<!-- end -->` there is
replaced, the words around it are written by hand. Seconds are wall seconds, and say
little where other work ran beside. One JSON object goes to the last line of stdout.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _machine import describe
from handout import fill, graft
from page import machine
from train_vs_peers import ROOT, BenchmarkError, git_state

PAGE = ROOT / "docs" / "prompting.md"
MODEL = "smollm2-135m"
STYLES = {
    "few-shot": "few-shot",
    "few-shot-cot": "few-shot, chain of thought",
    "zero-shot-cot": "zero-shot, chain of thought",
}


def pieces(limit: int, seeds: int, run: str) -> dict[str, list[str]]:
    """Name -> the words behind `graft`."""
    prompt = ["prompt", "--init_from", MODEL]
    electricity = [*prompt, "--task", "electricity"]
    reviews = [*prompt, "--task", "rotten-tomatoes", "--limit", str(limit)]
    read = ["evaluate", "--read", "score", "--limit", str(limit)]
    base = [*read, "--init_from", MODEL, "--data", "rotten-tomatoes-pypi"]
    few = [*base, "--shots", "8"]
    found = {
        "shown": [*electricity, "--show", "--shots", "2", "--chat", "off"],
        "shown in chat": [*electricity, "--show", "--shots", "1"],
        "answered": electricity,
        "electricity": [*electricity, "--limit", str(limit)],
        "zero-shot": base,
        "zero-shot, calibrated": [*base, "--calibrate"],
        "8-shot, nearest by BM25": [*few, "--choose", "bm25"],
        "fine-tuned": [*read, "--init_from", "resume", "--out_dir", run],
        "chain of thought": [*reviews, "--style", "few-shot-cot"],
        "zero-shot chain of thought": [*reviews, "--style", "zero-shot-cot"],
    }
    for seed in range(seeds):
        own = [*few, "--choose", "balanced", "--seed", str(seed)]
        found[f"8-shot, balanced, seed {seed}"] = own
        found[f"8-shot, balanced, calibrated, seed {seed}"] = [*own, "--calibrate"]
    return found


def run_all(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Whatever is not in the report yet; it is written after each piece."""
    found = report["found"]
    todo = pieces(args.limit, args.seeds, args.run)
    names = [name for name in (args.only.split("; ") if args.only else todo) if name not in found]
    if "fine-tuned" in names and not (ROOT / args.run / "run.json").is_file():
        print("training", file=sys.stderr)
        train = graft("train", "--config", str(ROOT / "recipes" / "demo.toml"), "--out_dir", args.run)
        report["train"] = {key: train[key] for key in ("steps", "examples", "seconds", "trainable", "share_trained")}
    for name in names:
        print(name, file=sys.stderr)
        found[name] = graft(*todo[name])
        write(args.json_out, report)


def write(path: Path | None, report: Mapping[str, Any]) -> None:
    """The report, whole or not at all."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".tmp").replace(path)


# ---------------------------------------------------------------------------------------------------------- the page


def share(value: float) -> str:
    return f"{100 * value:.1f}%"


def interval(result: Mapping[str, Any]) -> str:
    return f"{100 * result['low']:.1f} to {100 * result['high']:.1f}"


def computed(result: Mapping[str, Any]) -> float:
    """Tokens computed an answer: what all prompts share counts once for all of them; new tokens count too."""
    shared = result["shared_prompt_tokens"]
    return result["prompt_tokens"] - shared + shared / result["n"] + result.get("new_tokens", 0)


def row(name: str, result: Mapping[str, Any], others: Sequence[float] = ()) -> str:
    """A line of the table of reviews; `others` are the accuracies of all seeds."""
    seconds = result.get("seconds_per_answer") or 1 / result["examples_per_s"]
    seeds = f"{share(sum(others) / len(others))} ({share(min(others))} to {share(max(others))})" if others else ""
    cells = [name, share(result["accuracy"]), interval(result), seeds, f"{result['prompt_tokens']:.0f}"]
    return f"| {' | '.join([*cells, f'{computed(result):.0f}', f'{seconds:.2f}'])} |"


def reviews(found: Mapping[str, Any], seeds: int) -> str:
    """The table of reviews: every way to ask that was run, and the fine-tuned model, on the same examples."""
    lines = [
        "| way | accuracy | 95% interval | over seeds: mean (range) | prompt tokens | computed tokens | s/answer |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [row(name, found[name]) for name in ("zero-shot", "zero-shot, calibrated")]
    for name in ("8-shot, balanced", "8-shot, balanced, calibrated"):
        runs = [found[f"{name}, seed {seed}"] for seed in range(seeds)]
        lines.append(row(name, runs[0], [run["accuracy"] for run in runs]))
    if nearest := found.get("8-shot, nearest by BM25"):
        lines.append(row("8-shot, nearest by BM25", nearest))
    for name in ("chain of thought", "zero-shot chain of thought"):
        if name in found:
            (result,) = found[name]["styles"].values()
            lines.append(row(f"8-shot {name}" if name[0] == "c" else name, result))
    return "\n".join([*lines, row("fine-tuned", found["fine-tuned"])])


def electricity(result: Mapping[str, Any]) -> str:
    """The table of the word problems."""
    lines = [
        "| style | right | 95% interval | no answer | prompt tokens | computed tokens | s/answer |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for style, each in result["styles"].items():
        cells = [STYLES[style], share(each["accuracy"]), interval(each), share(each["no_answer_rate"])]
        cells += [f"{each['prompt_tokens']:.0f}", f"{computed(each):.0f}", f"{each['seconds_per_answer']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def texts(prompts: Mapping[str, Sequence[str]]) -> str:
    """Prompts as they are, in fences."""
    return "\n\n".join(
        f"{STYLES[style]}{', the second call' * bool(number)}:\n\n```text\n{text}\n```"
        for style, every in prompts.items()
        for number, text in enumerate(every)
    )


def answered(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the model wrote in each style."""
    parts = []
    for each in rows:
        verdict = "right" if each["right"] else f"wrong: it is {each['answer']}"
        (text,) = each["texts"]
        parts.append(f"{STYLES[each['style']]}, read as {each['said']} ({verdict}):\n\n```text\n{text.strip()}\n```")
    return "\n\n".join(parts)


def blocks(report: Mapping[str, Any], date: str) -> dict[str, str]:
    """What belongs between the page's marks."""
    found, config = report["found"], report["config"]
    train = report["train"]
    tuned = (
        f"{train['steps']} steps, {train['examples']:,} reviews, {train['seconds'] / 60:.1f} minutes, "
        f"{100 * train['share_trained']:.2f}% of the weights"
    )
    return {
        "machine": f"{date}, {config['threads']}. {machine(report)}",
        "shown": texts(found["shown"]["prompts"]),
        "chat": texts({"few-shot": found["shown in chat"]["prompts"]["few-shot"]}),
        "answered": answered(found["answered"]["answers"]),
        "electricity": electricity(found["electricity"]),
        "reviews": reviews(found, config["seeds"]) + f"\n\nThe fine-tuned model's training: {tuned}.",
    }


def main(words: Sequence[str] | None = None) -> int:
    """Run the pieces, or make the page; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="questions, and reviews (default 200)")
    parser.add_argument("--seeds", type=int, default=5, help="choices of demonstrations (default 5)")
    parser.add_argument(
        "--run", default="runs/prompting", help="the fine-tuned run; trained by recipes/demo.toml if new"
    )
    parser.add_argument("--only", default="", help="these pieces only, separated by '; '")
    parser.add_argument("--threads", default="all cores", help="what the page says of the threads and of other work")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--page", type=Path, help="only make the page from this result")
    args = parser.parse_args(words)
    sys.path.insert(0, str(ROOT / "src"))
    if args.page:
        found = blocks(json.loads(args.page.read_text(encoding="utf-8")), args.page.stem[:10])
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        return 0
    config = {"limit": args.limit, "seeds": args.seeds, "threads": args.threads}
    report: dict[str, Any] = {"machine": describe(), "graftlm": git_state(), "config": config, "found": {}}
    try:
        if args.json_out and args.json_out.is_file():
            before = json.loads(args.json_out.read_text(encoding="utf-8"))
            if before["config"] != config:
                raise BenchmarkError(f"{args.json_out} was measured with {before['config']}: name another file")
            report |= {key: before[key] for key in ("found", "train") if key in before}
        run_all(args, report)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
