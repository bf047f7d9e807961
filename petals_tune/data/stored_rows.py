"""Encoded rows in Arrow files: read from disk when they are asked for, alone or joined to packs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import overload

import numpy as np
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from petals_tune.data.batching import pack
from petals_tune.data.chat_rows import IGNORED, Row

Indices = NDArray[np.int64]

# One record for each row, and one for each example that has none.
RECORD = Features(
    {
        "example": Value("int64"),  # its position among the encoded examples
        "left_out": Value("string"),  # why the example has no row; null in the record of a row
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "tokens": Value("int32"),
        "learned": Value("int32"),
        "largest_id": Value("int32"),
        "cut_tokens": Value("int32"),
        "answers_too_long": Value("int32"),
    }
)

_READ_ROWS = 256


def record_of_row(example: int, row: Row) -> dict[str, object]:
    return {
        "example": example,
        "left_out": None,
        "input_ids": row.input_ids,
        "labels": row.labels,
        "tokens": len(row.input_ids),
        "learned": row.supervised_tokens,
        "largest_id": max(row.input_ids),
        "cut_tokens": row.cut_tokens,
        "answers_too_long": row.answers_too_long,
    }


def record_without_row(example: int, reason: str) -> dict[str, object]:
    empty = Row(input_ids=[0], labels=[IGNORED])
    return {**record_of_row(example, empty), "left_out": reason}


class StoredRows(Sequence[Row]):
    """Rows of a data set of records. Only their positions are held in memory.

    records:  a data set with the features RECORD
    members:  positions of records in it
    starts:   where each row begins in `members`, and their number: a pack has several; None: each is a row
    """

    def __init__(self, records: Dataset, members: Indices, starts: Indices | None = None):
        self._records, self._members = records, members
        self._starts = np.arange(len(members) + 1) if starts is None else starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> Row | StoredRows:
        at = range(len(self))[index]
        return self.select(at) if isinstance(at, range) else next(self._read(at, at + 1))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _READ_ROWS):
            yield from self._read(start, min(start + _READ_ROWS, len(self)))

    def select(self, indices: Sequence[int] | Indices) -> StoredRows:
        """Return the rows at `indices`, in that order."""
        return self._joined(np.asarray(indices, dtype=np.int64), np.ones(len(indices), dtype=np.int64))

    def pack(self, max_tokens: int) -> StoredRows:
        """Return packs of the rows: joined end to end, up to `max_tokens`."""
        packs = pack(self.lengths.tolist(), max_tokens)
        sizes = np.array([len(rows) for rows in packs], dtype=np.int64)
        return self._joined(np.fromiter(chain.from_iterable(packs), np.int64), sizes)

    @cached_property
    def lengths(self) -> Indices:
        """The number of tokens of each row."""
        ends = np.concatenate([[0], np.cumsum(self._column("tokens"))])[self._starts]
        return np.diff(ends)

    @property
    def learned_tokens(self) -> int:
        return int(self._column("learned").sum())

    @property
    def cut_tokens(self) -> int:
        """Tokens of contexts that were left out to make rows short enough."""
        return int(self._column("cut_tokens").sum())

    @property
    def answers_too_long(self) -> int:
        """Answers that alone are too long, of chats with other answers."""
        return int(self._column("answers_too_long").sum())

    @property
    def largest_id(self) -> int:
        return int(self._column("largest_id").max(initial=0))

    def _column(self, name: str) -> Indices:
        """Return an integer of each member."""
        return self._records.data.column(name).to_numpy().astype(np.int64)[self._members]

    def _joined(self, rows: Indices, sizes: Indices) -> StoredRows:
        """Return rows that are `rows` joined end to end, so many of them as `sizes` says."""
        counts = np.diff(self._starts)[rows]
        ends = np.concatenate([[0], np.cumsum(counts)])
        within = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)
        members = self._members[np.repeat(self._starts[rows], counts) + within]
        return StoredRows(self._records, members, ends[np.concatenate([[0], np.cumsum(sizes)])])

    def _read(self, start: int, stop: int) -> Iterator[Row]:
        first = self._starts[start]
        read = self._records[self._members[first : self._starts[stop]].tolist()]
        for at in range(start, stop):
            members = range(self._starts[at] - first, self._starts[at + 1] - first)
            yield Row(
                input_ids=[token for n in members for token in read["input_ids"][n]],
                labels=[label for n in members for label in read["labels"][n]],
                cut_tokens=sum(read["cut_tokens"][n] for n in members),
                answers_too_long=sum(read["answers_too_long"][n] for n in members),
            )
