"""Checks of preferences.md on one prompt with five answers, all enumerated, and on three answers that share a feature.

Formulas stand against what needs none: an optimum found by plain gradient descent, autograd's gradients.

Letters: y an answer, r(y) its reward, pi_ref(y) and pi(y) probabilities, beta the penalty's weight, won and lost the
two answers of a pair, delta the margin of the implicit rewards.
"""

import itertools
import math
import random
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from _equation import Row, descend, drawn, equation, worst
from torch import Tensor

from graftlm.training.objectives.dpo import DPO, SequenceLogProbs

BETA = 0.5
REWARD = torch.tensor([-0.6, 0.3, 0.9, 0.0, 1.2], dtype=torch.float64)
REF = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64)
Y = len(REF)
PAIRS = list(itertools.permutations(range(Y), 2))

FEATURES = drawn(random.Random(3), Y, 3)
"""[Y, 3]: a policy with fewer parameters than answers, softmax(FEATURES theta), whose gradients mix the answers."""
THETA = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)


@cache
def ascended() -> Tensor:
    """The policy at which gradient ascent on J from pi_ref ends."""
    return torch.softmax(descend(lambda z: -objective(torch.softmax(z, 0)), REF.log().tolist(), 4.0, 1500), 0)


def optimal(sign: float = 1.0) -> tuple[Tensor, float]:
    """pi* = pi_ref exp(r / beta) / Z, and log Z."""
    unnormalised = REF * (sign * REWARD / BETA).exp()
    return unnormalised / unnormalised.sum(), unnormalised.sum().log().item()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q), the sum over the answers of p log(p / q)."""
    return (p * (p / q).log()).sum()


def objective(pi: Tensor, penalty: float = 1.0) -> Tensor:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref)."""
    return (pi * REWARD).sum() - penalty * BETA * kl(pi, REF)


def others(count: int) -> list[Tensor]:
    """Other policies, drawn at random."""
    rng = random.Random(4)
    return [torch.softmax(4 * drawn(rng, Y), dim=0) for _ in range(count)]


def margin(log_pi: Tensor, won: int, lost: int, ref: Tensor = REF) -> Tensor:
    """delta: beta times the difference of the two answers' log-ratios."""
    return BETA * ((log_pi[won] - ref[won].log()) - (log_pi[lost] - ref[lost].log()))


def sigma(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + math.exp(-x))


@equation("3.1", "two exponentials", "$\\sigma$ of the difference")
def bradley_terry(sign: float = 1.0) -> list[Row]:
    """exp(r_w) / (exp(r_w) + exp(r_l)) = sigma(r_w - r_l)."""
    powers, rows = REWARD.exp(), []
    for won, lost in ((2, 1), (1, 2), (4, 0)):
        right = sigma(sign * (REWARD[won] - REWARD[lost]).item())
        left = (powers[won] / (powers[won] + powers[lost])).item()
        rows.append(Row(f"answer {won + 1} over {lost + 1}", left, right))
    return rows


@equation("3.2", "$J(\\pi)$", "$\\beta \\log Z - \\beta \\mathrm{KL}(\\pi \\Vert \\pi^{\\ast})$")
def objective_is_a_divergence(penalty: float = 1.0, divergence: float = 1.0) -> list[Row]:
    """J(pi) = beta log Z - beta KL(pi || pi*), for any policy."""
    best, log_z = optimal()

    def right(pi: Tensor) -> float:
        return BETA * log_z - divergence * BETA * kl(pi, best).item()

    uniform = torch.full_like(REF, 1 / Y)
    gaps = [abs(objective(pi, penalty).item() - right(pi)) for pi in others(1000)]
    named = (("$\\pi_\\text{ref}$", REF), ("all answers equally likely", uniform), ("$\\pi^{\\ast}$", best))
    rows = [Row(name, objective(pi, penalty).item(), right(pi)) for name, pi in named]
    one_sum = -BETA * (uniform * (uniform / (REF * (REWARD / BETA).exp())).log()).sum()
    rows.append(Row("the sum in between, all answers equally likely", one_sum.item(), right(uniform)))
    return [*rows, Row("1,000 drawn policies: largest difference", max(gaps), 0.0)]


