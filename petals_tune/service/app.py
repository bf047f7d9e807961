"""The service as an ASGI application: its paths, whose key a request has, and its errors."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from petals_tune.errors import PetalsTuneError
from petals_tune.service.errors import ServiceError, bad_key, translated
from petals_tune.service.users.keys import Keys

logger = logging.getLogger(__name__)

# Without a key: the pages, which hold nothing of anybody's and ask for one, word that the service is there, and
# links to download, which are signed.
_OPEN = ("/static/", "/healthz", "/api/v1/downloads/")
_PAGES = {"/": "index.html", "/runs": "runs.html"}
# Nothing from elsewhere is loaded, and no other site's page may show these in a frame.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def application(routes: Sequence[BaseRoute], keys: Keys) -> Starlette:
    """The application of these `routes`, with the pages, whose requests have an owner in `request.state.owner`."""
    static = Path(str(files("petals_tune.service.page") / "static"))
    pages = [Route(path, _page(static / name)) for path, name in _PAGES.items()]
    return Starlette(
        routes=[
            *routes,
            *pages,
            Route("/healthz", _alive),
            Mount("/static", StaticFiles(directory=static)),
        ],
        middleware=[Middleware(_Owners, keys=keys)],
        exception_handlers={ServiceError: _refused, PetalsTuneError: _failed, Exception: _broken},
    )


def _page(file: Path) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        return FileResponse(file, headers=_HEADERS)

    return page


async def _alive(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _refused(request: Request, error: Any) -> Response:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _failed(request: Request, error: Any) -> Response:
    return await _refused(request, translated(error))


async def _broken(request: Request, error: Exception) -> Response:
    logger.exception("%s %s", request.method, request.url.path, exc_info=error)
    return await _refused(request, ServiceError(500, "the service has a fault: see its log", kind="server_error"))


class _Owners:
    """Lets requests through whose key is known, and says whose they are."""

    def __init__(self, app: ASGIApp, keys: Keys):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, path = Request(scope), scope["path"]
        owner = self._keys.owner(request.headers)
        if owner is None and path not in _PAGES and not path.startswith(_OPEN):
            await (await _refused(request, bad_key()))(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        await self._app(scope, receive, send)
