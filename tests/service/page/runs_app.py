"""Runs that change as a test says, served as the gateway serves them."""

from __future__ import annotations

import io
import time
import zipfile
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from petals_tune.service.errors import ServiceError

LISTED = ("id", "kind", "name", "base_model", "created", "status", "metrics", "adapter")


def run(id: str, kind: str, name: str, status: str, **fields: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"base_model": "base", "created": int(time.time()) - 90, "adapter": False, "error": None}
    curves = fields.pop("curves", {})
    found = {"id": id, "kind": kind, "name": name, "status": status, "replies": [], **common, **fields}
    return {**found, "curves": curves, "metrics": list(curves)}


@dataclass
class Runs:
    """The runs, and what was asked of them."""

    all: list[dict[str, Any]] = field(default_factory=list)
    events: dict[str, list[str]] = field(default_factory=dict)
    uploaded: list[bytes] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/runs/list", self._list),
            Route("/runs/data/{id}", self._data),
            Route("/runs/data/{id}/adapter.zip", self._adapter),
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/fine_tuning/jobs", self._start, methods=["POST"]),
            Route("/v1/fine_tuning/jobs/{id}/events", self._events),
            Route("/v1/fine_tuning/jobs/{id}/cancel", self._cancel, methods=["POST"]),
        ]

    def find(self, request: Request) -> dict[str, Any]:
        found = next((run for run in self.all if run["id"] == request.path_params["id"]), None)
        if found is None:
            raise ServiceError(404, "there is no such run", kind="invalid_request_error")
        found["metrics"] = list(found["curves"])
        return found

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"runs": [{name: run[name] for name in LISTED} for run in self.all]})

    async def _data(self, request: Request) -> Response:
        return JSONResponse(self.find(request))

    async def _adapter(self, request: Request) -> Response:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as file:
            file.writestr("adapter_config.json", self.find(request)["name"])
        return Response(packed.getvalue(), media_type="application/zip")

    async def _upload(self, request: Request) -> Response:
        form = await request.form()
        assert form["purpose"] == "fine-tune"
        self.uploaded.append(await form["file"].read())  # type: ignore[union-attr]
        return JSONResponse({"id": "file-1", "object": "file"})

    async def _start(self, request: Request) -> Response:
        self.jobs.append(await request.json())
        self.all.insert(0, run("ftjob-1", "job", "mine", "running"))
        self.events["ftjob-1"] = ["started"]
        return JSONResponse({"id": "ftjob-1", "object": "fine_tuning.job", "status": "running"})

    async def _events(self, request: Request) -> Response:
        said = self.events[request.path_params["id"]]
        data = [{"created_at": 1000, "level": "info", "message": text} for text in said]
        return JSONResponse({"object": "list", "data": data[::-1], "has_more": False})

    async def _cancel(self, request: Request) -> Response:
        self.find(request)["status"] = "cancelled"
        return JSONResponse({"id": request.path_params["id"], "status": "cancelled"})
