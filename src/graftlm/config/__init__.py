"""What a user can set: one frozen dataclass a verb, one documented field a flag.

The string under a field is its help text on the command line and its entry in the reference.
A default of None means "decided by the method or the run"; `run.json` records what was decided.
A file for each room of verbs; import the names from here. No torch here: `graft --help` must answer at once.
"""

from graftlm.config.common import Checkpoint, DemoSelection, Device, Dtype, LossType, MethodFlags, RayFlags, Style
from graftlm.config.exchange import ExportConfig, FetchConfig, ImportConfig
from graftlm.config.inference import EvaluateConfig, GenerateConfig, PreferConfig, PromptConfig
from graftlm.config.serving import ServeConfig, check_key
from graftlm.config.studies import AccountConfig, CompareConfig, ReportConfig
from graftlm.config.training import TrainConfig

__all__ = [
    "AccountConfig",
    "Checkpoint",
    "CompareConfig",
    "DemoSelection",
    "Device",
    "Dtype",
    "EvaluateConfig",
    "ExportConfig",
    "FetchConfig",
    "GenerateConfig",
    "ImportConfig",
    "LossType",
    "MethodFlags",
    "PreferConfig",
    "PromptConfig",
    "RayFlags",
    "ReportConfig",
    "ServeConfig",
    "Style",
    "TrainConfig",
    "check_key",
]
