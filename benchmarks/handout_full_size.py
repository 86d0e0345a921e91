"""The course handout's lines on GPT-2 medium at its full size: 24 layers, width 1024, 354,823,168 parameters.

    python benchmarks/handout_full_size.py [--max_iters 80] [--limit 0]

Too large for the test suite, which runs the same lines on a narrow model. A random GPT-2 medium is written to a
temporary folder (1.6 GB), served on loopback under the name gpt2-medium as the hub serves it, trained and generated
from by the command, in processes of their own. With random weights the accuracy says nothing; the counts, the times
and the memory do. Needs the dev extra (the hub's double is the tests').

Prints what the commands print on stderr, and one JSON object as the last line of stdout. Exit status 1 when a count
is not the handout's: 18,874,368 trained parameters, 5.05% of all.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from _machine import describe

from conftest import child_environment
from hub_mirror import serve
from test_handout import GENERATE, TRAIN, random_gpt2

TRAINED, SHARE = 18_874_368, "5.05%"


def main() -> int:
    """Run the lines; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--max_iters", type=int, default=80, help="steps of the training line (the handout's: 80)")
    parser.add_argument("--limit", type=int, default=0, help="test reviews the generating lines read; 0 means all")
    args = parser.parse_args()
    results: dict[str, object] = {"machine": describe()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = random_gpt2(folder / "hub-model", layers=24, width=1024, heads=16)
        with serve(models={"gpt2-medium": model}) as mirror:
            environment = child_environment(
                HF_ENDPOINT=mirror.url, HF_HOME=str(folder / "hf"), HF_HUB_OFFLINE="0", WANDB_MODE="offline"
            )
            lines = {"train": TRAIN.replace("--max_iters=80", f"--max_iters={args.max_iters}")}
            lines |= {f"generate {name}": GENERATE.format(name) for name in ("resume", "gpt2-medium")}
            for name, line in lines.items():
                words = [*line.split(), "--json", *([f"--limit={args.limit}"] if "generate" in name else [])]
                print(f"$ graft {' '.join(words)}", file=sys.stderr, flush=True)
                command = [sys.executable, "-m", "graftlm", *words]
                done = subprocess.run(
                    command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                results[name] = json.loads(done.stdout)
    trained = results["train"]
    assert isinstance(trained, dict)
    right = trained["trainable"] == TRAINED and f"{trained['share_trained']:.2%}" == SHARE
    print(json.dumps({**results, "as_the_handout_says": right}))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
