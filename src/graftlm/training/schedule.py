"""What changes from step to step: the learning rate, and when C++ kernels replace torch's.

Both are functions of the config and the step alone. The step at which kernels change is recorded in run.json before the
first step, because C++ kernels round differently: a resumed run must not depend on what happens to be compiled already.
"""

import math
import threading
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.models.base import CausalLM
from graftlm.models.fused_ops import CppKernels, KernelsUnavailable, compiler, load_kernels

FIRST_STEPS = 10
"""With --kernels auto, steps with torch's kernels, while the compiler works in the background (about a second)."""


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of `step` (1 is the first): linear warmup to the peak, then cosine decay to almost zero.

    It is never zero: the first step and the last one change the weights too.
    """
    assert config.lr is not None and config.warmup_steps is not None and config.max_iters is not None
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    part = (step - config.warmup_steps) / (config.max_iters - config.warmup_steps + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class KernelSwitch:
    """From which step on kernels are C++, and why."""

    start_step: int | None
    """None: never."""
    reason: str

    @classmethod
    def decide(cls, config: TrainConfig, device: torch.device) -> "KernelSwitch":
        """What --kernels means for a run; an InputError if "cpp" is impossible."""
        if config.kernels == "torch":
            return cls(None, "--kernels torch")
        obstacle = _unavailable_reason(config, device)
        if config.kernels == "cpp":
            if obstacle:
                raise InputError(f"--kernels cpp: {obstacle}: leave it out, or use --kernels torch")
            return cls(1, "--kernels cpp")
        if obstacle:
            return cls(None, obstacle)
        if (config.max_iters or 0) <= FIRST_STEPS:
            return cls(None, f"not for {FIRST_STEPS} steps or fewer")
        return cls(FIRST_STEPS + 1, "the same gradients in less time")

    def to_json(self) -> dict[str, Any]:
        """What run.json records."""
        return asdict(self)


def _unavailable_reason(config: TrainConfig, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"kernels are compiled for the CPU, and this run is on {device.type}"
    if not config.fused:
        return "--fused is off, and compiled kernels are its gradients"
    try:
        compiler()
    except KernelsUnavailable as error:
        return str(error)
    return None


class BackgroundCompile:
    """Compiles the C++ kernels during the first steps."""

    def __init__(self, switch: KernelSwitch, model: CausalLM) -> None:
        self.switch, self._model = switch, model
        self._result: CppKernels | KernelsUnavailable | None = None
        self._thread = threading.Thread(target=self._load, daemon=True)
        if switch.start_step is not None:
            self._thread.start()

    def _load(self) -> None:
        try:
            self._result = load_kernels()
        except KernelsUnavailable as error:
            self._result = error

    def ensure_ready(self, step: int) -> None:
        """Switch the model to C++ kernels if `step` uses them; waits for the compiler. Raises KernelsUnavailable."""
        start = self.switch.start_step
        if start is None or step < start or self._result is self._model.kernels:
            return
        self._thread.join()
        if not isinstance(self._result, CppKernels):
            raise self._result or KernelsUnavailable("the compiler's thread died")
        self._model.set_kernels(self._result)
