"""Load a model, or a run, by name: model, tokenizer and template, ready to use.

    load("smollm2-135m")                         a pretrained model
    load("runs/demo")                            the same model, adapted by a run
    load("runs/demo", checkpoint="base")         the run's base, to be asked as the run is

A run is loaded only onto the base it was trained on: the sha256 of the weights must be the same. Device and dtype are
each chosen with a reason, because both change what a run costs.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.config.paths import split_choices, user_path
from graftlm.errors import InputError
from graftlm.exchange.base_format import choose_format, dense_hash, dequantize_base
from graftlm.exchange.huggingface import (
    EXPORT_JSON,
    apply_adapter,
    base_hash,
    check_exported_base,
    check_no_adapter,
    check_source,
    from_foreign_peft,
    load_model,
    read_adapter,
    read_object,
)
from graftlm.exchange.runs import RunCheckpoint, base_name, checkpoint_folder, find_run, format_of_run, read_run
from graftlm.files.assets import model_folder
from graftlm.files.formats import read_json
from graftlm.methods import Method, method_from_json
from graftlm.methods.base import mergeable_linears
from graftlm.methods.multi_lora import check_servable
from graftlm.models import CausalLM, clone_with_shared_weights
from graftlm.models.config import ModelConfig, read_model_config
from graftlm.text.chat import Chat
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelBundle:
    """A model ready for inference, with its tokenizer and origin."""

    model: CausalLM
    tokenizer: Tokenizer
    name: str
    """The base model's name."""
    folder: Path
    """The base model's files."""
    dtype_reason: str
    """Why the model computes in its dtype."""
    template: Template | None = None
    """The run's template; None for a model without a run."""
    run: dict[str, Any] | None = None
    """The run's run.json; None for a model without a run."""
    source: RunCheckpoint | None = None
    """The run and its checkpoint; None for a model without a run."""
    base_format: str = "dense"
    """How the base's weights are kept (`base_format.py`)."""

    @property
    def learned_chat(self) -> bool:
        """Whether it was adapted by a run on conversations."""
        return self.run is not None and bool(self.run["data"].get("chat"))

    def chat(self, flag: str = "auto") -> Chat | None:
        """The chat template that --chat FLAG asks the model in; None for plain text.

        auto: if it was tuned on the template: a run on conversations, or a base that is tuned for chat. Raises
        InputError for "on" without a template.
        """
        if flag == "on" and self.tokenizer.chat_template is None:
            raise InputError(f"--chat on: {self.name} has no chat template; use --chat off")
        if flag == "auto":
            tuned = is_chat_tuned(self.folder, self.tokenizer) if self.run is None else self.learned_chat
            flag = "on" if tuned and self.tokenizer.chat_template is not None else "off"
        return Chat(self.tokenizer) if flag == "on" else None

    @property
    def learned_labels(self) -> bool:
        """Whether it was adapted by a run on texts with labels: only of those an accuracy is measured."""
        results = [] if self.run is None else (self.run.get("results") or {}).values()
        measured = [point["val_accuracy"] for point in results if isinstance(point, dict) and "val_accuracy" in point]
        return self.run is not None and (not measured or any(accuracy is not None for accuracy in measured))

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end what it generates; the first is the one that the run taught."""
        tokenizer = self.tokenizer
        chat = self.learned_chat and tokenizer.chat_template is not None
        learned = Chat(tokenizer).turn_end if chat else tokenizer.eot
        return list(dict.fromkeys([learned, tokenizer.eot, *sorted(tokenizer.stop_tokens)]))


def load(
    init_from: str,
    out_dir: str | Path | None = None,
    checkpoint: str = "best",
    device: str = "auto",
    dtype: str = "auto",
    base_format: str = "auto",
    base: ModelBundle | None = None,
) -> ModelBundle:
    """Load a model by name, or the model that a run adapted: init_from is its folder, or "resume" for `out_dir`.

    checkpoint: "best", "last", or "base" for the run's base with the run's template. base_format: as the flag; auto
    loads a run in the format in which it was trained, a base as it is stored (on a CPU in float32, else as training
    does). With `base`, a loaded model, the new model shares its tensors: several adapters of one base take about the
    memory of a single one. Device, dtype and format are then the base's.

    Raises InputError for an unknown name or device, a folder without a run or checkpoint, and a base whose weights
    are not those the run was trained on.
    """
    run = find_run(init_from, out_dir, checkpoint)
    if run is None:
        return load_base(init_from, device, dtype, base_format)
    return _load_run(run, device, dtype, base_format, base)


def load_base(name: str, device: str = "auto", dtype: str = "auto", base_format: str = "auto") -> ModelBundle:
    """Load a model to adapt, as `load` does; of a run only if it trained all weights (`base_name`)."""
    name = base_name(name)
    target = pick_device(device)
    compute_dtype, reason = pick_dtype(dtype, target)
    base_format = choose_format(base_format, name, target, compute_dtype, inference=True)
    folder = model_folder(name, packed=base_format == "stored")
    check_no_adapter(folder)
    model = load_model(folder, target, compute_dtype, base_format)
    return ModelBundle(model, read_tokenizer(folder), name, folder, reason, base_format=base_format)


def _load_run(
    source: RunCheckpoint, device: str, dtype: str, base_format: str, base: ModelBundle | None
) -> ModelBundle:
    """The model of a run's checkpoint; with `base`, on that loaded model, and with its device and dtype."""
    if base is not None:
        device, dtype = str(base.model.device), str(base.model.dtype).removeprefix("torch.")
    target = pick_device(device)
    compute_dtype, reason = pick_dtype(dtype, target)
    run, run_dir, name = source.record, source.folder, source.record["base"]["name"]
    kept, asked = _formats(base_format, run, run_dir)
    folder = model_folder(name, packed=kept == "stored") if base is None or base.name != name else base.folder
    check_base(folder, run, run_dir)
    method = method_from_json(run["method"])
    if base is None:
        model = load_checkpoint(source.path, folder, method, target, compute_dtype, (kept, asked == "dense"))
    elif base.folder == folder and base.run is None and source.path is not None:
        model = adapter_on_shared_base(base.model, source.path, method)
    else:
        raise InputError(f"{run_dir}: is an adapter of {name}; load that model and pass it as base")
    tokenizer, template = read_tokenizer(folder), Template.of_run(run)
    loaded = ModelBundle(model, tokenizer, name, folder, reason, template, run, source, asked)
    loaded.tokenizer.date = run.get("date")
    loaded.tokenizer.stop_tokens |= {*loaded.eos_token_ids}  # also in plain text
    return loaded


