"""What a user names, read in one way everywhere: paths, file name endings, and the text of files."""

import codecs
from pathlib import Path

from graftlm.errors import InputError

PATH_FLAGS = frozenset(
    {
        *("init_from", "data", "val_data", "test_data", "template", "out_dir", "to", "out", "predictions", "config"),
        *("folder", "folders", "adapters", "runs", "reward_model", "reference", "task", "prompts", "name"),
    }
)
"""The fields of the config dataclasses that may name a file or a folder; `~` is expanded in them."""
_MARKS = (  # the longest first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def has_suffix(path: Path | str, *suffixes: str) -> bool:
    """Whether a file name ends with one of the suffixes, in any case."""
    return str(path).lower().endswith(suffixes)


def expand_home(text: str, flag: str = "") -> str:
    """A path with `~` or `~user` expanded, also in NAME=~/folder; a prompt template as it is.

    Raises an InputError, which begins with `flag`, for a user that does not exist.
    """
    name, named, path = text.partition("=~")
    if named and "/" not in name and "{text}" not in text:
        return f"{name}={expand_home('~' + path, flag)}"
    if not text.startswith("~") or "{text}" in text:
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text.partition("/")[0]
        raise InputError(
            f"{flag}{text}: there is no user {user[1:]!r}; write ./{user} for a file of this name"
        ) from None


def user_path(name: str | Path, flag: str = "") -> Path:
    """The path that a user wrote, with `~` expanded. Raises InputError."""
    return Path(expand_home(str(name), flag))


def split_choices(name: str) -> tuple[str, list[str]]:
    """A data set's name, and what follows its colons: nyu-mll/glue, and mnli and matched of nyu-mll/glue:mnli:matched.

    A path that exists is not divided.
    """
    choices: list[str] = []
    while ":" in name and not user_path(name).exists():
        name, _, choice = name.rpartition(":")
        choices.insert(0, choice)
    return name, choices


def decode_text(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 if a byte order mark says so; without the mark.

    Raises UnicodeDecodeError, whose `start` counts from the file's first byte.
    """
    mark, encoding = next(((mark, name) for mark, name in _MARKS if content.startswith(mark)), (b"", "utf-8"))
    return content.decode(encoding).removeprefix("\ufeff") if mark else content.decode(encoding)


def read_text(path: Path, label: str = "") -> str:
    """The text of a file that a user named (`decode_text`). Raises an InputError that begins with `label`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{label}{path}: cannot read it: {error.strerror}") from None
    return decode_named(content, f"{label}{path}")


def decode_named(content: bytes, where: str) -> str:
    """The text of a file's bytes (`decode_text`). Raises an InputError that begins with `where`, the file."""
    try:
        if content[:64].count(0) * 4 > len(content[:64]) and not content.startswith(tuple(mark for mark, _ in _MARKS)):
            raise UnicodeDecodeError("utf-8", content, content.index(0), 0, "zero bytes")
        return decode_text(content)
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, error.start - content.rfind(b"\n", 0, error.start)
        kind = "it looks like UTF-16" if 0 in content[:64] else f"0x{content[error.start]:02x}"
        raise InputError(
            f"{where}:{line}: byte {byte} is not {error.encoding.upper()} ({kind}); save the file as UTF-8"
        ) from None
