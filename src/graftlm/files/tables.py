"""The rows of .csv and .tsv files, whose encoding, delimiter and header are found in the file or given by `--columns`.

What is found is said in one line, unless it is the plain case: UTF-8, a comma (in .tsv a tab) and a header.

- Encoding: a byte order mark, else UTF-8, else UTF-16 if every second byte is zero, else cp1252 if single bytes of it
  are scattered in ASCII text. A file that is UTF-8 but for some bytes, or in another script, is an error.
- Delimiter: the only one in the header; of several, the only one that splits all rows evenly. Otherwise an error.
- Header: the first row, unless it has a number, a long text, or a value that its column repeats. Its columns are then
  named column1, column2, …

Excel's line `sep=;`, lines that begin with # before the header or have no other cell, empty rows, empty cells after the
last column, and line ends of \\r alone are read as people mean them.
"""

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from graftlm.config.csv_format import DELIMITERS
from graftlm.config.paths import decode_named
from graftlm.errors import InputError
from graftlm.files.packed import DataFile

SAMPLE = 200  # rows that decide delimiter and header
MIN_ROWS = 4  # of a text that looks like a table
LONG = 60  # characters of a cell that is no column's name
_SEP = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)
_BINARY = {b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"PK\x03\x04": "a .zip or .xlsx"}
_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_HIGH = re.compile(rb"[\x80-\xff]+")
_NAME = re.compile(r"[^\W\d]\w*")
Rows = Iterator[tuple[int, list[str]]]


