"""The health page and its JSON."""

from __future__ import annotations

from importlib.resources import files

import msgspec
from aiohttp import web

from servers.health.report import Report

# The page shows names and texts of strangers, so it may load nothing from elsewhere and send nothing there.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Pages:
    """Serves the latest report."""

    def __init__(self) -> None:
        self._report: bytes | None = None  # as JSON
        self._page = files("servers.health").joinpath("page.html").read_text(encoding="utf-8")

    def show(self, report: Report) -> None:
        """Show `report` from now on. It is encoded once, not for each visitor."""
        self._report = msgspec.json.encode(report)

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/", self._html), web.get("/swarm.json", self._json)])
        return app

    async def _html(self, _: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html", headers=_HEADERS)

    async def _json(self, _: web.Request) -> web.Response:
        if self._report is None:
            return web.Response(
                status=503, text='{"error": "the first look at the swarm is not over"}', headers=_HEADERS
            )
        return web.Response(body=self._report, content_type="application/json", headers=_HEADERS)