@equation("3.3", "found by gradient ascent on $J$", "formula")
def optimal_policy(sign: float = 1.0) -> list[Row]:
    """pi*(y) = pi_ref(y) exp(r(y) / beta) / Z maximises J: an ascent ends there, and no other is as good."""
    found, (best, log_z) = ascended(), optimal(sign)
    rows = [Row(f"$\\pi^{{\\ast}}(y_{y + 1})$", found[y].item(), best[y].item()) for y in range(Y)]
    highest = max(objective(pi).item() for pi in others(1000))
    return [
        *rows,
        Row("$J$ there, and $\\beta \\log Z$", objective(found).item(), BETA * log_z),
        Row("the best $J$ of 1,000 drawn policies", highest, BETA * log_z, "<"),
    ]


@equation("3.4", "reward", "from the policy")
def reward(ratio: float = 1.0, partition: float = 1.0) -> list[Row]:
    """r(y) = beta log(pi*(y) / pi_ref(y)) + beta log Z."""
    told = ratio * BETA * (ascended() / REF).log() + partition * BETA * optimal()[1]
    return [Row(f"$r(y_{y + 1})$", REWARD[y].item(), told[y].item()) for y in range(Y)]


@equation("3.5", "from the rewards", "from the policy")
def preference(sign: float = 1.0) -> list[Row]:
    """p(won over lost) = sigma(beta log-ratio of w - beta log-ratio of l): Z falls out."""
    log_best, rows, gaps = ascended().log(), [], []
    for won, lost in PAIRS:
        row = Row(
            f"answer {won + 1} over {lost + 1}",
            (REWARD[won].exp() / (REWARD[won].exp() + REWARD[lost].exp())).item(),
            sigma(sign * margin(log_best, won, lost).item()),
        )
        gaps.append(abs(row.left - row.right))
        rows += [row] * ((won, lost) in ((2, 1), (1, 2), (4, 0)))
    return [*rows, Row(f"all {len(PAIRS)} ordered pairs: largest difference", max(gaps), 0.0)]


def expected_loss(log_pi: Tensor, sign: float = 1.0) -> Tensor:
    """-E log sigma(delta) when any two answers are compared equally often and people prefer as (3.1) says."""
    log_ratio = log_pi - REF.log()
    delta = BETA * (log_ratio[:, None] - log_ratio[None])
    preferred = torch.sigmoid(REWARD[:, None] - REWARD[None]) * (1 - torch.eye(Y, dtype=torch.float64))
    return -(preferred * F.logsigmoid(sign * delta)).sum() / (len(PAIRS) / 2)


@equation("3.6", "found by gradient descent on the loss", "$\\pi^{\\ast}$ of (3.3)")
def loss(sign: float = 1.0) -> list[Row]:
    """The loss's minimum over all policies is the optimal policy of the objective; no reward was given to it."""
    z = descend(lambda z: expected_loss(torch.log_softmax(z, 0), sign), REF.log().tolist(), 30.0, 300)
    found, best = torch.softmax(z, 0), optimal()[0]
    rows = [Row(f"$\\pi(y_{y + 1})$", found[y].item(), best[y].item()) for y in range(Y)]
    return [*rows, Row("loss at $\\pi_\\text{ref}$, and $\\log 2$", expected_loss(REF.log(), sign).item(), math.log(2))]


def policy(theta: Tensor) -> Tensor:
    """log pi of the five answers under the small model."""
    return torch.log_softmax(FEATURES @ theta, dim=0)


def pair_loss(theta: Tensor, won: int, lost: int) -> Tensor:
    """-log sigma(delta) of one pair under the small model."""
    return -F.logsigmoid(margin(policy(theta), won, lost))


def trained_loss(theta: Tensor, won: int, lost: int) -> Tensor:
    """The same of what `graft train --objective dpo` minimises."""
    both = torch.tensor([[won, lost]])
    sums = SequenceLogProbs(policy(theta)[both], REF.log()[both], torch.ones(1, 2))
    return DPO("sigmoid", beta=BETA).losses(sums).sum()


