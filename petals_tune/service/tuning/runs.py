"""The data of the page /runs: training runs by Tinker's interface, tuning jobs, and runs of the command line."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from petals_tune.service.errors import ServiceError
from petals_tune.service.tinker.store import Store
from petals_tune.service.tuning import metrics
from petals_tune.service.tuning.command import RUN
from petals_tune.service.tuning.jobs import Jobs
from petals_tune.service.users.keys import EVERYBODY

ADAPTER, CONFIG, REPLIES, RESULT = "adapter", "config.yaml", "replies.json", "result.json"  # in the folder of a run
ADAPTER_CONFIG = "adapter_config.json"
QUIET_S = 600.0  # a run that wrote nothing for so long, and no result, is over; one by Tinker's interface: unused
_CHUNK = 2**18

Status = Literal["running", "succeeded", "failed", "cancelled", "queued", "saved"]


@dataclass(frozen=True, kw_only=True)
class ShownRun:
    """One run, whatever made it."""

    id: str
    kind: Literal["tinker", "job", "folder"]
    name: str
    base_model: str
    created_s: float
    status: Status
    names: Sequence[str]  # of its metrics
    curves: Callable[[], Mapping[str, Sequence[tuple[int, float | None]]]]
    adapter: Path | None
    folder: Path | None = None  # of a run of the command line
    error: str | None = None

    def described(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "name": self.name,
            "base_model": self.base_model,
            "created": int(self.created_s),
            "status": self.status,
            "metrics": list(self.names),
            "adapter": self.adapter is not None,
        }


class RunSource(Protocol):
    """Where runs are."""

    def of(self, owner: str) -> Iterable[ShownRun]: ...


@dataclass(frozen=True, kw_only=True)
class TinkerRuns:
    """The runs of an owner by Tinker's interface; the adapter is that of the latest checkpoint."""

    store: Store
    folder: Path  # of checkpoints

    def of(self, owner: str) -> Iterator[ShownRun]:
        for run in self.store.runs(owner):
            saved = next(iter(self.store.checkpoints(run.id)), None)
            yield ShownRun(
                id=run.id,
                kind="tinker",
                name=str(run.metadata.get("name") or run.id),
                base_model=run.base_model,
                created_s=run.created_s,
                status="running" if time.time() - run.used_s < QUIET_S else "saved",
                names=list(self.store.curves(run.id)),
                curves=partial(self.store.curves, run.id),
                adapter=None if saved is None else self.folder / saved.folder,
            )


@dataclass(frozen=True, kw_only=True)
class JobRuns:
    """The jobs of an owner."""

    jobs: Jobs

    def of(self, owner: str) -> Iterator[ShownRun]:
        for job in self.jobs.of(owner):
            folder, adapter = self.jobs.folder(job.id) / RUN, self.jobs.adapter(job.id)
            yield ShownRun(
                id=job.id,
                kind="job",
                name=job.fine_tuned_model,
                base_model=job.model,
                created_s=job.created_s,
                status="queued" if job.status == "validating_files" else job.status,
                names=_metric_names(folder / metrics.FILE),
                curves=partial(metrics.read_curves, folder / metrics.FILE),
                adapter=adapter if job.status == "succeeded" and not job.deleted else None,
                folder=folder,
                error=None if job.error is None else job.error.message,
            )


@dataclass(frozen=True, kw_only=True)
class FolderRuns:
    """Runs of the command line in a folder, as conf/train.yaml puts them: they are of whoever runs the service.

    They are shown where no keys are needed: who reaches the service then is on its machine.
    """

    folder: Path
    but_not: Path  # the service's own folder, which may be inside

    def of(self, owner: str) -> Iterator[ShownRun]:
        if owner != EVERYBODY:
            return
        inner = self.but_not.resolve()
        for config in (*self.folder.glob(f"*/*/{CONFIG}"), *self.folder.glob(f"*/*/*/{CONFIG}")):
            place = config.parent
            parts = place.relative_to(self.folder).parts
            if any(part.startswith(".") for part in parts) or place.resolve().is_relative_to(inner):
                continue
            yield _of_folder(place, "/".join(parts), config)


