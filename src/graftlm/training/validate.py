"""Loss and accuracy on held-out examples, as a run goes; of pairs, how often the margin is on the right side."""

import torch

from graftlm.config import TrainConfig
from graftlm.inference.generate import eval_mode
from graftlm.inference.scoring import score
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example
from graftlm.training.distributed import DistContext, uneven_forward
from graftlm.training.objectives import OBJECTIVES, collate
from graftlm.training.preferences import make_loss

VALIDATION_BATCH = 32


def validate(
    model: CausalLM,
    examples: list[Example],
    label_ids: list[list[int]],
    config: TrainConfig,
    world: DistContext | None = None,
) -> tuple[float, float | None]:
    """Mean loss a target token, and the share of examples whose own label scores highest (None without labels).

    Of pairs: the mean loss a pair, and the share whose chosen answer has the higher reward.
    Each process of a run reads its share of the examples; all return the same.
    """
    world = world or DistContext()
    mine = [examples[i] for i in world.partition(range(len(examples)), [e.length for e in examples])]
    read = _sums if config.objective != "dpo" else _sums_of_pairs
    with uneven_forward(model, world):
        sums = read(model, mine, label_ids, config) if mine else (0.0, 0, 0.0)
    loss, weight, right = world.all_reduce_numbers(sums)
    judged = config.objective == "dpo" or bool(label_ids)
    return loss / weight, right / len(examples) if judged else None


def _sums(
    model: CausalLM, examples: list[Example], label_ids: list[list[int]], config: TrainConfig
) -> tuple[float, int, float]:
    """Sum of losses, target tokens, and how many examples' own label scores highest."""
    scores = score(model, examples, label_ids, batch_size=VALIDATION_BATCH)
    right = 0.0
    if label_ids:
        own = torch.tensor([e.label for e in examples])
        right = float((scores.labels.argmax(-1) == own).sum())
    if config.loss_on == "completion":
        return -scores.completion.sum().item(), int(scores.completion_tokens.sum()), right
    total, weight = 0.0, 0
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    with eval_mode(model):
        for at in range(0, len(order), VALIDATION_BATCH):
            batch = collate([examples[i] for i in order[at : at + VALIDATION_BATCH]], "all")
            total += OBJECTIVES["all"](model, batch.to(model.device)).item()
            weight += batch.weight
    return total, weight, right


def _sums_of_pairs(
    model: CausalLM, examples: list[Example], label_ids: list[list[int]], config: TrainConfig
) -> tuple[float, int, float]:
    """Sum of losses, pairs, and how many have the higher reward where they should."""
    loss, right = 0.0, 0.0
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    with eval_mode(model):
        for at in range(0, len(order), VALIDATION_BATCH // 2):
            batch = collate([examples[i] for i in order[at : at + VALIDATION_BATCH // 2]], "pairs")
            some, told = make_loss(config)(model, batch.to(model.device))
            loss, right = loss + some.item(), right + told["reward_accuracy"].item()
    return loss, len(examples), right
