"""Loss and accuracy on held-out examples, as a run goes; of pairs, how often the margin is on the right side."""

import torch

from graftlm.config import TrainConfig
from graftlm.inference.evaluate import score
from graftlm.inference.generate import evaluating
from graftlm.models.base import CausalLM
from graftlm.text.data import Example
from graftlm.training.objectives import OBJECTIVES, make_batch
from graftlm.training.preferences import loss_of

VALIDATION_BATCH = 32


def validate(
    model: CausalLM, examples: list[Example], label_ids: list[list[int]], config: TrainConfig
) -> tuple[float, float | None]:
    """Mean loss a target token, and the share of examples whose own label scores highest (None without labels).

    Of pairs: the mean loss a pair, and the share whose chosen answer has the higher reward.
    """
    if config.objective == "dpo":
        return _validate_pairs(model, examples, config)
    scores = score(model, examples, label_ids, batch_size=VALIDATION_BATCH)
    accuracy = None
    if label_ids:
        own = torch.tensor([e.label for e in examples])
        accuracy = (scores.labels.argmax(-1) == own).double().mean().item()
    if config.loss_on == "completion":
        return -scores.completion.sum().item() / int(scores.completion_tokens.sum()), accuracy
    total, weight = 0.0, 0
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    with evaluating(model):
        for at in range(0, len(order), VALIDATION_BATCH):
            batch = make_batch([examples[i] for i in order[at : at + VALIDATION_BATCH]], "all")
            total += OBJECTIVES["all"](model, batch.to(model.device)).item()
            weight += batch.weight
    return total / weight, accuracy


def _validate_pairs(model: CausalLM, examples: list[Example], config: TrainConfig) -> tuple[float, float]:
    loss, right = 0.0, 0.0
    order = sorted(range(len(examples)), key=lambda i: examples[i].length)
    with evaluating(model):
        for at in range(0, len(order), VALIDATION_BATCH // 2):
            batch = make_batch([examples[i] for i in order[at : at + VALIDATION_BATCH // 2]], "pairs")
            some, told = loss_of(config)(model, batch.to(model.device))
            loss, right = loss + some.item(), right + told["reward_accuracy"].item()
    return loss / len(examples), right / len(examples)
