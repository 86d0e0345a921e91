"""Loss per token and perplexity of a model on documents, in the windows in which it trains on them."""

import math
import time
from collections.abc import Sequence
from typing import Any

from graftlm.errors import GraftError
from graftlm.inference.scoring import score
from graftlm.models import CausalLM
from graftlm.text.collate import Example


def document_loss(model: CausalLM, windows: Sequence[Example], **batching: Any) -> dict[str, Any]:
    """The loss of windows of documents (`encode_rows`), in nats per predicted token: all of a window but its first.

    batching: fields of `Batching` by name. Returns windows, tokens (predicted ones), loss, perplexity and tokens_per_s.
    Raises GraftError if the loss is no finite number.
    """
    start = time.perf_counter()
    scores = score(model, windows, **batching)
    tokens = int(scores.completion_tokens.sum())
    loss = -scores.completion.sum().item() / tokens
    if not math.isfinite(loss):
        raise GraftError(f"the loss is {loss}: the weights are broken, or overflow in this --dtype; try float32")
    return {
        "windows": len(windows),
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens_per_s": tokens / (time.perf_counter() - start),
    }