def _of_folder(place: Path, name: str, config: Path) -> ShownRun:
    file, adapter = place / metrics.FILE, place / ADAPTER
    # The name in requests is no path, which could lead elsewhere.
    id = f"folder-{hashlib.sha256(name.encode()).hexdigest()[:24]}"
    last_s = max(each.stat().st_mtime for each in (config, file) if each.exists())
    status: Status = "running" if time.time() - last_s < QUIET_S else "failed"
    if (place / RESULT).exists():
        status = "succeeded"
    elif (adapter / ADAPTER_CONFIG).exists():
        status = "saved"  # it was stopped
    return ShownRun(
        id=id,
        kind="folder",
        name=name,
        base_model=str((_yaml(config).get("model") or {}).get("source")),
        created_s=config.stat().st_mtime,
        status=status,
        names=_metric_names(file),
        curves=partial(metrics.read_curves, file),
        adapter=adapter if (adapter / ADAPTER_CONFIG).exists() else None,
        folder=place,
    )


class Runs:
    """The endpoints. `request.state.owner` is whose key came with a request."""

    def __init__(self, sources: Sequence[RunSource]):
        self._sources = sources

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/runs/list", self._list),
            Route("/runs/data/{id}", self._data),
            Route("/runs/data/{id}/adapter.zip", self._adapter),
        ]

    async def _list(self, request: Request) -> Response:
        runs = await asyncio.to_thread(self._of, request.state.owner)
        runs.sort(key=lambda run: run.created_s, reverse=True)
        return JSONResponse({"runs": [run.described() for run in runs]})

    async def _data(self, request: Request) -> Response:
        run = await self._found(request)
        curves = await asyncio.to_thread(run.curves)
        replies = [] if run.folder is None else await asyncio.to_thread(_replies, run.folder, curves)
        return JSONResponse({**run.described(), "curves": curves, "replies": replies, "error": run.error})

    async def _adapter(self, request: Request) -> Response:
        run = await self._found(request)
        if run.adapter is None:
            raise ServiceError(404, "this run has no adapter", kind="invalid_request_error", code="not_found")
        return StreamingResponse(
            _zipped(run.adapter),
            media_type="application/zip",
            headers={"Content-Disposition": 'attachment; filename="adapter.zip"'},
        )

    def _of(self, owner: str) -> list[ShownRun]:
        return [run for source in self._sources for run in source.of(owner)]

    async def _found(self, request: Request) -> ShownRun:
        runs = await asyncio.to_thread(self._of, request.state.owner)
        for run in runs:
            if run.id == request.path_params["id"]:
                return run
        raise ServiceError(404, "there is no such run here", kind="invalid_request_error", code="not_found")


def _metric_names(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8") as text:
            header = text.readline().strip()
    except FileNotFoundError:
        return []
    return [name for name in header.split(",") if name not in ("", "step", "epoch")]


def _replies(folder: Path, curves: Mapping[str, Sequence[tuple[int, Any]]]) -> list[dict[str, Any]]:
    """Replies before and after the training, with the steps that had been taken."""
    try:
        found = json.loads((folder / REPLIES).read_text(encoding="utf-8"))
    except FileNotFoundError:  # a run writes them at its end
        return []
    steps = {"before": 0, "after": len(curves.get("train/loss", ()))}
    return [
        {"step": step, "prompt": each["prompt"], "reply": each[when]}
        for each in found
        for when, step in steps.items()
        if when in each
    ]


def _yaml(file: Path) -> dict[str, Any]:
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


async def _zipped(adapter: Path) -> AsyncIterator[bytes]:
    """The bytes of a ZIP archive of an adapter's files; without an optimizer's state."""
    with tempfile.TemporaryFile() as archive:
        await asyncio.to_thread(_write_zip, adapter, archive)
        archive.seek(0)
        while chunk := await asyncio.to_thread(archive.read, _CHUNK):
            yield chunk


def _write_zip(adapter: Path, archive: IO[bytes]) -> None:
    with zipfile.ZipFile(archive, "w") as written:  # tensors do not become smaller: nothing is compressed
        for file in sorted(adapter.iterdir()):
            if file.is_file() and not file.is_symlink() and not file.name.startswith((".", "optimizer.")):
                written.write(file, file.name)
