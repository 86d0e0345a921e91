"""Generation: the cache, ragged batches and the shared prefix change nothing; sampling is what it says it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.config import GenerateConfig, PromptConfig
from graftlm.errors import GraftError, InputError
from graftlm.inference import decoder, sampling
from graftlm.inference import generate as module
from graftlm.inference.decoder import compact, prefill_shared_prefix
from graftlm.inference.generate import Batching, eval_mode, generate, generate_ids
from graftlm.inference.sampling import SamplingParams, candidates, counter_based_uniform, sample_tokens
from graftlm.models import CausalLM
from graftlm.models.decode_kernels import decode_program
from graftlm.serving.schemas import CompletionBody
from graftlm.text.stream import TextStream
from inference.tiny import CONTEXT, VOCAB, full_logits, ragged, stopping, tiny, words

FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])


def naive(model: CausalLM, prompt: Sequence[int], new: int, eot: int) -> list[int]:
    """Greedy, by a full forward pass for every token."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + new, model.config.max_positions):
        token = int(full_logits(model, ids)[-1].argmax())
        if token == eot:
            break
        ids.append(token)
    return ids[len(prompt) :]


def an_ending(model: CausalLM, prompts: Sequence[Sequence[int]], new: int) -> int:
    """A token that ends rows at several different steps, and not all of them."""
    runs = [naive(model, prompt, new, eot=-1) for prompt in prompts]
    ends = {token: {run.index(token) if token in run else new for run in runs} for run in runs for token in run}
    token = max(ends, key=lambda token: len(ends[token]))
    assert len(ends[token]) >= 3
    return token


@FAMILIES
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("shared", [0, 5])
def test_greedy_equals_full_forwards(family: str, batch_size: int, shared: int) -> None:
    model = tiny(family)
    prompts = ragged([9, 6, 17, 7, 6, 12, 28], shared)
    eot = an_ending(model, prompts, 12)
    expected = [naive(model, prompt, 12, eot) for prompt in prompts]
    assert (
        generate_ids(
            model,
            prompts,
            stopping(12, eot),
            batching=Batching(batch_size),
        )
        == expected
    )


@pytest.mark.parametrize("most", [1, 5, 1024])
@pytest.mark.parametrize("shared", [0, 5])
def test_prompts_read_by_the_program_in_any_parts(shared: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "MAX_PROGRAM_TOKENS", most)
    model, prompts = tiny("llama").float(), ragged([9, 6, 17, 7, 6, 12, 28], shared)
    assert decode_program(model) is not None
    expected = [naive(model, prompt, 12, -1) for prompt in prompts]
    assert generate_ids(model, prompts, stopping(12, -1), batching=Batching(3)) == expected


def test_the_prefix_is_run_once_and_shared() -> None:
    model = tiny("llama")
    seen: list[tuple[int, int]] = []
    with eval_mode(model):
        past, length = prefill_shared_prefix(model, ragged([8, 11, 9], shared=7))
        assert (length, past[0].size, past[0].keys[0].shape[0]) == (7, 7, 1)
        assert prefill_shared_prefix(model, ragged([8, 11, 9], shared=3)) == ((), 0)  # too short to pay
        assert prefill_shared_prefix(model, ragged([8])) == ((), 0)  # nobody to share with
        past, length = prefill_shared_prefix(model, [[1, 2, 3, 4, 5, 6]] * 4)
        assert length == 5  # each row keeps its last token
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    generate_ids(
        model,
        ragged([8, 11, 9, 30], shared=7),
        stopping(1, -1),
        batching=Batching(2),
    )
    assert seen == [(1, 7), (2, 2), (2, 23)]  # the prefix, and the rest of the prompts, sorted by length


def test_ended_rows_leave_the_batch() -> None:
    model = tiny("gpt2")
    prompts = ragged([9, 6, 17, 7, 6, 12])
    eot = an_ending(model, prompts, 12)
    rows: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    new = generate_ids(model, prompts, stopping(12, eot))
    # A row takes part in the step behind each of its tokens, but not in one behind its last.
    alive = [sum(len(tokens) > step for tokens in new) for step in range(12)]
    full = sum(len(tokens) == 12 for tokens in new)
    assert rows == [6, *[n for n in alive[:11] if n]]
    assert 0 < full < 6


