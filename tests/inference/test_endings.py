"""A base may name several tokens that end a text, as Llama 3 Instruct does: each ends it, in every command."""

import json

import pytest

from graftlm.exchange.load import ModelBundle, load
from graftlm.inference.engine import Engine
from graftlm.inference.evaluate import evaluate
from graftlm.inference.generate import generate, generate_ids
from graftlm.inference.pairs import sample_completions
from graftlm.inference.prompting import PromptBuilder
from graftlm.inference.requests import Request
from graftlm.inference.sampling import SamplingParams
from graftlm.text.collate import encode_rows
from graftlm.text.records import Labelled
from graftlm.text.template import load_template
from inference.test_prompting import SUMS
from tiny import TEMPLATE, model_folder

TEXT, NEW = "Review: a fine film\nIs it:", 24


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelBundle, list[int]]:
    """A model whose config.json names several ends, the second of which it generates; and what it says before it."""
    folder = model_folder(tmp_path_factory.mktemp("ends") / "model", "llama-biased")
    loaded = load(str(folder), device="cpu", dtype="float32")
    params = SamplingParams(max_new_tokens=NEW)
    [ids] = generate_ids(loaded.model, [loaded.tokenizer.encode_prompt(TEXT)], params)
    first = next(n for n in range(2, NEW) if ids[n] not in ids[:n])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, ids[first], 5]}))
    return load(str(folder), device="cpu", dtype="float32"), ids[:first]


def test_any_end_stops_generate_evaluate_prompt_and_pairs(ended: tuple[ModelBundle, list[int]]) -> None:
    loaded, ids = ended
    model, tokenizer = loaded.model, loaded.tokenizer
    text = tokenizer.decode(ids)
    assert tokenizer.eot == 0 and len(tokenizer.stop_tokens) == 3
    params = SamplingParams(max_new_tokens=NEW)
    assert generate(model, tokenizer, [TEXT], params) == [text]
    [[sampled]] = sample_completions(model, tokenizer, [TEXT], 1, params)
    assert (sampled.text, sampled.finished) == (text, True)
    template = load_template(TEMPLATE)
    examples, _ = encode_rows([Labelled("a fine film", 0, source="row")], template, tokenizer, model.max_seq_len)
    assert examples[0].completion_ids[-1] == tokenizer.eot  # one of them is learned
    [row] = evaluate(model, tokenizer, template, examples, mode="generate", params=params).rows
    assert row["generated"] == text
    assert PromptBuilder(SUMS, tokenizer, chat=False).stop_tokens == tokenizer.stop_tokens


def test_any_end_stops_the_server(ended: tuple[ModelBundle, list[int]]) -> None:
    loaded, ids = ended
    engine = Engine(loaded, {})
    try:
        prompt = tuple(loaded.tokenizer.encode_prompt(TEXT))
        done = engine.submit(Request(prompt, SamplingParams(max_new_tokens=NEW))).done.result(60)
        assert (list(done.tokens), done.finish_reason) == (ids, "stop")
    finally:
        engine.close()
