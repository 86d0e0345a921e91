"""A pass in C++ equals the plain model's, for every family, storage format and adapter, and row by row."""

import ctypes
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from family_cases import CASES, VOCAB, reference, stored_tensors
from graftlm.inference.generate import generate_ids
from graftlm.methods import BitFit, DoRA, LoRA, PrefixTuning
from graftlm.methods.adapter import Adapter
from graftlm.methods.base import MergeableLinear, trainable
from graftlm.methods.multi_lora import stack
from graftlm.models import CausalLM, KVCache
from graftlm.models import decode_kernels as module
from graftlm.models import packed as packed_module
from graftlm.models.config import read_model_config, tensor_mapping
from graftlm.models.decode_kernels import DecodeProgram, decode_program, load_decode_kernels
from graftlm.models.packed import CPP_FORMATS as FORMATS
from graftlm.models.packed import FORMATS as BLOCKS
from graftlm.models.packed import PackedWeight, Weight, matrix
from inference.tiny import stopping
from tiny import model_of

WIDTHS = (1, 31, 32, 33, 100)
"""Of unpacked matrices; packed ones have whole blocks."""


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(name: str, rows: int, columns: int) -> tuple[Weight, Tensor]:
    """A matrix in a format, of random bits; and its values."""
    if name not in BLOCKS or BLOCKS[name].dtype is not None:
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[name]
        weight = draw(rows, columns).to(dtype)
        return weight, weight.float()
    blocks, count = BLOCKS[name], columns // BLOCKS[name].block_size
    rng = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (rows * count, blocks.block_bytes), generator=rng, dtype=torch.uint8)
    scales = [208] if name == "q6_k" else [0, 2] if name in ("q4_1", "q5_1", "q4_k", "q5_k") else [0]
    for at in scales:  # any bits are weights, but not any bits are finite scales
        data[:, at : at + 2] = (draw(len(data), 1, seed=at) * 0.1).half().view(torch.uint8)
    packed = PackedWeight(data.view(rows, -1), name)
    return packed, packed.dequantize()


