"""A run that is killed with SIGKILL again and again ends with the bits of one that never stopped."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

from soak.forks import Forks, Life
from tiny import TEMPLATE, data_folder, model_folder

KILLS = 20
TIMES = {"examples_per_s", "tokens_per_s", "seconds", "peak_rss_mb"}


def rows(out_dir: Path) -> list[dict[str, Any]]:
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def test_killed_twenty_times(tmp_path: Path, forks: Forks) -> None:
    model_folder(tmp_path / "model", "gpt2", layers=1)
    data_folder(tmp_path / "data")
    words = (
        f"train --init_from {tmp_path / 'model'} --data {tmp_path / 'data'} --rank 2 --alpha 8 --lr 0.01 --dropout 0.1 "
        "--max_iters 600 --eval_every 3 --batch_size 4 --dtype float32 --device cpu --seed 3"
    ).split()
    log = tmp_path / "log.txt"

    def start(out: Path) -> Life:
        resume = ["--resume"] if (out / "run.json").exists() else []
        return forks.start(*words, "--template", TEMPLATE, "--out_dir", str(out), *resume, cwd=tmp_path, log=log)

    assert start(tmp_path / "whole").wait() == 0, log.read_text()
    out, chance = tmp_path / "killed", random.Random(0)
    for _ in range(KILLS):
        at, life = _newest(out), start(out)
        # A moment after this process made its first row or checkpoint, so that every life gets somewhere.
        while _newest(out) == at and not life.ended():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.12))
        life.kill()
        assert life.wait() == -signal.SIGKILL, log.read_text()
    assert start(out).wait() == 0, log.read_text()

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
