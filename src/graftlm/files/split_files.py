"""The files of each split of a data set: as its README.md names them for the hub, or by their names.

Split names and their places are those of `datasets`: train-00000-of-00002.parquet, reviews_dev.csv, test/a.jsonl. A
name may say more than the split: train_sft and test_sft are of one kind, train_gen and test_gen of another.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from graftlm.errors import InputError
from graftlm.files.data_folders import TEXT, check_classes, class_folders, saved_splits
from graftlm.files.dataset_card import DataSource, read_card, several_configs
from graftlm.files.packed import data_stem, data_suffix
from graftlm.files.readers import DATA_CARD, SUFFIXES, is_data_file, splits_inside

SPLITS = ("train", "validation", "test")
_SPLIT_WORDS = {
    **{"train": "train", "training": "train"},
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""As `datasets` reads the names of files and folders; eval is validation if another file is test."""
_PART = re.compile(r"([-_]\d+|[-_.]\d+-of-(?P<total>\d+))(-[0-9a-f]+)?$")  # train-00000-of-00002, train_0
_SPLIT = re.compile(rf"(^|[-._ ])({'|'.join(_SPLIT_WORDS)})\d*(?=$|[-._ ])")
_SHARD = re.compile(r"\w+-\d{5}-of-\d{5}.*")
NO_DATA = re.compile(r"readme.*|licen[cs]e.*|.*\.(md|py)|(graft|state|dataset_(dict|infos?))\.json", re.IGNORECASE)
MAX_NAMED = 8  # files that a note names
MAX_DEPTH = 3  # of folders in folders


def files_by_split(source: DataSource, split: str) -> dict[str, list[Path]]:
    """The files of each split of a folder; a single file is of the split that is given, unless it holds several."""
    path = source.path
    if path.is_dir():
        splits = _split_files(source)
        check_classes([folder for paths in splits.values() for folder in paths if folder.is_dir()])
        return splits
    inside = splits_inside(path)
    return {name: [path] for name in SPLITS if name in inside} or {split: [path]}


def label_names(source: DataSource) -> Mapping[str, tuple[str, ...]]:
    """The words of labels by column, as the card of a data set gives them."""
    return read_card(source.path).names(source.config) if source.path.is_dir() else {}


def _split_files(source: DataSource) -> dict[str, list[Path]]:
    """The files of each split of a folder: those that its card names, or by their names."""
    folder, card = source.path, read_card(source.path)
    config = card.config(source.config)
    if card.configs and config is None:
        raise several_configs(folder, card.configs)
    if config and config.files:
        splits = _choose([_FileSet(name, name, []) for name in config.files], source.kind, folder / DATA_CARD)
        return {split: _card_files(folder, split, one.name, config.files[one.name]) for split, one in splits.items()}
    folder = folder / config.data_dir if config else folder
    if not folder.is_dir():
        raise InputError(f"{source.path / DATA_CARD}: {folder.name}, which it names, is no folder: correct it")
    if sets := _saved_sets(folder) or _named_sets(folder):
        splits = _choose(sets, source.kind, folder)
        for split, one in splits.items():
            _check_parts(one.files[0].parent, split, one.files, one.total)
        return {split: one.files for split, one in splits.items()}
    if source.kind:
        raise _no_kind(folder, source.kind)
    if files := [folder] if class_folders(folder) else _unnamed_files(folder):
        return {"train": files}
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise InputError(f"{folder}: no train, validation or test file ({SUFFIXES}) in this folder; it holds {names}")


def _no_kind(where: Path, kind: str, known: Iterable[str] = ()) -> InputError:
    it_has = f"it has {', '.join(known)}" if known else "leave it out, or name another"
    return InputError(f"{where}:{kind}: this data set has no {kind!r}: {it_has}")


class _FileSet(NamedTuple):
    """The files of a split, or of one of several that may be it."""

    name: str
    """What the card, or the name of a file or folder, calls it: train_sft."""
    shown: str
    """Its name in errors."""
    files: list[Path]
    total: str = ""
    """The number of its files, as their names say it."""

    @property
    def split(self) -> str:
        """See `_split_word`."""
        return _split_word(self.name)

    @property
    def kind(self) -> str:
        """What its name says besides its split: sft of train_sft."""
        return _SPLIT.sub("", self.name.lower()).strip("-._ ")


# Choosing -------------------------------------------------------------------------------------------------------------


def _split_word(name: str) -> str:
    """The split that a name without suffix speaks of, or "eval"; "" for none, and for several."""
    words = {word for word in re.findall(r"[^\W\d_]+", name.lower()) if word in _SPLIT_WORDS}
    found = {"eval" if word.startswith("eval") else _SPLIT_WORDS[word] for word in words}
    return found.pop() if len(found) == 1 else ""


def _choose(sets: Sequence[_FileSet], kind: str, where: Path) -> dict[str, _FileSet]:
    """The files of each split.

    kind: of which splits, or the name of one. Without it a split whose name says nothing else precedes others, and a
    single set is train, however it is called. Raises InputError if several are left, or none.
    """
    kind = kind.lower()
    if exact := [one for one in sets if kind and one.name.lower() == kind]:
        return {(exact[0].split or "train").replace("eval", "test"): _only(exact, exact[0].name, where)}
    kinds = sorted({one.kind for one in sets if one.split} - {""})
    if kind and kind not in kinds:
        raise _no_kind(where, kind, kinds or [one.name for one in sets])
    evaluation = "validation" if any(one.split == "test" for one in sets) else "test"
    found = {}
    for split in SPLITS:
        every = [one for one in sets if one.split == split or (one.split, split) == ("eval", evaluation)]
        fitting = [one for one in every if one.kind == kind] or [one for one in every if not one.kind]
        if fitting := fitting if fitting or kind else every:
            found[split] = _only(fitting, split, where)
    if not found and len(sets) > 1:
        raise several_configs(where, [one.name for one in sets])
    return found or {"train": sets[0]}