def read_table(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """The source and fields of each row. Raises InputError with file and line, and names the flag that decides."""
    limit = csv.field_size_limit(sys.maxsize)  # a global setting: restored below
    try:
        text, said = _text(file)
        text, first_line, delimiter = _excel(text)
        delimiter = file.csv.delimiter or delimiter or _delimiter(file, text)
        table = _Table(file, text, delimiter, first_line)
        header = table.header()
        plain = "\t" if file.suffix == ".tsv" else ","
        name = next((name for name, mark in DELIMITERS.items() if mark == delimiter), repr(delimiter))
        said += [f"{name} between columns"] if delimiter != plain else []
        said += ["quotes are text"] if table.quoting == csv.QUOTE_NONE else []
        said += [f"no header: columns are named {', '.join(header)}"] if not table.has_header else []
        if said:
            file.notes.append(f"{file.path}: read with {', '.join(said)}")
        yield from table.records(header)
        if table.comments:
            file.notes.append(f"{file.path}: left out {table.comments} lines that begin with #")
    finally:
        csv.field_size_limit(limit)


# Encoding -------------------------------------------------------------------------------------------------------------


def _text(file: DataFile) -> tuple[str, list[str]]:
    """The file's text, and what was found of its encoding and line ends."""
    content, said = file.content(), []
    if kind := next((kind for start, kind in _BINARY.items() if content.startswith(start)), ""):
        raise InputError(f"{file.path}: holds {kind}, not csv: give it its own suffix, or save it as csv")
    encoding = file.csv.encoding or _encoding(file, content)
    if encoding:
        try:
            text = content.decode(encoding).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise InputError(
                f"{file.path}:{line}: is not {encoding} ({error.reason}): name another in --columns"
            ) from None
        said += [f"encoding {encoding}"] if not file.csv.encoding else []
    else:
        text = decode_named(content, str(file.path))
    if not text.strip():
        raise InputError(f"{file.path}: the file is empty: write one record a line")
    if text.lstrip().startswith(('{"', "{\n", "[{", "[\n")):
        raise InputError(f"{file.path}: holds JSON, not csv: name it .jsonl")
    if "\r" in text and "\n" not in text:
        text = text.replace("\r", "\n")
    return text, said


def _encoding(file: DataFile, content: bytes) -> str:
    """The encoding of a file that is not UTF-8 and has no byte order mark; "" for all others."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        return ""
    head = content[:4096]
    for encoding, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
        if zeros and zeros.count(0) * 10 > len(zeros) * 9:
            return encoding
    try:
        content.decode()
        return ""
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, error.start - content.rfind(b"\n", 0, error.start)
        where = f"{file.path}:{line}: byte {byte} is not UTF-8 (0x{content[error.start]:02x})"
    runs = [match[0] for match in _HIGH.finditer(content)]
    undefined = any(byte in run for run in runs for byte in b"\x81\x8d\x8f\x90\x9d")
    if _UTF8.search(content):
        raise InputError(
            f"{where}, and other characters are: repair it, or name another with --columns encoding=cp1252"
        )
    if undefined or max(map(len, runs)) > 3 or sum(map(len, runs)) * 10 > len(content):
        raise InputError(f"{where}: name the encoding, as in --columns encoding=cp1251, or save the file as UTF-8")
    return "cp1252"


# Delimiter ------------------------------------------------------------------------------------------------------------


def _excel(text: str) -> tuple[str, int, str]:
    """The text after Excel's line sep=; with the number of its first line, and that delimiter or ""."""
    match = _SEP.match(text)
    return (text[match.end() :], 2, match[1]) if match else (text, 1, "")


def _delimiter(file: DataFile, text: str) -> str:
    plain = "\t" if file.suffix == ".tsv" else ","
    samples = {mark: _sample(text, mark) for mark in DELIMITERS.values()}
    possible = [mark for mark, rows in samples.items() if rows and len(rows[0]) > 1]
    if len(possible) < 2:
        return possible[0] if possible else plain
    even = [mark for mark in possible if len({len(row) for row in samples[mark]}) == 1]
    if len(even) == 1:
        return even[0]
    if plain == "\t" and plain in even:  # the suffix says it; texts have commas
        return plain
    if not even and plain in possible:
        return plain
    names = " and ".join(name for name, mark in DELIMITERS.items() if mark in (even or possible))
    evenly = "split its rows evenly" if even else "are in its first row"
    raise InputError(f"{file.path}: {names} {evenly}: say which, as in --columns delimiter=tab")


def looks_like_table(text: str) -> bool:
    """Whether a tab, semicolon or pipe splits all rows of a text evenly."""
    samples = [_sample(text, mark) for mark in DELIMITERS.values() if mark != ","]
    sizes = [{*map(len, rows)} for rows in samples if len(rows) >= MIN_ROWS]
    return any(len(some) == 1 and some != {1} for some in sizes)


def _sample(text: str, delimiter: str) -> list[list[str]]:
    """The first rows that hold something, as far as they can be read."""
    lines = csv.reader(io.StringIO(text, newline="\n"), strict=True, delimiter=delimiter)
    found: list[list[str]] = []
    try:
        for row in islice(lines, SAMPLE):
            if any(cell.strip() for cell in row) and not (row[0].startswith("#") and not found):
                found.append(row)
    except csv.Error:
        pass  # reading says where
    return found


# Rows -----------------------------------------------------------------------------------------------------------------


class _Table:
    """The rows of a text whose delimiter is known."""

    def __init__(self, file: DataFile, text: str, delimiter: str, first_line: int) -> None:
        self.file, self._text, self._delimiter, self._first_line = file, text, delimiter, first_line
        self.quoting: Any = csv.QUOTE_MINIMAL
        self._skip_space = False
        self.has_header = True
        self.comments = 0
        if delimiter == "\t" and '"' in text and self._quotes_are_text():
            self.quoting = csv.QUOTE_NONE

    def _quotes_are_text(self) -> bool:
        """Whether tabs alone split all lines evenly, and some cell begins with a quote that does not end it."""
        rows = [line.rstrip("\r").split("\t") for line in self._text.split("\n") if line.strip()]
        if len({len(row) for row in rows}) != 1:
            return False
        return any(c.startswith('"') and not re.fullmatch(r'"([^"]|"")*"', c) for row in rows for c in row)

    def rows(self, report: bool = False) -> Rows:
        """The line number and the cells of each row that holds something. report: broken rows are bad rows."""
        reader = csv.reader(
            io.StringIO(self._text, newline="\n"),
            strict=True,
            delimiter=self._delimiter,
            quoting=self.quoting,
            skipinitialspace=self._skip_space,
        )
        start, first = self._first_line, True
        for cells in self._cells(reader, report):
            line, start = start, reader.line_num + self._first_line
            if first and cells and cells[0].startswith("#") and self._is_comment(cells):
                self.comments += 1
            elif any(cell.strip() for cell in cells):
                first = False
                yield line, cells

    def _cells(self, reader: Any, report: bool) -> Iterator[list[str]]:
        """The cells of each row; none of a broken row, which is a bad row of the file if `report`.

        A broken row of several lines is an error: after a quote that nothing ends, where rows begin is not known.
        """
        while True:
            before = reader.line_num
            try:
                yield next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                source = f"{self.file.path}:{before + self._first_line}"
                message = f"broken csv: {str(error).partition(' - ')[0]}"
                if reader.line_num > before + 1 or "unexpected end" in message:
                    raise InputError(f"{source}: {message}") from None
                if report:
                    self.file.bad_row(source, message)
                yield []

    def _is_comment(self, cells: list[str]) -> bool:
        """Whether a line before the header has another number of cells than the first row without #."""
        return len(cells) != len(next(iter(_sample(self._text, self._delimiter)), []))

    def header(self) -> list[str]:
        """The names of the columns."""
        sample = [cells for _, cells in islice(self.rows(), SAMPLE)]
        self.comments = 0
        if not sample:
            return []
        first = [cell.strip() for cell in sample[0]]
        self.has_header = self.file.csv.header != "no" and (self.file.csv.header == "yes" or self._is_header(sample))
        if not self.has_header:
            return [f"column{number}" for number in range(1, len(first) + 1)]
        self._skip_space = len(sample[0]) > 1 and all(cell.startswith(" ") for cell in sample[0][1:])
        names = [cell or f"Unnamed: {number}" for number, cell in enumerate(first)]  # as pandas calls them
        if twice := [name for name in names if names.count(name) > 1]:
            line, _ = next(self.rows())
            raise InputError(f"{self.file.path}:{line}: the header names field {twice[0]!r} twice")
        return names

    def _is_header(self, sample: list[list[str]]) -> bool:
        first, others = sample[0], sample[1:]
        if [cell for cell in first if cell] == [str(n) for n in range(len(first) - (not first[0]))] and len(first) > 1:
            return True  # pandas names columns 0, 1, …
        if any(len(cell) > LONG or _is_number(cell) for cell in first):
            return False
        for number, name in enumerate(first):
            values = Counter(row[number] for row in others if len(row) > number)
            if name.strip() and values[name] and len(values) <= max(2, len(others) // 2):
                if first in others and all(_NAME.fullmatch(cell.strip()) for cell in first):
                    raise InputError(
                        f"{self.file.path}: its first row is there again, so it may be a header or not: say which "
                        "with --columns header=yes or header=no"
                    )
                return False
        return True

    def records(self, header: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows after the header as fields."""
        size = len(header)
        for number, (line, cells) in enumerate(self.rows(report=True)):
            if number == 0 and self.has_header:
                continue
            source = f"{self.file.path}:{line}"
            while len(cells) > size and not cells[-1].strip():
                cells.pop()  # Excel's empty cells after the last column
            if len(cells) == 1 < size and cells[0].startswith("#"):
                self.comments += 1
            elif len(cells) != size:
                names = f"the header names {size} fields" if self.has_header else f"the first row has {size}"
                self.file.bad_row(source, f"wrong number of values: {len(cells)}, but {names}")
            else:
                yield source, dict(zip(header, cells, strict=True))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
        return cell.strip().lower() not in ("nan", "inf", "infinity")
    except ValueError:
        return False
