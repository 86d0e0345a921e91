"""Files -> canonical records by split (`layouts.py`), and a fingerprint of them.

A split that the data does not name is held out by a hash of the text, so that no text is in two splits.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from graftlm.config.csv_format import CsvFormat, csv_format
from graftlm.config.paths import user_path
from graftlm.errors import InputError
from graftlm.files.arrow_rows import class_names
from graftlm.files.assets import data_name, data_source
from graftlm.files.data_folders import class_files, class_folders
from graftlm.files.formats import read_json
from graftlm.files.packed import raise_error
from graftlm.files.readers import read_records
from graftlm.files.split_files import MAX_NAMED, NO_DATA, SPLITS, files_by_split, label_names
from graftlm.text.bad_rows import BadRows, BadRowsFlag
from graftlm.text.column_names import CONTEXT, LABELS
from graftlm.text.fields import Columns, UnknownFieldError, field_names, read_fields, taken_from
from graftlm.text.labels import label_text, labels_of, names_by_number, parse_labels
from graftlm.text.layout import Layout
from graftlm.text.layouts import LABELLED
from graftlm.text.recognise import UnknownLayoutError, check_columns, recognise
from graftlm.text.record_file import RecordFile, select
from graftlm.text.records import Document, Record, hashed_values
from graftlm.text.regroup import regroup
from graftlm.text.rows import LabelWords, Row
from graftlm.text.suggestions import SAMPLE, suggestion
from graftlm.text.template import DEFAULT_LABELS
from graftlm.text.words import UNSPACED, normalize

NO_LABELS = LabelWords()


@dataclass(frozen=True)
class Dataset:
    """Records by split."""

    name: str
    splits: dict[str, Sequence[Record]]
    notes: list[str]
    """What was decided for the user: the layout, held-out splits, and what was not read."""
    fingerprint: str
    """See `fingerprint`."""
    layouts: tuple[str, ...] = ()
    """The layouts of its files."""
    unused_columns: tuple[str, ...] = ()
    """Columns with values that are not read."""


@dataclass(frozen=True)
class Reading:
    """How the user wants files to be read, and what is found in them."""

    columns: Columns
    """By key of the layout, where it is taken from."""
    csv: CsvFormat
    labels: LabelWords = NO_LABELS
    notes: list[str] = field(default_factory=list)
    on_bad_row: Callable[[str, InputError], None] = raise_error
    """As in `read_records`."""
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The label words by column, as the card of the data set gives them."""
    of_train: Layout | None = None
    """The layout of the train split, once it is read."""
    on_disk: bool = False
    """As in `load_dataset`."""


def load_dataset(
    data: str,
    val: str = "",
    test: str = "",
    columns: Columns | None = None,
    labels: Sequence[str] = (),
    bad_rows: BadRowsFlag = "stop",
    *,
    on_disk: bool = False,
) -> Dataset:
    """Read a data set.

    Args:
        data: a built-in name, a hub name, a local folder or file (`files.assets.data_folder`); "" for none.
        val, test: files with these splits, in addition to `data`.
        columns: by key of the layout ("text", "label", "prompt", …) the column of the files where it differs, a nested
            field, or a text with fields (`text/fields.py`); and how a .csv is written (`config.csv_format`).
        labels: the label words by label number. A label in the data is one of them in any case, or a number from 0
            on; without words, any number.
        bad_rows: stop with an error that counts them all, or skip them; of a data set with train, all of test. A test
            split in `data` of which no row has a label is left out in either case.
        on_disk: leave large splits in a temporary file (`record_file.py`) rather than in memory.

    A data set with a train split always gets a validation split: if it is missing, a tenth of train is held out by
    hash, and so is a test split if neither is named. Raises InputError with file, line and value.
    """
    named, csv = csv_format(columns or {})
    check_columns(named)
    source = data_source(data) if data else None
    files = files_by_split(source, "train") if source else {}
    for split, flag, file in (("validation", "val_data", val), ("test", "test_data", test)):
        if not file:
            continue
        if split in files:
            raise InputError(f"--{flag} {file}: {data} has a {split} split already, {files[split][0].name}")
        files[split] = [user_path(file)]
        if not files[split][0].is_file():
            raise InputError(f"--{flag} {file}: no such file")
    names = label_names(source) if source else {}
    reading = Reading(named, csv, LabelWords.of(labels), label_names=names, on_disk=on_disk)
    layouts: dict[Layout, None] = {}
    splits, unused = dict[str, Sequence[Record]](), set[str]()
    name, notes = data_name(data or val or test), _notes(source.path, data_name(data), files) if source else []
    for split in (split for split in SPLITS if split in files):
        bad = BadRows(bad_rows == "skip")
        of_train = next(iter(layouts), None)
        layout, records, others = _read_split(
            files[split], split, replace(reading, on_bad_row=bad.add, of_train=of_train)
        )
        second = split == "test" and "train" in splits
        if note := bad.finish(len(records) + bad.rows, second, second and not test):
            notes.append(f"{name}: {split}: {note}")
        if layout and records:
            splits[split], layouts[layout] = records, None
        unused |= others
    notes += reading.notes
    if "train" in splits and "validation" not in splits:
        missing = ("validation",) if "test" in splits else ("validation", "test")
        splits, how = _hold_out(splits, missing, name)
        sizes = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
        notes.append(f"{name} names no {' or '.join(missing)} split: held out from train {how} ({sizes} rows)")
    skipped = f"; columns not read: {', '.join(sorted(unused))}" if unused else ""
    taken = f"; {taken}" if (taken := taken_from(named)) else ""
    notes.append(f"{name}: read as {' and '.join(map(str, layouts))}{taken}{skipped}")
    return Dataset(name, splits, notes, fingerprint(splits), tuple(map(str, layouts)), tuple(sorted(unused)))


