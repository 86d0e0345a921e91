"""Which rate a step has and which examples: functions of the config and the step alone, so a resumed run agrees."""

import math
from collections.abc import Iterator

from graftlm.config import TrainConfig
from graftlm.text.collate import SORT_WINDOW, epoch_batches


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of `step` (1 is the first): linear to the peak over `warmup` steps, then a cosine to zero.

    It is never zero: the first step already moves every weight, and the last one still does.
    """
    assert config.lr is not None and config.warmup_steps is not None and config.max_iters is not None
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    part = (step - config.warmup_steps) / (config.max_iters - config.warmup_steps + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * part))


def batch_stream(lengths: list[int], config: TrainConfig, first: int) -> Iterator[list[int]]:
    """The endless stream of batches (lists of example numbers) from number `first` on; a function of the seed alone."""
    per_epoch = math.ceil(len(lengths) / config.batch_size)
    epoch, skip = divmod(first, per_epoch)
    while True:
        window = SORT_WINDOW if config.group_by_length else 0
        yield from epoch_batches(lengths, config.batch_size, config.seed, epoch, window)[skip:]
        epoch, skip = epoch + 1, 0
