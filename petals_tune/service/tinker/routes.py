"""Tinker's interface as a whole: its paths, as the SDK 0.38 asks for them, and what is done while it serves."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from petals_tune.service.decoding.decoder import Decoder
from petals_tune.service.errors import ServiceError
from petals_tune.service.metrics import Metrics
from petals_tune.service.tinker.bodies import (
    CreateSamplingSession,
    CreateSession,
    OfModel,
    OfRequest,
    OfSession,
    Sample,
    read,
)
from petals_tune.service.tinker.checkpoints import Checkpoints
from petals_tune.service.tinker.listing import Listing
from petals_tune.service.tinker.offers import SavedOffers
from petals_tune.service.tinker.promises import Kind, Plan, Promises, Result
from petals_tune.service.tinker.records import CheckpointRecord, RunRecord, SamplerRecord, SessionRecord
from petals_tune.service.tinker.runs.live import LiveRuns, gone
from petals_tune.service.tinker.runs.run import TrainedModel
from petals_tune.service.tinker.runs.training import Training
from petals_tune.service.tinker.samplers import SampledModel, Samplers
from petals_tune.service.tinker.sampling import Sampling
from petals_tune.service.tinker.sessions import Sessions
from petals_tune.service.tinker.store import Store
from petals_tune.service.tinker.wire import MEDIA_TYPE
from petals_tune.service.users.fairness import Fairness

Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]

CLEAN_S = 60.0
HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What Tinker's interface keeps, and for how long; conf/service.yaml documents it."""

    runs_in_memory: int = 16
    samplers_in_memory: int = 32
    session_hours: float = 24.0
    unnamed_hours: float = 2.0
    autosave_minutes: float | None = 10.0


class AdapterModel(TrainedModel, SampledModel, Protocol):
    """The model with its adapters (petals_tune/service/tinker/runs/adapters.py)."""


