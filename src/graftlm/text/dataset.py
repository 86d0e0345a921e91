"""Records -> rows, in splits, every value checked where it stands; `readers.py` reads the files.

A row is a text and its label, a prompt and its completion as they are, a prompt with two answers to it, the one that
was preferred and the other, or a conversation. Unusual: a wrong value is an error that names its file and line, and a
split that is not there is cut by a hash of the text, so that no text is in two splits.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from graftlm.errors import InputError
from graftlm.files.assets import data_folder
from graftlm.files.formats import read_json
from graftlm.files.readers import DATA_READERS, read_records, short
from graftlm.text.chat import ROLES, Message

SPLITS = ("train", "validation", "test")
_SYNONYMS = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}
_NAMES = "|".join((*SPLITS, *_SYNONYMS))
_STEM = re.compile(rf"({_NAMES})([-_](\d+)(-of-(\d+))?(-[0-9a-f]+)?)?", re.IGNORECASE)  # train-00000-of-00002


@dataclass(frozen=True, slots=True)
class Record:
    """One record: `text` and `label`, or `prompt` and `completion` (then `text` is the prompt and `label` is None).

    A pair has `rejected` too, and its `completion` is what was chosen. A conversation has `messages`, and `text` is all
    of it.
    """

    text: str
    label: int | None
    prompt: str | None = None
    completion: str | None = None
    source: str = ""
    """The file and line it came from, for errors."""
    rejected: str | None = None
    finished: tuple[bool, bool] = (True, True)
    """Whether the text ends where `completion` does, and where `rejected` does; an answer that was cut goes on."""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Rows by split. `notes` tell the user what was decided; `fingerprint` is a sha256 over all texts and labels."""

    name: str
    splits: dict[str, list[Record]]
    notes: list[str]
    fingerprint: str


@dataclass(frozen=True)
class _Fields:
    """Where a row's values stand in a record, and which labels there are."""

    text: str
    label: str
    numbers: dict[str, int]
    words: tuple[str, ...]


def load_dataset(
    data: str,
    val: str = "",
    test: str = "",
    text_field: str = "text",
    label_field: str = "label",
    labels: Sequence[str] = (),
) -> Dataset:
    """Read a data set by name, folder or file.

    Args:
        data: what `files.assets.data_folder` knows: a built-in name, a hub name, a local folder or file.
        val, test: files with these splits, beside `data`.
        text_field, label_field: the fields that hold a row's text and label.
        labels: the label words by label number. A label in the data is one of them, whatever its case, or a number
            from 0 on; without words any number will do.

    Returns the splits that there are. With a train split there is always a validation split: what is missing is cut
    from train by hash (a tenth), and so is test when neither was named. Raises InputError naming file, line and value.
    """
    path = data_folder(data)
    files = _split_files(path) if path.is_dir() else {"train": [path]}
    for split, flag, given in (("validation", "val", val), ("test", "test", test)):
        if not given:
            continue
        if split in files:
            raise InputError(f"--{flag} {given}: {path} has a {split} split already, {files[split][0].name}")
        files[split] = [Path(given).expanduser()]
        if not files[split][0].is_file():
            raise InputError(f"--{flag} {given}: no such file")
    files = {split: files[split] for split in SPLITS if split in files}
    fields = _Fields(text_field, label_field, _label_numbers(labels), tuple(labels))
    splits = {split: [row for file in files[split] for row in _rows(file, fields)] for split in files}
    notes = _about(path, data)
    if "train" in splits and "validation" not in splits:
        wanted = ("validation",) if "test" in splits else ("validation", "test")
        splits = _hold_out(splits, wanted, str(path))
        sizes = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
        notes.append(f"{data} names no {' or '.join(wanted)} split: cut from train by hash of the text ({sizes} rows)")
    return Dataset(data, splits, notes, fingerprint(splits))


def load_prompts(data: str, split: str = "train", opening: int = 0, text_field: str = "text") -> list[Record]:
    """The prompts of a data set, without space at their ends: rows whose `text` and `prompt` are the same, no label.

    Args:
        data: what `files.assets.data_folder` knows. Of a folder `split` is read; a single file is read whole.
        opening: 0: the field `prompt` is the prompt. Else the first so many words of a text are, as they stand there
            (a shorter text is taken whole).

    Raises InputError naming file, line and value.
    """
    path = data_folder(data)
    files = _split_files(path) if path.is_dir() else {split: [path]}
    if split not in files:
        raise InputError(f"--split {split}: {data} has no such split; it has {', '.join(files)}")
    first = re.compile(rf"(?:\S+\s+){{0,{max(opening - 1, 0)}}}\S+")
    rows = []
    for where, record in chain.from_iterable(map(read_records, files[split])):
        text = _string(where, record, _prompt_field(where, record, opening, text_field)).rstrip(" ")
        match = first.search(text) if opening else None
        prompt = text if match is None else match[0]
        rows.append(Record(prompt, None, prompt, source=where))
    return rows