def product(weight: Weight, x: Tensor) -> Tensor:
    """x W^T by the kernel."""
    width = -(-x.shape[1] // module.CHUNK) * module.CHUNK
    padded = torch.zeros(len(x), width)
    padded[:, : x.shape[1]] = x
    y, threads = torch.full((len(x), weight.shape[0]), torch.nan), torch.get_num_threads()
    struct = matrix(weight)
    load_decode_kernels().decode_product(ctypes.byref(struct), padded.data_ptr(), len(x), y.data_ptr(), threads)
    return y


@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_those_of_the_dequantised_weights(name: str) -> None:
    size = BLOCKS[name].block_size if name in BLOCKS else 1
    for columns in WIDTHS if size == 1 else (size, 3 * size):
        for rows in (1, 4, 11, 70):
            weight, values = weight_of(name, rows, columns)
            ones = torch.eye(columns)[:: max(1, columns // 40)]
            assert torch.equal(product(weight, ones), (ones @ values.T)), "not the very weights"
            x = draw(13, columns, seed=2)
            whole, exact = product(weight, x), x.double() @ values.double().T
            bound = 3e-7 * columns**0.5 * (x.double().abs() @ values.double().abs().T)
            assert ((whole - exact).abs() <= bound).all()
            assert torch.equal(product(weight, x[:11]), whole[:11])  # a row's sums are the same in any company of many,
            for count in (1, 2, 3):  # and of few
                assert torch.equal(product(weight, x[:count]), product(weight, x[:4])[:count])


def steps(model: CausalLM, ids: Tensor, prefix: Sequence[KVCache] = (), program: DecodeProgram | None = None) -> Tensor:
    """The logits [B, T, V] of ids [B, T], fed token by token."""
    program = program or DecodeProgram(model)
    cache, logits = model.empty_cache(len(ids) + 1, ids.shape[1] + 2), []
    for t in range(ids.shape[1]):
        own = KVCache(cache.keys, cache.values, torch.full((len(ids),), t))
        logits.append(program.step(ids[:, t], prefix, own))
    return torch.stack(logits, dim=1)


def ids_of(rows: int = 3, tokens: int = 12, vocab: int = 61) -> Tensor:
    return torch.randint(0, vocab, (rows, tokens), generator=torch.Generator().manual_seed(1))


def close(got: Tensor, want: Tensor, share: float = 1e-5) -> None:
    assert (got - want).abs().max() <= share * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_every_family_equals_the_plain_model(case: str) -> None:
    theirs = reference(case, torch.float64)
    config = read_model_config(theirs.config.to_dict(), case)
    model = CausalLM(config).double()
    stored = stored_tensors(theirs, dict(theirs.named_parameters()))
    for name, mapping in tensor_mapping(config).items():
        model.get_parameter(name).copy_(mapping.read(stored[mapping.name]))
    ids = ids_of(vocab=VOCAB)
    want, model = model.eval()(ids), model.float()
    if any(layer.experts or layer.conv_length for layer in config.layers):
        assert decode_program(model) is None
        return
    past = KVCache()
    model.hidden_states(ids[:1, :4], cache=past)
    ids[:, :4] = ids[0, :4]
    want = model.double()(ids)[:, 4:]
    model.float()
    close(steps(model, ids[:, 4:], [past]), want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_row_has_the_same_bits_in_any_company_and_with_any_number_of_threads(kind: str) -> None:
    model, ids = model_of(kind, dtype=torch.float32), ids_of(rows=14)
    few, many = steps(model, ids[:4]), steps(model, ids)
    close(few, many[:4])
    assert torch.equal(steps(model, ids[2:3]), few[2:3])
    assert torch.equal(steps(model, ids[[3, 1]]), few[[3, 1]])
    assert torch.equal(steps(model, ids[1:13]), many[1:13])
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 3)
    assert torch.equal(steps(model, ids[:4]), few)
    assert torch.equal(steps(model, ids), many)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama-biased"])
def test_rows_of_several_tokens_equal_the_same_tokens_one_by_one(kind: str) -> None:
    """Prompts and rows that decode, in one pass."""
    model, ids, counts = model_of(kind, dtype=torch.float32), ids_of(rows=4, tokens=9), (5, 1, 8, 3)
    program, cache, before = DecodeProgram(model), model.empty_cache(5, 20), (3, 8, 0, 2)
    for t in range(max(before)):
        program.step(ids[:, t], [], KVCache(cache.keys, cache.values, torch.full((4,), t)))
    fed = torch.cat([row[start : start + count] for row, start, count in zip(ids, before, counts, strict=True)])
    got = program.step(fed, [], KVCache(cache.keys, cache.values, torch.tensor(before)), counts)
    want, ends = model(ids), torch.tensor(before) + torch.tensor(counts) - 1
    close(got, want[range(4), ends])
    after = program.step(ids[:, 8], [], KVCache(cache.keys, cache.values, ends + 1))  # what was written is read
    for row, end in enumerate(ends.tolist()):
        close(after[row], model(torch.cat([ids[row, : end + 1], ids[row, 8:9]])[None])[0, -1])


@torch.no_grad()
def test_bfloat16_is_closer_to_float32_than_the_plain_model() -> None:
    model, ids = model_of("llama", dtype=torch.bfloat16), ids_of(rows=16)
    plain, got, want = model(ids).float(), steps(model, ids), model.float()(ids)
    assert (got - want).square().mean() < (plain - want).square().mean()


@torch.no_grad()
@pytest.mark.parametrize("name", ["q4_1", "bf16"])
def test_packed_weights(name: str) -> None:
    model, ids = model_of("llama-biased", dtype=torch.float32, layers=1), ids_of()
    for linear in (model.embed, model.head, *(getattr(model.blocks[0].attn, role) for role in "qkvo")):
        linear.set_weight(PackedWeight.pack(linear.weight, name))
    close(steps(model, ids), model(ids))


def adapted(method: LoRA, seed: int) -> dict[str, Tensor]:
    """Random trained tensors of a method."""
    model, rng = model_of("llama", dtype=torch.float32), torch.Generator().manual_seed(seed)
    method.install(model, rng)
    return {name: torch.randn(p.shape, generator=rng) * 0.2 for name, p in trainable(model).items()}


@torch.no_grad()
def test_several_adapters_in_a_batch() -> None:
    methods = {
        "one": LoRA(rank=2, alpha=3.0, targets=("q", "v", "down")),
        "two": LoRA(rank=5, alpha=9.0, targets=("k", "o", "gate", "up")),
    }
    adapters = {name: (method, adapted(method, n)) for n, (name, method) in enumerate(methods.items())}
    stacked, ids = stack(model_of("llama", dtype=torch.float32), adapters), ids_of(rows=4)
    program = DecodeProgram(stacked.model)
    for rows in (["two", None, "one", "two"], ["one"] * 4, [None] * 4):
        with stacked.adapters_for(rows):
            close(steps(stacked.model, ids, program=program), stacked.model(ids))
    with stacked.adapters_for("two"):
        close(steps(stacked.model, ids, program=program), stacked.model(ids))
    cache, counts = stacked.model.empty_cache(4, 12), (12, 1, 7, 12)
    fed = torch.cat([row[:count] for row, count in zip(ids, counts, strict=True)])
    with stacked.adapters_for(["two", None, "one", "two"]):
        want = stacked.model(ids)[range(4), torch.tensor(counts) - 1]
        close(program.step(fed, [], cache, counts), want)


@torch.no_grad()
def test_methods() -> None:
    """Merged, not merged, and those that are left to the plain model because they cannot be merged."""
    ids = ids_of()
    for method, covered in (
        (LoRA(rank=3, alpha=6.0, targets=("q", "o", "up", "down")), {True: True, False: True}),
        (DoRA(rank=3, alpha=6.0), {True: True, False: False}),
        (BitFit(), {True: True, False: True}),
        (PrefixTuning(length=3, tokens=(5, 40, 2)), {True: True, False: True}),
        (Adapter(rank=3), {True: False, False: False}),
    ):
        for merge in (True, False):
            model, rng = model_of("llama-biased", dtype=torch.float32), torch.Generator().manual_seed(2)
            method.install(model, rng)
            for p in trainable(model).values():
                p.add_(torch.randn(p.shape, generator=rng) * 0.1)
            for linear in model.modules():
                if isinstance(linear, MergeableLinear):
                    linear.merge_on_eval = merge
            model.train().eval()
            program = decode_program(model)
            assert (program is not None) == covered[merge], (method, merge)
            if program is not None:
                close(steps(model, ids, program=program), model(ids))


def test_what_is_left_to_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", dtype=torch.float32)
    assert decode_program(model) is not None
    assert decode_program(model_of("llama", dtype=torch.float64)) is None
    assert decode_program(model_of("llama", dtype=torch.float16)) is None
    assert decode_program(model.train()) is None
    model.eval().use_fused_ops(False)
    assert decode_program(model) is None
    model.use_fused_ops(True)
    with monkeypatch.context() as patch:
        patch.setattr(packed_module, "CPP_FORMATS", tuple(name for name in FORMATS if name != "q4_1"))
        other = model_of("llama", dtype=torch.float32)
        other.embed.set_weight(PackedWeight.pack(other.embed.weight.detach(), "q4_1"))
        assert decode_program(other) is None  # a storage format without a kernel
    load_decode_kernels.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        assert decode_program(model) is None
    assert decode_program(model) is not None


@torch.no_grad()
def test_a_model_with_fewer_blocks_than_its_config_names() -> None:
    """As an estimate measures one; the layers that are not there were read all the same."""
    model, ids = model_of("llama", dtype=torch.float32).eval(), ids_of()
    assert model.config.num_layers > 1
    model.blocks = torch.nn.ModuleList([model.blocks[0]])
    close(steps(model, ids, []), model(ids))


def test_greedy_texts_equal_full_forward_passes() -> None:
    model, prompts = model_of("llama", dtype=torch.float32), [[5, 6, 7, 8, 9], [5, 6, 7, 8, 1, 2, 3], [5, 6, 7, 8]]

    def naive(prompt: list[int]) -> list[int]:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(20):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]

    assert generate_ids(model, prompts, stopping(20, -1)) == [naive(prompt) for prompt in prompts]


def test_numbers_that_are_not_finite_stay_visible() -> None:
    model = model_of("llama", dtype=torch.float32)
    torch.nn.init.constant_(model.blocks[0].attn.k.weight, float("nan"))
    assert steps(model, ids_of(tokens=2)).isnan().any()
