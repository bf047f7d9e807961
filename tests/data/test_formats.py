"""Cells of files of all formats, as they stand; and lines that are damaged."""

from __future__ import annotations

import csv
import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_tune.data.formats import cell_text, read_rows
from petals_tune.data.store import DataFiles
from petals_tune.errors import DataError
from tests.raising import raises

# Texts that readers which guess types have changed: numbers, booleans, dates, missing values, quotes, marks.
TRICKY = [
    "007",
    "1.10",
    "1e5",
    "true",
    "NA",
    "None",
    "null",
    "nan",
    "",
    " ",
    "2024-05-07",
    '"',
    "'",
    "a,b",
    "\ufeff",
    "#",
]
CHARACTERS = st.characters(exclude_categories=["Cs"])
CELLS = st.sampled_from(TRICKY) | st.text(CHARACTERS, max_size=12)
TABLES = st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=8)
COLUMNS = ["a", "b"]


def write_csv(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def write_tsv(path: Path, rows: list[list[str]]) -> None:
    lines = ["\t".join(cells) for cells in [COLUMNS, *rows]]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def write_jsonl(path: Path, rows: list[list[str]]) -> None:
    lines = [json.dumps(dict(zip(COLUMNS, cells, strict=True)), ensure_ascii=False) for cells in rows]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def write_json(path: Path, rows: list[list[str]]) -> None:
    path.write_text(json.dumps([dict(zip(COLUMNS, cells, strict=True)) for cells in rows]))


def write_parquet(path: Path, rows: list[list[str]]) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table(dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))), path
    )


WRITERS = {"csv": write_csv, "tsv": write_tsv, "jsonl": write_jsonl, "json": write_json, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=60, deadline=None)
@given(rows=TABLES)
def test_any_cells_come_back_as_they_were_written(
    kind: str, rows: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if kind == "tsv":  # a format without quotes has no tabs and no line ends in its cells
        rows = [["".join(c for c in cell if c not in "\t\n\r") for cell in cells] for cells in rows]
    path = tmp_path_factory.mktemp("rows") / f"rows.{kind}"
    WRITERS[kind](path, rows)
    right = [dict(zip(COLUMNS, cells, strict=True)) for cells in rows]
    assert list(read_rows(path, kind=kind)) == right
    stored = DataFiles((path,)).stored()
    assert list(stored.read(range(len(stored)))) == right, "from the cache too"


def rows_of(path: Path, content: str | bytes, **options: Any) -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(path, kind=path.suffix[1:], **options))


def test_quotes_are_those_of_the_format(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.csv", 'a,b\n"x, ""y""",z\n') == [{"a": 'x, "y"', "b": "z"}]
    assert rows_of(tmp_path / "a.tsv", 'a\tb\n"x\tz"\n') == [{"a": '"x', "b": 'z"'}]
    assert rows_of(tmp_path / "b.tsv", 'a\tb\n"x\ty"\tz\n', quotes=True) == [{"a": "x\ty", "b": "z"}]


def test_numbers_of_json_keep_their_spelling_as_a_cell_and_are_numbers_inside(tmp_path: Path) -> None:
    (row,) = rows_of(
        tmp_path / "a.jsonl", '{"a": 1.10, "b": 12345678901234567890123, "c": [1, {"x": 0.5}], "d": true}\n'
    )
    assert row == {"a": "1.10", "b": "12345678901234567890123", "c": [1, {"x": 0.5}], "d": True}


def test_a_line_with_more_or_fewer_fields_is_named(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.csv", 'a,b\n1,2\n"x\ny",2,3\n4\n5,6\n')
    assert [row for row in rows if isinstance(row, dict)] == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]
    more, fewer = (row for row in rows if isinstance(row, DataError))
    assert ("lines 3 to 4 " in str(more), more.seen) == (True, 3)
    assert ("line 5 " in str(fewer), fewer.seen) == (True, 1)


@pytest.mark.parametrize("line", ["{", "[1]", '"x"', '{"a": 1, "a": 2}', "nonsense"])
def test_a_line_that_is_no_object_is_one_damaged_row(line: str, tmp_path: Path) -> None:
    good, bad, last = rows_of(tmp_path / "a.jsonl", f'{{"a": "1"}}\n{line}\n\n{{"a": "2"}}\n')
    assert (good, last) == ({"a": "1"}, {"a": "2"})
    assert "line 2 " in str(bad)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_says_the_encoding(encoding: str, tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.csv", "a,b\r\nä,ö\r\n".encode(encoding)) == [{"a": "ä", "b": "ö"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.csv", "a,b\nä,ö\n".encode("latin-1")),
        ("twice.csv", "a,a\n1,2\n"),
        ("nameless.csv", "a,\n1,2\n"),
        ("empty.csv", ""),
        ("open.csv", 'a,b\n1,"2\n'),
        ("half.json", '[{"a": 1}'),
        ("lists.json", '{"x": [1], "y": [2]}'),
        ("none.parquet", "no parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: str | bytes, tmp_path: Path) -> None:
    with raises(DataError, source=tmp_path / name):
        rows_of(tmp_path / name, content)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with raises(DataError, source=tmp_path / "no.csv"):
        list(read_rows(tmp_path / "no.csv", kind="csv"))
    with raises(DataError, source=tmp_path / "a.xlsx"):
        read_rows(tmp_path / "a.xlsx", kind="xlsx")


def test_an_object_with_one_list_is_a_table(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.json", '{"version": 1, "data": [{"a": "x"}, 3]}')[0] == {"a": "x"}


def test_values_with_types_as_text() -> None:
    written = {
        7: "7",
        0.1: "0.1",
        np.float32(0.1): "0.1",
        True: "true",
        Decimal("1.10"): "1.10",
        datetime.date(2024, 5, 7): "2024-05-07",
        datetime.datetime(2024, 5, 7, 1, 2): "2024-05-07 01:02:00",
    }
    assert {value: cell_text(value) for value in written} == written
    assert cell_text(None) is None
    assert cell_text(float("nan")) is None
    for value in ([], {}, b"x"):
        with pytest.raises(TypeError):
            cell_text(value)


def test_a_float32_of_parquet_is_as_short_as_it_was(tmp_path: Path) -> None:
    table = pyarrow.table({"a": pyarrow.array([0.1, None], pyarrow.float32())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read_rows(tmp_path / "a.parquet", kind="parquet")
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert (cell_text(first["a"]), second["a"]) == ("0.1", None)
