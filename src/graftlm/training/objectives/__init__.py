"""What a run minimises: one file per objective, found by its name and listed nowhere.

`--objective NAME` imports `objectives/NAME.py` and takes the `Objective` subclass defined there. The fields of that
dataclass are the flags of `graft train` that it reads. All differences between objectives are methods of `Objective`:
records, batches, loss, logged metrics, validation, and what has to be computed before the first step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from graftlm.config import TrainConfig
from graftlm.config.training import OBJECTIVES
from graftlm.errors import InputError, unknown_name_error
from graftlm.inference.decoder import token_batches
from graftlm.inference.generate import eval_mode
from graftlm.inference.metrics import MetricFunctions, apply_metrics
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example
from graftlm.text.example_table import lengths_of
from graftlm.text.records import Record
from graftlm.training.batches import CollateOptions, HiddenStates, TrainingBatch, TrainingData, forward_batch
from graftlm.training.distributed import DistContext, uneven_forward

Sums = dict[str, Tensor]
"""Scalars, each the sum of a metric over a batch's examples, without gradient."""
Statistics = Mapping[str, Tensor]
NONE = -2
"""In place of a label where a rank has fewer examples than another."""
Notify = Callable[[str], None]


class Validation(NamedTuple):
    """What an objective measured on some examples."""

    loss: float
    """The sum of their losses."""
    weight: float
    """What the sum is divided by."""
    correct: float | None
    """The number of correct examples; None where the data does not define it."""
    predicted: Sequence[int] = ()
    """The label number that scores highest, of each example with a label."""


