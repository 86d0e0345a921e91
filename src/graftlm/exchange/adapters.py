"""Adapter folders: PEFT's two files where PEFT knows the method, our own two where it does not.

    adapter_config.json   adapter_model.safetensors      PEFT's (LoRA, DoRA, prefix tuning, IA3)
    graft_adapter.json    graft_adapter.safetensors      ours (BitFit, bottleneck adapters): {"format": 1, "method":
                                                         {"method": name, its fields}, "base_model_name_or_path",
                                                         "revision"}, and the trained tensors by our names

Reading is strict: exactly the tensors and the settings that the method says, or an error that names what differs.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from graftlm.errors import InputError
from graftlm.files.atomic import write_json
from graftlm.files.formats import load_safetensors, read_json, save_safetensors
from graftlm.methods import METHODS, Method, method_from_json
from graftlm.methods.base import PeftFolder, trainable_state_dict
from graftlm.models.base import CausalLM
from graftlm.models.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_CONFIG, OWN_WEIGHTS = "graft_adapter.json", "graft_adapter.safetensors"
FORMAT_VERSION = 1


def save_adapter(folder: Path, model: CausalLM, method: Method, base: str, revision: str | None = None) -> str:
    """Write what `method` trained in `model` into an existing folder; returns the format, "peft" or "graft".

    `base` is a hub id or a folder.
    """
    about = {"base_model_name_or_path": base, "revision": revision}
    if (as_peft := method.to_peft(model)) is not None:
        config, tensors = as_peft
        save_safetensors(folder / WEIGHTS, {name: t.contiguous() for name, t in tensors.items()})
        write_json(folder / CONFIG, {**config, **about})
        return "peft"
    save_safetensors(folder / OWN_WEIGHTS, trainable_state_dict(model))
    write_json(folder / OWN_CONFIG, {"format": FORMAT_VERSION, "method": method.to_json(), **about})
    return "graft"


def read_adapter(folder: Path, shape: ModelConfig, method: Method) -> dict[str, Tensor]:
    """The trained tensors, by our names, out of a folder that `save_adapter` wrote with this method."""
    if (folder / OWN_CONFIG).is_file():
        config = _object(folder / OWN_CONFIG)
        said, expected = config.get("method"), method.to_json()
        if config.get("format") != FORMAT_VERSION or not isinstance(said, dict):
            raise InputError(
                f"{folder / OWN_CONFIG}: is no adapter of format {FORMAT_VERSION}; use the folder as it was written"
            )
        for key in sorted(expected.keys() | said.keys()):
            value = expected.get(key)
            if said.get(key) != (list(value) if isinstance(value, tuple) else value):
                raise InputError(f"{folder / OWN_CONFIG}: {key} is {said.get(key)!r}, the run says {value!r}")
        return load_safetensors(folder / OWN_WEIGHTS)
    return method.from_peft(shape, read_peft(folder), str(folder / CONFIG))


def read_peft(folder: Path) -> PeftFolder:
    """The two files of a PEFT folder; an InputError where there is none."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: holds no adapter (no {CONFIG})")
    return _object(folder / CONFIG), load_safetensors(folder / WEIGHTS)


def from_foreign_peft(folder: Path, shape: ModelConfig) -> tuple[Method, dict[str, Tensor]]:
    """The method and the trained tensors of any adapter folder; an InputError names what is not understood."""
    if (folder / OWN_CONFIG).is_file():
        method = method_from_json(_object(folder / OWN_CONFIG).get("method"), str(folder / OWN_CONFIG))
        return method, read_adapter(folder, shape, method)
    as_peft, where = read_peft(folder), str(folder / CONFIG)
    for kind in METHODS.values():
        if (found := kind.from_foreign_peft(shape, as_peft, where)) is not None:
            return found
    known = sorted({kind.peft_type for kind in METHODS.values() if kind.peft_type})
    raise InputError(f"{where}: peft_type {as_peft[0].get('peft_type')!r} is not supported; {', '.join(known)} are")


def config_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The config of an adapter folder of either format, and its path; an InputError where there is none."""
    path = next((folder / name for name in (OWN_CONFIG, CONFIG) if (folder / name).is_file()), None)
    if path is None:
        raise InputError(f"{folder}: holds no adapter (neither {CONFIG} nor {OWN_CONFIG})")
    return path, _object(path)


def _object(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no JSON object; use the folder as it was written")
    return config
