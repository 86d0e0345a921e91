"""What the front matter of a data set's README.md says for the hub: the files of its configurations, and label names.

    ---
    configs:
    - config_name: sst2
      data_files:
      - split: train
        path: sst2/train-*.parquet
      default: true
    dataset_info:
    - config_name: sst2
      features:
      - name: label
        dtype: {class_label: {names: {'0': negative, '1': positive}}}
    ---

As `datasets` reads them: `data_files` is a path, several, or a list of split and path; `data_dir` alone is a folder
whose files are found by their names; the default configuration is the only one, that named default, or the one with
`default: true`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from graftlm.errors import InputError
from graftlm.files.readers import DATA_CARD

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
_USED = re.compile(r"^(configs|dataset_info)[ \t]*:", re.MULTILINE)


class DataSource(NamedTuple):
    """What is read: a file or a folder, and what a name like `NAME:mnli:matched` chooses."""

    path: Path
    config: str = ""
    """A configuration of the card; "" for the default one."""
    kind: str = ""
    """A split, or what several splits have in their names: sft of train_sft and test_sft."""


@dataclass(frozen=True)
class Config:
    """A configuration of a data set."""

    data_dir: str = ""
    files: Mapping[str, list[str]] = field(default_factory=dict)
    """Patterns of paths by split name; none: its files are found by their names."""

    def patterns(self, kind: str = "") -> list[str]:
        """Patterns of its files, for a download; of a kind of splits, those of its splits and of plain ones."""
        splits = [name for name in self.files if kind.lower() in name.lower() or name.isalpha()]
        found = [pattern for split in splits for pattern in self.files[split]] or [self.data_dir]
        return [pattern.replace("**/", "*") for pattern in found]


@dataclass(frozen=True)
class Card:
    """The configurations of a data set, and the names of its labels."""

    configs: Mapping[str, Config]
    default: str | None
    """The name of the default configuration; None without one."""
    label_names: Mapping[str, Mapping[str, tuple[str, ...]]]
    """By configuration and column."""

    def config(self, name: str) -> Config | None:
        """A configuration, "" for the default one; None without one."""
        return self.configs.get(name or self.default or "")

    def names(self, config: str) -> Mapping[str, tuple[str, ...]]:
        """The names of labels by column, in a configuration or in the default one."""
        if len(self.label_names) == 1 and not config:
            return next(iter(self.label_names.values()))
        return self.label_names.get(config or self.default or "default", {})


def several_configs(name: object, names: Iterable[str]) -> InputError:
    """The error for a data set of which one must be chosen."""
    first, *others = names
    return InputError(f"{name}: holds several data sets, {', '.join((first, *others))}: name one, as in NAME:{first}")


def read_card(folder: Path) -> Card:
    """What README.md says; of a folder without one, nothing.

    Raises InputError for front matter that cannot be read, and for paths outside the folder.
    """
    card = folder / DATA_CARD
    text = card.read_bytes().decode(errors="replace").replace("\r\n", "\n") if card.is_file() else ""
    match = _FRONT_MATTER.match(text.removeprefix("\ufeff"))
    content = _front_matter(match[1], str(card)) if match and _USED.search(match[1]) else {}
    configs = content.get("configs") or []
    if not isinstance(configs, list) or not all(isinstance(config, dict) for config in configs):
        raise InputError(f"{card}: configs must be a list of configurations: correct it, or name files with --data")
    named = [config for config in configs if config.get("data_files") or config.get("data_dir")]
    found = {str(config.get("config_name") or "default"): _config(config, str(card)) for config in named}
    marked = [str(c.get("config_name")) for c in named if c.get("default") is True or c.get("config_name") == "default"]
    infos = content.get("dataset_info") or []
    return Card(
        found,
        next(iter(found if len(found) == 1 else marked), None),
        {
            str(info.get("config_name") or "default"): _label_names(info.get("features"))
            for info in (infos if isinstance(infos, list) else [infos])
            if isinstance(info, dict)
        },
    )


def _front_matter(text: str, where: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{where}: its front matter is no YAML ({line}): correct it, or name files with --data"
        ) from None
    return content if isinstance(content, dict) else {}


def _config(config: Mapping[str, Any], where: str) -> Config:
    data_dir = str(config.get("data_dir") or "")
    found: dict[str, list[str]] = {}
    for split, patterns in _by_split(config.get("data_files") or [], where):
        found.setdefault(split, []).extend(_inside(data_dir, pattern, split, where) for pattern in patterns)
    return Config(_inside("", data_dir, "train", where) if data_dir else "", found)


def _inside(data_dir: str, pattern: str, split: str, where: str) -> str:
    """The pattern of a path in the data set's folder. Raises InputError for any other."""
    path = PurePosixPath(data_dir, pattern)
    strange = not path.parts or any("**" in part and part != "**" for part in path.parts)
    if strange or "://" in pattern or path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}: {pattern!r} of split {split} is not in this folder: name its file with --data")
    return str(path)


def _by_split(files: Any, where: str) -> list[tuple[str, list[str]]]:
    """Split names and patterns, from `data_files`: a path, or several, or a list of split and path."""
    entries = files if isinstance(files, list) else [files]
    if all(isinstance(entry, str) for entry in entries):
        return [("train", entries)] if entries else []
    found = []
    for entry in entries:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        paths = paths if isinstance(paths, list) else [paths]
        if not isinstance(split, str) or not all(isinstance(path, str) for path in paths):
            raise InputError(f"{where}: each of data_files needs split and path: correct it, or name files with --data")
        found.append((split, paths))
    return found


def _label_names(features: Any) -> dict[str, tuple[str, ...]]:
    """The names of labels by column; features that are written in another way have none."""
    found = {}
    for feature in features if isinstance(features, list) else []:
        names: Any = feature
        for key in ("dtype", "class_label", "names"):
            names = names.get(key) if isinstance(names, dict) else None
        if isinstance(names, dict) and list(map(str, names)) == list(map(str, range(len(names)))):
            found[str(feature.get("name"))] = tuple(map(str, names.values()))
    return found
