"""What a model folder says about where texts end, so that other programs stop where `graft generate` does."""

import shutil
from pathlib import Path
from typing import Any

from graftlm.exchange.huggingface import read_object
from graftlm.exchange.load import ModelBundle
from graftlm.files.atomic import write_json

GENERATION = "generation_config.json"


def write_generation_config(folder: Path, loaded: ModelBundle) -> dict[str, Any]:
    """The base's generation_config.json, with the model's ends; returns what export.json says.

    The file is a copy if it names these ends already.
    """
    source, ends = loaded.folder / GENERATION, loaded.eos_token_ids
    settings = read_object(source) if source.is_file() else {}
    named = settings.get("eos_token_id")
    named = named if isinstance(named, list) else [named]
    if all(end in named for end in ends) and all(end in ends for end in named):
        shutil.copyfile(source, folder / GENERATION)
    else:
        write_json(folder / GENERATION, {**settings, "eos_token_id": ends if len(ends) > 1 else ends[0]})
    return {"eos_token_id": ends, "ends_with": loaded.tokenizer.token(ends[0])}


def write_tokenizer(folder: Path, loaded: ModelBundle) -> None:
    """The tokenizer's files. After a run on conversations its eos_token is what ends turns, as in chat models.

    It is left as it is if the chat template writes it elsewhere too.
    """
    tokenizer = loaded.tokenizer
    tokenizer.save(folder)
    if not loaded.learned_chat or "eos_token" in (tokenizer.chat_template or ""):
        return
    name = tokenizer.token(loaded.eos_token_ids[0])
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        settings = read_object(path) if path.is_file() else {}
        was = settings.get("eos_token")
        if was is not None and name != (was.get("content") if isinstance(was, dict) else was):
            write_json(path, {**settings, "eos_token": name})