def _prompt_field(where: str, record: dict[str, Any], opening: int, text_field: str) -> str:
    """The field that holds the prompt or the text to open it with; an error that says how to get one."""
    if opening or "prompt" in record:
        return text_field if opening else "prompt"
    there = ", ".join(str(name) for name in record) or "none"
    make = ": make prompts of the texts' first words with --opening 8" if text_field in record else ""
    raise InputError(f"{where}: no field 'prompt' (the fields are {there}){make}")


def fingerprint(splits: dict[str, list[Record]]) -> str:
    """sha256 over the splits' names, texts, labels and completions in order; paths and file formats do not matter."""
    digest = hashlib.sha256()
    for split, rows in splits.items():
        for row in rows:
            # What only some rows have is left out of the others', whose fingerprints are recorded in old runs.
            pair = [row.rejected] if row.rejected is not None else []
            cut = [row.finished] if not all(row.finished) else []
            said = [row.messages] if row.messages else []
            digest.update(json.dumps([split, row.text, row.label, row.completion, *pair, *cut, *said]).encode() + b"\n")
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """sha256 of a text: the order for samples and splits, blind to the data's order and labels."""
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ splits


def _about(path: Path, data: str) -> list[str]:
    """The note that an unpacked built-in data set carries."""
    card = path / "graft.json"
    about = read_json(card) if card.is_file() else None
    if isinstance(about, dict) and about.get("derived_splits") is True:
        return [f"{data}: its splits are derived by hash of the text; they are not the official ones"]
    return []


def _hold_out(splits: dict[str, list[Record]], wanted: tuple[str, ...], where: str) -> dict[str, list[Record]]:
    """Cut a tenth of train's texts, those first by hash, for each wanted split; equal texts stay together."""
    texts = sorted({row.text for row in splits["train"]}, key=text_hash)
    if len(texts) <= len(wanted):
        raise InputError(
            f"{where}: too few different texts ({len(texts)}) to cut {' and '.join(wanted)} from: "
            f"name {'it' if len(wanted) == 1 else 'them'} with --val FILE{' and --test FILE' * (len(wanted) > 1)}"
        )
    share = max(1, round(len(texts) / 10))
    owner = {text: split for n, split in enumerate(reversed(wanted)) for text in texts[n * share : (n + 1) * share]}
    cut: dict[str, list[Record]] = {split: [] for split in ("train", *wanted)}
    for row in splits["train"]:
        cut[owner.get(row.text, "train")].append(row)
    cut = {**splits, **cut}
    return {split: cut[split] for split in SPLITS if split in cut}


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split: in the folder itself, else in its data/, else in its only subfolder that has any."""
    if found := _splits_in(folder):
        return found
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside = {path.name: splits for path in inner if (splits := _splits_in(path))}
    if "data" in inside or len(inside) == 1:
        return inside.get("data") or next(iter(inside.values()))
    if inside:
        raise InputError(f"{folder}: holds several data sets, {', '.join(inside)}: name one of these folders")
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    formats = ", ".join(DATA_READERS)
    raise InputError(f"{folder}: no train, validation or test file ({formats}) in this folder; it holds {there}")


def _splits_in(folder: Path) -> dict[str, list[Path]]:
    """The files that are named after a split; the parts of a split (train-00000-of-00002) must be complete."""
    found: dict[str, dict[str, list[Path]]] = {}  # split -> what tells one set of files from another -> files
    for path in sorted(folder.iterdir()):
        match = _STEM.fullmatch(path.stem)
        if path.suffix.lower() in DATA_READERS and match and path.is_file():
            name, _, part, _, total, _ = match.groups()
            split = _SYNONYMS.get(name.lower(), name.lower())
            kind = f"{name} {path.suffix} {total if part else 'whole'}"
            found.setdefault(split, {}).setdefault(kind, []).append(path)
    for split, sets in found.items():
        if len(sets) > 1:
            names = " and ".join(paths[0].name for paths in sets.values())
            raise InputError(f"{folder}: {names} both say they are the {split} split: keep one")
        ((kind, paths),) = sets.items()
        total = kind.rpartition(" ")[2]
        if total.isdecimal() and len(paths) != int(total):
            raise InputError(f"{folder}: split {split} has {len(paths)} of its {int(total)} files: fetch the rest")
    return {split: next(iter(found[split].values())) for split in SPLITS if split in found}


# ------------------------------------------------------------------------------------------------ rows

_Make = Callable[[str, dict[str, Any], _Fields], Record]


def _rows(path: Path, fields: _Fields) -> list[Record]:
    """All rows of one file. Its first record decides what they are."""
    rows: list[Record] = []
    make: _Make = _labelled
    for where, record in read_records(path):
        if not rows:
            make = _kind(path, record, fields)
        rows.append(make(where, record, fields))
    return rows


def _kind(path: Path, record: dict[str, Any], fields: _Fields) -> _Make:
    """What makes a row of a record like this one."""
    renamed = (fields.text, fields.label) != ("text", "label")
    if fields.text in record and fields.label in record:
        return _labelled
    if "prompt" in record and "completion" in record and not renamed:
        return _completed
    if record.keys() >= {"chosen", "rejected"} and not renamed:
        return _preferred
    if "messages" in record and not renamed:
        return _chat_row
    flag, missing = ("text", fields.text) if fields.text not in record else ("label", fields.label)
    near = get_close_matches(missing, [str(name) for name in record], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    there = ", ".join(str(name) for name in record) or "none"
    raise InputError(f"{path}: no field {missing!r}: {hint}the fields are {there}; name it with --{flag}_field")


def _labelled(where: str, record: dict[str, Any], fields: _Fields) -> Record:
    text = _string(where, record, fields.text)
    value = record.get(fields.label)
    if value is None or value == "":
        raise InputError(f"{where}: no label (field {fields.label!r} is missing or empty): every row needs one")
    return Record(text, _label(where, value, fields), source=where)


def _completed(where: str, record: dict[str, Any], fields: _Fields) -> Record:
    prompt, completion = _string(where, record, "prompt"), _string(where, record, "completion")
    (ended,) = _ended(where, record, 1)
    return Record(prompt, None, prompt, completion, where, finished=(ended, True))


def _preferred(where: str, record: dict[str, Any], fields: _Fields) -> Record:
    prompt, chosen, rejected = (_string(where, record, field) for field in ("prompt", "chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise InputError(f"{where}: chosen and rejected are the same text: leave the pair out")
    first, second = _ended(where, record, 2)
    return Record(prompt, None, prompt, chosen, where, rejected=rejected, finished=(first, second))


def _chat_row(where: str, record: dict[str, Any], fields: _Fields) -> Record:
    given = record.get("messages")
    if not isinstance(given, list) or not given:
        raise InputError(f"{where}: messages must be a list of role and content, not {short(given)}")
    messages = [_message(f"{where}: message {number}", message) for number, message in enumerate(given, 1)]
    if not any(role == "assistant" for role, _ in messages):
        raise InputError(f"{where}: the assistant says nothing, so there is nothing to learn: leave the row out")
    text = "\n\n".join(f"{role}: {content}" for role, content in messages)
    return Record(text, None, source=where, messages=tuple(messages))


def _message(where: str, message: Any) -> Message:
    """A message's role and content; whatever else it says would be lost, and is an error."""
    if not isinstance(message, dict):
        raise InputError(f"{where} must be an object with role and content, not {short(message)}")
    role = _string(where, message, "role")
    if role not in ROLES:
        raise InputError(f"{where}: unknown role {short(role)}: known are {', '.join(ROLES)}")
    if strange := [name for name, value in message.items() if name not in ("role", "content") and value is not None]:
        raise InputError(f"{where}: {short(strange[0])} is not understood: a message has role and content, of text")
    return role, _string(where, message, "content")


