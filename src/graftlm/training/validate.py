"""Loss and accuracy on held-out examples, as a run goes."""

import torch

from graftlm.config import TrainConfig
from graftlm.inference.evaluate import score
from graftlm.inference.generate import evaluating
from graftlm.models.base import CausalLM
from graftlm.text.data import Example
from graftlm.training.objectives import OBJECTIVES, make_batch

VALIDATION_BATCH = 32


def validate(
    model: CausalLM, examples: list[Example], label_ids: list[list[int]], config: TrainConfig
) -> tuple[float, float | None]:
    """Mean loss a target token, and the share of examples whose own label scores highest (None without labels)."""
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
