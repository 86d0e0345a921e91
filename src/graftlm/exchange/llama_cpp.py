"""llama.cpp, asked for tokens, log-probabilities and greedy texts of a .gguf file that was just written.

The package `xllamacpp` (the extra `llamacpp`) holds it as a server, which listens on the loopback address alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from graftlm.errors import GraftError


def is_installed() -> bool:
    """Whether the package is."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A .gguf file in llama.cpp, in float32 where the file's types allow it.

    lora: the .gguf file of an adapter. context: tokens of the longest text. Raises GraftError if it does not load.
    """

    def __init__(self, path: Path, context: int, lora: Path | None = None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = context, 1
        params.warmup = params.fit_params = params.cache_prompt = False
        params.cache_type_k = params.cache_type_v = 0  # float32
        params.flash_attn_type = 0  # it would round to float16
        params.verbosity = 0
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise GraftError(f"llama.cpp does not load {(lora or path).name} ({error})") from error
        self._open = build_opener(ProxyHandler({})).open

    def _ask(self, route: str, question: dict[str, Any]) -> Any:
        request = Request(
            f"{self._server.listening_address}/{route}",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with self._open(request, timeout=600) as answer:
            return json.load(answer)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, with what precedes a text; special tokens in it are text."""
        found = self._ask("tokenize", {"content": text, "add_special": True, "parse_special": False})
        return [int(index) for index in found["tokens"]]

    def next_logprobs(self, ids: Sequence[int], top: int, shown: int) -> dict[int, float]:
        """The `top` likeliest next tokens, and their log-probabilities.

        shown: a token that is a whole character: without one, the server answers without probabilities.
        """
        question = {"prompt": [*ids], "n_predict": 1, "n_probs": top, "logit_bias": [[shown, 1e6]]}
        found = self._ask("completion", {**question, "temperature": 0.0, "cache_prompt": False})
        return {entry["id"]: entry["logprob"] for entry in found["completion_probabilities"][0]["top_logprobs"]}

    def greedy(self, ids: Sequence[int], tokens: int) -> tuple[list[int], bool]:
        """The next tokens, without the one that ends the text, and whether there was one."""
        question = {"prompt": [*ids], "n_predict": tokens, "return_tokens": True, "samplers": ["top_k"], "top_k": 1}
        found = self._ask("completion", {**question, "cache_prompt": False})
        return found["tokens"], found["stop_type"] == "eos"
