"""Fine-tune a real model on movie reviews through the Python API, and evaluate it before and after.

    python examples/demo.py --out_dir runs/demo

Reads recipes/demo.toml, trains, evaluates on the test split before and after, shows five reviews with both models'
answers, and writes all of it to OUT_DIR/report.md, and the results to OUT_DIR for `graft report`. The same by hand:
`graft train --config recipes/demo.toml --out_dir runs/demo`, `graft evaluate runs/demo --mode score`, and the same with
`--checkpoint base`.
"""

from graftlm.cli.main import tune_malloc_retain

tune_malloc_retain()  # before torch is loaded, as the graft command does

import argparse  # noqa: E402
import tomllib  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from rich.console import Console  # noqa: E402

import graftlm  # noqa: E402
from graftlm.cli.display import progress  # noqa: E402
from graftlm.exchange.load import ModelBundle  # noqa: E402
from graftlm.exchange.runs import checkpoint_step  # noqa: E402
from graftlm.files.atomic import write_text  # noqa: E402
from graftlm.inference.evaluate import Evaluation  # noqa: E402
from graftlm.inference.saved_evaluations import save_evaluation  # noqa: E402
from graftlm.text.collate import Example, encode_rows, subset  # noqa: E402
from graftlm.text.dataset import load_dataset  # noqa: E402
from graftlm.text.template import Template, load_template  # noqa: E402

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.toml"


def measure(loaded: ModelBundle, template: Template, examples: list[Example], console: Console) -> Evaluation:
    """Accuracy by label scores."""
    with progress(console, "evaluate", len(examples)) as bar:
        parts = (loaded.model, loaded.tokenizer, template, examples)
        return graftlm.evaluate(*parts, mode="score", progress=bar)


def save(config: graftlm.TrainConfig, checkpoint: str, limit: int, evaluation: Evaluation) -> dict[str, Any]:
    """Save the results in the run folder, as `graft evaluate` does; returns the metrics."""
    out_dir, metrics = Path(config.out_dir), evaluation.to_json()
    settings = {"checkpoint": checkpoint, "data": config.data, "split": "test", "mode": "score"}
    settings |= {"limit": limit} if limit else {}
    save_evaluation(out_dir, settings, checkpoint_step(out_dir, checkpoint), metrics, evaluation.rows)
    return metrics


def answers(loaded: ModelBundle, examples: list[Example], template: Template) -> list[str]:
    """The generated text after each prompt, on one line."""
    prompts = [template.prompt(e.text) for e in examples]
    texts = graftlm.generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=5)
    return [" ".join(text.split()) for text in texts]


def report(before: dict[str, Any], after: dict[str, Any], trained: dict[str, Any], rows: list[tuple[str, ...]]) -> str:
    """The results as a page of Markdown."""

    def accuracy(r: dict[str, Any]) -> str:
        return f"{r['accuracy']:.3f} (95% interval {r['ci_low']:.3f} to {r['ci_high']:.3f}, {r['n']:,} reviews)"

    facts = {
        "zero-shot accuracy": accuracy(before),
        "fine-tuned accuracy": accuracy(after),
        "steps": f"{trained['steps']:,} ({trained['examples']:,} reviews)",
        "trained": f"{trained['trainable']:,} of {trained['total']:,} parameters ({trained['trainable_fraction']:.2%})",
        "speed": f"{trained['examples_per_s']:.1f} examples/s, {trained['seconds']:.0f} s of training",
        "peak memory": f"{trained['peak_rss_mb']:,.0f} MB",
        "the adapter": f"{trained['out_dir']}/best (a PEFT adapter)",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    reviews = "\n\n".join(f"> {text}\n\nis {true}. Before: “{old}”. After: “{new}”." for text, true, old, new in rows)
    return (
        "# SmolLM2-135M on movie reviews, before and after LoRA\n\n"
        f"|  |  |\n|---|---|\n{table}\n\n## Five reviews of the test split\n\n{reviews}\n"
    )


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Fine-tune a real model on real reviews; show before and after.")
    parser.add_argument("--out_dir", default="runs/demo", help="the run folder to create")
    parser.add_argument("--max_iters", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--limit", type=int, default=0, help="number of test reviews; 0 means all")
    args = parser.parse_args()
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8")) | {"out_dir": args.out_dir}
    if args.max_iters:
        recipe |= {"max_iters": args.max_iters, "eval_every": args.max_iters}
    config = graftlm.TrainConfig(**recipe)
    console = Console(highlight=False, soft_wrap=True)

    console.rule("1. before: zero-shot")
    template = load_template(config.template, config.labels)
    base = graftlm.load(config.init_from)
    rows = subset(load_dataset(config.data, labels=template.labels).splits["test"], args.limit)
    examples, _ = encode_rows(rows, template, base.tokenizer, base.model.config.max_positions)
    shown = subset(examples, 5)
    zero_shot, old = measure(base, template, examples, console), answers(base, shown, template)
    console.print(f"zero-shot accuracy on {zero_shot.main.n:,} test reviews: {zero_shot.main.accuracy:.3f}")
    del base

    console.rule("2. fine-tuning with LoRA")
    trained = graftlm.train(config, console=console)
    before = save(config, "base", args.limit, zero_shot)  # now that there is a run folder

    console.rule("3. after")
    tuned = graftlm.load(config.out_dir)
    after = save(config, "best", args.limit, measure(tuned, template, examples, console))
    new = answers(tuned, shown, template)
    five = [
        (" ".join(e.text.split()), template.labels[e.label or 0], was, now)
        for e, was, now in zip(shown, old, new, strict=True)
    ]
    page = report(before, after, trained, five)
    write_text(Path(config.out_dir) / "report.md", page)
    console.print(page, markup=False)
    console.print(f"This page is {config.out_dir}/report.md; more of the run: graft report {config.out_dir} --open")
    console.print(f"Try the model: graft generate {config.out_dir} --prompt …")


if __name__ == "__main__":
    main()
