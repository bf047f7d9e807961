"""A small HTTP server on the running event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from petals_tune.errors import ConfigError


@asynccontextmanager
async def http_server(app: web.Application, host: str, port: int, *, key: str) -> AsyncIterator[int]:
    """Serve `app`; yields the port, a free one for 0. Raises ConfigError for `key` where it cannot listen."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(
                f"{key}={port}: cannot listen on {host}: {error.strerror or error}\n  choose another port",
                key=key,
                seen=port,
            ) from None
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
