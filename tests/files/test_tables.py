"""Tables of layouts/, and others, in the encodings, delimiters and with the headers that people have."""

import re
from pathlib import Path
from typing import Any

import pytest

from data_files import LAYOUTS, TEXTS, WORDS
from graftlm.config.csv_format import CsvFormat, csv_format
from graftlm.config.flags import parse_columns
from graftlm.errors import InputError
from graftlm.files.readers import read_records
from graftlm.text.dataset import load_dataset, load_prompts
from graftlm.text.records import Conversation

LABELS = [WORDS[n % 2] for n in range(24)]
DIGITS = [str(n % 2) for n in range(24)]
ACCENTS = [f"{text} \N{EN DASH} “naïve” café" for text in TEXTS]
DAYS = "Mon Apr 06 22:19:45 PDT 2009"


def columns(**values: list[str]) -> list[dict[str, str]]:
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def table(path: Path, csv: str = "") -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes; a note without the path."""
    notes: list[str] = []
    rows = [record for _, record in read_records(path, "", csv_format(parse_columns(csv))[1], notes)]
    return rows, [note.removeprefix(f"{path}: ") for note in notes]


def refused(path: Path, message: str, csv: str = "") -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message.replace('FILE', str(path)))}$"):
        table(path, csv)


NAMED = columns(text=TEXTS, label=LABELS)
NUMBERED = columns(text=TEXTS, label=DIGITS)
FILES: dict[str, tuple[list[dict[str, str]], list[str]]] = {
    "agnews_raw.csv": (
        columns(column1=list("1234" * 6), column2=[f"Title {n}" for n in range(24)], column3=TEXTS),
        ["read with no header: columns are named column1, column2, column3"],
    ),
    "bom.csv": (NAMED, []),
    "comment_blank.csv": (NUMBERED, []),
    "cp1252.csv": (NAMED, []),
    "cr_only.csv": (NAMED, []),
    "crlf.csv": (NAMED, []),
    "excel.csv": (columns(Text=TEXTS, Label=["Negative ", "Positive "] * 12), ["read with semicolon between columns"]),
    "float_labels.csv": (columns(text=TEXTS, label=["0.0", "1.0"] * 12), []),
    "index.csv": (columns(**{"Unnamed: 0": list(map(str, range(24))), "text": TEXTS, "label": LABELS}), []),
    "latin1_real.csv": (columns(text=ACCENTS, label=LABELS), ["read with encoding cp1252"]),
    "noheader.csv": (
        columns(column1=TEXTS, column2=DIGITS),
        ["read with no header: columns are named column1, column2"],
    ),
    "numeric_text.csv": (columns(text=[str(1000 + n) for n in range(24)], label=DIGITS), []),
    "pipe.csv": (NAMED, ["read with pipe between columns"]),
    "plain.csv": (NAMED, []),
    "quoted_newlines.csv": (
        columns(text=[f'first line {n}\nsecond "quoted" line, {text}' for n, text in enumerate(TEXTS)], label=LABELS),
        [],
    ),
    "sentiment140.csv": (
        columns(
            column1=["0", "4"] * 12,
            column2=[str(1467810369 + n) for n in range(24)],
            column3=[DAYS] * 24,
            column4=["NO_QUERY"] * 24,
            column5=["user"] * 24,
            column6=[f"café {text}" for text in TEXTS],
        ),
        [
            "read with encoding cp1252, no header: columns are named column1, column2, column3, column4, column5, "
            "column6"
        ],
    ),
    "space_after_comma.csv": (NAMED, []),
    "sst2.tsv": (columns(sentence=TEXTS, label=DIGITS), []),
    "stray_quote.csv": (columns(text=[f'5" screen {n}' for n in range(24)], label=LABELS), []),
    "tabs.tsv": (NAMED, []),
    "tabs_named.csv": (NAMED, ["read with tab between columns"]),
    "trailing_comma.csv": (NUMBERED, []),
    "upper.csv": (columns(Text=TEXTS, Label=DIGITS), []),
}


@pytest.mark.parametrize("name", FILES)
def test_a_table_gives_its_rows_and_says_what_was_found(name: str) -> None:
    assert table(LAYOUTS / name) == FILES[name]


def test_empty_columns_and_missing_values_stay() -> None:
    rows, notes = table(LAYOUTS / "spam_kaggle_latin1.csv")
    empty = {"Unnamed: 2": "", "Unnamed: 3": "", "Unnamed: 4": ""}
    assert rows[:2] == [{"v1": "ham", "v2": "see you at 0", **empty}, {"v1": "spam", "v2": "free prize 1", **empty}]
    assert (len(rows), notes) == (24, [])
    rows, _ = table(LAYOUTS / "nan.csv")
    assert [row["text"] for row in rows] == [*TEXTS[:5], "", *TEXTS[6:]]
    assert [row["label"] for row in rows] == [*["0.0", "1.0"] * 3, "0.0", "", *["0.0", "1.0"] * 8]


AB = [{"text": "é a", "label": "x"}, {"text": "b", "label": "y"}]
PLAIN = "text,label\né a,x\nb,y\n"


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        (PLAIN.encode("utf-8-sig"), []),
        (PLAIN.encode("utf-16"), []),
        (PLAIN.encode("utf-16-be"), ["read with encoding utf-16-be"]),
        (PLAIN.encode("utf-16-le"), ["read with encoding utf-16-le"]),
        (PLAIN.replace(",", "\t").encode("utf-16"), ["read with tab between columns"]),
        (PLAIN.encode("latin-1"), ["read with encoding cp1252"]),
        (b"sep=;\r\n" + PLAIN.replace(",", ";").encode(), ["read with semicolon between columns"]),
        (b"SEP=,\n" + PLAIN.encode(), []),
        (f"# made by hand, in 2024, here\n{PLAIN}".encode(), ["left out 1 lines that begin with #"]),
        (PLAIN.replace("\nb", "\n# a comment\n\n,\n   \nb").encode(), ["left out 1 lines that begin with #"]),
        (PLAIN.replace("\n", ",,\n").replace("label,,", "label").encode(), []),
        (PLAIN.replace("\n", "\r").encode(), []),
    ],
)
def test_quirks_of_tables(tmp_path: Path, content: bytes, notes: list[str]) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert table(tmp_path / "a.csv") == (AB, notes)


def test_quotes_in_a_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n" so he said\t0\nand "left"\t1\nanother"\t0\n')  # as GLUE writes them
    assert table(path) == (
        columns(text=['" so he said', 'and "left"', 'another"'], label=["0", "1", "0"]),
        ["read with quotes are text"],
    )
    path.write_text('text\tlabel\n"two\nlines"\t0\n"a ""b"""\t1\n')  # as Excel does
    assert table(path) == (columns(text=["two\nlines", 'a "b"'], label=["0", "1"]), [])