def _ended(where: str, record: dict[str, Any], answers: int) -> list[bool]:
    """The field "ended", which says whether the text ends where an answer does; without it, it does."""
    value = record.get("ended")
    if value is None:
        return [True] * answers
    ended = value if isinstance(value, list) else [value]
    if len(ended) != answers or not all(isinstance(each, bool) for each in ended):
        wanted = "true or false" if answers == 1 else "a list of two, each true or false: for chosen and for rejected"
        raise InputError(f"{where}: ended must be {wanted}, not {short(value)}")
    return ended


def _string(where: str, record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise InputError(
            f"{where}: empty {field}: fill it in, or leave the row out"
            if field in record
            else f"{where}: no field {field!r}: every row needs it"
        )
    if not isinstance(value, str):
        raise InputError(f"{where}: {field} must be text, not {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad = f"U+{ord(value[error.start]):04X}"
        raise InputError(f"{where}: {field} holds half a character ({bad} alone); write the whole one") from None
    return value


def _label_numbers(words: Sequence[str]) -> dict[str, int]:
    """What may stand for a label -> its number. A word wins over a number, so that words "1", "2", "3" work too."""
    numbers = {str(number): number for number in range(len(words))}
    return {**numbers, **{word.casefold(): number for number, word in enumerate(words)}}


def _label(where: str, value: object, fields: _Fields) -> int:
    """A label's number, from 1, "1" or "Positive"; true only where it is a label word, and 1.0 never."""
    text = str(value).strip().casefold() if isinstance(value, int | str) else ""
    if not fields.words and text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    if text not in fields.numbers:
        allowed = ", ".join(f"{number} or {word!r}" for number, word in enumerate(fields.words))
        what = f"allowed are {allowed}" if allowed else "a number from 0 on is needed, or --labels with the words"
        raise InputError(f"{where}: unknown label {short(value)}: {what}")
    return fields.numbers[text]
