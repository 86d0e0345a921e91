"""Prefix tuning: what it does to attention, on a real prompt; what it starts as; its network; where it does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.exchange.huggingface import load_model
from graftlm.files.assets import model_folder
from graftlm.inference.generate import generate_ids
from graftlm.methods import PrefixTuning
from graftlm.methods.base import trainable
from graftlm.methods.prefix import Prefix
from graftlm.models import CausalLM
from graftlm.models.layers import AttentionInputs, attention_masks
from graftlm.text.tokenizer import Tokenizer
from inference.tiny import stopping
from tiny import model_of

REVIEW = "The film is a quiet triumph: funny, sad, and never once dishonest about the people in it."


@contextmanager
def attention_weights(model: CausalLM) -> Iterator[list[Tensor]]:
    """Collects softmax(q [P; K]^T) of every layer that is run: each [B, K, G, T, S]."""
    found: list[Tensor] = []
    hooks = [
        block.get_submodule("attn.drop").register_forward_hook(lambda module, args, out: found.append(args[0]))
        for block in model.blocks
    ]
    yield found
    for hook in hooks:
        hook.remove()


def renormalised(weights: Tensor, n: int) -> Tensor:
    """The weights of the content tokens alone, as shares of what the prefix leaves them."""
    content = weights[..., n:]
    return content / content.sum(dim=-1, keepdim=True)


def test_ratios_between_content_tokens_stay_what_they_were() -> None:
    """A~_ij / A~_ik = A_ij / A_ik for the same queries and keys: the prefix only takes a share of each row's weight.

    On the real model and a real prompt, with a prefix that matters: in the first layer as it runs, and in every layer
    with what enters it held. Deeper layers' own inputs do change, which is how a prefix has an effect at all.
    """
    folder, n = model_folder("smollm2-135m"), 6
    model = load_model(folder, torch.device("cpu"), torch.float32)
    ids = torch.tensor([Tokenizer.from_folder(folder).encode(REVIEW)])
    inputs: list[Tensor] = []
    hooks = [
        block.get_submodule("norm1").register_forward_hook(lambda module, args, out: inputs.append(out))
        for block in model.blocks
    ]
    with torch.no_grad(), attention_weights(model) as plain:
        without = model(ids)
    for hook in hooks:
        hook.remove()

    method = PrefixTuning(length=n, tokens=tuple(ids[0, :n].tolist()))
    method.install(model, torch.Generator().manual_seed(0))
    prefix = model.prefix
    assert isinstance(prefix, Prefix) and prefix.past is not None
    with torch.no_grad():
        prefix.past.add_(0.5 * torch.randn(prefix.past.shape, generator=torch.Generator().manual_seed(1)))
        with attention_weights(model) as running:
            assert (model(ids) - without).abs().max() > 0.5, "a prefix that does nothing proves nothing"
        taken = running[0][..., :n].sum(dim=-1)
        assert taken.max() > 0.1, "the prefix takes no weight"
        torch.testing.assert_close(renormalised(running[0], n), plain[0], rtol=0, atol=1e-5)
        deeper = (renormalised(running[-1], n) - plain[-1]).abs().max()
        assert deeper > 1e-3, "deeper layers' own queries and keys change"

        past, t = (prefix.segment(model.dtype),), ids.shape[1]
        context = AttentionInputs(
            past,
            rotary_cos_sin=model.rotary_cos_sin(torch.arange(n, n + t)),
            masks=attention_masks((None,), past, torch.arange(n, n + t), model.dtype),
        )
        with attention_weights(model) as held:
            for layer, block in enumerate(model.blocks):
                block.get_submodule("attn")(inputs[layer], layer, context)
        for layer, weights in enumerate(held):
            torch.testing.assert_close(renormalised(weights, n), plain[layer], rtol=0, atol=1e-5)


def test_it_starts_from_what_the_prompts_begin_with_or_from_a_text() -> None:
    prompts = [(7, 8, 9, 1, 2), (7, 8, 9, 4)]

    def encode(text: str) -> list[int]:
        return [ord(c) for c in text]

    assert PrefixTuning(length=5).resolve_init(prompts, encode).tokens == (7, 8, 9, 7, 8)
    assert PrefixTuning(length=3).resolve_init([(1, 2), (3,)], encode).tokens == (1, 2, 1)
    assert PrefixTuning(length=2, init="abc").resolve_init(prompts, encode).tokens == (97, 98)
    assert PrefixTuning(length=2, init="random").resolve_init(prompts, encode).tokens == ()


@pytest.mark.parametrize("hidden", [0, 5])
def test_without_tokens_it_starts_at_random_by_the_seed(hidden: int) -> None:
    made = []
    for seed in (1, 1, 2):
        model = model_of("llama")
        PrefixTuning(length=4, hidden=hidden, init="random").install(model, torch.Generator().manual_seed(seed))
        assert isinstance(model.prefix, Prefix)
        made.append(model.prefix.materialize().detach())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_a_network_is_multiplied_out_for_evaluation_only() -> None:
    model = model_of("llama")
    PrefixTuning(length=4, hidden=5, tokens=(1, 2, 3, 4)).install(model, torch.Generator().manual_seed(1))
    prefix = model.prefix
    assert isinstance(prefix, Prefix)
    model.eval()
    folded = prefix.materialize()
    assert not folded.requires_grad and prefix.materialize() is folded
    assert model.train() and prefix.materialize().requires_grad
    with torch.no_grad():
        prefix.b2.add_(1.0)
    assert not torch.equal(model.eval() and prefix.materialize(), folded)
    prefix.eval().train()
    assert prefix.materialize().requires_grad
    assert (
        PrefixTuning().resumable_from_adapter and not PrefixTuning(hidden=5).resumable_from_adapter
    )  # the net cannot be had back


@pytest.mark.parametrize("random", [True, False])
def test_a_network_starts_as_the_tokens_or_as_small_noise(random: bool) -> None:
    """By the equation P = start + tanh(E W1 + b1) W2 + b2, whose biases and, above tokens, W2 are zero at first."""
    model, tokens = model_of("llama"), () if random else (1, 2, 3, 4)
    PrefixTuning(length=4, hidden=64, init="random", tokens=tokens).install(model, torch.Generator().manual_seed(1))
    prefix = model.prefix
    assert isinstance(prefix, Prefix) and not prefix.b1.any() and not prefix.b2.any()
    assert prefix.w2.any() == prefix.materialize().ne(prefix.start).any() == random and prefix.start.any() != random
    assert prefix.embedding.std().item() == pytest.approx(1, abs=0.2)
    if random:
        assert prefix.w2.std().item() == pytest.approx(0.02, rel=0.1)
    with torch.no_grad():
        for p in prefix.parameters():
            p.normal_(generator=torch.Generator().manual_seed(2))
    inner = torch.tanh(prefix.embedding @ prefix.w1.T + prefix.b1)
    torch.testing.assert_close(prefix.materialize(), prefix.start + inner @ prefix.w2.T + prefix.b2)


def test_generation_continues_behind_it() -> None:
    """A prefix made of tokens generates what the tokens would, and its positions count against the context."""
    model, tokens = model_of("gpt2"), (4, 17, 30)
    prompts = [[5, 6, 7], [8, 9]]
    expected = generate_ids(model, [[*tokens, *p] for p in prompts], stopping(8, 0))
    PrefixTuning(length=3, tokens=tokens).install(model, torch.Generator())
    assert generate_ids(model, prompts, stopping(8, 0)) == expected
    assert model.max_seq_len == model.config.max_positions - 3
    longest = list(range(1, model.max_seq_len + 1))
    assert generate_ids(model, [[min(i, 60) for i in longest]], stopping(8, 0)) == [[]]
    with pytest.raises(InputError, match="reads at most 93"):
        generate_ids(model, [[1] * 94], stopping(1, 0))


def test_where_it_does_not_fit() -> None:
    with pytest.raises(InputError, match="--prefix_length 96: the model reads at most 96 tokens"):
        PrefixTuning(length=96).install(model_of("gpt2"), torch.Generator())
    with pytest.raises(InputError, match="leave out --train_layers"):
        PrefixTuning(layers=(1, 2)).install(model_of("gpt2"), torch.Generator())
    model = model_of("gpt2")
    PrefixTuning(length=2, init="random").install(model, torch.Generator())
    with pytest.raises(InputError, match="has a prefix already"):
        PrefixTuning(length=2).install(model, torch.Generator())


@pytest.mark.parametrize("mode", [True, False])
def test_reading_its_tokens_leaves_the_model_in_its_mode(mode: bool) -> None:
    model = model_of("gpt2").train(mode)
    PrefixTuning(length=2, tokens=(1, 2)).install(model, torch.Generator())
    assert model.training == mode


@pytest.mark.parametrize("length", [1, 3])
def test_a_prefix_of_one_position_is_one_too(length: int) -> None:
    model, method = model_of("gpt2"), PrefixTuning(length=length, init="random")
    method.install(model, torch.Generator())
    folder = method.to_peft(model)
    assert folder is not None and method.from_peft(model.config, folder, "x").keys() == trainable(model).keys()
    with pytest.raises(InputError, match="num_virtual_tokens = 0 must be a whole number above 0"):
        PrefixTuning.from_foreign_peft(model.config, ({**folder[0], "num_virtual_tokens": 0}, folder[1]), "x")