@dataclass
class Objective(ABC):
    """A training objective. Subclasses are dataclasses whose fields are flags of `graft train`."""

    records: ClassVar[tuple[type[Record], ...]]
    """The kinds of record it trains on."""
    needs: ClassVar[str]
    """The data it trains on, for errors: "preference pairs (fields prompt, chosen, rejected)"."""
    lr_multiplier: ClassVar[float] = 1.0
    """Factor on the method's default learning rate."""
    min_batch_size: ClassVar[int] = 1
    """The smallest --batch_size that its loss is defined for."""
    caches_activations: ClassVar[bool] = False
    """Whether its batches can use cached hidden states of frozen lower layers."""
    packs: ClassVar[bool] = False
    """Whether its rows can hold several records (--packing)."""

    @classmethod
    def name(cls) -> str:
        """The value of --objective: its file's name."""
        return cls.__module__.rpartition(".")[2]

    # Data -------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def collate(self, examples: Sequence[Example], options: CollateOptions) -> TrainingBatch:
        """Examples -> one micro-batch."""

    # Loss -------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss_from_hidden(self, model: CausalLM, hidden: HiddenStates, batch: TrainingBatch) -> tuple[Tensor, Sums]:
        """The sum of the examples' losses, and what is logged. A step divides it by the weight of all its batches."""

    def loss(self, model: CausalLM, batch: TrainingBatch) -> tuple[Tensor, Sums]:
        """Forward pass and loss of a micro-batch."""
        return self.loss_from_hidden(model, forward_batch(model, batch), batch)

    def batch_statistics(self, model: CausalLM, examples: Sequence[Example], dist: DistContext) -> Statistics:
        """What the loss of each micro-batch needs of the whole batch, over all ranks; it is added to `extra`."""
        return {}

    def metrics(self, sums: Mapping[str, float], weight: float) -> dict[str, float | None]:
        """Columns of metrics.jsonl from the sums over a step, all ranks included."""
        return {name: value / weight for name, value in sums.items()}

    # Validation -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, model: CausalLM, data: TrainingData, statistics: Statistics) -> Validation:
        """Loss and predictions over `data.validation`, which is this rank's part.

        statistics: `batch_statistics` of the whole validation split.
        """

    def sum_losses(
        self, model: CausalLM, data: TrainingData, batch_size: int, statistics: Statistics
    ) -> tuple[float, int, dict[str, float]]:
        """Loss, weight and metrics, summed over `data.validation` in this order, in evaluation mode."""
        total, weight, totals = 0.0, 0, dict[str, float]()
        examples = data.validation
        with eval_mode(model):
            for rows in token_batches(range(len(examples)), lengths_of(examples), batch_size, data.max_tokens):
                batch = self.collate([examples[row] for row in rows], CollateOptions()).with_extra(statistics)
                loss, sums = self.loss(model, batch.to(model.device))
                total, weight = total + loss.item(), weight + batch.weight
                if data.progress is not None:
                    data.progress(len(rows))
                totals = {name: totals.get(name, 0.0) + value.item() for name, value in sums.items()}
        return total, weight, totals

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """The columns of metrics.jsonl that `monitor` measures."""
        return ()

    def monitor(self, model: CausalLM, data: TrainingData, seed: int) -> dict[str, float]:
        """Values of `validation_metrics`, measured at each validation."""
        return {}

    # Before the first step --------------------------------------------------------------------------------------------

    def check_sharded(self) -> None:  # noqa: B027 - optional, as the next ones
        """Raise InputError if it cannot train a model whose trained weights are sharded across ranks."""

    def load(self, data: TrainingData, source: Mapping[str, Any], resumed: Path | None) -> None:  # noqa: B027
        """Read what an earlier run has stored, and check that it belongs to this data and this `source`.

        source: {"base": sha256, "start": sha256 of the initial adapter or None, "dtype"}. resumed: the run folder.
        """

    def setup(self, model: CausalLM, data: TrainingData, dist: DistContext, notify: Notify) -> dict[str, Any] | None:
        """Compute what training needs of the initial model. Returns what run.json records of it."""
        return None

    def save(self, folder: Path) -> None:  # noqa: B027
        """Store in the run folder what a resumed run reads with `load`."""

    def unknown(self, data: TrainingData) -> int:
        """How many examples `setup` will run the model on."""
        return 0

    def with_placeholders(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples with any value for what `setup` computes, for timing."""
        return examples


def validate(
    model: CausalLM,
    objective: Objective,
    data: TrainingData,
    dist: DistContext,
    metrics: MetricFunctions | None = None,
) -> tuple[float, float | None, dict[str, float]]:
    """Mean loss per target token, pair or example, the fraction of correct examples (None: not defined), and metrics.

    Each rank evaluates its part of the examples; all return the same. metrics: of the label that scores highest and the
    own one, of data with labels.
    """
    examples = data.validation
    statistics = objective.batch_statistics(model, examples, dist)
    mine = [examples[i] for i in dist.partition(range(len(examples)), lengths_of(examples))]
    found = Validation(0.0, 0.0, None)
    with uneven_forward(model, dist):
        if mine:
            found = Validation(*objective.evaluate(model, replace(data, validation=mine), statistics))
    correct = found.correct
    loss, weight, total, defined = dist.all_reduce_numbers(
        [found.loss, found.weight, correct or 0.0, correct is not None]
    )
    own = _own_metrics(metrics, found, [e.label for e in mine], dist) if metrics else {}
    return loss / weight, total / len(examples) if defined else None, own


def _own_metrics(
    metrics: MetricFunctions, found: Validation, true: Sequence[int | None], dist: DistContext
) -> dict[str, float]:
    """The caller's metrics, of all ranks' examples."""
    pairs = [(p, t) for p, t in zip(found.predicted, true, strict=True) if t is not None]
    most = int(max(count for (count,) in dist.all_gather([len(pairs)])))
    flat = [number for pair in (*pairs, *[(NONE, NONE)] * (most - len(pairs))) for number in pair]
    every = [int(number) for numbers in dist.all_gather(flat) for number in numbers]
    rows = [pair for pair in zip(every[::2], every[1::2], strict=True) if pair != (NONE, NONE)]
    return apply_metrics(metrics, [p for p, _ in rows], [t for _, t in rows])


def objective_class(name: str) -> type[Objective]:
    """The objective of a file in this folder."""
    module = import_module(f"{__name__}.{name}")
    (kind,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    )
    return kind


def flags_of(kind: type[Objective]) -> list[str]:
    """The flags that an objective reads."""
    return [f.name for f in fields(kind) if f.init]


def make_objective(config: TrainConfig, explicit: Set[str] = frozenset()) -> Objective:
    """The objective that the flags describe; a flag at None takes its default.

    An explicit flag that only other objectives read is an InputError.
    """
    if config.objective not in OBJECTIVES:
        raise unknown_name_error("--objective", config.objective, OBJECTIVES)
    kinds = {name: objective_class(name) for name in OBJECTIVES}
    kind = kinds[config.objective]
    own, default = flags_of(kind), {f.name: f.default for f in fields(config)}
    for flag in sorted({flag for other in kinds.values() for flag in flags_of(other)}.difference(own) & explicit):
        value = getattr(config, flag)
        if value != default[flag]:
            users = " or ".join(name for name, other in kinds.items() if flag in flags_of(other))
            raise InputError(
                f"--{flag} {value}: --objective {config.objective} takes no --{flag}: leave it out, or use {users}"
            )
    if config.packing and not kind.packs:
        raise InputError(
            f"--packing: --objective {config.objective} compares answers, each in a row of its own: leave it out"
        )
    if config.batch_size < kind.min_batch_size:
        raise InputError(
            f"--batch_size {config.batch_size}: --objective {config.objective} compares the examples of a batch: give "
            f"at least {kind.min_batch_size}"
        )
    return kind(**{flag: value for flag in own if (value := getattr(config, flag)) is not None})
