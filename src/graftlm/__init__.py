"""graftlm: small, exact, comparable ways to adapt a pretrained language model. The command is `graft`.

    import graftlm

    loaded = graftlm.load("smollm2-135m")
    graftlm.generate(loaded.model, loaded.tokenizer, ["The film was"], max_new_tokens=20)

The public names are below. They are imported when they are first used (PEP 562), so that `import graftlm` costs
nothing; in particular it does not import torch, and it never changes a setting of the process.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "EvaluateConfig",
    "GenerateConfig",
    "GraftError",
    "InputError",
    "LoRALinear",
    "PairsConfig",
    "StopTraining",
    "TrainConfig",
    "__version__",
    "adapt",
    "compare",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "get_sentiment_prompt",
    "load",
    "make_preferences",
    "mark_only_lora_as_trainable",
    "predict_labels",
    "prepare",
    "report",
    "train",
]

_HOMES = {
    "EvaluateConfig": "config",
    "GenerateConfig": "config",
    "GraftError": "errors",
    "InputError": "errors",
    "LoRALinear": "methods.lora",
    "PairsConfig": "config",
    "StopTraining": "training.callbacks",
    "TrainConfig": "config",
    "adapt": "exchange.adapt",
    "compare": "library",
    "estimate": "library",
    "evaluate": "library",
    "export": "library",
    "generate": "library",
    "get_sentiment_prompt": "text.template",
    "load": "exchange.load",
    "make_preferences": "inference.pairs",
    "mark_only_lora_as_trainable": "methods.lora",
    "predict_labels": "inference.evaluate",
    "prepare": "library",
    "report": "library",
    "train": "library",
}

if TYPE_CHECKING:
    from graftlm.config import EvaluateConfig, GenerateConfig, PairsConfig, TrainConfig
    from graftlm.errors import GraftError, InputError
    from graftlm.exchange.adapt import adapt
    from graftlm.exchange.load import load
    from graftlm.inference.evaluate import predict_labels
    from graftlm.inference.pairs import make_preferences
    from graftlm.library import compare, estimate, evaluate, export, generate, prepare, report, train
    from graftlm.methods.lora import LoRALinear, mark_only_lora_as_trainable
    from graftlm.text.template import get_sentiment_prompt
    from graftlm.training.callbacks import StopTraining


def __getattr__(name: str) -> object:
    """Import a public name's module at the name's first use, and keep the name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, used or not."""
    return sorted(__all__)
