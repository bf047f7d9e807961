"""Readers of data files: the cells as they stand, nothing guessed.

Text is text: `007`, `true`, `1.10`, `NA` and `2024-05-07` stay what they are, whatever the other rows hold. Numbers of
JSON keep their spelling where they are a cell; inside lists and objects they are numbers. Values of parquet and of
`datasets` keep their types; `cell_text` writes them as text where a text is needed.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow
import pyarrow.parquet

from petals_tune.errors import DataError

TableRow = Mapping[str, Any]  # column -> cell

_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_READ_ROWS = 1024


def read_rows(path: Path, *, kind: str, quotes: bool | None = None) -> Iterator[TableRow | DataError]:
    """Yield the rows of a file, in order; in place of a row that is damaged, a DataError that says where and how.

    kind:    csv, tsv, jsonl, ndjson, json, parquet or txt
    quotes:  whether cells of csv and tsv may stand in double quotes; None: those of csv may, those of tsv may not

    Raises DataError where the file as a whole cannot be read.
    """
    reader = READERS.get(kind)
    if reader is None:
        raise DataError(
            f"{path} is no file of a kind that is read here: it must be {', '.join(sorted(READERS))}", source=path
        )
    if kind in ("csv", "tsv"):
        delimiter, quoted = (",", True) if kind == "csv" else ("\t", False)
        return _delimited(path, delimiter=delimiter, quoted=quoted if quotes is None else quotes)
    return reader(path)


def _delimited(path: Path, *, delimiter: str, quoted: bool) -> Iterator[TableRow | DataError]:
    """Rows under a header. Blank lines are none; one empty cell alone in its line is written `""`."""
    csv.field_size_limit(sys.maxsize)
    with _open_text(path, newline="") as file:
        rules: Any = {"quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}
        lines = csv.reader(file, delimiter=delimiter, strict=True, **rules)
        header = next(_checked(lines, path, lambda: lines.line_num), None)
        if header is None:
            raise DataError(f"{path} is empty: its first line must name the columns", source=path)
        if len(set(header)) < len(header) or not all(header):
            raise DataError(
                f"the first line of {path} must name the columns, each by another name; it is {header}",
                source=path,
                seen=header,
            )
        end = lines.line_num
        for cells in _checked(lines, path, lambda: lines.line_num):
            start, end = end + 1, lines.line_num
            if len(cells) == len(header):
                yield dict(zip(header, cells, strict=True))
            elif cells:
                where = f"line {start}" if start == end else f"lines {start} to {end}"
                yield DataError(
                    f"{where} has {len(cells)} fields, and the header has {len(header)}: {_short(cells)}"
                    + ("; a cell with a delimiter in it stands in double quotes" if quoted else ""),
                    source=path,
                    seen=len(cells),
                )


def _jsonl(path: Path) -> Iterator[TableRow | DataError]:
    with _open_text(path) as file:
        number = 0

        def lines() -> Iterator[str]:
            nonlocal number
            for line in file:
                number += 1
                yield line

        # Not str.splitlines: it also cuts at characters that JSON allows inside a text, such as U+2028.
        for line in _checked(lines(), path, lambda: number):
            if line.strip():
                yield _parsed(line, lambda: f"line {number}", path)


def _json(path: Path) -> Iterator[TableRow | DataError]:
    """A list of objects, or an object whose only list of objects is the data, as {"data": [...]}."""
    with _open_text(path) as file:
        text = "".join(_checked(file, path, lambda: 0))
    document = _parsed(text, lambda: "the file", path, whole=True)
    if isinstance(document, DataError):
        raise document
    lists = [document] if isinstance(document, list) else [v for v in document.values() if isinstance(v, list)]
    if len(lists) != 1:
        raise DataError(
            f"{path} must hold a list of objects, or an object with one such list; it has {len(lists)} lists",
            source=path,
        )
    for number, row in enumerate(lists[0], start=1):
        yield _as_row(row, f"row {number}", path)


def _txt(path: Path) -> Iterator[TableRow]:
    """Paragraphs, which blank lines separate, as the column `text`."""
    with _open_text(path) as file:
        paragraph: list[str] = []
        for line in _checked(file, path, lambda: 0):
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield {"text": "".join(paragraph).rstrip("\n")}
                paragraph = []
        if paragraph:
            yield {"text": "".join(paragraph).rstrip("\n")}


def _parquet(path: Path) -> Iterator[TableRow]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_READ_ROWS):
                yield from arrow_rows(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}", source=path) from None


def arrow_rows(batch: pyarrow.RecordBatch) -> Iterator[TableRow]:
    """Yield the rows of an Arrow batch. A float32 is given as numpy's, whose text is the shortest that it has."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values = column.to_pylist()
        if pyarrow.types.is_float32(column.type) or pyarrow.types.is_float16(column.type):
            values = [None if value is None else column.type.to_pandas_dtype()(value) for value in values]
        columns[name] = values
    for cells in zip(*columns.values(), strict=True):
        yield dict(zip(columns, cells, strict=True))


