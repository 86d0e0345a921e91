"""llama.cpp, asked for tokens, log-probabilities and greedy texts of a .gguf file that was just written.

The package `xllamacpp` (the extra `llamacpp`) holds it as a server, which listens on the loopback address alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import torch
from torch import Tensor

from graftlm.errors import GraftError
from graftlm.exchange.load import ModelBundle
from graftlm.exchange.verify import TEXTS
from graftlm.models import CausalLM

CONTEXT = 512
"""Tokens of the longest prompt."""
GREEDY = 10
"""Tokens after each prompt that are compared."""
TOP = 50
"""Likeliest tokens whose log-probabilities are compared."""
SHARES = {"f32": 1e-3, "f16": 1e-2, "bf16": 2e-2}
"""The accepted difference of a log-probability, as a share of the largest logit, by type of the matrices.

llama.cpp rounds GELU to float16 in any file, and activations to the file's own 16 bits, or to 8 in quantised files."""
QUANTISED_SHARE = 0.05


def logprob_tolerance(kind: str, largest: float) -> float:
    """The accepted difference of a log-probability in a file of this kind, of a model with this largest logit."""
    return max(1e-3, SHARES.get(kind, QUANTISED_SHARE) * largest)


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
        # Its threads wait for each other in busy loops: more of them than free cores take a hundred times as long.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.verbosity = 0
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise GraftError(f"llama.cpp does not load the file ({error}); nothing was written") from error
        self._open = build_opener(ProxyHandler({})).open

    def ask(self, route: str, question: dict[str, Any]) -> Any:
        """What the server answers to this JSON at this route."""
        request = Request(
            f"{self._server.listening_address}/{route}",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with self._open(request, timeout=600) as answer:
                return json.load(answer)
        except OSError as error:
            raise GraftError(f"llama.cpp did not answer ({error}); nothing was written") from error

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, with what precedes a text; special tokens in it are text."""
        found = self.ask("tokenize", {"content": text, "add_special": True, "parse_special": False})
        return [int(index) for index in found["tokens"]]

    def next_logprobs(self, prompts: Sequence[Sequence[int]], top: int, shown: int) -> list[dict[int, float]]:
        """The `top` likeliest next tokens after each prompt, and their log-probabilities.

        shown: a token that is a whole character: without one, the server answers without probabilities.
        """
        question = {"n_predict": 1, "n_probs": top, "temperature": 0.0, "logit_bias": [[shown, 1e6]]}
        tops = [answer["completion_probabilities"][0]["top_logprobs"] for answer in self.complete(prompts, question)]
        return [{entry["id"]: entry["logprob"] for entry in top} for top in tops]

    def greedy(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[list[int], bool]]:
        """The next tokens after each prompt, and whether the text ended by itself: then the last one is its end."""
        question = {"n_predict": tokens, "return_tokens": True, "samplers": ["top_k"], "top_k": 1}
        return [(answer["tokens"], answer["stop_type"] == "eos") for answer in self.complete(prompts, question)]

    def complete(self, prompts: Sequence[Sequence[int]], question: dict[str, Any]) -> list[dict[str, Any]]:
        """The server's answer for each prompt."""
        found = self.ask("completion", {"prompt": [[*ids] for ids in prompts], "cache_prompt": False, **question})
        return found if isinstance(found, list) else [found]


@dataclass(frozen=True)
class LlamaCppProof:
    """What llama.cpp made of a file, compared with the model that our reader found."""

    max_abs_logprob_diff: float
    tolerance: float
    equal_texts: int
    """Greedy continuations that are the same, of `texts`. The others part at a token where both choices are as likely,
    up to twice the tolerance."""
    texts: int
    ended: int
    """Texts that llama.cpp ended by itself."""
    version: str


def compare(
    llama: LlamaCpp, model: CausalLM, loaded: ModelBundle, prompts: Sequence[tuple[int, ...]], tolerance: float
) -> LlamaCppProof:
    """Compare llama.cpp's tokens, log-probabilities and greedy texts; GraftError if they are not the model's.

    loaded: tokenizer and ends of texts.
    """
    tokenizer, ends = loaded.tokenizer, loaded.eos_token_ids
    for text in TEXTS:
        ids = tokenizer.encode_prompt(text)
        if (theirs := llama.tokens(text)) != ids:
            raise GraftError(
                f"llama.cpp reads {text!r} as other tokens, {theirs} instead of {ids}; nothing was written"
            )
    cut = [ids[: min(CONTEXT, model.max_seq_len - GREEDY)] for ids in prompts]
    tops = llama.next_logprobs(cut, TOP, tokenizer.encode(" a")[-1])
    ours = [_logprobs(model, ids, 1)[0] for ids in cut]
    difference = max(
        abs(own[i].item() - value) for own, top in zip(ours, tops, strict=True) for i, value in top.items()
    )
    texts = llama.greedy(cut, GREEDY)
    margins = [_margin(model, ids, new, ends if end else []) for ids, (new, end) in zip(cut, texts, strict=True)]
    if not (difference <= tolerance and max(margins) <= 2 * tolerance):  # NaN fails too
        what = f"log-probabilities differ by {max(difference, max(margins) / 2):.1e}, more than {tolerance:.1e}"
        raise GraftError(f"in llama.cpp, {what}; nothing was written")
    for new, end in texts:
        if over := [token for token in new[: len(new) - end] if token in ends]:
            raise GraftError(f"llama.cpp does not end a text at {tokenizer.token(over[0])}; nothing was written")
    ended = sum(end for _, end in texts)
    return LlamaCppProof(difference, tolerance, margins.count(0.0), len(cut), ended, version("xllamacpp"))


@torch.inference_mode()
def _logprobs(model: CausalLM, ids: Sequence[int], last: int) -> Tensor:
    """[last, V] after the last tokens."""
    return model(torch.tensor([ids]), positions=torch.arange(len(ids) - last, len(ids))).log_softmax(-1)


def _margin(model: CausalLM, prompt: Sequence[int], text: Sequence[int], ends: Sequence[int]) -> float:
    """How much likelier the model finds another token where its greedy text parts from this one; 0: the same text.

    ends: any of these may be its last token; empty: the text has not ended.
    """
    logprobs = _logprobs(model, [*prompt, *text[:-1]], len(text))
    chosen = logprobs.gather(1, torch.tensor([text]).T)[:, 0]
    if ends:
        chosen[-1] = logprobs[-1, ends].max()
    margins = logprobs.amax(1) - chosen
    return next((margin for margin in margins.tolist() if margin != 0), 0.0)