def gradient_of(value: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """By autograd."""
    leaf = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(value(leaf), leaf)
    return g


@equation("3.7", "autograd", "formula")
def gradient(weight: float = 1.0, winner: float = 1.0, loser: float = 1.0) -> list[Row]:
    """grad of -log sigma(delta) = sigma(-delta) (-beta grad log pi(w) + beta grad log pi(l)), and with grad pi / pi."""
    log_pi, rows, gaps, gaps_pi, gaps_ours = policy(THETA), [], [], [], []
    jacobian = torch.autograd.functional.jacobian
    of_log, of_pi = jacobian(policy, THETA), jacobian(lambda theta: policy(theta).exp(), THETA)
    for won, lost in PAIRS:
        left = gradient_of(partial(pair_loss, won=won, lost=lost), THETA)
        factor = sigma(-weight * margin(log_pi, won, lost).item())
        right = factor * (-winner * BETA * of_log[won] + loser * BETA * of_log[lost])
        by_pi = (-winner * BETA * of_pi[won] / log_pi[won].exp()) + (loser * BETA * of_pi[lost] / log_pi[lost].exp())
        gaps.append(worst(left, right))
        gaps_pi.append(worst(left, factor * by_pi))
        gaps_ours.append(worst(gradient_of(partial(trained_loss, won=won, lost=lost), THETA), right))
        if (won, lost) == (2, 1):
            rows = [Row(f"answer 3 over 2, $\\theta_{i + 1}$", left[i].item(), right[i].item()) for i in range(3)]
    return [
        *rows,
        Row(f"all {len(PAIRS)} ordered pairs: largest difference", max(gaps), 0.0),
        Row("the same with $\\nabla \\pi / \\pi$", max(gaps_pi), 0.0),
        Row("the same, `graft train --objective dpo` compared with the formula", max(gaps_ours), 0.0),
    ]


SHARED = torch.tensor([[1.0], [0.0], [3.0]], dtype=torch.float64)
"""Features of three answers with one parameter: preferred, other, and a third that no pair names, with the largest."""


def after_a_step(features: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """log pi of three answers before and after one step on a pair (first over second); features [3, parameters]."""
    ref = torch.full((3,), 1 / 3, dtype=torch.float64)

    def log_pi(theta: Tensor) -> Tensor:
        return torch.log_softmax(features @ theta, dim=0)

    start = torch.zeros(features.shape[1], dtype=torch.float64)
    step = gradient_of(lambda t: -F.logsigmoid(margin(log_pi(t), 0, 1, ref)), start)
    return log_pi(start), log_pi(start - rate * step)


@equation("3.8", "autograd; after a step", "formula; before it")
def direction(sign: float = 1.0) -> list[Row]:
    """A descent step moves log pi(w) - log pi(l) at the rate sigma(-delta) beta |grad log pi(w) - grad log pi(l)|^2."""
    rows, slopes = [], torch.autograd.functional.jacobian(policy, THETA)
    for won, lost in ((2, 1), (1, 2)):
        step, uphill = -gradient_of(partial(pair_loss, won=won, lost=lost), THETA), slopes[won] - slopes[lost]
        size = uphill.square().sum().item()
        formula = sign * sigma(-margin(policy(THETA), won, lost).item()) * BETA * size
        rows.append(Row(f"answer {won + 1} over {lost + 1}: rate of the gap", (uphill @ step).item(), formula))
    for name, features, winner in (
        ("a parameter each", torch.eye(3, dtype=torch.float64), ">"),
        ("one shared", SHARED, "<"),
    ):
        before, after = after_a_step(features, rate=0.1)
        rows += [
            Row(f"{name}: $\\log \\pi(y_w)$", after[0].item(), before[0].item(), winner),
            Row(f"{name}: $\\log \\pi(y_l)$", after[1].item(), before[1].item(), "<"),
            Row(f"{name}: the gap", (after[0] - after[1]).item(), (before[0] - before[1]).item(), ">"),
        ]
    return rows


@equation("3.9", "$\\sigma(-\\delta) \\ge 1/2$", "$\\delta \\le 0$")
def weight_of_a_half(sign: float = 1.0) -> list[Row]:
    """The weight is 1/2 or more just where the margin is 0 or less: where the policy's own rewards order it wrongly."""
    rows = []
    for delta in (-2.0, -0.5, 0.0, 0.5, 2.0):
        weight = sigma(sign * -delta)
        rows.append(Row(f"$\\delta = {delta:g}$: the weight is {sigma(-delta):.4f}", weight >= 0.5, delta <= 0))
    margins = [margin(policy(THETA), won, lost).item() for won, lost in PAIRS]
    agree = sum((sigma(sign * -d) >= 0.5) == (d <= 0) for d in margins)
    return [*rows, Row("ordered pairs of a policy on which the two agree", agree, len(PAIRS))]
