"""How a .csv or .tsv file is written, where `--columns` says it: header=no,delimiter=tab,encoding=cp1252."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftlm.errors import InputError

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
CSV_KEYS = ("encoding", "delimiter", "header")


@dataclass(frozen=True)
class CsvFormat:
    """What is empty is found in the file (`files/tables.py`)."""

    encoding: str = ""
    delimiter: str = ""
    """One of DELIMITERS' values."""
    header: str = ""
    """"yes" or "no"."""


AUTOMATIC = CsvFormat()


def csv_format(columns: Mapping[str, Any]) -> tuple[dict[str, Any], CsvFormat]:
    """The columns by field, and the format that CSV_KEYS among them name. Raises InputError for an unknown value."""
    given = {key: columns[key] for key in CSV_KEYS if key in columns}
    allowed = {
        "encoding": (_known_encoding(given.get("encoding", "")), "an encoding of Python, such as cp1252"),
        "delimiter": (tuple(DELIMITERS), ", ".join(DELIMITERS)),
        "header": (("yes", "no"), "yes or no"),
    }
    for key, value in given.items():
        if value not in allowed[key][0]:
            raise InputError(f"--columns {key}={value}: must be {allowed[key][1]}")
    if "delimiter" in given:
        given["delimiter"] = DELIMITERS[given["delimiter"]]
    return {key: column for key, column in columns.items() if key not in CSV_KEYS}, CsvFormat(**given)


def _known_encoding(name: str) -> tuple[str, ...]:
    """The name itself if it is an encoding of text, else nothing."""
    try:
        return (name,) if name and isinstance("a".encode(name).decode(name), str) else ()
    except (LookupError, TypeError, ValueError):
        return ()
