"""Adapters to serve beside each other on a base that is loaded already: run folders, and adapter folders of any origin.

What is unusual here: the base's weights are hashed once for all of them, and every folder that knows its base's hash
(run folders, and what `graft export` wrote) is held to it.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from graftlm.errors import InputError
from graftlm.exchange.adapters import from_foreign_peft, read_adapter
from graftlm.exchange.huggingface import base_hash
from graftlm.exchange.import_adapter import check_hash, check_source
from graftlm.exchange.load import Loaded, check_base, read_run
from graftlm.methods import Method, method_from_json
from graftlm.methods.multi_lora import check_servable


def read_adapters(loaded: Loaded, folders: Mapping[str, Path]) -> dict[str, tuple[Method, dict[str, Tensor]]]:
    """By name: the method, and what it trained by our names; of a run its best checkpoint.

    Raises InputError for a folder that holds none, an adapter of another base, and a method that cannot be served so.
    """
    if not folders:
        return {}
    if loaded.run is not None:
        raise InputError(f"{loaded.name} is a run's model, adapted already; load the base itself for adapters")
    found, sha256 = {}, base_hash(loaded.folder)
    for name, folder in folders.items():
        found[name] = _run(name, folder, loaded, sha256) or _adapter(name, folder, loaded, sha256)
    return found


def _run(name: str, folder: Path, loaded: Loaded, sha256: str) -> tuple[Method, dict[str, Tensor]] | None:
    """A run folder's; None for a folder that is none."""
    if not (folder / "run.json").is_file():
        return None
    run = read_run(folder)
    method = method_from_json(run["method"])
    check_servable(name, method)
    check_base(loaded.folder, run, folder, sha256)
    best = folder / "best"
    if not best.is_dir():
        raise InputError(f"{best}: no such checkpoint; the run has not saved one yet, go on with graft train --resume")
    return method, read_adapter(best, loaded.model.config, method)


def _adapter(name: str, folder: Path, loaded: Loaded, sha256: str) -> tuple[Method, dict[str, Tensor]]:
    """An adapter folder's."""
    check_source(folder)
    check_hash(folder, sha256, loaded.name)
    method, state = from_foreign_peft(folder, loaded.model.config)
    check_servable(name, method)
    return method, state
