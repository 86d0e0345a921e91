"""Why the first loss on preferences is not ln 2 to the last digit in bfloat16: by how much a kept reference is rounded.

    python benchmarks/reference_rounding.py [--pairs 64] [--dtypes float32,bfloat16]

The reference's log-probabilities are computed before the first step, in groups of 16 pairs of about one length; a step
computes the policy's in batches of its own. Both are the same model then, so they differ by rounding alone, which
depends on which rows stand beside each other. The pairs are those of dpo_vs_trl.py, the batches of 8 in their order.

Prints, for each number format, the mean and the standard deviation over all sums of policy less reference, of the
pairs' margins of that, and the mean loss at beta 0.1; and how far the last format's sums lie from the first's. A table
on stderr, one JSON object on the last line of stdout.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _machine import describe
from dpo_vs_trl import BETA, write_pairs
from train_vs_peers import ROOT, git_state

BATCH = 8


def differences(model: str, dtype: str, count: int, folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    """The first `count` pairs' [chosen, rejected] log-probabilities: as the kept reference, and as a step has them."""
    import torch

    from graftlm.exchange.load import load
    from graftlm.text.data import encode_rows, load_dataset
    from graftlm.text.template import DEFAULT, load_template
    from graftlm.training.objectives import make_batch
    from graftlm.training.preferences import answer_sums
    from graftlm.training.reference import reference_sums

    loaded = load(model, dtype=dtype)
    rows = load_dataset(str(folder)).splits["train"][:count]
    examples, _ = encode_rows(rows, load_template(DEFAULT), loaded.tokenizer, 512)
    kept = reference_sums(loaded.model, examples)
    batches = [make_batch(examples[at : at + BATCH], "pairs") for at in range(0, count, BATCH)]
    with torch.no_grad():
        steps = torch.cat([answer_sums(loaded.model, batch).policy.double() for batch in batches])
    return kept.tolist(), steps.tolist()


def summarise(kept: Sequence[Sequence[float]], steps: Sequence[Sequence[float]]) -> dict[str, float]:
    """Means and standard deviations, and the mean loss -log s(beta margin), which is ln 2 without any rounding."""
    import torch

    apart = torch.tensor(steps, dtype=torch.float64) - torch.tensor(kept, dtype=torch.float64)
    margins = apart[:, 0] - apart[:, 1]
    return {
        "sum mean": apart.mean().item(),
        "sum std": apart.std().item(),
        "margin mean": margins.mean().item(),
        "margin std": margins.std().item(),
        "loss": -torch.nn.functional.logsigmoid(BETA * margins).mean().item(),
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=64, help="pairs (default 64)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="number formats, with commas")
    parser.add_argument("--model", default="smollm2-135m", help="base model (default smollm2-135m)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parse(words)
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    formats = args.dtypes.split(",")
    with tempfile.TemporaryDirectory() as folder:
        write_pairs("rotten-tomatoes-pypi", -(-args.pairs // BATCH), BATCH, Path(folder))
        found = {name: differences(args.model, name, args.pairs, Path(folder) / "data") for name in formats}
    result = {name: summarise(*both) for name, both in found.items()}
    result[f"{formats[-1]} from {formats[0]}"] = summarise(found[formats[0]][0], found[formats[-1]][0])
    for name, figures in result.items():
        print(f"{name:24}" + "".join(f"{key} {value:9.4f}  " for key, value in figures.items()), file=sys.stderr)
    print(json.dumps({"machine": describe(), "graftlm": git_state(), "pairs": args.pairs, "found": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