def _formats(flag: str, run: dict[str, Any], run_dir: Path) -> tuple[str, str]:
    """The format in which a run's base is loaded, and the one in which it is kept: that, or dense."""
    trained = format_of_run(run)
    asked = trained if flag == "auto" else flag
    if asked == trained or asked == "dense":
        return trained, asked
    if trained == "dense" and asked == "stored":  # the same numbers
        return asked, asked
    raise InputError(f"--base_format {flag}: {run_dir} was trained with {trained}; use that, or dense")


def learned_chat(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether the adapter of a folder was trained on conversations. tokenizer: its base's.

    run.json or export.json says so; or the folder has a tokenizer of its own, as TRL writes it, that ends texts where
    the chat template ends turns, and the base's tokenizer does not.
    """
    for name in ("run.json", EXPORT_JSON):
        if (folder / name).is_file():
            data = read_object(folder / name).get("data")
            return isinstance(data, dict) and bool(data.get("chat"))
    if tokenizer.chat_template is None or not (folder / "tokenizer.json").is_file():
        return False
    ends = Chat(tokenizer).stop_tokens - tokenizer.stop_tokens
    return not ends.isdisjoint(Tokenizer.from_folder(folder).stop_tokens)


def is_chat_tuned(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a base was tuned on its chat template, rather than only given one, as some pretrained models are.

    An export says so; any other base ends its texts with the token that ends the template's turns.
    """
    if tokenizer.chat_template is None:
        return False
    if (folder / EXPORT_JSON).is_file():
        return learned_chat(folder, tokenizer)
    try:
        return Chat(tokenizer).turn_end in tokenizer.stop_tokens
    except InputError:  # a broken template
        return False


def adapter_notes(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """Notes on an adapter folder of other origin: that it changes nothing, or has another tokenizer than its base.

    config, tokenizer: the base's.
    """
    notes, untrained = [], {"lora_B": 0.0, "stretch": 1.0}
    state = from_foreign_peft(folder, config)[1]
    known = [(t, untrained[kind]) for name, t in state.items() if (kind := name.rpartition(".")[2]) in untrained]
    if known and all(bool((t == value).all()) for t, value in known):
        notes.append(f"{folder}: changes nothing: its weights are those from before any training")
    if not (folder / "tokenizer.json").is_file():
        return notes
    own, use = Tokenizer.from_folder(folder), "the base's is used; to use it, copy it into the base's folder"
    if own.chat_template is not None and own.chat_template.strip() != (tokenizer.chat_template or "").strip():
        notes.append(f"{folder}: its chat template is another one than the base's: {use}")
    if other := sorted(own.added_tokens.items() - tokenizer.added_tokens.items()):
        notes.append(f"{folder}: its tokenizer has tokens that the base's lacks, such as {other[0][0]}: {use}")
    return notes


def resolve_path(name: str) -> str:
    """A name for run.json: a local path made absolute, so that the run can be loaded from any folder."""
    whole, choices = split_choices(name)
    path = user_path(whole)
    return ":".join([str(path.resolve()), *choices]) if whole and path.exists() else name


def hub_revision(name: str) -> tuple[str, str | None]:
    """A base model's name without its @revision, and the revision; a local path has none."""
    repo, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    return repo, revision or None


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a model folder, of which no weights are read."""
    path = folder / "config.json"
    return read_model_config(read_json(path), str(path))


def read_tokenizer(folder: Path) -> Tokenizer:
    """A model folder's tokenizer; an InputError if it has tokens without an embedding in the model."""
    tokenizer, vocab = Tokenizer.from_folder(folder), read_config(folder).vocab_size
    if tokenizer.largest >= vocab:
        raise InputError(
            f"{folder}: its tokenizer has a token {tokenizer.largest}, its model embeds {vocab}: the files are of two "
            "models; fetch them again"
        )
    return tokenizer


def check_base(folder: Path, run: dict[str, Any], run_dir: Path, sha256: str = "") -> None:
    """An InputError if the weights in `folder` (with this hash, if it is known) are not those `run` was trained on.

    Packed ones may be those that it was trained on after they were dequantised.
    """
    sha256, expected = sha256 or base_hash(folder), run["base"]["sha256"]
    if sha256 != expected and dense_hash(folder) != expected:
        raise InputError(
            f"{run_dir}: was trained on {run['base']['name']} with weights {run['base']['sha256'][:12]}, "
            f"but {folder} holds {sha256[:12]}; use the base it was trained on"
        )


def load_checkpoint(
    checkpoint: Path | None,
    base: Path,
    method: Method,
    device: torch.device,
    dtype: torch.dtype,
    base_format: tuple[str, bool] = ("dense", False),
) -> CausalLM:
    """The model of a checkpoint folder, in evaluation mode, with its update merged if method and base allow.

    checkpoint: None for the base. base_format: the base's, and whether it is dequantised.
    """
    if checkpoint is not None and method.is_full_finetune:
        return load_model(checkpoint, device, dtype)
    model = load_model(base, device, dtype, base_format[0])
    if base_format[1]:
        dequantize_base(model)
    if checkpoint is None:
        return model
    model = _apply_checkpoint(model, checkpoint, method)
    for linear in mergeable_linears(model):
        linear.merge_on_eval = True
    return model.eval()


def adapter_on_shared_base(base: CausalLM, checkpoint: Path, method: Method) -> CausalLM:
    """An adapted model, in evaluation mode, that shares the tensors of `base`, which does not change."""
    if method.is_full_finetune:
        raise InputError(f"{checkpoint}: full fine-tuning trained the base's own weights; load it on its own")
    return _apply_checkpoint(clone_with_shared_weights(base), checkpoint, method)


def _apply_checkpoint(model: CausalLM, checkpoint: Path, method: Method) -> CausalLM:
    method = method.for_inference
    return apply_adapter(model, method, read_adapter(checkpoint, model.config, method), str(checkpoint))


def load_foreign_adapter(
    base: Path, adapter: Path, dtype: torch.dtype, base_format: str = "dense"
) -> tuple[CausalLM, Method]:
    """A base on the CPU with an adapter folder of any origin, not merged, and the adapter's method."""
    model = load_model(base, torch.device("cpu"), dtype, base_format)
    method, state = from_foreign_peft(adapter, model.config)
    return apply_adapter(model, method, state, str(adapter)), method


def read_adapters(loaded: ModelBundle, folders: Mapping[str, Path]) -> dict[str, tuple[Method, dict[str, Tensor]]]:
    """Adapters to serve together on a loaded base: name -> the method and its trained tensors by our names.

    A folder is a run, whose best checkpoint is read, or an adapter of any origin. The base's weights are hashed once
    and compared with the hash in each folder that has one. Raises InputError for a folder without an adapter, an
    adapter of another base, and a method that cannot be served so.
    """
    if not folders:
        return {}
    if loaded.run is not None:
        raise InputError(f"{loaded.name} is a run's model, adapted already; load the base itself for adapters")
    adapters, sha256, config = {}, base_hash(loaded.folder), loaded.model.config
    for name, folder in folders.items():
        if (folder / "run.json").is_file():
            run = read_run(folder)
            method = method_from_json(run["method"])
            check_servable(name, method)
            check_base(loaded.folder, run, folder, sha256)
            adapters[name] = method, read_adapter(checkpoint_folder(folder, "best"), config, method)
        else:
            check_source(folder)
            check_exported_base(folder, loaded.folder, sha256, loaded.name)
            adapters[name] = from_foreign_peft(folder, config)
            check_servable(name, adapters[name][0])
    return adapters


# --------------------------------------------------------------------------------------------- device and dtype


def pick_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda, cuda:N or mps; an InputError if this machine does not have it."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(device for device, count in counts.items() if count))
    device, _, number = name.partition(":")
    if device not in counts or (number and not (device == "cuda" and number.isdigit())):
        raise InputError(f"unknown --device {name!r}: known are auto, cpu, cuda, cuda:N, mps")
    count = counts[device]
    if int(number or 0) >= count:
        raise InputError(f"--device {name}: this machine has {count or 'no'} {device} device(s); use --device auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of base and computation, and why; `auto` takes bfloat16 only if the hardware multiplies it faster."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"unknown --dtype {name!r}: known are auto, {', '.join(DTYPES)}")
        return DTYPES[name], "asked for"
    if device.type == "cuda":
        # Without including_emulation=False a T4, which has no bfloat16, would count.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bfloat16 natively"
        return torch.float16, "this GPU has no native bfloat16; its loss is scaled"
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if not any(flags.get(flag) for flag in ("amx_bf16", "amx_tile", "avx512_bf16")):
            return torch.float32, "this processor has no native bfloat16"
        # The instructions are not enough: some processors with avx512_bf16 multiply float32 twice as fast.
        gain = _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)
        if gain >= 1:
            return torch.bfloat16, f"this processor multiplies it {gain:.1f} times as fast as float32"
        return torch.float32, f"this processor multiplies it {1 / gain:.1f} times as fast as bfloat16"
    return torch.float32, f"bfloat16 is not relied on for {device.type}"


SLOW = 0.01
"""Seconds of a 256 x 256 matrix product (3 GFLOP/s) above which no larger one is measured."""


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, width: int = 1024) -> float:
    """The best measured FLOP/s of square matrix products, a bound for this device and dtype.

    If the device emulates the dtype (any CPU float16, some bfloat16), small products show as much, and sooner.
    """
    small = _matmul_seconds(dtype, width // 4, tries=2, device=device)
    if small > SLOW:
        return 2 * (width // 4) ** 3 / small
    return 2 * width**3 / _matmul_seconds(dtype, width, tries=10, device=device)


@cache
def _matmul_seconds(dtype: torch.dtype, width: int = 512, tries: int = 5, device: torch.device | str = "cpu") -> float:
    """Wall seconds of a square matrix product: the shortest after one to warm up. Measured once per process."""
    x = torch.ones(width, width, dtype=dtype, device=device)
    seconds = []
    for _ in range(tries + 1):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        x @ x
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def to_float64(t: torch.Tensor) -> torch.Tensor:
    """In float64, for long sums; on the CPU if the device has no float64 (Apple's MPS)."""
    return (t.cpu() if t.device.type == "mps" else t).double()
