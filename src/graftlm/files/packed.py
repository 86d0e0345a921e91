"""Data files and what they are packed in: .gz, .zst, .bz2, .xz and .zip.

    reviews.csv.gz   one file; the suffix before .gz or another of COMPRESSED says its format
    reviews.zip      the only data file inside

A packed file is unpacked into memory; the lines of others can be read one by one. zstd is pyarrow's, because Python has
none of its own before 3.14.
"""

import bz2
import csv
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from graftlm.config.csv_format import AUTOMATIC, CsvFormat
from graftlm.config.paths import decode_named
from graftlm.errors import InputError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
ZIP = ".zip"
_DAMAGED = (
    *(gzip.BadGzipFile, lzma.LZMAError, zlib.error, zipfile.BadZipFile),
    *(RuntimeError, NotImplementedError, ValueError),  # zstd's, zipfile's, bz2's
)
HEAD = 100_000  # bytes that say what a file without a suffix is


def raise_error(source: str, error: InputError) -> None:
    """What is done with a bad row where the caller does not count them."""
    raise error


@dataclass(frozen=True)
class DataFile:
    """A data file, or the one in an archive."""

    path: Path
    """The file on disk, which errors name."""
    suffix: str
    """Its format, such as ".csv"."""
    member: str = ""
    """Its name in a .zip."""
    split: str = ""
    """The split to read of a file that holds several."""
    csv: CsvFormat = AUTOMATIC
    """How a table is written, where the user says it."""
    notes: list[str] = field(default_factory=list)
    """Where a reader says what it found."""
    on_bad_row: Callable[[str, InputError], None] = raise_error
    """Called with the source and the error of each row that cannot be read; if it returns, reading continues."""

    @property
    def is_packed(self) -> bool:
        """Whether its bytes on disk are not its content."""
        return bool(self.member) or self.path.suffix.lower() in COMPRESSED

    def lines(self) -> Iterator[str]:
        """The lines of a file that is not packed, one by one, without the line break. Raises InputError as `content`.

        A byte order mark is left out.
        """
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                try:
                    text = line.removesuffix(b"\n").decode()
                except UnicodeDecodeError:
                    decode_named(self.content(), str(self.path))  # for its error
                    raise
                yield text if number else text.removeprefix("\ufeff")

    def head(self, size: int) -> bytes:
        """The first bytes of a file that is not packed."""
        try:
            with open(self.path, "rb") as file:
                return file.read(size)
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot read it: {error.strerror or str(error).partition(chr(10))[0]}")

    def bad_row(self, source: str, message: str) -> None:
        """Report a row that cannot be read. source: its file and line, with which the error begins."""
        self.on_bad_row(source, InputError(f"{source}: {message}"))

    def content(self) -> bytes:
        """All bytes, unpacked. Raises InputError for a file that is truncated, damaged or locked by a password."""
        try:
            if self.member:
                with zipfile.ZipFile(self.path) as archive:
                    return archive.read(self.member)
            unpack = _UNPACK.get(self.path.suffix.lower(), bytes)
            return unpack(self.path.read_bytes())
        except EOFError:
            raise InputError(f"{self.path}: the file is truncated: fetch it again") from None
        except _DAMAGED as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise InputError(f"{self.path}: cannot be unpacked ({reason}): fetch it again, or unpack it") from None
        except OSError as error:
            raise self._unreadable(error) from None


def data_suffix(path: Path | str) -> str:
    """The suffix that says the format, in lower case: ".csv" of reviews.csv.gz; ".zip" of an archive."""
    name = PurePosixPath(str(path).lower())
    return PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def data_stem(path: Path) -> str:
    """The name without what `data_suffix` and compression add: "reviews" of reviews.csv.gz."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem


def open_data(path: Path, suffixes: Sequence[str]) -> DataFile:
    """The data file of a path. Of an archive it is the only file with one of the suffixes. Raises InputError.

    The content of a file whose name has no suffix says what it is.
    """
    if (suffix := data_suffix(path) or _content_suffix(path)) != ZIP:
        return DataFile(path, suffix)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
    except zipfile.BadZipFile:
        raise InputError(f"{path}: not a whole .zip file: fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    shown = [name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]
    found = [name for name in shown if data_suffix(name) in suffixes and data_suffix(name) != ZIP]
    tables = [name for name in found if data_suffix(name) != ".txt"] or found
    if len(tables) != 1:
        holds = f"holds {', '.join(sorted(tables or shown)[:8]) or 'nothing'}"
        raise InputError(f"{path}: {holds}: only a .zip with one data file is read; unpack it and name the folder")
    if PurePosixPath(tables[0]).suffix.lower() in COMPRESSED:
        raise InputError(f"{path}: {tables[0]} in it is compressed again: unpack it and name the file")
    return DataFile(path, data_suffix(tables[0]), tables[0])


def _content_suffix(path: Path) -> str:
    """The suffix that fits the beginning of a file; "" for none."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from None
    starts = {
        b"PAR1": ".parquet",
        b"ARROW1": ".arrow",
        b"\xff\xff\xff\xff": ".arrow",
        b"PK\x03\x04": ZIP,
        b"{": ".jsonl",
        b"[": ".json",
    }
    if found := [suffix for start, suffix in starts.items() if head.lstrip().startswith(start)]:
        return found[0]
    text = head.decode(errors="replace").rstrip()
    lines = text.split("\n")[: -1 if len(head) == HEAD else None]
    for mark, suffix in (("\t", ".tsv"), (",", ".csv")):
        sizes = {len(row) for row in csv.reader(lines, delimiter=mark)}
        if len(lines) > 1 and len(sizes) == 1 and sizes != {1}:
            return suffix
    return ""


def _unzstd(content: bytes) -> bytes:
    import pyarrow

    try:
        with pyarrow.input_stream(io.BytesIO(content), compression="zstd") as stream:
            return bytes(stream.read())
    except OSError as error:
        if "Truncated" in str(error):
            raise EOFError from None
        raise RuntimeError(str(error)) from None


_UNPACK = {".gz": gzip.decompress, ".zst": _unzstd, ".bz2": bz2.decompress, ".xz": lzma.decompress}
"""By suffix of COMPRESSED."""
