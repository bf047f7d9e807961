"""Records of uploaded files, tuning jobs and their events."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from petals_tune.service.records import Database, Table

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
    created_s: float
    message: str
    level: Literal["info", "warn", "error"] = "info"
    data: dict[str, Any] | None = None


class Store:
    """The records of a service. Groups are owners, and of events their jobs."""

    def __init__(self, file: Path):
        self._database = Database(file)
        self.files = Table(self._database, "files", FileRecord)
        self.jobs = Table(self._database, "jobs", JobRecord)
        self.events = Table(self._database, "events", EventRecord)

    def close(self) -> None:
        self._database.close()
