"""`graft export --format gguf`, `gguf-lora` and `ollama`: files for llama.cpp and Ollama, verified.

    gguf        the merged model, quantised as --quantization says
    gguf-lora   the adapter alone, for `llama-server --lora`; LoRA only
    ollama      a folder with the merged model and a Modelfile, for `ollama create`

Two comparisons are made before a file gets its name. Our reader loads the file, and its logits are compared with the
run's, whose update is not merged. llama.cpp, where the package xllamacpp is installed, loads it too: its tokens,
log-probabilities and greedy texts are compared with those of the model that our reader found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.exchange.gguf_lora import check_is_lora, merge_lora_file, write_lora
from graftlm.exchange.gguf_plan import GGUFPlan
from graftlm.exchange.huggingface import EXPORT_JSON, load_model
from graftlm.exchange.llama_cpp import CONTEXT, GREEDY, LlamaCpp, compare, is_installed, logprob_tolerance
from graftlm.exchange.load import ModelBundle
from graftlm.exchange.modelfile import modelfile
from graftlm.exchange.verify import ReferenceLogits
from graftlm.files.atomic import atomic_directory, atomic_write, write_json, write_text
from graftlm.files.formats import read_json
from graftlm.files.gguf import gguf_to_folder
from graftlm.files.gguf_tokenizer_writer import tokenizer_settings
from graftlm.methods import method_from_json
from graftlm.methods.base import PeftFolder, mergeable_linears
from graftlm.models import CausalLM
from graftlm.models.config import tensor_mapping, to_file

Say = Callable[[str], object]

MODEL = "model.gguf"


class GGUFExport:
    """A loaded run whose files for llama.cpp are about to be written.

    Raises InputError if llama.cpp has no architecture for the model or no such tokenizer, and for an adapter that it
    cannot add.
    """

    def __init__(self, loaded: ModelBundle, form: str, quantization: str) -> None:
        self._loaded, self._form, self._kind = loaded, form, quantization
        config, where = loaded.model.config, str(loaded.folder)
        shapes = {name: torch.empty(p.shape, device="meta") for name, p in self._base_parameters().items()}
        raw, tokenizer = read_json(loaded.folder / "config.json"), gguf_tokenizer(loaded)
        self._plan = GGUFPlan(config, raw, to_file(config, shapes), tokenizer, where)
        self._peft: PeftFolder | None = None
        if form == "gguf-lora":
            assert loaded.run is not None
            method = method_from_json(loaded.run["method"])
            self._peft = check_is_lora(method.for_inference.to_peft(loaded.model), method.name)
        self._modelfile = modelfile(loaded) if form == "ollama" else ""

    def write(self, target: Path, reference: ReferenceLogits, origin: dict[str, Any], say: Say) -> dict[str, Any]:
        """Write the file or folder `target` and its record, which is returned; they appear only after both comparisons.

        origin: the part of the record about the run. Raises GraftError beyond a tolerance; nothing is left then.
        """
        if self._form == "ollama":
            with atomic_directory(target) as folder:
                record = origin | self._write_file(folder / MODEL, folder, reference, say)
                write_text(folder / "Modelfile", self._modelfile)
                write_json(folder / EXPORT_JSON, record)
                return record
        with atomic_write(target) as file, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            record = origin | self._write_file(Path(file.name), Path(scratch), reference, say)
            write_json(record_path(target), record)
        return record

    @property
    def context(self) -> int:
        """Tokens of the longest text for which the file holds."""
        return self._plan.config.max_positions

    def _write_file(self, path: Path, scratch: Path, reference: ReferenceLogits, say: Say) -> dict[str, Any]:
        """Write and compare a .gguf file; returns the part of the record about the comparisons."""
        if self.context < self._loaded.model.max_seq_len:
            say(f"llama.cpp has no sliding windows in such a model: its context is one window, {self.context} tokens")
        adapter = self._peft is not None
        model_file = scratch / "base.gguf" if adapter else path
        if self._peft is not None:
            write_lora(path, self._plan, self._peft)
        else:
            for linear in mergeable_linears(self._loaded.model):
                linear.merge()
        state = to_file(self._loaded.model.config, self._base_parameters())
        self._plan.write(model_file, state, "f32" if adapter else self._kind)
        changed = merge_lora_file(path, self._plan, state) if adapter else {}
        del state
        model = _read_back(model_file, scratch, changed)
        action = f"export as {self._form}"
        kind = "f32" if adapter else self._kind
        verification = reference.verify(model, kind, action)
        if not is_installed():
            say("llama.cpp was not asked: the file is kept; pip install 'graftlm[llamacpp]' to have it compared, too")
            return {"verification": verification.to_json(), "llama_cpp": None}
        say("comparing with llama.cpp")
        llama = LlamaCpp(model_file, CONTEXT + GREEDY, path if adapter else None)
        tolerance = logprob_tolerance(kind, reference.largest)
        proof = compare(llama, model, self._loaded, reference.prompts, tolerance)
        if adapter:
            model_file.unlink()
        return {"verification": verification.to_json(), "llama_cpp": vars(proof)}

    def _base_parameters(self) -> dict[str, Tensor]:
        """The base's parameters, by our names."""
        model = self._loaded.model
        names = tensor_mapping(model.config)
        return {name: p.detach() for name, p in model.named_parameters() if name in names}


def record_path(target: Path) -> Path:
    """The record of a file that is no folder: `my-model.export.json` next to `my-model.gguf`."""
    return target.with_suffix(f".{EXPORT_JSON}")


def _read_back(path: Path, scratch: Path, changed: dict[str, Tensor]) -> CausalLM:
    """The model of a file, in float32, with some tensors replaced."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        gguf_to_folder(path, Path(folder))
        model = load_model(Path(folder), torch.device("cpu"), torch.float32)
    for name, mapping in tensor_mapping(model.config).items():
        if mapping.name in changed:
            model.get_parameter(name).data.copy_(mapping.read(changed[mapping.name]))
    return model


def gguf_tokenizer(loaded: ModelBundle) -> dict[str, Any]:
    """A model's settings `tokenizer.*`."""
    tokenizer, rows = loaded.tokenizer, loaded.model.config.vocab_size
    before, (first, *others) = tokenizer.encode_prompt(""), loaded.eos_token_ids
    named = {"eos": first, **({"eot": others[0]} if others else {}), **({"bos": before[0]} if before else {})}
    for name, key in (("bos", "bos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        if (index := tokenizer.token_id(tokenizer.named_tokens.get(key, ""))) is not None:
            named.setdefault(name, index)
    settings = tokenizer_settings(tokenizer.tokenizer_json(), rows, named, before)
    template = tokenizer.chat_template
    return settings | ({"tokenizer.chat_template": template} if template else {})
