"""What outlives the service: records in SQLite, whose tensors are in folders beside it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from petals_tune.service.records import Records
from petals_tune.service.tinker.records import (
    CheckpointRecord,
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


class Store(Records):
    """Records of all owners."""

    def __init__(self, file: Path):
        super().__init__(file, _SCHEMA, _TABLES)

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
