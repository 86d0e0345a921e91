"""What a caller adds to a run: callbacks, and metrics of its validations.

A callback is a function, which gets each step's row of metrics.jsonl, or an object with any of these methods:

    on_start(run)           before the first step; run.model, run.loaded, run.config, …
    on_step(row)            after each step, before its validation
    on_evaluate(row)        after each validation, with its columns
    on_checkpoint(folder)   after each checkpoint
    on_end()                after the last step

Raising `StopTraining` in one makes the step the last: it is validated and saved, and the run has ended. Any other error
is the caller's, and ends the run at once. Of several ranks rank 0 calls them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftlm.config.values import short
from graftlm.errors import InputError, did_you_mean
from graftlm.inference.metrics import MetricFunctions, metric_functions

HOOKS = ("on_start", "on_step", "on_evaluate", "on_checkpoint", "on_end")


class StopTraining(Exception):
    """Raised by a callback: the current step is the run's last."""


@dataclass
class Callbacks:
    """The callbacks and metrics of a run."""

    hooks: Sequence[Mapping[str, Callable[..., object]]] = ()
    """Of each callback its methods by name."""
    metrics: MetricFunctions = field(default_factory=dict)
    names: tuple[str, ...] = ()
    """The callbacks' names, for run.json."""
    ended: bool = False
    """Whether one has raised StopTraining."""

    @classmethod
    def of(cls, callbacks: Any, metrics: Any) -> "Callbacks":
        """Of what a caller passes: one or several. Raises InputError for what is no callback, or no metric."""
        several = callbacks if isinstance(callbacks, list | tuple) else [] if callbacks is None else [callbacks]
        names = tuple(getattr(one, "__name__", type(one).__name__) for one in several)
        return cls([_hooks(one) for one in several], metric_functions(metrics), names)

    def call(self, hook: str, *values: Any) -> None:
        """Call the callbacks that have this method."""
        for hooks in self.hooks:
            if hook in hooks:
                try:
                    hooks[hook](*values)
                except StopTraining:
                    self.ended = True

    def to_json(self) -> dict[str, Any]:
        """What run.json records."""
        return {"callbacks": list(self.names), "metrics": list(self.metrics)}


def _hooks(callback: Any) -> dict[str, Callable[..., object]]:
    """The methods of a callback; a function is its on_step."""
    named = [name for name in dir(callback) if name.startswith("on_")]
    for name in named:
        if name not in HOOKS:
            hint = f"{did_you_mean(name, HOOKS, '')}methods are {', '.join(HOOKS)}"
            raise InputError(f"callbacks: {type(callback).__name__} has {name}, which is never called: {hint}")
    if named and not isinstance(callback, type):
        return {name: getattr(callback, name) for name in named}
    if not callable(callback) or isinstance(callback, type):
        methods = ", ".join(HOOKS)
        raise InputError(f"callbacks: {short(callback)}: pass a function, or an object with any of {methods}")
    return {"on_step": callback}
