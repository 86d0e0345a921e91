"""A long run holds its loss, its speed and its memory: 100,000 steps of LoRA on a tiny model.

    python tests/soak/steady.py --steps 100000 --work /tmp/steady

Trains (or goes on with) a run in --work, then looks at metrics.jsonl by tenths: the mean loss, the middle
examples_per_s and the peak of memory of each. The last tenth is held against the second; the first one warms up.
Prints the tenths and the verdicts; status 1 where one does not hold. The middle of thousands of steps forgives a busy
machine, but not one that is busier at the end than at the beginning.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")]

from tiny import TEMPLATE, data_folder, model_folder  # noqa: E402

MEGABYTES = 8.0
"""What memory may grow by from the end of the second tenth to the end."""


def run(work: Path, steps: int) -> Path:
    """The run folder, trained to its end."""
    from graftlm.config import TrainConfig
    from graftlm.training.train import train

    for name, make in (("model", model_folder), ("data", data_folder)):
        if not (work / name).exists():
            make(work / name)
    out_dir = work / "run"
    config = TrainConfig(
        init_from=str(work / "model"),
        data=str(work / "data"),
        out_dir=str(out_dir),
        template=TEMPLATE,
        rank=4,
        alpha=16.0,
        lr=1e-3,
        lora_dropout=0.1,
        max_iters=steps,
        eval_every=max(steps // 20, 1),
        batch_size=8,
        dtype="float32",
        device="cpu",
        kernels="torch",
        resume=(out_dir / "run.json").exists(),
    )
    train(config)
    return out_dir


def tenths(out_dir: Path) -> list[dict[str, float]]:
    """Of each tenth of the run: mean loss, middle speed, highest memory."""
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    size, found = len(rows) // 10, []
    for n in range(10):
        some = rows[n * size : (n + 1) * size]
        found.append(
            {
                "loss": statistics.fmean(row["train_loss"] for row in some),
                "examples_per_s": statistics.median(row["examples_per_s"] for row in some),
                "peak_rss_mb": max(row["peak_rss_mb"] for row in some),
            }
        )
    return found


def verdicts(found: list[dict[str, float]], speed: float, megabytes: float) -> dict[str, bool]:
    """What holds. speed: the share of the second tenth's that the last one must have."""
    early, late = found[1], found[-1]
    return {
        "loss": late["loss"] <= early["loss"] * 1.05 + 0.01,
        "speed": late["examples_per_s"] >= speed * early["examples_per_s"],
        "memory": late["peak_rss_mb"] - early["peak_rss_mb"] <= megabytes,
    }


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    found = tenths(run(given.work, given.steps))
    for number, each in enumerate(found, 1):
        print(f"{number:2}: " + ", ".join(f"{name} {value:.4g}" for name, value in each.items()))
    held = verdicts(found, speed=0.8, megabytes=MEGABYTES)
    print(json.dumps({"steps": given.steps, "early": found[1], "late": found[-1], "holds": held}))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
