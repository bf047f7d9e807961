from dataclasses import dataclass, field, replace
from threading import Thread

import pytest

from petals_tune.service.records import Database, Table


@dataclass(frozen=True)
class Part:
    share: float


@dataclass(frozen=True)
class Thing:
    name: str
    part: Part | None = None
    numbers: dict[str, list[int]] = field(default_factory=dict)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "records.sqlite"


def test_records_outlive_the_connection_in_their_order_and_groups(file):
    database = Database(file)
    things = Table(database, "things", Thing)
    first, second = Thing("one", Part(0.1), {"a": [1, 2]}), Thing("it's; two")
    things.put("1", "ann", first)
    things.put("2", "ben", Thing("bens"))
    things.put("3", "ann", second)
    things.put("1", "ann", changed := replace(first, name="changed"))
    database.close()
    things = Table(Database(file), "things", Thing)
    assert things.of("ann") == [second, changed]  # a change keeps the place
    assert things.all() == [changed, Thing("bens"), second]
    assert (things.get("1"), things.get("' OR 1=1")) == (changed, None)
    things.remove("1")
    assert things.of("ann") == [second]
    assert Table(Database(file), "others", Thing).all() == []


def test_threads_may_write_at_the_same_time(file):
    things = Table(Database(file), "things", Thing)

    def write(thread):
        for number in range(20):
            things.put(f"{thread} {number}", str(thread), Thing(str(number)))

    threads = [Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(
        [thing.name for thing in things.of(str(thread))] == [*map(str, range(19, -1, -1))] for thread in range(4)
    )
