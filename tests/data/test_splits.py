"""Splits of folders and of the hub, whose files without types are read here and not by `datasets`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from petals_tune.data.splits import find_splits
from petals_tune.errors import DataError
from tests.hub import Hub
from tests.raising import raises

SCRIPT = """
import json, sys
from petals_tune.data.splits import find_splits
for name in ("tiny/csv", "tiny/jsonl"):
    found = find_splits(name, config=None, revision=None, streaming=False, quotes=None)
    print(json.dumps({split: list(rows.read(range(rows.rows))) for split, rows in sorted(found.items())}))
"""


def test_the_files_of_a_folder_are_splits_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "train-00000.csv").write_text("a\n001\n")
    (tmp_path / "train-00001.csv").write_text("a\n002\n")
    (tmp_path / "test.csv").write_text("a\ntrue\n")
    found = find_splits(str(tmp_path), config=None, revision=None, streaming=False, quotes=None)
    assert {name: list(split.stream()) for name, split in found.items()} == {
        "train": [{"a": "001"}, {"a": "002"}],
        "test": [{"a": "true"}],
    }


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.xlsx").write_text("")
    with raises(DataError, source=str(tmp_path)):
        find_splits(str(tmp_path), config=None, revision=None, streaming=False, quotes=None)


@pytest.fixture
def hub(tmp_path: Path):
    csv, jsonl = tmp_path / "csv", tmp_path / "jsonl"
    for folder in (csv, jsonl):
        folder.mkdir()
    (csv / "train.csv").write_text("a,b\n007,true\nNA,1.10\n")
    (csv / "test.csv").write_text("a,b\n008,false\n")
    (jsonl / "train.jsonl").write_text('{"a": "2024-05-07", "b": 1.10}\n')
    with Hub(datasets={"tiny/csv": csv, "tiny/jsonl": jsonl}).serving() as hub:
        yield hub


def test_files_of_the_hub_are_read_as_they_stand(hub: Hub, tmp_path: Path) -> None:
    csv, jsonl = (json.loads(line) for line in hub.known_to(SCRIPT, tmp_path) if line.startswith("{"))
    assert csv == {"train": [{"a": "007", "b": "true"}, {"a": "NA", "b": "1.10"}], "test": [{"a": "008", "b": "false"}]}
    assert jsonl == {"train": [{"a": "2024-05-07", "b": "1.10"}]}