READERS: dict[str, Callable[[Path], Iterator[TableRow | DataError]]] = {
    "csv": lambda path: _delimited(path, delimiter=",", quoted=True),
    "tsv": lambda path: _delimited(path, delimiter="\t", quoted=False),
    "jsonl": _jsonl,
    "ndjson": _jsonl,
    "json": _json,
    "parquet": _parquet,
    "txt": _txt,
}


def cell_text(value: Any) -> str | None:
    """Return a cell as text, None where it has no value. Raises TypeError for what is no text, such as a list.

    Booleans are written as in JSON, numbers as Python writes them, dates and times in ISO 8601.
    """
    match value:
        case None | str():
            return value
        case bool() | np.bool_():
            return "true" if value else "false"
        case int() | float() | Decimal() | np.integer() | np.floating():
            return None if value != value else str(value)  # NaN marks a cell without a value
        case date() | time() | timedelta():  # a datetime is a date
            return str(value)
    raise TypeError(type(value).__name__)


class _Spelling(str):
    """A number of JSON, as it is spelled."""


def _parsed(text: str, where: Callable[[], str], path: Path, *, whole: bool = False) -> Any:
    try:
        value = json.loads(
            text,
            parse_float=_Spelling,
            parse_int=_Spelling,
            parse_constant=_Spelling,
            object_pairs_hook=_unique_keys,
        )
    except (ValueError, RecursionError) as error:
        return DataError(f"{where()} is no JSON: {_first_line(error)}", source=path)
    return value if whole else _as_row(value, where(), path)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


def _as_row(value: Any, where: str, path: Path) -> TableRow | DataError:
    if not isinstance(value, dict):
        return DataError(f"{where} is no object with the columns as keys: {_short(value)}", source=path)
    return {name: str(cell) if isinstance(cell, _Spelling) else _numbers(cell) for name, cell in value.items()}


def _numbers(value: Any) -> Any:
    """Numbers inside lists and objects as numbers: templates and tools need them so."""
    match value:
        case _Spelling():
            try:
                return int(value)
            except ValueError:
                return float(value)
        case list():
            return [_numbers(item) for item in value]
        case dict():
            return {name: _numbers(item) for name, item in value.items()}
    return value


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    try:
        with path.open("rb") as file:
            start = file.read(4)
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
        return path.open(encoding=encoding, newline=newline)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", source=path) from None


def _checked(lines: Iterable[Any], path: Path, line: Callable[[], int]) -> Iterator[Any]:
    """Yield what a reader of text yields. Raises DataError in place of its errors."""
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: the byte {error.object[error.start]:#04x} stands after line {line()}; convert it, "
            f"as by: iconv -f WINDOWS-1252 -t UTF-8 {path}",
            source=path,
        ) from None
    except csv.Error as error:
        raise DataError(f"{path} is damaged at line {line()}: {error}", source=path, row=line()) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}", source=path) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]} ..."


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
