"""Many examples in two arrays of numbers, without a Python object for each and without their texts.

    values    int32: of each example a header (`_Header`), the spans that are not learned, the lengths of its labels'
              tokens, then all its tokens
    starts    int64: where each example begins in `values`

An `Example` is made when it is read. Its `text` and `instr_tuned_text` are empty: what reads texts does so before
(`preflight.py`), while the rows are in memory.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from graftlm.text.boundary import Tokens
from graftlm.text.collate import Example


class _Header(NamedTuple):
    """The first numbers of an example; counts of tokens, unless they say otherwise."""

    prompt: int
    completion: int
    rejected: int
    rest: int
    spans: int
    """How many parts of the completion are not learned."""
    labels: int
    """How many labels are scored."""
    label: int
    """The label number, -1 for none."""
    desirable: int
    """0 or 1, -1 for none."""
    finished: int
    is_window: int
    skip: int
    place: int
    """Which of `ExampleTable.places` its source begins with."""
    line: int
    """The number at the end of its source, -1 for none."""


_SIZE = len(_Header._fields)


class ExampleTable(Sequence[Example]):
    """Examples by number; a slice is a list of them.

    reference: the log-probabilities of an example's answers, by its number, once they are computed.
    """

    def __init__(
        self,
        values: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int64],
        places: Sequence[str],
        reference: Callable[[int], tuple[float, ...]] | None = None,
    ) -> None:
        self.values, self.starts, self.places = values, starts, tuple(places)
        self._reference = reference

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "ExampleTable":
        """These examples, without their texts."""
        writer = ExampleWriter()
        writer.add(examples)
        return writer.table()

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        numbers = range(len(self))[index]
        return self._example(numbers) if isinstance(numbers, int) else list(map(self._example, numbers))

    @property
    def lengths(self) -> list[int]:
        """`Example.length` of each."""
        prompt, completion, rejected = (self.values[self.starts + column] for column in range(3))
        return [int(length) for length in prompt + completion + rejected]

    def with_reference(self, logps: Any) -> "ExampleTable":
        """The same examples with the reference's log-probabilities [N, A] of their answers."""
        return ExampleTable(self.values, self.starts, self.places, lambda number: tuple(logps[number].tolist()))

    def _example(self, number: int) -> Example:
        start = int(self.starts[number])
        h = _Header(*self.values[start : start + _SIZE].tolist())
        start += _SIZE
        sizes = (h.prompt, h.completion, h.rejected, h.rest)
        more = self.values[start : start + 2 * h.spans + h.labels].tolist()
        start += len(more)
        spans = tuple(range(a, b) for a, b in zip(more[: 2 * h.spans : 2], more[1 : 2 * h.spans : 2], strict=True))
        prompt, completion, rejected, rest, *label_ids = self._parts(start, (*sizes, *more[2 * h.spans :]))
        place = self.places[h.place]
        return Example(
            prompt,
            completion,
            label=None if h.label < 0 else h.label,
            text="",
            instr_tuned_text="",
            source=place if h.line < 0 else f"{place}{h.line}",
            rejected_ids=rejected,
            reference=self._reference(number) if self._reference else None,
            desirable=None if h.desirable < 0 else bool(h.desirable),
            finished=bool(h.finished),
            masked_spans=spans,
            label_ids=tuple(label_ids),
            rest=rest,
            skip=h.skip,
            is_window=bool(h.is_window),
        )

    def prompt(self, number: int) -> Tokens:
        """`Example.prompt_ids` of one."""
        start = int(self.starts[number])
        size, spans, labels = self.values[start], self.values[start + 4], self.values[start + 5]
        return self._parts(start + _SIZE + 2 * int(spans) + int(labels), (int(size),))[0]

    def _parts(self, start: int, sizes: Sequence[int]) -> tuple[Tokens, ...]:
        ids, parts, at = tuple(self.values[start : start + sum(sizes)].tolist()), [], 0
        for size in sizes:
            parts.append(ids[at : at + size])
            at += size
        return tuple(parts)


class Prompts(Sequence[Tokens]):
    """The prompts of examples, each made when it is read."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self[n] for n in range(len(self))[index]]
        some = self._examples
        return some.prompt(range(len(some))[index]) if isinstance(some, ExampleTable) else some[index].prompt_ids


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """`Example.length` of each."""
    return examples.lengths if isinstance(examples, ExampleTable) else [example.length for example in examples]


class ExampleWriter:
    """Collects examples for a table."""

    def __init__(self) -> None:
        self._values, self._starts = array("i"), array("q")
        self._places: dict[str, int] = {}

    def add(self, examples: Iterable[Example]) -> None:
        """Append examples, which keep no reference."""
        for e in examples:
            assert e.reference is None, "a table gets its reference as a whole"
            self._starts.append(len(self._values))
            place, line = _place(e.source)
            header = _Header(
                prompt=len(e.prompt_ids),
                completion=len(e.completion_ids),
                rejected=len(e.rejected_ids),
                rest=len(e.rest),
                spans=len(e.masked_spans),
                labels=len(e.label_ids),
                label=-1 if e.label is None else e.label,
                desirable=-1 if e.desirable is None else int(e.desirable),
                finished=e.finished,
                is_window=e.is_window,
                skip=e.skip,
                place=self._places.setdefault(place, len(self._places)),
                line=line,
            )
            spans = chain.from_iterable((span.start, span.stop) for span in e.masked_spans)
            self._values.extend((*header, *spans, *map(len, e.label_ids)))
            for ids in (e.prompt_ids, e.completion_ids, e.rejected_ids, e.rest, *e.label_ids):
                self._values.extend(ids)

    def table(self) -> ExampleTable:
        """The examples so far; nothing can be added afterwards."""
        values, starts = np.frombuffer(self._values, np.int32), np.frombuffer(self._starts, np.int64)
        return ExampleTable(values, starts, list(self._places))


def _place(source: str) -> tuple[str, int]:
    """A source, "reviews.csv:12", without the number at its end, and that number; -1 if it ends with none."""
    place = source.rstrip("0123456789")
    digits = source[len(place) :]
    plain = digits.isascii() and len(digits) < 10 and str(int(digits or 0)) == digits
    return (place, int(digits)) if plain else (source, -1)
