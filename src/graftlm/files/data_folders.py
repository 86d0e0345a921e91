"""Folders that are data sets by themselves: those of `datasets.save_to_disk`, and those of class folders.

    saved/dataset_dict.json, saved/train/state.json, saved/train/data-00000-of-00001.arrow
    aclImdb/train/pos/0_9.txt, aclImdb/train/neg/0_2.txt

In class folders a text is a file, and its label the number of its folder's name among the names in order, as `datasets`
numbers them. Folders for texts without a label (aclImdb/train/unsup) are left out.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftlm.config.paths import read_text
from graftlm.errors import InputError

UNLABELLED = ("unsup", "unsupervised", "unlabeled", "unlabelled")
"""Names of folders whose texts have no label."""
TEXT = ".txt"


def saved_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that `save_to_disk` wrote, a single data set as train; {} for any other folder.

    Raises InputError for a file that is missing, and for an order of rows that is saved as a file of its own.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _saved_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise InputError(f"{folder / 'dataset_dict.json'}: names no splits: save the data set again")
        return {name: _saved_files(folder / name) for name in names}
    return {"train": _saved_files(folder)} if (folder / "state.json").is_file() else {}


def _saved_files(folder: Path) -> list[Path]:
    state = _saved_json(folder / "state.json")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in state.get("_data_files") or [None]]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{folder / 'state.json'}: names no files: save the data set again")
    if state.get("_indices_data_files"):
        raise InputError(f"{folder}: its rows are in another order: call flatten_indices() and save the data set again")
    files = [folder / str(name) for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"{folder}: {missing[0]}, which state.json names, is missing: copy it, or save the data again")
    return files


def _saved_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is not JSON: save the data set again") from None
    return content if isinstance(content, dict) else {}


def class_folders(folder: Path) -> list[Path]:
    """The folders of text files that are named after classes, in order; [] if there are not at least two."""
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.lower() not in UNLABELLED]
    found = [path for path in folders if any(path.glob(f"*{TEXT}"))]
    return found if len(found) > 1 else []


def class_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """The label number and the text files of each class."""
    for number, path in enumerate(class_folders(folder)):
        for file in sorted(path.glob(f"*{TEXT}")):
            yield number, file


def read_class_folders(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The source and fields of each text."""
    for number, file in class_files(folder):
        yield str(file), {"text": read_text(file), "label": number}


def check_classes(folders: list[Path]) -> None:
    """Raise InputError unless all splits have the same classes, or label numbers would differ."""
    names = [[path.name for path in class_folders(folder)] for folder in folders]
    for folder, own in zip(folders, names, strict=True):
        if own != names[0]:
            raise InputError(
                f"{folder}: its classes are {', '.join(own)}, those of {folders[0].name} are {', '.join(names[0])}: "
                "give both the same folders"
            )
