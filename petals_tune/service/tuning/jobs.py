"""Tuning jobs: one queue for all owners, a process for each job that runs, and the models that they make."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from petals_tune.errors import ConfigError, DataError, PetalsTuneError
from petals_tune.files import make_folder
from petals_tune.service.errors import ServiceError, too_many
from petals_tune.service.served import Offer
from petals_tune.service.tuning import metrics
from petals_tune.service.tuning.chats import held_out_share
from petals_tune.service.tuning.command import ADAPTER, CHECKPOINT, DATA, RUN, Recipe
from petals_tune.service.tuning.process import JobProcess, take_lock
from petals_tune.service.tuning.store import OPEN, EventRecord, JobError, JobRecord, Store

logger = logging.getLogger(__name__)

POLL_S = 0.2
GRACE_S = 30.0  # for a process to save its checkpoint; then it is killed


class Offers(Protocol):
    """The models of the service."""

    def add(self, offer: Offer) -> None: ...

    def withdraw(self, adapter: str) -> None: ...


class Jobs:
    """The jobs of a service. Used by one event loop."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        recipe: Recipe,
        *,
        source: str,
        at_once: int,
        most_waiting: int,
        offers: Offers,
        load: Callable[[str, Path], object],
        remove: Callable[[str], object],
    ):
        """folder: of all jobs; source: the base model; most_waiting: open jobs of an owner; load: by name, folder."""
        recipe.check(at_once)
        self._store, self._parent, self._recipe, self._source = store, folder, recipe, source
        self._most_waiting, self._offers, self._load, self._remove = most_waiting, offers, load, remove
        self._waiting: dict[str, str] = {}  # jobs that are to run -> owner, in order
        self._places = list(range(at_once))  # that are free
        self._turns: dict[str, int] = {}  # owner -> number of the last job that was started for him
        self._started = 0
        self._tasks: dict[asyncio.Task[None], str] = {}  # with the jobs that they are for
        self._wake, self._closing = asyncio.Event(), False

    def folder(self, id: str) -> Path:
        return self._parent / id

    def adapter(self, id: str) -> Path:
        """The adapter that a job made."""
        return self.folder(id) / RUN / ADAPTER

    def of(self, owner: str) -> list[JobRecord]:
        """The jobs of an owner, the latest first."""
        return self._store.jobs(owner)

    def find(self, id: str, owner: str) -> JobRecord:
        """Raises ServiceError (404) for a job that this owner does not have."""
        job = self._store.one(JobRecord, id=id)
        if job is None or job.owner != owner:
            raise ServiceError(404, f"there is no job {id!r} here", kind="invalid_request_error", code="not_found")
        return job

    def made(self, name: str, owner: str) -> JobRecord | None:
        """The job that made the model of this name; None where no job of this owner did, or it was deleted."""
        jobs = (job for job in self.of(owner) if job.status == "succeeded" and not job.deleted)
        return next((job for job in jobs if job.fine_tuned_model == name), None)

    def create(self, job: JobRecord, *, training: Path, validation: Path | None) -> JobRecord:
        """Take a job, whose files may be deleted from then on. Raises ServiceError where its owner has too many."""
        if self._recipe.private and not self._recipe.tokens:
            raise ConfigError(
                "the swarm is private, and jobs have no tokens for it: whoever runs the service gives tuning.tokens",
                key="model",
            )
        if sum(each.status in OPEN for each in self.of(job.owner)) >= self._most_waiting:
            raise too_many(f"{self._most_waiting} jobs of this key wait or run already", retry_after_s=60)
        data = self.folder(job.id) / DATA
        make_folder(data, key="folder")
        os.link(training, data / "train.jsonl")
        if validation is not None:
            os.link(validation, data / "validation.jsonl")
        self._store.put(job)
        self._say(job.id, f"Created fine-tuning job: {job.id}")
        self._spawn(self._check(job.id), job.id)
        return job

    def cancel(self, id: str) -> JobRecord:
        """End a job; its process is ended soon. Raises ConfigError for one that is over."""
        job = self._get(id)
        if job.status not in OPEN:
            raise ConfigError(f"the job {id} has {job.status} already", key="job", seen=job.status)
        self._say(id, "The job was cancelled", level="warn")
        job = self._change(id, status="cancelled", finished_s=time.time())
        self._waiting.pop(id, None)
        if id not in self._tasks.values():
            self._clear(id)
        return job

    def delete_model(self, job: JobRecord) -> None:
        """Take the model of a job from the service, and delete its adapter."""
        self._change(job.id, deleted=True)
        self._offers.withdraw(job.fine_tuned_model)
        self._remove(job.fine_tuned_model)
        shutil.rmtree(self.adapter(job.id), ignore_errors=True)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Offer the models of all jobs and run those that are open; at the end, processes save a checkpoint and end."""
        await asyncio.to_thread(self._restore)
        for job in self._store.all(JobRecord, "created_s", status="validating_files", source=self._source):
            self._spawn(self._check(job.id), job.id)
        serving = asyncio.create_task(self._serve())
        try:
            yield
        finally:
            self._closing = True
            serving.cancel()
            await asyncio.gather(serving, *self._tasks, return_exceptions=True)

    def _restore(self) -> None:
        """Offer the models that were made, and queue the jobs that are open, those that ran first.

        Jobs of another base model wait until that is served again.
        """
        jobs = self._store.all(JobRecord, "created_s", source=self._source)
        for job in jobs:
            if job.status == "succeeded" and not job.deleted:
                try:
                    self._load(job.fine_tuned_model, self.adapter(job.id))
                except PetalsTuneError as error:
                    logger.warning("the model %s is left out: %s", job.fine_tuned_model, error)
                    continue
                self._offer(job)
        self._waiting = {job.id: job.owner for status in ("running", "queued") for job in jobs if job.status == status}

    def _offer(self, job: JobRecord) -> None:
        name = job.fine_tuned_model
        self._offers.add(Offer(name=name, adapter=name, created=int(job.finished_s or job.created_s), owner=job.owner))

    async def _check(self, id: str) -> None:
        job = self._get(id)
        try:
            share = None
            if job.validation_file is None:
                share = await asyncio.to_thread(held_out_share, self.folder(id) / DATA / "train.jsonl")
        except DataError as error:
            self._fail(id, JobError(code="invalid_training_file", message=str(error), param="training_file"))
            return
        if self._get(id).status == "cancelled":
            self._clear(id)
        else:
            self._change(id, status="queued", held_out_share=share)
            self._say(id, "Files validated, moving job to queued state")
            self._waiting[id] = job.owner
            self._wake.set()

    async def _serve(self) -> None:
        while True:
            self._wake.clear()
            while self._places and self._waiting:
                # Owners by turns, and of an owner the job that has waited longest.
                id = min(self._waiting, key=lambda each: self._turns.get(self._waiting[each], 0))
                self._started += 1
                self._turns[self._waiting.pop(id)] = self._started
                self._spawn(self._run(id, self._places.pop(0)), id)
            await self._wake.wait()

    def _spawn(self, work: Any, id: str) -> None:
        task = asyncio.create_task(work)
        self._tasks[task] = id

        def over(task: asyncio.Task[None]) -> None:
            del self._tasks[task]
            self._wake.set()
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("job %s", id, exc_info=error)
                self._fail(id, JobError(code="server_error", message="the service has a fault: see its log"))

        task.add_done_callback(over)

    async def _run(self, id: str, place: int) -> None:
        try:
            while (lock := take_lock(self.folder(id))) is None and not self._stopped(id):
                await asyncio.sleep(POLL_S)
            if lock is None:
                if not self._closing:
                    self._clear(id)
                return
            process = JobProcess(self._begin(id, place), self.folder(id), lock)
            try:
                await self._follow(id, process)
            finally:
                status = process.close()
            await self._end(id, process, status)
        finally:
            self._places.append(place)

    def _begin(self, id: str, place: int) -> list[str]:
        """Prepare the folder of a job that is about to run, and return its command line."""
        job, run = self._get(id), self.folder(id) / RUN
        if (run / CHECKPOINT).exists():
            self._say(id, "The service was started again: the job goes on from its checkpoint")
        else:
            shutil.rmtree(run, ignore_errors=True)  # it had not taken a step
            self._say(id, "Fine-tuning job started")
        self._change(id, status="running")
        starts_from = None if job.starts_from is None else self.adapter(job.starts_from)
        return self._recipe.command(job, self.folder(id), starts_from=starts_from, place=place)

    async def _follow(self, id: str, process: JobProcess) -> None:
        """Report the metrics of a process until it has ended."""
        file, seen = self.folder(id) / RUN / metrics.FILE, None
        while True:
            ended = process.ended
            if not ended and self._stopped(id):
                process.end(now_s=time.monotonic(), grace_s=GRACE_S)
            if file.exists() and (now := (file.stat().st_size, file.stat().st_mtime_ns)) != seen:
                seen = now
                self._report(id, await asyncio.to_thread(lambda: list(metrics.read_rows(file))))
            if ended:
                return
            await asyncio.sleep(POLL_S)

    def _report(self, id: str, rows: Sequence[metrics.Row]) -> None:
        """Make events of the rows that are new; a run that goes on writes some of its rows again."""
        job = self._get(id)
        for row in rows:
            if row.steps_done <= (job.steps if row.is_training else job.validated):
                continue
            data = row.event()
            job = replace(
                job,
                steps=max(job.steps, row.steps_done),
                validated=job.validated if row.is_training else row.steps_done,
                metrics={**job.metrics, **data},
            )
            losses = {"training": data.get("train_loss"), "validation": data.get("full_valid_loss")}
            shown = ", ".join(f"{name} loss={loss:.4f}" for name, loss in losses.items() if loss is not None)
            self._say(id, f"Step {row.steps_done}: {shown}", data=data)
        self._change(id, steps=job.steps, validated=job.validated, metrics=job.metrics)

    async def _end(self, id: str, process: JobProcess, status: int) -> None:
        job, run = self._get(id), self.folder(id) / RUN
        if job.status == "cancelled":
            self._clear(id)
        elif status == 0:
            try:
                await asyncio.to_thread(self._load, job.fine_tuned_model, self.adapter(id))
            except PetalsTuneError as error:
                self._fail(id, JobError(code="model_not_loaded", message=str(error)))
                return
            if self._get(id).status == "cancelled":  # meanwhile
                self._remove(job.fine_tuned_model)
                self._clear(id)
                return
            tokens = json.loads((run / "result.json").read_text())["tokens"]
            self._offer(self._change(id, status="succeeded", finished_s=time.time(), trained_tokens=tokens))
            self._say(id, f"New fine-tuned model created: {job.fine_tuned_model}")
            self._say(id, "The job has successfully completed")
            shutil.rmtree(self.folder(id) / DATA, ignore_errors=True)
            (run / CHECKPOINT).unlink(missing_ok=True)
        elif not self._closing:
            lines = process.last_lines().replace(f"{self.folder(id)}/", "")  # whose path is nobody's business
            self._fail(id, _failure(status, lines))

    def _stopped(self, id: str) -> bool:
        return self._closing or self._get(id).status == "cancelled"

    def _fail(self, id: str, error: JobError) -> None:
        if self._get(id).status in OPEN:
            self._change(id, status="failed", finished_s=time.time(), error=error)
            self._say(id, f"The job failed: {error.message}", level="error")
            shutil.rmtree(self.folder(id) / DATA, ignore_errors=True)

    def _clear(self, id: str) -> None:
        shutil.rmtree(self.folder(id), ignore_errors=True)

    def _get(self, id: str) -> JobRecord:
        job = self._store.one(JobRecord, id=id)
        assert job is not None
        return job

    def _change(self, id: str, **fields: Any) -> JobRecord:
        job = replace(self._get(id), **fields)
        self._store.put(job)
        return job

    def _say(self, id: str, message: str, **fields: Any) -> None:
        number = secrets.token_hex(12)
        event = EventRecord(id=f"ftevent-{number}", job=id, created_s=time.time(), message=message, **fields)
        self._store.put(event)


def _failure(status: int, lines: str) -> JobError:
    """The error of a job whose process ended with `status` and these last lines."""
    if status == os.EX_TEMPFAIL:
        return JobError(code="swarm_unavailable", message=f"{lines}\nCreate the job again later.")
    if status < 0:
        return JobError(code="killed", message=f"the process of the job was ended by signal {-status}\n{lines}".strip())
    return JobError(code="recipe_failed", message=lines or f"the process of the job ended with status {status}")
