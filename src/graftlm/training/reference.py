"""The reference model of preference training: the model that training starts from, with its initial adapter if any.

Its log-probabilities of all answers are computed once, before the first step, in groups that depend on the data alone
(a product's rounding depends on the rows of its batch), and stored in the run folder:

    out_dir/reference.safetensors   train [N, A], validation [M, A]: of each example's A answers, float64
    out_dir/reference.json          their data, base, initial adapter and dtype; another run reuses them if these match

At each validation the distance from the reference is estimated from samples: KL(pi || ref) = E[log pi(y) - log ref(y)],
y drawn from pi. For that the initial values of the trained tensors are stored in memory and swapped in.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.files.atomic import write_json
from graftlm.files.formats import load_safetensors, read_json, save_safetensors
from graftlm.inference.decoder import MAX_PASS_TOKENS, token_batches
from graftlm.inference.generate import Batching, eval_mode, generate_rows
from graftlm.inference.sampling import SamplingParams
from graftlm.inference.scoring import score
from graftlm.methods.base import trainable
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example
from graftlm.text.example_table import ExampleTable, lengths_of
from graftlm.training.batches import CollateOptions, TrainingBatch, TrainingData, forward_batch, sequence_logps
from graftlm.training.distributed import DistContext, uneven_forward
from graftlm.training.objectives import Notify, Objective, Statistics, Validation

REFERENCE_FILES = "reference."
WEIGHTS, FINGERPRINT = f"{REFERENCE_FILES}safetensors", f"{REFERENCE_FILES}json"
FORMAT = 1
GROUP = 16
MAX_SAMPLE_TOKENS, SAMPLE_BATCH = 64, 32
VALIDATION_BATCH = 16


@dataclass
class ReferenceObjective(Objective):
    """An objective that compares the model with its reference."""

    reference: str = field(default="", kw_only=True)
    kl_samples: int = field(default=32, kw_only=True)

    answers: ClassVar[int]
    """A, the answers of an example."""
    lr_multiplier: ClassVar[float] = 0.2  # the model must stay close to where it starts

    initial: "InitialWeights | None" = field(default=None, init=False)
    """The trained tensors before the first step, while `setup` has been called and they are needed."""
    logps: dict[str, Tensor] | None = field(default=None, init=False)
    """The reference's log-probabilities by split, [N, A], if they are known."""
    _fingerprint: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return True

    @property
    def needs_initial(self) -> bool:
        """Whether it runs the initial model while it trains."""
        return self.kl_samples > 0

    def check_sharded(self) -> None:
        """The initial weights are swapped in whole, which sharded ones cannot be."""
        if self.needs_initial:
            raise InputError(
                f"--kl_samples {self.kl_samples}: not supported with sharded full fine-tuning; give 0, or run in a "
                "single process"
            )

    def with_reference_logps(self, batch: TrainingBatch, examples: Sequence[Example]) -> TrainingBatch:
        """The batch with extra["reference"], [B, A] float64, if all its examples have it."""
        known = [e.reference for e in examples]
        return batch if None in known else batch.with_extra({"reference": torch.tensor(known, dtype=torch.float64)})

    def evaluate(self, model: CausalLM, data: TrainingData, statistics: Statistics) -> Validation:
        """Correct are the examples that count in the metric reward_accuracy."""
        ordered = sorted(data.validation, key=lambda e: e.length)
        loss, weight, sums = self.sum_losses(model, replace(data, validation=ordered), VALIDATION_BATCH, statistics)
        return Validation(loss, weight, sums["reward_accuracy"])

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """The sampled KL."""
        return ("kl",) if self.kl_samples else ()

    def monitor(self, model: CausalLM, data: TrainingData, seed: int) -> dict[str, float]:
        """The KL to the initial model, from samples."""
        if not self.kl_samples:
            return {}
        return {"kl": sampled_kl(model, self.initial_weights(model), data, self.kl_samples, seed)}

    def initial_weights(self, model: CausalLM) -> "InitialWeights":
        """The initial values of the trained tensors; before `setup` the present ones."""
        return self.initial or InitialWeights.of(model)

    # Before the first step --------------------------------------------------------------------------------------------

    def load(self, data: TrainingData, source: Mapping[str, Any], resumed: Path | None) -> None:
        """Read the log-probabilities of the resumed run, or of --reference."""
        self._fingerprint = reference_fingerprint(data.splits, source)
        folder = resumed or (Path(self.reference) if self.reference else None)
        if self.needs_reference and folder is not None:
            self._attach(data, read_reference(folder, data.splits, self._fingerprint, self.answers))

    def setup(self, model: CausalLM, data: TrainingData, dist: DistContext, notify: Notify) -> dict[str, Any] | None:
        """Store the initial weights, and compute the reference's log-probabilities unless they are known."""
        if self.needs_initial:
            self.initial = InitialWeights.of(model)
        if not (count := self.unknown(data)):
            return None
        notify(f"computing reference log-probabilities of {count:,} examples, once")
        start = time.perf_counter()
        logps = {
            split: self.answer_logps(model, some, dist, max_tokens=data.max_tokens)
            for split, some in data.splits.items()
        }
        self._attach(data, logps)
        return {"pairs": count, "seconds": round(time.perf_counter() - start, 3)}

    def save(self, folder: Path) -> None:
        """Write reference.safetensors and reference.json."""
        if self.logps is not None:
            save_safetensors(folder / WEIGHTS, self.logps)
            write_json(folder / FINGERPRINT, self._fingerprint)

    def unknown(self, data: TrainingData) -> int:
        """All examples, unless their reference log-probabilities are known or not needed."""
        known = not self.needs_reference or self.logps is not None
        return 0 if known else len(data.train) + len(data.validation)

    def with_placeholders(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Zeros for unknown reference log-probabilities."""
        if any(e.reference is None for e in examples):
            return with_reference(examples, torch.zeros(len(examples), self.answers))
        return examples

    def _attach(self, data: TrainingData, logps: dict[str, Tensor]) -> None:
        self.logps = logps
        data.train, data.validation = (with_reference(some, logps[split]) for split, some in data.splits.items())

    def answer_logps(
        self,
        model: CausalLM,
        examples: Sequence[Example],
        dist: DistContext | None = None,
        group: int = GROUP,
        max_tokens: int = MAX_PASS_TOKENS,
    ) -> Tensor:
        """The log-probabilities of every example's answers under the model as it is, [N, A] float64.

        Ranks take groups in turn; the groups, and so the bits, are those of a single process.
        """
        dist = dist or DistContext()
        logps = torch.zeros(len(examples), self.answers, dtype=torch.float64)
        lengths = lengths_of(examples)
        groups = list(
            token_batches(sorted(range(len(examples)), key=lambda i: (lengths[i], i)), lengths, group, max_tokens)
        )
        with eval_mode(model), uneven_forward(model, dist):
            for rows in groups[dist.rank :: dist.size]:
                batch = self.collate([examples[i] for i in rows], CollateOptions()).to(model.device)
                sums, _ = sequence_logps(model, forward_batch(model, batch), batch)
                logps[rows] = sums.view(-1, self.answers).cpu().double()
        return dist.all_reduce_sum(logps)  # another rank's rows are 0 here


def reference_fingerprint(splits: Mapping[str, Sequence[Example]], source: Mapping[str, Any]) -> dict[str, Any]:
    """What reference.json holds: {"pairs": sha256 of all tokens, "base", "start", "dtype", "format"}."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for e in examples:
            skip = (e.skip,) if e.skip else ()
            digest.update(repr((split, e.prompt_ids, e.completion_ids, e.rejected_ids, *skip)).encode())
    return {"format": FORMAT, "pairs": digest.hexdigest(), **source}


def read_reference(
    folder: Path, splits: Mapping[str, Sequence[Example]], fingerprint: Mapping[str, Any], answers: int
) -> dict[str, Tensor]:
    """A run folder's log-probabilities by split; an InputError if it has none, or those of other data or models."""
    if not (folder / FINGERPRINT).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(
            f"{folder}: holds no reference ({FINGERPRINT} and {WEIGHTS}); name a run of preference training"
        )
    recorded = read_json(folder / FINGERPRINT)
    recorded = recorded if isinstance(recorded, dict) else {}
    names = {"pairs": "other pairs (data, tokenizer or --max_length)", "base": "another base model"}
    names |= {"start": "another start (--init_from)", "dtype": "another --dtype", "format": "another version of graft"}
    for key, value in fingerprint.items():
        if recorded.get(key) != value:
            raise InputError(f"{folder / FINGERPRINT}: is of {names[key]}; leave out --reference to compute it again")
    logps = load_safetensors(folder / WEIGHTS)
    for split, examples in splits.items():
        if split not in logps or logps[split].shape != (len(examples), answers):
            raise InputError(f"{folder / WEIGHTS}: does not hold {len(examples)} examples of {split}; restore the file")
    return logps


def with_reference(examples: Sequence[Example], logps: Tensor) -> Sequence[Example]:
    """The same examples with the reference's log-probabilities of their answers."""
    if isinstance(examples, ExampleTable):
        return examples.with_reference(logps)
    return [replace(e, reference=tuple(row)) for e, row in zip(examples, logps.tolist(), strict=True)]


# Distance -------------------------------------------------------------------------------------------------------------


@dataclass
class InitialWeights:
    """The trained tensors as they were before the first step."""

    parameters: list[nn.Parameter]
    values: list[Tensor]

    @classmethod
    def of(cls, model: CausalLM) -> "InitialWeights":
        """Of a model that has not been trained yet."""
        parameters = list(trainable(model).values())
        return cls(parameters, [p.detach().clone() for p in parameters])

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it the model is the initial one."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for n, p in enumerate(self.parameters):
            p.data, self.values[n] = self.values[n], p.data


def sampled_kl(model: CausalLM, initial: InitialWeights, data: TrainingData, count: int, seed: int) -> float:
    """KL(model || initial) in nats per sampled answer: the mean of log pi(y) - log ref(y), y drawn from the model.

    One answer at temperature 1 to each of the first `count` different prompts of `data.validation`, up to the longest
    answer there or MAX_SAMPLE_TOKENS tokens; of a longer answer it is the KL of its beginning.
    """
    prompts = list(dict.fromkeys(e.full_prompt_ids for e in data.validation))[:count]
    longest = max(max(len(e.completion_ids), len(e.rejected_ids)) for e in data.validation)
    limit = min(MAX_SAMPLE_TOKENS, longest)
    params = SamplingParams(max_new_tokens=limit, temperature=1.0, seed=seed, stop_token_ids=data.stop_tokens)
    rows = generate_rows(model, prompts, params, batching=Batching(SAMPLE_BATCH))
    # The token that ended an answer was sampled too.
    answers = [(*row.tokens, *([] if row.stop_token is None else [row.stop_token])) for row in rows]
    samples = [
        Example(prompt, answer, None, "", "", "") for prompt, answer in zip(prompts, answers, strict=True) if answer
    ]
    policy = score(model, samples, batch_size=SAMPLE_BATCH).completion
    with initial.restored():
        reference = score(model, samples, batch_size=SAMPLE_BATCH).completion
    return float((policy - reference).mean())
