"""Finished runs of every method on tiny models, for the tests of export and import."""

from pathlib import Path
from typing import Any

import torch

from graftlm.config import TrainConfig
from graftlm.training.train import train
from tiny import TEMPLATE

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 16.0},
    "rslora": {"rank": 4, "alpha": 8.0, "targets": "q,v,down", "rslora": True, "train_layers": "1:"},
    "dora": {"method": "dora", "rank": 4, "alpha": 16.0, "targets": "q,v"},
    "ia3": {"method": "ia3"},
    "bitfit": {"method": "bitfit", "add_biases": True},
    "adapter": {"method": "adapter", "rank": 4, "adapter_placement": "pfeiffer"},
    "prefix": {"method": "prefix", "prefix_length": 4},
    "prefix network": {"method": "prefix", "prefix_length": 4, "prefix_hidden": 9},
    "full": {"method": "full"},
}
ADAPTERS = [name for name in METHODS if name != "full"]
MERGEABLE = [name for name in METHODS if name not in ("adapter", "prefix", "prefix network")]


def run_of(folder: Path, base: Path, data: Path, name: str) -> Path:
    """Three steps, large enough to be seen in every logit."""
    if not folder.exists():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        config = TrainConfig(
            init_from=str(base),
            data=str(data),
            out_dir=str(folder),
            template=TEMPLATE,
            lr=2e-2,
            max_iters=3,
            batch_size=8,
            dtype="float32",
            device="cpu",
            kernels="torch",
            **METHODS[name],
        )
        train(config)
        torch.set_num_threads(threads)
    return folder
