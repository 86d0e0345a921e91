"""Which layout a file has, by the columns of its first row (`layouts.py`), and what is said where it has none."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from graftlm.errors import InputError, did_you_mean
from graftlm.text.column_names import ABOUT_DOCUMENTS
from graftlm.text.fields import Columns, missing_column
from graftlm.text.layout import Layout, small
from graftlm.text.layouts import (
    COMMON,
    DOCUMENTS,
    LAYOUTS,
    MORE_LAYOUTS,
    OTHER_NAMES,
    TEXT_AND_LABEL,
)
from graftlm.text.suggestions import proposal

SHOWN, LONG = 12, 60  # columns that an error names, and characters of each
EVERY_LAYOUT = (*LAYOUTS, *MORE_LAYOUTS)


class UnknownLayoutError(InputError):
    """No layout reads the columns of a file."""

    def __init__(self, problem: str, what_to_do: str, unknown: bool) -> None:
        super().__init__(problem + what_to_do)
        self.problem = problem
        self.unknown = unknown
        """Whether no column is one of a layout."""


def check_columns(columns: Columns) -> None:
    """Raise InputError for fields of --columns that no layout reads, or none reads together."""
    fields = list(dict.fromkeys(key for layout in EVERY_LAYOUT for key in (*layout.keys, *layout.optional)))
    for key, column in columns.items():
        if key not in fields:
            hint = did_you_mean(key, fields)
            raise InputError(f"--columns {key}={column}: no field {key!r}: {hint}fields are {', '.join(fields)}")
    if not _readable(EVERY_LAYOUT, columns):
        raise InputError(
            f"--columns: no layout reads {' and '.join(columns)} together: leave one out; the layouts are {_names()}"
        )


def recognise(path: object, columns: Mapping[str, Any], mapped: Sequence[str] = ()) -> Layout:
    """The layout of a file, from the columns of its first row.

    mapped: the columns named by --columns; the layout must read all of them. LAYOUTS are tried before MORE_LAYOUTS, and
    those before documents and OTHER_NAMES. Raises InputError for an unknown layout, and where several remain.
    """
    return (
        _by_keys(path, LAYOUTS, columns, mapped)
        or _by_keys(path, MORE_LAYOUTS, columns, mapped)
        or _documents(columns, mapped)
        or _by_other_names(path, columns, mapped)
        or _unknown(path, columns, mapped)
    )


def _by_keys(
    path: object, layouts: Sequence[Layout], columns: Mapping[str, Any], mapped: Sequence[str]
) -> Layout | None:
    """The layout whose keys are all columns.

    One whose keys are a part of another's gives way to it, unless --columns names exactly its keys.
    """
    fitting = [layout for layout in _readable(layouts, mapped) if layout.fits(columns)]
    fitting = [layout for layout in fitting if {*layout.keys} <= {*mapped}] or fitting
    fitting = [layout for layout in fitting if not any({*layout.keys} < {*other.keys} for other in fitting)]
    if len(fitting) > 1:
        choices = " or ".join(f"--columns {','.join(f'{key}={key}' for key in layout.keys)}" for layout in fitting)
        raise InputError(
            f"{path}: the columns fit several layouts, {' and '.join(map(str, fitting))}: choose {choices}"
        )
    return _with_optional(fitting[0], columns) if fitting else None


def _documents(columns: Mapping[str, Any], mapped: Sequence[str]) -> Layout | None:
    """Documents, if no column but the text may be a label, or --columns names the text alone."""
    names = _called(DOCUMENTS, "text", columns)
    others = {
        name: value for name, value in columns.items() if name not in names and small(name) not in ABOUT_DOCUMENTS
    }
    may_be_labels = [name for name, value in others.items() if isinstance(value, str | int | float)]
    may_be_labels += _called(TEXT_AND_LABEL, "label", others)
    if not names or ((mapped or may_be_labels) and [*mapped] != ["text"]):
        return None
    return replace(DOCUMENTS, columns=() if names == ["text"] else (("text", names[0]),))


def _by_other_names(path: object, columns: Mapping[str, Any], mapped: Sequence[str]) -> Layout | None:
    """The first layout of OTHER_NAMES that fits. Raises InputError if a key may be several of the columns."""
    if len({small(column) for column in columns}) < len(columns):
        return None
    for layout in _readable(OTHER_NAMES, mapped):
        found = {key: _called(layout, key, columns) for key in layout.keys}
        if not all(found.values()):
            continue
        for key, names in found.items():
            if len(names) > 1:
                choices = " or ".join(f"--columns {key}={name}" for name in names)
                raise InputError(f"{path}: the {key} may be in column {' or '.join(names)}: choose {choices}")
        named = _with_optional(replace(layout, columns=tuple((key, names[0]) for key, names in found.items())), columns)
        if layout.fits({named.key(name): value for name, value in columns.items()}):
            return replace(named, columns=tuple((key, name) for key, name in named.columns if key != name))
    return None


def _with_optional(layout: Layout, columns: Mapping[str, Any]) -> Layout:
    """The layout with the columns that are its optional keys under other names."""
    found = {key: _called(layout, key, columns) for key in layout.optional if key not in columns}
    return replace(layout, columns=(*layout.columns, *((key, names[0]) for key, names in found.items() if names)))


def _called(layout: Layout, key: str, columns: Iterable[str]) -> list[str]:
    """The columns that may be a key, in letters of any size."""
    written = {small(column): column for column in columns}
    if key in written:
        return [written[key]]
    known = layout.also.get(key, ())
    whole = [column for name, column in written.items() if name in known]
    starts, ends = (tuple(k for k in known if k[n] == "_") for n in (-1, 0))
    return whole or [column for name, column in written.items() if name.startswith(starts) or name.endswith(ends)]


def _unknown(path: object, columns: Mapping[str, Any], mapped: Sequence[str]) -> NoReturn:
    """Raise the error for columns without a layout: it names the first column that the closest layout lacks."""
    layouts = _readable(EVERY_LAYOUT, mapped)
    if columns and not any(columns.keys() & {*layout.keys} for layout in layouts if layout in LAYOUTS[:COMMON]):
        present = ", ".join(name if len(name) <= LONG else f"{name[:LONG]}…" for name in map(str, [*columns][:SHOWN]))
        present += f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
        problem = f"{path}: its columns, {present}, fit no layout"
        raise UnknownLayoutError(problem, f": {proposal(columns)}; the layouts are {_names()}", True)
    lacking = [layout for layout in layouts if not columns.keys() >= {*layout.keys}] or layouts
    shared = [len(columns.keys() & {*layout.keys}) for layout in lacking]
    ranks = [(count, count / len(layout.keys)) for count, layout in zip(shared, lacking, strict=True)]
    closest = lacking[ranks.index(max(ranks))]
    missing = next((key for key in closest.keys if key not in columns), closest.keys[0])
    documents = ", or --columns text=text to learn the texts as documents" if "text" in columns else ""
    problem = f"{path}: {missing_column(missing, columns, missing)}"
    raise UnknownLayoutError(problem, f"{documents}; the layouts are {_names()}", False)


def _readable(layouts: Sequence[Layout], fields: Iterable[str]) -> list[Layout]:
    """Those of the layouts that read all these fields."""
    return [layout for layout in layouts if {*fields} <= {*layout.keys, *layout.optional}]


def _names() -> str:
    return f"{', '.join(map(str, LAYOUTS[:COMMON]))}, and {len(EVERY_LAYOUT) - COMMON} more (docs/how-to.md)"
