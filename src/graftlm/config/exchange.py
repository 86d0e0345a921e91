"""Flags of the subcommands that bring folders in and out: export, import and download."""

from dataclasses import dataclass
from typing import Literal

from graftlm.config.flags import Flags, require
from graftlm.config.training import Checkpoint
from graftlm.errors import InputError

Format = Literal["peft", "merged", "gguf", "gguf-lora", "ollama"]
GGUF_FORMATS = ("gguf", "gguf-lora", "ollama")
"""Those of llama.cpp and Ollama."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Flags):
    """Write a run for PEFT, transformers, llama.cpp or Ollama, and verify that it is the same model."""

    out_dir: str = "graft-run"
    """The run folder to export."""
    to: str = ""
    """The folder to create, which must not exist or be empty; for gguf and gguf-lora the file. Must be given."""
    format: Format = "peft"
    """peft: the adapter; merged: a model with the update merged into its weights, for transformers; gguf: the same for
    llama.cpp; gguf-lora: the adapter for llama.cpp; ollama: a folder with a .gguf file and its Modelfile."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights of a whole model; an adapter's are always float32."""
    quantization: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "f16"
    """Type of the matrices in a model's .gguf file; below q8_0, embedding and head get q8_0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.out_dir.strip()), "out_dir", repr(self.out_dir), "a folder's name")
        if not self.to.strip():
            raise InputError("--to: name the folder to create, as in --to my-model")
        if self.format in ("gguf", "gguf-lora") and not self.to.lower().endswith(".gguf"):
            raise InputError(f"--to {self.to}: name the file to create, as in --to {self.to.rstrip('/')}.gguf")


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
