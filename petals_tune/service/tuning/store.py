"""Records of uploaded files, tuning jobs and their events."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from petals_tune.service.records import Records

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, name TEXT NOT NULL, bytes INTEGER NOT NULL, created_s REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS files_of ON files (owner, created_s);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, model TEXT NOT NULL, source TEXT NOT NULL, training_file TEXT NOT NULL,
    validation_file TEXT, hyperparameters TEXT NOT NULL, seed INTEGER NOT NULL, suffix TEXT, metadata TEXT NOT NULL,
    created_s REAL NOT NULL, starts_from TEXT, status TEXT NOT NULL, held_out_share REAL, finished_s REAL,
    steps INTEGER NOT NULL, validated INTEGER NOT NULL, metrics TEXT NOT NULL, trained_tokens INTEGER, error TEXT,
    deleted INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS jobs_of ON jobs (owner, created_s);
CREATE TABLE IF NOT EXISTS events (
    id TEXT PRIMARY KEY, job TEXT NOT NULL, created_s REAL NOT NULL, message TEXT NOT NULL, level TEXT NOT NULL,
    data TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS events_of ON events (job);
"""

Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
OPEN: tuple[Status, ...] = ("validating_files", "queued", "running")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """An uploaded file of chats."""

    id: str
    owner: str
    name: str  # as its owner calls it; no path of ours
    bytes: int
    created_s: float


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float  # of the recipe's own rate


@dataclass(frozen=True, kw_only=True)
class JobError:
    """Why a job failed, in OpenAI's form."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    id: str
    owner: str
    model: str  # as the request names it
    source: str  # the base model of the service when the job was made
    training_file: str
    validation_file: str | None
    hyperparameters: Hyperparameters
    seed: int
    suffix: str | None
    metadata: dict[str, str]
    created_s: float
    starts_from: str | None = None  # the job whose adapter is tuned further
    status: Status = "validating_files"
    held_out_share: float | None = None  # of the training file's chats; None: the validation file is used
    finished_s: float | None = None
    steps: int = 0  # whose metrics were reported
    validated: int = -1  # the step of the last validation that was reported
    metrics: dict[str, float | None] = field(default_factory=dict)  # the last of each name
    trained_tokens: int | None = None
    error: JobError | None = None
    deleted: bool = False  # the model that it made

    @property
    def fine_tuned_model(self) -> str:
        """The name of the model that the job makes."""
        base = self.model.split(":")[1] if self.model.startswith("ft:") else self.model
        return f"ft:{base}:{self.suffix or ''}:{self.id.removeprefix('ftjob-')[:12]}"


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened in a job; `data` are metrics of a step."""

    id: str
    job: str
    created_s: float
    message: str
    level: Literal["info", "warn", "error"] = "info"
    data: dict[str, Any] | None = None


class Store(Records):
    """Records of all owners."""

    def __init__(self, file: Path):
        super().__init__(file, _SCHEMA, {FileRecord: "files", JobRecord: "jobs", EventRecord: "events"})

    def files(self, owner: str) -> list[FileRecord]:
        """The files of an owner, the latest first."""
        return self.all(FileRecord, "created_s DESC", owner=owner)

    def jobs(self, owner: str) -> list[JobRecord]:
        """The jobs of an owner, the latest first."""
        return self.all(JobRecord, "created_s DESC", owner=owner)

    def events(self, job: str) -> list[EventRecord]:
        """The events of a job, the latest first."""
        return self.all(EventRecord, "rowid DESC", job=job)
