import sqlite3
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Literal

import pytest

from petals_tune.service.records import Records

SCHEMA = """
CREATE TABLE IF NOT EXISTS things (
    name TEXT PRIMARY KEY, size REAL, is_good INTEGER NOT NULL, part TEXT, numbers TEXT NOT NULL, names TEXT NOT NULL,
    body BLOB NOT NULL,
    kind TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class Part:
    share: float


@dataclass(frozen=True)
class Thing:
    name: str
    size: float | None = None
    is_good: bool = False
    part: Part | None = None
    numbers: dict[str, list[int]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    kind: Literal["a", "b"] = "a"


@pytest.fixture
def records(tmp_path):
    records = Records(tmp_path / "records.sqlite", SCHEMA, {Thing: "things"})
    yield records
    records.close()


FIRST = Thing("it's; one", 0.5, True, Part(0.1), {"a": [1, 2]}, {"b": "c"}, b"\xff\x00", "b")
SECOND = Thing("two")


def test_records_outlive_the_connection(records, tmp_path):
    records.put(SECOND, FIRST)
    again = Records(tmp_path / "records.sqlite", SCHEMA, {Thing: "things"})
    assert again.all(Thing) == [SECOND, FIRST]
    assert again.all(Thing, "name") == [FIRST, SECOND]
    assert again.all(Thing, size=None) == [SECOND]
    assert (again.one(Thing, name=FIRST.name), again.one(Thing, name="' OR 1=1")) == (FIRST, None)
    again.close()


def test_records_are_replaced_changed_and_removed(records):
    records.put(FIRST, SECOND)
    records.put(replace(FIRST, size=2.0))
    records.change(Thing, {"part": Part(0.5), "is_good": True}, name="two")
    assert records.all(Thing, "name") == [replace(FIRST, size=2.0), replace(SECOND, part=Part(0.5), is_good=True)]
    records.remove(Thing, name="two")
    assert records.all(Thing) == [replace(FIRST, size=2.0)]


def test_a_change_is_whole_or_not_at_all(records):
    with pytest.raises(sqlite3.IntegrityError):
        records.put(FIRST, replace(SECOND, is_good=None))
    assert records.all(Thing) == []


def test_threads_may_write_at_the_same_time(records):
    def write(thread):
        for number in range(20):
            records.put(Thing(f"{thread} {number}", float(thread)))

    threads = [Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in range(4):
        assert [each.name for each in records.all(Thing, size=float(thread))] == [f"{thread} {n}" for n in range(20)]
