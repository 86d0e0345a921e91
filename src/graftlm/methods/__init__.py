"""Ways to adapt a model, one file each; `base.py` is the contract they keep."""

from graftlm.errors import InputError, unknown
from graftlm.methods.base import Method
from graftlm.methods.full import Full
from graftlm.methods.lora import LoRA

METHODS: dict[str, type[Method]] = {"lora": LoRA, "full": Full}

__all__ = ["METHODS", "Full", "LoRA", "Method", "method_from_flags", "method_from_json"]


def method_from_flags(name: str, *, rank: int | None, alpha: float | None, targets: str, lora_dropout: float) -> Method:
    """The method these flags describe; rank 0 is full fine-tuning."""
    if name not in METHODS:
        raise unknown("--method", name, METHODS)
    if name == "full" and rank:
        raise InputError(f"--method full takes no --rank {rank}: leave out --rank, or use --method lora")
    if name == "full" or rank == 0:
        return Full()
    roles = tuple(dict.fromkeys(t.strip() for t in targets.split(",") if t.strip()))
    return LoRA(
        rank=LoRA.rank if rank is None else rank,
        alpha=LoRA.alpha if alpha is None else alpha,
        targets=roles,
        dropout=lora_dropout,
    )


def method_from_json(data: dict) -> Method:
    """The method that `to_json` described."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "method"}
    return METHODS[data["method"]](**fields)
