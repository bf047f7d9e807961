"""Tinker's paths that list, describe, download and delete runs and their checkpoints."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from petals_tune.errors import ConfigError
from petals_tune.service.errors import ServiceError
from petals_tune.service.tinker.bodies import SetTtl, WeightsInfo, read
from petals_tune.service.tinker.checkpoints import Checkpoints
from petals_tune.service.tinker.records import CheckpointRecord, RunRecord
from petals_tune.service.tinker.samplers import Samplers
from petals_tune.service.tinker.store import Store

MOST_DIGITS = 9  # of a place in a list
URL_S = 3600.0  # for so long a link to download is good
DOWNLOADS = "/api/v1/downloads/"  # whose links need no key
_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


class Listing:
    """The endpoints. Links to download are signed: who has one needs no key."""

    def __init__(self, store: Store, checkpoints: Checkpoints, samplers: Samplers):
        self._store, self._checkpoints, self._samplers = store, checkpoints, samplers
        self._secret = secrets.token_bytes(32)

    @property
    def routes(self) -> list[Route]:
        one = "/api/v1/training_runs/{run}/checkpoints/{kind}/{name}"
        return [
            Route("/api/v1/training_runs", self._runs),
            Route("/api/v1/training_runs/{run}", self._run),
            Route("/api/v1/training_runs/{run}/checkpoints", self._of_run),
            Route("/api/v1/checkpoints", self._all_checkpoints),
            Route("/api/v1/weights_info", self._weights_info, methods=["POST"]),
            Route(one, self._delete, methods=["DELETE"]),
            Route(f"{one}/publish", self._publish, methods=["POST", "DELETE"]),
            Route(f"{one}/ttl", self._ttl, methods=["PUT"]),
            Route(f"{one}/external_weights_urls", self._urls),
            Route(DOWNLOADS + "{run}/{kind}/{name}/{file}", self._download),
        ]

    async def _runs(self, request: Request) -> Response:
        runs = self._store.runs(request.state.owner)
        part, cursor = page_of(request, runs, default=20)
        return JSONResponse({"training_runs": [self._described(run) for run in part], "cursor": cursor})

    async def _run(self, request: Request) -> Response:
        return JSONResponse(self._described(self._owned(request)))

    async def _of_run(self, request: Request) -> Response:
        found = self._store.checkpoints(self._owned(request).id)
        return JSONResponse({"checkpoints": [_checkpoint(each) for each in found]})

    async def _all_checkpoints(self, request: Request) -> Response:
        runs = self._store.runs(request.state.owner)
        found = [each for run in runs for each in self._store.checkpoints(run.id)]
        found.sort(key=lambda each: each.created_s, reverse=True)
        part, cursor = page_of(request, found, default=100)
        return JSONResponse({"checkpoints": [_checkpoint(each) for each in part], "cursor": cursor})

    async def _delete(self, request: Request) -> Response:
        found = self._found(request)
        await asyncio.to_thread(self._checkpoints.delete, found)
        self._samplers.forget(found)
        return JSONResponse({})

    async def _publish(self, request: Request) -> Response:
        self._change(self._found(request), public=request.method == "POST")
        return JSONResponse({})

    async def _ttl(self, request: Request) -> Response:
        ttl_s = read(await request.body(), SetTtl).ttl_seconds
        self._change(self._found(request), expires_s=None if ttl_s is None else time.time() + ttl_s)
        return JSONResponse({})

    def _change(self, checkpoint: CheckpointRecord, **values: object) -> None:
        self._store.change(CheckpointRecord, values, run=checkpoint.run, kind=checkpoint.kind, name=checkpoint.name)

    async def _weights_info(self, request: Request) -> Response:
        path = read(await request.body(), WeightsInfo).tinker_path
        _, run = self._checkpoints.find(path, request.state.owner)
        lora = run.lora
        return JSONResponse(
            {
                "base_model": run.base_model,
                "is_lora": True,
                "lora_rank": lora.rank,
                "train_unembed": lora.train_unembed,
                "train_mlp": lora.train_mlp,
                "train_attn": lora.train_attn,
            }
        )

    async def _urls(self, request: Request) -> Response:
        found, until_s = self._found(request), int(time.time() + URL_S)
        folder = self._checkpoints.folder_of(found)
        urls = {}
        for file in sorted(folder.iterdir()):
            path = f"{DOWNLOADS}{found.run}/{found.kind}/{found.name}/{file.name}"
            urls[file.name] = str(
                request.url.replace(path=path, query=f"until={until_s}&by={self._sign(path, str(until_s))}")
            )
        return JSONResponse({"urls": urls, "expires": _iso(until_s)})

    async def _download(self, request: Request) -> Response:
        path, until = request.url.path, request.query_params.get("until", "")
        signature = self._sign(path, until).encode()
        good = hmac.compare_digest(signature, request.query_params.get("by", "").encode())
        if not good or int(until) < time.time():  # a number: it was signed
            raise ServiceError(403, "this link is not good any more: ask for another", kind="invalid_request_error")
        run, kind, name, file = (request.path_params[each] for each in ("run", "kind", "name", "file"))
        found = self._store.checkpoint(f"tinker://{run}/{kind}/{name}")
        place = None if found is None else self._checkpoints.folder_of(found) / file  # signed: these are names of ours
        if place is None or not place.is_file():
            raise ServiceError(404, "this checkpoint is gone", kind="invalid_request_error")
        return FileResponse(place, filename=file)

    def _sign(self, path: str, until: str) -> str:
        return hmac.new(self._secret, f"{path} {until}".encode(), hashlib.sha256).hexdigest()

    def _owned(self, request: Request) -> RunRecord:
        run = self._store.one(RunRecord, id=request.path_params["run"], owner=request.state.owner)
        if run is None:
            raise ServiceError(404, "there is no such training run here", kind="invalid_request_error")
        return run

    def _found(self, request: Request) -> CheckpointRecord:
        wanted = request.path_params["kind"], request.path_params["name"]
        for each in self._store.checkpoints(self._owned(request).id):
            if (each.kind, each.name) == wanted:
                return each
        raise ServiceError(404, "there is no such checkpoint here", kind="invalid_request_error")

    def _described(self, run: RunRecord) -> dict[str, Any]:
        checkpoints = self._store.checkpoints(run.id)

        def last(kind: str) -> dict[str, Any] | None:
            return next((_checkpoint(each) for each in checkpoints if each.kind == kind), None)

        return {
            "training_run_id": run.id,
            "base_model": run.base_model,
            "model_owner": run.owner,
            "is_lora": True,
            "lora_rank": run.lora.rank,
            "last_request_time": _iso(run.used_s),
            "last_checkpoint": last("weights"),
            "last_sampler_checkpoint": last("sampler_weights"),
            "user_metadata": run.metadata,
        }


def _checkpoint(found: CheckpointRecord) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{found.kind}/{found.name}",
        "checkpoint_type": _TYPES[found.kind],
        "time": _iso(found.created_s),
        "tinker_path": found.path,
        "size_bytes": found.bytes,
        "public": found.public,
        "user_metadata": found.metadata,
        "expires_at": None if found.expires_s is None else _iso(found.expires_s),
    }


def page_of(request: Request, all_of_them: Sequence[Any], *, default: int) -> tuple[Sequence[Any], dict[str, int]]:
    def number(name: str, otherwise: int) -> int:
        given = request.query_params.get(name)
        if given is None:
            return otherwise
        if not given.isdecimal() or len(given) > MOST_DIGITS:
            raise ConfigError(f"{name} is a number of up to {MOST_DIGITS} digits", key=name, seen=given)
        return int(given)

    offset, limit = number("offset", 0), number("limit", default)
    return all_of_them[offset : offset + limit], {"offset": offset, "limit": limit, "total_count": len(all_of_them)}


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat()
