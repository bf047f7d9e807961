"""What outlives the service: runs and their checkpoints (SQLite), whose tensors are in folders beside it."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, base_model TEXT NOT NULL, lora TEXT NOT NULL, metadata TEXT NOT NULL,
    created_s REAL NOT NULL, used_s REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS checkpoints (
    run TEXT NOT NULL REFERENCES runs (id), kind TEXT NOT NULL, name TEXT NOT NULL, bytes INTEGER NOT NULL,
    public INTEGER NOT NULL, metadata TEXT NOT NULL, created_s REAL NOT NULL, expires_s REAL,
    PRIMARY KEY (run, kind, name)
) STRICT;
CREATE TABLE IF NOT EXISTS metrics (
    run TEXT NOT NULL REFERENCES runs (id), step INTEGER NOT NULL, name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (run, step, name)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """What a run trains."""

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    id: str
    owner: str
    base_model: str
    lora: LoRA
    metadata: dict[str, Any]
    created_s: float
    used_s: float


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    run: str
    kind: str  # "weights": with the optimizer, or "sampler_weights"
    name: str
    bytes: int
    public: bool
    metadata: dict[str, Any]
    created_s: float
    expires_s: float | None

    @property
    def path(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


class Store:
    """Records by owner. Thread-safe; a change is whole or not at all."""

    def __init__(self, file: Path):
        self._database = sqlite3.connect(file, check_same_thread=False)
        self._lock = threading.Lock()
        with self._writing():
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA foreign_keys = ON")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        self._database.close()

    def add_run(self, run: RunRecord) -> None:
        self._insert("runs", run)

    def used(self, run: str) -> None:
        """Note that a run was used now."""
        with self._writing():
            self._database.execute("UPDATE runs SET used_s = ? WHERE id = ?", (time.time(), run))

    def run(self, id: str) -> RunRecord | None:
        return next(iter(self._runs("WHERE id = ?", id)), None)

    def runs(self, owner: str) -> list[RunRecord]:
        """The runs of an owner, the one used last first."""
        return self._runs("WHERE owner = ? ORDER BY used_s DESC", owner)

    def put_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        self._insert("checkpoints", checkpoint)

    def checkpoints(self, run: str) -> list[CheckpointRecord]:
        """Those of a run that have not expired, the latest first."""
        rows = self._rows("checkpoints", "WHERE run = ? ORDER BY created_s DESC", run)
        found = [CheckpointRecord(**{**row, "public": bool(row["public"])}) for row in rows]
        return [each for each in found if each.expires_s is None or each.expires_s > time.time()]

    def remove_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        with self._writing():
            self._database.execute(
                "DELETE FROM checkpoints WHERE run = ? AND kind = ? AND name = ?",
                (checkpoint.run, checkpoint.kind, checkpoint.name),
            )

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

    def _runs(self, where: str, *values: object) -> list[RunRecord]:
        return [RunRecord(**{**row, "lora": LoRA(**row["lora"])}) for row in self._rows("runs", where, *values)]

    def _rows(self, table: str, where: str, *values: object) -> list[dict[str, Any]]:
        names = [field.name for field in fields(RunRecord if table == "runs" else CheckpointRecord)]
        with self._lock:
            found = self._database.execute(f"SELECT {', '.join(names)} FROM {table} {where}", values).fetchall()
        rows = [dict(zip(names, row, strict=True)) for row in found]
        return [
            {name: json.loads(value) if name in ("lora", "metadata") else value for name, value in row.items()}
            for row in rows
        ]

    def _insert(self, table: str, record: RunRecord | CheckpointRecord) -> None:
        values = {
            name: json.dumps(value) if isinstance(value, dict) else value for name, value in asdict(record).items()
        }
        names, places = ", ".join(values), ", ".join("?" * len(values))
        with self._writing():
            self._database.execute(
                f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({places})", tuple(values.values())
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, self._database:
            yield
