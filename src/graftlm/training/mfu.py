"""What a run came to, beside what its plan said and what the machine could have done."""

from typing import Any

from graftlm.exchange.device import measure_matmul_flops
from graftlm.methods import Method
from graftlm.methods.cost_model import model_flops
from graftlm.models.base import CausalLM
from graftlm.training.checkpoint import TrainState
from graftlm.training.memory import peak_rss_mb


def format_estimate(plan: dict[str, Any]) -> str:
    """The plan of a run that is about to start, in a line."""
    return (
        f"plan: {plan['steps']:,} steps at about {plan['examples_per_s']:.1f} examples/s, {plan['minutes']:.1f} "
        f"minutes with validations, {plan['peak_rss_mb']:,.0f} MB"
    )


def compare_to_estimate(plan: dict[str, Any], examples_per_s: float, seconds: float) -> dict[str, dict[str, float]]:
    """What the plan said at the start of the run beside what came, and measured / planned."""
    pairs = {
        "examples_per_s": (plan["examples_per_s"], examples_per_s),
        "seconds": (plan["train_seconds"] + plan["validation_seconds"], seconds),
        "peak_rss_mb": (plan["peak_rss_mb"], peak_rss_mb()),
    }
    return {
        key: {"predicted": round(planned, 3), "measured": round(came, 3), "ratio": round(came / planned, 3)}
        for key, (planned, came) in pairs.items()
    }


def mfu(model: CausalLM, method: Method, progress: TrainState, *, below_kept: bool) -> dict[str, float]:
    """How much of what this machine multiplies at most the timed steps did of needed work; GFLOP/s of both."""
    cached = method.layer_range(model.config).start if below_kept else 0
    done = model_flops(model.config, progress.timed_model_tokens, method.passes(model.config, cached))
    speed = done / progress.timed_seconds if progress.timed_seconds else 0.0
    peak = measure_matmul_flops(model.device, model.dtype)
    return {
        "model_gflops_per_s": round(speed / 1e9, 1),
        "peak_gflops": round(peak / 1e9, 1),
        "mfu": round(speed / peak, 4),
    }


def parameter_counts(run: dict[str, Any]) -> dict[str, Any]:
    """What run.json says of the parameters: how many are trained, of how many."""
    trainable, total = run["trainable"], run["total"]
    return {"trainable": trainable, "total": total, "trainable_fraction": trainable / total}
