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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import GraftError
from graftlm.exchange.gguf_lora import check_is_lora, merge_lora_file, write_lora
from graftlm.exchange.gguf_plan import GGUFPlan
from graftlm.exchange.huggingface import EXPORT_JSON, load_model
from graftlm.exchange.llama_cpp import LlamaCpp, is_installed
from graftlm.exchange.load import ModelBundle
from graftlm.exchange.modelfile import modelfile
from graftlm.exchange.verify import TEXTS, ReferenceLogits
from graftlm.files.atomic import atomic_directory, atomic_write, write_json, write_text
from graftlm.files.formats import read_json
from graftlm.files.gguf import gguf_to_folder
from graftlm.files.gguf_tokenizer_writer import tokenizer_settings
from graftlm.methods import method_from_json
from graftlm.methods.base import PeftFolder, mergeable_linears
from graftlm.models import CausalLM
from graftlm.models.config import tensor_mapping, to_file

Say = Callable[[str], object]

GREEDY = 10
"""Tokens after each prompt that are compared."""
TOP = 50
"""Likeliest tokens whose log-probabilities are compared."""
LLAMA_CPP_SHARES = {"f32": 1e-3, "f16": 1e-2, "bf16": 2e-2}
"""The accepted difference of a log-probability in llama.cpp, as a share of the largest logit, by --quantization.

It rounds GELU to float16 in any file, and activations to the file's own 16 bits, or to 8 in quantised files."""
QUANTISED_SHARE = 0.05
CONTEXT = 512
"""Tokens that llama.cpp reserves memory for."""
MODEL = "model.gguf"


@dataclass(frozen=True)
class LlamaCppProof:
    """What llama.cpp made of a file, compared with the model that our reader found."""

    max_abs_logprob_diff: float
    tolerance: float
    equal_texts: int
    """Greedy continuations that are the same, of `texts`."""
    texts: int
    ended: int
    """Texts that llama.cpp ended by itself."""
    version: str


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

    def _write_file(self, path: Path, scratch: Path, reference: ReferenceLogits, say: Say) -> dict[str, Any]:
        """Write and compare a .gguf file; returns the part of the record about the comparisons."""
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
            say("llama.cpp was not asked: pip install xllamacpp, and it is compared too")
            return {"verification": verification.to_json(), "llama_cpp": None}
        say("comparing with llama.cpp")
        llama = LlamaCpp(model_file, CONTEXT + GREEDY, path if adapter else None)
        proof = self._ask(llama, model, kind, reference)
        if adapter:
            model_file.unlink()
        return {"verification": verification.to_json(), "llama_cpp": vars(proof)}

    def _ask(self, llama: LlamaCpp, model: CausalLM, kind: str, reference: ReferenceLogits) -> LlamaCppProof:
        """Compare llama.cpp's tokens, log-probabilities and greedy texts; GraftError if they are not the model's."""
        tokenizer, ends = self._loaded.tokenizer, {*self._loaded.eos_token_ids}
        for text in TEXTS:
            ids = tokenizer.encode_prompt(text)
            if (theirs := llama.tokens(text)) != ids:
                raise GraftError(
                    f"llama.cpp reads {text!r} as other tokens, {theirs} instead of {ids}; nothing was written"
                )
        shown, differences, equal, ended = tokenizer.encode(" a")[-1], [], 0, 0
        prompts = [list(ids[:CONTEXT]) for ids in reference.prompts]
        for ids in prompts:
            top, ours = llama.next_logprobs(ids, TOP, shown), _next_logprobs(model, ids)
            differences.append(max(abs(ours[index].item() - value) for index, value in top.items()))
            greedy, end = llama.greedy(ids, GREEDY)
            equal += [token for token in greedy if token not in ends] == _greedy(model, ids, ends)
            ended += end
        share = LLAMA_CPP_SHARES.get(kind, QUANTISED_SHARE)
        tolerance = max(1e-3, share * reference.largest)
        if not max(differences) <= tolerance:
            raise GraftError(
                f"export as {self._form}: in llama.cpp, log-probabilities differ by {max(differences):.1e}, more than "
                f"{tolerance:.1e}; nothing was written"
            )
        return LlamaCppProof(max(differences), tolerance, equal, len(prompts), ended, version("xllamacpp"))

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


@torch.inference_mode()
def _next_logprobs(model: CausalLM, ids: list[int]) -> Tensor:
    last = torch.tensor([len(ids) - 1])
    return model(torch.tensor([ids]), positions=last)[0].log_softmax(-1)


def _greedy(model: CausalLM, ids: list[int], ends: set[int]) -> list[int]:
    """The next GREEDY tokens at most, recomputed from the start for each."""
    found: list[int] = []
    while len(found) < GREEDY:
        token = int(_next_logprobs(model, [*ids, *found]).argmax())
        if token in ends:
            break
        found.append(token)
    return found


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
