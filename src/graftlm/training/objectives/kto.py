"""Kahneman-Tversky optimisation: learn from single answers that are marked as desirable or undesirable.

With an answer's log-ratio h = log pi(y | x) - log ref(y | x), a sum over its tokens (Ethayarajh et al. 2024, eq. 7):

    desirable      w_d (1 - s(beta (h - z)))
    undesirable    w_u (1 - s(beta (z - h)))
    z = max(0, mean over the batch of log pi(y' | x) - log ref(y' | x)), without gradient

z estimates KL(pi || ref) from mismatched pairs, as TRL does: each prompt with the completion of the example before it
in the batch, the first with the last one's. The batch has --batch_size examples: all micro-batches and all ranks, but
not --grad_accum's other batches; at validation it is the whole split. It has at least two examples, unless one is left
at the end of an epoch. A completion that does not fit after another's prompt is truncated. z is computed without
dropout, in two forward passes: one with the present weights and one with the initial ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example
from graftlm.text.records import Unpaired
from graftlm.training.batches import CollateOptions, HiddenStates, TrainingBatch, collate, sequence_logps
from graftlm.training.distributed import DistContext
from graftlm.training.objectives import Statistics, Sums
from graftlm.training.reference import GROUP, ReferenceObjective


@dataclass
class KTO(ReferenceObjective):
    """Preference training on desirable and undesirable answers."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    records: ClassVar = (Unpaired,)
    needs: ClassVar[str] = "files with the fields prompt, completion and label (true: desirable, false: undesirable)"
    answers: ClassVar[int] = 1
    min_batch_size: ClassVar[int] = 2  # a prompt needs another example's completion

    @property
    def needs_initial(self) -> bool:
        """The KL estimate runs the initial model in each step."""
        return True

    def check_sharded(self) -> None:
        """The initial weights are swapped in whole, which sharded ones cannot be."""
        raise InputError("--objective kto: not supported with sharded full fine-tuning; run in a single process")

    def collate(self, examples: Sequence[Example], options: CollateOptions) -> TrainingBatch:
        """Prompt and completion as one row."""
        marks = {"desirable": torch.tensor([bool(e.desirable) for e in examples])}
        batch = replace(collate(examples, options), weight=len(examples)).with_extra(marks)
        return self.with_reference_logps(batch, examples)

    def loss_from_hidden(self, model: CausalLM, hidden: HiddenStates, batch: TrainingBatch) -> tuple[Tensor, Sums]:
        """The examples' losses, summed, and sums over the examples of what is logged."""
        policy, _ = sequence_logps(model, hidden, batch)
        desirable = batch.extra["desirable"].to(policy.device)
        reference = batch.extra["reference"].flatten().to(policy.dtype).to(policy.device)
        z = batch.extra["kl"].to(policy.dtype).to(policy.device)
        ratios = policy - reference
        gains = self.beta * torch.where(desirable, ratios - z, z - ratios)
        weights = torch.where(desirable, self.desirable_weight, self.undesirable_weight).to(policy.dtype)
        with torch.no_grad():
            marks, rewards = desirable.to(policy.dtype), self.beta * ratios
            sums = {
                "desirable": marks.sum(),
                "reward_desirable": (rewards * marks).sum(),
                "reward_undesirable": (rewards * (1 - marks)).sum(),
                "logp_desirable": (policy * marks).sum(),
                "logp_undesirable": (policy * (1 - marks)).sum(),
                "reward_accuracy": (gains > 0).to(policy.dtype).sum(),
                "kl_estimate": z * len(policy),
            }
        return (weights * (1 - torch.sigmoid(gains))).sum(), sums

    def batch_statistics(self, model: CausalLM, examples: Sequence[Example], dist: DistContext) -> Statistics:
        """{"kl": z}."""
        mismatched = []
        for example, before in zip(examples, [examples[-1], *examples[:-1]], strict=True):
            room = model.max_seq_len - len(example.prompt_ids)
            answer = before.completion_ids[before.skip :][:room]
            mismatched.append(replace(example, completion_ids=answer, masked_spans=(), skip=0))
        group = min(GROUP, math.ceil(len(examples) / dist.size))
        policy = self.answer_logps(model, mismatched, dist, group)
        with self.initial_weights(model).restored():
            reference = self.answer_logps(model, mismatched, dist, group)
        return {"kl": (policy - reference).mean().clamp(min=0)}

    def metrics(self, sums: Mapping[str, float], weight: float) -> dict[str, float | None]:
        """Means over the desirable and the undesirable examples, None where there are none, and over all."""
        counts = {"desirable": sums["desirable"], "undesirable": weight - sums["desirable"]}
        row: dict[str, float | None] = {}
        for kind, count in counts.items():
            for name in ("reward", "logp"):
                row[f"{name}_{kind}"] = sums[f"{name}_{kind}"] / count if count else None
        good, bad = row["reward_desirable"], row["reward_undesirable"]
        row["reward_margin"] = None if good is None or bad is None else good - bad
        return row | {name: sums[name] / weight for name in ("reward_accuracy", "kl_estimate")}
