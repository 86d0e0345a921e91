"""Gradients written out by hand equal autograd's of the plain formula, and so does the whole model with and without."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.models import fused_ops
from graftlm.models.fused_ops import ApplyRoPE, FusedLinearCrossEntropy, FusedLinearLogProbs, RMSNorm, SwiGLU
from graftlm.models.layers import HasFusedOps, apply_rotary_emb
from tiny import FAMILIES, model_of


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def plain_norm(x: Tensor, w: Tensor) -> Tensor:
    return w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda x, w: RMSNorm.apply(x, w, 1e-5), plain_norm, ((3, 5, 8), (8,))),
    "gated": (SwiGLU.apply, lambda g, u: F.silu(g) * u, ((7, 6), (7, 6))),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_plain_formulas(name: str) -> None:
    ours, plain, shapes = CASES[name]
    inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=0, atol=1e-12)
    weights = random(*plain(*inputs).shape, seed=9).detach()
    got = torch.autograd.grad((ours(*inputs) * weights).sum(), inputs)
    want = torch.autograd.grad((plain(*inputs) * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_rotation() -> None:
    x, angles = random(2, 5, 3, 8), random(5, 4, seed=1).detach()
    weights = random(2, 5, 3, 8, seed=2).detach()
    results = []
    for fused in (True, False):
        y = apply_rotary_emb(x, angles.cos(), angles.sin(), fused)
        results.append((y, torch.autograd.grad((y * weights).sum(), x)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert ApplyRoPE.apply(x, angles.cos()[:, None], angles.sin()[:, None]).norm().item() == pytest.approx(
        x.norm().item()
    )


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
@pytest.mark.parametrize("trained", ["h", "head", "both"])
def test_head_and_loss_in_pieces(chunk: int, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_ops, "CHUNK", chunk)
    h, head = random(7, 5), random(11, 5, seed=1)
    h.requires_grad_(trained != "head")
    head.requires_grad_(trained != "h")
    rows = torch.tensor([0, 6, 3, 3, 3, 5])  # one row predicts three tokens, some none
    targets = torch.tensor([10, 0, 4, 4, 7, 2])
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 3.0], dtype=torch.float64)
    inputs = [t for t in (h, head) if t.requires_grad]
    plain = -((h @ head.T).log_softmax(-1)[rows, targets] * weights).sum()
    ours = FusedLinearCrossEntropy.apply(h, head, rows, targets, weights)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(2 * ours, inputs), torch.autograd.grad(2 * plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [2, 128])
@pytest.mark.parametrize("trained", ["h", "head", "both"])
def test_log_probabilities_in_chunks_equal_the_plain_ones(
    chunk: int, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row may have several targets, or none; a loss of the sums of two groups asks each for another gradient."""
    monkeypatch.setattr(fused_ops, "CHUNK", chunk)
    h, head = random(5, 8), random(11, 8, seed=1)
    h.requires_grad_(trained != "head")
    head.requires_grad_(trained != "h")
    rows, targets = torch.tensor([0, 0, 3, 1, 4, 3]), torch.tensor([2, 2, 10, 0, 5, 1])
    group = torch.tensor([0, 1, 1, 0, 1, 0])

    def loss(log_p: Tensor) -> Tensor:
        first, second = torch.zeros(2, dtype=torch.float64).index_add(0, group, log_p)
        return F.softplus(second - first) + first.square()

    inputs = [t for t in (h, head) if t.requires_grad]
    plain, ours = (h @ head.T).log_softmax(-1)[rows, targets], FusedLinearLogProbs.apply(h, head, rows, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    both = (torch.autograd.grad(loss(log_p), inputs) for log_p in (ours, plain))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_the_loss_without_gradient_makes_none() -> None:
    h, head = random(3, 5).detach(), random(11, 5, seed=1).detach()
    loss = FusedLinearCrossEntropy.apply(h, head, torch.tensor([0, 2]), torch.tensor([1, 1]), torch.ones(2))
    assert not loss.requires_grad and loss > 0


def test_the_statistics_of_bfloat16_are_float32() -> None:
    x, w = random(4, 64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    exact = plain_norm(x.float(), w.float())
    assert (RMSNorm.apply(x, w, 1e-5).float() - exact).abs().max() <= 2**-7 * exact.abs().max()
    loss = FusedLinearCrossEntropy.apply(x, x.detach(), torch.arange(4), torch.arange(4), torch.ones(4))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_with_and_without_them(kind: str) -> None:
    model, ids = model_of(kind), torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    rows, targets = torch.arange(36), ids.flatten().roll(-1)
    results = []
    for fused in (True, False):
        model.use_fused_ops(fused)
        assert all(module.fused is fused for module in model.modules() if isinstance(module, HasFusedOps))
        loss = model.loss(model.hidden_states(ids).flatten(0, 1), rows, targets, torch.ones(36))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    norm = sum(g.norm().item() ** 2 for g in results[0][1:]) ** 0.5
    assert abs(results[0][0].item() - results[1][0].item()) <= 1e-9 * results[0][0].item()
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-9 * norm
