"""OpenAI's paths of tuning jobs, and of the models that they made."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from petals_tune.errors import ConfigError
from petals_tune.service.errors import ServiceError, not_found
from petals_tune.service.tuning.bodies import new_seed, read_job
from petals_tune.service.tuning.files import Files
from petals_tune.service.tuning.jobs import Jobs
from petals_tune.service.tuning.paging import page
from petals_tune.service.tuning.store import EventRecord, JobRecord, Store

_METADATA = re.compile(r"metadata\[(?P<key>.+)\]")


class Tuning:
    """The endpoints. `request.state.owner` is whose key came with a request."""

    def __init__(self, store: Store, files: Files, jobs: Jobs, *, names: Sequence[str], source: str, batch_size: int):
        """names: of the base model; batch_size: the recipe's own."""
        self._store, self._files, self._jobs = store, files, jobs
        self._names, self._source, self._batch_size = names, source, batch_size

    @property
    def routes(self) -> list[Route]:
        one = "/v1/fine_tuning/jobs/{id}"
        return [
            *self._files.routes,
            Route("/v1/fine_tuning/jobs", self._create, methods=["POST"]),
            Route("/v1/fine_tuning/jobs", self._list),
            Route(one, self._retrieve),
            Route(f"{one}/cancel", self._cancel, methods=["POST"]),
            Route(f"{one}/events", self._events),
            Route(f"{one}/checkpoints", self._checkpoints),
            Route("/v1/models/{name:path}", self._delete_model, methods=["DELETE"]),
        ]

    async def _create(self, request: Request) -> Response:
        owner = request.state.owner
        body = read_job(await request.body())
        starts_from = None
        if body.model not in self._names:
            made = self._jobs.made(body.model, owner)
            if made is None or made.source != self._source:
                raise not_found(body.model, list(self._names))
            starts_from = made.id
        training = self._files.find(body.training_file, owner, param="training_file")
        validation = None
        if body.validation_file is not None:
            validation = self._files.find(body.validation_file, owner, param="validation_file")
        job = JobRecord(
            id=f"ftjob-{secrets.token_hex(12)}",
            owner=owner,
            model=body.model,
            source=self._source,
            training_file=training.id,
            validation_file=body.validation_file,
            hyperparameters=body.chosen(batch_size=self._batch_size),
            seed=new_seed() if body.seed is None else body.seed,
            suffix=body.suffix,
            metadata=body.metadata or {},
            created_s=time.time(),
            starts_from=starts_from,
        )
        path = self._files.path
        created = self._jobs.create(
            job, training=path(training.id), validation=None if validation is None else path(validation.id)
        )
        return JSONResponse(described(created))

    async def _list(self, request: Request) -> Response:
        jobs = self._jobs.of(request.state.owner)
        for name, value in request.query_params.items():
            if found := _METADATA.fullmatch(name):
                jobs = [job for job in jobs if job.metadata.get(found["key"]) == value]
        return page(request, jobs, described, default=20, most=100)

    async def _retrieve(self, request: Request) -> Response:
        return JSONResponse(described(self._found(request)))

    async def _cancel(self, request: Request) -> Response:
        return JSONResponse(described(self._jobs.cancel(self._found(request).id)))

    async def _events(self, request: Request) -> Response:
        events = self._store.events(self._found(request).id)
        return page(request, events, _event, default=20, most=1000)

    async def _checkpoints(self, request: Request) -> Response:
        job = self._found(request)
        made = [job] if job.status == "succeeded" and not job.deleted else []
        return page(request, made, _checkpoint, default=10, most=100)

    async def _delete_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        job = self._jobs.made(name, request.state.owner)
        if job is None:
            if name in self._names:
                raise ConfigError(
                    f"{name} is the base model: models of own jobs can be deleted", key="model", seen=name
                )
            raise ServiceError(
                404, f"no job of this key made a model {name!r}", kind="invalid_request_error", code="model_not_found"
            )
        self._jobs.delete_model(job)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    def _found(self, request: Request) -> JobRecord:
        return self._jobs.find(request.path_params["id"], request.state.owner)


def described(job: JobRecord) -> dict[str, Any]:
    """A job in OpenAI's form."""
    chosen = asdict(job.hyperparameters)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_s),
        "finished_at": None if job.finished_s is None else int(job.finished_s),
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model if job.status == "succeeded" else None,
        "organization_id": job.owner,
        "status": job.status,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "hyperparameters": chosen,
        "method": {"type": "supervised", "supervised": {"hyperparameters": chosen}},
        "seed": job.seed,
        "metadata": job.metadata,
        "trained_tokens": job.trained_tokens,
        "error": None if job.error is None else asdict(job.error),
        "result_files": [],
        "integrations": [],
        "estimated_finish": None,
    }


def _event(event: EventRecord) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_s),
        "level": event.level,
        "message": event.message,
        "type": "message" if event.data is None else "metrics",
        "data": event.data or {},
    }


def _checkpoint(job: JobRecord) -> dict[str, Any]:
    """The one checkpoint of a job that is kept: its end."""
    return {
        "id": job.id.replace("ftjob-", "ftckpt-"),
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(job.finished_s or job.created_s),
        "fine_tuned_model_checkpoint": job.fine_tuned_model,
        "fine_tuning_job_id": job.id,
        "step_number": job.steps,
        "metrics": job.metrics,
    }
