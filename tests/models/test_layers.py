"""The layers with a gradient of their own, against autograd's and against the definition."""

import pytest
import torch

from graftlm.models.fused_ops import DropoutMask
from graftlm.models.layers import Dropout, RMSNorm, apply_rotary_emb, dropout
from graftlm.models.rope import RopeConfig, rope_cos_sin


def test_rms_norm_and_its_gradient() -> None:
    norm = RMSNorm(6, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(norm, (x,))
    g = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    want = torch.autograd.grad((expected * g).sum(), [x, norm.weight])
    got = torch.autograd.grad((norm(x) * g).sum(), [x, norm.weight])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_rotation_and_its_gradient() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cos, sin = rope_cos_sin(torch.arange(5), 8, RopeConfig(theta=50.0), torch.float64)
    y = apply_rotary_emb(x, cos, sin)
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(y, torch.cat([as_complex.real, as_complex.imag], dim=-1), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda t: apply_rotary_emb(t, cos, sin), (x,))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_has_its_rate_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 301)
    y = dropout(x, p)
    zero = (y == 0).double().mean().item()
    assert abs(zero - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
    kept = y[y != 0]
    assert torch.all(kept == kept[0]) and abs(kept[0].item() * (1 - p) - 1) < 2**-12
    # Neighbours are independent: four of them come from one draw.
    both = ((y[:, :-1] == 0) & (y[:, 1:] == 0)).double().mean().item()
    assert abs(both - p * p) < 0.005


def test_masks_are_made_of_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # its first three for 1234567
    draws = [(z >> 16 * lane) % 65536 for z in published for lane in range(4)]
    signed = [d - 65536 if d >= 32768 else d for d in draws]
    for below in (1000, 20000, 50000):
        kept = DropoutMask(1234567, below).keep_mask(torch.zeros(11))
        assert kept.tolist() == [d >= below - 32768 for d in signed[:11]]


def test_dropout_is_a_function_of_the_seed_and_off_in_evaluation() -> None:
    x = torch.ones(7, 9)
    layer = Dropout(0.5)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(layer(x))
    assert torch.equal(*draws) and not torch.equal(draws[0], layer(x))
    assert layer.eval()(x) is x and Dropout(0.0)(x) is x
    x = x.double().requires_grad_()
    torch.manual_seed(3)
    layer.train()(x).sum().backward()
    assert torch.equal(x.grad != 0, draws[0] != 0)
