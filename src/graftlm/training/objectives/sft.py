"""Supervised fine-tuning: cross-entropy of the next token.

completion   -sum of log p(token | all before it) over the completion and its end-of-text; of a conversation over
             the assistant's answers; of documents over every token of a window but its first
all          the same over every token but the first
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from graftlm.inference.scoring import score
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example
from graftlm.text.records import Completion, Conversation, Document, Labelled
from graftlm.training.batches import CollateOptions, HiddenStates, LossOn, TrainingBatch, TrainingData, collate
from graftlm.training.objectives import Objective, Statistics, Sums, Validation

VALIDATION_BATCH = 32


@dataclass
class SFT(Objective):
    """Supervised fine-tuning on labels, completions or conversations, and continued pretraining on documents."""

    loss_on: LossOn = "completion"

    records: ClassVar = (Labelled, Completion, Conversation, Document)
    needs: ClassVar[str] = "texts with labels, prompts with completions, conversations, or documents"
    caches_activations: ClassVar[bool] = True
    packs: ClassVar[bool] = True

    def collate(self, examples: Sequence[Example], options: CollateOptions) -> TrainingBatch:
        """Prompt and completion as one row."""
        return collate(examples, options, self.loss_on)

    def loss_from_hidden(self, model: CausalLM, hidden: HiddenStates, batch: TrainingBatch) -> tuple[Tensor, Sums]:
        """Cross-entropy, summed over the target tokens."""
        shared, h, index = hidden
        ones = torch.ones(len(index), device=h.device)
        if shared is None or self.loss_on == "completion":
            return model.loss(h, index, batch.targets, ones), {}
        # Each shared token is predicted by the one before it, once for every record; the last one predicts each
        # record's first token.
        p, first = len(shared), batch.ids.flatten()[batch.starts]
        records = len(first)
        inside = torch.arange(p - 1, device=h.device)
        loss = model.loss(
            torch.cat([shared, h]),
            torch.cat([inside, torch.full_like(first, p - 1), p + index]),
            torch.cat([batch.shared[0, 1:], first, batch.targets]),
            torch.cat(
                [torch.full((p - 1,), float(records), device=h.device), torch.ones(records, device=h.device), ones]
            ),
        )
        return loss, {}

    def evaluate(self, model: CausalLM, data: TrainingData, statistics: Statistics) -> Validation:
        """Correct are the examples whose own label scores highest."""
        examples = data.validation
        progress = data.progress if self.loss_on == "completion" else None  # else `sum_losses` reports it
        batching = {"batch_size": VALIDATION_BATCH, "max_tokens": data.max_tokens, "progress": progress}
        scores = score(model, examples, data.label_ids, **batching)
        correct, predicted = None, list[int]()
        if data.label_ids:
            predicted = scores.labels.argmax(-1).tolist()
            correct = float(sum(label == e.label for label, e in zip(predicted, examples, strict=True)))
        if self.loss_on == "completion":
            loss, tokens = -scores.completion.sum().item(), int(scores.completion_tokens.sum())
            return Validation(loss, tokens, correct, predicted)
        ordered = sorted(examples, key=lambda e: len(e.prompt_ids))
        loss, weight, _ = self.sum_losses(model, replace(data, validation=ordered), VALIDATION_BATCH, statistics)
        return Validation(loss, weight, correct, predicted)
