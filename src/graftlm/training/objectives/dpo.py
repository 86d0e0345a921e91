"""Direct preference optimisation and its variants: make the chosen answer likelier than the rejected one.

With the sums l_w, l_l of the chosen and the rejected answer's token log-probabilities, their lengths n_w, n_l in
tokens, and the same sums r_w, r_l under the reference model, which is the model that training starts from:

    sigmoid        -log s(delta)                           delta = beta ((l_w - r_w) - (l_l - r_l))
                   DPO (Rafailov et al. 2023, eq. 7); with label_smoothing e it is cDPO (Mitchell 2023):
                   -(1 - e) log s(delta) - e log s(-delta)
    hinge          max(0, 1 - delta)                       SLiC's loss on DPO's rewards (Zhao et al. 2023)
    ipo            (h - 1 / (2 beta))^2                    h = (l_w - r_w) / n_w - (l_l - r_l) / n_l
                   IPO (Azar et al. 2023, eq. 17), averaged over tokens as its authors run it
    sigmoid_norm   -log s(beta h)                          DPO's loss on the same averages; label_smoothing as above
    simpo          -log s(beta (l_w / n_w - l_l / n_l) - gamma)
                   SimPO (Meng et al. 2024, eq. 6); no reference
    orpo           -l_w / n_w - beta log s(o(l_w / n_w) - o(l_l / n_l))
                   ORPO (Hong et al. 2024, eq. 6 and 7), whose lambda is our beta; o(a) = a - log(1 - exp(a)), the log
                   odds of an average; no reference

A pair is one row whose prompt runs once, and the reference's sums are computed once before training
(`training/reference.py`), so a step costs one forward and one backward pass of one model. The sums are float32.

Letters: B pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.config.training import LossType
from graftlm.errors import InputError
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example
from graftlm.text.records import Preference
from graftlm.training.batches import CollateOptions, HiddenStates, TrainingBatch, collate, sequence_logps
from graftlm.training.objectives import Sums
from graftlm.training.reference import ReferenceObjective

REFERENCE_FREE = ("simpo", "orpo")
DEFAULT_BETA = {"simpo": 2.0}
"""Where not 0.1: the value of its paper."""


@dataclass(frozen=True)
class SequenceLogProbs:
    """Log-probabilities of a batch's answers in nats, [B, 2] each: chosen, rejected."""

    policy: Tensor
    reference: Tensor | None
    """Without gradient; None for a loss without a reference."""
    lengths: Tensor
    """In tokens."""


@dataclass
class DPO(ReferenceObjective):
    """Preference training on pairs of a chosen and a rejected answer."""

    loss_type: LossType = "sigmoid"
    beta: float = 0.0
    """0: the default, DEFAULT_BETA."""
    label_smoothing: float = 0.0
    gamma: float = 1.0

    records: ClassVar = (Preference,)
    needs: ClassVar[str] = (
        "preference pairs: files with the fields prompt, chosen and rejected (graft pairs makes them)"
    )
    answers: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self.beta = self.beta or DEFAULT_BETA.get(self.loss_type, 0.1)
        if self.label_smoothing and self.loss_type not in ("sigmoid", "sigmoid_norm"):
            raise InputError(f"--label_smoothing {self.label_smoothing}: --loss_type {self.loss_type} takes none")
        if self.reference and not self.needs_reference:
            raise InputError(
                f"--reference {self.reference}: --loss_type {self.loss_type} needs no reference; leave it out"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return self.loss_type not in REFERENCE_FREE

    def collate(self, examples: Sequence[Example], options: CollateOptions) -> TrainingBatch:
        """A pair as one row."""
        batch = replace(collate(examples, options), weight=len(examples))
        return self.with_reference_logps(batch, examples)

    def loss_from_hidden(self, model: CausalLM, hidden: HiddenStates, batch: TrainingBatch) -> tuple[Tensor, Sums]:
        """The pairs' losses, summed, and sums over the pairs of what is logged."""
        sums = self.pair_logps(model, hidden, batch)
        losses, rewards = self.losses(sums), self.rewards(sums).detach()
        margins = rewards[:, 0] - rewards[:, 1]
        metrics = {
            "reward_margin": margins.sum(),
            "reward_accuracy": (margins > 0).to(margins.dtype).sum(),
            "logp_chosen": sums.policy[:, 0].detach().sum(),
            "logp_rejected": sums.policy[:, 1].detach().sum(),
            "dpo_gradient_weight": torch.sigmoid(-self.logits(sums).detach()).sum(),
        }
        return losses.sum(), metrics

    def pair_logps(self, model: CausalLM, hidden: HiddenStates, batch: TrainingBatch) -> SequenceLogProbs:
        """The log-probabilities of a batch's answers, with gradient, and the reference's."""
        policy, lengths = sequence_logps(model, hidden, batch)
        reference = batch.extra.get("reference")
        return SequenceLogProbs(
            policy.view(-1, 2),
            None if reference is None else reference.to(policy.dtype).to(policy.device),
            lengths.view(-1, 2),
        )

    def losses(self, sums: SequenceLogProbs) -> Tensor:
        """Each pair's loss, [B]."""
        delta, smoothing = self.logits(sums), self.label_smoothing
        if self.loss_type == "hinge":
            return torch.relu(1 - delta)
        if self.loss_type == "ipo":
            return (_difference(_log_ratios(sums) / sums.lengths) - 1 / (2 * self.beta)) ** 2
        if self.loss_type == "simpo":
            return -F.logsigmoid(delta)
        if self.loss_type == "orpo":
            return -sums.policy[:, 0] / sums.lengths[:, 0] - self.beta * F.logsigmoid(delta)
        return -(1 - smoothing) * F.logsigmoid(delta) - smoothing * F.logsigmoid(-delta)

    def logits(self, sums: SequenceLogProbs) -> Tensor:
        """The argument of the sigmoid in each pair's loss (delta), [B]; the gradient's weight is s(-delta)."""
        if self.loss_type == "orpo":
            odds = log_odds(sums.policy / sums.lengths)
            return odds[:, 0] - odds[:, 1]
        if self.loss_type == "simpo":
            return _difference(self.beta * sums.policy / sums.lengths) - self.gamma
        ratios = _log_ratios(sums)
        averaged = self.loss_type in ("ipo", "sigmoid_norm")
        return self.beta * _difference(ratios / sums.lengths if averaged else ratios)

    def rewards(self, sums: SequenceLogProbs) -> Tensor:
        """The rewards that the loss implies, [B, 2]: beta (l - r), or beta l / n without a reference."""
        if self.needs_reference:
            return self.beta * _log_ratios(sums)
        return self.beta * sums.policy / sums.lengths


def log_odds(average: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(average), average < 0."""
    return average - torch.log(-torch.expm1(average))


def _log_ratios(sums: SequenceLogProbs) -> Tensor:
    assert sums.reference is not None, "the reference's log-probabilities are not known"
    return sums.policy - sums.reference


def _difference(pairs: Tensor) -> Tensor:
    return pairs[:, 0] - pairs[:, 1]
