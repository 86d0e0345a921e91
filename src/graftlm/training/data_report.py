"""`graft data`: what a run would read of a data set and learn from it, in numbers and three examples.

Reading, tokenizing and checking are those of `graft train` (`training/data.py`), on all rows of validation. The test
split, which training does not tokenize, is counted too; a row of it that cannot be tokenized is a note, not an error.
No weights are read.
"""

import sys
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from graftlm.config import DataConfig, TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.load import read_config, read_tokenizer
from graftlm.files.split_files import SPLITS
from graftlm.text.collate import Example, encode_rows
from graftlm.text.dataset import Dataset
from graftlm.text.preflight import common_texts, show_targets
from graftlm.text.records import Record
from graftlm.text.template import Template, load_template
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.data import (
    chat_flag,
    check_records,
    encode_splits,
    max_example_tokens,
    objectives_for,
    read_data,
    with_chat,
    with_labels,
)
from graftlm.training.run_manifest import resolve_init

SHOWN = 3
"""Examples in the report."""
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class _Encoder:
    """How records become examples."""

    template: Template
    tokenizer: Tokenizer
    max_length: int
    packing: bool

    def encode(self, records: Sequence[Record], max_length: int = 0) -> tuple[list[Example], int]:
        """The examples, and how many texts were truncated. max_length: instead of the run's."""
        length = max_length or self.max_length
        return encode_rows(records, self.template, self.tokenizer, length, score_labels=False, packing=self.packing)


def describe_data(config: DataConfig, explicit: Set[str]) -> dict[str, Any]:
    """The JSON object of `graft data`; `explicit` are the flags that were given.

    Raises InputError where `graft train` would, with the same line.
    """
    flags = TrainConfig(**asdict(config), plan=True)  # of a plan no weights are read
    source = resolve_init(flags, explicit, resumed=False, weights=False)
    flags = with_labels(flags, explicit)
    template = load_template(flags.template, flags.labels)
    dataset = read_data(flags, explicit, template)
    objective = next(iter(objectives_for(dataset.splits["train"][0])), flags.objective)
    check_records(dataset, objective)
    tokenizer = read_tokenizer(source.folder)
    tokenizer.date = date.today().isoformat()
    template = with_chat(chat_flag(config.chat, source, tokenizer), dataset, template, tokenizer)
    max_length = max_example_tokens(flags, read_config(source.folder), source.method)
    encoder = _Encoder(template, tokenizer, max_length, flags.packing)
    encoded = encode_splits(dataset, 0, template, tokenizer, max_length, flags.packing)
    splits = {
        split: _split(encoder, dataset.splits[split], examples, encoded.truncated[split])
        for split, examples in encoded.examples.items()
    }
    shown = encoded.examples["train"][:SHOWN]
    return {
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "layouts": list(dataset.layouts),
        "unused_columns": list(dataset.unused_columns),
        "objective": objective,
        "tokenizer": source.base,
        "max_length": max_length,
        "splits": splits | _test_split(encoder, dataset, encoded.notes),
        "duplicates": _duplicates(dataset),
        "examples": [{"source": e.source, "text": show_targets(e, tokenizer)} for e in shown],
        "notes": encoded.notes[:-1],  # without the example
    }


def _duplicates(dataset: Dataset) -> dict[str, int]:
    """The number of texts in two splits, by their names: {"train_test": 2}."""
    ordered = {split: dataset.splits[split] for split in SPLITS if split in dataset.splits}
    return {f"{first}_{second}": count for (first, second), count in common_texts(ordered).items()}


def _test_split(encoder: _Encoder, dataset: Dataset, notes: list[str]) -> dict[str, Any]:
    """The numbers of the test split, if there is one; adds a note if it cannot be tokenized."""
    if not (records := dataset.splits.get("test")):
        return {}
    try:
        return {"test": _split(encoder, records, *encoder.encode(records))}
    except InputError as error:
        notes.insert(-1, f"test is not counted in tokens: {error}")
        return {"test": {"rows": len(records)}}


def _split(encoder: _Encoder, records: Sequence[Record], examples: Sequence[Example], truncated: int) -> dict[str, Any]:
    """The numbers of a split. Lengths are those before truncation; targets those that are learned."""
    whole = encoder.encode(records, sys.maxsize)[0] if truncated else examples
    lengths = sorted(map(_length, whole))
    targets = sum(map(_targets, examples))
    tokens = {f"p{percent}": lengths[-(-percent * len(lengths) // 100) - 1] for percent in PERCENTILES}
    return {
        "rows": len(records),
        "examples": len(examples),
        "tokens": {**tokens, "max": lengths[-1]},
        "tokens_per_epoch": sum(e.length for e in examples),
        "targets": targets,
        "truncated": {
            "rows": truncated,
            "tokens": sum(lengths) - sum(map(_length, examples)),
            "targets": sum(map(_targets, whole)) - targets,
        },
    }


def _length(example: Example) -> int:
    """Tokens of prompt and completion; of a preference with the longer answer. --max_length limits this number."""
    return len(example.prompt_ids) + max(map(len, example.answers))


def _targets(example: Example) -> int:
    """Tokens that are learned, those of a rejected answer included."""
    return len(example.loss_positions) + max(0, len(example.rejected_ids) - example.skip)
