"""What a user can set: one frozen dataclass per subcommand, one documented field per flag.

The docstring below a field is its help text on the command line and its entry in the reference. A default of None means
that the method or the run decides; `run.json` records the decision. Import the configs from here. This package does not
import torch, so that `graft --help` answers at once.
"""

from graftlm.config.exchange import DownloadConfig, ExportConfig, ImportConfig
from graftlm.config.inference import ChatConfig, EvaluateConfig, GenerateConfig, PairsConfig, PromptConfig
from graftlm.config.serving import ServeConfig
from graftlm.config.studies import CompareConfig, CompletionConfig, DataConfig, EstimateConfig, ReportConfig
from graftlm.config.training import TrainConfig

__all__ = [
    "ChatConfig",
    "CompareConfig",
    "CompletionConfig",
    "DataConfig",
    "DownloadConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "ImportConfig",
    "PairsConfig",
    "PromptConfig",
    "ReportConfig",
    "ServeConfig",
    "TrainConfig",
]
