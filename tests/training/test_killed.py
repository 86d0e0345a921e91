"""A run that is killed with SIGKILL again and again ends with the bits of one that never stopped."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conftest import child_environment
from tiny import TEMPLATE, data_folder, model_folder

KILLS = 20
TIMES = {"examples_per_s", "tokens_per_s", "seconds", "peak_rss_mb"}


def rows(out_dir: Path) -> list[dict[str, Any]]:
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_killed_twenty_times(tmp_path: Path) -> None:
    model_folder(tmp_path / "model", "gpt2", layers=1)
    data_folder(tmp_path / "data")
    words = (
        f"train --init_from {tmp_path / 'model'} --data {tmp_path / 'data'} --rank 2 --alpha 8 --lr 0.01 --dropout 0.1 "
        "--max_iters 600 --eval_every 3 --batch_size 4 --dtype float32 --device cpu --seed 3"
    ).split()
    command = [sys.executable, "-m", "graftlm", *words, "--template", TEMPLATE, "--out_dir"]
    environment = child_environment(OMP_NUM_THREADS="1")
    subprocess.run([*command, str(tmp_path / "whole")], env=environment, check=True, capture_output=True)

    out, chance, killed = tmp_path / "killed", random.Random(0), 0
    while killed < KILLS:
        resume = ["--resume"] if (out / "run.json").exists() else []
        at = _newest(out)
        with subprocess.Popen(
            [*command, str(out), *resume], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            # A moment after this process made its first row or checkpoint, so that every life gets somewhere.
            while _newest(out) == at and process.poll() is None:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.12))
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            process.kill()
            killed += 1
    done = subprocess.run([*command, str(out), "--resume"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    assert rows(out) == rows(tmp_path / "whole") and len(rows(out)) == 600
    for at in ("best", "last"):
        files = sorted((tmp_path / "whole" / at).glob("*.safetensors"))
        assert files
        assert (out / at).resolve().name == (tmp_path / "whole" / at).resolve().name
        for file in files:
            assert (out / at / file.name).read_bytes() == file.read_bytes(), f"{at}/{file.name}"
    left = {p.name for p in out.rglob("*") if ".tmp-" in p.name}
    assert not left, f"a killed process's leavings: {left}"


def _newest(out: Path) -> str:
    """The newest checkpoint's name; empty before the first."""
    last = out / "last"
    return last.resolve().name if last.is_symlink() else ""
