"""The files of each split of a data set: as its README.md names them for the hub, or by their names.

Split names and their places are those of `datasets`: train-00000-of-00002.parquet, reviews_dev.csv, test/a.jsonl.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from graftlm.errors import InputError
from graftlm.files.data_folders import TEXT, check_classes, class_folders, saved_splits
from graftlm.files.dataset_card import data_files
from graftlm.files.packed import data_stem, data_suffix
from graftlm.files.readers import DATA_CARD, SUFFIXES, is_data_file, splits_inside

SPLITS = ("train", "validation", "test")
_SPLIT_WORDS = {
    **{"train": "train", "training": "train"},
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""As `datasets` reads the names of files and folders; eval is validation if another file is test."""
_PART = re.compile(r"[-_](\d+)(-of-(\d+))?(-[0-9a-f]+)?$")  # train-00000-of-00002
NO_DATA = re.compile(r"readme.*|licen[cs]e.*|.*\.(md|py)|(graft|state|dataset_(dict|infos?))\.json", re.IGNORECASE)
MAX_NAMED = 8  # files that a note names


def files_by_split(path: Path, split: str) -> dict[str, list[Path]]:
    """The files of each split of a folder; a single file is of the split that is given, unless it holds several."""
    if path.is_dir():
        splits = _split_files(path)
        check_classes([folder for paths in splits.values() for folder in paths if folder.is_dir()])
        return splits
    inside = splits_inside(path)
    return {name: [path] for name in SPLITS if name in inside} or {split: [path]}


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split: those that the folder's card names, or by their names.

    They are in the folder, else in its data/, else in its only subfolder that has any.
    """
    if files := _saved_files(folder) or _card_files(folder) or _splits_in(folder):
        return files
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside = {path.name: splits for path in inner if (splits := _splits_in(path))}
    if "data" in inside or len(inside) == 1:
        return inside.get("data") or next(iter(inside.values()))
    if inside:
        raise InputError(
            f"{folder}: holds several data sets, {', '.join(inside)}: name one, as in NAME:{next(iter(inside))}"
        )
    if class_folders(folder):
        return {"train": [folder]}
    if unnamed := _unnamed_files(folder) or _unnamed_files(folder / "data"):
        return {"train": unnamed}
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise InputError(f"{folder}: no train, validation or test file ({SUFFIXES}) in this folder; it holds {names}")


def _saved_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split of a folder of `datasets.save_to_disk`; {} for any other folder."""
    found: dict[str, list[Path]] = {}
    for name, files in saved_splits(folder).items():
        if (split := _split_word(name)) in found:
            raise InputError(f"{folder}: several of its splits are {split}: name the folder of one")
        if split:
            found["test" if split == "eval" else split] = files
    return {split: found[split] for split in SPLITS if split in found}


def _unnamed_files(folder: Path) -> list[Path]:
    """The data files of a folder that names no splits: all are train. They must be of one format."""
    files = [path for path in (_data_files(folder) if folder.is_dir() else ()) if not NO_DATA.fullmatch(path.name)]
    if len({data_suffix(path) for path in files}) > 1:
        names = ", ".join(path.name for path in files[:MAX_NAMED])
        raise InputError(f"{folder}: its data files are of several formats, {names}: name one, or a split in each name")
    return files


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder, in the order of their names; text files only if there are no others."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and is_data_file(path)]
    return [path for path in files if data_suffix(path) != TEXT] or files


def _card_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split by the folder's card, and in the order of their names; {} if it names none."""
    found: dict[str, tuple[str, list[Path]]] = {}
    for name, patterns in data_files(folder).items():
        split = _SPLIT_WORDS.get(name.lower()) or _split_word(name)
        if not split:
            continue
        split = "test" if split == "eval" else split
        if split in found:
            raise InputError(
                f"{folder / DATA_CARD}: {found[split][0]} and {name} both say they are the {split} split: keep one"
            )
        matched = {path for pattern in patterns for path in folder.glob(pattern)}
        inner = {file for path in matched if path.is_dir() for file in path.rglob("*")}
        files = sorted(path for path in matched | inner if path.is_file() and is_data_file(path))
        if not files:
            raise InputError(
                f"{folder / DATA_CARD}: split {name}: {', '.join(patterns)} is no file that is read ({SUFFIXES})"
            )
        totals = {part[3] for path in files if (part := _PART.search(data_stem(path))) and part[3]}
        _check_parts(folder, split, files, totals.pop() if len(totals) == 1 else "")
        found[split] = name, files
    return {split: found[split][1] for split in SPLITS if split in found}


def _check_parts(folder: Path, split: str, files: Sequence[Path], total: str) -> None:
    """Raise InputError if fewer files are there than their names say."""
    if total.isdecimal() and len(files) != int(total):
        raise InputError(f"{folder}: split {split} has {len(files)} of its {int(total)} files: fetch the rest")


def _splits_in(folder: Path) -> dict[str, list[Path]]:
    """The files and folders named after a split. The parts of a split (train-00000-of-00002) must be complete."""
    sets: dict[str, dict[_FileSet, list[Path]]] = {}
    data = _data_files(folder)
    for path in sorted(folder.iterdir()):
        is_data = path in data
        is_folder = path.is_dir() and path.name.lower() in _SPLIT_WORDS
        name = path.name if is_folder else data_stem(path) if is_data else ""
        if (word := _split_word(name)) and (files := [path] if is_data else _files_of_split(path, word)):
            part = _PART.search(name) if is_data else None
            stem = name[: part.start()] if part else name
            total = (part[3] or "several") if part else "whole"
            sets.setdefault(word, {}).setdefault(_FileSet(stem, data_suffix(path), total), []).extend(files)
    if evaluation := sets.pop("eval", None):
        sets.setdefault("validation" if "test" in sets else "test", {}).update(evaluation)
    found = {}
    for split, every in sets.items():
        exact = {key: paths for key, paths in every.items() if key.stem.lower() in _SPLIT_WORDS}
        sets_of_split = exact or every
        if len(sets_of_split) > 1:
            names = " and ".join(str(paths[0].relative_to(folder)) for paths in sets_of_split.values())
            raise InputError(f"{folder}: {names} both say they are the {split} split: keep one")
        ((key, paths),) = sets_of_split.items()
        _check_parts(folder, split, paths, key.total)
        found[split] = paths
    return {split: found[split] for split in SPLITS if split in found}


class _FileSet(NamedTuple):
    """What the files of a split have in common."""

    stem: str
    suffix: str
    total: str
    """The number of parts; "several" if their names do not say it, "whole" for a file that is no part."""


def _split_word(name: str) -> str:
    """The split that a name without suffix speaks of, or "eval"; "" for none, and for several."""
    words = {word for word in re.findall(r"[^\W\d_]+", name.lower()) if word in _SPLIT_WORDS}
    found = {"eval" if word.startswith("eval") else _SPLIT_WORDS[word] for word in words}
    return found.pop() if len(found) == 1 else ""


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files of a folder named after a split, in which none is of another split."""
    if class_folders(folder):
        return [folder]
    inner, files = _splits_in(folder), _data_files(folder)
    return inner.get("test" if split == "eval" else split, []) if inner else files
