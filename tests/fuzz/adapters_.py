"""Adapter folders, PEFT's and ours: the config that says what the tensors beside it are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fuzz.base import Reader, Target, changed_files
from graftlm.exchange.huggingface import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OWN_CONFIG,
    OWN_WEIGHTS,
    apply_adapter,
    from_foreign_peft,
    save_adapter,
)
from graftlm.methods import METHODS
from tiny import model_of

LORA: dict[str, Any] = {"rank": 2, "targets": ("q", "v")}
FIELDS: dict[str, dict[str, Any]] = {"lora": LORA, "dora": LORA, "prefix": {"length": 3, "init": "random"}}
PEFTS = {"PREFIX_TUNING": "prefix", '"IA3"': "ia3", '"use_dora": true': "dora", "": "lora"}
OURS = {'"bitfit"': "bitfit", "": "adapter"}


def adapters(kinds: dict[str, str], config: str, weights: str) -> Callable[[Path], list[bytes]]:
    """A folder a kind, written by us; their configs."""

    def made(folder: Path) -> list[bytes]:
        found = []
        for kind in kinds.values():
            model, method = model_of("gpt2", dtype=torch.float32, layers=1), METHODS[kind](**FIELDS.get(kind, {}))
            method.install(model, torch.Generator().manual_seed(0))
            (folder / kind).mkdir()
            save_adapter(folder / kind, model, method, "base")
            found.append((folder / kind / config).read_bytes())
        if config == ADAPTER_CONFIG:
            said = json.loads(found[-1])
            found += [json.dumps({**said, "target_modules": names}).encode() for names in (".*c_attn", "all-linear?")][
                :1
            ]
        return found

    return made


def reader(kinds: dict[str, str], config: str) -> Reader:
    """The config goes where the tensors are of the kind that it still seems to be."""

    def read(folder: Path, content: bytes) -> object:
        kind = next(kind for word, kind in kinds.items() if word.encode() in content)
        (folder / kind / config).write_bytes(content)
        model = model_of("gpt2", dtype=torch.float32, layers=1)
        method, state = from_foreign_peft(folder / kind, model.config)
        return apply_adapter(model, method, state, "x")

    return read


TARGETS = [
    Target(
        "adapter_config.json",
        adapters(PEFTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS),
        reader(PEFTS, ADAPTER_CONFIG),
        changed_files,
    ),
    Target("graft_adapter.json", adapters(OURS, OWN_CONFIG, OWN_WEIGHTS), reader(OURS, OWN_CONFIG), changed_files),
]
