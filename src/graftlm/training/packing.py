"""Packing: several short records in one row, in which each attends to itself alone (`models.row_layout.PackedRows`).

Records are packed by best-fit decreasing, as TRL's "bfd" does. TRL packs the whole data set, and its batches count
packs; here the records of a batch are packed, so that an optimizer step is the same as without packing.

Attention computes a row's scores between all its tokens, also where they are masked. So the fullest rows are not the
fastest: of some widths the one with the least estimated work is taken.
"""

from collections.abc import Sequence

WIDTHS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""The widths of rows that are tried, relative to the longest record."""
DOUBLE_WORK = 1024
"""Tokens of a row at which a token takes twice as long as in a short row: measured with SmolLM2's layers on a CPU."""


def pack_rows(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Records of these sizes in rows of at most `width` tokens, as indices; a longer record has a row of its own.

    Best-fit decreasing: the longest record first, each into the fullest row it fits into. The records of some of the
    rows, packed again, make the same rows.
    """
    rows, space = list[list[int]](), list[int]()
    for record in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [row for row, left in enumerate(space) if left >= sizes[record]]
        best = min(fitting, key=lambda row: space[row], default=len(rows))
        if best == len(rows):
            rows.append([])
            space.append(width)
        rows[best].append(record)
        space[best] -= sizes[record]
    return rows


def row_width(sizes: Sequence[int], most: int) -> int:
    """The width for `pack_rows` with the least work: at least the longest record, at most `most` tokens."""
    longest = max(sizes)
    widths = dict.fromkeys(max(longest, min(most, int(factor * longest))) for factor in WIDTHS)

    def work(width: int) -> float:
        rows = pack_rows(sizes, width)
        used = max(sum(sizes[i] for i in row) for row in rows)
        return len(rows) * used * (1 + used / DOUBLE_WORK)

    return min(widths, key=work)
