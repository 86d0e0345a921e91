"""`/v1/embeddings`: the mean of each text's last hidden states."""

import asyncio
import base64
import math
import struct
from typing import Any

from graftlm.errors import GraftError
from graftlm.serving.responses import future_result
from graftlm.serving.schemas import APIError, EmbeddingBody
from graftlm.serving.service import CONCURRENCY, Service, listed


async def embed_texts(service: Service, body: EmbeddingBody) -> dict[str, Any]:
    """The mean of the last hidden states of each text."""
    model, texts = service.model(body.model), listed(body.input)
    encode = service.tokenizer.encode_prompts
    rows = await asyncio.to_thread(encode, texts) if isinstance(texts[0], str) else texts
    if (longest := max(map(len, rows))) > model.max_seq_len:
        message = f"{longest} tokens, and {model.name} reads at most {model.max_seq_len}: shorten the text"
        raise APIError(400, message, code="context_length_exceeded")
    found: list[list[float]] = []
    for start in range(0, len(rows), CONCURRENCY):
        futures = [service.engine.embed(row, model.adapter) for row in rows[start : start + CONCURRENCY]]
        found += await asyncio.gather(*map(future_result, futures))
    if not all(math.isfinite(value) for values in found for value in values):
        raise GraftError("the hidden states are NaN: the weights are broken, or overflow in this --dtype; try float32")
    count = sum(map(len, rows))
    return {
        "object": "list",
        "model": body.model,
        "pooling": "mean of the last hidden states",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(values, body.encoding_format)}
            for index, values in enumerate(found)
        ],
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _encoded(values: list[float], encoding_format: str) -> list[float] | str:
    """The numbers, or base64 of them as little-endian float32."""
    if encoding_format == "float":
        return values
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