@pytest.mark.parametrize(
    ("content", "header"),
    [
        ("0,1\nfine,good\nbad,poor\n", True),  # pandas numbers columns without names
        (",0,1\n0,fine,good\n", True),
        ("good,pos\nbad,neg\nfine,pos\n", False),
        ("good,1\nbad,0\n", False),
        ("id,question,answer\n1,a,b\n", True),
        ("what is the capital city of the country that borders Portugal?,Madrid\nwhy?,because\n", False),
        ("prompt,completion\na,b\na,c\n", True),
    ],
)
def test_whether_there_is_a_header(tmp_path: Path, content: str, header: bool) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    rows, notes = table(path)
    lines = content.splitlines()
    assert len(rows) == len(lines) - header
    assert [*rows[0].values()] == lines[header].split(",") and bool(notes) == (not header)
    flipped, _ = table(path, f"header={'no' if header else 'yes'}")
    assert len(flipped) == len(lines) - (not header)


@pytest.mark.parametrize(
    ("content", "message", "csv", "count"),
    [
        (
            b"a;b,c\nd;e,f\n",
            "FILE: comma and semicolon split its rows evenly: say which, as in --columns delimiter=tab",
            "delimiter=semicolon",
            1,
        ),
        (
            b"good,pos\nbad,neg\ngood,pos\n",
            "FILE: its first row is there again, so it may be a header or not: say which with --columns header=yes or "
            "header=no",
            "header=no",
            3,
        ),
        (
            b"text,label\n\xef\xeb\xee\xf5\xee\xe9 \xf4\xe8\xeb\xfc\xec,0\n",
            "FILE:2: byte 1 is not UTF-8 (0xef): name the encoding, as in --columns encoding=cp1251, or save the "
            "file as UTF-8",
            "encoding=cp1251",
            1,
        ),
        (
            "text,label\nécole,0\n".encode() + b"caf\xe9,1\n",
            "FILE:3: byte 4 is not UTF-8 (0xe9), and other characters are: repair it, or name another with --columns "
            "encoding=cp1252",
            "encoding=cp1252",
            2,
        ),
        ("text,label\ncaf\xe9,1\n".encode("latin-1"), "FILE:2: is not utf-8 (invalid continuation byte)", "", 1),
        (b"good,1\nbad\n", "FILE:2: wrong number of values: 1, but the first row has 2", "", 0),
    ],
)
def test_what_cannot_be_decided_names_the_flag(
    tmp_path: Path, content: bytes, message: str, csv: str, count: int
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    if csv:
        refused(path, message)
        assert len(table(path, csv)[0]) == count
    elif count:
        refused(path, f"{message}: name another in --columns", "encoding=utf-8")
    else:
        refused(path, message)


def test_tabs_in_a_tsv_precede_commas_in_its_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text, and more\tlabel\na, b\t1\nc, d\t0\n")
    assert table(path)[0] == [{"text, and more": "a, b", "label": "1"}, {"text, and more": "c, d", "label": "0"}]


@pytest.mark.parametrize(
    ("content", "kind"), [(b"PAR1\0", "parquet"), (b"\x1f\x8b\x08", "gzip"), (b"PK\x03\x04x", "a .zip or .xlsx")]
)
def test_a_table_that_is_none(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    refused(path, f"FILE: holds {kind}, not csv: give it its own suffix, or save it as csv")


@pytest.mark.parametrize("mark", ["\t", ";"])
def test_a_text_file_that_looks_like_a_table(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "a.txt"
    lines = [f"the {word}, I say{mark}{n}\n" for n, word in enumerate(("fox", "owl", "elk", "emu"))]
    path.write_text("".join(lines))
    rows, notes = table(path)
    assert rows == [{"text": "".join(lines)}]
    assert notes == [
        "read as one text, and its lines look like the rows of a table: if it is one, name it .csv or give "
        "--columns delimiter=tab (or semicolon, pipe)"
    ]
    rows, _ = table(path, f"delimiter={'tab' if mark != ';' else 'semicolon'},header=no")
    assert rows[3] == {"column1": "the emu, I say", "column2": "3"}
    path.write_text("".join([*lines, "So they ended.\n"]))
    assert table(path)[1] == []


def test_a_table_without_a_header_is_mapped(tmp_path: Path) -> None:
    named = parse_columns("text=column3,label=column1")
    data = load_dataset(str(LAYOUTS / "agnews_raw.csv"), columns=named, labels=("1", "2", "3", "4"))
    assert {row.text for rows in data.splits.values() for row in rows} == set(TEXTS)
    assert (
        f"{LAYOUTS / 'agnews_raw.csv'}: read with no header: columns are named column1, column2, column3" in data.notes
    )
    with pytest.raises(InputError, match=r"noheader\.csv: .*; read with no header: columns are named column1, col"):
        load_dataset(str(LAYOUTS / "noheader.csv"))
    (tmp_path / "a.csv").write_text("what is the tallest mountain of all the continents of the earth?\nwhy?\n")
    prompts, notes = load_prompts(str(tmp_path / "a.csv"), columns={"prompt": "column1"})
    assert [row.text[:4] for row in prompts] == ["what", "why?"]
    assert notes == [f"{tmp_path / 'a.csv'}: read with no header: columns are named column1"]


def test_messages_in_a_table_are_json(tmp_path: Path) -> None:
    said = '[{""role"": ""user"", ""content"": ""hi %d""}, {""role"": ""assistant"", ""content"": ""a, b""}]'
    path = tmp_path / "a.csv"
    path.write_text("messages,id\n" + "".join(f'"{said % n}",{n}\n' for n in range(4)))
    records = [record for rows in load_dataset(str(path)).splits.values() for record in rows]
    assert isinstance(records[0], Conversation)
    assert sorted(record.text for record in records) == [f"user: hi {n}\n\nassistant: a, b" for n in range(4)]
    path.write_text(path.read_text().replace('""', "'"))
    with pytest.raises(InputError, match=r"a\.csv:2: messages must be a list of role and content, not \"\[\{'role'"):
        load_dataset(str(path))


def test_the_format_of_a_table_among_the_columns() -> None:
    named, csv = csv_format(parse_columns("text=a,header=no,delimiter=tab,encoding=cp1251"))
    assert (named, csv) == ({"text": "a"}, CsvFormat("cp1251", "\t", "no"))
    for text, allowed in (
        ("header=maybe", "yes or no"),
        ("delimiter=;", "comma, semicolon, tab, pipe"),
        ("encoding=klingon", "an encoding of Python, such as cp1252"),
        ("encoding=rot13", "an encoding of Python, such as cp1252"),
    ):
        with pytest.raises(InputError, match=f"^--columns {re.escape(text)}: must be {allowed}$"):
            parse_columns(text)