def load_prompts(
    data: str,
    split: str = "train",
    opening: int = 0,
    columns: Columns | None = None,
    bad_rows: BadRowsFlag = "stop",
) -> tuple[list[Document], list[str]]:
    """The prompts of a data set, and notes on what was not read.

    Args:
        data: as in `load_dataset`. `split` is read of a folder; a single file is read whole.
        opening: 0: the column "prompt". N: the first N words of the text (a shorter text as a whole).
        columns, bad_rows: as in `load_dataset`.

    Raises InputError with file, line and value.
    """
    named, csv = csv_format(columns or {})
    check_columns(named)
    reading = Reading(named, csv)
    path = (source := data_source(data)).path
    if path.is_file() and split != "train":
        raise InputError(f"--split {split}: {data} is one file, which is read whole; leave --split out")
    files = files_by_split(source, split)
    if split not in files:
        raise InputError(f"--split {split}: {data} has no such split; it has {', '.join(files)}")
    word = rf"(?:[{UNSPACED}]|[^\s{UNSPACED}]+)"
    first_words = re.compile(rf"(?:{word}\s*){{0,{max(opening - 1, 0)}}}{word}")
    prompts, unused, bad = [], set[str](), BadRows(bad_rows == "skip")
    reading = replace(reading, on_bad_row=bad.add)
    for row in (row for file in files[split] for row in _rows(file, split, reading)):
        try:
            row.refuse(() if opening else CONTEXT)
            column = "text" if opening else _prompt_column(row)
            prompt = row.text(column)
        except InputError as error:
            bad.add(row.source, error)
            continue
        unused |= {name for name, value in row.columns.items() if value is not None and name != column}
        match = first_words.search(prompt) if opening else None
        prompts.append(Document(prompt if match is None else match[0], row.source))
    notes = [*(_notes(path, data, files) if path.is_dir() else []), *reading.notes]
    if note := bad.finish(len(prompts) + bad.rows):
        notes.append(f"{data}: {note}")
    return prompts, [*notes, *([f"{data}: columns not read: {', '.join(sorted(unused))}"] if unused else [])]


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


def _read_split(
    files: Sequence[Path], split: str, reading: Reading
) -> tuple[Layout | None, Sequence[Record], set[str]]:
    """The layout of a split's files, their records, and the columns that were not read.

    The first row of each file decides its layout, and all must have one; None if no row can be read.
    """
    records: list[Record] | RecordFile = RecordFile() if reading.on_disk else []
    layouts: list[Layout] = []
    unused: set[str] = set()
    for path in files:
        _check_class_names(path, reading)
        for number, row in enumerate(_rows(path, split, reading)):
            if number == 0:
                layouts.append(_layout(path, split, row, reading))
                if layouts[-1] != layouts[0]:
                    raise InputError(
                        f"{path}: its layout is {layouts[-1]}, that of {files[0].name} is {layouts[0]}: "
                        "write the files of a split in one layout"
                    )
            try:
                records.append(layouts[-1].record(row))
            except InputError as error:
                reading.on_bad_row(row.source, error)
                continue
            unused |= layouts[-1].unused(row.columns)
    return layouts[0] if layouts else None, records, unused


