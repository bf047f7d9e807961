"""Tinker's paths that list and describe sessions and sampling sessions, and those that are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from petals_tune.service.errors import ServiceError
from petals_tune.service.tinker.bodies import OfSampler, read
from petals_tune.service.tinker.listing import page_of
from petals_tune.service.tinker.records import RunRecord, SamplerRecord, SessionRecord
from petals_tune.service.tinker.samplers import Samplers
from petals_tune.service.tinker.store import Store

# What the SDK has and this service has not, with what to do instead.
_REFUSED = {
    ("POST", "copy_weights"): "there are no projects here: download a checkpoint, or publish it",
    ("POST", "create_custom_loss"): "losses of your own run in your client: forward_backward_custom with a function",
    ("POST", "retrieve_futures"): "results are asked for one by one: retrieve_future",
    ("POST", "sessions/search"): "sessions are listed, not searched: list_sessions",
    ("PUT", "sessions/{id}/project"): "there are no projects here",
    ("GET", "sessions/{id}/trace_export"): "sessions have no traces here",
    ("POST", "auth/token"): "keys are sent as they are: there are no tokens to exchange them for",
    ("GET", "audit"): "there is no audit log here",
    ("GET", "billing/usage/events"): "nothing is billed here",
    ("GET", "billing/usage/checkpoints/current"): "nothing is billed here",
}


class Sessions:
    """The endpoints. `request.state.owner` is whose key came with a request."""

    def __init__(self, store: Store, samplers: Samplers):
        self._store, self._samplers = store, samplers

    @property
    def routes(self) -> list[Route]:
        return [
            *(Route(f"/api/v1/{path}", _refusal(why), methods=[method]) for (method, path), why in _REFUSED.items()),
            Route("/api/v1/sessions", self._list),
            Route("/api/v1/sessions/{id}", self._session),
            Route("/api/v1/samplers/{id}", self._sampler),
            Route("/api/v1/join_sampling_session", self._join, methods=["POST"]),
        ]

    async def _list(self, request: Request) -> Response:
        found = self._store.all(SessionRecord, "created_s DESC", owner=request.state.owner)
        part, _ = page_of(request, found, default=20)
        return JSONResponse({"sessions": [each.id for each in part]})

    async def _session(self, request: Request) -> Response:
        found = self._store.one(SessionRecord, id=request.path_params["id"], owner=request.state.owner)
        if found is None:
            raise ServiceError(404, "there is no such session here (any more)", kind="invalid_request_error")
        return JSONResponse(
            {
                "training_run_ids": [each.id for each in self._store.all(RunRecord, session=found.id)],
                "sampler_ids": [each.id for each in self._store.all(SamplerRecord, session=found.id)],
                "user_metadata": found.metadata,
                "display_name": found.name,
            }
        )

    async def _sampler(self, request: Request) -> Response:
        found = self._samplers.find(request.path_params["id"], request.state.owner)
        return JSONResponse({"sampler_id": found.id, "base_model": found.base_model, "model_path": found.path})

    async def _join(self, request: Request) -> Response:
        """A number for a sampling client that was made from the handle of another one."""
        id, owner = read(await request.body(), OfSampler).sampling_session_id, request.state.owner
        session = self._store.one(SessionRecord, id=self._samplers.find(id, owner).session)
        if session is None:
            raise ServiceError(404, "there is no such session here (any more)", kind="invalid_request_error")
        self._store.change(SessionRecord, {"clones": session.clones + 1}, id=session.id)
        return JSONResponse({"type": "join_sampling_session", "client_counter": session.clones + 1})


def _refusal(why: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def endpoint(request: Request) -> Response:
        raise ServiceError(400, f"{request.url.path} is not honoured here: {why}", kind="invalid_request_error")

    return endpoint
