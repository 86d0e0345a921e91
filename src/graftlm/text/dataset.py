"""Files -> canonical records by split (`layouts.py`), and a fingerprint of them.

A split that the data does not name is held out by a hash of the text, so that no text is in two splits.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftlm.errors import InputError
from graftlm.files.assets import data_folder
from graftlm.files.formats import read_json
from graftlm.files.readers import DATA_READERS, read_records
from graftlm.text.layouts import (
    Document,
    LabelWords,
    Layout,
    Record,
    Row,
    check_columns,
    hashed_values,
    missing_column,
    recognise,
)

SPLITS = ("train", "validation", "test")
NO_LABELS = LabelWords()
_SYNONYMS = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}
_NAMES = "|".join((*SPLITS, *_SYNONYMS))
_STEM = re.compile(rf"({_NAMES})([-_](\d+)(-of-(\d+))?(-[0-9a-f]+)?)?", re.IGNORECASE)  # train-00000-of-00002


@dataclass(frozen=True)
class Dataset:
    """Records by split."""

    name: str
    splits: dict[str, list[Record]]
    notes: list[str]
    """What was decided for the user: the layout, held-out splits."""
    fingerprint: str
    """See `fingerprint`."""


def load_dataset(
    data: str,
    val: str = "",
    test: str = "",
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] = (),
) -> Dataset:
    """Read a data set.

    Args:
        data: a built-in name, a hub name, a local folder or file (`files.assets.data_folder`).
        val, test: files with these splits, in addition to `data`.
        columns: the column of the files by key of the layout ("text", "label", "prompt", …), where they differ.
        labels: the label words by label number. A label in the data is one of them in any case, or a number from 0
            on; without words, any number.

    A data set with a train split always gets a validation split: if it is missing, a tenth of train is held out by
    hash, and so is a test split if neither is named. Raises InputError with file, line and value.
    """
    check_columns(columns or {})
    path = data_folder(data)
    files = _split_files(path) if path.is_dir() else {"train": [path]}
    for split, flag, file in (("validation", "val_data", val), ("test", "test_data", test)):
        if not file:
            continue
        if split in files:
            raise InputError(f"--{flag} {file}: {path} has a {split} split already, {files[split][0].name}")
        files[split] = [Path(file).expanduser()]
        if not files[split][0].is_file():
            raise InputError(f"--{flag} {file}: no such file")
    label_words = LabelWords(tuple(labels))
    layouts: dict[Layout, None] = {}
    splits = {}
    for split in SPLITS:
        if split in files:
            layout, splits[split] = _read_split(files[split], columns or {}, label_words)
            layouts[layout] = None
    notes = _derived_note(path, data)
    if "train" in splits and "validation" not in splits:
        missing = ("validation",) if "test" in splits else ("validation", "test")
        splits = _hold_out(splits, missing, str(path))
        sizes = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
        notes.append(
            f"{data} names no {' or '.join(missing)} split: held out from train by hash of the text ({sizes} rows)"
        )
    notes.append(f"{data}: read as {' and '.join(map(str, layouts))}")
    return Dataset(data, splits, notes, fingerprint(splits))


def load_prompts(
    data: str, split: str = "train", opening: int = 0, columns: Mapping[str, str] | None = None
) -> list[Document]:
    """The prompts of a data set.

    Args:
        data: as in `load_dataset`. `split` is read of a folder; a single file is read whole.
        opening: 0: the column "prompt". N: the first N words of the text (a shorter text as a whole).

    Raises InputError with file, line and value.
    """
    check_columns(columns or {})
    path = data_folder(data)
    files = _split_files(path) if path.is_dir() else {split: [path]}
    if split not in files:
        raise InputError(f"--split {split}: {data} has no such split; it has {', '.join(files)}")
    first_words = re.compile(rf"(?:\S+\s+){{0,{max(opening - 1, 0)}}}\S+")
    prompts = []
    for file in files[split]:
        for row in _rows(file, columns or {}):
            prompt = row.text("text" if opening else _prompt_column(row))
            match = first_words.search(prompt) if opening else None
            prompts.append(Document(prompt if match is None else match[0], row.source))
    return prompts


def _prompt_column(row: Row) -> str:
    if "prompt" in row.columns:
        return "prompt"
    names = ", ".join(map(str, row.columns)) or "none"
    hint = ": make prompts of the texts' first words with --prompt_words 8" if "text" in row.columns else ""
    raise row.error(f"no field 'prompt' (the fields are {names}){hint}")


def fingerprint(splits: Mapping[str, Iterable[Record]]) -> str:
    """sha256 over the names of splits and the records' values in order. Paths and file formats do not change it."""
    digest = hashlib.sha256()
    for split, records in splits.items():
        for record in records:
            digest.update(json.dumps([split, *hashed_values(record)]).encode() + b"\n")
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """sha256 of a text: orders subsets and splits independently of the data's order and labels."""
    return hashlib.sha256(text.encode()).hexdigest()