def _layout(path: Path, split: str, row: Row, reading: Reading) -> Layout:
    """The layout of a file's first row; an error says too what was found of the file's format, and what may be meant.

    A file that lacks nothing but the label column of the train split has its layout: its rows have no labels.
    """
    train = reading.of_train
    if train and train.name == LABELLED:
        text, label = (dict(train.columns).get(key, key) for key in ("text", "label"))
        if text in row.columns and label not in row.columns:
            return train
    try:
        return recognise(path, row.columns, tuple(reading.columns))
    except InputError as error:
        found = [note for note in reading.notes if note.startswith(f"{path}: read with")]
        line, hint = str(error), ""
        if isinstance(error, UnknownLayoutError) and not reading.columns:
            rows = read_records(path, split, reading.csv, on_bad_row=lambda *row: None)
            hint = suggestion([columns for _, columns in islice(rows, SAMPLE)], error.unknown)
            line = f"{error.problem}: {hint}" if hint else line
        raise InputError("; ".join([line, *(note.removeprefix(f"{path}: ") for note in found)])) from None


def _rows(path: Path, split: str, reading: Reading) -> Iterator[Row]:
    """The rows of a file, with the layout's keys."""
    records = regroup(read_records(path, split, reading.csv, reading.notes, reading.on_bad_row))
    for number, (source, values) in enumerate(records):
        if reading.columns:
            values, problem = read_fields(values, reading.columns)
            if number == 0 and isinstance(problem, UnknownFieldError):
                raise InputError(f"{path}: {problem}")
            if problem is not None:
                reading.on_bad_row(source, InputError(f"{source}: {problem}"))
                continue
        yield Row(source, values, reading.labels)


# Label words that the data names --------------------------------------------------------------------------------------


def default_labels(data: str, columns: Columns | None = None) -> str:
    """What --labels is where it is not given: the default's, if they are the data's labels, else the data's own.

    Those are the names in a parquet file's schema or in a column label_text, or the different labels of the train split
    (`labels.labels_of`).
    """
    source = data_source(data)
    split, paths = next(iter(files_by_split(source, "train").items()))
    path, default = paths[0], tuple(DEFAULT_LABELS.split(","))
    reading = Reading(*csv_format(columns or {}), label_names=label_names(source))
    reading = replace(reading, on_bad_row=lambda *row: None)  # what is wrong is said when the records are read
    names = _class_names(path, reading)
    if not names:
        by_label: dict[str, set[str]] = {}
        names = tuple(labels_of(_label_values(paths, split, reading, by_label)))
        names = names_by_number(names, by_label) or names
        known = LabelWords(default)
        if not names or all(known.number(name) is not None for name in names):
            return DEFAULT_LABELS
        return _joined(path, names)
    numbers = all(map(str.isdecimal, names)) and len(names) == len(default)
    if numbers or not names or [_meant(name, default) for name in names] == [[n] for n in range(len(default))]:
        return DEFAULT_LABELS
    return _joined(path, names)


def _joined(path: Path, names: Sequence[str]) -> str:
    if len(names) == 1:
        raise InputError(f"{path}: every label is {names[0]!r}: two are needed; if others are elsewhere, give --labels")
    if any("," in name for name in names):
        raise InputError(f"{path}: its labels are {', '.join(map(repr, names))}: name them without commas in --labels")
    if parse_labels(",".join(names))[1]:
        raise InputError(f"{path}: its labels are {', '.join(map(repr, names))}: name them without = in --labels")
    return ",".join(names)


def _label_values(
    paths: Iterable[Path], split: str, reading: Reading, names: dict[str, set[str]]
) -> Iterator[tuple[str, object]]:
    """The source and the label of each row; nothing of files that hold no texts with labels.

    names: the values of a column such as label_text are added to it, by label.
    """
    for path in paths:
        key = "label"
        for number, row in enumerate(_rows(path, split, reading)):
            if number == 0:
                try:
                    layout = recognise(path, row.columns, tuple(reading.columns))
                except InputError:
                    return  # reading says what is wrong
                if layout.name != LABELLED:
                    return
                key = dict(layout.columns).get("label", "label")
            label = row.columns.get(key)
            for name in (f"{key}_text", f"{key}_name"):
                if isinstance(row.columns.get(name), str):
                    names.setdefault(label_text(label) or "", set()).add(row.columns[name])
            yield row.source, label


def _class_names(path: Path, reading: Reading) -> tuple[str, ...]:
    """The label words in a parquet file's schema, else in the data set's card, by any name of the label's column."""
    if path.is_dir():
        return tuple(folder.name for folder in class_folders(path))
    columns = field_names(reading.columns["label"]) if "label" in reading.columns else LABELS["label"]
    of_card = next((reading.label_names[name] for name in columns if name in reading.label_names), ())
    return class_names(path, *columns) or of_card


