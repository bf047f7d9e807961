"""What outlives the service: records in SQLite, whose tensors are in folders beside it."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from petals_tune.service.tinker.records import (
    CheckpointRecord,
    LoRA,
    ParkedRecord,
    RequestRecord,
    RunRecord,
    SamplerRecord,
    SessionRecord,
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT, metadata TEXT NOT NULL, created_s REAL NOT NULL,
    seen_s REAL NOT NULL, clones INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, session TEXT NOT NULL, base_model TEXT NOT NULL, lora TEXT NOT NULL,
    metadata TEXT NOT NULL, created_s REAL NOT NULL, used_s REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS parked (
    run TEXT PRIMARY KEY REFERENCES runs (id), folder TEXT NOT NULL, done INTEGER NOT NULL, steps INTEGER NOT NULL,
    loss REAL NOT NULL, weight REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS checkpoints (
    run TEXT NOT NULL REFERENCES runs (id), kind TEXT NOT NULL, name TEXT NOT NULL, folder TEXT NOT NULL,
    bytes INTEGER NOT NULL, named INTEGER NOT NULL, public INTEGER NOT NULL, metadata TEXT NOT NULL,
    created_s REAL NOT NULL, used_s REAL NOT NULL, expires_s REAL, PRIMARY KEY (run, kind, name)
) STRICT;
CREATE TABLE IF NOT EXISTS samplers (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, session TEXT NOT NULL, base_model TEXT NOT NULL, path TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL,
    reply TEXT NOT NULL, result BLOB, is_json INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS metrics (
    run TEXT NOT NULL REFERENCES runs (id), step INTEGER NOT NULL, name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (run, step, name)
) STRICT, WITHOUT ROWID;
"""

_TABLES: dict[type, str] = {
    SessionRecord: "sessions",
    RunRecord: "runs",
    ParkedRecord: "parked",
    CheckpointRecord: "checkpoints",
    SamplerRecord: "samplers",
    RequestRecord: "requests",
}
Record = TypeVar("Record", SessionRecord, RunRecord, ParkedRecord, CheckpointRecord, SamplerRecord, RequestRecord)


class Store:
    """Records of all owners. Thread-safe; a change is whole or not at all."""

    def __init__(self, file: Path):
        self._database = sqlite3.connect(file, check_same_thread=False)
        self._lock = threading.Lock()
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")  # a kill takes nothing; a power failure the last records
        self._database.execute("PRAGMA foreign_keys = ON")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        self._database.close()

    def put(self, *records: Record) -> None:
        """Record all of these, in the place of those with the same key."""
        with self._writing():
            for record in records:
                values = {each.name: _stored(getattr(record, each.name)) for each in fields(record)}
                names, places = ", ".join(values), ", ".join("?" * len(values))
                self._database.execute(
                    f"INSERT OR REPLACE INTO {_TABLES[type(record)]} ({names}) VALUES ({places})",
                    tuple(values.values()),
                )

    def all(self, kind: type[Record], order: str = "rowid", /, **equal: object) -> list[Record]:
        """The records of a kind with these values."""
        names = [each.name for each in fields(kind)]
        where = " AND ".join(f"{name} IS ?" for name in equal) or "TRUE"
        with self._lock:
            rows = self._database.execute(
                f"SELECT {', '.join(names)} FROM {_TABLES[kind]} WHERE {where} ORDER BY {order}", tuple(equal.values())
            ).fetchall()
        return [msgspec.convert(_read(dict(zip(names, row, strict=True)), kind), kind, strict=False) for row in rows]

    def one(self, kind: type[Record], /, **equal: object) -> Record | None:
        return next(iter(self.all(kind, **equal)), None)

    def change(self, kind: type[Record], values: Mapping[str, object], /, **equal: object) -> None:
        """Set columns of the records with these values."""
        settings, where = (
            ", ".join(f"{name} = ?" for name in values),
            " AND ".join(f"{name} IS ?" for name in equal),
        )
        with self._writing():
            self._database.execute(
                f"UPDATE {_TABLES[kind]} SET {settings} WHERE {where}",
                (*map(_stored, values.values()), *equal.values()),
            )

    def remove(self, kind: type[Record], /, **equal: object) -> None:
        where = " AND ".join(f"{name} IS ?" for name in equal) or "TRUE"
        with self._writing():
            self._database.execute(f"DELETE FROM {_TABLES[kind]} WHERE {where}", tuple(equal.values()))

    def runs(self, owner: str) -> list[RunRecord]:
        """The runs of an owner, the one used last first."""
        return self.all(RunRecord, "used_s DESC", owner=owner)

    def checkpoints(self, run: str) -> list[CheckpointRecord]:
        """Those of a run that have not expired, the latest first."""
        found = self.all(CheckpointRecord, "created_s DESC", run=run)
        return [each for each in found if each.expires_s is None or each.expires_s > time.time()]

    def checkpoint(self, path: str) -> CheckpointRecord | None:
        """The checkpoint at `tinker://RUN/KIND/NAME` that has not expired."""
        run, _, rest = path.removeprefix("tinker://").partition("/")
        return next((each for each in self.checkpoints(run) if f"{each.kind}/{each.name}" == rest), None)

    def add_metrics(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Record what was measured at an optimizer step, counted from 1; a step that is done again replaces the old."""
        rows = [(run, step, name, value) for name, value in values.items()]
        with self._writing():
            self._database.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", rows)

    def curves(self, run: str) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of each metric of a run, by its name, in the order of steps."""
        with self._lock:
            rows = self._database.execute(
                "SELECT name, step, value FROM metrics WHERE run = ? ORDER BY name, step", (run,)
            ).fetchall()
        curves: dict[str, list[tuple[int, float]]] = {}
        for name, step, value in rows:
            curves.setdefault(name, []).append((step, value))
        return curves

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, self._database:
            yield


def _stored(value: object) -> object:
    if isinstance(value, LoRA | Mapping | Sequence) and not isinstance(value, str | bytes):
        return msgspec.json.encode(value).decode()
    return int(value) if isinstance(value, bool) else value


def _read(row: dict[str, Any], kind: type) -> dict[str, Any]:
    json_columns = {each.name for each in fields(kind) if each.type in ("LoRA", "dict[str, Any]", "list[str]")}
    return {name: msgspec.json.decode(value) if name in json_columns else value for name, value in row.items()}
