"""Losses on pairs of answers: what was chosen should become likelier than what was rejected, beside a reference.

With the sums l_w, l_l of the chosen and the rejected answer's token log-probabilities, their lengths n_w, n_l in
tokens, and the same sums r_w, r_l under the model that training started from:

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

What is unusual here: a pair is one row whose prompt runs once, the reference's sums are computed once before training
(`reference.py`), so that a step costs one forward and one backward pass of one model; and the sums are float32.

Letters: B pairs, N target tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.config import LossType, TrainConfig
from graftlm.models.base import CausalLM
from graftlm.training.objectives import OBJECTIVES, LossOn, TrainingBatch, forward_batch

REFERENCE_FREE = ("simpo", "orpo")
DEFAULT_BETA = {"simpo": 2.0}
"""Where not the 0.1 of the others: what its paper used."""


@dataclass(frozen=True)
class SequenceLogProbs:
    """Log-probabilities of a batch's answers in natural units, [B, 2] each: chosen, rejected."""

    policy: Tensor
    reference: Tensor | None
    """Without gradient; None where the batch has none."""
    lengths: Tensor
    """In tokens."""


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of pairs that a run asks for."""

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0
    """SimPO's target margin."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the model that training started from."""
        return self.loss_type not in REFERENCE_FREE

    def __call__(self, model: CausalLM, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the pairs' losses, and sums over the pairs of what is logged."""
        sums = sequence_logps(model, batch)
        losses, rewards = self.losses(sums), self.rewards(sums).detach()
        margins = rewards[:, 0] - rewards[:, 1]
        told = {
            "reward_margin": margins.sum(),
            "reward_accuracy": (margins > 0).to(margins.dtype).sum(),
            "logp_chosen": sums.policy[:, 0].detach().sum(),
            "logp_rejected": sums.policy[:, 1].detach().sum(),
            "dpo_gradient_weight": torch.sigmoid(-self.logits(sums).detach()).sum(),
        }
        return losses.sum(), told

    def losses(self, sums: SequenceLogProbs) -> Tensor:
        """Each pair's loss, [B]."""
        return _LOSSES[self.loss_type](self, sums)

    def logits(self, sums: SequenceLogProbs) -> Tensor:
        """What the sigmoid of each pair's loss is taken of, [B]; its gradient's weight is s(-delta)."""
        if self.loss_type == "orpo":
            odds = log_odds(sums.policy / sums.lengths)
            return odds[:, 0] - odds[:, 1]
        if self.loss_type == "simpo":
            return _difference(self.beta * sums.policy / sums.lengths) - self.gamma
        ratios = _log_ratios(sums)
        averaged = self.loss_type in ("ipo", "sigmoid_norm")
        return self.beta * _difference(ratios / sums.lengths if averaged else ratios)

    def rewards(self, sums: SequenceLogProbs) -> Tensor:
        """The rewards that the loss implies, [B, 2]: beta (l - r), or beta l / n where there is no reference."""
        if self.needs_reference:
            return self.beta * _log_ratios(sums)
        return self.beta * sums.policy / sums.lengths


Loss = Callable[[CausalLM, TrainingBatch], tuple[Tensor, dict[str, Tensor]]]
"""The sum of a batch's losses, and sums over its examples of what is to be logged beside."""


def make_loss(config: TrainConfig) -> Loss:
    """What a run with this config minimises."""
    if config.objective == "dpo":
        assert config.beta is not None
        return PreferenceLoss(config.loss_type, config.beta, config.label_smoothing, config.gamma)
    return lambda model, batch: (OBJECTIVES[config.loss_on](model, batch), {})


def batch_kind(config: TrainConfig) -> LossOn:
    """What a batch of a run with this config is made for."""
    return "pairs" if config.objective == "dpo" else config.loss_on


def sequence_logps(model: CausalLM, batch: TrainingBatch) -> SequenceLogProbs:
    """The sums of the log-probabilities of a batch's answers under a model, with gradient."""
    assert batch.answer is not None, "no batch of pairs"
    _, h, pick = forward_batch(model, batch)
    log_p = model.log_probs(h, pick, batch.targets)
    zeros = torch.zeros(2 * len(batch.ids), dtype=log_p.dtype, device=log_p.device)
    policy = zeros.index_add(0, batch.answer, log_p).view(-1, 2)
    lengths = zeros.index_add(0, batch.answer, torch.ones_like(log_p)).view(-1, 2)
    known = batch.reference
    return SequenceLogProbs(policy, None if known is None else known.to(log_p.dtype).to(log_p.device), lengths)


def log_odds(average: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(average), average < 0."""
    return average - torch.log(-torch.expm1(average))


def _log_ratios(sums: SequenceLogProbs) -> Tensor:
    assert sums.reference is not None, "the reference's log-probabilities are not known"
    return sums.policy - sums.reference


def _difference(pairs: Tensor) -> Tensor:
    return pairs[:, 0] - pairs[:, 1]


def _sigmoid(how: PreferenceLoss, sums: SequenceLogProbs) -> Tensor:
    delta, e = how.logits(sums), how.label_smoothing
    return -(1 - e) * F.logsigmoid(delta) - e * F.logsigmoid(-delta)


def _hinge(how: PreferenceLoss, sums: SequenceLogProbs) -> Tensor:
    return torch.relu(1 - how.logits(sums))


def _ipo(how: PreferenceLoss, sums: SequenceLogProbs) -> Tensor:
    return (_difference(_log_ratios(sums) / sums.lengths) - 1 / (2 * how.beta)) ** 2


def _simpo(how: PreferenceLoss, sums: SequenceLogProbs) -> Tensor:
    return -F.logsigmoid(how.logits(sums))


def _orpo(how: PreferenceLoss, sums: SequenceLogProbs) -> Tensor:
    likelihood = -sums.policy[:, 0] / sums.lengths[:, 0]
    return likelihood - how.beta * F.logsigmoid(how.logits(sums))


_LOSSES: dict[str, Callable[[PreferenceLoss, SequenceLogProbs], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid,
    "simpo": _simpo,
    "orpo": _orpo,
}
