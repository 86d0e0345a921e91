"""Flags of the subcommands that bring folders in and out: export, import and download."""

from dataclasses import dataclass
from typing import Literal

from graftlm.config.flags import Flags, require
from graftlm.config.training import Checkpoint
from graftlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Flags):
    """Write a run as a folder that PEFT or transformers loads, and verify that it is the same model."""

    out_dir: str = "graft-run"
    """The run folder to export."""
    to: str = ""
    """The folder to create; it must not exist, or be empty. Must be given."""
    merged: bool = False
    """Write a whole model with the update merged into its weights, instead of only the adapter."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights of a whole model; an adapter's are always float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.out_dir.strip()), "out_dir", repr(self.out_dir), "a folder's name")
        if not self.to.strip():
            raise InputError("--to: name the folder to create, as in --to my-model")


@dataclass(frozen=True, kw_only=True)
class ImportConfig(Flags):
    """Make a run folder from an adapter folder, PEFT's or graftlm's, and verify that it is the same model."""

    folder: str
    """The adapter folder."""
    out_dir: str = "graft-run"
    """The run folder to create; it must not exist, or be empty."""
    init_from: str = ""
    """The base model: a built-in name, a hub id, a local folder or a .gguf file. Default: the one the adapter names."""
    template: str = "sentiment"
    """The prompt template the adapter was trained with: a built-in name, a file, or a string with {text} in it."""
    labels: str = "negative,positive"
    """The label words, comma-separated, in the order of the label numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("folder", "out_dir"):
            require(bool(getattr(self, flag).strip()), flag, repr(getattr(self, flag)), "a folder's name")


@dataclass(frozen=True, kw_only=True)
class DownloadConfig(Flags):
    """Download a model or a data set and print its local folder."""

    name: str
    """The name of a model or a data set."""
