"""Rows in Arrow files against the same rows in lists."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from petals_tune.data.chat_rows import IGNORED, Row
from petals_tune.data.stored_rows import RECORD, StoredRows, record_of_row, record_without_row

ROWS = [
    Row(input_ids=[number] * length, labels=[IGNORED] + [number] * (length - 1), cut_tokens=number, answers_too_long=1)
    for number, length in enumerate([3, 7, 2, 5, 5, 4])
]


def stored(rows: list[Row]) -> StoredRows:
    """Behind each row is a record of an example without one."""
    records = [record for n, row in enumerate(rows) for record in (record_of_row(n, row), record_without_row(n, "no"))]
    return StoredRows(Dataset.from_list(records, features=RECORD), np.arange(0, 2 * len(rows), 2))


def test_rows_are_those_that_were_stored() -> None:
    rows = stored(ROWS)
    assert list(rows) == ROWS
    assert [rows[n] for n in range(-6, 6)] == [ROWS[n] for n in range(-6, 6)]
    assert list(rows[1:4]) == ROWS[1:4]
    assert list(rows.select([4, 0, 4])) == [ROWS[4], ROWS[0], ROWS[4]]
    assert list(rows[6:]) == list(rows.pack(9)[9:]) == []


@settings(max_examples=20)
@given(st.lists(st.integers(0, 5), max_size=5))
def test_figures_are_those_of_the_rows(chosen: list[int]) -> None:
    rows, same = stored(ROWS).select(chosen), [ROWS[n] for n in chosen]
    assert rows.lengths.tolist() == [len(row.input_ids) for row in same]
    assert rows.learned_tokens == sum(row.supervised_tokens for row in same)
    assert rows.cut_tokens == sum(chosen)
    assert rows.answers_too_long == len(chosen)
    assert rows.largest_id == max(chosen, default=0)


def test_a_pack_is_its_rows_end_to_end() -> None:
    packs = stored([Row(input_ids=[1, 1, 1], labels=[IGNORED, 1, 1]), Row(input_ids=[2, 2], labels=[IGNORED, 2])]).pack(
        5
    )
    assert list(packs) == [Row(input_ids=[1, 1, 1, 2, 2], labels=[IGNORED, 1, 1, IGNORED, 2])]
    packs = stored(ROWS).pack(8)
    assert all(len(row.input_ids) <= 8 for row in packs)
    assert packs.lengths.tolist() == [len(row.input_ids) for row in packs]
    assert sorted(token for row in packs for token in row.input_ids) == sorted(t for row in ROWS for t in row.input_ids)
    assert [row.cut_tokens for row in packs.select([1, 0])] == [packs[1].cut_tokens, packs[0].cut_tokens]
    assert sum(row.cut_tokens for row in packs) == packs.cut_tokens == sum(range(6))
