"""Short convolutions: what a token sees of prompts shorter than the convolution, and the methods that refuse them."""

from dataclasses import replace

import pytest
import torch

from family_cases import VOCAB, config_of
from graftlm.errors import InputError
from graftlm.methods import BitFit, LoRA, Method, PrefixTuning
from graftlm.methods.adapter import Adapter
from graftlm.methods.base import mergeable_linears
from graftlm.methods.cost_model import total
from graftlm.models import CausalLM, KVCache, ModelConfig
from graftlm.models.config import read_model_config, with_biases
from graftlm.models.row_layout import PairedRow
from graftlm.studies.cost_report import activation_bytes

CASE = "lfm2 last attention"


@pytest.fixture
def config() -> ModelConfig:
    return read_model_config(config_of(CASE).to_dict(), CASE)


@pytest.fixture
def model(config: ModelConfig) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(config).double().eval()


def ids_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_second_answer_follows_a_prompt_shorter_than_the_convolution(model: CausalLM, shared: int) -> None:
    """The convolution reads 4 tokens; the prompts have `shared` tokens and those of each row: 0, 1 or 2."""
    ids = ids_of(3, 9 + shared)
    ids[:, :shared] = ids[:1, :shared]
    paired = PairedRow(torch.tensor([0, 1, 2]), torch.tensor([3, 5, 5]))
    _, found = model.forward_shared_prefix(ids[:1, :shared], ids[:, shared:], layout=paired)
    for row, (prompt, second) in enumerate([(0, 3), (1, 5), (2, 5)]):
        end, start = shared + prompt, shared + second
        first = model.hidden_states(ids[row : row + 1, :start])[0, shared:]
        other = model.hidden_states(torch.cat([ids[row : row + 1, :end], ids[row : row + 1, start:]], dim=1))[0, end:]
        torch.testing.assert_close(found[row], torch.cat([first, other]), rtol=0, atol=1e-12)


@torch.no_grad()
def test_rows_go_back_to_any_length_of_their_cache(model: CausalLM) -> None:
    """As scoring does with several labels: the first label's tokens lie beyond the lengths that it sets."""
    ids, shared, cache = ids_of(3, 8), KVCache(), model.empty_cache(3, 6)
    ids[:, :2] = ids[:1, :2]
    model.hidden_states(ids[:1, :2], cache=shared)
    model.hidden_states(ids[:, 2:], past=(shared,), cache=cache)
    for lengths in ((6, 5, 4), (0, 1, 2)):
        cache.lengths = torch.tensor(lengths)
        new = ids_of(3, 2)
        found = model.hidden_states(new, past=(shared, cache))
        for row, n in enumerate(lengths):
            whole = torch.cat([ids[row, : 2 + n], new[row]])[None]
            torch.testing.assert_close(found[row], model.hidden_states(whole)[0, -2:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_row_is_the_same_to_the_bit_however_many_are_computed_with_it(config: ModelConfig) -> None:
    mixer = CausalLM(config).bfloat16().blocks[0].get_submodule("attn")
    h = torch.randn(5, 7, config.hidden_size).bfloat16()
    assert mixer._convolve(h, [])[2:3].equal(mixer._convolve(h[2:3], []))


def test_lora_on_every_linear_is_counted_and_merges(config: ModelConfig, model: CausalLM) -> None:
    method = LoRA(rank=3, alpha=6.0, targets=config.roles, dropout=0.0)
    method.install(model, torch.Generator().manual_seed(0))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == total(method.param_breakdown(config))
    assert len(list(mergeable_linears(model))) == 2 * (2 + 3) + 2 * (4 + 3)
    with torch.no_grad():
        for p in trained:
            p.normal_(std=0.2)
    ids = ids_of(2, 9)
    before = model.train()(ids)
    torch.testing.assert_close(model.eval()(ids), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("targets", [("q", "v"), ("conv_in", "q", "down")])
def test_activations_are_estimated_where_only_some_layers_are_adapted(
    config: ModelConfig, targets: tuple[str, ...]
) -> None:
    conv, attention = config.layers[:2]
    deep = replace(config, num_layers=7, layers=(conv, conv, attention, conv, attention, conv, attention))
    method, sizes = LoRA(rank=2, targets=targets, dropout=0.0), ((2, 9), torch.bfloat16)
    whole = activation_bytes(deep, replace(method, layers=(0, 7)), *sizes)  # all blocks, not some of each kind
    assert activation_bytes(deep, method, *sizes) == whole


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PrefixTuning(length=3), "short convolutions have no keys and values to learn: use --method lora"),
        (BitFit(), "this lfm2 model has no biases to train: use --method lora"),
        (LoRA(rank=2, targets=("q", "down"), layers=(2, 3)), "--targets q: layers 2 to 2 have none; leave it out"),
        (BitFit(add_biases=True), "--add_biases: short convolutions take no biases: use --method lora"),
        (Adapter(rank=2), "not every layer of this lfm2 model has o, which an adapter follows: use --method lora"),
        (LoRA(targets=("q", "in")), "conv_in"),
    ],
)
def test_methods_that_need_attention_in_every_layer_say_so(model: CausalLM, method: Method, message: str) -> None:
    with pytest.raises(InputError, match=message):
        method.install(model, torch.Generator().manual_seed(0))


def test_a_head_of_its_own_is_written_under_both_names() -> None:
    first = {**config_of("lfm2").to_dict(), "tie_embedding": True}
    untied = replace(read_model_config(first, "lfm2"), tie_embeddings=False)
    assert read_model_config(with_biases(first, untied, "lfm2"), "lfm2") == untied


def test_the_first_files_of_lfm2_are_read() -> None:
    """The settings of LFM2-350M, which have other names than transformers writes today."""
    sizes = {"hidden_size": 1024, "block_ff_dim": 6656, "num_hidden_layers": 16, "num_attention_heads": 16}
    more = {"num_key_value_heads": 8, "vocab_size": 65536, "max_position_embeddings": 128000, "norm_eps": 1e-5}
    options = {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256}
    kinds = {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "conv_L_cache": 3, "conv_bias": False, "tie_embedding": True}
    rope = {"rope_theta": 1000000.0, "theta": 1000000.0, "num_heads": 16}
    config = read_model_config({"model_type": "lfm2", **sizes, **more, **options, **kinds, **rope}, "config.json")
    assert (config.intermediate_size, config.head_dim, config.tie_embeddings) == (4608, 64, True)
    assert config.layers_with("q") == [2, 5, 8, 10, 12, 14]
