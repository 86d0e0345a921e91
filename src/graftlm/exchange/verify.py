"""The proof that an export or an import keeps: the largest difference between two models' logits on real prompts.

What is unusual here: the prompts are those of the run itself, from its test data, wherever that is at hand; and the
proof is of the files as they were written, read back, not of what was in memory.

Letters: P positions compared in one prompt, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.config import parse_columns
from graftlm.errors import GraftError, InputError
from graftlm.exchange.load import Loaded
from graftlm.files.assets import is_local_data
from graftlm.models import CausalLM
from graftlm.text.collate import encode_rows, load_dataset, subset
from graftlm.text.dataset import SPLITS

PROMPTS, POSITIONS = 8, 32
"""How many prompts, and how many of each one's last positions: at V = 50,000 their logits take 50 MB."""

TOLERANCE = 1e-4
SHARES = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""A difference is accepted up to TOLERANCE, or to this share of the largest logit, by the number format of the weights.

Rounding alone makes 0.6e-5, 0.4e-2 and 1.8e-2 of it in 30 layers of SmolLM2, at logits of 33; a mistake makes far more.
"""

TEXTS = (
    "A gripping story, told with wit and warmth from its first scene to its last.",
    "Two hours that feel like four, and not one character worth the ticket.",
    "The acting is fine; the script, sadly, is not.",
    "I laughed, I cried, and then I bought a ticket for the next evening.",
)


@dataclass(frozen=True)
class Prompts:
    """Token ids, and in words where they came from."""

    ids: tuple[tuple[int, ...], ...]
    source: str


@dataclass(frozen=True)
class Proof:
    """How far two models' logits lie apart."""

    max_abs_logit_diff: float
    largest_logit: float
    tolerance: float
    """The largest difference that is accepted."""
    prompts: str

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return dict(vars(self))


def verification_prompts(loaded: Loaded, data: dict[str, Any]) -> Prompts:
    """Some prompts of the test (else validation) split that `data`, flags of the run, names; else of built-in texts.

    Data that is not on this disk, or no longer readable, is not asked for.
    """
    template, tokenizer, room = loaded.template, loaded.tokenizer, loaded.model.max_seq_len
    assert template is not None, "a run has a template"
    max_length = min(data.get("max_length") or room, room)
    name, val, test = (data.get(flag) or "" for flag in ("data", "val_data", "test_data"))
    if is_local_data(name):
        try:
            columns = parse_columns(data.get("columns") or "")
            splits = load_dataset(name, val, test, columns, template.labels).splits
            split = next(name for name in reversed(SPLITS) if splits.get(name))
            examples, _ = encode_rows(subset(splits[split], PROMPTS), template, tokenizer, max_length)
            ids = tuple(e.prompt_ids for e in examples)
            return Prompts(ids, f"{len(ids)} prompts of the {split} split of {Path(name).name}")
        except InputError:
            pass  # changed since the run, it is no longer the data that the run had
    own = [tokenizer.encode(template.prompt(text), bos=True)[:max_length] for text in TEXTS]
    return Prompts(tuple(map(tuple, own)), f"{len(own)} built-in texts, for want of the run's data")


def logits(model: CausalLM, prompts: Prompts) -> list[Tensor]:
    """[P, V] of each prompt's last positions, in float32 or wider."""
    found = []
    with torch.inference_mode():
        for ids in prompts.ids:
            at = torch.arange(max(0, len(ids) - POSITIONS), len(ids))
            found.append(model(torch.tensor([ids]), at=at))
    return found


def verify(expected: Sequence[Tensor], found: Sequence[Tensor], dtype: str, source: str, what: str) -> Proof:
    """Compare; past the tolerance of weights in `dtype` a GraftError that begins with `what`."""
    difference = torch.stack([(a - b).abs().max() for a, b in zip(expected, found, strict=True)]).max().item()
    largest = torch.stack([a.abs().max() for a in expected]).max().item()
    tolerance = max(TOLERANCE, SHARES[dtype] * largest)
    if not difference <= tolerance:  # NaN is no proof either
        raise GraftError(
            f"{what}: read back, its logits differ by {difference:.1e}, more than {tolerance:.1e} ({source}); nothing "
            "was written"
        )
    return Proof(difference, largest, tolerance, source)
