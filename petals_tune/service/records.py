"""Records in SQLite: what outlives the service, as dataclasses by their ids."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")


class Database:
    """One SQLite file. Thread-safe; a change is whole or not at all."""

    def __init__(self, file: Path):
        self._connection = sqlite3.connect(file, check_same_thread=False)
        self._lock = threading.Lock()
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = NORMAL")  # a power failure may take the last changes, each of them whole

    def execute(self, statement: str, *values: object) -> list[Any]:
        """Run one statement, and return its rows."""
        with self._lock, self._connection:
            return self._connection.execute(statement, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self._connection.close()


class Table(Generic[T]):
    """Records of one kind by their ids, each in a group, such as those of one owner. Fields are stored as JSON."""

    def __init__(self, database: Database, name: str, kind: type[T]):
        """name: of the table, which is made where it is not there yet."""
        self._database, self._name, self._kind = database, name, kind
        database.execute(
            f"CREATE TABLE IF NOT EXISTS {name} (number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, "
            "of TEXT NOT NULL, record TEXT NOT NULL) STRICT"
        )
        database.execute(f"CREATE INDEX IF NOT EXISTS {name}_of ON {name} (of, number)")

    def put(self, id: str, group: str, record: T) -> None:
        """Store a record; one of the same id is replaced, and keeps its place."""
        self._database.execute(
            f"INSERT INTO {self._name} (id, of, record) VALUES (?, ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET of = excluded.of, record = excluded.record",
            *(id, group, msgspec.json.encode(record).decode()),
        )

    def get(self, id: str) -> T | None:
        return next(iter(self._found("WHERE id = ?", id)), None)

    def of(self, group: str) -> list[T]:
        """The records of a group, the latest first."""
        return self._found("WHERE of = ? ORDER BY number DESC", group)

    def all(self) -> list[T]:
        """All records, the earliest first."""
        return self._found("ORDER BY number")

    def remove(self, id: str) -> None:
        self._database.execute(f"DELETE FROM {self._name} WHERE id = ?", id)

    def _found(self, where: str, *values: object) -> list[T]:
        rows = self._database.execute(f"SELECT record FROM {self._name} {where}", *values)
        return [msgspec.json.decode(record, type=self._kind) for (record,) in rows]
