"""The model that preference training starts from: what it thinks of all pairs, and how far a run has moved from it.

What is unusual here: the reference is the model the run started from, *with* its adapter if it had one, never merely
"adapters off". Its log-probabilities are computed once, before the first step, by groups that the data alone decides
(a product's rounding depends on which rows stand beside each other), and kept in the run folder:

    out_dir/reference.safetensors   train [N, 2], validation [M, 2]: of the chosen and the rejected answer, float64
    out_dir/reference.json          of which pairs, base and start they are; another run takes them only if they fit

The distance is estimated from samples: KL(pi || ref) = E[log pi(y) - log ref(y)], y drawn from pi. For that the trained
tensors' starting values are kept beside the model and put into it for a moment.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.files.atomic import write_json
from graftlm.files.formats import load_safetensors, read_json, save_safetensors
from graftlm.inference.generate import Batching, eval_mode, generate_ids
from graftlm.inference.sampling import SamplingParams
from graftlm.inference.scoring import score
from graftlm.methods.base import trainable
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example
from graftlm.training.distributed import DistContext, uneven_forward
from graftlm.training.objectives import collate
from graftlm.training.preferences import sequence_logps

NAME = "reference."
WEIGHTS, ABOUT = f"{NAME}safetensors", f"{NAME}json"
FORMAT = 1
GROUP = 16
LONGEST_SAMPLE = 64
Splits = Mapping[str, Sequence[Example]]


# Log-probabilities ----------------------------------------------------------------------------------------------------


def reference_logps(model: CausalLM, examples: Sequence[Example], world: DistContext | None = None) -> Tensor:
    """The log-probabilities of every pair's two answers under the model as it is, [N, 2] float64.

    Several processes take every so many groups each; the groups, and so the bits, are those of one.
    """
    world = world or DistContext()
    found = torch.zeros(len(examples), 2, dtype=torch.float64)
    order = sorted(range(len(examples)), key=lambda i: (examples[i].length, i))
    with eval_mode(model), uneven_forward(model, world):
        for at in range(world.rank * GROUP, len(order), world.size * GROUP):
            rows = order[at : at + GROUP]
            batch = collate([examples[i] for i in rows], "pairs").to(model.device)
            found[rows] = sequence_logps(model, batch).policy.cpu().double()
    return world.all_reduce_sum(found)  # what another process computes is 0 here


def reference_fingerprint(splits: Splits, base_sha256: str, start_sha256: str | None, dtype: str) -> dict[str, Any]:
    """What a store says it is of: {"pairs": sha256 of all tokens, "base", "start", "dtype", "format"}."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for e in examples:
            digest.update(repr((split, e.prompt_ids, e.completion_ids, e.rejected_ids)).encode())
    about = {"pairs": digest.hexdigest(), "base": base_sha256, "start": start_sha256, "dtype": dtype}
    return {"format": FORMAT, **about}


def save_reference(folder: Path, sums: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write the store into a run folder."""
    save_safetensors(folder / WEIGHTS, dict(sums))
    write_json(folder / ABOUT, dict(about))


def read_reference(folder: Path, splits: Splits, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """The store of a run folder; an InputError where it is none, or is of other pairs or another model."""
    if not (folder / ABOUT).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: holds no reference ({ABOUT} and {WEIGHTS}); name a run of --objective dpo")
    said = read_json(folder / ABOUT)
    said = said if isinstance(said, dict) else {}
    names = {"pairs": "other pairs (data, tokenizer or --max_length)", "base": "another base model"}
    names |= {"start": "another start (--init_from)", "dtype": "another --dtype", "format": "another version of graft"}
    for key, value in about.items():
        if said.get(key) != value:
            raise InputError(f"{folder / ABOUT}: is of {names[key]}; leave --reference out to compute it anew")
    sums = load_safetensors(folder / WEIGHTS)
    for split, examples in splits.items():
        if split not in sums or sums[split].shape != (len(examples), 2):
            raise InputError(f"{folder / WEIGHTS}: does not hold {len(examples)} pairs of {split}; use it as written")
    return sums


def with_reference(examples: Sequence[Example], sums: Tensor) -> list[Example]:
    """The same pairs with what the reference thinks of them."""
    return [
        replace(e, reference=(chosen, rejected)) for e, (chosen, rejected) in zip(examples, sums.tolist(), strict=True)
    ]


# Distance -------------------------------------------------------------------------------------------------------------


@dataclass
class InitialWeights:
    """The trained tensors as they were before the first step."""

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: CausalLM) -> "InitialWeights":
        """Of a model that has not been trained yet."""
        return cls({name: p.detach().clone() for name, p in trainable(model).items()})

    @contextmanager
    def restored(self, model: CausalLM) -> Iterator[None]:
        """Within it the model is what it was at the start."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: CausalLM) -> None:
        for name, p in trainable(model).items():
            p.data, self.tensors[name] = self.tensors[name], p.data


def sampled_kl(
    model: CausalLM,
    start: InitialWeights,
    examples: Sequence[Example],
    count: int,
    eot: int,
    seed: int,
    batch_size: int = 32,
) -> float:
    """KL(model || start) in natural units a sampled answer: the mean of log pi(y) - log ref(y), y drawn from the model.

    One answer to each of the first `count` different prompts, at temperature 1, up to the longest answer in `examples`
    or LONGEST_SAMPLE tokens; of a longer answer it is the KL of its beginning.
    """
    prompts = list(dict.fromkeys(e.prompt_ids for e in examples))[:count]
    most = min(LONGEST_SAMPLE, max(max(len(e.completion_ids), len(e.rejected_ids)) for e in examples))
    params = SamplingParams(max_new_tokens=most, temperature=1.0, seed=seed, stop_token_ids=frozenset({eot}))
    drawn = generate_ids(model, prompts, params, batching=Batching(batch_size))
    # Shorter than it might have been: it ended by itself, and its end-of-text token was drawn too.
    answers = [
        (*tokens, eot) if len(tokens) < min(most, model.max_seq_len - len(prompt)) else tuple(tokens)
        for prompt, tokens in zip(prompts, drawn, strict=True)
    ]
    samples = [
        Example(prompt, answer, None, "", "", "") for prompt, answer in zip(prompts, answers, strict=True) if answer
    ]
    now = score(model, samples, batch_size=batch_size).completion
    with start.restored(model):
        before = score(model, samples, batch_size=batch_size).completion
    return float((now - before).mean())
