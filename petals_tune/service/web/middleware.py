"""What every request passes on its way in: counts, the end of the service, whose key it has, the size of its body."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from petals_tune.service.errors import ServiceError, bad_key, not_from_here, stopping, too_large
from petals_tune.service.metrics import Metrics
from petals_tune.service.users.keys import Keys

MOST_BYTES = 64 * 2**20  # of a body: a batch of Tinker's has tokens and log-probabilities of some MB
MOST_FILE_BYTES = 512 * 2**20  # of an uploaded file, as OpenAI documents
_FILES = "/v1/files"
# Still answered while the service stops: results of what was asked for before.
_RESULTS = ("/api/v1/retrieve_future", "/metrics")


def error_response(error: ServiceError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


@dataclass
class Doors:
    """Whether new requests are let in, and how many are inside. Used by one event loop."""

    open: bool = True
    inside: int = 0


class CountRequests:
    """Counts requests and the statuses of responses; answers new requests with 503 while the service stops."""

    def __init__(self, app: ASGIApp, doors: Doors, metrics: Metrics | None):
        self._app, self._doors, self._metrics = app, doors, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and self._metrics is not None:
                self._metrics.count_response(_interface(scope["path"]), message["status"])
            await send(message)

        if not self._doors.open and scope["path"] not in _RESULTS:
            await error_response(stopping())(scope, receive, counted)
            return
        if scope["path"] in _RESULTS:  # asked for again and again: nobody waits for the end of these
            await self._app(scope, receive, counted)
            return
        self._doors.inside += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            self._doors.inside -= 1


def _interface(path: str) -> str:
    return "openai" if path.startswith("/v1/") else "tinker" if path.startswith("/api/v1/") else "page"


class FindOwners:
    """Lets requests through whose key is known, and says whose they are: `request.state.owner`.

    Where no keys are needed, the pages of other sites, which a browser of this machine shows, are kept out: by the
    origin that browsers send, and by the name that they asked for (DNS may say 127.0.0.1 for any).
    """

    def __init__(self, app: ASGIApp, keys: Keys, is_open: Callable[[str], bool]):
        """`is_open`: whether a path needs no key."""
        self._app, self._keys, self._is_open = app, keys, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._keys.owners is None and not _is_from_here(headers):
            await error_response(not_from_here())(scope, receive, send)
            return
        owner = self._keys.owner(headers)
        if owner is None and not self._is_open(scope["path"]):
            await error_response(bad_key())(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)


def _is_from_here(headers: Headers) -> bool:
    host, origin = headers.get("host", ""), headers.get("origin")
    name = urlsplit(f"//{host}").hostname or ""
    try:
        is_loopback = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
    return is_loopback and (origin is None or urlsplit(origin).netloc == host)


class LimitBodies:
    """Refuses bodies over a limit, at the latest when they are read so far."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = MOST_FILE_BYTES if scope["path"] == _FILES else MOST_BYTES
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > most:
            await error_response(too_large(most))(scope, receive, send)
            return
        received = 0

        async def limited() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise too_large(most)
            return message

        await self._app(scope, limited, send)