# Rows -----------------------------------------------------------------------------------------------------------------


def _read_split(files: Sequence[Path], columns: Mapping[str, str], labels: LabelWords) -> tuple[Layout, list[Record]]:
    """The records of a split's files, and their layout, which each file's first row decides and which must be one."""
    records: list[Record] = []
    layouts: list[Layout] = []
    for path in files:
        for number, row in enumerate(_rows(path, columns, labels)):
            if number == 0:
                layouts.append(recognise(path, row.columns, tuple(columns)))
                if layouts[-1] != layouts[0]:
                    raise InputError(
                        f"{path}: its layout is {layouts[-1]}, that of {files[0].name} is {layouts[0]}: "
                        "write the files of a split in one layout"
                    )
            records.append(layouts[-1].convert(row))
    return layouts[0], records


def _rows(path: Path, columns: Mapping[str, str], labels: LabelWords = NO_LABELS) -> Iterator[Row]:
    """The rows of a file, with columns renamed: `columns` maps a layout's key to the column of the file."""
    for number, (source, values) in enumerate(read_records(path)):
        for key, column in columns.items():
            if column not in values:
                raise InputError(f"{source if number else path}: {missing_column(column, values, key)}")
        if columns:
            renamed = {key: values[column] for key, column in columns.items()}
            others = {column: value for column, value in values.items() if column not in columns.values()}
            values = {**others, **renamed}
        yield Row(source, values, labels)


# Splits ---------------------------------------------------------------------------------------------------------------


def _derived_note(path: Path, data: str) -> list[str]:
    """A note for a built-in data set whose splits are not the official ones."""
    card = path / "graft.json"
    content = read_json(card) if card.is_file() else None
    if isinstance(content, dict) and content.get("derived_splits") is True:
        return [f"{data}: its splits are derived by hash of the text; they are not the official ones"]
    return []


def _hold_out(splits: dict[str, list[Record]], missing: tuple[str, ...], source: str) -> dict[str, list[Record]]:
    """Hold out a tenth of train's texts, the first by hash, for each missing split. Equal texts stay together."""
    texts = sorted({record.text for record in splits["train"]}, key=text_hash)
    if len(texts) <= len(missing):
        raise InputError(
            f"{source}: too few different texts ({len(texts)}) to hold out {' and '.join(missing)}: "
            f"name {'it' if len(missing) == 1 else 'them'} with --val_data FILE"
            f"{' and --test_data FILE' * (len(missing) > 1)}"
        )
    size = max(1, round(len(texts) / 10))
    owner = {text: split for n, split in enumerate(reversed(missing)) for text in texts[n * size : (n + 1) * size]}
    parts: dict[str, list[Record]] = {split: [] for split in ("train", *missing)}
    for record in splits["train"]:
        parts[owner.get(record.text, "train")].append(record)
    parts = {**splits, **parts}
    return {split: parts[split] for split in SPLITS if split in parts}


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split: in the folder, else in its data/, else in its only subfolder that has any."""
    if files := _splits_in(folder):
        return files
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside = {path.name: splits for path in inner if (splits := _splits_in(path))}
    if "data" in inside or len(inside) == 1:
        return inside.get("data") or next(iter(inside.values()))
    if inside:
        raise InputError(f"{folder}: holds several data sets, {', '.join(inside)}: name one of these folders")
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    suffixes = ", ".join(DATA_READERS)
    raise InputError(f"{folder}: no train, validation or test file ({suffixes}) in this folder; it holds {names}")


def _splits_in(folder: Path) -> dict[str, list[Path]]:
    """The files named after a split. The parts of a split (train-00000-of-00002) must be complete."""
    sets: dict[str, dict[str, list[Path]]] = {}  # split -> (name, suffix, number of parts) -> files
    for path in sorted(folder.iterdir()):
        match = _STEM.fullmatch(path.stem)
        if path.suffix.lower() in DATA_READERS and match and path.is_file():
            name, _, part, _, total, _ = match.groups()
            split = _SYNONYMS.get(name.lower(), name.lower())
            key = f"{name} {path.suffix} {total if part else 'whole'}"
            sets.setdefault(split, {}).setdefault(key, []).append(path)
    for split, files in sets.items():
        if len(files) > 1:
            names = " and ".join(paths[0].name for paths in files.values())
            raise InputError(f"{folder}: {names} both say they are the {split} split: keep one")
        ((key, paths),) = files.items()
        total = key.rpartition(" ")[2]
        if total.isdecimal() and len(paths) != int(total):
            raise InputError(f"{folder}: split {split} has {len(paths)} of its {int(total)} files: fetch the rest")
    return {split: next(iter(sets[split].values())) for split in SPLITS if split in sets}