def test_generation_stops_when_all_have_ended() -> None:
    model = tiny("llama")
    [[first]] = generate_ids(model, [[3, 1, 4]], stopping(1, -1))
    calls: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: calls.append(1))
    assert generate_ids(model, [[3, 1, 4]] * 2, stopping(30, first)) == [[], []]
    assert len(calls) == 1


def test_any_of_several_tokens_ends_a_row() -> None:
    model, prompts = tiny("llama"), ragged([3, 9, 5])
    whole = generate_ids(model, prompts, stopping(12, -1))
    ends = {whole[0][4], whole[1][7]}
    expected = [row[: min((n for n, token in enumerate(row) if token in ends), default=12)] for row in whole]
    assert generate_ids(model, prompts, stopping(12, ends)) == expected


def test_batches_are_continued_together_while_their_prompts_are_few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [1, 1, 2, 2, 3, 3, 9, 9, 9]
    assert list(module.decode_groups(lengths, 2)) == [[0, 1, 2, 3, 4, 5, 6, 7], [8]]  # MAX_BATCHES = 4
    monkeypatch.setattr(module, "MAX_CACHED_TOKENS", 18)
    assert list(module.decode_groups(lengths, 2)) == [[0, 1, 2, 3, 4, 5], [6, 7], [8]]
    assert list(module.decode_groups(lengths, 9)) == [[0, 1, 2, 3, 4, 5], [6, 7], [8]]  # a large batch is split
    monkeypatch.setattr(module, "MAX_CACHED_TOKENS", 8)
    assert list(module.decode_groups(lengths, 2)) == [[0, 1, 2, 3], [4, 5], [6], [7], [8]]  # a row never


def test_a_small_cache_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    prompts = ragged([4, 9, 6])
    expected = generate_ids(model, prompts, stopping(25, -1))
    monkeypatch.setattr(module, "FIRST_CAPACITY", 1)
    assert generate_ids(model, prompts, stopping(25, -1)) == expected
    assert expected[0] == naive(model, prompts[0], 25, eot=-1)


def test_compact_moves_the_last_rows_into_the_holes() -> None:
    cache = tiny("llama").empty_cache(rows=5, capacity=3)
    for row in range(5):
        cache.keys[1][row], cache.values[0][row] = row, 10 + row
    cache.lengths = torch.tensor([0, 1, 2, 3, 4])
    order = compact(cache, [False, True, False, True, True])
    assert sorted(order) == [1, 3, 4]
    assert order[1] == 1  # a row that can stay where it is does
    assert cache.lengths.tolist() == order
    assert cache.keys[1][:, 0, 0, 0].tolist() == order
    assert cache.values[0][:, 1, 2, 3].tolist() == [10 + row for row in order]
    assert compact(cache, [True, True, True]) == [0, 1, 2]


@FAMILIES
def test_the_context_ends_a_continuation(family: str) -> None:
    model = tiny(family)
    prompts = ragged([CONTEXT - 2, CONTEXT, 5, CONTEXT - 1])
    new = generate_ids(model, prompts, stopping(9, -1))
    assert [len(tokens) for tokens in new] == [2, 0, 9, 1]
    assert new == [naive(model, prompt, 9, eot=-1) for prompt in prompts]


def test_prompts_that_cannot_be_read() -> None:
    model = tiny("gpt2")
    with pytest.raises(InputError, match=r"^the prompt has 41 tokens, the model reads at most 40: shorten it$"):
        generate_ids(model, ragged([41]), stopping(1, 0))
    with pytest.raises(InputError, match=r"^prompt 2 of 3 is empty: give at least one token to continue$"):
        generate_ids(model, [[1], [], [2]], stopping(1, 0))


def test_no_prompts() -> None:
    assert generate_ids(tiny("gpt2"), [], stopping(3, 0)) == []


def test_nan_is_an_error_not_a_token() -> None:
    model = tiny("gpt2")
    nn.init.constant_(next(model.norm.parameters()), float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(GraftError, match="logits are NaN"):
            generate_ids(
                model,
                [[1, 2]],
                stopping(1, 0, temperature=temperature),
            )


def test_strings() -> None:
    model, tokenizer = tiny("gpt2"), words(*[f"w{n}" for n in range(1, 48)])
    prompts = ["w3 w1 w4", "w1 w5 w9 w2"]
    expected = [naive(model, ids, 6, eot=0) for ids in ([3, 1, 4], [1, 5, 9, 2])]
    texts = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)
    assert texts == ["".join(f" w{n}" for n in ids) for ids in expected]
    assert generate(model, tokenizer, prompts, SamplingParams(max_new_tokens=6)) == texts
    done: list[int] = []
    generate_ids(model, [[3, 1, 4], [1, 5, 9, 2]], stopping(6, 0), batching=Batching(1, progress=done.append))
    assert done == [2]  # read one at a time, continued together


