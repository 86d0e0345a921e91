"""Three training steps of each method against a plain reference: the paper's equation in a hook, autograd's gradients.

The reference is the base model with nothing installed and no shortcut (`use_fused_ops(False)`, whole rows, the head at
every position), whose linears' outputs a hook changes as the equation says; its tensors are leaves of its own.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.methods import Adapter, BitFit, DoRA, LoRA, Method
from graftlm.methods.base import trainable
from graftlm.methods.ia3 import IA3
from graftlm.models import CausalLM, Linear
from graftlm.text.collate import Example
from graftlm.training.batches import CollateOptions
from graftlm.training.objectives.sft import SFT
from tiny import FAMILIES, model_of

Leaves = dict[str, Tensor]
Equation = Callable[[nn.Module, Tensor, Tensor, Leaves, str], Tensor]
"""(module, its input, its output, the leaves by our names, the module's name) -> what the output becomes."""


def houlsby(module: nn.Module, x: Tensor, a: Tensor, leaf: Leaves, name: str) -> Tensor:
    """a + V_up gelu(V_down a + v_down) + v_up."""
    down, v_down, up, v_up = (leaf[f"{name}.adapter_{part}"] for part in ("down", "down_bias", "up", "up_bias"))
    u = a @ down.T + v_down
    return a + (u * 0.5 * (1 + torch.erf(u / 2**0.5))) @ up.T + v_up


def bitfit(module: nn.Module, x: Tensor, h: Tensor, leaf: Leaves, name: str) -> Tensor:
    """h = W0 x + b: the base's own b is taken out, the trained one put in."""
    own = getattr(module, "bias", None)
    return h - (0 if own is None else own) + leaf[f"{name}.bias"]


def lora(module: nn.Module, x: Tensor, h: Tensor, leaf: Leaves, name: str) -> Tensor:
    """h = W0 x + (alpha / r) B A x."""
    return h + 6.0 / 3 * x @ leaf[f"{name}.lora_A"].T @ leaf[f"{name}.lora_B"].T


def rslora(module: nn.Module, x: Tensor, h: Tensor, leaf: Leaves, name: str) -> Tensor:
    """h = W0 x + (alpha / sqrt(r)) B A x."""
    return h + 6.0 / 3**0.5 * x @ leaf[f"{name}.lora_A"].T @ leaf[f"{name}.lora_B"].T


def dora(module: nn.Module, x: Tensor, h: Tensor, leaf: Leaves, name: str) -> Tensor:
    """h = m (W0 + s B A) / |W0 + s B A| x + b, lengths by row and constant in the gradient."""
    assert isinstance(module, Linear)
    v = module.weight + 6.0 / 3 * leaf[f"{name}.lora_B"] @ leaf[f"{name}.lora_A"]
    w = leaf[f"{name}.magnitude"][:, None] * v / v.norm(dim=1, keepdim=True).detach()
    return x @ w.T + (0 if module.bias is None else module.bias)


def ia3(module: nn.Module, x: Tensor, h: Tensor, leaf: Leaves, name: str) -> Tensor:
    """h = l o (W0 x + b); of down W0 (l o x) + b."""
    assert isinstance(module, Linear)
    by = leaf[f"{name}.stretch"]
    return F.linear(x * by, module.weight, module.bias) if name.endswith("down") else h * by


METHODS: dict[str, tuple[Callable[[], Method], Equation]] = {
    "adapter": (lambda: Adapter(rank=3), houlsby),
    "pfeiffer": (lambda: Adapter(rank=3, placement="pfeiffer"), houlsby),
    "bitfit": (lambda: BitFit(add_biases=True), bitfit),
    "lora": (lambda: LoRA(rank=3, alpha=6.0, dropout=0.0), lora),
    "lora+": (lambda: LoRA(rank=3, alpha=6.0, dropout=0.0, plus_ratio=5.0), lora),
    "rslora": (lambda: LoRA(rank=3, alpha=6.0, dropout=0.0, rslora=True), rslora),
    "dora": (lambda: DoRA(rank=3, alpha=6.0, dropout=0.0), dora),
    "ia3": (lambda: IA3(), ia3),
    "ia3 everywhere": (lambda: IA3(targets=("q", "k", "v", "o", "up", "down")), ia3),
}


def examples() -> list[Example]:
    rng = torch.Generator().manual_seed(11)
    head = [3, 9, 4, 9, 2]
    return [
        Example((*head, *torch.randint(1, 61, (n,), generator=rng).tolist()), (n + 1, 0), None, "", "", "")
        for n in (5, 2, 8)
    ]


def reference_loss(model: CausalLM) -> Tensor:
    """The mean of -log p over the completions' tokens, one row after the other."""
    losses = []
    for e in examples():
        ids = torch.tensor([[*e.prompt_ids, *e.completion_ids]])
        start = len(e.prompt_ids) - 1
        losses.append(F.cross_entropy(model(ids)[0, start:-1], ids[0, start + 1 :], reduction="none"))
    return torch.cat(losses).mean()


def attach(model: CausalLM, leaves: Leaves, equation: Equation) -> None:
    """Let every module of which a leaf is named compute as the equation says."""
    for name, module in model.named_modules():
        if any(leaf.rpartition(".")[0] == name for leaf in leaves):
            module.register_forward_hook(
                lambda module, args, out, name=name: equation(module, args[0], out, leaves, name)
            )


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_training_steps_equal_the_papers_equation(name: str, kind: str) -> None:
    make, equation = METHODS[name]
    method = make()
    ours = model_of(kind).train()
    method.install(ours, torch.Generator().manual_seed(3))
    ours.set_dropout(0.0)

    plain = model_of(kind).train()
    plain.use_fused_ops(False)
    plain.set_dropout(0.0)
    for p in plain.parameters():
        p.requires_grad_(False)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in trainable(ours).items()}
    attach(plain, leaves, equation)

    def adam(params: Leaves) -> torch.optim.AdamW:
        groups = [{"params": [p], "lr": 1e-2 * method.lr_multiplier(n)} for n, p in params.items()]
        # An epsilon that no rounding reaches: where the true gradient is zero, Adam would take the sign of the noise.
        return torch.optim.AdamW(groups, weight_decay=0.0, eps=1e-6)

    mine, theirs = adam(dict(trainable(ours))), adam(leaves)
    for _ in range(3):
        batch = SFT().collate(examples(), CollateOptions())
        loss = SFT().loss(ours, batch)[0] / batch.weight
        expected = reference_loss(plain)
        assert abs(loss.item() - expected.item()) < 1e-9
        loss.backward()
        expected.backward()
        norm = sum(p.grad.norm().item() ** 2 for p in leaves.values() if p.grad is not None) ** 0.5
        for n, p in trainable(ours).items():
            assert p.grad is not None
            grad = leaves[n].grad
            assert grad is not None and (p.grad - grad).norm() < 1e-9 * norm, n
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for n, p in trainable(ours).items():
        torch.testing.assert_close(p, leaves[n], rtol=0, atol=1e-8)
