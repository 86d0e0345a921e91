"""jsonl, json, csv and parquet as data sets."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st

from fuzz.base import ANY, Target, changed_json
from graftlm.text.dataset import load_dataset

TEXTS = ["good fun", "a dull \x85 film", 'he said "no", twice', "½ naïve", "x" * 50]
ROWS = [{"text": f"{text} {n}", "label": n % 2} for n, text in enumerate(TEXTS * 3)]
PAIRS = [{"prompt": f"p {n}", "chosen": " yes", "rejected": f" no {n}", "ended": [True, False]} for n in range(12)]
ASKED = [{"prompt": f"p {n}", "completion": " yes"} for n in range(12)]


def lines(rows: Sequence[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def reader(suffix: str):
    def read(folder: Path, content: bytes) -> object:
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        return load_dataset(str(path), labels=("negative", "positive"))

    return read


def made_lines(valid: Sequence[bytes]) -> "st.SearchStrategy[bytes]":
    row = st.one_of(*(changed_json(rows[0]) for rows in (ROWS, PAIRS, ASKED)), ANY)
    return st.lists(row, min_size=1, max_size=8).map(lambda rows: lines([*rows, *ROWS]))


def made_csv(valid: Sequence[bytes]) -> "st.SearchStrategy[bytes]":
    cell = st.text(alphabet='a1,"\n\r\t\x00é\x85 ', max_size=8)
    rows = st.lists(st.lists(cell, max_size=4).map(",".join), max_size=12).map("\n".join)
    return st.tuples(st.sampled_from(["text,label\n", "label,text\r\n", "text;label\n", "", "text,text\n"]), rows).map(
        lambda parts: "".join(parts).encode()
    )


def csv_of() -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([["text", "label"], *([row["text"], row["label"]] for row in ROWS)])
    return out.getvalue().encode()


def parquet_of() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    made = []
    for compression in ("none", "snappy", "zstd", "gzip"):
        for rows in (ROWS, PAIRS):
            out = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, compression=compression)
            made.append(out.getvalue())
    return made


TARGETS = [
    Target("jsonl", lambda _: [lines(ROWS), lines(PAIRS), lines(ASKED)], reader(".jsonl"), made_lines),
    Target("json", lambda _: [json.dumps(ROWS).encode(), json.dumps(PAIRS).encode()], reader(".json"), made_lines),
    Target("csv", lambda _: [csv_of()], reader(".csv"), made_csv),
    Target("parquet", lambda _: parquet_of(), reader(".parquet")),
]