class Tinker:
    """The endpoints. `request.state.owner` is whose key came with a request. Used by one event loop."""

    def __init__(
        self,
        folder: Path,
        model: AdapterModel,
        decoder: Decoder,
        fairness: Fairness,
        metrics: Metrics,
        *,
        names: Mapping[str, int],
        vocabulary: int,
        limits: Limits,
    ):
        """folder: of records and checkpoints; names: of the one model that is served, with its most positions."""
        self._names, self._limits, self._fairness = names, limits, fairness
        self._store = Store(folder / "runs.sqlite")
        self._checkpoints = Checkpoints(self._store, folder)
        self._live = LiveRuns(self._store, folder, model, most=limits.runs_in_memory)
        self.samplers = Samplers(self._store, self._checkpoints, model, most=limits.samplers_in_memory)
        self.offers = SavedOffers(self._store, self.samplers)
        name, most_positions = next(iter(names.items()))
        self._sampling = Sampling(
            self.samplers, decoder, model, name=name, most_positions=most_positions, vocabulary=vocabulary
        )
        self._training = Training(
            self._store,
            self._live,
            self._checkpoints,
            self.samplers,
            fairness,
            metrics,
            names=names,
            autosave_s=None if limits.autosave_minutes is None else 60 * limits.autosave_minutes,
        )
        kinds = {**self._training.kinds, "asample": Kind(plan=self._sample, can_be_cancelled=True)}
        self._promises = Promises(kinds, self._store)
        self._promised = tuple(kinds)

    @property
    def routes(self) -> list[Route]:
        posts: dict[str, Endpoint] = {
            "client/config": self._constant({}),
            "client/dynamic_config": self._constant({"sample_cancel_enabled": True}),
            "telemetry": self._constant({"status": "accepted"}),
            "create_session": self._create_session,
            "session_heartbeat": self._heartbeat,
            "sessions/{id}/finish": self._finish,
            "get_info": self._get_info,
            "create_sampling_session": self._create_sampling_session,
            "retrieve_future": self._retrieve_future,
            "cancel_future": self._cancel_future,
            **{kind: self._promise(kind) for kind in self._promised},
        }
        return [
            Route("/api/v1/healthz", self._constant({"status": "ok"})),
            Route("/api/v1/get_server_capabilities", self._capabilities),
            *(Route(f"/api/v1/{path}", endpoint, methods=["POST"]) for path, endpoint in posts.items()),
            *Listing(self._store, self._checkpoints, self.samplers).routes,
            *Sessions(self._store, self.samplers).routes,
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve within the block: requests that the last service left are done, what has expired is deleted.

        At its end runs and requests are written out, so that the next service goes on where this one stopped.
        """
        await asyncio.to_thread(self._checkpoints.delete_strays)
        self._promises.restore()
        cleaning = asyncio.create_task(self._clean_again())
        try:
            yield
        finally:
            cleaning.cancel()
            self.stop()
            await asyncio.gather(cleaning, return_exceptions=True)
            await self._promises.leave()
            await self._live.park_all()
            self._store.close()

    def stop(self) -> None:
        """Begin nothing any more: polls are answered at once, and what runs goes on to its end."""
        self._promises.stop()
        self._live.stop()

    async def clean(self) -> None:
        """Delete what has expired, and forget sessions that give no sign of life."""
        for session in self._store.all(SessionRecord):
            if session.seen_s + HOUR_S * self._limits.session_hours < time.time():
                await self._forget_session(session)
        for each in await asyncio.to_thread(
            self._checkpoints.delete_expired, unnamed_s=HOUR_S * self._limits.unnamed_hours
        ):
            self.samplers.forget(each)

    async def _clean_again(self) -> None:
        while True:
            await self.clean()
            await asyncio.sleep(CLEAN_S)

    # Sessions

    def _constant(self, answer: dict[str, Any]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            return JSONResponse(answer)

        return endpoint

    async def _capabilities(self, request: Request) -> Response:
        models = [
            {"model_name": name, "max_context_length": most, "trainable": True, "sampleable": True}
            for name, most in self._names.items()
        ]
        return JSONResponse({"supported_models": models})

    async def _create_session(self, request: Request) -> Response:
        asked, now_s = read(await request.body(), CreateSession), time.time()
        session = SessionRecord(
            id=secrets.token_hex(16),
            owner=request.state.owner,
            name=asked.display_name,
            metadata=asked.user_metadata or {},
            created_s=now_s,
            seen_s=now_s,
        )
        self._store.put(session)
        return JSONResponse({"type": "create_session", "session_id": session.id})

    async def _heartbeat(self, request: Request) -> Response:
        session = self._session(read(await request.body(), OfSession).session_id, request.state.owner, status=410)
        self._store.change(SessionRecord, {"seen_s": time.time()}, id=session.id)
        return JSONResponse({"type": "session_heartbeat"})

    async def _finish(self, request: Request) -> Response:
        session = self._store.one(SessionRecord, id=request.path_params["id"], owner=request.state.owner)
        if session is not None:  # one that was forgotten may be finished all the same
            await self._forget_session(session)
        return JSONResponse({})

    def _session(self, id: str, owner: str, *, status: int = 404) -> SessionRecord:
        found = self._store.one(SessionRecord, id=id, owner=owner)
        if found is None:
            raise ServiceError(status, f"there is no session {id!r} here (any more)", kind="invalid_request_error")
        return found

    async def _forget_session(self, session: SessionRecord) -> None:
        """End a session: its live runs and sampling sessions, and sampler weights that have no name."""
        for run in self._store.all(RunRecord, session=session.id):
            await self._live.drop(run.id)
            for each in self._store.all(CheckpointRecord, run=run.id, kind="sampler_weights", named=0):
                self._checkpoints.delete(each)
                self.samplers.forget(each)
        self._store.remove(SamplerRecord, session=session.id)
        self._store.remove(SessionRecord, id=session.id)

    # Promises

    def _promise(self, kind: str) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            return JSONResponse(self._promises.make(request.state.owner, kind, await request.body()))

        return endpoint

    async def _retrieve_future(self, request: Request) -> Response:
        owner, id = request.state.owner, read(await request.body(), OfRequest).request_id
        found = await self._promises.poll(owner, id)
        if found is None:
            run = self._store.one(RunRecord, id=id.partition("@")[2], owner=owner)
            if run is None:  # 410: the SDK sends the request for a sample again
                raise ServiceError(
                    410, f"there is no request {id!r} here (any more): send it again", kind="invalid_request_error"
                )
            found = {"error": str(gone(run, self._store.checkpoints(run.id))), "category": "user"}
        if isinstance(found, bytes):
            return Response(found, media_type=MEDIA_TYPE)
        return JSONResponse(found)

    async def _cancel_future(self, request: Request) -> Response:
        self._promises.cancel(request.state.owner, read(await request.body(), OfRequest).request_id)
        return JSONResponse({})

    # Runs and sampling sessions

    async def _get_info(self, request: Request) -> Response:
        run = self._live.check(read(await request.body(), OfModel).model_id, request.state.owner)
        return JSONResponse(
            {
                "type": "get_info",
                "model_id": run.id,
                "model_name": run.base_model,
                "model_data": {"model_name": run.base_model, "tokenizer_id": run.base_model},
                "is_lora": True,
                "lora_rank": run.lora.rank,
            }
        )

    async def _create_sampling_session(self, request: Request) -> Response:
        asked, owner = read(await request.body(), CreateSamplingSession), request.state.owner
        self._session(asked.session_id, owner)
        if asked.model_path is not None:
            base_model = self._checkpoints.find(asked.model_path, owner)[1].base_model
        else:
            base_model = asked.base_model or ""
            self._training.check_model(base_model)
        id = self.samplers.open(owner, asked.session_id, base_model, asked.model_path)
        return JSONResponse({"type": "create_sampling_session", "sampling_session_id": id})

    def _sample(self, owner: str, body: bytes) -> Plan:
        asked = read(body, Sample)
        sampler = self.samplers.find(asked.sampling_session_id or "", owner)
        self._sampling.check(asked)

        async def work() -> Result:
            with self._fairness.in_flight(owner, asked.num_samples):
                return await self._sampling.sample(sampler, asked)

        return Plan(
            name=(sampler.id, str(asked.seq_id)),
            work=work,
            check=lambda: self._fairness.check(owner, asked.num_samples, time.monotonic()),
            reply={"sample_sequence_ids": [secrets.token_hex(16) for _ in range(asked.num_samples)]},
        )
