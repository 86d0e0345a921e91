"""The data files of each split, as the front matter of a data set's README.md names them for the hub.

    ---
    configs:
    - config_name: default
      data_files:
      - split: train
        path: data/train-*.parquet
    ---

Of several configurations the default one is read: that named default, or with `default: true`.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from graftlm.errors import InputError
from graftlm.files.readers import DATA_CARD

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)


def data_files(folder: Path) -> dict[str, list[str]]:
    """Patterns of paths by split name; {} if the card names no files, or no default configuration.

    Raises InputError for front matter that cannot be read, and for paths outside the folder.
    """
    card = folder / DATA_CARD
    text = card.read_bytes().decode(errors="replace").replace("\r\n", "\n") if card.is_file() else ""
    match = _FRONT_MATTER.match(text.removeprefix("\ufeff"))
    if match is None or not re.search(r"^configs[ \t]*:", match[1], re.MULTILINE):
        return {}
    configs = [config for config in _configs(match[1], str(card)) if config.get("data_files")]
    if len(configs) > 1:
        configs = [c for c in configs if c.get("default") is True or c.get("config_name") == "default"]
    if not configs:
        return {}
    found: dict[str, list[str]] = {}
    prefix = str(configs[0].get("data_dir") or "")
    for split, patterns in _by_split(configs[0]["data_files"], str(card)):
        for pattern in patterns:
            path = PurePosixPath(prefix, pattern)
            strange = not path.parts or any("**" in part and part != "**" for part in path.parts)
            if strange or "://" in pattern or path.is_absolute() or ".." in path.parts:
                raise InputError(
                    f"{card}: {pattern!r} of split {split} is not in this folder: name its file with --data"
                )
            found.setdefault(split, []).append(str(path))
    return found


def _configs(front_matter: str, where: str) -> list[Mapping[str, Any]]:
    import yaml

    try:
        content = yaml.safe_load(front_matter)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{where}: its front matter is no YAML ({line}): correct it, or name files with --data"
        ) from None
    configs = content.get("configs") if isinstance(content, dict) else None
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise InputError(f"{where}: configs must be a list of configurations: correct it, or name files with --data")
    return configs


def _by_split(files: Any, where: str) -> list[tuple[str, list[str]]]:
    """Split names and patterns, from `data_files`: a path, or several, or a list of split and path."""
    entries = files if isinstance(files, list) else [files]
    if all(isinstance(entry, str) for entry in entries):
        return [("train", entries)]
    found = []
    for entry in entries:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        paths = paths if isinstance(paths, list) else [paths]
        if not isinstance(split, str) or not all(isinstance(path, str) for path in paths):
            raise InputError(f"{where}: each of data_files needs split and path: correct it, or name files with --data")
        found.append((split, paths))
    return found
