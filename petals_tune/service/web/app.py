"""The service as an ASGI application: its paths, what requests pass on their way to them, and its errors."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from petals_tune.errors import PetalsTuneError
from petals_tune.service.errors import ServiceError, translated
from petals_tune.service.metrics import Metrics
from petals_tune.service.users.keys import Keys
from petals_tune.service.web.middleware import CountRequests, Doors, FindOwners, LimitBodies, error_response

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
    "Cache-Control": "no-cache",  # asked for again each time, by their ETag: parts of two versions do not fit together
}


def application(
    routes: Sequence[BaseRoute], keys: Keys, *, doors: Doors | None = None, metrics: Metrics | None = None
) -> Starlette:
    """The application of these `routes`, with the pages, whose requests have an owner in `request.state.owner`.

    `doors`: closed when the service stops; None: it never does.
    """
    static = Path(str(files("petals_tune.service.page") / "static"))
    pages = [Route(path, _page(static / name)) for path, name in _PAGES.items()]
    return Starlette(
        routes=[
            *routes,
            *([] if metrics is None else [metrics.route]),
            *pages,
            Route("/healthz", _alive),
            Mount("/static", _Static(directory=static)),
        ],
        middleware=[
            Middleware(CountRequests, doors=doors or Doors(), metrics=metrics),
            Middleware(FindOwners, keys=keys, is_open=lambda path: path in _PAGES or path.startswith(_OPEN)),
            Middleware(LimitBodies),
        ],
        exception_handlers={
            ServiceError: _refused,
            PetalsTuneError: _failed,
            HTTPException: _of_http,
            ClientDisconnect: _left,
            Exception: _broken,
        },
    )


class _Static(StaticFiles):
    """Files of the pages, with the headers of the pages."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


def _page(file: Path) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        return FileResponse(file, headers=_HEADERS)

    return page


async def _alive(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _refused(request: Request, error: Any) -> Response:
    return error_response(error)


async def _failed(request: Request, error: Any) -> Response:
    return error_response(translated(error))


async def _of_http(request: Request, error: Any) -> Response:
    """Of a path or a method that there is not."""
    text = f"{request.method} {request.url.path}: {error.detail}"
    refusal = error_response(ServiceError(error.status_code, text, kind="invalid_request_error"))
    refusal.headers.update(error.headers or {})
    return refusal


async def _left(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it; the number is nginx's, for logs and metrics


async def _broken(request: Request, error: Exception) -> Response:
    logger.exception("%s %s", request.method, request.url.path, exc_info=error)
    return error_response(ServiceError(500, "the service has a fault: see its log", kind="server_error"))
