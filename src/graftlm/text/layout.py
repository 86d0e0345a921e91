"""A layout: a set of columns of a data file, and how its rows are converted to records (`layouts.py` lists them)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from graftlm.text.column_names import CONTEXT
from graftlm.text.messages import unread_fields
from graftlm.text.records import Record
from graftlm.text.rows import Row


@dataclass(frozen=True)
class Layout:
    """A set of columns, and how a row that has them becomes a canonical record."""

    name: str
    keys: tuple[str, ...]
    """A row with all of these columns has this layout."""
    convert: Callable[[Row], Record]
    optional: tuple[str, ...] = ()
    """Columns that `convert` reads if they are there."""
    matches: Callable[[Mapping[str, Any]], bool] = lambda columns: True
    """A further condition on the columns, where other layouts have the same keys."""
    without: tuple[str, ...] = ()
    """Columns that other layouts read: a file whose first row has one, even a blank one, has not this layout."""
    refused: tuple[str, ...] = CONTEXT
    """Columns without which a row would mean something else, unless they are optional."""
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    """What the columns are called elsewhere, by key."""
    columns: tuple[tuple[str, str], ...] = ()
    """The columns of a file that are read for some of the keys, as (key, column)."""

    def __str__(self) -> str:
        given = [key for key in self.optional if key in dict(self.columns)]
        return f"{self.name} ({', '.join(dict(self.columns).get(key, key) for key in (*self.keys, *given))})"

    def fits(self, columns: Mapping[str, Any]) -> bool:
        """Whether a file whose first row has these columns may have this layout."""
        return (
            columns.keys() >= {*self.keys}
            and self.matches(columns)
            and all(columns.get(name) is None for name in self.without)
        )

    def record(self, row: Row) -> Record:
        """A row as a canonical record. Raises InputError for wrong values, and for what would be lost."""
        if self.columns:
            row = replace(row, columns={self.key(name): value for name, value in row.columns.items()})
        row.refuse(name for name in self.refused if name not in (*self.keys, *self.optional))
        record = self.convert(row)
        if not self.matches(row.columns):
            raise row.error(f"its columns do not fit the file's layout, {self}: write all rows in one layout")
        return record

    def unused(self, columns: Mapping[str, Any]) -> set[str]:
        """The columns with a value, and the fields of messages, that the layout does not read."""
        found = set()
        for name, value in columns.items():
            if (key := self.key(name)) in self.keys:
                found |= {f"{name}.{inner}" for inner in unread_fields(value)} if isinstance(value, list) else set()
            elif key not in self.optional and value not in (None, ""):
                found.add(name)
        return found

    def key(self, column: str) -> str:
        """The key for which a column is read; another column's name in small letters, if columns have other names."""
        return self._keys.get(column) or (small(column) if self._keys else column)

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {column: key for key, column in self.columns}


def small(column: object) -> str:
    """The name of a column in small letters, without space around it."""
    return str(column).strip().casefold()
