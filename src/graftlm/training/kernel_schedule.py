"""When a run goes over to compiled kernels (`models.kernels`): at a step that is fixed before the first one.

What is unusual here: *the switch is part of the run*. Compiled kernels round elsewhere than torch's, so the step stands
in run.json and depends on nothing that may differ the next time, such as what has been compiled already. With auto the
compiler works beside the first steps, which nobody waits for.
"""

import threading
from dataclasses import asdict, dataclass
from typing import Any

import torch

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.models.base import CausalLM
from graftlm.models.kernels import CppKernels, KernelsUnavailable, compiler, load_kernels

FIRST_STEPS = 10
"""So many steps auto computes with torch's kernels: the compiler needs about a second."""


@dataclass(frozen=True)
class KernelSwitch:
    """From which step on kernels are compiled ones, and why."""

    start_step: int | None
    """None: never."""
    reason: str

    @classmethod
    def decide(cls, config: TrainConfig, device: torch.device) -> "KernelSwitch":
        """What --kernels comes to in a run; an InputError says why "cpp" cannot be had."""
        if config.kernels == "torch":
            return cls(None, "--kernels torch")
        hindrance = _unavailable_reason(config, device)
        if config.kernels == "cpp":
            if hindrance:
                raise InputError(f"--kernels cpp: {hindrance}: leave it out, or use --kernels torch")
            return cls(1, "--kernels cpp")
        if hindrance:
            return cls(None, hindrance)
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
    """The kernels of a run, compiled beside its first steps."""

    def __init__(self, switch: KernelSwitch, model: CausalLM) -> None:
        self._switch, self._model = switch, model
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
        """Let the model train with them if this step is to; waits for them. Raises NoKernels where there are none."""
        if self._switch.start_step is None or step < self._switch.start_step or self._result is self._model.kernels:
            return
        self._thread.join()
        if not isinstance(self._result, CppKernels):
            raise self._result or KernelsUnavailable("the compiler's thread died")
        self._model.set_kernels(self._result)
