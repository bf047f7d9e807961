"""Arrow files of tables in the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from petals_tune.data import store
from petals_tune.data.formats import read_rows
from petals_tune.data.store import DataFiles
from petals_tune.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETALS_TUNE_CACHE", str(tmp_path / "cache"))


def test_a_file_is_read_once_and_again_when_its_content_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a\nold\n")
    kept = path.stat()
    read: list[Path] = []
    monkeypatch.setattr(store, "read_rows", lambda p, **options: read.append(p) or read_rows(p, **options))
    first, second = DataFiles((path,)), DataFiles((path,))
    assert list(first.stored().read([0])) == list(second.stored().read([0])) == [{"a": "old"}]
    assert len(read) == 1
    path.write_text("a\nnew\n")
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    changed = DataFiles((path,))
    assert list(changed.stored().read([0])) == [{"a": "new"}]
    assert changed.digest != first.digest


def test_damaged_rows_and_the_columns_of_all_rows_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "1"}\n{"b": [1]}\nnonsense\n{"a": "\\ud800"}\n')
    table = DataFiles((path,)).stored()
    good, nested, bad, surrogate = table.read(range(4))
    assert (good, nested) == ({"a": "1"}, {"b": [1]})
    assert isinstance(bad, DataError)
    assert isinstance(surrogate, DataError)
    assert table.columns == ("a", "b")


def test_another_way_of_reading_is_another_table(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('a\n"x"\n')
    assert list(DataFiles((path,)).stored().read([0])) == [{"a": '"x"'}]
    assert list(DataFiles((path,), quotes=True).stored().read([0])) == [{"a": "x"}]