def test_a_stop_text_ends_a_text_and_is_not_part_of_it() -> None:
    model, tokenizer = tiny("llama"), words(*[f"w{n}" for n in range(1, 48)])
    prompts = ["w3 w1 w4", "w1 w5 w9 w2"]
    texts = generate(model, tokenizer, prompts, max_new_tokens=9)
    stop = " ".join(texts[0].split()[3:5])  # two tokens
    expected = [text[: text.find(stop)] if stop in text else text for text in texts]
    assert generate(model, tokenizer, prompts, max_new_tokens=9, stop=("never", stop)) == expected != texts
    with pytest.raises(InputError, match=r"^--stop \('',\): must be texts that are not empty$"):
        generate(model, tokenizer, prompts, stop=("",))


def test_a_row_ends_at_a_stop_text_of_any_length() -> None:
    model, tokenizer = tiny("llama"), words(*[f"w{n}" for n in range(1, 48)])
    ids = tokenizer.encode("w3 w1 w4")
    (whole,) = generate_ids(model, [ids], stopping(30, -1))
    stop = tokenizer.decode(whole[3:15])
    streams = [TextStream(tokenizer, ids, (stop,))]
    (row,) = generate_ids(model, [ids], stopping(30, -1, stop=(stop,)), streams=streams)
    assert row == whole[: len(row)] and len(row) <= 15


# Sampling -------------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_row_and_step_alone() -> None:
    model = tiny("llama")
    prompts = ragged([9, 6, 17, 7, 6, 12], shared=4)

    def run(prompts: Sequence[Sequence[int]], seed: int = 7, batch_size: int = 32) -> list[list[int]]:
        return generate_ids(
            model,
            prompts,
            stopping(10, 5, temperature=1.5, top_k=20, seed=seed),
            batching=Batching(batch_size),
        )

    expected = run(prompts)
    assert run(prompts) == expected
    assert run(prompts, batch_size=1) == expected
    assert run(prompts, batch_size=4) == expected
    assert run(prompts[:3]) == expected[:3]  # the other rows have no say
    assert run(prompts, seed=8) != expected
    same = run([prompts[0]] * 5)
    assert len({tuple(tokens) for tokens in same}) == 5  # rows with the same prompt draw apart


def test_uniform_is_uniform() -> None:
    draws = [counter_based_uniform(seed, row, step) for seed in range(10) for row in range(20) for step in range(50)]
    assert len(set(draws)) == len(draws)
    assert 0 <= min(draws) < max(draws) < 1
    buckets = torch.histc(torch.tensor(draws), bins=10, min=0, max=1)
    assert (buckets - 1000).abs().max() < 4 * 1000**0.5
    assert counter_based_uniform(0, 1, 2) == 0.9302973074308816  # the same on every machine and in every release


def frequencies(logits: Sequence[float], **settings: Any) -> list[float]:
    """How often each token comes when u walks evenly through [0, 1)."""
    n = 20_000
    rows = torch.tensor([list(logits)]).expand(n, -1)
    tokens = sample_tokens(rows, [(i + 0.5) / n for i in range(n)], SamplingParams(**settings))
    return [tokens.count(token) / n for token in range(len(logits))]