def _check_class_names(path: Path, reading: Reading) -> None:
    """Raise InputError if a parquet file's schema, or the card, gives the label numbers other words than --labels."""
    names, labels = _class_names(path, reading), reading.labels.words
    meant = [_meant(name, labels) for name in names]
    if (
        labels
        and names
        and not reading.labels.values
        and (len(names) != len(labels) or any(n not in found for n, found in enumerate(meant) if found))
    ):
        raise InputError(
            f"{path}: its labels are {', '.join(names)} in this order, and --labels are {', '.join(labels)}: leave "
            "--labels out, or give as many words in the file's order"
        )


def _meant(name: str, labels: Sequence[str]) -> list[int]:
    """The labels that a name of three letters or more is, or is short for: pos is positive."""
    name, words = normalize(name), [normalize(label) for label in labels]
    same = [number for number, word in enumerate(words) if word == name]
    return same or [n for n, word in enumerate(words) if len(name) > 2 and word.startswith(name)]


# Splits ---------------------------------------------------------------------------------------------------------------


def _notes(folder: Path, data: str, files: Mapping[str, Sequence[Path]]) -> list[str]:
    """Notes on a folder: what was not read, and splits of a built-in data set that are not the official ones."""
    notes = []
    named = [path for paths in files.values() for path in paths]
    texts = [file for path in named if path.is_dir() for _, file in class_files(path)]
    read = {path.resolve() for path in (*named, *texts)}
    card = folder / "graft.json"
    content = read_json(card) if card.is_file() else None
    if isinstance(content, dict) and content.get("derived_splits") is True:
        notes.append(f"{data}: its splits are derived by hash of the text; they are not the official ones")
    others = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.resolve() not in read]
    names = [str(path.relative_to(folder)) for path in others if not NO_DATA.fullmatch(path.name)]
    if names := [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]:
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        notes.append(f"{data}: not read: {', '.join(names[:MAX_NAMED])}{more}")
    return notes


def _hold_out(
    splits: dict[str, Sequence[Record]], missing: tuple[str, ...], source: str
) -> tuple[dict[str, Sequence[Record]], str]:
    """Hold out a tenth of train for each missing split, and say how, after "held out from train".

    They are the first texts by hash, and equal texts stay together. Of one or two documents, such as a book, it is
    the end of the longest.
    """
    digests = bytearray()  # of all texts, as `text_hash`
    for record in splits["train"]:
        digests += hashlib.sha256(record.text.encode()).digest()
    # Equal where all bytes are, and in their order, although numpy leaves out zeros at the end.
    texts, place = np.unique(np.frombuffer(digests, dtype="S32"), return_inverse=True)
    if len(texts) <= len(missing):
        if ends := _end_of_document(splits["train"], missing):
            divided = {**splits, **ends}
            return {split: divided[split] for split in SPLITS if split in divided}, "at a text's end"
        raise InputError(
            f"{source}: too few different texts ({len(texts)}) to hold out {' and '.join(missing)}: "
            f"name {'it' if len(missing) == 1 else 'them'} with --val_data FILE"
            f"{' and --test_data FILE' * (len(missing) > 1)}"
        )
    size = max(1, round(len(texts) / 10))
    owners = (*reversed(missing), "train")
    owner = np.minimum(place // size, len(missing))
    held = {split: np.flatnonzero(owner == n) for n, split in enumerate(owners)}
    parts = {**splits, **{split: select(splits["train"], rows) for split, rows in held.items()}}
    return {split: parts[split] for split in SPLITS if split in parts}, "by hash of the text"


def _end_of_document(train: Sequence[Record], missing: tuple[str, ...]) -> dict[str, Sequence[Record]]:
    """Train without the end of its longest document, a tenth of which is each missing split; {} if it is too short.

    The parts begin with a line if one begins near.
    """
    train = list(train)
    longest = max(train, key=lambda record: len(record.text))
    text = longest.text
    if not isinstance(longest, Document) or [record.text for record in train].count(text) > 1:
        return {}
    edges = [len(text) * (10 - n) // 10 for n in range(len(missing), 0, -1)]
    edges = [text.rfind("\n", edge - len(text) // 20, edge) + 1 or edge for edge in edges]
    parts = [text[start:stop] for start, stop in pairwise([0, *edges, len(text)])]
    if not all(map(str.strip, parts)):
        return {}
    first, *others = [Document(part, longest.source) for part in parts]
    return {
        "train": [first if record is longest else record for record in train],
        **{split: [part] for split, part in zip(missing, others, strict=True)},
    }
