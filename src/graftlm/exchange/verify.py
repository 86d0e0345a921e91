"""Verify an export or an import: the largest difference between two models' logits on real prompts.

The prompts are from the run's own test data if it is on this disk. What is compared is the files as they were written,
read back, and not the model in memory.

Letters: P positions compared in one prompt, V vocabulary size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.config import TrainConfig
from graftlm.errors import GraftError, InputError
from graftlm.exchange.load import ModelBundle
from graftlm.files.assets import is_local_data
from graftlm.models import CausalLM
from graftlm.text.collate import encode_rows, subset
from graftlm.text.dataset import SPLITS, load_dataset
from graftlm.text.template import COLUMN_FLAGS, read_columns

PROMPTS, POSITIONS = 8, 32
"""Number of prompts, and of each one's last positions: at V = 50,000 their logits take 50 MB."""

TOLERANCE = 1e-4
SHARES = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}
SHARES |= {"f32": 2e-5, "f16": 1e-2, "bf16": 5e-2, "q8_0": 5e-2, "q5_1": 0.25, "q5_0": 0.25, "q4_1": 0.5, "q4_0": 0.5}
"""The accepted difference is TOLERANCE, or this share of the largest logit, by dtype of the weights.

Rounding alone makes 0.6e-5, 0.4e-2 and 1.8e-2 of it in 30 layers of SmolLM2, at logits of 33; an error makes far more.
"""

TEXTS = (
    "A gripping story, told with wit and warmth from its first scene to its last.",
    "Two hours that feel like four, and not one character worth the ticket.",
    "The acting is fine; the script, sadly, is not.",
    "I laughed, I cried, and then I bought a ticket for the next evening.",
)


@dataclass(frozen=True)
class Verification:
    """The difference between two models' logits."""

    max_abs_logit_diff: float
    max_abs_logit: float
    tolerance: float
    """The largest difference that is accepted."""
    prompts: str

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return dict(vars(self))


class ReferenceLogits:
    """A model's logits on a few prompts, to compare with those of the files that are written from it.

    The prompts are of the test (else validation) split of the run's data, which its flags `data` name; of built-in
    texts if there is no such data, or it is not on this disk or no longer readable.
    """

    def __init__(self, loaded: ModelBundle, data: dict[str, Any]) -> None:
        self.prompts, self.source = verification_prompts(loaded, data)
        self._logits = self._of(loaded.model)
        self.largest = torch.stack([a.abs().max() for a in self._logits]).max().item()

    def _of(self, model: CausalLM) -> list[Tensor]:
        """[P, V] of each prompt's last positions, in float32 or wider."""
        with torch.inference_mode():
            last = [torch.arange(max(0, len(ids) - POSITIONS), len(ids)) for ids in self.prompts]
            return [model(torch.tensor([ids]), positions=at) for ids, at in zip(self.prompts, last, strict=True)]

    def verify(self, model: CausalLM, dtype: str, action: str) -> Verification:
        """Compare with a model that was read back; beyond the tolerance of `dtype` a GraftError that names `action`."""
        pairs = zip(self._logits, self._of(model), strict=True)
        difference = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()
        tolerance = max(TOLERANCE, SHARES[dtype] * self.largest)
        if not difference <= tolerance:  # NaN fails too
            raise GraftError(
                f"{action}: read back, its logits differ by {difference:.1e}, more than {tolerance:.1e} "
                f"({self.source}); nothing was written"
            )
        return Verification(difference, self.largest, tolerance, self.source)


def verification_prompts(loaded: ModelBundle, data: dict[str, Any]) -> tuple[list[tuple[int, ...]], str]:
    """Token ids of the prompts of `ReferenceLogits`, and a description of their source."""
    template, tokenizer, longest = loaded.template, loaded.tokenizer, loaded.model.max_seq_len
    assert template is not None, "a run has a template"
    longest = min(data.get("max_length") or longest, longest)
    name, val, test = (data.get(flag) or "" for flag in ("data", "val_data", "test_data"))
    if is_local_data(name):
        try:
            flags = TrainConfig(**{flag: data[flag] for flag in COLUMN_FLAGS if data.get(flag)})
            columns = read_columns(flags, template)
            splits = load_dataset(
                name, val, test, columns, template.label_values, data.get("bad_rows") or "stop"
            ).splits
            split = next(name for name in reversed(SPLITS) if splits.get(name))
            examples, _ = encode_rows(subset(splits[split], PROMPTS), template, tokenizer, longest)
            # The prompt of a window of documents is one token: the whole window is compared.
            ids = [e.prompt_ids + e.completion_ids if e.is_window else e.prompt_ids for e in examples]
            return ids, f"{len(ids)} prompts of the {split} split of {Path(name).name}"
        except InputError:
            pass  # it has changed since the run
    ids = [tuple(tokenizer.encode_prompt(template.prompt(text))[:longest]) for text in TEXTS]
    return ids, f"{len(ids)} built-in texts, for want of the run's data"