P = [0.05, 0.4, 0.1, 0.25, 0.2]
LOG_P = torch.tensor(P).log().tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, P),
        ({"temperature": 0.5}, [p * p / 0.275 for p in P]),  # 0.0025 + 0.16 + 0.01 + 0.0625 + 0.04
        ({"temperature": 1e-9}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"temperature": 1.0, "top_k": 99}, P),
        ({"temperature": 1.0, "top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # the one that reaches 0.6 stays
        ({"temperature": 1.0, "top_p": 0.7}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        # Of the three kept by top_k, two reach 0.7 when renormalised: 0.65 / 0.85 = 0.76.
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        # The temperature comes first: squared and renormalised, 0.58 and 0.23 reach 0.8.
        ({"temperature": 0.5, "top_p": 0.8}, [0, 0.16 / 0.2225, 0, 0.0625 / 0.2225, 0]),
        ({"temperature": 1.0, "min_p": 0.3}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),  # 0.12 or more
        ({"temperature": 1.0, "min_p": 1.0}, [0, 1, 0, 0, 0]),
        # The temperature comes before it: 0.25 squared is 0.39 of 0.4 squared, 0.2 squared only 0.25.
        ({"temperature": 0.5, "min_p": 0.3}, [0, 0.16 / 0.2225, 0, 0.0625 / 0.2225, 0]),
        ({"temperature": 1.0, "top_p": 0.7, "min_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    ],
)
def test_sampling_distributions(settings: dict[str, Any], expected: list[float]) -> None:
    assert frequencies(LOG_P, **settings) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("top_k", [0, 30])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_the_filters_are_those_of_transformers_in_its_order(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    logits = torch.randn(40, 800, generator=torch.Generator().manual_seed(0)) * 3
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    reference = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=4))
    processors = reference._get_logits_processor(GenerationConfig(do_sample=True, **settings))
    expected = processors(torch.zeros(40, 1, dtype=torch.long), logits).softmax(dim=-1)
    weights, ids = candidates(logits, SamplingParams(**settings))
    found = torch.zeros(40, 800, dtype=torch.float64)
    found.scatter_(1, torch.arange(800).expand(40, -1) if ids is None else ids, weights / weights.sum(1, keepdim=True))
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-9)


ADJUSTED: list[dict[str, Any]] = [
    {},
    {"logit_bias": {3: 4.5, 1: -100}},
    {"repetition_penalty": 1.7},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -1.5},
    {"repetition_penalty": 0.5, "frequency_penalty": -0.3, "presence_penalty": 2.0, "logit_bias": {2: 2.0}},
]


def adjusted(logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Token by token, as vLLM documents it: bias, then the penalties of repetition, frequency and presence."""
    found = []
    for token, value in enumerate(logits.tolist()):
        value += params.biases.get(token, 0.0)
        if token in prompt or token in answer:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * answer.count(token) + params.presence_penalty * (token in answer)
        found.append(value)
    return found


def test_bias_and_penalties_are_those_of_vllm_and_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(len(ADJUSTED), VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = [SamplingParams(**settings) for settings in ADJUSTED]
    texts = [([1, 2, 2, 9], [3, 4, 3, 1][:n]) for n in range(len(ADJUSTED))]
    before = logits.clone()
    found = sampling.adjust_logits(logits, params, texts)
    assert torch.equal(logits, before) and torch.equal(found[0], logits[0])
    for row, own, text, new in zip(logits, params, texts, found, strict=True):
        assert new.tolist() == pytest.approx(adjusted(row, own, *text), rel=1e-14)
    penalised = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 2, 9, 3, 4]]), logits[2:3].clone())
    torch.testing.assert_close(found[2:3], penalised)
    assert sampling.adjust_logits(logits, params[:1] * len(texts), texts) is logits


@pytest.mark.parametrize("settings", ADJUSTED)
def test_greedy_text_with_bias_and_penalties(settings: dict[str, Any]) -> None:
    """The shared prefix of the prompts counts as their text."""
    model, prompts = tiny("llama"), ragged([9, 6, 17], shared=4)
    params = stopping(9, -1, **settings)
    expected = []
    for prompt in prompts:
        answer: list[int] = []
        for _ in range(9):
            logits = adjusted(full_logits(model, [*prompt, *answer])[-1], params, prompt, answer)
            answer.append(logits.index(max(logits)))
        expected.append(answer)
    assert generate_ids(model, prompts, params) == expected
    assert (expected != generate_ids(model, prompts, stopping(9, -1))) == bool(settings)


def test_a_biased_token_must_be_the_models() -> None:
    with pytest.raises(InputError, match=r"^--logit_bias has a token 48: the model's are 0 to 47$"):
        generate_ids(tiny("gpt2"), [[1]], stopping(1, 0, logit_bias={48: 1.0}))


@pytest.mark.parametrize("name", ["min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_a_sampling_setting_is_in_two_files_and_reaches_flags_and_api(name: str) -> None:
    source = Path(sampling.__file__).parents[1]
    files = {str(path.relative_to(source)) for path in source.rglob("*.py") if name in path.read_text("utf-8")}
    assert files == {"config/inference.py", "inference/sampling.py"}
    for config in (GenerateConfig, PromptConfig):
        assert getattr(SamplingParams.from_flags(config(**{name: 0.1})), name) == 0.1
    assert SamplingParams.from_flags(GenerateConfig(stop=("x",), max_new_tokens=3)) == SamplingParams(
        stop=("x",), max_new_tokens=3
    )
    assert name in CompletionBody.model_fields


def test_min_p_changes_samples_and_rows_with_other_settings_are_sampled_apart() -> None:
    logits = torch.tensor([LOG_P] * 3)
    params = [SamplingParams(temperature=1.0, min_p=min_p, seed=3) for min_p in (0.0, 0.45, 0.0)]
    alone = [sampling.next_tokens(logits[:1], [own], [(0, step)]) for own in params for step in range(50)]
    together = [sampling.next_tokens(logits, params, [(0, step)] * 3) for step in range(50)]
    assert [[row[n] for row in together] for n in range(3)] == [
        [token for [token] in alone[50 * n : 50 * n + 50]] for n in range(3)
    ]
    assert {row[1] for row in together} == {1, 3, 4} and {row[0] for row in together} > {1, 3, 4}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"temperature": -1.0}, "--temperature -1.0: must be 0 or more"),
        ({"temperature": float("nan")}, "--temperature nan: must be 0 or more"),
        ({"temperature": float("inf")}, "--temperature inf: must be 0 or more"),
        ({"top_k": -1}, "--top_k -1: must be 0 or more"),
        ({"top_p": 0.0}, "--top_p 0.0: must be above 0 and at most 1"),
        ({"min_p": 1.5}, "--min_p 1.5: must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty 0.0: must be greater than 0"),
        ({"presence_penalty": 2.5}, "--presence_penalty 2.5: must be from -2 to 2"),
        *(
            (
                {"logit_bias": text},
                f"--logit_bias {text}: must be ID=BIAS,…, each token id once and biases from -100 to "
                "100, as in 198=-100,50=2.5",
            )
            for text in ("5", "5=x", "-5=1", "5=101", "5=nan", "5=1,5=2", "a=1")
        ),
        ({"max_new_tokens": 0}, "--max_new_tokens 0: must be 1 or more"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        SamplingParams(**settings)
    assert str(error.value) == line


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-300])
def test_no_temperature_is_too_small(temperature: float) -> None:
    assert sample_tokens(torch.tensor([[100.0, 3e10, 2e10]]), [0.999], SamplingParams(temperature=temperature)) == [1]


def test_a_token_without_probability_never_comes() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]] * 2)
    assert sample_tokens(logits, [0.0, 1 - 2**-53], SamplingParams(temperature=1.0)) == [1, 2]


# Evaluation mode ------------------------------------------------------------------------------------------------------


def test_every_modules_mode_comes_back() -> None:
    frozen = nn.Dropout()
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(frozen, nn.Linear(2, 2)))
    model.train()
    frozen.eval()
    flags = [m.training for m in model.modules()]
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == flags
    assert torch.is_grad_enabled()


def test_generation_switches_dropout_off_and_back_on() -> None:
    model = tiny("gpt2")
    expected = generate_ids(model, [[1, 2, 3]], stopping(8, -1))
    model.set_dropout(0.9)
    model.train()
    assert generate_ids(model, [[1, 2, 3]], stopping(8, -1)) == expected
    assert model.training


def test_top_p_sorts_the_whole_vocabulary_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3
    u = torch.linspace(0, 0.999, 64).tolist()
    for top_p in (0.2, 0.7, 0.99):
        monkeypatch.setattr(sampling, "TOPK_FIRST", 50)
        params = SamplingParams(temperature=1.0, top_p=top_p)
        expected = sample_tokens(logits, u, params)
        for few in (1, 6, 20):  # too few for some rows of the batch, or for all
            monkeypatch.setattr(sampling, "TOPK_FIRST", few)
            assert sample_tokens(logits, u, params) == expected
            assert [sample_tokens(logits[n : n + 1], u[n : n + 1], params)[0] for n in range(64)] == expected