def _only(sets: Sequence[_FileSet], split: str, where: Path) -> _FileSet:
    """The only one of these sets. Raises InputError if there are several."""
    if len(sets) == 1:
        return sets[0]
    kinds = list(dict.fromkeys(one.kind for one in sets))
    hint = f"name one, as in NAME:{kinds[0]} or NAME:{kinds[1]}" if len(kinds) > 1 else "keep one"
    names = " and ".join(one.shown for one in sets)
    raise InputError(f"{where}: {names} both say they are the {split} split: {hint}")


# The sets of a folder -------------------------------------------------------------------------------------------------


def _card_files(folder: Path, split: str, name: str, patterns: Sequence[str]) -> list[Path]:
    """The files that match a card's patterns, in the order of their names."""
    matched = {path for pattern in patterns for path in folder.glob(pattern)}
    inner = {file for path in matched if path.is_dir() for file in path.rglob("*")}
    files = sorted(path for path in matched | inner if path.is_file() and is_data_file(path))
    if not files:
        raise InputError(
            f"{folder / DATA_CARD}: split {name}: {', '.join(patterns)} is no file that is read ({SUFFIXES})"
        )
    totals = {part["total"] for path in files if (part := _PART.search(data_stem(path))) and part["total"]}
    _check_parts(folder, split, files, totals.pop() if len(totals) == 1 else "")
    return files


def _check_parts(folder: Path, split: str, files: Sequence[Path], total: str) -> None:
    """Raise InputError if fewer files are there than their names say."""
    if total.isdecimal() and len(files) != int(total):
        raise InputError(f"{folder}: split {split} has {len(files)} of its {int(total)} files: fetch the rest")


def _saved_sets(folder: Path) -> list[_FileSet]:
    """The splits of a folder of `datasets.save_to_disk`; [] for any other folder."""
    return [_FileSet(name, name, files) for name, files in saved_splits(folder).items()]


def _named_sets(folder: Path, depth: int = 0) -> list[_FileSet]:
    """The files and folders named after a split: shards in data/, else those in the folder itself, in data/, or in its
    only subfolder that has any.
    """
    data = folder / "data"
    shards = data.is_dir() and any(_SHARD.fullmatch(path.name) and _split_word(path.name) for path in data.iterdir())
    if found := (_sets_in(data) if shards else []) or _sets_in(folder):
        return found
    inner = _subfolders(folder) if depth < MAX_DEPTH else []
    inside = {path.name: sets for path in inner if (sets := _named_sets(path, depth + 1))}
    if len(inside) > 1 and "data" not in inside:
        raise several_configs(folder, inside)
    return inside.get("data") or next(iter(inside.values()), [])


def _sets_in(folder: Path) -> list[_FileSet]:
    """The files and folders named after a split."""
    sets: dict[tuple[str, str, str], list[Path]] = {}
    data = _data_files(folder)
    for path in sorted(folder.iterdir()):
        is_data = path in data
        name = path.name if path.is_dir() else data_stem(path) if is_data else ""
        if (split := _split_word(name)) and (files := [path] if is_data else _files_of_split(path, split)):
            part = _PART.search(name) if is_data else None
            stem = name[: part.start()] if part else name
            total = (part["total"] or "several") if part else "whole"
            suffix = path.name[len(name) :].lower() if is_data else "/"
            sets.setdefault((stem, suffix, total), []).extend(files)
    return [_FileSet(key[0], str(paths[0].relative_to(folder)), paths, key[2]) for key, paths in sets.items()]


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files of a folder named after a split, in which none is of another split."""
    if class_folders(folder):
        return [folder]
    if not (inner := _sets_in(folder)):
        return _data_files(folder)
    return [file for one in inner if one.split in (split, split.replace("eval", "test")) for file in one.files]


def _unnamed_files(folder: Path) -> list[Path]:
    """The data files that name no split, of a folder, of data/ or of the only subfolder that has any: all are train.

    They must be of one format.
    """
    if not (files := _data_files(folder)):
        inside = {path.name: files for path in _subfolders(folder) if (files := _data_files(path))}
        if len(inside) > 1 and "data" not in inside:
            raise several_configs(folder, inside)
        files = inside.get("data") or next(iter(inside.values()), [])
    names = ", ".join(path.name for path in files[:MAX_NAMED])
    if len({data_suffix(path) for path in files}) > 1:
        raise InputError(
            f"{files[0].parent}: its data files are of several formats, {names}: name one, or a split in each name"
        )
    if len({data_stem(path) for path in files}) < len(files):
        raise InputError(f"{files[0].parent}: holds a file twice, {names}: keep one")
    return files


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder, in the order of their names; text files only if there are no others."""
    every = (path for path in sorted(folder.iterdir()) if path.is_file() and not NO_DATA.fullmatch(path.name))
    files = [path for path in every if is_data_file(path)]
    return [path for path in files if data_suffix(path) != TEXT] or files
