"""`/v1/classify`: label probabilities of texts, from the base and its adapters."""

import asyncio
import math
from typing import Any

from graftlm.errors import GraftError
from graftlm.serving.responses import future_result
from graftlm.serving.schemas import ClassifyBody
from graftlm.serving.service import CONCURRENCY, ServedModel, Service
from graftlm.text.collate import Example, encode_rows
from graftlm.text.records import Labelled


async def classify_texts(service: Service, body: ClassifyBody) -> dict[str, Any]:
    """For each text and model the probability of each label: a softmax over the labels' scores."""
    models = [service.model(name) for name in dict.fromkeys(body.models or service.models)]
    texts = [body.text] if body.text is not None else list(body.texts or ())

    def encode(text: str, model: ServedModel) -> tuple[Example, dict[str, bool]]:
        records = [Labelled(text, 0, source="text")]
        examples, truncated = encode_rows(records, model.template, service.tokenizer, model.max_seq_len)
        return examples[0], {"truncated": bool(truncated)}

    prompts = await asyncio.to_thread(lambda: [(model, *encode(text, model)) for text in texts for model in models])
    found: list[dict[str, Any]] = []
    for start in range(0, len(prompts), CONCURRENCY):
        batch = prompts[start : start + CONCURRENCY]
        results = await asyncio.gather(*(_probabilities(service, model, example) for model, example, _ in batch))
        found += [result | notes for result, (_, _, notes) in zip(results, batch, strict=True)]
    by_text = [found[start : start + len(models)] for start in range(0, len(found), len(models))]
    names = [model.name for model in models]
    classified = [{"index": n, "models": dict(zip(names, each, strict=True))} for n, each in enumerate(by_text)]
    return {"object": "classification", "results": classified}


async def _probabilities(service: Service, model: ServedModel, example: Example) -> dict[str, Any]:
    """The most likely label and all probabilities. Raises GraftError if a score is NaN or infinite."""
    score = service.engine.score(example.prompt_ids, example.label_ids, model.adapter, example.skip)
    scores = await future_result(score)
    if not all(map(math.isfinite, scores)):
        raise GraftError("the labels' scores are NaN: the weights are broken, or overflow in this --dtype; try float32")
    weights = [math.exp(score - max(scores)) for score in scores]
    probabilities = dict(zip(model.template.labels, (weight / sum(weights) for weight in weights), strict=True))
    label = max(probabilities, key=probabilities.__getitem__)
    return {"label": label, "probabilities": probabilities}
